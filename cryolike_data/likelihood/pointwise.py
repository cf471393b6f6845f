"""What is worked out of the sums for each image, template, displacement and rotation: little arithmetic for very many numbers.

On CUDA it is done in kernels that torch compiles of the formulas when they are first needed: one pass over memory in place of one for
each operation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

_LOG_MARGINAL = """
template <typename T> T log_marginal(T ixx, T isx, T b, T tiny, T half_n) {
  T a = ixx - isx * isx;
  const T least = tiny * ixx;
  a = a < least ? least : a;
  T explained = b * b / a;
  explained = explained > 1 - tiny ? 1 - tiny : explained;
  return -half_n * log1p(-explained) - log(a) / 2;
}
"""
_EXP_BELOW = "template <typename T> T exp_below(T value, T largest) { return exp(value - largest); }"


def log_marginal(ixx: Tensor, isx: Tensor, b: Tensor, half_n: float) -> Tensor:
    """``-p ln(1 - b^2 / A) - ln(A) / 2`` with ``A = ixx - isx^2``: the log-likelihood but for what no template changes.

    Parameters
    ----------
    ixx, isx, b : sums of images without background and of a mask of norm 1; they broadcast to the shape of ``b``. ``isx``, of the
        shape of A, and ``b`` may be overwritten.
    half_n : p
    """
    tiny = 8 * torch.finfo(b.dtype).eps
    if b.device.type == "cuda":
        marginal: Tensor = _compiled(_LOG_MARGINAL, ("tiny", "half_n"))(ixx, isx, b, tiny=tiny, half_n=half_n)
        return marginal
    a = torch.addcmul(ixx, isx, isx, value=-1, out=isx)
    torch.maximum(a, tiny * ixx, out=a)  # of a template that is all background, rounding is left
    value = b.square_().div_(a).clamp_(max=1 - tiny).neg_().log1p_().mul_(-half_n)
    return value.sub_(a.log_(), alpha=0.5)


def log_sum_exp(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of (..., K) values, which may be overwritten: logarithm of the sum of their exponentials, the largest, and its place."""
    largest, place = values.max(-1)
    if values.device.type == "cuda":
        below: Tensor = _compiled(_EXP_BELOW, ())(values, largest[..., None])
    else:
        below = values.sub_(largest[..., None]).exp_()
    return below.sum(-1).log_().add_(largest), largest, place


@cache
def _compiled(source: str, scalars: tuple[str, ...]) -> Callable[..., Tensor]:
    compiled: Callable[..., Tensor] = torch.cuda.jiterator._create_jit_fn(source, **dict.fromkeys(scalars, 0.0))
    return compiled
