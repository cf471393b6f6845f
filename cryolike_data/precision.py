"""Products of matrices in full precision, whatever a program has asked torch for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """Without shortcuts such as TF32 on CUDA, which a training program may have asked for: they would cost a likelihood several nats."""
    # Since torch 2.9 there are two ways to ask for them, and the older one refuses to be read once a program has used the newer.
    everywhere: Any = torch.backends
    newer = hasattr(everywhere, "fp32_precision")
    before = everywhere.cuda.matmul.fp32_precision if newer else torch.get_float32_matmul_precision()
    if newer and before == everywhere.fp32_precision:
        before = "none"  # it is that of all of torch, and has to go on following it

    def ask_for(precision: str) -> None:
        if newer:
            everywhere.cuda.matmul.fp32_precision = precision
        else:
            torch.set_float32_matmul_precision(precision)

    full = {"none", "ieee"} if newer else {"highest"}
    if before in full and (not newer or everywhere.fp32_precision in full):
        yield
        return
    ask_for("ieee" if newer else "highest")
    try:
        yield
    finally:
        ask_for(before)
