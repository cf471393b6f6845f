"""What is done on a GPU, on a device that the CPU stands in for (see ``other_device``): nothing there may lean on the CPU."""

from __future__ import annotations

import gc
import itertools
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from other_device import CAN_STAND_IN, OTHER, Event, Queue, other_device
from support import (
    another_thread_at,
    at_line,
    check_that_an_error_keeps_no_stack_mapped,
    close_in_its_loop,
    own_threads,
    wait_until,
)
from torch import Tensor

import cryolike_data.ring as ring_module
import cryolike_data.transforms.polar as polar_module
from cryolike_data import (
    Collate,
    Downsample,
    IndexedDataset,
    Normalize,
    ParticleBatch,
    ParticleSampler,
    PolarCollate,
    PolarGrid,
    stream,
)
from cryolike_data.columns import Columns, concatenate_tensors
from cryolike_data.ctf import ctf_values, half_plane
from cryolike_data.demo import DemoProject
from cryolike_data.errors import StackError
from cryolike_data.likelihood import Templates, displacement_grid, integrated_log_likelihood, stream_likelihood
from cryolike_data.on_device import UNITS_AHEAD, lanes_of
from cryolike_data.polar_batch import polar_ctf
from cryolike_data.precision import full_precision
from cryolike_data.ring import BufferRing
from cryolike_data.stream import ParticleStream
from cryolike_data.transforms import PolarTransform, normalize_polar, to_polar, to_polar_exact
from cryolike_data.unit_reader import UnitReader

pytestmark = [
    pytest.mark.skipif(not CAN_STAND_IN, reason="this torch lets no Python stand in for a device"),
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="a GPU is there: the tests marked gpu run on it, and these wherever there is none"
    ),
]

GRID = PolarGrid(8.0, 0.25, 64)
DISPLACEMENTS_A = displacement_grid(5, 2.5)

Queues = Callable[[], AbstractContextManager[list[Queue]]]


@pytest.fixture(scope="module")
def particles(demo: DemoProject) -> IndexedDataset:
    return IndexedDataset(demo.indexed)


@pytest.fixture(scope="module")
def templates(demo: DemoProject) -> Templates:
    return Templates.from_volume(demo.volume, GRID, step_deg=45)


def random_images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def same_there(work: Callable[[Tensor], Tensor], tensor: Tensor) -> None:
    """Whether some work gives the same on the other device, and leaves its result there."""
    expected = work(tensor)
    with other_device():
        found = work(tensor.to(OTHER))
        assert found.device == OTHER
        torch.testing.assert_close(found.cpu(), expected, equal_nan=True)


def test_tensors_of_both_devices_do_not_mix() -> None:
    with other_device():
        there = torch.ones(3, device=OTHER)
        with pytest.raises(RuntimeError, match="two devices"):
            there + torch.ones(3)
        assert (there + 1).cpu().tolist() == [2, 2, 2]
        with pytest.raises((RuntimeError, TypeError)):
            there.numpy()


@pytest.mark.parametrize("box", [32, 33])
@pytest.mark.parametrize("smaller", [Downsample(box=16), Downsample(box=17)], ids=repr)
def test_fourier_cropping(box: int, smaller: Downsample) -> None:
    same_there(smaller, random_images(5, box, box))


@pytest.mark.parametrize("method", ["mean", "max"])
def test_pooling(method: Any) -> None:
    same_there(Downsample(factor=3, method=method), random_images(5, 33, 33))


@pytest.mark.parametrize("method", ["max", "std", "background"])
def test_normalisation(method: Any) -> None:
    images = random_images(6, 32, 32)
    images[1] = 3
    images[2] += 1e6
    images[3, 4, 5] = torch.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the constant one
        same_there(Normalize(method), images)


def test_collation_of_stored_pixels(particles: IndexedDataset) -> None:
    collate = Collate(downsample=Downsample(box=16), normalize="std", device=OTHER)
    expected = replace(collate, device=None)(particles.batch(range(9)))
    with other_device():
        found = collate(particles.batch(range(9)))
        assert found.images.device == found.pose.device == found.ctf.defocus_u.device == OTHER
        assert torch.equal(found.images.cpu(), expected.images)
        assert torch.equal(found.ctf.defocus_u.cpu(), expected.ctf.defocus_u)


