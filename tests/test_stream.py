"""``stream``: the same batches as reading them one by one, each its holder's, and nothing left behind however it stops."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import pickle
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator
from copy import copy as shallow_copy
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import (
    another_thread_at,
    check_that_an_error_keeps_no_stack_mapped,
    close_in_its_loop,
    mapped_files,
    open_files,
    own_threads,
    run_python,
    same_batch,
    wait_until,
    write_particles,
    write_stack,
)
from torch.utils.data import DataLoader
from tqdm import TMonitor

import cryolike_data.reader as reader_module
import cryolike_data.ring as ring_module
from cryolike_data import Collate, Downsample, IndexedDataset, Normalize, ParticleBatch, ZarrDataset, export_zarr
from cryolike_data.arena import Arena, NoMoreMapsError
from cryolike_data.errors import ArgumentError, IterationError, StackError
from cryolike_data.reader import Reader
from cryolike_data.ring import BufferRing
from cryolike_data.sampler import ParticleSampler
from cryolike_data.stream import ParticleStream, stream

N = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    write_particles(path, N, box=16, stacks=4)
    return path


@pytest.fixture
def ds(folder: Path) -> IndexedDataset:
    return IndexedDataset(folder / "J1/particles.cs")


@pytest.fixture(autouse=True)
def nothing_left_behind(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[None]:
    """After every test here: no thread more than before, no file open, and the threads of torch as they were."""

    def threads() -> list[str]:
        # Exporting with zarr leaves those of its event loop and of a progress bar, which older versions of tqdm give no name.
        ours = [thread for thread in threading.enumerate() if not isinstance(thread, TMonitor)]
        return [thread.name for thread in ours if not thread.name.startswith(("zarr", "asyncio"))]

    before, intra_op = threads(), torch.get_num_threads()
    yield
    assert threads() == before
    assert open_files(tmp_path) == []
    assert torch.get_num_threads() == intra_op


def expected(dataset: Any, sampler: ParticleSampler, epoch: int = 0) -> list[ParticleBatch]:
    """What the sampler's order means, read batch by batch."""
    order = sampler.rows(np.arange(len(dataset)), epoch)
    return [dataset.batch(order[k : k + sampler.batch_size]) for k in range(0, len(order), sampler.batch_size)]


def rows_of(batches: list[ParticleBatch]) -> list[int]:
    return [row for batch in batches for row in batch.index.tolist()]


@pytest.mark.parametrize("dtype", ["i1", "i2", "u2", "f2", "f4"])
def test_batches_are_those_of_the_data_set_in_the_order_of_the_sampler(tmp_path: Path, dtype: str) -> None:
    dataset = IndexedDataset(write_particles(tmp_path, 23, dtype=dtype, stacks=3)[0])
    sampler = ParticleSampler(dataset, 5, seed=3)
    wanted = expected(dataset, sampler)
    for batch, reference in zip(stream(dataset, sampler=sampler), wanted, strict=True):
        same_batch(batch, reference)


@pytest.mark.parametrize("order", ["<", ">"])
def test_batches_of_stacks_that_no_arena_holds_are_those_of_the_data_set(tmp_path: Path, order: str) -> None:
    # Of one stack alone, and of all: where the images of a batch lie is then not known beforehand.
    dataset = IndexedDataset(write_particles(tmp_path, 23, stacks=3, order=order)[0])
    first = np.flatnonzero(dataset.particles.file == 0)
    in_order = first[np.argsort(dataset.particles.slice[first])]
    write_stack(Path(dataset.particles.paths[0]), dataset.read(in_order).numpy(), order="<>".replace(order, ""))
    dataset = IndexedDataset(tmp_path / "J1/particles.cs")
    sampler = ParticleSampler(dataset, 5, seed=3)
    for batch, reference in zip(stream(dataset, sampler=sampler), expected(dataset, sampler), strict=True):
        same_batch(batch, reference)


def test_a_stream_goes_on_without_the_arena_that_its_batches_were_found_in(ds: IndexedDataset) -> None:
    wanted = expected(ds, ParticleSampler(ds, 3, shuffle=False))
    batches = iter(stream(ds, batch_size=3))
    same_batch(next(batches), wanted[0])
    tried: list[np.ndarray] = []

    def no_more_maps(self: Arena, file: np.ndarray) -> None:
        tried.append(file)
        raise NoMoreMapsError("none is left")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Arena, "touch", no_more_maps)
        ds._images()._seen_until = -np.inf  # type: ignore[attr-defined]
        for batch, reference in zip(batches, wanted[1:], strict=True):
            same_batch(batch, reference)
    assert ds.source._arena is False  # type: ignore[attr-defined]
    assert len(tried) == 1


