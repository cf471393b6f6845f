"""The arena and the pool it falls back to: the same pixels either way, and nothing left open, mapped or crashed."""

from __future__ import annotations

import gc
import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet

import numpy as np
import pytest
import torch
from support import another_thread_at, mapped_files, numbered_images, open_files, read_images, run_python, write_stack

import cryolike_data.arena as arena_module
import cryolike_data.file_size as file_size_module
import cryolike_data.stacks as stacks_module
from cryolike_data.arena import Arena, NoMoreMapsError
from cryolike_data.errors import StackError
from cryolike_data.pages import page_runs
from cryolike_data.stacks import Stacks, open_stacks

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="arenas are for Linux")

#: What the system says of how many maps a process may have.
MAX_MAPS = Path("/proc/sys/vm/max_map_count")


def written(folder: Path, counts: list[int], box: int = 8, **options: Any) -> tuple[list[Path], list[np.ndarray]]:
    """One stack of each number of images, and their images."""
    dtype = options.pop("dtype", "f4")
    images = [numbered_images(count, box, dtype=dtype, start=k) for k, count in enumerate(counts)]
    return [write_stack(folder / f"{k}.mrc", part, **options) for k, part in enumerate(images)], images


def everything(counts: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """File and image numbers of all images, mixed up, some of them twice."""
    file = np.repeat(np.arange(len(counts)), counts)
    image = np.concatenate([np.arange(count) for count in counts])
    chosen = np.random.default_rng(2).integers(0, len(file), 2 * len(file))
    return file[chosen], image[chosen]


def read(stacks: Stacks, file: np.ndarray, image: np.ndarray, box: int = 8) -> np.ndarray:
    out = np.empty((len(file), box, box), stacks.dtype)
    read_images(stacks, file, image, out)
    return out


def check(stacks: Stacks, images: list[np.ndarray], *, through_arena: bool) -> None:
    file, image = everything([len(part) for part in images])
    out = read(stacks, file, image, images[0].shape[-1])
    np.testing.assert_array_equal(out, np.stack([images[f][z] for f, z in zip(file, image, strict=True)]))
    assert isinstance(stacks._arena, Arena) == through_arena


@pytest.mark.parametrize("dtype", ["i1", "i2", "u2", "f2", "f4"])
@pytest.mark.parametrize("box", [1, 7, 8, 33, 64])
def test_images_of_every_dtype_and_box_are_those_of_the_files(tmp_path: Path, dtype: str, box: int) -> None:
    paths, images = written(tmp_path, [3, 1, 5], box, dtype=dtype)
    check(open_stacks(paths), images, through_arena=True)


@pytest.mark.parametrize(("box", "dtype"), [(256, "f4"), (600, "f4"), (458, "f4"), (512, "f4"), (513, "i1"), (1031, "i1")])
def test_large_images_are_read_whole_however_they_can_be_cut(tmp_path: Path, box: int, dtype: str) -> None:
    paths, images = written(tmp_path, [2, 1, 3], box, dtype=dtype)
    check(open_stacks(paths), images, through_arena=True)


@pytest.mark.parametrize("box", [8, 600])
def test_batches_whose_places_are_known_are_read_without_looking_them_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, box: int) -> None:
    paths, (one, other) = written(tmp_path, [2, 3], box)
    located = open_stacks(paths).locate(np.array([1, 0, 1]), np.array([2, 1, 0]))
    batches = np.array([[0, 1], [2, 2]])
    places = list(located.places(batches))
    monkeypatch.setattr(located, "_found", None)
    for batch, of_batch, wanted in zip(batches, places, ([other[2], one[1]], [other[0]] * 2), strict=True):
        out = np.empty((2, box, box), "f4")
        located.reading(batch, located.target(out), of_batch)()
        np.testing.assert_array_equal(out, np.stack(wanted))