def test_collation_on_the_cpu_of_a_batch_from_elsewhere_waits_for_its_pixels(
    particles: IndexedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    move = ParticleBatch.to

    def to(batch: ParticleBatch, device: Any, *, non_blocking: bool = False) -> ParticleBatch:
        asked.append(non_blocking)
        return move(batch, device, non_blocking=non_blocking)

    monkeypatch.setattr(ParticleBatch, "to", to)
    with other_device():
        there = particles.batch(range(3)).to(OTHER)
        here = Collate(normalize="std", device="cpu")(there)
        Collate(normalize="std", device=OTHER)(there)
    assert here.images.device.type == "cpu"
    assert asked == [False, False, True]


def test_joining_pixels_of_two_dtypes() -> None:
    signed, unsigned = torch.tensor([-1, 2], dtype=torch.int16), torch.tensor([65535], dtype=torch.uint16)
    with other_device():
        joined = concatenate_tensors([signed.to(OTHER), unsigned.to(OTHER)])
        assert (joined.device, joined.dtype) == (OTHER, torch.int32)
        assert joined.tolist() == [-1, 2, 65535]


@pytest.mark.parametrize("n_inplanes", [64, 63])
def test_the_ctf_on_a_polar_grid(particles: IndexedDataset, n_inplanes: int) -> None:
    batch, grid = particles.batch(range(5)), PolarGrid(8.0, 0.25, n_inplanes)
    expected = polar_ctf(batch.ctf, grid, 128.0, dtype=torch.float32)
    with other_device():
        found = polar_ctf(batch.to(OTHER).ctf, grid, 128.0, dtype=torch.float32)
        torch.testing.assert_close(found.cpu(), expected)


def test_the_ctf_on_a_half_plane_in_single_precision(particles: IndexedDataset) -> None:
    batch = particles.batch(range(5))
    frequency, angle = (part.float() for part in half_plane(32, 4.0))
    expected = ctf_values(batch.ctf, frequency, angle)
    with other_device():
        found = ctf_values(batch.to(OTHER).ctf, frequency.to(OTHER), angle)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.cpu().double(), expected, rtol=0, atol=1e-3)


def test_polar_transforms_by_summation_and_their_normalisation() -> None:
    same_there(lambda images: to_polar_exact(images, GRID), random_images(3, 32, 32))
    same_there(lambda fourier: normalize_polar(fourier, GRID), to_polar_exact(random_images(3, 32, 32), GRID))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("memory_bytes", [1, 1 << 22])
def test_the_likelihood(particles: IndexedDataset, templates: Templates, dtype: torch.dtype, memory_bytes: int) -> None:
    batch = PolarCollate(GRID, normalize="max", unit_power=True, dtype=dtype)(particles.batch(range(6)))
    chosen = templates.to(dtype=dtype.to_complex())
    expected = integrated_log_likelihood(batch, chosen, DISPLACEMENTS_A, by_template=True, memory_bytes=memory_bytes)
    with other_device():
        there = batch.to(OTHER), chosen.to(OTHER)
        found = integrated_log_likelihood(*there, DISPLACEMENTS_A, by_template=True, memory_bytes=memory_bytes)
    torch.testing.assert_close(found.log_likelihood, expected.log_likelihood)
    torch.testing.assert_close(found.by_template, expected.by_template)
    assert torch.equal(found.template, expected.template)


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="this torch has one way to ask for TF32")
@pytest.mark.parametrize("asked", ["newer way", "older way", "for all of torch"])
def test_the_likelihood_takes_no_shortcuts_however_they_were_asked_for(
    particles: IndexedDataset, templates: Templates, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    products: Any = torch.backends.cuda.matmul
    of_newer, of_older = products.fp32_precision, torch.get_float32_matmul_precision()
    seen: set[str] = set()
    multiply = torch.bmm

    def bmm(*tensors: Tensor, **options: Any) -> Tensor:
        seen.add(products.fp32_precision)
        return multiply(*tensors, **options)

    batch = PolarCollate(GRID, normalize="max", unit_power=True)(particles.batch(range(3)))
    try:
        if asked == "newer way":
            products.fp32_precision = "tf32"
        elif asked == "for all of torch":
            products.fp32_precision, torch.backends.fp32_precision = "none", "tf32"
        else:
            torch.set_float32_matmul_precision("high")
        monkeypatch.setattr(torch, "bmm", bmm)
        with other_device():
            integrated_log_likelihood(batch.to(OTHER), templates.to(OTHER), DISPLACEMENTS_A)
        if asked == "for all of torch":  # it goes on following that
            torch.backends.fp32_precision = "ieee"
        assert products.fp32_precision == ("tf32" if asked != "for all of torch" else "ieee")
        if asked == "older way":
            assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.backends.fp32_precision = "none"
        products.fp32_precision = of_newer
        torch.set_float32_matmul_precision(of_older)
    assert seen == {"ieee"}


# Streams: in place of those of CUDA there is a queue, whose copies are done as late as can be


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="this torch has one way to ask for TF32")
def test_one_thread_takes_no_shortcuts_after_another_is_done() -> None:
    products: Any = torch.backends.cuda.matmul
    before, found = products.fp32_precision, []
    first_in, second_in, first_out = (threading.Event() for _ in range(3))

    def first() -> None:
        with full_precision(torch.device("cpu")):
            first_in.set()
            assert second_in.wait(10)
        first_out.set()

    def second() -> None:
        assert first_in.wait(10)
        with full_precision(torch.device("cpu")):
            second_in.set()
            assert first_out.wait(10)
            found.append(products.fp32_precision)

    threads = [threading.Thread(target=work) for work in (first, second)]
    products.fp32_precision = "tf32"
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (found, products.fp32_precision) == (["ieee"], "tf32")
    finally:
        products.fp32_precision = before