def test_where_images_lie_is_known_before_they_are_read(ds: IndexedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    known: list[Any] = []
    reading = IndexedDataset.reading
    monkeypatch.setattr(IndexedDataset, "reading", lambda self, *of: known.append(of[2]) or reading(self, *of))
    list(stream(ds, batch_size=7, shuffle=True))
    assert [places is not None for places in known] == [True] * 9


def test_without_a_sampler_every_particle_comes_once_in_order(ds: IndexedDataset) -> None:
    batches = list(stream(ds, batch_size=7))
    assert rows_of(batches) == list(range(N))
    assert [len(batch) for batch in batches] == [7] * 8 + [4]


def test_shuffle_and_seed_are_those_of_a_sampler(ds: IndexedDataset) -> None:
    batches = list(stream(ds, batch_size=7, shuffle=True, seed=5))
    assert rows_of(batches) == [row for rows in ParticleSampler(ds, 7, seed=5) for row in rows]


def test_the_ranks_of_the_sampler_share_the_epoch(ds: IndexedDataset) -> None:
    parts = [rows_of(list(stream(ds, sampler=ParticleSampler(ds, 8, rank=rank, world_size=3)))) for rank in range(3)]
    assert sorted(row for part in parts for row in part) == list(range(N))


def test_the_length_is_the_number_of_batches(ds: IndexedDataset) -> None:
    loader = stream(ds, batch_size=7)
    assert len(loader) == len(list(loader)) == 9


def test_trainers_find_the_sampler_as_that_of_a_loader(ds: IndexedDataset) -> None:
    # Lightning, for one, asks whatever has a dataset and a sampler for its batch_sampler, before it validates.
    loader = stream(ds, batch_size=7)
    batches = DataLoader(loader.dataset, batch_sampler=loader.batch_sampler)
    assert rows_of(list(batches)) == rows_of(list(stream(ds, batch_size=7)))


@pytest.mark.parametrize("prefetch", [1, 2, 50, np.int64(2)])
def test_any_depth_of_reading_ahead_gives_the_same(ds: IndexedDataset, prefetch: int) -> None:
    assert rows_of(list(stream(ds, batch_size=7, prefetch=prefetch))) == list(range(N))


def test_a_batch_larger_than_the_data_set_is_the_data_set(ds: IndexedDataset) -> None:
    (batch,) = stream(ds, batch_size=1000)
    same_batch(batch, ds.batch(np.arange(N)))


@pytest.mark.parametrize("dtype", ["i2", "f4"])
def test_transforms_give_what_collate_gives(tmp_path: Path, dtype: str) -> None:
    dataset = IndexedDataset(write_particles(tmp_path, 23, box=16, dtype=dtype)[0])
    collate = Collate(Downsample(box=8), "std")
    for batch in stream(dataset, batch_size=5, downsample=Downsample(box=8), normalize="std"):
        same_batch(batch, collate(dataset.batch(batch.index)))
        assert batch.pixel_size == 3.0


def test_a_dtype_is_that_of_the_images(ds: IndexedDataset) -> None:
    for batch in stream(ds, batch_size=20, dtype=torch.float64):
        same_batch(batch, Collate(dtype=torch.float64)(ds.batch(batch.index)))


@pytest.mark.parametrize(
    "options",
    [{"normalize": "mean"}, {"dtype": torch.int16}, {"downsample": 8}, {"prefetch": 0}, {"batch_size": 0}, {"shuffle": "none"}],
    ids=str,
)
def test_arguments_that_cannot_be_meant_are_errors(ds: IndexedDataset, options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError):
        stream(ds, **options)


def test_a_sampler_of_another_kind_is_an_error_that_says_where_it_belongs(ds: IndexedDataset) -> None:
    with pytest.raises(ArgumentError, match="not a BatchSampler; a DataLoader takes"):
        stream(ds, sampler=torch.utils.data.BatchSampler(range(N), 4, drop_last=False))


@pytest.mark.parametrize("options", [{"batch_size": 4}, {"shuffle": True}, {"seed": 3}], ids=str)
def test_what_the_sampler_decides_is_not_decided_twice(ds: IndexedDataset, options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError):
        stream(ds, sampler=ParticleSampler(ds, 4), **options)


@pytest.mark.parametrize(
    "other",
    [
        lambda ds: torch.utils.data.random_split(ds, [N - 20, 20])[1],
        lambda ds: ds.select(np.arange(N)[::-1]),
        lambda ds: ds.select(np.tile(np.arange(N), 2)),
        lambda ds: range(N),
    ],
    ids=["split", "same length", "longer", "numbers"],
)
def test_a_sampler_over_anything_but_the_data_set_is_an_error_that_says_how_to_stream_a_part(
    ds: IndexedDataset, other: Callable[[IndexedDataset], Any]
) -> None:
    with pytest.raises(ArgumentError, match=r"select\(subset\.indices\)"):
        stream(ds, sampler=ParticleSampler(other(ds), 4))


def test_a_subset_is_an_error_whose_remedy_streams_the_subset(ds: IndexedDataset) -> None:
    subset = torch.utils.data.Subset(ds, [7, 1, 4])
    with pytest.raises(ArgumentError, match=r"Subset.*select\(subset\.indices\)"):
        stream(subset)
    (batch,) = stream(ds.select(subset.indices))
    assert torch.equal(batch.images, ds.read([7, 1, 4]))


@pytest.mark.parametrize("options", [{}, {"normalize": "std"}, {"dtype": torch.float32}], ids=str)
def test_batches_that_are_held_never_change(ds: IndexedDataset, options: dict[str, Any]) -> None:
    held, copies = [], []
    for batch in stream(ds, batch_size=7, prefetch=2, **options):
        held.append(batch)
        copies.append(batch.images.clone())
    for batch, copy in zip(held, copies, strict=True):
        assert torch.equal(batch.images, copy)


def test_parts_of_batches_that_are_held_never_change(ds: IndexedDataset) -> None:
    loader = stream(ds, batch_size=7, prefetch=2)
    wanted = ds.read(np.arange(N)).numpy()
    held = [(k, batch.images[1:3], batch.images.numpy()[0], batch[2].image, batch[3:]) for k, batch in enumerate(loader)]
    for k, part, array, image, rest in held:
        np.testing.assert_array_equal(part.numpy(), wanted[7 * k + 1 : 7 * k + 3])
        np.testing.assert_array_equal(array, wanted[7 * k])
        np.testing.assert_array_equal(image.numpy(), wanted[7 * k + 2])
        np.testing.assert_array_equal(rest.images.numpy(), wanted[7 * k + 3 : 7 * k + 7])


def test_what_the_user_writes_into_a_batch_is_seen_by_nobody_else(ds: IndexedDataset) -> None:
    for batch in stream(ds, batch_size=7, shuffle=True):
        same_batch(batch, ds.batch(batch.index))
        batch.images.fill_(-1)
        batch.index.fill_(-1)
        batch.uid.fill_(-1)


def test_batches_outlive_the_stream_and_the_data_set(folder: Path) -> None:
    dataset = IndexedDataset(folder / "J1/particles.cs")
    reference = dataset.read(np.arange(7)).clone()
    loader = stream(dataset, batch_size=7)
    batch = next(iter(loader))
    del loader, dataset
    gc.collect()
    assert mapped_files(folder) == []
    assert torch.equal(batch.images, reference)


@pytest.fixture
def allocated(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the buffers that are made."""
    shapes: list[tuple[int, ...]] = []
    make = ring_module._aligned

    def count(shape: tuple[int, ...], *args: Any, **options: Any) -> torch.Tensor:
        shapes.append(shape)
        return make(shape, *args, **options)

    monkeypatch.setattr(ring_module, "_aligned", count)
    return shapes


def test_buffers_are_used_again_when_batches_are_let_go_of(ds: IndexedDataset, allocated: list[tuple[int, ...]]) -> None:
    for batch in stream(ds, batch_size=2, prefetch=3):
        del batch
    assert len(allocated) <= 3 + 2


def test_holding_batches_costs_no_more_than_the_batches(ds: IndexedDataset, allocated: list[tuple[int, ...]]) -> None:
    held = list(stream(ds, batch_size=2, prefetch=3))
    assert len(held) == N / 2
    assert N <= sum(shape[0] for shape in allocated) <= N + 2 * (3 + 2)


@pytest.mark.parametrize("when", ["in the loop", "after the loop"])
def test_the_memory_of_many_batches_goes_when_they_are_let_go_of(ds: IndexedDataset, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    memory: list[weakref.ref[np.ndarray]] = []
    make = ring_module._aligned

    def note(*args: Any, **options: Any) -> np.ndarray:
        buffer = make(*args, **options)
        memory.append(weakref.ref(buffer.base))
        return buffer

    monkeypatch.setattr(ring_module, "_aligned", note)
    loader = stream(ds, batch_size=2, prefetch=3)
    held = []
    for k, batch in enumerate(loader):
        held.append(batch)
        if k == 25 and when == "in the loop":
            held.clear()
    del batch
    held.clear()
    assert len(memory) >= 25
    assert sum(buffer() is not None for buffer in memory) <= 2 * (3 + 4)
    loader.close()
    assert all(buffer() is None for buffer in memory)


@pytest.fixture
def busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """However fast a consumer is, it passes for one that has something to do."""
    monkeypatch.setattr(reader_module, "_BUSY_SECONDS", -1.0)
    monkeypatch.setattr(reader_module, "_BUSY_SHARE", -1.0)


def read_ahead(k: int, prefetch: int) -> int:
    """Batches that are ready for a slow consumer that has taken number k: as many as may be, again whenever half of them are used up."""
    return prefetch - k % (prefetch - prefetch // 2)


@pytest.mark.usefixtures("busy")
def test_batches_are_read_ahead_of_a_slow_consumer(ds: IndexedDataset) -> None:
    loader = stream(ds, batch_size=2, prefetch=3)
    for k, batch in enumerate(loader):
        assert batch.index.tolist() == [2 * k, 2 * k + 1]
        if k < 7:
            wait_until(lambda k=k: len(loader._reader._filled) == read_ahead(k, 3))
    assert k == 29


@pytest.mark.usefixtures("busy")
def test_no_more_than_prefetch_batches_are_read_ahead(ds: IndexedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    reading = IndexedDataset.reading
    monkeypatch.setattr(IndexedDataset, "reading", lambda self, rows, *to: reads.append(len(rows)) or reading(self, rows, *to))
    loader = stream(ds, batch_size=2, prefetch=3)
    for k, _ in enumerate(loader):
        wait_until(lambda k=k: len(loader._reader._filled) == read_ahead(k, 3) or loader._reader._finished)
        assert sum(reads) <= 2 * (k + 1 + 3)
        if k == 10:
            break


def finish(loader: ParticleStream) -> None:
    list(loader)


def break_off(loader: ParticleStream) -> None:
    for _ in loader:
        break


def drop(loader: ParticleStream) -> None:
    batches = iter(loader)
    next(batches)
    del batches


def close(loader: ParticleStream) -> None:
    batches = iter(loader)
    next(batches)
    assert "cryolike-reader" in own_threads()
    loader.close()
    loader.close()


def leave_the_with(loader: ParticleStream) -> None:
    with loader:
        batches = iter(loader)
        next(batches)


def start_again(loader: ParticleStream) -> None:
    first = iter(loader)
    next(first)
    second = iter(loader)
    next(second)
    assert own_threads().count("cryolike-reader") == 1
    second.close()


def raise_in_consumer(loader: ParticleStream) -> None:
    for _ in loader:
        raise RuntimeError("consumer")


def interrupt_in_consumer(loader: ParticleStream) -> None:
    for _ in loader:
        raise KeyboardInterrupt


@pytest.mark.parametrize("stop", [finish, break_off, drop, close, leave_the_with, start_again])
@pytest.mark.parametrize("epochs_before", [0, 1])
def test_every_way_of_stopping_leaves_no_thread_and_no_file(
    ds: IndexedDataset, folder: Path, stop: Callable[[ParticleStream], None], epochs_before: int
) -> None:
    loader = stream(ds, batch_size=3)
    for _ in range(epochs_before):
        list(loader)
    stop(loader)
    assert own_threads() == []
    assert open_files(folder) == []


@pytest.mark.parametrize(("stop", "kind"), [(raise_in_consumer, RuntimeError), (interrupt_in_consumer, KeyboardInterrupt)])
def test_an_exception_in_the_consumer_leaves_no_thread_and_no_file(
    ds: IndexedDataset, folder: Path, stop: Callable[[ParticleStream], None], kind: type[BaseException]
) -> None:
    with pytest.raises(kind):
        stop(stream(ds, batch_size=3))
    assert own_threads() == []
    assert open_files(folder) == []


def test_no_map_stays_when_stream_and_data_set_are_gone(folder: Path) -> None:
    dataset = IndexedDataset(folder / "J1/particles.cs")
    loader = stream(dataset, batch_size=3)
    break_off(loader)
    assert mapped_files(folder) != []
    del loader, dataset
    gc.collect()
    assert mapped_files(folder) == []


def fail_at(monkeypatch: pytest.MonkeyPatch, row: int, error: BaseException) -> None:
    """Make reading the given row fail."""
    reading = IndexedDataset.reading

    def fail_while_reading(self: IndexedDataset, rows: np.ndarray, *to: Any) -> Callable[[], object]:
        if row in rows:
            raise error
        return reading(self, rows, *to)

    monkeypatch.setattr(IndexedDataset, "reading", fail_while_reading)


@pytest.mark.usefixtures("busy")
@pytest.mark.parametrize("batch", [0, 1, 2, 4])
@pytest.mark.parametrize("slow", [False, True])
def test_an_error_while_reading_comes_after_the_batches_before_it_and_shows_its_place(
    ds: IndexedDataset, monkeypatch: pytest.MonkeyPatch, batch: int, slow: bool
) -> None:
    fail_at(monkeypatch, 3 * batch + 1, OSError("disk on fire"))
    loader = stream(ds, batch_size=3, prefetch=2)
    seen: list[int] = []

    def consume() -> None:
        for got in loader:
            seen.extend(got.index.tolist())
            if slow:  # the thread meets the error
                wait_until(lambda: len(loader._reader._filled) == 2 or loader._reader._finished)

    with pytest.raises(OSError, match="disk on fire") as caught:
        consume()
    assert seen == list(range(3 * batch))
    assert "fail_while_reading" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert own_threads() == []
    assert loader.state_dict()["position"] == 3 * batch


def test_after_an_error_the_epoch_can_be_taken_up_where_it_stopped(ds: IndexedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = stream(ds, batch_size=3, shuffle=True)
    seen: list[int] = []

    def consume() -> None:
        for batch in loader:
            seen.extend(batch.index.tolist())

    with monkeypatch.context() as patch:
        fail_at(patch, int(loader.sampler.rows(np.array([3 * 4]), 0)[0]), OSError("network away"))
        with pytest.raises(OSError, match="network away"):
            consume()
    loader.load_state_dict(loader.state_dict())
    consume()
    assert seen == loader.sampler.rows(np.arange(N), 0).tolist()


def test_a_stack_that_was_truncated_is_an_error_of_the_loop(tmp_path: Path) -> None:
    dataset = IndexedDataset(write_particles(tmp_path, 30, stacks=3)[0])
    os.truncate(dataset.particles.paths[1], 1100)
    with pytest.raises(StackError, match="shrunk"):
        list(stream(dataset, batch_size=4))
    assert own_threads() == []


def test_an_error_that_was_dealt_with_keeps_no_stack_mapped(tmp_path: Path) -> None:
    check_that_an_error_keeps_no_stack_mapped(tmp_path)


def test_an_error_in_a_transform_shows_its_place_and_leaves_nothing(ds: IndexedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_to_normalize(self: Normalize, images: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no scale")

    monkeypatch.setattr(Normalize, "__call__", fail_to_normalize)
    loader = stream(ds, batch_size=3, normalize="std")
    with pytest.raises(RuntimeError, match="no scale") as caught:
        list(loader)
    assert "fail_to_normalize" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert own_threads() == []
    assert loader.state_dict()["position"] == 0


CTRL_C = """
    import signal, sys, threading, numpy as np
    from pathlib import Path
    from support import mapped_files, open_files, own_threads
    from cryolike_data import IndexedDataset
    from cryolike_data.stream import stream
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    folder = Path(sys.argv[1])
    loader = stream(IndexedDataset(folder / "J1/particles.cs"), batch_size=3)
    try:
        for k, batch in enumerate(loader):
            if k == 2:
                signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        assert k == 2 and loader.state_dict()["position"] == 9
    else:
        sys.exit("no KeyboardInterrupt")
    assert own_threads() == [] and threading.active_count() == 1, threading.enumerate()
    assert open_files(folder) == []
    del loader
    import gc
    gc.collect()
    assert mapped_files(folder) == []
"""


def test_ctrl_c_leaves_no_thread_map_or_file(folder: Path) -> None:
    run = run_python(CTRL_C, folder)
    assert (run.returncode, run.stderr) == (0, "")


def torch_threads_of_a_new_thread() -> int:
    counts: list[int] = []
    thread = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return counts[0]


@pytest.fixture
def four_torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_ctrl_c_ends_a_loop_wherever_it_comes_in(folder: Path) -> None:
    found = run_python(
        """
        import itertools, sys, threading
        import cryolike_data as cd
        from cryolike_data import reader

        modules = {reader.__file__, threading.__file__}
        dataset = cd.IndexedDataset(sys.argv[1])
        for line in itertools.count():
            passed = itertools.count()

            def interrupt(frame, event, _):
                if frame.f_code.co_filename in modules and event == "line" and next(passed) == line:
                    raise KeyboardInterrupt
                return interrupt

            batches = iter(cd.stream(dataset, batch_size=20, prefetch=1))
            next(batches)
            sys.settrace(interrupt)
            try:
                for _ in batches:
                    pass
                break
            except KeyboardInterrupt:
                pass
            finally:
                sys.settrace(None)
        print(line)
        """,
        folder / "J1/particles.cs",
    )
    assert int(found.stdout) > 20


@pytest.mark.parametrize("batches", [2, 4])  # of three: the loop is left, or comes to its end
def test_a_signal_handler_may_close_a_stream_wherever_it_comes_in(folder: Path, batches: int) -> None:
    found = run_python(
        """
        import faulthandler, itertools, sys
        from itertools import islice
        from pathlib import Path
        import cryolike_data as cd
        from support import own_threads

        faulthandler.dump_traceback_later(50, exit=True)
        package = str(Path(cd.__file__).parent)
        dataset = cd.IndexedDataset(sys.argv[1])
        for line in itertools.count():
            passed, closed = itertools.count(), []

            def close(frame, event, _):
                if not frame.f_code.co_filename.startswith(package):
                    return None
                if event == "line" and next(passed) == line:
                    closed.append(line)
                    loader.close()
                return close

            loader = cd.stream(dataset, batch_size=20, prefetch=1)
            batches = iter(loader)
            sys.settrace(close)
            rows = [row for batch in islice(batches, int(sys.argv[2])) for row in batch.index.tolist()]
            batches.close()
            sys.settrace(None)
            assert rows == list(range(len(rows))), rows
            assert own_threads() == []
            if not closed:
                break
        print(line)
        """,
        folder / "J1/particles.cs",
        batches,
    )
    assert int(found.stdout) > 200, found.stderr


@pytest.mark.usefixtures("four_torch_threads")
@pytest.mark.parametrize("name", ["cryolike-reader", "cryolike-lookahead"])
def test_ctrl_c_while_a_thread_starts_leaves_no_thread(ds: IndexedDataset, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    start = threading.Thread.start

    def start_and_interrupt(thread: threading.Thread) -> None:
        start(thread)
        if thread.name == name:
            raise KeyboardInterrupt

    loader = stream(ds, batch_size=3)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start_and_interrupt)
        with pytest.raises(KeyboardInterrupt):
            list(loader)
    wait_until(lambda: own_threads() == [])
    assert (torch.get_num_threads(), torch_threads_of_a_new_thread()) == (4, 4)
    assert rows_of(list(loader)) == list(range(N))


@pytest.mark.parametrize("name", ["cryolike-reader", "cryolike-lookahead"])
def test_a_thread_that_cannot_start_is_the_error(ds: IndexedDataset, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == name:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    monkeypatch.setattr(reader_module, "_LONGEST_START", 0.0)
    with pytest.raises(RuntimeError, match="can't start"):
        list(stream(ds, batch_size=3))
    assert own_threads() == []


@pytest.mark.usefixtures("four_torch_threads")
def test_streams_that_start_at_once_leave_the_threads_of_torch_as_they_were(ds: IndexedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    halved, other_started = threading.Event(), threading.Event()
    set_num_threads, found = torch.set_num_threads, []

    def set_and_let_the_other_start(number: int) -> None:
        set_num_threads(number)
        if threading.current_thread().name == "cryolike-reader" and not halved.is_set():
            halved.set()
            other_started.wait(0.5)  # which it must not be before this one has

    def start_second() -> None:
        assert halved.wait(10)
        next(iter(stream(ds, batch_size=30)))
        found.append(torch.get_num_threads())
        other_started.set()

    monkeypatch.setattr(torch, "set_num_threads", set_and_let_the_other_start)
    second = threading.Thread(target=start_second)
    second.start()
    next(iter(stream(ds, batch_size=30)))
    second.join()
    assert (found, torch.get_num_threads(), torch_threads_of_a_new_thread()) == ([4], 4, 4)


@pytest.mark.usefixtures("four_torch_threads")
@pytest.mark.parametrize("interrupted", [False, True])
def test_a_reader_changes_the_threads_of_torch_before_they_are_set_back(
    ds: IndexedDataset, monkeypatch: pytest.MonkeyPatch, interrupted: bool
) -> None:
    set_num_threads, start, set_back = torch.set_num_threads, threading.Thread.start, threading.Event()

    def set_late(number: int) -> None:
        if threading.current_thread().name == "cryolike-reader":
            set_back.wait(0.2)  # which it must not be yet
        set_num_threads(number)
        if threading.current_thread() is threading.main_thread():
            set_back.set()

    def start_and_interrupt(thread: threading.Thread) -> None:
        start(thread)
        if interrupted and thread.name == "cryolike-reader":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(torch, "set_num_threads", set_late)
        patch.setattr(threading.Thread, "start", start_and_interrupt)
        list(stream(ds, batch_size=30))
    wait_until(lambda: own_threads() == [])
    assert torch_threads_of_a_new_thread() == 4


def test_a_stream_is_read_where_torch_has_a_single_thread(ds: IndexedDataset) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert rows_of(list(stream(ds, batch_size=7))) == list(range(N))
    finally:
        torch.set_num_threads(before)


EXIT = """
    import sys, threading, numpy as np
    from cryolike_data import IndexedDataset
    from cryolike_data.stream import stream
    dataset = IndexedDataset(sys.argv[1])
    many = dataset.select(np.tile(np.arange(len(dataset)), 100))
    batches = iter(stream(many, batch_size=len(dataset), prefetch=60))
    next(batches)
"""


def test_a_program_may_end_while_the_reader_is_at_work(tmp_path: Path) -> None:
    table, _ = write_particles(tmp_path, 64, box=128, stacks=2)
    run = run_python(EXIT, table)
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.usefixtures("busy")
def test_the_state_counts_only_what_was_handed_out(ds: IndexedDataset) -> None:
    loader = stream(ds, batch_size=3, shuffle=True, prefetch=5)
    assert loader.state_dict() == {"seed": 0, "epoch": 0, "position": 0}
    for k, _ in enumerate(loader):
        wait_until(lambda k=k: len(loader._reader._filled) == read_ahead(k, 5) or loader._reader._finished)
        assert loader.state_dict() == {"seed": 0, "epoch": 0, "position": 3 * (k + 1)}


@pytest.mark.parametrize("stop", [1, 7, 19, 20])
@pytest.mark.parametrize("other_batch", [3, 8])
def test_a_stream_resumed_from_a_state_gives_the_rest(ds: IndexedDataset, stop: int, other_batch: int) -> None:
    loader = stream(ds, batch_size=3, shuffle=True, seed=8)
    seen: list[int] = []
    for k, batch in enumerate(loader):
        seen.extend(batch.index.tolist())
        if k == stop - 1:
            break
    resumed = stream(ds, batch_size=other_batch, shuffle=True)
    resumed.load_state_dict(loader.state_dict())
    seen += rows_of(list(resumed))
    assert seen == loader.sampler.rows(np.arange(N), 0).tolist()
    assert rows_of(list(resumed)) == loader.sampler.rows(np.arange(N), 1).tolist()


def test_a_state_that_was_taken_stays_as_it_was(ds: IndexedDataset) -> None:
    batches = stream(ds, batch_size=7)
    states = [batches.state_dict() for _ in batches]
    assert [state["position"] for state in states] == [*range(7, len(ds), 7), len(ds)]


def test_after_a_resumed_iteration_that_was_broken_off_the_epoch_starts_from_its_beginning(ds: IndexedDataset) -> None:
    batches = stream(ds, batch_size=7)
    batches.load_state_dict({"seed": 0, "epoch": 0, "position": 14})
    for _ in batches:
        break
    assert sum(len(batch) for batch in batches) == len(ds)


def test_the_state_after_an_epoch_is_the_start_of_the_next(ds: IndexedDataset) -> None:
    # A checkpoint written after the loop over the epoch must not make the resumed job begin with an empty one.
    loader = stream(ds, batch_size=3, shuffle=True)
    list(loader)
    resumed = stream(ds, batch_size=3, shuffle=True)
    resumed.load_state_dict(loader.state_dict())
    assert rows_of(list(resumed)) == loader.sampler.rows(np.arange(N), 1).tolist()


@pytest.mark.parametrize("before", ["a whole epoch", "some batches"])
def test_what_a_sampler_did_in_another_loop_is_known_to_the_stream_and_its_state(ds: IndexedDataset, before: str) -> None:
    sampler = ParticleSampler(ds, 7, seed=3)
    for _ in itertools.islice(sampler, len(sampler) if before == "a whole epoch" else 2):
        pass
    epoch = 1 if before == "a whole epoch" else 0
    loader = stream(ds, sampler=sampler)
    assert loader.state_dict() == {"seed": 3, "epoch": epoch, "position": 0}
    seen, state = [], {}
    for k, batch in enumerate(loader):
        seen.extend(batch.index.tolist())
        if k == 1:
            state = loader.state_dict()
    assert seen == sampler.rows(np.arange(N), epoch).tolist()
    resumed = stream(ds, batch_size=7, shuffle=True)
    resumed.load_state_dict(state)
    assert rows_of(list(resumed)) == seen[14:]
    assert rows_of(list(loader)) == sampler.rows(np.arange(N), epoch + 1).tolist()


def test_the_state_before_the_first_batch_is_that_of_the_epoch_that_was_asked_for(ds: IndexedDataset) -> None:
    loader = stream(ds, batch_size=7)
    loader.sampler.set_epoch(7)
    assert loader.state_dict() == {"seed": 0, "epoch": 7, "position": 0}


def test_batches_that_share_a_buffer_are_nothing_to_each_other_for_autograd(ds: IndexedDataset) -> None:
    gain = torch.nn.Parameter(torch.ones(()))
    loss = torch.zeros(())
    for batch in stream(ds, batch_size=7):
        batch.images.add_(1)
        loss = loss + (batch.images * gain).mean()
    loss.backward()
    first, *others = stream(ds, batch_size=7)
    first.images.mul_(gain)
    assert not any(batch.images.requires_grad for batch in others)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("options", [{}, {"dtype": torch.float32}], ids=str)
def test_the_mode_in_which_one_batch_is_taken_is_not_that_of_the_others(
    ds: IndexedDataset, mode: Callable[[], Any], options: dict[str, Any]
) -> None:
    batches = iter(stream(ds, batch_size=7, **options))
    with mode():
        next(batches)
    for batch in batches:  # also those in the buffer of the first
        gain = torch.nn.Parameter(torch.ones(()))
        batch.images.mul_(gain).sum().backward()
        assert gain.grad is not None


def test_epochs_follow_each_other_as_the_sampler_says(ds: IndexedDataset) -> None:
    loader = stream(ds, batch_size=7, shuffle=True)
    for epoch in range(3):
        assert rows_of(list(loader)) == loader.sampler.rows(np.arange(N), epoch).tolist()


@pytest.mark.usefixtures("busy")
@pytest.mark.parametrize("batches_read_ahead", [1, 100])
def test_an_epoch_that_was_broken_off_is_drawn_again_however_far_the_reader_was(ds: IndexedDataset, batches_read_ahead: int) -> None:
    loader = stream(ds, batch_size=7, shuffle=True, prefetch=batches_read_ahead)
    for _ in loader:
        wait_until(lambda: len(loader._reader._filled) == batches_read_ahead or loader._reader._finished)
        break
    assert rows_of(list(loader)) == loader.sampler.rows(np.arange(N), 0).tolist()
    assert rows_of(list(loader)) == loader.sampler.rows(np.arange(N), 1).tolist()


def test_closing_inside_the_loop_does_not_count_as_the_end_of_the_epoch(ds: IndexedDataset) -> None:
    loader = stream(ds, batch_size=7, shuffle=True)
    assert close_in_its_loop(loader) < 9
    assert loader.sampler.epoch == 0


def test_an_iterator_that_another_took_the_place_of_is_an_error_and_does_not_move_the_epoch(ds: IndexedDataset) -> None:
    loader = stream(ds, batch_size=7, shuffle=True)
    first = iter(loader)
    next(first)
    second = iter(loader)
    seen = next(second).index.tolist()
    with pytest.raises(IterationError, match="a stream for each"):
        next(first)
    seen += rows_of(list(second))
    assert seen == loader.sampler.rows(np.arange(N), 0).tolist()
    assert loader.sampler.epoch == 1


def test_a_loop_inside_a_loop_over_the_same_stream_is_an_error_of_the_outer_one(ds: IndexedDataset) -> None:
    loader = stream(ds, batch_size=7)
    inner: list[int] = []

    def loop() -> None:
        for _ in loader:
            inner.extend(rows_of(list(loader)))

    with pytest.raises(IterationError):
        loop()
    assert inner == list(range(N))
    with pytest.raises(IterationError):
        list(zip(loader, loader, strict=True))


@pytest.mark.usefixtures("busy")
@pytest.mark.parametrize("batches_read_ahead", [1, 100])
def test_an_iterator_that_is_kept_moves_no_epoch_however_far_its_reader_was(ds: IndexedDataset, batches_read_ahead: int) -> None:
    loader = stream(ds, batch_size=7, shuffle=True, prefetch=batches_read_ahead)
    kept = iter(loader)
    next(kept)
    wait_until(lambda: len(loader._reader._filled) == batches_read_ahead or loader._reader._finished)
    for epoch in range(3):
        assert loader.state_dict()["epoch"] == epoch
        assert rows_of(list(loader)) == loader.sampler.rows(np.arange(N), epoch).tolist()
        if epoch == 1:
            kept.close()
    assert loader.state_dict() == {"seed": 0, "epoch": 3, "position": 0}


def test_a_loop_that_asks_for_no_more_than_the_last_batch_is_followed_by_the_next_epoch(ds: IndexedDataset) -> None:
    loader = stream(ds, batch_size=7, shuffle=True)
    for epoch in range(3):
        seen = rows_of(list(itertools.islice(loader, len(loader))))
        assert seen == loader.sampler.rows(np.arange(N), epoch).tolist()


def test_a_state_that_is_loaded_in_the_loop_is_for_the_next_loop(ds: IndexedDataset) -> None:
    loader = stream(ds, batch_size=7, shuffle=True)
    state = {"seed": 3, "epoch": 5, "position": 14}
    seen: list[int] = []
    for k, batch in enumerate(loader):
        seen.extend(batch.index.tolist())
        if k == 2:
            loader.load_state_dict(state)
    other = ParticleSampler(ds, 7)
    assert seen == other.rows(np.arange(N), 0).tolist()
    assert loader.state_dict() == state
    other.load_state_dict(state)
    assert rows_of(list(loader)) == [row for rows in other for row in rows]


def test_the_length_after_a_state_was_loaded_is_that_of_the_rest(ds: IndexedDataset) -> None:
    loader = stream(ds, batch_size=7)
    loader.load_state_dict({"seed": 0, "epoch": 2, "position": 35})
    loader.sampler.set_epoch(2)  # as a trainer does before each epoch
    assert len(loader) == 4
    assert len(list(loader)) == 4
    assert len(loader) == 9


@pytest.mark.parametrize("state", [{}, {"seed": 5}, {"seed": 5, "position": 3}, {"seed": 5, "epoch": 3, "position": N + 1}], ids=str)
def test_a_state_that_cannot_be_meant_is_an_error_and_changes_nothing(ds: IndexedDataset, state: dict[str, int]) -> None:
    loader = stream(ds, batch_size=7, shuffle=True)
    list(loader)
    with pytest.raises(ArgumentError):
        loader.load_state_dict(state)
    assert loader.state_dict() == {"seed": 0, "epoch": 1, "position": 0}
    assert rows_of(list(loader)) == loader.sampler.rows(np.arange(N), 1).tolist()


def test_a_stream_is_closed_by_another_thread_while_the_next_batches_are_drawn(ds: IndexedDataset) -> None:
    drawing, go_on = threading.Event(), threading.Event()

    class Waiting(ParticleSampler):
        def rows(self, positions: np.ndarray, epoch: int) -> np.ndarray:
            drawing.set()
            assert go_on.wait(10)
            return super().rows(positions, epoch)

    loader = stream(ds, sampler=Waiting(ds, 7))
    seen: list[ParticleBatch] = []
    errors: list[BaseException] = []

    def close() -> None:
        try:
            loader.close()
            assert own_threads() == []
        except BaseException as error:
            errors.append(error)

    consumer, closer = threading.Thread(target=lambda: seen.extend(loader)), threading.Thread(target=close)
    consumer.start()
    assert drawing.wait(10)
    closer.start()
    wait_until(lambda: "cryolike-reader" not in own_threads())
    go_on.set()
    consumer.join()
    closer.join()
    assert errors == []
    assert len(seen) <= 4  # which were being read


@pytest.mark.usefixtures("busy")
@pytest.mark.parametrize("line", range(12))
def test_a_loop_ends_wherever_another_thread_closes_the_stream(ds: IndexedDataset, line: int) -> None:
    loader = stream(ds, batch_size=7, prefetch=2)
    closed = threading.Event()

    def close() -> None:
        # Not while the consumer reads, which is waited for.
        if reader._reading.acquire(blocking=False):
            reader._reading.release()
            loader.close()
            closed.set()

    batches = iter(loader)
    next(batches)
    reader = loader._reader
    wait_until(lambda: len(reader._filled) == 2)
    with another_thread_at(line, Reader._next, close):
        rows = rows_of(list(batches))
    assert rows == list(range(7, 7 + len(rows)))
    assert closed.is_set() == (len(rows) < len(ds) - 7)


@pytest.mark.parametrize("line", range(4))
def test_a_loop_ends_in_peace_wherever_another_thread_closes_the_stream_meanwhile(ds: IndexedDataset, line: int) -> None:
    loader = stream(ds, batch_size=7)
    batches = iter(loader)
    for _ in range(len(loader)):
        next(batches)
    with another_thread_at(line, BufferRing._take_back, loader.close):
        assert list(batches) == []


@pytest.mark.parametrize("line", range(4))
def test_two_threads_may_close_a_stream_at_once(ds: IndexedDataset, line: int) -> None:
    loader = stream(ds, batch_size=7)
    batches = iter(loader)
    next(batches)
    with another_thread_at(line, ParticleStream.close, loader.close):
        loader.close()
    assert own_threads() == []
    assert list(batches) == []


# Python 3.12 and newer warn of any fork beside threads.
FORK = """
    import os, signal, sys, threading, warnings
    from cryolike_data import IndexedDataset
    from cryolike_data.stream import stream
    waiting, go_on, reading = threading.Event(), threading.Event(), IndexedDataset.reading

    def wait(self, *of):
        if threading.current_thread().name == "cryolike-reader":
            waiting.set()
            go_on.wait(10)
        return reading(self, *of)

    IndexedDataset.reading = wait
    loader = stream(IndexedDataset(sys.argv[1]), batch_size=7, prefetch=3)
    batches = iter(loader)
    next(batches)
    assert waiting.wait(10)
    warnings.filterwarnings("ignore", ".*multi-threaded, use of fork", DeprecationWarning)
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        go_on.set()
        os._exit(0 if len(list(loader)) == 9 else 1)
    status = os.waitpid(child, 0)[1]
    go_on.set()
    batches.close()
    assert status == 0, status
"""


def test_a_fork_streams_again_although_the_reader_was_at_work(folder: Path) -> None:
    run = run_python(FORK, folder / "J1/particles.cs")
    assert (run.returncode, run.stderr) == (0, "")


STARTING_WHILE_FORKED = """
import os, signal, sys, threading, time, warnings
from cryolike_data import IndexedDataset, reader, stream

dataset = IndexedDataset(sys.argv[1])
starting = threading.Event()

def start():
    with reader._STARTING:
        starting.set()
        time.sleep(0.2)

thread = threading.Thread(target=start)
thread.start()
starting.wait()
warnings.filterwarnings("ignore", ".*multi-threaded, use of fork", DeprecationWarning)
child = os.fork()
if child == 0:
    signal.alarm(20)  # where it waits for a lock that nobody holds any more
    print(sum(map(len, stream(dataset, batch_size=8))), flush=True)
    os._exit(0)
thread.join()
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_process_that_is_forked_while_a_reader_starts_can_stream(folder: Path) -> None:
    run = run_python(STARTING_WHILE_FORKED, folder / "J1/particles.cs")
    assert (run.returncode, run.stdout, run.stderr) == (0, f"{N}\n", "")


def test_set_epoch_of_the_sampler_chooses_the_epoch(ds: IndexedDataset) -> None:
    loader = stream(ds, batch_size=7, shuffle=True)
    loader.sampler.set_epoch(6)
    assert rows_of(list(loader)) == loader.sampler.rows(np.arange(N), 6).tolist()


@pytest.mark.parametrize("when", [1, -1])
def test_an_epoch_or_state_that_is_asked_of_the_sampler_in_the_loop_is_for_the_next_loop(ds: IndexedDataset, when: int) -> None:
    loader = stream(ds, batch_size=7, shuffle=True)
    state = {"seed": 0, "epoch": 6, "position": 21}
    for ask, first in ((lambda sampler: sampler.set_epoch(6), 0), (lambda sampler: sampler.load_state_dict(state), 21)):
        chosen = range(len(loader))[when]
        for k, _ in enumerate(loader):
            if k == chosen:
                ask(loader.sampler)
        assert loader.state_dict() == {"seed": 0, "epoch": 6, "position": first}
        assert rows_of(list(loader)) == loader.sampler.rows(np.arange(first, N), 6).tolist()
        assert loader.sampler.epoch == 7


def test_two_streams_over_one_data_set_do_not_disturb_each_other(ds: IndexedDataset) -> None:
    one, other = stream(ds, batch_size=5, shuffle=True, seed=1), stream(ds, batch_size=5, shuffle=True, seed=2)
    for left, right in zip(one, other, strict=True):
        same_batch(left, ds.batch(left.index))
        same_batch(right, ds.batch(right.index))


def test_two_consumers_in_threads_of_their_own_stream_one_data_set(ds: IndexedDataset) -> None:
    errors: list[BaseException] = []

    def consume(seed: int) -> None:
        try:
            loader = stream(ds, batch_size=5, shuffle=True, seed=seed)
            for epoch in range(5):
                batches = list(loader)
                assert rows_of(batches) == loader.sampler.rows(np.arange(N), epoch).tolist()
                for batch in batches:
                    assert torch.equal(batch.images, ds.read(batch.index))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=consume, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


@pytest.mark.parametrize("copied", [shallow_copy, deepcopy, lambda loader: pickle.loads(pickle.dumps(loader))])
def test_a_copy_of_a_stream_at_work_streams_by_itself(ds: IndexedDataset, copied: Callable[[ParticleStream], ParticleStream]) -> None:
    loader = stream(ds, batch_size=7, shuffle=True)
    seen: list[int] = []
    for batch in loader:
        seen.extend(batch.index.tolist())
        if len(seen) == 14:
            another = copied(loader)
            assert rows_of(list(another)) == loader.sampler.rows(np.arange(N), 0).tolist()
    assert seen == loader.sampler.rows(np.arange(N), 0).tolist()
    assert rows_of(list(copied(loader))) == loader.sampler.rows(np.arange(N), 1).tolist()


def test_a_selection_streams(ds: IndexedDataset) -> None:
    chosen = ds.select(np.arange(N - 1, 0, -3))
    for batch, reference in zip(stream(chosen, batch_size=6), expected(chosen, ParticleSampler(chosen, 6, shuffle=False)), strict=True):
        same_batch(batch, reference)


def test_a_zarr_store_streams(ds: IndexedDataset, tmp_path: Path) -> None:
    export_zarr(ds, tmp_path / "store.zarr")
    store = ZarrDataset(tmp_path / "store.zarr")
    for batch in stream(store, batch_size=7, shuffle=True):
        assert torch.equal(batch.images, ds.read(batch.index))


def test_the_threads_of_torch_stay_as_they_were(ds: IndexedDataset) -> None:
    before = torch.get_num_threads(), torch_threads_of_a_new_thread()
    for _ in stream(ds, batch_size=7):
        assert (torch.get_num_threads(), torch_threads_of_a_new_thread()) == before
    assert (torch.get_num_threads(), torch_threads_of_a_new_thread()) == before


@pytest.mark.usefixtures("busy")
def test_a_reader_closed_by_the_garbage_collector_in_its_own_thread_ends_in_peace(
    ds: IndexedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Garbage collection may run in any thread, and closes generators that are part of a cycle there.
    errors: list[BaseException] = []
    reading = IndexedDataset.reading

    def close_while_reading(self: IndexedDataset, *of: Any) -> Callable[[], object]:
        if threading.current_thread().name == "cryolike-reader":
            try:
                loader._reader.close()
            except BaseException as error:
                errors.append(error)
        return reading(self, *of)

    monkeypatch.setattr(IndexedDataset, "reading", close_while_reading)
    loader = stream(ds, batch_size=2)
    batches = iter(loader)
    next(batches)
    wait_until(lambda: errors != [] or "cryolike-reader" not in own_threads())
    batches.close()
    assert errors == []


def test_the_cpu_as_device_gives_the_same(ds: IndexedDataset) -> None:
    for batch in stream(ds, batch_size=7, device="cpu"):
        same_batch(batch, ds.batch(batch.index))


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"downsample": Downsample(box=8), "normalize": "std"}], ids=["raw", "transformed"])
def test_cuda_batches_are_those_of_the_cpu(ds: IndexedDataset, options: dict[str, Any]) -> None:
    cpu, cuda = stream(ds, batch_size=7, shuffle=True, **options), stream(ds, batch_size=7, shuffle=True, device="cuda", **options)
    for left, right in zip(cpu, cuda, strict=True):
        assert right.images.device.type == "cuda"
        assert torch.equal(left.index, right.index.cpu())
        torch.testing.assert_close(left.images, right.images.cpu())
        assert torch.equal(left.uid, right.uid.cpu())


