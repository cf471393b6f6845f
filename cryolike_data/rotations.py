"""Rotation vectors and rotation matrices, in double precision.

A rotation vector v turns by its length (radian, any length) about its direction, right-handed: the matrix E(v) = expm([v]x) acts on columns
(x, y, z). CryoSPARC's poses are such vectors, and their E takes the particle frame to the volume frame.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .errors import ArgumentError

_TOLERANCE = 1e-4  # of R^T R; matrices that were stored in single precision pass


def rotation_matrices(rotvecs: Tensor) -> Tensor:
    """The matrices E(v) of rotation vectors.

    Parameters
    ----------
    rotvecs : (S, 3) tensor, radian, of any real dtype; vectors may be zero or longer than pi

    Returns
    -------
    (S, 3, 3) float64 tensor on the same device

    Raises
    ------
    ArgumentError
        if the tensor has another shape
    """
    if rotvecs.ndim != 2 or rotvecs.shape[-1] != 3:
        raise ArgumentError(f"Rotation vectors are an (S, 3) tensor, x, y, z in radian; these are {tuple(rotvecs.shape)}.")
    # Rodrigues' formula with sin(t)/t and (1 - cos(t))/t^2 = (sin(t/2)/(t/2))^2 / 2, smooth at zero. Not torch's matrix_exp, which
    # loses digits for a single small rotation (pytorch issue 196592).
    vectors = rotvecs.double()
    x, y, z = vectors.unbind(-1)
    zero = torch.zeros_like(x)
    skew = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=-1).reshape(-1, 3, 3)
    turns = torch.linalg.vector_norm(vectors, dim=-1)[:, None, None] / math.pi
    first, second = torch.sinc(turns), torch.sinc(turns / 2).square() / 2
    matrices: Tensor = torch.eye(3, dtype=torch.float64, device=vectors.device) + first * skew + second * (skew @ skew)
    return matrices


def rotation_vectors(matrices: Tensor) -> Tensor:
    """The shortest rotation vectors of rotation matrices: ``rotation_matrices`` takes them back.

    By way of the unit quaternion, from whichever of its components is the largest (Shepperd, J. Guidance and Control 1, 223, 1978), so that
    no digits are lost near the identity or near half a turn.

    Parameters
    ----------
    matrices : (S, 3, 3) tensor of any real dtype

    Returns
    -------
    (S, 3) float64 tensor on the same device, radian, none longer than pi; half a turn has two such vectors, of which it is one

    Raises
    ------
    ArgumentError
        if the tensor has another shape, or holds a matrix that is not a rotation
    """
    if matrices.ndim != 3 or matrices.shape[1:] != (3, 3):
        raise ArgumentError(f"Rotation matrices are an (S, 3, 3) tensor; these are {tuple(matrices.shape)}.")
    m = matrices.double()
    _require_rotations(m)
    xx, yy, zz = m[:, 0, 0], m[:, 1, 1], m[:, 2, 2]
    wx, wy, wz = m[:, 2, 1] - m[:, 1, 2], m[:, 0, 2] - m[:, 2, 0], m[:, 1, 0] - m[:, 0, 1]
    xy, xz, yz = m[:, 0, 1] + m[:, 1, 0], m[:, 0, 2] + m[:, 2, 0], m[:, 1, 2] + m[:, 2, 1]
    products = torch.stack(  # 4 q q^T of the quaternion q = (w, x, y, z): each row is q times a number
        [1 + xx + yy + zz, wx, wy, wz, wx, 1 + xx - yy - zz, xy, xz, wy, xy, 1 - xx + yy - zz, yz, wz, xz, yz, 1 - xx - yy + zz], dim=-1
    ).reshape(-1, 4, 4)
    row = products.diagonal(dim1=1, dim2=2).argmax(-1)
    q = torch.nn.functional.normalize(products[torch.arange(len(m), device=m.device), row], dim=-1)
    q = torch.where(q[:, :1] < 0, -q, q)  # q and -q are the same rotation; w >= 0 is the shorter way
    sine = torch.linalg.vector_norm(q[:, 1:], dim=-1)
    angle = 2 * torch.atan2(sine, q[:, 0])
    turned = sine > 0
    # No division by zero, not even one that is not used: its gradient would be NaN.
    return q[:, 1:] * torch.where(turned, angle / torch.where(turned, sine, 1), 2)[:, None]


def _require_rotations(matrices: Tensor) -> None:
    """Raise ``ArgumentError`` for the first of (S, 3, 3) float64 matrices that is not a rotation."""
    gram = matrices.mT @ matrices - torch.eye(3, dtype=torch.float64, device=matrices.device)
    fine = (gram.abs().amax((-2, -1)) < _TOLERANCE) & (torch.linalg.det(matrices) > 0)
    if not bool(fine.all()):
        first = int((~fine).nonzero()[0])
        raise ArgumentError(f"Matrix {first} is not a rotation (orthonormal, determinant 1): {matrices[first].tolist()}.")
