"""Memory and room on the disk: what is asked for, what is kept and what is given back."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support import disk_of, run_python, uids, write_particles, write_stack, write_table

from cryolike_data import IndexedDataset, export_zarr, files
from cryolike_data.files import keep_room
from cryolike_data.memory import kept_tensor, own_array
from cryolike_data.repeated import Repeated, is_repeated, once, one_value_once, repeat, take

ROOM = 3 << 20


def room_of(folder: Path, size: int) -> os.stat_result:
    """The state of a new file for which room was set aside."""
    descriptor = os.open(folder / "file", os.O_WRONLY | os.O_CREAT)
    try:
        keep_room(descriptor, size)
        return os.fstat(descriptor)
    finally:
        os.close(descriptor)


def failing(code: int) -> Any:
    """A C library whose file systems refuse to set room aside."""

    def fallocate(*_: int) -> int:
        ctypes.set_errno(code)
        return -1

    return lambda: SimpleNamespace(fallocate=fallocate)


def test_room_is_set_aside_and_the_file_stays_empty(tmp_path: Path) -> None:
    with disk_of(tmp_path / "disk", "8m") as disk:
        found = room_of(disk, ROOM)
    assert found.st_size == 0
    assert ROOM <= 512 * found.st_blocks < ROOM + (1 << 20)


def test_a_disk_that_is_too_small_is_noticed_before_anything_is_written(tmp_path: Path) -> None:
    with disk_of(tmp_path / "disk", "2m") as disk, pytest.raises(OSError, match="No space left") as raised:
        room_of(disk, ROOM)
    assert raised.value.errno == errno.ENOSPC


@pytest.mark.parametrize("code", [errno.EDQUOT, errno.EFBIG])
def test_so_is_a_quota_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr(files, "libc", failing(code))
    with pytest.raises(OSError, match=os.strerror(code)):
        room_of(tmp_path, ROOM)


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EINTR])
def test_a_file_system_that_sets_no_room_aside_is_written_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr(files, "libc", failing(code))
    assert room_of(tmp_path, ROOM).st_blocks == 0
    dataset = IndexedDataset(write_particles(tmp_path, 6)[0])
    export_zarr(dataset, tmp_path / "store", progress=False)


def test_so_is_another_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "libc", failing(errno.ENOSPC))
    monkeypatch.setattr(sys, "platform", "darwin")
    assert room_of(tmp_path, ROOM).st_blocks == 0


@pytest.mark.parametrize("shape", [(0,), (3, 5), (100_000,), (1_000_000,), (3, 524_288)])
def test_an_array_of_its_own_is_zero_and_writable(shape: tuple[int, ...]) -> None:
    array = own_array(shape, np.float32)
    assert array.shape == shape
    assert not array.any()
    array[...] = 1
    assert array.sum() == array.size


def test_an_array_needs_no_kernel_with_large_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pages(mmap.mmap):
        def madvise(self, *_: int) -> None:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(mmap, "mmap", Pages)
    assert not own_array((1_000_000,), np.float32).any()


FORKED = """
    import os
    import numpy as np
    from cryolike_data.memory import own_array
    array = own_array((1_000_000,), np.float32)
    child = os.fork()
    if child == 0:
        array[:] = 1
        os._exit(0)
    os.waitpid(child, 0)
    assert not array.any()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_writes_to_an_array_of_its_own() -> None:
    run = run_python(FORKED)
    assert run.returncode == 0, run.stderr


SHRINKING = """
    import resource, sys
    from cryolike_data import Downsample, IndexedDataset, export_zarr
    dataset = IndexedDataset(sys.argv[1])
    pages = []
    for k in range(7):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        export_zarr(dataset, f"{sys.argv[2]}/{k}", downsample=Downsample(box=128), shard_bytes=4 << 20, progress=False)
        pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    print(min(pages) / len(dataset))  # whatever else the system does to the pages of a process, it does not do all the time
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about the allocator of glibc")
def test_an_export_does_not_find_the_pages_of_its_intermediates_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # dask leaves it behind, for its workers: memory is given back at once then, whoever asks.
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    n = 256
    write_stack(tmp_path / "a.mrc", np.zeros((n, 256, 256), "f4"))
    columns = {"blob__path": ["a.mrc"] * n, "blob__idx": np.arange(n, dtype="u4"), "blob__psize_A": np.full(n, 1.5, "f4")}
    write_table(tmp_path / "a.cs", uid=uids(n), **columns)
    run = run_python(SHRINKING, tmp_path / "a.cs", tmp_path)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 5  # of about 100 pages that the intermediates of an image take


def test_a_repeated_column_stays_one_row_when_rows_are_chosen() -> None:
    column = repeat(np.array([[1.5, 2.5]]), 5)
    assert column.tolist() == [[1.5, 2.5]] * 5
    assert is_repeated(column)
    chosen = take(column, np.array([4, 0, 0]))
    assert chosen.tolist() == [[1.5, 2.5]] * 3
    assert is_repeated(chosen)
    assert once(chosen).tolist() == [[1.5, 2.5]]
    plain = np.arange(5)
    assert take(plain, np.array([4, 0])).tolist() == [4, 0]
    assert once(plain) is plain
    assert one_value_once(plain) is plain
    assert is_repeated(one_value_once(np.full(4, 7)))


def test_particles_keep_what_all_share_once_when_they_are_selected_and_sent(tmp_path: Path) -> None:
    particles = IndexedDataset(write_particles(tmp_path, 9)[0]).particles
    some = particles[[7, 1, 1]]
    for column in (particles.pixel_size, particles.box, some.pixel_size, some.box):
        assert is_repeated(column)
    assert isinstance(some.__getstate__()["box"], Repeated)
    assert some.box.tolist() == particles.box[:3].tolist()


def test_a_thread_works_in_the_same_memory_again_and_other_threads_elsewhere() -> None:
    def place(use: str, images: int) -> int:
        return kept_tensor(use, (images, 8, 8), torch.float32).data_ptr()

    first = kept_tensor("one", (4, 8, 8), torch.float32)
    first.fill_(1)
    assert place("one", 4) == place("one", 3) == first.data_ptr()
    assert place("two", 4) != first.data_ptr()
    larger = kept_tensor("one", (1000, 8, 8), torch.float64)
    assert larger.shape == (1000, 8, 8)
    assert larger.dtype == torch.float64
    assert place("one", 4) == larger.data_ptr()
    assert first.sum() == first.numel()  # who still has it keeps it
    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(place, "one", 4).result() != larger.data_ptr()
