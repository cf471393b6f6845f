"""``ImageLikelihood``: what is found about each image of a batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..rotations import rotation_matrices, rotation_vectors


@dataclass(frozen=True, eq=False, repr=False)
class ImageLikelihood:
    """What ``integrated_log_likelihood`` finds about each of B images; float64 tensors on the CPU but for ``template`` (int64).

    An image that is zero everywhere, which is what normalisation makes of a constant one, has a pixel that is not finite, or optics that
    give no finite CTF (an amplitude contrast in percent does not) has NaN in place of every number.

    Attributes
    ----------
    log_likelihood : (B,) integrated over scale, offset, noise, displacement, rotation and templates
    template : (B,) number of the template of the most likely pose (template, displacement and rotation)
    displacement_A : (B, 2) its displacement (x, y) of the template before the rotation, angstrom
    rotation_rad : (B,) its rotation: the image at angle theta of the grid looks like the template at theta + rotation
    pose : (B, 3) the same as a rotation vector taking the particle frame to the volume frame, radian
    shift_A : (B, 2) translation (x, y) to apply to the image to centre the particle, angstrom
    by_template : (B, S) log-likelihood given each template, without its prior; None unless it was asked for
    """

    log_likelihood: Tensor
    template: Tensor
    displacement_A: Tensor
    rotation_rad: Tensor
    pose: Tensor
    shift_A: Tensor
    by_template: Tensor | None = None

    def __len__(self) -> int:
        return len(self.log_likelihood)

    def __repr__(self) -> str:
        known = "" if self.by_template is None else f", given each of {self.by_template.shape[1]} templates"
        return f"ImageLikelihood({len(self)} images{known})"


def pose_and_shift(rotvecs: Tensor, displacements_A: Tensor, rotations_rad: Tensor) -> tuple[Tensor, Tensor]:
    """Pose and shift, as CryoSPARC has them, of images that look like templates which were displaced and then rotated.

    Parameters
    ----------
    rotvecs : (B, 3) poses of the templates, radian
    displacements_A : (B, 2) displacements (x, y) of the templates, angstrom
    rotations_rad : (B,) the image at angle theta of the grid looks like the template at theta + rotation

    Returns
    -------
    pose : (B, 3) float64 rotation vectors taking the particle frame to the volume frame, radian
    shift_A : (B, 2) float64 translations (x, y) to apply to the images to centre the particles, angstrom
    """
    # Angles of the grid run from y to x, so that the image is the template turned by the rotation from x to y.
    zero = torch.zeros_like(rotations_rad)
    turn = rotation_matrices(torch.stack([zero, zero, rotations_rad], dim=1))
    pose = rotation_vectors(rotation_matrices(rotvecs) @ turn.mT)
    return pose, -(turn[:, :2, :2] @ displacements_A.double()[:, :, None])[..., 0]