@pytest.mark.gpu
def test_cuda_batches_stay_as_they_are_while_the_loop_goes_on(ds: IndexedDataset) -> None:
    for _ in range(5):
        held = list(stream(ds, batch_size=3, shuffle=True, device="cuda", prefetch=2))
        for batch in held:
            assert torch.equal(batch.images.cpu(), ds.read(batch.index.cpu()))


@pytest.mark.gpu
def test_cuda_streams_fill_page_locked_buffers(ds: IndexedDataset) -> None:
    loader = stream(ds, batch_size=3, device="cuda")
    batches = iter(loader)
    next(batches)
    assert loader._reader._ring.lend(1)[0].is_pinned()
    batches.close()


@pytest.mark.gpu
def test_the_state_of_a_cuda_stream_counts_only_what_was_handed_out(ds: IndexedDataset) -> None:
    loader = stream(ds, batch_size=3, device="cuda")
    for k, _ in enumerate(loader):
        assert loader.state_dict()["position"] == 3 * (k + 1)


@pytest.mark.gpu
def test_a_finished_cuda_stream_holds_no_host_buffers(ds: IndexedDataset, allocated: list[tuple[int, ...]]) -> None:
    loader = stream(ds, batch_size=3, device="cuda")
    list(loader)
    torch.cuda.synchronize()
    assert len(loader._copying) == 0
    assert len(allocated) > 0