@pytest.mark.parametrize("before", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("box", [8, 600])
def test_images_go_to_any_place_of_a_buffer(tmp_path: Path, box: int, before: int) -> None:
    # An odd number of pixels before them: their place in the buffer is no multiple of anything larger than a pixel.
    paths, (images,) = written(tmp_path, [3], box)
    buffer = torch.full((before + images.size + 2,), 7.0)
    located = open_stacks(paths).locate(np.zeros(3, np.int64), np.arange(3))
    located.reading(np.array([2, 0, 1]), located.target(buffer[before:-2].view(images.shape).numpy()))()
    np.testing.assert_array_equal(buffer[before:-2].view(images.shape), images[[2, 0, 1]])
    assert (buffer[:before] == 7).all()
    assert (buffer[-2:] == 7).all()


@pytest.mark.parametrize("extended", [0, 1024, 7168, 12, 4 * 1025])
def test_extended_headers_are_stepped_over(tmp_path: Path, extended: int) -> None:
    paths, images = written(tmp_path, [3, 4], extended=extended)
    check(open_stacks(paths), images, through_arena=True)


@pytest.mark.parametrize("extended", [1, 2, 1023])
def test_pixels_at_odd_places_are_read_without_an_arena(tmp_path: Path, extended: int) -> None:
    paths, images = written(tmp_path, [3, 4], extended=extended)
    check(open_stacks(paths), images, through_arena=False)


def test_headers_of_different_lengths_share_an_arena(tmp_path: Path) -> None:
    images = [numbered_images(4, 9, start=k) for k in range(3)]
    paths = [write_stack(tmp_path / f"{k}.mrc", part, extended=100 * k) for k, part in enumerate(images)]
    check(open_stacks(paths), images, through_arena=True)


@pytest.mark.parametrize(("box", "extended"), [(128, 0), (32, 3072), (96, 35 << 10)], ids=["pages", "to the end", "from the same on"])
def test_images_as_large_as_whole_pages_are_read(tmp_path: Path, box: int, extended: int) -> None:
    paths, images = written(tmp_path, [2, 3], box, extended=extended)
    check(open_stacks(paths), images, through_arena=True)


def test_stacks_larger_than_an_alignment_are_read(tmp_path: Path) -> None:
    paths, images = written(tmp_path, [9, 2, 9], 256)
    check(open_stacks(paths), images, through_arena=True)


def test_byte_swapped_stacks_are_read_without_an_arena(tmp_path: Path) -> None:
    paths, images = written(tmp_path, [3, 4], order=">")
    check(open_stacks(paths), images, through_arena=False)


def test_one_byte_swapped_stack_among_others_is_read(tmp_path: Path) -> None:
    images = [numbered_images(4, 8, start=k) for k in range(3)]
    paths = [write_stack(tmp_path / f"{k}.mrc", part, order="<><"[k]) for k, part in enumerate(images)]
    check(open_stacks(paths), images, through_arena=True)


def test_mixed_dtypes_are_read_in_the_one_that_holds_all(tmp_path: Path) -> None:
    images = [numbered_images(4, 8, dtype=dtype, start=k) for k, dtype in enumerate(["i2", "f4", "f2"])]
    paths = [write_stack(tmp_path / f"{k}.mrc", part) for k, part in enumerate(images)]
    stacks = open_stacks(paths)
    assert stacks.dtype == np.float32
    check(stacks, images, through_arena=True)


def test_boxes_that_differ_are_each_read(tmp_path: Path) -> None:
    small, large = numbered_images(4, 8), numbered_images(3, 16)
    stacks = open_stacks([write_stack(tmp_path / "s.mrc", small), write_stack(tmp_path / "l.mrc", large)])
    for _ in range(2):
        np.testing.assert_array_equal(read(stacks, np.zeros(4, int), np.arange(4), 8), small)
        np.testing.assert_array_equal(read(stacks, np.ones(3, int), np.arange(3), 16), large)


def test_a_batch_of_part_of_a_larger_buffer_leaves_the_rest_alone(tmp_path: Path) -> None:
    paths, images = written(tmp_path, [3])
    buffer = np.full((5, 8, 8), 7, np.float32)
    read_images(open_stacks(paths), np.zeros(3, int), np.arange(3), buffer[1:4])
    np.testing.assert_array_equal(buffer[1:4], images[0])
    assert (buffer[[0, 4]] == 7).all()


def test_numbers_of_32_bits_reach_the_end_of_a_large_stack(tmp_path: Path) -> None:
    # A sparse file: box 257 with 8-bit pixels, image 40,000 begins beyond 2**31 bytes.
    box, n = 257, 40_000
    path = write_stack(tmp_path / "large.mrc", np.zeros((1, box, box), "i1"), nz=n)
    last = numbered_images(1, box, dtype="i1")
    with path.open("r+b") as file:
        file.seek(1024 + (n - 1) * box * box)
        file.write(last.tobytes())
    out = read(open_stacks([path]), np.zeros(1, np.int32), np.full(1, n - 1, np.int32), box)
    np.testing.assert_array_equal(out, last)


def test_an_image_beyond_eight_gigabytes_is_seen_where_it_lies(tmp_path: Path) -> None:
    box, n = 256, 40_000
    path = write_stack(tmp_path / "large.mrc", np.zeros((1, box, box), "f4"), nz=n)
    last = numbered_images(1, box)
    with path.open("r+b") as file:
        file.seek(1024 + (n - 1) * box * box * 4)
        file.write(last.tobytes())
    view = open_stacks([path]).locate(np.zeros(1, np.int32), np.full(1, n - 1, np.int32)).view(np.zeros(1, np.int64))
    assert view is not None
    np.testing.assert_array_equal(view.numpy(), last)


def test_all_rows_of_a_large_table_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_module, "_LOCATED", 3)
    paths, images = written(tmp_path, [4, 1, 5])
    check(open_stacks(paths), images, through_arena=True)


