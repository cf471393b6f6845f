"""Products of matrices in full precision, whatever a program has asked torch for."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Without shortcuts that a training program may have asked for: they would cost a likelihood several nats.

    These are TF32 on CUDA, and lower precision by ``torch.autocast`` on this device.
    """
    kind = device.type
    cast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    _WITHOUT_TF32.begin()
    try:
        with torch.autocast(kind, enabled=False) if cast else nullcontext():
            yield
    finally:
        _WITHOUT_TF32.end()


class _WithoutTf32:
    """Asks for full precision in the whole process, for as long as any thread is in need of it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._before: str | None = None

    def begin(self) -> None:
        """Ask for it, if nobody has yet."""
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._before = _ask_for_full_precision()

    def end(self) -> None:
        """Ask for what was asked for before, if nobody else is in need of it."""
        with self._lock:
            self._users -= 1
            if not self._users and self._before is not None:
                _ask_for(self._before)


_WITHOUT_TF32 = _WithoutTf32()
# Since torch 2.9 there are two ways to ask for precision, and the older one refuses to be read once a program has used the newer.
_BACKENDS: Any = torch.backends
_NEWER = hasattr(torch.backends, "fp32_precision")


def _ask_for(precision: str) -> None:
    if _NEWER:
        _BACKENDS.cuda.matmul.fp32_precision = precision
    else:
        torch.set_float32_matmul_precision(precision)


def _ask_for_full_precision() -> str | None:
    """What was asked for before; None where that is full precision as well."""
    before: str = _BACKENDS.cuda.matmul.fp32_precision if _NEWER else torch.get_float32_matmul_precision()
    if _NEWER and before == _BACKENDS.fp32_precision:
        before = "none"  # it is that of all of torch, and has to go on following it
    full = {"none", "ieee"} if _NEWER else {"highest"}
    if before in full and (not _NEWER or _BACKENDS.fp32_precision in full):
        return None
    _ask_for("ieee" if _NEWER else "highest")
    return before
