"""What ``torch.compile`` leaves as it is in a program that it compiles."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch


def not_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, into which ``torch.compile`` does not follow a program."""
    if "torch._dynamo" not in sys.modules:  # which takes a second to import
        return function
    apart: Callable[..., Any] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return apart
