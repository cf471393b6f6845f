"""Files of one tensor, whose numbers are written between two pieces: what ``torch.load`` reads, and always the same bytes."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from support import run_python
from torch import Tensor

from cryolike_data.export.tensor_file import around_tensor

DTYPES = [torch.float16, torch.float32, torch.float64, torch.complex64, torch.complex128, torch.int8, torch.int64, torch.uint8]


def tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, dtype=torch.complex128 if dtype.is_complex else torch.float64, generator=generator).to(dtype)
    return torch.randint(0, 100, shape, dtype=dtype, generator=generator)


def written(numbers: Tensor) -> bytes:
    """A file of a tensor."""
    before, after = around_tensor(tuple(numbers.shape), numbers.dtype)
    return before + numbers.numpy().tobytes() + after


def same(one: Tensor, other: Tensor) -> None:
    assert (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
    assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 8, 8), (7,), (3, 5, 7), (1, 1), ()], ids=str)
def test_torch_loads_the_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    numbers = tensor(shape, dtype)
    same(torch.load(io.BytesIO(written(numbers)), weights_only=True), numbers)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 8, 8), (3, 5, 7)], ids=str)
def test_torch_maps_the_tensor(tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    numbers = tensor(shape, dtype)
    (tmp_path / "a.pt").write_bytes(written(numbers))
    same(torch.load(tmp_path / "a.pt", weights_only=True, mmap=True), numbers)


def test_no_images_make_an_empty_tensor() -> None:
    numbers = torch.empty((0, 4, 4))
    same(torch.load(io.BytesIO(written(numbers)), weights_only=True), numbers)


@pytest.mark.parametrize("shape", [(1, 1), (5, 8, 8), (300, 64, 64)], ids=str)
def test_little_stands_around_the_numbers(shape: tuple[int, ...]) -> None:
    numbers = tensor(shape, torch.float32)
    assert 0 < len(written(numbers)) - numbers.nbytes < 4096


def test_numbers_lie_in_one_stretch_at_a_multiple_of_64_bytes() -> None:
    numbers = tensor((5, 8, 8), torch.float64)
    assert written(numbers).index(numbers.numpy().tobytes()) % 64 == 0


def test_tensors_of_equal_size_and_other_shape_are_told_apart() -> None:
    for shape in ((4, 6), (6, 4), (24,), (4, 6)):
        for dtype in (torch.float32, torch.int32):
            loaded = torch.load(io.BytesIO(written(torch.ones(shape, dtype=dtype))), weights_only=True)
            assert (loaded.shape, loaded.dtype) == (shape, dtype)


def test_another_process_writes_the_same_bytes() -> None:
    numbers = tensor((5, 8, 8), torch.float32)
    code = """
        import sys
        import torch
        from cryolike_data.export.tensor_file import around_tensor

        sys.stdout.write(" ".join(part.hex() for part in around_tensor((5, 8, 8), torch.float32)))
    """
    ran = run_python(code)
    assert ran.returncode == 0, ran.stderr
    before, after = map(bytes.fromhex, ran.stdout.split())
    assert before + numbers.numpy().tobytes() + after == written(numbers)


def test_it_writes_what_torch_writes_but_for_checksums() -> None:
    """Same length and, apart from the few bytes of checksums, the same bytes as ``torch.save`` to a stream."""
    numbers = tensor((50, 8, 8), torch.float32)
    stream = io.BytesIO()
    torch.save(numbers, stream)
    ours, theirs = np.frombuffer(written(numbers), np.uint8), np.frombuffer(stream.getvalue(), np.uint8)
    assert len(ours) == len(theirs)
    assert np.count_nonzero(ours != theirs) < 64