def test_files_are_mapped_when_they_are_first_read(tmp_path: Path) -> None:
    paths, _ = written(tmp_path, [2, 2, 2])
    stacks = open_stacks(paths)
    assert mapped_files(tmp_path) == []
    read(stacks, np.array([1]), np.array([0]))
    assert mapped_files(tmp_path) == [str(paths[1])]


def test_no_descriptor_stays_open(tmp_path: Path) -> None:
    paths, images = written(tmp_path, [2, 2, 2])
    stacks = open_stacks(paths)
    check(stacks, images, through_arena=True)
    assert open_files(tmp_path) == []


def test_the_maps_go_with_the_data_set(tmp_path: Path) -> None:
    paths, images = written(tmp_path, [2, 2, 2])
    stacks = open_stacks(paths)
    check(stacks, images, through_arena=True)
    address = stacks._arena._address
    assert len(mapped_files(tmp_path)) == 3
    del stacks
    gc.collect()
    assert mapped_files(tmp_path) == []
    ranges = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines()]
    assert not any(int(begin, 16) <= address < int(end, 16) for begin, end in ranges if int(end, 16) - int(begin, 16) >= 2 << 20)


def test_an_arena_takes_no_more_maps_than_it_is_reckoned_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # can_map allows as many files as there may be maps; so a gap between files must not take a map of its own.
    in_use = sum(arena._maps for arena in arena_module._ARENAS)
    monkeypatch.setattr(arena_module, "_max_maps", lambda: arena_module._SPARE_MAPS + in_use + 61)
    paths, images = written(tmp_path, [1] * 60)
    stacks = open_stacks(paths)
    read(stacks, np.zeros(1, int), np.zeros(1, int))
    before = len(Path("/proc/self/maps").read_text().splitlines())
    check(stacks, images, through_arena=True)
    assert len(Path("/proc/self/maps").read_text().splitlines()) - before <= 60 + 5


def test_files_with_other_images_take_no_maps_in_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_use = sum(arena._maps for arena in arena_module._ARENAS)
    monkeypatch.setattr(arena_module, "_max_maps", lambda: arena_module._SPARE_MAPS + in_use + 31)
    paths, images = written(tmp_path, [1] * 60)
    for k in range(1, 60, 2):
        write_stack(paths[k], numbered_images(1, 4))
    stacks, file = open_stacks(paths), np.arange(0, 60, 2)
    read(stacks, file[:1], np.zeros(1, int))
    before = len(Path("/proc/self/maps").read_text().splitlines())
    np.testing.assert_array_equal(read(stacks, file, np.zeros(30, int)), np.concatenate(images[::2]))
    assert isinstance(stacks._arena, Arena)
    assert len(Path("/proc/self/maps").read_text().splitlines()) - before <= 30 + 5