@pytest.fixture
def queues(monkeypatch: pytest.MonkeyPatch) -> Queues:
    """``stream`` takes the other device for CUDA while it exists; finufft stands in for cufinufft."""
    make, plan = ring_module._aligned, polar_module.make_plan

    def plan_there(*arguments: Any) -> Callable[..., object]:
        execute = plan(*arguments)
        return lambda *tensors: execute(*(getattr(tensor, "numbers", tensor) for tensor in tensors))

    @contextmanager
    def existing() -> Iterator[list[Queue]]:
        consumer = Queue()
        sides: list[Queue] = []
        with other_device() as device, monkeypatch.context() as patch:

            def pinned(shape: tuple[int, ...], dtype: torch.dtype, *, pinned: bool) -> np.ndarray:
                device.pinned.append(make(shape, dtype, pinned=False))
                return device.pinned[-1]

            def side(of: torch.device) -> Queue:
                sides.append(Queue())
                return sides[-1]

            @contextmanager
            def enter(queue: Queue) -> Iterator[None]:
                device.queue, before = queue, device.queue
                try:
                    yield
                finally:
                    device.queue = before

            patch.setattr(ParticleStream, "_cuda", property(lambda self: self.device == OTHER))
            patch.setattr(ring_module, "_aligned", pinned)
            patch.setattr(polar_module, "make_plan", plan_there)
            patch.setattr(torch.cuda, "Stream", side)
            patch.setattr(torch.cuda, "Event", lambda **options: None)
            lanes_of.cache_clear()
            patch.setattr(torch.cuda, "stream", enter)
            patch.setattr(torch.cuda, "current_stream", lambda of: device.queue or consumer)
            yield sides
            lanes_of.cache_clear()

    return existing