@pytest.mark.gpu
def test_an_early_stop_on_cuda_leaves_no_thread(ds: IndexedDataset) -> None:
    for _ in range(10):
        break_off(stream(ds, batch_size=3, device="cuda", normalize="std"))
    assert own_threads() == []


def test_a_stream_says_what_it_streams(ds: IndexedDataset) -> None:
    batches = stream(ds, batch_size=5, shuffle=True)
    assert repr(batches.sampler) == f"ParticleSampler({len(ds)} particles shuffled, 5 a batch; next is epoch 0)"
    assert repr(batches) == f"ParticleStream({batches.sampler!r}, 3 batches read ahead)"
    halves = ParticleSampler(ds, 2, shuffle=False, rank=1, world_size=2)
    halves.load_state_dict({"seed": 0, "epoch": 3, "position": 4})
    assert repr(halves) == f"ParticleSampler({len(ds)} particles in order, 2 a batch, rank 1 of 2; next is epoch 3 from position 4)"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_stream_to_a_gpu_that_is_not_there_is_refused(ds: IndexedDataset) -> None:
    with pytest.raises(ArgumentError, match=r"device='cuda' needs a GPU"):
        stream(ds, device="cuda")


def test_a_device_that_torch_does_not_know_is_refused(ds: IndexedDataset) -> None:
    with pytest.raises(ArgumentError, match="device='gpu' is not a device of torch, such as cpu or cuda"):
        stream(ds, device="gpu")
    with pytest.raises(ArgumentError, match=r"device=torch\.float16 is not a device of torch"):
        ds[[0]].to(torch.float16)  # type: ignore[arg-type]


IDLE = """
    import os
    import time
    import torch
    from cryolike_data.reader import end_idle_threads

    def threads():
        return len(os.listdir("/proc/self/task"))

    torch.set_num_threads(6)
    before = threads()
    torch.zeros(1 << 22).add_(1)
    assert threads() >= before + 5
    end_idle_threads()
    torch.zeros(1).add_(1)
    deadline = time.monotonic() + 10  # a thread takes a moment to end
    while threads() > before + 1:
        assert time.monotonic() < deadline
    assert torch.get_num_threads() == 6
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the system lists no threads")
def test_openmp_threads_that_would_be_too_many_end() -> None:
    ran = run_python(IDLE)
    assert ran.returncode == 0, ran.stderr