@pytest.mark.parametrize(("counts", "box", "multiple"), [([1, 2, 3], 8, 4096), ([2, 1, 5, 2], 128, 64 << 10), ([1, 33, 2], 128, 2 << 20)])
def test_files_lie_at_round_addresses_side_by_side(tmp_path: Path, counts: list[int], box: int, multiple: int) -> None:
    paths, images = written(tmp_path, counts, box)
    stacks = open_stacks(paths)
    first = read(stacks, np.arange(len(counts)), np.zeros(len(counts), np.int64), box)
    np.testing.assert_array_equal(first, np.stack([part[0] for part in images]))
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    begins, ends = zip(*((int(end, 16) for end in line.split()[0].split("-")) for line in lines), strict=True)
    assert len(lines) == len(counts)
    assert all(begin % multiple == 0 for begin in begins)
    assert begins[1:] == ends[:-1]


@pytest.mark.parametrize("allowed", [100, arena_module._SPARE_MAPS + 2])
def test_more_files_than_maps_are_read_without_an_arena(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: int) -> None:
    monkeypatch.setattr(arena_module, "_max_maps", lambda: allowed)
    paths, images = written(tmp_path, [2, 2, 2])
    check(open_stacks(paths), images, through_arena=False)


def test_running_out_of_maps_falls_back_to_the_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, images = written(tmp_path, [2, 3, 4])
    stacks = open_stacks(paths)
    read(stacks, np.array([0]), np.array([0]))

    refusing = SimpleNamespace(mmap=lambda *_: arena_module._FAILED, munmap=arena_module.libc().munmap)
    monkeypatch.setattr(arena_module, "libc", lambda: refusing)
    check(stacks, images, through_arena=False)
    assert str(paths[1]) in mapped_files(tmp_path)


LIMITED = """
    import os, resource, sys, numpy as np
    from pathlib import Path
    from support import numbered_images, write_stack
    from cryolike_data.stacks import open_stacks
    n, images = 200, numbered_images(200, 8)
    paths = [write_stack(Path(sys.argv[1]) / f"{k}.mrc", images[k : k + 1], nz=30_000) for k in range(n)]
    for path in paths:
        os.truncate(path, 8 << 20)
    stacks = open_stacks(paths)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (400 << 20), -1))
    out = np.empty((n, 8, 8), "f4")
    located = stacks.locate(np.arange(n), np.zeros(n, int))
    assert list(located.places(np.arange(n)[None])) == [None]
    located.reading(np.arange(n), located.target(out))()
    assert np.array_equal(out, images)
    assert stacks._arena is False
"""


def test_stacks_are_read_where_their_addresses_cannot_be_reserved(tmp_path: Path) -> None:
    """As under a limit on address space (``ulimit -v``), which some batch systems set."""
    run = run_python(LIMITED, tmp_path)
    assert run.returncode == 0, run.stderr


def test_another_thread_that_gives_the_arena_up_does_not_disturb_a_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, images = written(tmp_path, [2, 2])
    stacks = open_stacks(paths)
    rows_of = Arena.rows_of

    def give_up(self: Arena, file: np.ndarray, image: np.ndarray) -> np.ndarray:
        stacks.give_up_arena(NoMoreMapsError())  # as another thread does when it meets NoMoreMapsError just now
        return rows_of(self, file, image)

    monkeypatch.setattr(Arena, "rows_of", give_up)
    np.testing.assert_array_equal(read(stacks, np.array([1]), np.array([1]))[0], images[1][1])


@pytest.fixture
def always_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """File sizes are looked at every time."""
    monkeypatch.setattr(arena_module, "CHECK_EVERY", -1.0)


@pytest.mark.usefixtures("always_checked")
def test_a_stack_that_grew_is_read_on(tmp_path: Path) -> None:
    paths, images = written(tmp_path, [2, 2])
    stacks = open_stacks(paths)
    check(stacks, images, through_arena=True)
    with paths[0].open("ab") as file:
        file.write(b"more")
    check(stacks, images, through_arena=True)


@pytest.mark.usefixtures("always_checked")
def test_a_stack_that_is_gone_is_an_error_that_names_it(tmp_path: Path) -> None:
    paths, images = written(tmp_path, [2, 2])
    stacks = open_stacks(paths)
    check(stacks, images, through_arena=True)
    paths[1].unlink()
    with pytest.raises(StackError, match=r"1\.mrc is gone"):
        check(stacks, images, through_arena=True)
    # What is whole can still be read.
    np.testing.assert_array_equal(read(stacks, np.zeros(2, int), np.arange(2)), images[0])


