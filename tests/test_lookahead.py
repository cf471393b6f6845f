"""The look-ahead: what it asks for, when, how much of it, and that its thread ends."""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support import (
    another_thread_at,
    forget,
    numbered_images,
    own_threads,
    residence,
    run_python,
    wait_until,
    write_particles,
    write_stack,
)

import cryolike_data.lookahead as lookahead
from cryolike_data import IndexedDataset, ZarrDataset, arena, export_zarr, pages, stream
from cryolike_data.export import pixels
from cryolike_data.lookahead import MAX_PATIENCE, LookAhead, NoLookAhead, Step
from cryolike_data.pages import blocks_read, is_resident, waits_for_disk
from cryolike_data.sampler import ParticleSampler


class Asked:
    """A data set that notes what is asked of it, and can make the asking thread wait.

    ``cold`` is whether images are on the disk alone, and ``tells`` whether this can be known without asking for them.
    """

    def __init__(self, n: int = 100, *, image_bytes: int = 1, cold: bool = True, tells: bool = True) -> None:
        self.n, self.image_bytes, self.cold, self.tells = n, image_bytes, cold, tells
        self.looks: list[list[int]] = []
        self.calls: list[list[int]] = []
        self.threads: set[str] = set()
        self.go_on = threading.Event()
        self.go_on.set()
        self.called = threading.Condition()

    def __len__(self) -> int:
        return self.n

    def in_memory(self, rows: np.ndarray) -> bool:
        self.looks.append(rows.tolist())
        return self.tells and not self.cold

    def ask_ahead(self, rows: np.ndarray) -> bool:
        with self.called:
            self.calls.append(rows.tolist())
            self.threads.add(threading.current_thread().name)
            self.called.notify_all()
        assert self.go_on.wait(10)
        return self.cold

    def wait_for_calls(self, number: int) -> None:
        with self.called:
            assert self.called.wait_for(lambda: len(self.calls) >= number, 10)

    def wait_for(self, batch: int) -> None:
        """Wait until a batch of ``batches`` has been asked for."""
        with self.called:
            assert self.called.wait_for(lambda: [2 * batch, 2 * batch + 1] in self.calls, 10)


def batches(number: int, size: int = 2, *, at_a_time: int = 5) -> Iterator[list[Step]]:
    steps: list[Step] = [(k, np.arange(k * size, (k + 1) * size), None) for k in range(number)]
    return (steps[first : first + at_a_time] for first in range(0, number, at_a_time))


def passed_on(look: LookAhead | NoLookAhead, drawn: Iterator[list[Step]]) -> Iterator[tuple[int, list[int]]]:
    """Number and rows of each batch that a look-ahead hands out."""
    return ((k, rows.tolist()) for k, rows, _ in itertools.chain.from_iterable(look.pass_on(drawn)))


@pytest.mark.parametrize("ahead", [0, 1, 3, 50])
@pytest.mark.parametrize("at_a_time", [1, 7, 60])
@pytest.mark.parametrize("cold", [True, False])
def test_batches_come_in_the_same_order(ahead: int, at_a_time: int, cold: bool) -> None:
    with LookAhead.over(Asked(cold=cold), ahead) as look:
        passed = list(passed_on(look, batches(50, at_a_time=at_a_time)))
    assert passed == [(k, [2 * k, 2 * k + 1]) for k in range(50)]


@pytest.mark.parametrize("ahead", [0, 1, 4, 100])
def test_the_order_of_a_sampler_does_not_depend_on_looking_ahead(ahead: int) -> None:
    assert list(ParticleSampler(Asked(57), 5, lookahead=ahead)) == list(ParticleSampler(range(57), 5))


def test_the_batches_after_one_are_asked_for_before_it_is_handed_out() -> None:
    data = Asked()
    with LookAhead.over(data, 3) as look:
        next(look.pass_on(batches(10)))
        data.wait_for_calls(3)
    # The first batch itself is read at once; whether the thread was quick enough to ask for it does not matter.
    assert [rows for rows in data.calls if rows != [0, 1]] == [[2, 3], [4, 5], [6, 7]]


def test_every_batch_after_the_first_is_asked_for_once_while_data_are_cold() -> None:
    data = Asked()
    with LookAhead.over(data, 2) as look:
        for k, _ in passed_on(look, batches(12)):
            data.wait_for(min(11, k + 2))
    assert [rows for rows in data.calls if rows != [0, 1]] == [[2 * k, 2 * k + 1] for k in range(1, 12)]


