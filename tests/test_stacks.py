from __future__ import annotations

import contextlib
import errno
import os
import pickle
import resource
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from support import numbered_images, read_images, write_stack

import cryolike_data.stacks as stacks_module
from cryolike_data import arena, map_pool
from cryolike_data.errors import StackError
from cryolike_data.map_pool import MapPool
from cryolike_data.stacks import Stacks, open_stacks

BOX = 8


def write_stacks(
    folder: Path, counts: list[int], dtypes: list[str] | None = None, **options: object
) -> tuple[list[Path], list[np.ndarray]]:
    paths, images = [], []
    for i, count in enumerate(counts):
        images.append(numbered_images(count, BOX, dtype=dtypes[i] if dtypes else "f4", start=i))
        paths.append(write_stack(folder / f"{i}.mrc", images[-1], **options))  # type: ignore[arg-type]
    return paths, images


def read(pool: Stacks | MapPool, file: list[int], image: list[int]) -> np.ndarray:
    out = np.full((len(file), BOX, BOX), 99, pool.dtype)
    if isinstance(pool, MapPool):
        pool.read_into(np.asarray(file), np.asarray(image), out)
    else:
        read_images(pool, np.asarray(file, int), np.asarray(image, int), out)
    return out


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def few_files() -> Iterator[None]:
    """A limit of 400 open files, below the number of stacks that a test opens."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (400, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_images_come_in_the_order_asked_for_over_many_files(tmp_path: Path) -> None:
    paths, images = write_stacks(tmp_path, [4, 1, 3])
    file, image = [2, 0, 1, 0, 2, 0], [1, 3, 0, 0, 2, 2]
    expected = np.stack([images[f][i] for f, i in zip(file, image, strict=True)])
    np.testing.assert_array_equal(read(open_stacks(paths), file, image), expected)


def test_an_image_asked_for_twice_comes_twice(tmp_path: Path) -> None:
    paths, images = write_stacks(tmp_path, [3])
    np.testing.assert_array_equal(read(open_stacks(paths), [0, 0, 0], [2, 1, 2]), images[0][[2, 1, 2]])


def test_asking_for_no_images_reads_none(tmp_path: Path) -> None:
    paths, _ = write_stacks(tmp_path, [3])
    assert read(open_stacks(paths), [], []).shape == (0, BOX, BOX)


@pytest.mark.parametrize(
    ("dtypes", "common"),
    [
        (["f4", "f2"], "f4"),
        (["i1", "u1"], "i2"),
        (["i2", "u2"], "i4"),
        (["u2", "f2"], "f4"),
        (["i1", "f2"], "f2"),
        (["i2"], "i2"),
    ],
)
def test_files_of_different_dtypes_are_read_in_one_that_holds_all_values(tmp_path: Path, dtypes: list[str], common: str) -> None:
    paths, images = [], []
    for i, dtype in enumerate(dtypes):
        images.append(numbered_images(2, BOX, dtype=dtype, start=i))
        paths.append(write_stack(tmp_path / f"{i}.mrc", images[-1], imod_flags=0 if dtype == "u1" else None))
    pool = open_stacks(paths)
    assert pool.dtype == np.dtype(common)
    found = read(pool, [i for i in range(len(dtypes)) for _ in range(2)], [0, 1] * len(dtypes))
    np.testing.assert_array_equal(found.astype("f8"), np.concatenate([part.astype("f8") for part in images]))


def test_big_and_little_endian_files_share_the_native_dtype(tmp_path: Path) -> None:
    images = numbered_images(2, BOX, dtype="i2")
    paths = [write_stack(tmp_path / f"{i}.mrc", images, order=order) for i, order in enumerate("<>")]
    pool = open_stacks(paths)
    assert pool.dtype.isnative
    np.testing.assert_array_equal(read(pool, [0, 0, 1, 1], [0, 1, 0, 1]), np.concatenate([images, images]))


def test_at_most_max_open_files_stay_open(tmp_path: Path) -> None:
    paths, images = write_stacks(tmp_path, [1] * 12)
    opened = open_stacks(paths)
    pool = MapPool(opened.paths, opened.headers, max_open=3)
    before = open_files()
    for _ in range(2):
        found = read(pool, list(range(12)), [0] * 12)
        assert open_files() - before <= 3
    np.testing.assert_array_equal(found, np.concatenate(images))


def test_a_pool_leaves_descriptors_to_others_where_a_process_may_have_few(tmp_path: Path, few_files: None) -> None:
    paths, images = write_stacks(tmp_path, [1] * 150)
    opened = open_stacks(paths)
    pool = MapPool(opened.paths, opened.headers)
    before = open_files()
    np.testing.assert_array_equal(read(pool, list(range(150)), [0] * 150), np.concatenate(images))
    assert open_files() - before <= 100


def test_the_least_recently_used_file_is_closed_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, _ = write_stacks(tmp_path, [1] * 3)
    opened = open_stacks(paths)
    pool = MapPool(opened.paths, opened.headers, max_open=2)
    mapped: list[str] = []
    original = map_pool.map_stack
    monkeypatch.setattr(map_pool, "map_stack", lambda path, header: mapped.append(Path(path).name) or original(path, header))
    for number in (0, 1, 0, 2, 0, 1):
        read(pool, [number], [0])
    assert mapped == ["0.mrc", "1.mrc", "2.mrc", "1.mrc"]


def test_more_stacks_than_files_may_be_open_are_read(tmp_path: Path, few_files: None) -> None:
    count = 600
    raw = write_stack(tmp_path / "0.mrc", numbered_images(1, BOX)).read_bytes()[:1024]
    images = numbered_images(count, BOX)
    for i in range(count):
        (tmp_path / f"{i}.mrc").write_bytes(raw + images[i].tobytes())
    pool = open_stacks([tmp_path / f"{i}.mrc" for i in range(count)])
    order = np.random.default_rng(0).permutation(count).tolist()
    np.testing.assert_array_equal(read(pool, order, [0] * count), images[order])


def as_many_as_may_be(path: Path) -> list[BinaryIO]:
    """The file opened again and again until the system refuses."""
    opened: list[BinaryIO] = []
    with contextlib.suppress(OSError):
        while True:
            opened.append(path.open("rb"))
    return opened


def test_a_pool_gives_its_files_back_where_others_have_used_them_up(tmp_path: Path, few_files: None) -> None:
    paths, images = write_stacks(tmp_path, [1] * 40)
    opened = open_stacks(paths)
    pools = [MapPool(opened.paths, opened.headers) for _ in range(2)]
    read(pools[0], list(range(20)), [0] * 20)
    held = as_many_as_may_be(paths[0])
    try:
        np.testing.assert_array_equal(read(pools[0], list(range(40)), [0] * 40), np.concatenate(images))
        held += as_many_as_may_be(paths[0])
        with pytest.raises(StackError, match=r"0\.mrc cannot be .*: Too many open files"):
            read(pools[1], [0], [0])
    finally:
        for file in held:
            file.close()


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_a_pool_lets_go_of_its_maps_where_the_system_gives_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    paths, images = write_stacks(tmp_path, [1] * 2)
    opened = open_stacks(paths)
    pool, map_stack = MapPool(opened.paths, opened.headers), map_pool.map_stack

    def map_one(path: str, header: map_pool.StackHeader) -> np.ndarray:
        if pool._maps:
            raise StackError(path) from OSError(number, os.strerror(number))
        return map_stack(path, header)

    monkeypatch.setattr(map_pool, "map_stack", map_one)
    np.testing.assert_array_equal(read(pool, [0, 1], [0, 0]), np.concatenate(images))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("left", [0, 2048, 1024 + 40 * BOX * BOX * 4 - 4], ids=["nothing", "some images", "all but a pixel"])
def test_a_stack_that_shrank_while_it_was_mapped_is_an_error_and_not_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: str, left: int
) -> None:
    monkeypatch.setattr(map_pool, "CHECK_EVERY", -1.0)
    images = numbered_images(40, BOX)
    path = write_stack(tmp_path / "a.mrc", images, order=order)
    opened = open_stacks([path])
    pool = MapPool(opened.paths, opened.headers)
    np.testing.assert_array_equal(read(pool, [0, 0], [0, 39]), images[[0, 39]])
    os.truncate(path, left)
    with pytest.raises(StackError, match=rf"a\.mrc has shrunk to {left} bytes"):
        read(pool, [0], [39])
    path.unlink()
    with pytest.raises(StackError, match=r"a\.mrc is gone"):
        read(pool, [0], [0])


@pytest.mark.parametrize("order", ["<", ">"], ids=["arena", "pool"])
def test_a_truncated_stack_is_read_on_after_its_size_was_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    monkeypatch.setattr(map_pool, "CHECK_EVERY", -1.0)
    monkeypatch.setattr(arena, "CHECK_EVERY", -1.0)
    images = numbered_images(3, BOX)
    stacks = open_stacks([write_stack(tmp_path / "a.mrc", images, nz=5, order=order)])
    for _ in range(3):
        np.testing.assert_array_equal(read(stacks, [0, 0, 0], [2, 0, 1]), images[[2, 0, 1]])


@pytest.mark.parametrize("order", ["<", ">"], ids=["arena", "pool"])
@pytest.mark.parametrize("change", ["size of pixels", "kind of pixels", "box", "sides", "header", "byte order"])
def test_another_stack_in_the_place_of_one_is_an_error_before_its_pixels_are_misread(tmp_path: Path, order: str, change: str) -> None:
    path = write_stack(tmp_path / "a.mrc", numbered_images(4, BOX, dtype="i2"), order=order)
    stacks = open_stacks([path])
    dtype = {"size of pixels": "f4", "kind of pixels": "f2"}.get(change, "i2")
    images = numbered_images(16, 2 * BOX if change == "box" else BOX, dtype=dtype)
    if change == "sides":
        images = images.reshape(16, BOX // 2, 2 * BOX)
    if change == "byte order":
        order = {"<": ">", ">": "<"}[order]
    write_stack(path, images, order=order, extended=64 if change == "header" else 0)
    for opened in (stacks, pickle.loads(pickle.dumps(stacks))):
        with pytest.raises(StackError, match=r"a\.mrc has images of .* now, and had images of .* when it was opened"):
            read(opened, [0], [0])


def test_a_stack_with_more_images_in_the_place_of_one_is_read(tmp_path: Path) -> None:
    path = write_stack(tmp_path / "a.mrc", numbered_images(4, BOX))
    stacks, images = open_stacks([path]), numbered_images(6, BOX, start=1)
    write_stack(path, images)
    np.testing.assert_array_equal(read(stacks, [0], [3])[0], images[3])


def test_opening_stacks_keeps_no_file_open(tmp_path: Path) -> None:
    paths, _ = write_stacks(tmp_path, [1] * 5)
    before = open_files()
    pool = open_stacks(paths)
    assert open_files() == before
    assert len(pool.paths) == 5


def test_a_pool_pickles_without_its_maps(tmp_path: Path) -> None:
    raw = write_stack(tmp_path / "big.mrc", numbered_images(50, 64))
    pool = open_stacks([raw])
    out = np.empty((50, 64, 64), "f4")
    read_images(pool, np.zeros(50, int), np.arange(50), out)
    copy = pickle.dumps(pool)
    assert len(copy) < 2000
    again = np.empty_like(out)
    read_images(pickle.loads(copy), np.zeros(50, int), np.arange(50), again)
    np.testing.assert_array_equal(again, out)


def test_threads_share_a_pool_with_fewer_maps_than_files(tmp_path: Path) -> None:
    paths, images = write_stacks(tmp_path, [3] * 9)
    opened = open_stacks(paths)
    pool = MapPool(opened.paths, opened.headers, max_open=2)
    file, image = list(range(9)) * 3, [0] * 9 + [1] * 9 + [2] * 9
    expected = np.stack([images[f][i] for f, i in zip(file, image, strict=True)])
    with ThreadPoolExecutor(4) as threads:
        for found in threads.map(lambda _: read(pool, file, image), range(40)):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("image", "said"), [(3, "has 3 images, numbered 0 to 2, and image 3 is asked for"), (99, "image 99")])
def test_an_image_beyond_the_file_is_an_error(tmp_path: Path, image: int, said: str) -> None:
    paths, _ = write_stacks(tmp_path, [3])
    with pytest.raises(StackError, match=said):
        read(open_stacks(paths), [0], [image])


def test_an_image_in_the_missing_part_of_a_truncated_file_is_an_error(tmp_path: Path) -> None:
    paths, images = write_stacks(tmp_path, [3])
    paths[0].write_bytes(paths[0].read_bytes()[:-5])
    pool = open_stacks(paths)
    np.testing.assert_array_equal(read(pool, [0, 0], [1, 0]), images[0][[1, 0]])
    with pytest.raises(StackError, match="truncated: its header promises 3 images, the file holds 2"):
        read(pool, [0], [2])


def test_every_unusable_stack_is_in_one_error(tmp_path: Path) -> None:
    paths, _ = write_stacks(tmp_path, [1, 1])
    (tmp_path / "text.mrc").write_text("data_\n" * 500)
    (tmp_path / "short.mrc").write_bytes(b"")
    with pytest.raises(StackError) as caught:
        open_stacks([*paths, tmp_path / "text.mrc", tmp_path / "short.mrc", tmp_path / "gone.mrc"])
    said = str(caught.value)
    assert "3 of 5 stacks" in said
    assert all(name in said for name in ("text.mrc", "short.mrc", "gone.mrc"))
    assert "0.mrc" not in said


def test_a_stack_that_vanishes_before_it_is_read_is_an_error_that_names_it(tmp_path: Path) -> None:
    paths, _ = write_stacks(tmp_path, [1])
    pool = open_stacks(paths)
    paths[0].unlink()
    with pytest.raises(StackError, match=r"0\.mrc cannot be opened any more"):
        read(pool, [0], [0])


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("through", ["pool", "arena"])
def test_a_process_forked_while_a_thread_reads_can_read_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, through: str) -> None:
    # A DataLoader may fork its workers while another thread of the main process is reading from the same data set.
    paths, images = write_stacks(tmp_path, [2])
    stacks = open_stacks(paths)
    pool = MapPool(stacks.paths, stacks.headers) if through == "pool" else stacks
    module, name = (map_pool, "map_stack") if through == "pool" else (stacks_module, "can_map")
    original, mapping, may_go_on = getattr(module, name), threading.Event(), threading.Event()

    def paused(*arguments: object) -> object:
        mapping.set()
        may_go_on.wait()
        return original(*arguments)

    monkeypatch.setattr(module, name, paused)
    thread = threading.Thread(target=read, args=(pool, [0], [0]))
    thread.start()
    mapping.wait()
    child = os.fork()
    if child == 0:
        signal.alarm(10)  # ends a child that waits for a lock which nobody in it will release
        setattr(module, name, original)
        os._exit(0 if np.array_equal(read(pool, [0, 0], [1, 0]), images[0][[1, 0]]) else 1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    may_go_on.set()
    thread.join()
    assert status == 0


@pytest.mark.parametrize("check_headers", [True, False])
def test_a_first_stack_that_cannot_be_opened_is_one_of_our_errors(tmp_path: Path, check_headers: bool) -> None:
    paths, _ = write_stacks(tmp_path, [1, 1])
    paths[0].unlink()  # after the table was looked through, say
    with pytest.raises(StackError, match=r"0\.mrc cannot be read: No such file"):
        open_stacks(paths, needed=np.ones(2, np.int64), check_headers=check_headers)