def test_a_stack_that_is_gone_before_it_was_read_is_an_error(tmp_path: Path) -> None:
    paths, images = written(tmp_path, [2, 2])
    stacks = open_stacks(paths)
    paths[1].unlink()
    with pytest.raises(StackError, match=r"1\.mrc cannot be opened"):
        check(stacks, images, through_arena=True)


def test_a_stack_that_shrank_before_it_was_read_is_an_error(tmp_path: Path) -> None:
    paths, images = written(tmp_path, [2, 2])
    stacks = open_stacks(paths)
    os.truncate(paths[1], 1024 + 8)
    with pytest.raises(StackError, match=r"1\.mrc has shrunk to 1032 bytes"):
        check(stacks, images, through_arena=True)


@pytest.mark.parametrize("order", ["<", ">"], ids=["arena", "pool"])
@pytest.mark.parametrize("read_before", [False, True])
def test_a_stack_that_shrank_is_an_error_each_time_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_before: bool, order: str
) -> None:
    now = [100.0]
    monkeypatch.setattr(arena_module.time, "monotonic", lambda: now[0])
    paths, images = written(tmp_path, [2, 2], order=order)
    stacks = open_stacks(paths)
    if read_before:
        check(stacks, images, through_arena=order == "<")
        now[0] += 1.5
    os.truncate(paths[1], 1024 + 8)
    for _ in range(2):
        with pytest.raises(StackError, match=r"1\.mrc has shrunk"):
            read(stacks, np.array([1, 1]), np.array([0, 1]))


@pytest.mark.parametrize("order", ["<", ">"], ids=["arena", "pool"])
def test_a_stack_behind_a_link_is_as_long_as_the_file_that_it_leads_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: str) -> None:
    now = [100.0]
    monkeypatch.setattr(arena_module.time, "monotonic", lambda: now[0])
    (path,), images = written(tmp_path, [2], order=order)
    (tmp_path / "link.mrc").symlink_to(path)
    stacks = open_stacks([tmp_path / "link.mrc"])
    for _ in range(2):
        check(stacks, images, through_arena=order == "<")
        now[0] += 1.5