def test_it_asks_from_a_thread_of_its_own() -> None:
    data = Asked()
    with LookAhead.over(data, 2) as look:
        next(look.pass_on(batches(3)))
        data.wait_for_calls(1)
    assert data.threads == {"cryolike-lookahead"}


def test_a_batch_is_handed_out_after_its_request_is_done() -> None:
    data = Asked()
    with LookAhead.over(data, 1) as look:
        for _, rows in passed_on(look, batches(10)):
            assert rows in data.calls


def test_a_slow_disk_does_not_hold_the_reader_up_and_old_requests_are_forgotten() -> None:
    data = Asked()
    data.go_on.clear()
    with LookAhead.over(data, 3) as look:
        drawn = look.pass_on(batches(20))
        next(drawn)
        data.wait_for_calls(1)
        list(drawn)  # all the others come although the first request is not over
        assert len(data.calls) == 1
        assert not look._waiting  # too late for all of them
        data.go_on.set()


def test_what_comes_too_late_for_one_batch_is_asked_for_those_after_it_all_the_same() -> None:
    data = Asked()
    data.go_on.clear()
    with LookAhead.over(data, 3) as look:
        next(look.pass_on(batches(10)))  # although the request for it is not over
        data.go_on.set()
        for batch in (1, 2, 3):
            data.wait_for(batch)


def test_a_reader_that_is_held_up_for_longer_than_it_waits_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookahead, "time", SimpleNamespace(monotonic=itertools.count().__next__))
    data = Asked()
    data.go_on.clear()
    with LookAhead.over(data, 1) as look:
        assert len(list(passed_on(look, batches(3)))) == 3
        data.go_on.set()


def test_a_reader_that_waits_for_a_request_is_told_when_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookahead, "_LONGEST_WAIT", 10)
    monkeypatch.setattr(lookahead, "Empty", ())  # that the time ran out is an error

    class Awaited(Asked):
        def ask_ahead(self, rows: np.ndarray) -> bool:
            wait_until(lambda: look._told is not None)
            return super().ask_ahead(rows)

    with LookAhead(Awaited(), 1) as look:
        assert len(list(passed_on(look, batches(3)))) == 3


def test_a_disk_that_was_slow_for_a_while_is_asked_on() -> None:
    data = Asked()
    data.go_on.clear()
    with LookAhead.over(data, 1) as look:
        drawn = passed_on(look, batches(12))
        for _ in range(4):
            next(drawn)
        data.go_on.set()
        for k, _ in drawn:
            data.wait_for(min(11, k + 1))