OPTIONS: list[dict[str, Any]] = [
    {},
    {"downsample": Downsample(box=16), "normalize": "std"},
    {"polar": GRID, "normalize": "max", "unit_power": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["raw", "transformed", "polar"])
@pytest.mark.parametrize("prefetch", [1, 3])
def test_streamed_batches_are_those_of_the_cpu_and_stay(
    particles: IndexedDataset, queues: Queues, options: dict[str, Any], prefetch: int
) -> None:
    expected = list(stream(particles, batch_size=7, shuffle=True, **options))
    with queues():
        held = list(stream(particles, batch_size=7, shuffle=True, device=OTHER, prefetch=prefetch, **options))
        assert len(held) == len(expected)
        for ours, theirs in zip(held, expected, strict=True):
            assert ours.device == OTHER
            assert torch.equal(ours.images.cpu(), theirs.images)
            assert torch.equal(ours.index.cpu(), theirs.index)
            if "polar" in options:
                torch.testing.assert_close(ours.fourier.cpu(), theirs.fourier, rtol=0, atol=1e-4 * float(theirs.fourier.abs().max()))
                torch.testing.assert_close(ours.polar_ctf.cpu(), theirs.polar_ctf)


@pytest.mark.parametrize("options", OPTIONS, ids=["raw", "transformed", "polar"])
def test_the_consumer_waits_for_all_that_is_done_to_its_batch(particles: IndexedDataset, queues: Queues, options: dict[str, Any]) -> None:
    with queues() as sides:
        batches = iter(stream(particles, batch_size=len(particles), device=OTHER, **options))
        next(batches)
        assert not any(queue.waiting for queue in sides)
        batches.close()


def test_batches_too_large_for_a_unit_are_units_by_themselves(
    particles: IndexedDataset, queues: Queues, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cryolike_data.unit_reader._UNIT_BYTES", 7 * particles.image_bytes - 1)
    with queues():
        found = torch.cat([batch.images.cpu() for batch in stream(particles, batch_size=7, device=OTHER)])
    assert torch.equal(found, particles.read(slice(None)))


def test_a_buffer_is_not_filled_again_before_its_copy_is_done(particles: IndexedDataset, queues: Queues) -> None:
    with queues():
        loader = stream(particles, batch_size=5, device=OTHER, prefetch=2)
        for k, batch in enumerate(loader):  # nothing holds on to a batch, so buffers are used again as soon as they may be
            assert torch.equal(batch.images.cpu(), particles.read(range(5 * k, 5 * k + len(batch))))


def test_a_unit_is_copied_and_transformed_before_the_consumer_asks_for_it(
    particles: IndexedDataset, queues: Queues, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformed: list[Tensor] = []
    process = Collate.process_images

    def process_images(collate: Collate, images: Tensor) -> Tensor:
        transformed.append(process(collate, images))
        return transformed[-1]

    monkeypatch.setattr(Collate, "process_images", process_images)
    monkeypatch.setattr("cryolike_data.unit_reader._UNIT_BYTES", 0)
    with queues():
        loader = stream(particles, batch_size=5, device=OTHER, normalize="std")
        batches = iter(loader)
        next(batches)
        wait_until(lambda: loader._reader._copied.qsize() >= 2)
        next(batches)
        assert len(transformed) == 2 + UNITS_AHEAD
        batches.close()


@pytest.mark.parametrize(("batches_a_unit", "prefetch", "units"), [(1, 1, 3), (1, 5, 5), (2, 7, 4), (9, 1, 3)])
def test_while_the_consumer_has_a_batch_those_after_it_are_read_in_as_many_units_as_may_be(
    particles: IndexedDataset, queues: Queues, monkeypatch: pytest.MonkeyPatch, batches_a_unit: int, prefetch: int, units: int
) -> None:
    monkeypatch.setattr("cryolike_data.unit_reader._UNIT_BYTES", batches_a_unit * 3 * particles.image_bytes)
    with queues():
        loader = stream(particles, batch_size=3, device=OTHER, prefetch=prefetch)
        for _ in loader:
            assert loader._reader._under_way == units
            break


def test_images_that_were_copied_are_let_go_of_in_the_loop(
    particles: IndexedDataset, queues: Queues, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cryolike_data.unit_reader._UNIT_BYTES", 0)
    with queues():
        loader = stream(particles, batch_size=5, device=OTHER)
        assert max(len(loader._copying) for _ in loader) <= UNITS_AHEAD + 2
        assert len(loader) > UNITS_AHEAD + 4


@pytest.mark.parametrize("options", OPTIONS[:2], ids=["raw", "transformed"])
def test_a_stream_that_is_left_early_waits_for_its_copies(particles: IndexedDataset, queues: Queues, options: dict[str, Any]) -> None:
    with queues() as sides:
        loader = stream(particles, batch_size=5, device=OTHER, **options)
        batches = iter(loader)
        batch = next(batches)
        batches.close()
        assert not any(queue.waiting for queue in sides)
        assert len(loader._copying) == 0
        assert loader.state_dict()["position"] == 5
        expected = next(iter(stream(particles, batch_size=5, **options)))
        assert torch.equal(batch.images.cpu(), expected.images)


def test_an_iteration_that_begins_while_another_waits_for_its_copies_keeps_its_own(
    particles: IndexedDataset, queues: Queues, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As in another thread, or where an iteration that was abandoned is collected while the next one is under way.
    begun: list[Iterator[ParticleBatch]] = []
    synchronize = Event.synchronize

    def begin_another(event: Event) -> None:
        synchronize(event)
        if not begun:
            begun.append(iter(loader))
            next(begun[0])

    with queues():
        loader = stream(particles, batch_size=20, device=OTHER)
        first = iter(loader)
        next(first)
        monkeypatch.setattr(Event, "synchronize", begin_another)
        first.close()
        (second,) = begun
        assert len(loader._copying) > 0
        for k, batch in enumerate(second, 1):
            assert torch.equal(batch.images.cpu(), particles.read(range(20 * k, 20 * k + len(batch))))


def test_a_stream_that_is_left_early_has_its_buffers_back(
    particles: IndexedDataset, queues: Queues, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cryolike_data.unit_reader._UNIT_BYTES", 0)
    with queues():
        loader = stream(particles, batch_size=5, device=OTHER)
        for _ in loader:
            wait_until(lambda: loader._reader._copied.qsize() >= 2)
            break
        loader._ring.rest()
        assert not loader._ring._lent


@pytest.mark.parametrize("unit_bytes", [32 << 20, 0], ids=["second unit of several batches", "one of many units"])
def test_batches_before_one_that_cannot_be_read_reach_the_consumer_and_none_after_it(
    particles: IndexedDataset, queues: Queues, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, unit_bytes: int
) -> None:
    # As when a stack is cut off.
    monkeypatch.setattr("cryolike_data.unit_reader._UNIT_BYTES", unit_bytes)
    prepare = IndexedDataset.reading
    bad = 33

    def reading(dataset: IndexedDataset, rows: np.ndarray, *to: Any) -> Callable[[], object]:
        if bad in rows:
            raise StackError("gone")
        return prepare(dataset, rows, *to)

    monkeypatch.setattr(IndexedDataset, "reading", reading)
    seen: list[int] = []
    with queues(), pytest.raises(StackError, match="gone"):
        seen.extend(row for batch in stream(particles, batch_size=5, device=OTHER) for row in batch.index.tolist())
    assert seen == list(range(30))
    assert caplog.text.count("read one by one") == caplog.text.count("read one by one: gone") == (unit_bytes > 0)
    assert own_threads() == []


def test_what_fails_while_it_is_copied_is_read_batch_by_batch(
    particles: IndexedDataset, queues: Queues, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    prepare = IndexedDataset.reading

    def reading(dataset: IndexedDataset, rows: np.ndarray, *to: Any) -> Callable[[], object]:
        def fail() -> None:
            raise StackError("for a moment")

        return fail if len(rows) > 7 else prepare(dataset, rows, *to)

    expected = list(stream(particles, batch_size=7))
    monkeypatch.setattr(IndexedDataset, "reading", reading)
    with queues():
        found = [batch.images.cpu() for batch in stream(particles, batch_size=7, device=OTHER)]
    assert all(map(torch.equal, found, [batch.images for batch in expected]))
    assert "read one by one: for a moment" in caplog.text


def test_an_error_that_was_dealt_with_keeps_no_stack_mapped(tmp_path: Path, particles: IndexedDataset, queues: Queues) -> None:
    with queues():
        list(stream(particles, device=OTHER))  # what torch imports when it is first needed keeps who called it
        check_that_an_error_keeps_no_stack_mapped(tmp_path, device=OTHER)


def test_what_ends_the_reading_reaches_the_consumer_whatever_it_is(
    particles: IndexedDataset, queues: Queues, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ends(BaseException):
        pass

    def reading(*of: Any) -> Callable[[], object]:
        def end() -> None:
            raise Ends

        return end

    monkeypatch.setattr(IndexedDataset, "reading", reading)
    with queues(), pytest.raises(Ends):
        list(stream(particles, batch_size=5, device=OTHER))
    assert own_threads() == []


def test_an_error_of_the_sampler_comes_after_the_batches_before_it(particles: IndexedDataset, queues: Queues) -> None:
    class Fails(ParticleSampler):
        def steps(self, *how: Any) -> Any:
            for number, step in enumerate(itertools.chain.from_iterable(super().steps(*how))):
                if number == 6:
                    raise ZeroDivisionError
                yield [step]

    with queues():
        loader = stream(particles, sampler=Fails(particles, 5, shuffle=False), device=OTHER)
        seen = []
        with pytest.raises(ZeroDivisionError):
            seen += [batch.index.tolist() for batch in loader]
        for batch in iter(loader):
            seen.append(batch.index.tolist())
            break
    assert seen[-1] == list(range(5))
    assert own_threads() == []


def test_a_lack_of_memory_for_a_buffer_comes_after_the_batches_before_it(
    particles: IndexedDataset, queues: Queues, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cryolike_data.unit_reader._UNIT_BYTES", 0)
    lend, lent = BufferRing.lend, itertools.count()

    def lend_two(ring: BufferRing, images: int) -> tuple[Tensor, Any]:
        if next(lent) == 2:
            raise MemoryError
        return lend(ring, images)

    monkeypatch.setattr(BufferRing, "lend", lend_two)
    seen: list[int] = []
    with queues(), pytest.raises(MemoryError):
        seen.extend(row for batch in stream(particles, batch_size=5, device=OTHER) for row in batch.index.tolist())
    assert seen == list(range(10))
    assert own_threads() == []


def test_columns_are_those_of_each_batch_whoever_asks_first(
    particles: IndexedDataset, queues: Queues, monkeypatch: pytest.MonkeyPatch
) -> None:
    with queues():
        loader = stream(particles, batch_size=4, device=OTHER)
        held = list(loader)
        assert len(held) > 4  # several of one unit
        asked: list[Queue] = []
        for k in reversed(range(len(held))):  # each in another stream than the one before
            asking = Queue()
            asked.append(asking)
            monkeypatch.setattr(torch.cuda, "current_stream", lambda of, asking=asking: asking)
            assert held[k].index.tolist() == list(range(4 * k, 4 * k + 4))
            assert torch.equal(held[k].ctf.defocus_u.cpu(), particles.batch(range(4 * k, 4 * k + 4)).ctf.defocus_u)
        # Units are of four batches here: the first that asks moves the columns, and the others wait for its stream.
        first = asked[-1 - 3]
        assert [queue.waited_for for queue in asked[-4:]] == [[], [first], [first], [first]]
        for queue, batch in zip(asked[-3:], reversed(held[:3]), strict=True):
            assert {batch.index.address, batch.ctf.defocus_u.address} <= queue.uses


@pytest.mark.parametrize("options", OPTIONS, ids=["raw", "transformed", "polar"])
def test_the_allocator_is_told_of_each_stream_that_is_given_images(
    particles: IndexedDataset, queues: Queues, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    with queues():
        batches = iter(stream(particles, batch_size=5, device=OTHER, prefetch=1, **options))
        for _ in range(4):  # of two units
            asking = Queue()
            monkeypatch.setattr(torch.cuda, "current_stream", lambda of, asking=asking: asking)
            batch = next(batches)
            made = [batch.images, *([batch.fourier, batch.polar_ctf] if "polar" in options else [])]
            assert {tensor.address for tensor in made} <= asking.uses
        batches.close()


def test_columns_that_the_transforms_asked_for_are_kept_for_the_consumer_which_waits_once(
    particles: IndexedDataset, queues: Queues
) -> None:
    with queues() as sides:
        batches = iter(stream(particles, batch_size=5, device=OTHER, prefetch=1, polar=GRID))
        consumer: Any = torch.cuda.current_stream(0)
        for k in range(2):  # of one unit
            batch = next(batches)
            assert torch.equal(batch.ctf.defocus_u.cpu(), particles.batch(range(5 * k, 5 * k + 5)).ctf.defocus_u)
            assert {batch.index.address, batch.ctf.defocus_u.address} <= consumer.uses
        assert consumer.waited_for == [sides[1]]
        batches.close()


@pytest.mark.parametrize("options", [{}, {"downsample": Downsample(box=16)}, {"polar": GRID}], ids=str)
def test_batches_of_one_unit_are_nothing_to_each_other_for_autograd(
    particles: IndexedDataset, queues: Queues, options: dict[str, Any]
) -> None:
    gain = torch.nn.Parameter(torch.ones(()))
    with queues():
        held = list(stream(particles, batch_size=8, device=OTHER, **options))
        first, second, *_ = held
        for computed in (first.images, first.ctf.defocus_u, *([first.fourier, first.polar_ctf] if "polar" in options else [])):
            computed.mul_(gain.to(OTHER))
        assert [batch.images.requires_grad for batch in held] == [True] + [False] * (len(held) - 1)
        assert not second.ctf.defocus_u.requires_grad
        second.images.add_(1)


@pytest.mark.parametrize("options", [{}, {"downsample": Downsample(box=16)}, {"polar": GRID}], ids=str)
def test_a_batch_taken_in_inference_mode_leaves_its_unit_to_autograd(
    particles: IndexedDataset, queues: Queues, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with queues():
        batches = iter(stream(particles, batch_size=8, device=OTHER, **options))
        with torch.inference_mode():
            first = next(batches)
            assert first.pose is not None
        for batch in batches:
            assert not batch.images.is_inference()
            assert not batch.ctf.defocus_u.is_inference()
    assert "read one by one" not in caplog.text


@pytest.mark.parametrize("smaller", [Downsample(box=16), Downsample(factor=2, method="mean")], ids=repr)  # which moves the centre
def test_no_column_is_moved_that_nobody_asks_for(
    particles: IndexedDataset, queues: Queues, monkeypatch: pytest.MonkeyPatch, smaller: Downsample
) -> None:
    def moved(*_: Any, **__: Any) -> Any:
        raise AssertionError("columns are moved")

    monkeypatch.setattr(Columns, "to", moved)
    with queues():
        count = sum(len(batch) for batch in stream(particles, batch_size=7, device=OTHER, downsample=smaller))
    assert count == len(particles)


@pytest.mark.parametrize("delay", [0, 0.1])  # while units are still prepared, and while the first is waited for
def test_closing_from_another_thread_ends_who_waits(
    particles: IndexedDataset, queues: Queues, monkeypatch: pytest.MonkeyPatch, delay: float
) -> None:
    reading = threading.Event()
    copied: list[int] = []

    def slowly(dataset: IndexedDataset, rows: np.ndarray, *to: Any) -> Callable[[], object]:
        def copy() -> None:
            copied.append(len(rows))
            reading.set()
            wait_until(lambda: reader is None or reader.closed)

        reader = loader._reader
        return copy

    monkeypatch.setattr(IndexedDataset, "reading", slowly)
    with queues():
        loader = stream(particles, batch_size=7, device=OTHER)

        def close() -> None:
            reading.wait(10)
            time.sleep(delay)
            loader.close()

        closing = threading.Thread(target=close)
        closing.start()
        assert list(loader) == []
        closing.join()
    assert len(copied) == 1  # and what was to be read after it is not waited for
    assert own_threads() == []


@pytest.mark.parametrize("line", range(14))
def test_a_loop_ends_wherever_another_thread_closes_the_stream(
    particles: IndexedDataset, queues: Queues, monkeypatch: pytest.MonkeyPatch, line: int
) -> None:
    monkeypatch.setattr("cryolike_data.unit_reader._UNIT_BYTES", 0)
    with queues():
        loader = stream(particles, batch_size=7, device=OTHER)
        with another_thread_at(line, UnitReader.take, loader.close):
            rows = [row for batch in loader for row in batch.index.tolist()]
    assert rows == list(range(len(rows)))
    assert len(rows) < len(particles)
    assert own_threads() == []


@pytest.mark.parametrize("function", [UnitReader.refill, UnitReader._lend, UnitReader.take], ids=lambda function: function.__name__)
@pytest.mark.parametrize("line", range(12))
def test_a_loop_ends_wherever_a_signal_handler_closes_the_stream(
    particles: IndexedDataset, queues: Queues, monkeypatch: pytest.MonkeyPatch, line: int, function: Callable[..., Any]
) -> None:
    monkeypatch.setattr("cryolike_data.unit_reader._UNIT_BYTES", 0)
    with queues():
        loader = stream(particles, batch_size=7, device=OTHER)
        with at_line(line, function, loader.close):
            rows = [row for batch in loader for row in batch.index.tolist()]
    assert rows == list(range(len(rows)))
    assert len(rows) < len(particles)
    assert own_threads() == []


def test_closing_inside_the_loop_ends_it(particles: IndexedDataset, queues: Queues, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cryolike_data.unit_reader._UNIT_BYTES", 0)
    with queues():
        loader = stream(particles, batch_size=7, device=OTHER)
        assert close_in_its_loop(loader) < 9
    assert loader.sampler.epoch == 0


def test_a_stream_is_closed_by_another_thread_while_the_next_batches_are_drawn(particles: IndexedDataset, queues: Queues) -> None:
    closers: list[threading.Thread] = []

    class Closed(ParticleSampler):
        def rows(self, positions: np.ndarray, epoch: int) -> np.ndarray:
            if not closers:
                closers.append(threading.Thread(target=loader.close))
                closers[0].start()
                wait_until(lambda: "cryolike-reader" not in own_threads())
                closers[0].join(0.1)  # which waits for this
            return super().rows(positions, epoch)

    with queues():
        loader = stream(particles, sampler=Closed(particles, 7), device=OTHER)
        assert list(loader) == []
    (closer,) = closers
    closer.join()
    assert own_threads() == []


def test_units_wait_for_a_consumer_that_takes_longer(particles: IndexedDataset, queues: Queues, monkeypatch: pytest.MonkeyPatch) -> None:
    busy = Queue()
    with queues():
        monkeypatch.setattr(torch.cuda, "current_stream", lambda of: busy)
        most = 0
        for _ in stream(particles, batch_size=2, device=OTHER, prefetch=1, downsample=Downsample(box=16)):
            busy.add(lambda: None)  # what is done with this batch, which nobody waits for
            most = max(most, len(busy.waiting))
    assert 2 * (UNITS_AHEAD + 1) <= most <= 2 * (UNITS_AHEAD + 2)  # of two batches each


def test_images_stay_until_all_work_on_their_unit_is_done(
    particles: IndexedDataset, queues: Queues, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No allocator is told that the transforms use what was copied.
    copied: list[weakref.ref[Tensor]] = []
    process = Collate.process_images

    def process_images(collate: Collate, images: Tensor) -> Tensor:
        copied.append(weakref.ref(images))
        return process(collate, images)

    monkeypatch.setattr(Collate, "process_images", process_images)
    busy = Queue()
    with queues():
        monkeypatch.setattr(torch.cuda, "current_stream", lambda of: busy)
        for _ in stream(particles, batch_size=2, device=OTHER, prefetch=1, downsample=Downsample(box=16)):
            busy.add(lambda: None)
            waiting = -(-len(busy.waiting) // 2)  # units of two batches that the consumer is not done with, this one among them
            handed = len(copied) - sum(image() is not None for image in copied)
            assert handed <= len(copied) - waiting
    gc.collect()
    assert not any(image() is not None for image in copied)


def test_a_stream_that_is_left_early_keeps_later_copies_from_images_that_are_being_transformed(
    particles: IndexedDataset, queues: Queues
) -> None:
    with queues() as sides:
        batches = iter(stream(particles, batch_size=5, device=OTHER, normalize="std"))
        next(batches)
        copies, transforms = sides
        copies.waited_for.clear()
        batches.close()
        assert copies.waited_for == [transforms]


def test_a_consumer_that_changes_streams_counts_as_done_after_the_transforms(
    particles: IndexedDataset, queues: Queues, monkeypatch: pytest.MonkeyPatch
) -> None:
    with queues() as sides:
        first, second = Queue(), Queue()
        now = [first]
        monkeypatch.setattr(torch.cuda, "current_stream", lambda of: now[0])
        batches = iter(stream(particles, batch_size=5, device=OTHER, normalize="std", prefetch=1))
        for _ in range(2):  # a unit
            next(batches)
        now[0] = second
        next(batches)
        assert second.waited_for == 2 * [sides[1]]  # for those of the unit before, and of this one
        batches.close()


def test_streamed_likelihoods(particles: IndexedDataset, templates: Templates, queues: Queues, tmp_path: Path) -> None:
    options: dict[str, Any] = {"batch_size": 16, "dtype": torch.float64, "memory_bytes": 1 << 22}
    expected = stream_likelihood(particles, templates, DISPLACEMENTS_A, **options)
    with queues():
        found = stream_likelihood(particles, templates, DISPLACEMENTS_A, device=OTHER, output=tmp_path / "out", **options)
    np.testing.assert_allclose(found["log_likelihood"], expected["log_likelihood"], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(found["template"], expected["template"])


def test_one_transform_is_kept_for_each_device(queues: Queues, monkeypatch: pytest.MonkeyPatch) -> None:
    images = random_images(4, 32, 32)
    expected = to_polar(images, GRID, eps=1e-12)
    made: list[torch.device] = []
    with queues(), monkeypatch.context() as patch:
        make = polar_module.make_plan

        def noted(*arguments: Any) -> Callable[..., object]:
            made.append(arguments[-1])
            return make(*arguments)

        patch.setattr(polar_module, "make_plan", noted)
        for _ in range(2):
            found = to_polar(images.to(OTHER), GRID, eps=1e-12)
            assert found.device == OTHER
            torch.testing.assert_close(found.cpu(), expected)
    assert made == [OTHER]
    assert torch.equal(to_polar(images, GRID, eps=1e-12), expected)


def test_a_transform_on_the_cpu_takes_images_of_another_device_and_gives_their_transforms_there() -> None:
    same_there(PolarTransform(GRID, 32), random_images(3, 32, 32))