def test_sizes_are_looked_at_no_more_than_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, images = written(tmp_path, [2, 2])
    now = [100.0]
    looked: list[str] = []
    size = arena_module.file_size
    monkeypatch.setattr(arena_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(arena_module, "file_size", lambda path: looked.append(path) or size(path))
    stacks = open_stacks(paths)
    for _ in range(5):
        check(stacks, images, through_arena=True)
    assert looked == []
    now[0] += 1.5
    for _ in range(5):
        check(stacks, images, through_arena=True)
    assert sorted(looked) == sorted(map(str, paths))


def test_looking_at_one_file_does_not_put_off_the_look_at_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, _ = written(tmp_path, [2, 2])
    now = [100.0]
    monkeypatch.setattr(arena_module.time, "monotonic", lambda: now[0])
    images = open_stacks(paths).locate(np.repeat([0, 1], 2), np.tile([0, 1], 2))
    of_two, of_four = (images.target(np.empty((count, 8, 8), "f4")) for count in (2, 4))
    images.reading(np.arange(2), of_two)()
    now[0] += 0.9
    images.reading(np.arange(4), of_four)()
    paths[0].unlink()
    now[0] += 0.2
    with pytest.raises(StackError, match=r"0\.mrc is gone"):
        images.reading(np.arange(2), of_two)()


SHRUNK = """
    import os, sys, numpy as np
    from pathlib import Path
    from support import numbered_images, read_images, write_stack
    import cryolike_data.arena as arena
    from cryolike_data.errors import StackError
    from cryolike_data.stacks import open_stacks
    now = [0.0]
    arena.time.monotonic = lambda: now[0]
    path = write_stack(Path(sys.argv[1]) / "a.mrc", numbered_images(64, 64))
    stacks = open_stacks([path])
    out = np.empty((64, 64, 64), "f4")
    read_images(stacks, np.zeros(64, int), np.arange(64), out)
    os.truncate(path, 1024 + 8 * 64 * 64 * 4)
    now[0] += 1.01
    try:
        read_images(stacks, np.zeros(64, int), np.arange(64), out)
    except StackError as error:
        print("StackError", error)
"""


def test_a_stack_that_shrank_while_it_is_mapped_is_an_error_and_no_crash(tmp_path: Path) -> None:
    run = run_python(SHRUNK, tmp_path)
    assert run.returncode == 0, run.stderr
    assert "has shrunk to 132096 bytes" in run.stdout


def test_an_image_beyond_the_end_is_an_error_and_no_crash(tmp_path: Path) -> None:
    paths, _ = written(tmp_path, [2, 2])
    stacks = open_stacks(paths)
    with pytest.raises(StackError, match=r"1\.mrc has 2 images, numbered 0 to 1, and image 2 is asked for"):
        read(stacks, np.array([0, 1]), np.array([1, 2]))


def test_a_truncated_stack_is_read_as_far_as_it_is_whole(tmp_path: Path) -> None:
    images = numbered_images(3, 8)
    path = write_stack(tmp_path / "a.mrc", images, nz=5)
    stacks = open_stacks([path])
    np.testing.assert_array_equal(read(stacks, np.zeros(3, int), np.arange(3)), images)
    assert isinstance(stacks._arena, Arena)
    with pytest.raises(StackError, match="truncated"):
        read(stacks, np.zeros(1, int), np.array([3]))


MANY = """
    import resource, sys, numpy as np
    from pathlib import Path
    from support import numbered_images, read_images, write_stack
    from cryolike_data.stacks import open_stacks
    folder, n = Path(sys.argv[1]), 3000
    images = numbered_images(n, 4)
    paths = [write_stack(folder / f"{k}.mrc", images[k : k + 1]) for k in range(n)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (400, 400))
    stacks = open_stacks(paths)
    out = np.empty((n, 4, 4), "f4")
    order = np.random.default_rng(0).permutation(n)
    read_images(stacks, order, np.zeros(n, int), out)
    assert np.array_equal(out, images[order])
    assert stacks._arena, "no arena"
"""


def test_thousands_of_stacks_are_read_with_few_descriptors(tmp_path: Path) -> None:
    run = run_python(MANY, tmp_path)
    assert run.returncode == 0, run.stderr


SIXTY_THOUSAND = """
    import sys, numpy as np
    from pathlib import Path
    from support import numbered_images, read_images, write_stack
    from cryolike_data.mrc import read_header
    from cryolike_data.stacks import Stacks
    n, images = 60_000, numbered_images(2, 8)
    path = write_stack(Path(sys.argv[1]) / "a.mrc", images)
    stacks = Stacks([str(path)] * n, [read_header(path)] * n)  # one file under many names costs as many maps as many files
    out = np.empty((n, 8, 8), "f4")
    read_images(stacks, np.random.default_rng(0).permutation(n), np.arange(n) % 2, out)
    assert np.array_equal(out, images[np.arange(n) % 2])
    assert stacks._arena, "no arena"
"""


@pytest.mark.skipif(MAX_MAPS.exists() and int(MAX_MAPS.read_text()) < 65530, reason="vm.max_map_count is lower than usual")
def test_sixty_thousand_stacks_fit_into_an_arena(tmp_path: Path) -> None:
    run = run_python(SIXTY_THOUSAND, tmp_path)
    assert run.returncode == 0, run.stderr


def test_threads_share_an_arena(tmp_path: Path) -> None:
    paths, images = written(tmp_path, [4] * 30, 16)
    stacks = open_stacks(paths)
    errors: list[BaseException] = []
    start = threading.Barrier(4)

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            start.wait()
            for _ in range(60):
                file, image = rng.integers(0, 30, 20), rng.integers(0, 4, 20)
                expected = np.stack([images[f][z] for f, z in zip(file, image, strict=True)])
                np.testing.assert_array_equal(read(stacks, file, image, 16), expected)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(mapped_files(tmp_path)) == 30


FORKED = """
    import os, sys, numpy as np
    from pathlib import Path
    from support import numbered_images, read_images, write_stack
    from cryolike_data.stacks import open_stacks
    images = numbered_images(8, 8)
    paths = [write_stack(Path(sys.argv[1]) / f"{k}.mrc", images[4 * k : 4 * k + 4]) for k in range(2)]
    stacks = open_stacks(paths)
    def read(file):
        out = np.empty((4, 8, 8), "f4")
        read_images(stacks, np.full(4, file), np.arange(4), out)
        return np.array_equal(out, images[4 * file : 4 * file + 4])
    assert read(0)
    child = os.fork()
    if child == 0:
        ok = read(0) and read(1)
        del stacks
        os._exit(0 if ok else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert read(0) and read(1)
"""


def test_a_forked_process_reads_and_lets_go_on_its_own(tmp_path: Path) -> None:
    run = run_python(FORKED, tmp_path)
    assert run.returncode == 0, run.stderr


AT_EXIT = """
    import atexit
    def read_last():  # registered first, so called last: as a thread that is still reading when the program ends
        read_images(stacks, np.zeros(4, int), np.arange(4), out)
        assert np.array_equal(out, images)
        print("read")
    atexit.register(read_last)
    import sys, numpy as np
    from pathlib import Path
    from support import numbered_images, read_images, write_stack
    from cryolike_data.stacks import open_stacks
    images, out = numbered_images(4, 8), np.empty((4, 8, 8), "f4")
    stacks = open_stacks([write_stack(Path(sys.argv[1]) / "a.mrc", images)])
    read_images(stacks, np.zeros(4, int), np.arange(4), out)
"""


def test_an_arena_can_be_read_until_the_program_has_ended(tmp_path: Path) -> None:
    run = run_python(AT_EXIT, tmp_path)
    assert (run.returncode, run.stdout, run.stderr) == (0, "read\n", "")


def test_a_pickled_copy_reads_through_an_arena_of_its_own(tmp_path: Path) -> None:
    import pickle

    paths, images = written(tmp_path, [2, 2])
    stacks = open_stacks(paths)
    check(stacks, images, through_arena=True)
    copy = pickle.loads(pickle.dumps(stacks))
    check(copy, images, through_arena=True)
    assert copy._arena is not stacks._arena


def test_off_linux_files_are_read_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks_module, "can_map", lambda *_: False)
    paths, images = written(tmp_path, [2, 2])
    check(open_stacks(paths), images, through_arena=False)