@pytest.mark.parametrize(("image_bytes", "expected"), [(1, 4), (100, 2), (1000, 1)])
def test_no_more_than_a_bounded_number_of_bytes_is_asked_for_ahead(
    monkeypatch: pytest.MonkeyPatch, image_bytes: int, expected: int
) -> None:
    monkeypatch.setattr(lookahead, "MAX_BYTES_AHEAD", 500)
    data = Asked(image_bytes=image_bytes)
    with LookAhead.over(data, 4) as look:
        for k, _ in passed_on(look, batches(12)):
            data.wait_for(min(11, k + expected))
            assert max(rows[0] // 2 for rows in data.calls) <= k + expected


def test_data_in_memory_are_looked_at_less_and_less_often_and_need_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookahead, "MAX_PATIENCE", 20)
    data = Asked(cold=False)
    with LookAhead.over(data, 1) as look:
        assert len(list(passed_on(look, batches(120)))) == 120
        assert own_threads() == []
    gaps = np.diff([rows[0] // 2 for rows in data.looks]).tolist()
    assert gaps[:4] == [2, 4, 8, 16]
    assert set(gaps[4:]) == {21}
    assert data.calls == []


def test_data_that_nobody_can_look_at_are_asked_for_less_and_less_often_once_they_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookahead, "MAX_PATIENCE", 20)
    data = Asked(cold=False, tells=False)
    with LookAhead(data, 1) as look:
        for _ in passed_on(look, batches(120)):
            wait_until(lambda: look._done == look._asked)
    gaps = np.diff([rows[0] // 2 for rows in data.calls])
    assert gaps.max() <= 21
    assert len(data.calls) < 20


def test_batches_that_need_no_look_are_handed_out_several_at_a_time() -> None:
    with LookAhead.over(Asked(cold=False), 2) as look:
        sizes = [len(run) for run in look.pass_on(batches(100, at_a_time=100))]
    assert sizes[:8] == [1, 1, 1, 3, 1, 7, 1, 8]
    assert max(sizes) == 8
    with LookAhead.over(Asked(cold=True), 2) as look:
        assert {len(run) for run in look.pass_on(batches(100, at_a_time=100))} == {1}


def test_cold_data_after_warm_ones_are_asked_for_each_time_again(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = itertools.count()  # somebody has to wait for each batch that was not asked for
    monkeypatch.setattr(lookahead, "waits_for_disk", waits.__next__)
    data = Asked(cold=False)
    with LookAhead(data, 1) as look:
        drawn = passed_on(look, batches(100, at_a_time=100))
        for _ in range(40):
            next(drawn)
        data.cold = True
        left = [rows for _, rows in drawn]
    assert len(left) == 60
    assert data.calls[-50:] == left[-50:]


def test_cold_data_that_nobody_can_look_at_are_asked_for_each_time_again() -> None:
    data = Asked(cold=False, tells=False)
    with LookAhead(data, 1) as look:
        look._ask(np.arange(2), 1)
        wait_until(lambda: look._done == 1)
        look._patience = look._skip = MAX_PATIENCE
        data.cold = True
        look._skip = 0
        look._ask(np.arange(2), 1)
        wait_until(lambda: look._patience == 0)
        for number in range(3, 6):  # although what was known at the last request would have been reason to skip many
            assert look._ask(np.arange(2), 9) == (number, 1)


def test_data_that_leave_memory_are_looked_at_as_soon_as_somebody_had_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = [3]
    monkeypatch.setattr(lookahead, "waits_for_disk", lambda: waits[0])
    data = Asked(cold=False)
    with LookAhead(data, 1) as look:
        look._ask(np.arange(2), 1)
        look._patience = look._skip = MAX_PATIENCE
        assert [look._ask(np.arange(2), 20) for _ in range(3)] == [(0, 8)] * 3  # all is in memory
        assert len(data.looks) == 1
        waits[0] += 1
        data.cold = True
        assert look._ask(np.arange(2), 20) == (1, 1)
        data.wait_for_calls(1)


@pytest.mark.skipif(sys.platform != "linux", reason="nobody says here what is in memory")
def test_a_touch_of_a_page_on_the_disk_counts_as_a_wait_in_all_threads_and_as_read_in_the_one(tmp_path: Path) -> None:
    pixels = mapped_and_forgotten(tmp_path / "pages")
    waits, blocks = waits_for_disk(), blocks_read()
    with ThreadPoolExecutor(1) as reader:
        assert reader.submit(pixels.item, len(pixels) // 2).result() == 0
    assert waits_for_disk() > waits
    assert blocks_read() == blocks


@pytest.mark.skipif(sys.platform != "linux", reason="nobody says here what is in memory")
def test_a_stretch_is_in_memory_if_all_its_pages_are(tmp_path: Path) -> None:
    pixels = mapped_and_forgotten(tmp_path / "pages")
    place = len(pixels) // 2
    with (tmp_path / "pages").open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        os.pread(file.fileno(), 1, place)  # one page alone
    around = (-mmap.PAGESIZE - 1, -1, 0, mmap.PAGESIZE - 1)
    assert [is_resident(pixels.ctypes.data + place + first, 2) for first in around] == [False, False, True, False]


def test_nothing_runs_where_nothing_can_be_asked() -> None:
    sampler = ParticleSampler(range(10), 2)
    drawn = iter(sampler)
    next(drawn)
    assert own_threads() == []


def test_zero_batches_ahead_mean_no_thread() -> None:
    drawn = iter(ParticleSampler(Asked(), 2, lookahead=0))
    next(drawn)
    assert own_threads() == []


def exhaust(sampler: ParticleSampler) -> None:
    list(sampler)


def break_off(sampler: ParticleSampler) -> None:
    for _ in sampler:
        break


def close_early(sampler: ParticleSampler) -> None:
    steps = sampler.steps()
    next(steps)
    assert own_threads() == ["cryolike-lookahead"]
    steps.close()


def drop(sampler: ParticleSampler) -> None:
    steps = iter(sampler)
    next(steps)
    del steps


def fail_inside(sampler: ParticleSampler) -> None:
    steps = iter(sampler)
    next(steps)
    with pytest.raises(KeyboardInterrupt) as error:
        steps.throw(KeyboardInterrupt)  # type: ignore[attr-defined]
    assert own_threads() == [], error  # which is kept


def fail(sampler: ParticleSampler) -> None:
    def consume() -> None:
        for _ in sampler:
            raise RuntimeError("consumer")

    with pytest.raises(RuntimeError, match="consumer"):
        consume()


@pytest.mark.parametrize("stop", [exhaust, break_off, close_early, drop, fail_inside, fail])
def test_the_thread_ends_however_the_iteration_ends(stop: Callable[[ParticleSampler], None]) -> None:
    stop(ParticleSampler(Asked(), 2))
    assert own_threads() == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("can't start new thread")], ids=repr)
def test_the_thread_ends_when_its_start_is_broken_off(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    start = threading.Thread.start

    def start_and_fail(thread: threading.Thread) -> None:
        start(thread)
        raise error

    monkeypatch.setattr(threading.Thread, "start", start_and_fail)
    with pytest.raises(type(error)), LookAhead(Asked(), 2) as look:
        next(look.pass_on(batches(3)))
    assert own_threads() == []


def begun(look: LookAhead) -> threading.Thread:
    """The thread of a look-ahead, which has something to ask for; who waits for its end does not wait for ever."""
    look._ask(np.arange(2), 1)
    thread = look._thread
    assert thread is not None
    thread.join = partial(thread.join, 10)  # type: ignore[method-assign]
    return thread


def test_the_thread_ends_when_it_wakes_before_the_end_goes_on() -> None:
    with LookAhead(Asked(), 1) as look:
        thread = begun(look)
        with another_thread_at(1, LookAhead.__exit__, lambda: wait_until(look._wake.empty)):
            look.__exit__(None, None, None)
    assert not thread.is_alive()


def test_the_thread_ends_wherever_ctrl_c_comes_in() -> None:
    modules = {lookahead.__file__, threading.__file__}
    before = sys.gettrace()
    broken_off = True
    for line in itertools.count():
        passed = itertools.count()

        def interrupt(frame: FrameType, event: str, _: Any, passed: Iterator[int] = passed, line: int = line) -> Any:
            if frame.f_code.co_filename in modules and event == "line" and next(passed) == line:
                raise KeyboardInterrupt
            return interrupt

        try:
            with LookAhead(Asked(), 1) as look:
                thread = begun(look)
                sys.settrace(interrupt)
                try:
                    list(look.pass_on(batches(3)))
                    broken_off = False
                finally:
                    sys.settrace(before)
        except KeyboardInterrupt:
            pass
        assert not thread.is_alive()
        if not broken_off:
            break
    assert line > 20


def test_an_iteration_closed_by_the_garbage_collector_in_the_asking_thread_ends_in_peace(recwarn: pytest.WarningsRecorder) -> None:
    # Garbage collection may run in any thread, and closes generators that are part of a cycle there.
    errors: list[BaseException] = []

    class Closing(Asked):
        def ask_ahead(self, rows: np.ndarray) -> bool:
            try:
                look.__exit__(None, None, None)
            except BaseException as error:
                errors.append(error)
            return super().ask_ahead(rows)

    data = Closing()
    look = LookAhead(data, 1)
    thread = begun(look)
    thread.join()
    assert not thread.is_alive()
    assert errors == []


@pytest.fixture
def written(tmp_path: Path) -> IndexedDataset:
    return IndexedDataset(write_particles(tmp_path, 64, box=64, stacks=3)[0])


def cold(dataset: IndexedDataset) -> tuple[np.ndarray, list[Path]]:
    """Rows of all stacks but the first, and those stacks, none of whose pixels are in the page cache any more."""
    paths = [Path(path) for path in dataset.particles.paths[1:]]
    for path in paths:
        forget(path)
    return np.flatnonzero(dataset.particles.file), paths


def mapped_and_forgotten(path: Path) -> np.ndarray:
    """A megabyte of zeros in a file that is mapped, none of it in the page cache."""
    path.write_bytes(bytes(1 << 20))
    forget(path)
    return np.memmap(path, np.uint8, "r")


def read_first_stack(dataset: IndexedDataset) -> None:
    dataset.read(np.flatnonzero(dataset.particles.file == 0))


def all_come(paths: list[Path]) -> bool:
    """Whether all pages of the files come into memory by themselves, which the kernel does behind our back."""
    deadline = time.monotonic() + 5
    while not all(residence(path)[1:].all() for path in paths):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_asking_ahead_brings_the_pages_in(written: IndexedDataset) -> None:
    read_first_stack(written)
    rows, paths = cold(written)
    assert written.ask_ahead(rows)
    assert all_come(paths)


def test_pages_count_as_asked_for_where_the_file_system_counts_no_blocks(written: IndexedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena, "blocks_read", lambda: 0)
    assert written.ask_ahead(cold(written)[0])


def test_asking_ahead_works_before_anything_was_read(written: IndexedDataset) -> None:
    # In a DataLoader with workers the main process, where the sampler lives, never reads anything.
    rows, paths = cold(written)
    assert written.ask_ahead(rows)
    assert all_come(paths)


def test_pages_that_are_there_are_not_asked_for(written: IndexedDataset) -> None:
    written.read(np.arange(64))
    assert not written.ask_ahead(np.arange(64))


def test_a_look_tells_whether_images_are_in_memory(written: IndexedDataset) -> None:
    read_first_stack(written)
    first = np.flatnonzero(written.particles.file == 0)
    rows, _ = cold(written)
    assert written.in_memory(first)
    assert not written.in_memory(rows)
    written.read(rows)
    assert written.in_memory(rows)


def test_a_look_is_at_a_few_images_however_many_are_asked_about(written: IndexedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    written.read(np.arange(64))
    looks: list[int] = []
    monkeypatch.setattr(arena, "is_resident", lambda address, length: looks.append(address) or True)
    assert written.in_memory(np.arange(64))
    assert len(set(looks)) == len(looks) == 8


def test_a_look_waits_for_no_file_that_is_yet_to_be_mapped(written: IndexedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    read_first_stack(written)
    monkeypatch.setattr(arena, "open_to_map", None)
    monkeypatch.setattr(arena, "file_size", None)
    monkeypatch.setattr(arena, "CHECK_EVERY", -1.0)
    assert not written.in_memory(np.arange(64))


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_look_at_images_that_cannot_be_asked_for_finds_nothing_to_do(tmp_path: Path, order: str) -> None:
    swapped = IndexedDataset(write_particles(tmp_path, 64, box=64, stacks=3, order=order)[0])
    assert swapped.in_memory(np.arange(64)) == (order == ">")  # which an arena does not hold; of the others no file is mapped
    export_zarr(swapped, tmp_path / "store", compression="zstd", progress=False)
    assert ZarrDataset(tmp_path / "store").in_memory(np.arange(64))


def test_an_epoch_over_data_in_memory_needs_no_thread_that_asks(written: IndexedDataset) -> None:
    loader = stream(written, batch_size=4, shuffle=True)
    list(loader)
    assert [own_threads() for _ in loader] == [["cryolike-reader"]] * 16


@pytest.fixture
def untold(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Linux has it with files that belong to another user, who lets nobody write to them."""
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    monkeypatch.setattr(arena, "is_resident", lambda *_: True)


@pytest.mark.usefixtures("untold")
def test_pages_are_asked_for_where_the_system_does_not_tell_what_is_there(written: IndexedDataset) -> None:
    read_first_stack(written)
    rows, paths = cold(written)
    assert written.ask_ahead(rows)
    assert all_come(paths)


@pytest.mark.usefixtures("untold")
def test_where_the_system_does_not_tell_what_is_there_no_look_tells_it(written: IndexedDataset) -> None:
    written.read(np.arange(64))
    assert not written.in_memory(np.arange(64))


@pytest.mark.usefixtures("untold")
def test_where_the_system_does_not_tell_what_is_there_nothing_that_is_read_counts_as_being_there(written: IndexedDataset) -> None:
    written.read(np.arange(64))
    assert not written.ask_ahead(np.arange(64))


@pytest.mark.usefixtures("untold")
@pytest.mark.parametrize("mixed", [False, True])
def test_of_no_images_there_is_nothing_to_ask(written: IndexedDataset, mixed: bool) -> None:
    if mixed:  # one stack is none for the arena
        path = Path(written.particles.paths[0])
        write_stack(path, numbered_images(22, 64, dtype="i2"))
        written = IndexedDataset(path.parents[1] / "particles.cs")
    written.read(np.arange(64))
    assert written.in_memory(np.empty(0, np.int64))
    assert not written.ask_ahead(np.empty(0, np.int64))


NOT_TO_BE_WRITTEN = """
    import os, sys
    import numpy as np
    from cryolike_data import IndexedDataset
    dataset = IndexedDataset(sys.argv[1])
    first = dataset.particles.file == 0
    dataset.ask_ahead(np.flatnonzero(first))  # imports what another user may not be allowed to
    for path in dataset.particles.paths:
        os.chmod(path, 0o444)
    if os.geteuid() == 0:
        os.setuid(65534)  # root may write to them all the same
    for path in dataset.particles.paths:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    rows = np.flatnonzero(~first)
    print(dataset.ask_ahead(rows))
    dataset.read(rows)
    print(dataset.ask_ahead(rows))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux asks ahead")
def test_stacks_that_cannot_be_written_to_are_asked_for() -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own can be entered by nobody else
        os.chmod(folder, 0o755)
        table = write_particles(Path(folder), 64, box=64, stacks=3)[0]
        cold(IndexedDataset(table))  # on the disk, which is all that another user may drop
        result = run_python(NOT_TO_BE_WRITTEN, table)
    assert result.stdout.split() == ["True", "False"], result.stderr


def test_asking_ahead_works_where_the_kernel_takes_no_list_of_ranges(written: IndexedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    read_first_stack(written)
    rows, paths = cold(written)
    monkeypatch.setattr(pages, "_SYS_PROCESS_MADVISE", 100_000)  # a call that there is not, as before Linux 5.10
    assert written.ask_ahead(rows)
    assert all_come(paths)


def test_more_images_than_the_kernel_takes_at_a_time_are_all_asked_for(tmp_path: Path) -> None:
    dataset = IndexedDataset(write_particles(tmp_path, 7000, box=32)[0])
    rows, (path,) = cold(dataset)
    apart = rows[dataset.particles.slice[rows] % 3 == 0]  # an image of 4096 bytes lies on two pages, and the third is for nobody
    assert len(apart) > 1024
    assert dataset.ask_ahead(apart)
    wait_until(lambda: bool(residence(path)[np.arange(len(apart)) * 3].all()))


@pytest.mark.parametrize("error", [*map(OSError, [errno.ENOSYS, errno.EPERM, errno.EMFILE]), AttributeError("old headers")], ids=repr)
def test_asking_ahead_works_where_the_kernel_gives_no_descriptor_of_a_process(
    written: IndexedDataset, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(*_: int) -> int:
        raise error

    read_first_stack(written)
    rows, paths = cold(written)
    monkeypatch.setattr(os, "pidfd_open", refuse, raising=False)
    assert written.ask_ahead(rows)
    assert all_come(paths)


def test_stacks_that_are_gone_do_not_end_the_asking(written: IndexedDataset) -> None:
    read_first_stack(written)
    for path in written.particles.paths:
        Path(path).unlink()
    assert written.ask_ahead(np.arange(64)) is False


def test_asking_leaves_no_descriptor_open(written: IndexedDataset) -> None:
    read_first_stack(written)
    rows, _ = cold(written)
    before = len(os.listdir("/proc/self/fd"))
    assert written.ask_ahead(rows)
    assert len(os.listdir("/proc/self/fd")) == before


AT_EXIT = """
    import sys, numpy as np
    from cryolike_data import IndexedDataset
    from cryolike_data.sampler import ParticleSampler
    dataset = IndexedDataset(sys.argv[1])
    dataset.read(np.arange(len(dataset)))
    drawn = iter(ParticleSampler(dataset, 4))
    next(drawn)
"""


def test_a_program_may_end_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    table, _ = write_particles(tmp_path, 40, stacks=2)
    run = run_python(AT_EXIT, table)
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.parametrize("cold", [True, False])
def test_an_export_asks_for_all_that_has_to_be_brought_and_seldom_looks_at_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cold: bool
) -> None:
    n, stretch = 96, 4
    asked: list[np.ndarray] = []

    class Counting(IndexedDataset):
        def ask_ahead(self, rows: np.ndarray) -> bool:
            asked.append(rows)
            return cold

    dataset = Counting(write_particles(tmp_path, n)[0])
    monkeypatch.setattr(pixels, "_PIECE_BYTES", 2 * dataset.image_bytes)
    monkeypatch.setattr(pixels, "_AHEAD_BYTES", stretch * dataset.image_bytes)
    export_zarr(dataset, tmp_path / "store", progress=False)
    first, *rest = asked  # the first is that of the run, for one image
    assert len(first) == 1
    if cold:
        assert np.unique(np.concatenate(rest)).tolist() == list(range(n))
        assert len(rest) == n // stretch
    else:
        assert 1 < len(rest) <= n // stretch // 2