def test_the_size_of_a_file_is_that_of_stat(tmp_path: Path) -> None:
    path = tmp_path / "größe ü.bin"
    path.write_bytes(b"x" * 12345)
    assert arena_module.file_size(str(path)) == 12345
    assert arena_module.file_size(str(tmp_path / "none")) == -1


def test_the_size_of_a_file_of_many_gigabytes_is_known(tmp_path: Path) -> None:
    (tmp_path / "sparse").touch()
    os.truncate(tmp_path / "sparse", (5 << 30) + 7)
    assert arena_module.file_size(str(tmp_path / "sparse")) == (5 << 30) + 7


def test_sizes_are_known_where_the_c_library_has_no_statx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # glibc before 2.28, for which torch 2.5 still has wheels; and containers whose filter forbids the call.
    monkeypatch.setattr(file_size_module, "_statx", lambda: None)
    path = tmp_path / "a.bin"
    path.write_bytes(b"x" * 77)
    assert arena_module.file_size(str(path)) == 77


@pytest.mark.parametrize("length", [100, 5000])
def test_neighbouring_ranges_of_pages_merge(length: int) -> None:
    rng = np.random.default_rng(4)
    begin = np.sort(rng.integers(0, 200 * 4096, 50))
    runs, sizes = page_runs(begin, length)
    pages = {page for address in begin.tolist() for page in range(address // 4096, -(-(address + length) // 4096))}
    assert {
        page for run, size in zip(runs.tolist(), sizes.tolist(), strict=True) for page in range(run // 4096, (run + size) // 4096)
    } == pages
    assert (runs[1:] > (runs + sizes)[:-1]).all()
    assert not (runs % 4096).any()


# Rows in order, where they lie


@pytest.mark.parametrize("dtype", ["i1", "i2", "u2", "f2", "f4"])
def test_rows_in_order_are_seen_without_a_copy(tmp_path: Path, dtype: str) -> None:
    paths, (first, second) = written(tmp_path, [4, 5], dtype=dtype)
    images = open_stacks(paths).locate(np.repeat([0, 1], [4, 5]), np.r_[0:4, 0:5])
    view = images.view(np.arange(5, 8))
    assert view is not None
    np.testing.assert_array_equal(view.numpy().view(second.dtype), second[1:4])
    again, other = images.view(np.arange(6, 8)), images.view(np.array([2]))
    assert again is not None
    assert other is not None
    assert again.data_ptr() == view[1].data_ptr()
    np.testing.assert_array_equal(other[0].numpy().view(first.dtype), first[2])


@pytest.mark.parametrize("rows", [[1, 0], [0, 2], [3, 4], [2, 2], [0, 2, 1, 3]], ids=["back", "gap", "two files", "twice", "mixed"])
def test_rows_that_do_not_lie_in_order_are_not_seen(tmp_path: Path, rows: list[int]) -> None:
    paths, _ = written(tmp_path, [4, 5])
    assert open_stacks(paths).locate(np.repeat([0, 1], [4, 5]), np.r_[0:4, 0:5]).view(np.array(rows)) is None


def test_without_an_arena_nothing_is_seen(tmp_path: Path) -> None:
    paths, _ = written(tmp_path, [4], extended=7)
    assert open_stacks(paths).locate(np.zeros(4, np.int64), np.arange(4)).view(np.arange(4)) is None


def test_a_shrunk_stack_is_an_error_when_it_is_to_be_seen(tmp_path: Path) -> None:
    paths, _ = written(tmp_path, [4])
    images = open_stacks(paths).locate(np.zeros(4, np.int64), np.arange(4))
    os.truncate(paths[0], 1024 + 100)
    with pytest.raises(StackError, match="shrunk"):
        images.view(np.arange(4))


def test_arenas_together_leave_maps_for_the_rest_of_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    in_use = sum(arena._maps for arena in arena_module._ARENAS)
    monkeypatch.setattr(arena_module, "_max_maps", lambda: arena_module._SPARE_MAPS + in_use + 10)
    paths, images = written(tmp_path, [1] * 8)
    first, second = open_stacks(paths), open_stacks(paths)
    check(first, images, through_arena=True)
    check(second, images, through_arena=False)
    assert "cannot be mapped beside the many thousands of files of other data sets" in caplog.text
    del first
    check(open_stacks(paths), images, through_arena=True)


def test_what_lies_between_files_that_are_mapped_counts_as_maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_use = sum(arena._maps for arena in arena_module._ARENAS)
    monkeypatch.setattr(arena_module, "_max_maps", lambda: arena_module._SPARE_MAPS + in_use + 60)
    paths, images = written(tmp_path, [1] * 60)
    every_other = np.arange(0, 60, 2)
    opened = [open_stacks(paths) for _ in range(3)]
    read(open_stacks(paths), every_other, np.zeros(30, int))  # whatever is made when something is first read
    gc.collect()
    before = len(Path("/proc/self/maps").read_text().splitlines())
    for stacks in opened:
        found = read(stacks, every_other, np.zeros(30, int))
        np.testing.assert_array_equal(found, np.stack([images[file][0] for file in every_other]))
    # Sixty of the first arena, and those of the files that are read one by one instead.
    assert len(Path("/proc/self/maps").read_text().splitlines()) - before <= 60 + 2 * 30 + 10


def test_an_arena_that_another_thread_makes_meanwhile_does_not_disturb_a_read(tmp_path: Path) -> None:
    paths, images = written(tmp_path, [3, 4])
    stacks, other = open_stacks(paths), open_stacks(paths)
    with another_thread_at(2, WeakSet.__iter__, lambda: check(other, images, through_arena=True)):
        check(stacks, images, through_arena=True)
    assert other._arena is not None


def test_views_outlive_the_arena(tmp_path: Path) -> None:
    """As they do where a thread of an export gives the arena up while another one is at work on a view."""
    paths, images = written(tmp_path, [3, 4])
    stacks = open_stacks(paths)
    file, image = np.array([1, 1, 1]), np.arange(3)
    view = stacks.locate(file, image).view(np.arange(3))
    assert view is not None
    stacks.give_up_arena(NoMoreMapsError())
    np.testing.assert_array_equal(read(stacks, file, image), images[1][:3])
    del stacks
    gc.collect()
    np.testing.assert_array_equal(view.numpy(), images[1][:3])
    assert mapped_files(tmp_path)
    del view
    gc.collect()
    assert not mapped_files(tmp_path)
