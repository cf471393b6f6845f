"""``stream_likelihood``: the truth of the demo project is found, and results are the same however often a run was stopped or shared."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from support import (
    contents,
    ctf_columns,
    disk_of,
    no_file_larger_than,
    numbered_images,
    open_files,
    own_threads,
    run_python,
    uids,
    write_particles,
    write_stack,
)

import cryolike_data.likelihood.streaming as streaming
from cryolike_data import Downsample, IndexedDataset, ZarrDataset, export_zarr
from cryolike_data.demo import DemoProject, write_project
from cryolike_data.errors import ArgumentError, ExportError, ExportExistsError, TableError
from cryolike_data.likelihood import Templates, displacement_grid, integrated_log_likelihood, stream_likelihood
from cryolike_data.likelihood.records import RECORD
from cryolike_data.polar_batch import PolarCollate
from cryolike_data.transforms import PolarGrid

N, BOX, PIXEL_SIZE, BATCH = 23, 16, 1.5, 5
GRID = PolarGrid.of_box(BOX, resolution_factor=0.75, n_inplanes=12)
ROTVECS = [[0, 0, 0], [1, 0.5, 0], [0, -2, 1]]
DISPLACEMENTS = [[0.0, 0.0], [1.5, 0.0], [-1.5, 3.0], [0.0, 2.0]]
FILES = ["likelihood.json", "likelihood.npy"]
NUMBERS = ["log_likelihood", "template", "displacement_A", "rotation_rad", "pose", "shift_A"]


def make_templates(*, grid: PolarGrid = GRID, rotvecs: Any = ROTVECS, pixel_size: float = PIXEL_SIZE, seed: int = 0) -> Templates:
    volume = torch.randn(BOX, BOX, BOX, generator=torch.Generator().manual_seed(seed))
    return Templates.from_volume(volume, grid, rotvecs=rotvecs, pixel_size=pixel_size)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of particles in five batches, the last of three; tests read it only."""
    tilt = np.random.default_rng(3).normal(size=(N, 2)).astype("f4") * 800
    return write_particles(tmp_path_factory.mktemp("project"), N, box=BOX, stacks=3, ctf__tilt_A=tilt)[0]


@pytest.fixture
def ds(table: Path) -> IndexedDataset:
    return IndexedDataset(table)


@pytest.fixture(scope="module")
def templates() -> Templates:
    return make_templates()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "runs/out"


def run(dataset: Any, templates: Templates, output: Path | None = None, displacements: Any = None, **options: Any) -> np.ndarray:
    """A run with small batches that shows nothing."""
    tried = DISPLACEMENTS if displacements is None else displacements
    return stream_likelihood(dataset, templates, tried, output=output, **{"batch_size": BATCH, "progress": False} | options)


def bytes_of(output: Path) -> bytes:
    return (output / "likelihood.npy").read_bytes()


@pytest.fixture
def undisturbed(ds: IndexedDataset, templates: Templates, tmp_path: Path) -> bytes:
    """``likelihood.npy`` of a run from beginning to end."""
    run(ds, templates, tmp_path / "undisturbed")
    return bytes_of(tmp_path / "undisturbed")


def fail_after(monkeypatch: pytest.MonkeyPatch, batches: int, error: type[BaseException] = AssertionError) -> None:
    """Let so many batches be compared, and fail if there is another one."""
    compare, calls = streaming.begin_comparison, iter(range(batches))

    def compare_or_fail(*args: Any, **options: Any) -> Any:
        if next(calls, None) is None:
            raise error(f"more than {batches} batches")
        return compare(*args, **options)

    monkeypatch.setattr(streaming, "begin_comparison", compare_or_fail)


# --- what is found


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> DemoProject:
    """The demo project as it is by default."""
    return write_project(tmp_path_factory.mktemp("demo") / "project")


def test_nine_of_ten_particles_of_the_demo_find_their_orientation_within_a_step(project: DemoProject) -> None:
    step, count = 10, 240
    truth = np.load(project.truth)
    grid = PolarGrid.of_box(64, resolution_factor=0.35, n_inplanes=40)
    templates = Templates.from_volume(project.volume, grid, step_deg=step)
    tried = displacement_grid(float(np.linalg.norm(truth["shift_A"], axis=1).max()), 4)
    found = stream_likelihood(IndexedDataset(project.indexed).select(slice(0, count)), templates, tried, progress=False)
    true, seen = (Rotation.from_rotvec(vectors[:count]) for vectors in (truth["rotvec"], found["pose"]))
    between = np.degrees(np.arccos(np.clip((true.as_matrix()[..., 2] * seen.as_matrix()[..., 2]).sum(-1), -1, 1)))
    assert (between <= step).mean() >= 0.9
    assert (np.degrees((true.inv() * seen).magnitude()) <= step).mean() >= 0.9
    # A lattice of 4 A has a point within 2 A along both axes.
    assert np.quantile(np.abs(found["shift_A"] - truth["shift_A"][:count]), 0.9) <= 4
    np.testing.assert_array_equal(found["uid"], truth["uid"][:count])


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "double": {"dtype": torch.float64},
    "small": {"downsample": Downsample(box=12), "dtype": torch.float64},
    "raw": {"unit_power": False},
    "std": {"normalize": "std", "ctf_terms": ("beam_tilt",)},
    "cpu": {"device": "cpu", "memory_bytes": 10_000},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kept", [False, True], ids=["in memory", "on disk"])
def test_results_are_those_of_each_batch_by_itself(ds, templates, out, options, kept):
    found = run(ds, templates, out if kept else None, **options)
    settings = {"normalize": "max", "unit_power": True} | {name: value for name, value in options.items() if name != "memory_bytes"}
    collate = PolarCollate(GRID, **settings)
    for first in range(0, N, BATCH):
        batch = collate(ds.batch(range(first, min(first + BATCH, N))))
        alone = integrated_log_likelihood(
            batch, templates, torch.tensor(DISPLACEMENTS), by_template=True, memory_bytes=options.get("memory_bytes")
        )
        records = found[first : first + BATCH]
        for name in NUMBERS:
            np.testing.assert_array_equal(records[name], getattr(alone, name).numpy(), err_msg=name)
    assert np.isfinite(found["log_likelihood"]).all()
    assert len(np.unique(found["template"])) > 1
    np.testing.assert_array_equal(found["row"], np.arange(N))
    np.testing.assert_array_equal(found["uid"], uids(N))
    np.testing.assert_array_equal(found["done"], 1)


def test_options_that_change_the_images_or_the_ctf_change_the_result(ds, templates):
    found = {name: run(ds, templates, **options)["log_likelihood"] for name, options in OPTIONS.items()}
    for name in ("small", "raw", "std"):
        assert np.abs(found[name] - found["default"]).max() > 0.1
    for name in ("double", "cpu"):
        np.testing.assert_allclose(found[name], found["default"], rtol=0, atol=0.05)


def test_what_is_returned_is_what_is_on_disk_and_cannot_be_written(ds, templates, out):
    found = run(ds, templates, out)
    np.testing.assert_array_equal(np.load(out / "likelihood.npy", allow_pickle=False), found)
    assert not found.flags.writeable
    np.testing.assert_array_equal(run(ds, templates), found)


def test_the_matrix_of_particles_by_templates_is_written_where_it_is_asked_for(ds, templates, out):
    found = run(ds, templates, out, by_template=True)
    matrix = np.load(out / "by_template.npy", allow_pickle=False)
    assert (matrix.dtype, matrix.shape) == (np.float64, (N, len(templates)))
    collate = PolarCollate(GRID, normalize="max", unit_power=True)
    for first in range(0, N, BATCH):
        batch = collate(ds.batch(range(first, min(first + BATCH, N))))
        alone = integrated_log_likelihood(batch, templates, torch.tensor(DISPLACEMENTS), by_template=True)
        np.testing.assert_array_equal(matrix[first : first + BATCH], alone.by_template.numpy())
    # Templates have the same prior here.
    mean = np.logaddexp.reduce(matrix, axis=1) - math.log(len(templates))
    np.testing.assert_allclose(found["log_likelihood"], mean, rtol=1e-12)
    assert sorted(os.listdir(out)) == ["by_template.npy", *FILES]


def test_poses_priors_and_displacements_may_be_learned_elsewhere(ds, templates):
    given = (ROTVECS, templates.log_weights.tolist(), DISPLACEMENTS)
    poses, priors, displacements = (torch.tensor(values, dtype=torch.float64, requires_grad=True) for values in given)
    of_them = Templates(templates.fourier.clone().requires_grad_(), GRID, templates.box_A, poses, priors)
    np.testing.assert_array_equal(run(ds, of_them, displacements=displacements), run(ds, templates))


@pytest.mark.parametrize("rows", [np.arange(3, 20, 2), np.random.default_rng(1).permutation(N)], ids=["some", "shuffled"])
def test_a_selection_has_its_records_in_its_own_order_with_the_rows_of_the_table(ds, templates, out, rows):
    whole, chosen = run(ds, templates, dtype=torch.float64), run(ds.select(rows), templates, out, dtype=torch.float64)
    np.testing.assert_array_equal(chosen["row"], rows)
    np.testing.assert_array_equal(chosen["uid"], whole["uid"][rows])
    np.testing.assert_array_equal(chosen["template"], whole["template"][rows])
    for name in ("log_likelihood", "pose", "shift_A"):  # other images share the batch
        np.testing.assert_allclose(chosen[name], whole[name][rows], rtol=1e-9, atol=1e-9)


def test_an_image_that_is_not_finite_has_nan_in_its_record_and_the_rest_is_compared(tmp_path, templates, caplog):
    images = numbered_images(N, BOX)
    path, _ = write_particles(tmp_path, N, box=BOX, blob__path=["J1/all.mrc"] * N, blob__idx=np.arange(N, dtype=np.uint32))
    write_stack(tmp_path / "J1/all.mrc", images)
    good = run(IndexedDataset(path), templates)
    images[7, 3, 2] = np.nan
    write_stack(tmp_path / "J1/all.mrc", images)
    with caplog.at_level(logging.WARNING):
        found = run(IndexedDataset(path), templates, tmp_path / "out")
    assert "1 of 23 images are constant or not finite; their results are NaN." in caplog.text
    for name in ("log_likelihood", "displacement_A", "rotation_rad", "pose", "shift_A"):
        assert np.isnan(found[name][7]).all()
    assert (found["row"][7], found["uid"][7]) == (7, uids(N)[7])
    np.testing.assert_array_equal(found["done"], 1)
    others = np.arange(N) != 7
    np.testing.assert_array_equal(found["template"][others], good["template"][others])
    np.testing.assert_allclose(found["log_likelihood"][others], good["log_likelihood"][others], atol=0.05)


def test_a_constant_image_has_nan_in_its_record(tmp_path, templates, caplog):
    images = numbered_images(N, BOX)
    images[0] = 5
    path, _ = write_particles(tmp_path, N, box=BOX, blob__path=["J1/all.mrc"] * N, blob__idx=np.arange(N, dtype=np.uint32))
    write_stack(tmp_path / "J1/all.mrc", images)
    with caplog.at_level(logging.WARNING), pytest.warns(UserWarning, match="1 of 5 images are constant"):
        found = run(IndexedDataset(path), templates)
    assert np.flatnonzero(np.isnan(found["log_likelihood"])).tolist() == [0]
    assert "1 of 23 images are constant or not finite" in caplog.text


@pytest.mark.parametrize(("column", "value"), [("df1_A", np.nan), ("accel_kv", 0), ("amp_contrast", 7)])
def test_optics_without_a_ctf_give_nan_and_the_warning_names_them(tmp_path, templates, caplog, column, value):
    good = IndexedDataset(write_particles(tmp_path / "good", N, box=BOX)[0])
    optics = ctf_columns(N)[f"ctf__{column}"]
    optics[7] = value
    bad = IndexedDataset(write_particles(tmp_path / "bad", N, box=BOX, **{f"ctf__{column}": optics})[0])
    with caplog.at_level(logging.WARNING):
        found = run(bad, templates)["log_likelihood"]
    assert "1 of 23 images" in caplog.text
    assert "optics" in caplog.text
    np.testing.assert_array_equal(np.isnan(found), np.arange(N) == 7)
    np.testing.assert_allclose(np.delete(found, 7), np.delete(run(good, templates)["log_likelihood"], 7), atol=0.05)


# --- ranks


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_ranks_that_share_a_folder_write_what_one_process_writes(ds, templates, out, undisturbed, world_size):
    for rank in reversed(range(world_size)):
        found = run(ds, templates, out, rank=rank, world_size=world_size)
        assert found["done"][rank * BATCH : (rank + 1) * BATCH].all()  # its first batch, if there is one
        assert bool(found["done"].all()) == (rank == 0)
    assert bytes_of(out) == undisturbed
    assert sorted(os.listdir(out)) == FILES


def test_a_run_may_be_continued_by_another_number_of_ranks(ds, templates, out, undisturbed):
    run(ds, templates, out, rank=1, world_size=3)
    run(ds, templates, out, rank=0, world_size=2)
    assert run(ds, templates, out)["done"].all()
    assert bytes_of(out) == undisturbed


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_in_memory_have_the_records_of_their_own_batches(ds, templates, world_size):
    whole = run(ds, templates)
    parts = [run(ds, templates, rank=rank, world_size=world_size) for rank in range(world_size)]
    np.testing.assert_array_equal(np.sum([part["done"] for part in parts], axis=0), 1)
    for part in parts:
        np.testing.assert_array_equal(part[part["done"] == 1], whole[part["done"] == 1])
        np.testing.assert_array_equal(part[part["done"] == 0], np.zeros((part["done"] == 0).sum(), part.dtype))


# One process imports everything and is forked for each attempt, so that an attempt begins within a millisecond. It runs no threads.
FORKED = """
    import os
    os.environ["OMP_NUM_THREADS"] = "1"
    import itertools, json, os, random, signal, sys, threading, time
    from pathlib import Path
    import finufft, numpy as np, torch
    from cryolike_data import IndexedDataset
    from cryolike_data.likelihood import Templates, stream_likelihood
    from cryolike_data.transforms import PolarGrid
    from tqdm import tqdm

    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a child that is killed leaves behind or, if it was shared, locked
    dataset, root = IndexedDataset(sys.argv[1]), Path(sys.argv[2])
    grid = PolarGrid.of_box(dataset.box, resolution_factor=0.75, n_inplanes=12)
    fourier = torch.randn(3, grid.n_shells, 6, dtype=torch.complex64, generator=torch.Generator().manual_seed(1))
    fourier = torch.cat([fourier, fourier.conj()], -1)
    templates = Templates(fourier, grid, dataset.box * dataset.pixel_size, torch.eye(3))

    def kill_after(steps, folder):
        left = iter(range(steps))

        def hook(event, paths):
            if event.split(".")[0] in ("os", "open") and any(str(path).startswith(folder) for path in paths) and next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)

    def start(name, steps=None, **options):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                if steps is not None:  # so many with files of the results, and then it is killed
                    kill_after(steps, str(root / name))
                stream_likelihood(dataset, templates, [[0, 0], [1, 2]], output=root / name, batch_size=10, progress=False, **options)
                code = 0
            finally:
                if code:
                    sys.excepthook(*sys.exc_info())
                os._exit(code)
        return child

    def end(child):
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def records(name):
        return np.load(root / name / "likelihood.npy") if (root / name / "likelihood.json").exists() else np.zeros(0)

    for name in ("warm", "undisturbed"):  # the first run reads from the disk
        started = time.monotonic()
        assert end(start(name)) == 0
    duration = time.monotonic() - started
"""

KILLED = (
    FORKED
    + """
    rng, whole, round_ = random.Random(4), records("undisturbed"), 0
    wanted = ["continued"] * 6 + ["new"] * 4 + ["replacing"] * 2
    for number in range(100):
        if not wanted:
            break
        mode = wanted[0]
        name = f"continued{round_}" if mode == "continued" else f"{mode}{number}"
        options = {"overwrite": True} if mode == "replacing" else {}
        if mode == "replacing":
            assert end(start(name, dtype=torch.float64)) == 0
        child = start(name, **options)
        time.sleep(rng.uniform(0, duration / (3 if mode == "continued" else 1)))
        os.kill(child, signal.SIGKILL)
        code = end(child)
        found = records(name)
        done = found["done"] == 1 if len(found) else np.zeros(0, bool)
        replaced = mode == "replacing" and len(found) > 0 and '"float64"' in (root / name / "likelihood.json").read_text()
        told = {"mode": mode, "code": code, "done": int(done.sum())}
        told["right"] = replaced or len(found) == 0 or np.array_equal(found[done], whole[:len(found)][done])
        struck = code == -signal.SIGKILL and not replaced and 0 < told["done"] < len(whole)
        if struck:
            wanted.pop(0)
        if mode not in wanted or mode != "continued" or not struck:
            told["end"] = end(start(name, **options))
            told["same"] = (root / name / "likelihood.npy").read_bytes() == (root / "undisturbed/likelihood.npy").read_bytes()
            round_ += 1
        print(json.dumps(told), flush=True)
    assert not wanted
"""
)

STRUCK_AT_ANY_STEP = (
    FORKED
    + """
    dataset = dataset.select(range(30))
    assert end(start("whole")) == 0
    for mode, options in [("new", {}), ("empty", {}), ("replacing", {"overwrite": True})]:
        for steps in itertools.count():
            name = f"{mode}{steps}"
            if mode != "new":
                (root / name).mkdir()
            if mode == "replacing":
                assert end(start(name, dtype=torch.float64)) == 0
            if end(start(name, steps=steps, **options)) == 0:
                break
            assert end(start(name, **options)) == 0
            assert records(name).tobytes() == records("whole").tobytes()
        print(mode, steps > 8)
"""
)

TOGETHER = (
    FORKED
    + """
    for attempt in range(6):
        if attempt % 2:
            (root / f"shared{attempt}").mkdir()
        children = [start(f"shared{attempt}", rank=rank, world_size=3) for rank in range(3)]
        print(*[end(child) for child in children])
        assert records(f"shared{attempt}").tobytes() == records("undisturbed").tobytes()
        assert sorted(os.listdir(root / f"shared{attempt}")) == ["likelihood.json", "likelihood.npy"]
    print(sorted(os.listdir(root)))
"""
)


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of 120 batches of 10."""
    return write_particles(tmp_path_factory.mktemp("larger"), 1200, box=BOX)[0]


def test_a_run_killed_at_any_moment_holds_nothing_wrong_and_ends_as_an_undisturbed_one(larger, tmp_path):
    ran = run_python(KILLED, larger, tmp_path, timeout=120)
    assert ran.returncode == 0, ran.stderr
    told = [json.loads(line) for line in ran.stdout.splitlines()]
    assert {kill["code"] for kill in told} <= {0, -9}
    assert [kill for kill in told if not kill["right"]] == []
    ends = [(kill["end"], kill["same"]) for kill in told if "end" in kill]
    assert len(ends) > 6
    assert set(ends) == {(0, True)}


def test_a_run_killed_while_it_makes_or_replaces_the_files_is_no_hindrance_to_the_next(larger, tmp_path):
    ran = run_python(STRUCK_AT_ANY_STEP, larger, tmp_path, timeout=120)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.splitlines() == ["new True", "empty True", "replacing True"]


def test_processes_at_once_write_what_one_process_writes(larger, tmp_path):
    ran = run_python(TOGETHER, larger, tmp_path, timeout=120)
    assert (ran.returncode, ran.stderr) == (0, "")
    *codes, left = ran.stdout.splitlines()
    assert codes == ["0 0 0"] * 6
    assert left == str(sorted(["warm", "undisturbed", *(f"shared{attempt}" for attempt in range(6))]))


def test_ranks_may_not_overwrite_because_they_could_remove_the_results_of_each_other(ds, templates, out):
    run(ds, templates, out)
    before = bytes_of(out)
    with pytest.raises(ArgumentError, match="overwrite is for a process that is alone"):
        run(ds, templates, out, dtype=torch.float64, rank=0, world_size=2, overwrite=True)
    assert bytes_of(out) == before


def test_what_a_run_that_was_killed_while_it_replaced_results_has_left_is_removed_by_the_next(ds, templates, out):
    run(ds, templates, out)
    (out / ".likelihood.json.0123abcd.partial").touch()
    run(ds, templates, out, dtype=torch.float64, overwrite=True)
    assert sorted(os.listdir(out)) == FILES


def test_folders_beside_the_results_are_left_alone(ds, templates, out):
    run(ds, templates, out)
    beside = [".out.20240101.backup", ".out.0123abcd.old", "out.json"]
    for name in beside:
        (out.parent / name).mkdir()
    run(ds, templates, out, dtype=torch.float64, overwrite=True)
    assert sorted(os.listdir(out.parent)) == sorted(["out", *beside])


def test_templates_that_were_made_with_another_number_of_threads_are_the_same(demo, tmp_path):
    particles = IndexedDataset(demo.indexed)
    threads = torch.get_num_threads()
    made = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            made.append(Templates.from_volume(demo.volume, PolarGrid.of_box(32, n_inplanes=16), step_deg=40))
    finally:
        torch.set_num_threads(threads)
    for rank, chosen in enumerate(made):
        found = stream_likelihood(particles, chosen, [[0, 0]], output=tmp_path / "out", rank=rank, world_size=3, progress=False)
    assert found["done"].all()
    lighter = Templates(made[0].fourier * (1 + 1e-3), made[0].grid, made[0].box_A, made[0].rotvecs, made[0].log_weights)
    with pytest.raises(ExportExistsError, match="the templates differ"):
        stream_likelihood(particles, lighter, [[0, 0]], output=tmp_path / "out", progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalize": None}, 'normalize is "max" or "std"'),
        ({"normalize": "background"}, 'normalize is "max" or "std"'),
        ({"downsample": Downsample(box=8)}, "beyond 2, the Nyquist frequency of 8 pixels"),
        ({"displacements": [[1000.0, 0.0]]}, "out of the box"),
    ],
    ids=str,
)
def test_what_would_give_wrong_numbers_is_refused_before_anything_is_written(ds, templates, out, options, message):
    with pytest.raises(ArgumentError, match=message):
        run(ds, templates, out, **options)
    assert not out.exists()


# --- runs that are stopped, or done already


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("batches", [0, 1, 4])
def test_a_run_that_was_stopped_is_continued_by_the_same_call(ds, templates, out, undisturbed, monkeypatch, batches, error):
    with monkeypatch.context() as patch:
        fail_after(patch, batches, error)
        with pytest.raises(error, match="more than"):
            run(ds, templates, out)
    assert own_threads() == []
    assert open_files(out) == []
    np.testing.assert_array_equal(np.load(out / "likelihood.npy")["done"], np.arange(N) < BATCH * batches)
    with monkeypatch.context() as patch:
        fail_after(patch, 5 - batches)
        run(ds, templates, out, overwrite=batches == 4)  # which does not begin anew what is the same
    assert bytes_of(out) == undisturbed


def test_a_finished_run_computes_nothing_again(ds, templates, out, monkeypatch):
    first = np.array(run(ds, templates, out, by_template=True))
    before = contents(out)
    fail_after(monkeypatch, 0)
    np.testing.assert_array_equal(run(ds, templates, out, by_template=True), first)
    for rank in range(2):
        np.testing.assert_array_equal(run(ds, templates, out, by_template=True, rank=rank, world_size=2), first)
    np.testing.assert_array_equal(run(ds, templates, out, by_template=True, overwrite=True, memory_bytes=1, device="cpu"), first)
    assert contents(out) == before


def test_a_batch_of_which_a_record_is_missing_is_done_again_and_no_other(ds, templates, out, undisturbed, monkeypatch):
    run(ds, templates, out)
    records = np.load(out / "likelihood.npy", mmap_mode="r+")
    for row in (2, N - 1):
        records[row] = 0
    records.flush()
    fail_after(monkeypatch, 2)
    run(ds, templates, out)
    assert bytes_of(out) == undisturbed


def test_a_run_may_go_on_from_another_place_with_the_same_call(ds, templates, tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    run(ds, templates, tmp_path / "link/out")
    fail_after(monkeypatch, 0)
    monkeypatch.chdir(tmp_path / "real")
    assert run(ds, templates, Path("out"))["done"].all()
    assert stream_likelihood(ds, templates, DISPLACEMENTS, output="out", batch_size=BATCH, progress=False)["done"].all()


# --- what is there already


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "templates": ({"templates": {"seed": 1}}, "the templates differ"),
    "fewer templates": ({"templates": {"rotvecs": ROTVECS[:2]}}, "templates.count is 3 there and 2 here"),
    "orientations": ({"templates": {"rotvecs": ROTVECS[::-1]}}, "the templates differ"),
    "grid": ({"templates": {"grid": PolarGrid(3.0, 0.25, 14)}}, "templates.n_inplanes is 12 there and 14 here"),
    "displacements": ({"displacements": [[0.0, 0.0]]}, "the displacements differ"),
    "batch_size": ({"batch_size": 6}, "settings.batch_size is 5 there and 6 here"),
    "dtype": ({"dtype": torch.float64}, "settings.dtype is 'float32' there and 'float64' here"),
    "particles": ({"rows": np.arange(N - 1)}, "particles is 23 there and 22 here"),
    "order": ({"rows": np.arange(N)[::-1]}, "the particles or their order, optics or poses differ"),
    "downsample": ({"downsample": Downsample(box=14)}, "settings.downsample is 'None' there and \"Downsample.box=14"),
    "normalize": ({"normalize": "std"}, "settings.normalize is .*max.* there and .*std.* here"),
    "unit_power": ({"unit_power": False}, "settings.unit_power is True there and False here"),
    "ctf_terms": ({"ctf_terms": ("beam_tilt",)}, r"settings.ctf_terms is \[\] there and \['beam_tilt'\] here"),
    "by_template": ({"by_template": True}, "settings.by_template is False there and True here"),
}


@pytest.mark.parametrize(("change", "told"), OTHERS.values(), ids=OTHERS)
def test_results_of_something_else_are_kept_unless_they_may_be_replaced(ds, templates, out, change, told):
    run(ds, templates, out)
    before = contents(out)
    other = {name: value for name, value in change.items() if name not in ("rows", "templates")}
    dataset = ds.select(change["rows"]) if "rows" in change else ds
    arguments = (dataset, make_templates(**change["templates"]) if "templates" in change else templates)
    with pytest.raises(ExportExistsError, match=told) as caught:
        run(*arguments, out, **other)
    assert str(out) in str(caught.value)
    assert "overwrite=True" in str(caught.value)
    assert contents(out) == before
    assert os.listdir(out.parent) == ["out"]
    run(*arguments, out.with_name("fresh"), **other)
    assert run(*arguments, out, overwrite=True, **other)["done"].all()
    assert contents(out) == contents(out.with_name("fresh"))
    assert sorted(os.listdir(out.parent)) == ["fresh", "out"]


def test_templates_that_change_places_are_other_templates(ds, out):
    rotvecs = np.random.default_rng(5).normal(size=(132, 3))
    first = make_templates(rotvecs=rotvecs)
    run(ds, first, out, [[0.0, 0.0]])
    for one, other in [(k, k + 64) for k in range(4)] + [(0, 128), (64, 128)]:
        order = torch.arange(132)
        order[[one, other]] = order[[other, one]]
        exchanged = Templates(first.fourier[order], GRID, first.box_A, first.rotvecs[order])
        with pytest.raises(ExportExistsError, match="the templates differ"):
            run(ds, exchanged, out, [[0.0, 0.0]])


@pytest.mark.parametrize(("difference", "same"), [(1e-6, True), (1e-2, False)])
def test_results_of_templates_that_differ_by_rounding_are_continued(ds, templates, out, difference, same):
    # finufft's last digits depend on the number of threads.
    first = np.array(run(ds, templates, out))
    about = json.loads((out / "likelihood.json").read_text())
    about["templates"]["sketch"] = (np.array(about["templates"]["sketch"]) * (1 + difference)).tolist()
    (out / "likelihood.json").write_text(json.dumps(about))
    if same:
        np.testing.assert_array_equal(run(ds, templates, out), first)
    else:
        with pytest.raises(ExportExistsError, match="the templates differ"):
            run(ds, templates, out)


@pytest.mark.parametrize("damage", [lambda about: about["templates"].pop("sketch"), lambda about: about["templates"]["sketch"].pop()])
def test_results_of_templates_that_are_described_otherwise_are_not_continued(ds, templates, out, damage):
    run(ds, templates, out)
    about = json.loads((out / "likelihood.json").read_text())
    damage(about)
    (out / "likelihood.json").write_text(json.dumps(about))
    with pytest.raises(ExportExistsError, match="made from something else"):
        run(ds, templates, out)


def test_results_of_stacks_that_were_written_again_are_not_continued(tmp_path, templates):
    path, _ = write_particles(tmp_path, N, box=BOX)
    run(IndexedDataset(path), templates, tmp_path / "out")
    os.utime(tmp_path / "J1/extract/stack_1.mrc", ns=(1, 1))
    with pytest.raises(ExportExistsError, match="the input stacks"):
        run(IndexedDataset(path), templates, tmp_path / "out")


def test_results_of_stacks_that_change_while_they_are_made_are_an_error(tmp_path, templates, monkeypatch):
    ds, out = IndexedDataset(write_particles(tmp_path / "project", N, box=BOX)[0]), tmp_path / "out"
    begin = streaming.begin_comparison

    def meanwhile(*arguments: Any, **options: Any) -> Any:
        os.utime(tmp_path / "project/J1/extract/stack_0.mrc", (0, 0))
        return begin(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(streaming, "begin_comparison", meanwhile)
        with pytest.raises(ExportError, match=rf"input stacks have changed while {out} was made of them; begin anew with overwrite=True\."):
            run(ds, templates, out)
    with pytest.raises(ExportExistsError, match="the input stacks"):
        run(ds, templates, out)
    assert run(ds, templates, out, overwrite=True)["done"].all()


def a_file(place: Path) -> None:
    place.parent.mkdir()
    place.write_text("notes")


def a_folder_of_notes(place: Path) -> None:
    place.mkdir(parents=True)
    (place / "notes.txt").write_text("notes")


def results_without_their_description(place: Path) -> None:
    a_folder_of_notes(place)
    (place / "likelihood.npy").write_bytes(b"\x93NUMPY")


def records_alone(place: Path) -> None:
    place.mkdir(parents=True)
    np.save(place / "likelihood.npy", np.ones(N, RECORD))


def half_a_description(place: Path) -> None:
    a_folder_of_notes(place)
    (place / "likelihood.json").write_text('{"particles": 23, "inp')


def an_empty_description(place: Path) -> None:
    a_folder_of_notes(place)
    (place / "likelihood.json").touch()


def a_description_of_something_else(place: Path) -> None:
    a_folder_of_notes(place)
    (place / "likelihood.json").write_text('{"mine": 1}')


def a_description_that_is_a_list(place: Path) -> None:
    a_folder_of_notes(place)
    (place / "likelihood.json").write_text("[1, 2]")


FOREIGN = [
    *(a_file, a_folder_of_notes, results_without_their_description, records_alone, half_a_description, an_empty_description),
    *(make for make in (a_description_of_something_else, a_description_that_is_a_list)),
]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("make", FOREIGN)
def test_what_is_not_of_a_likelihood_is_left_alone(ds, templates, out, make: Callable[[Path], None], overwrite):
    make(out)
    before = contents(out.parent)
    with pytest.raises(ExportExistsError, match="holds something else than results of a likelihood; choose another output"):
        run(ds, templates, out, overwrite=overwrite)
    assert contents(out.parent) == before
    assert os.listdir(out.parent) == ["out"]


def another_header(records: Path) -> None:
    content = records.read_bytes()
    records.write_bytes(content.replace(b"'<f8'", b"'<i8'", 1))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (Path.unlink, "likelihood.npy cannot be read"),
        (lambda records: os.truncate(records, 0), "likelihood.npy is cut short or not what was written here"),
        (lambda records: os.truncate(records, 500), "likelihood.npy is cut short or not what was written here"),
        (another_header, "likelihood.npy is cut short or not what was written here"),
    ],
)
def test_records_that_are_damaged_are_an_error_that_says_so_and_may_be_replaced(ds, templates, out, undisturbed, damage, told):
    run(ds, templates, out)
    damage(out / "likelihood.npy")
    before = contents(out)
    with pytest.raises(ExportError, match=rf"{told}.*; results cannot be continued there\. .* or pass overwrite=True"):
        run(ds, templates, out)
    assert contents(out) == before
    run(ds, templates, out, overwrite=True)
    assert bytes_of(out) == undisturbed


@pytest.mark.parametrize("damage", [Path.unlink, lambda matrix: os.truncate(matrix, 500)], ids=["lost", "cut short"])
def test_a_matrix_that_is_damaged_is_an_error_that_says_so_and_may_be_replaced(ds, templates, out, damage):
    run(ds, templates, out, by_template=True)
    whole = contents(out)
    damage(out / "by_template.npy")
    with pytest.raises(ExportError, match=r"by_template\.npy (cannot be read|is cut short).*; results cannot be continued there"):
        run(ds, templates, out, by_template=True)
    run(ds, templates, out, by_template=True, overwrite=True)
    assert contents(out) == whole


def test_nothing_is_kept_of_other_results_that_were_never_described(ds, templates, out, tmp_path):
    run(ds, templates, tmp_path / "whole", by_template=True)
    run(ds.select(range(N)[::-2]), templates, out, by_template=True)
    (out / "likelihood.json").rename(out / ".likelihood.json.0123abcd.partial")  # as if the run had been killed before
    run(ds, templates, out, by_template=True)
    (out / ".likelihood.json.0123abcd.partial").unlink()
    assert contents(out) == contents(tmp_path / "whole")


def test_files_of_somebody_else_beside_results_are_not_replaced_with_them(ds, templates, out):
    run(ds, templates, out)
    (out / "notes.txt").write_text("notes")
    before = contents(out)
    with pytest.raises(ExportExistsError, match=r"also holds notes\.txt, which overwrite=True would remove; choose another output"):
        run(ds, templates, out, batch_size=6, overwrite=True)
    assert contents(out) == before


def test_other_results_that_are_begun_at_the_same_moment_are_noticed(ds, templates, out, tmp_path, monkeypatch):
    run(ds, templates, tmp_path / "other", dtype=torch.float64)
    replace = os.replace

    def replace_and_be_replaced(source: Path, target: Path) -> None:
        replace(source, target)
        shutil.copy(tmp_path / "other/likelihood.json", target)

    monkeypatch.setattr(os, "replace", replace_and_be_replaced)
    with pytest.raises(ExportExistsError, match=r"settings\.dtype is 'float64' there and 'float32' here"):
        run(ds, templates, out)
    assert not np.load(out / "likelihood.npy")["done"].any()


@pytest.mark.parametrize("overwrite", [False, True])
def test_only_who_is_alone_removes_what_other_processes_make(ds, templates, out, overwrite):
    made = out / ".likelihood.json.01234567.partial"
    out.mkdir(parents=True)
    made.touch()
    run(ds, templates, out, overwrite=overwrite)
    assert made.exists() is not overwrite


@pytest.mark.parametrize("what", ["empty", "results"])
def test_a_folder_that_is_there_stays_the_one_it_is(ds, templates, out, undisturbed, monkeypatch, what):
    out.mkdir(parents=True)
    if what == "results":
        run(ds, templates, out, dtype=torch.float64, by_template=True)
    out.chmod(0o2770)
    before = out.stat()
    monkeypatch.chdir(out)
    run(ds, templates, Path(), overwrite=what == "results")
    assert sorted(os.listdir()) == FILES
    assert bytes_of(Path()) == undisturbed
    assert (out.stat().st_ino, out.stat().st_mode) == (before.st_ino, before.st_mode)


def test_results_may_lie_directly_on_a_disk_of_their_own(ds, templates, tmp_path, undisturbed):
    with disk_of(tmp_path / "disk", "2m") as disk:
        run(ds, templates, disk)
        run(ds, templates, disk, dtype=torch.float64, overwrite=True)
        assert bytes_of(disk) != undisturbed


def test_a_folder_below_a_file_is_an_error_that_names_it(ds, templates, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match="file"):
        run(ds, templates, tmp_path / "file/deep/out")


def test_nothing_is_written_but_the_results(table, templates, tmp_path, monkeypatch):
    for name in ("temporary", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path / "here")
    before = contents(table.parents[1])
    run(IndexedDataset(table), templates, tmp_path / "results/out")
    run(IndexedDataset(table), templates)
    assert list(contents(tmp_path)) == [f"results/out/{name}" for name in FILES]
    assert contents(table.parents[1]) == before


# --- a full disk


@pytest.mark.parametrize("limit", [10, 1000])
def test_files_for_which_there_is_no_room_are_an_error_and_nothing_is_left(ds, templates, out, undisturbed, limit):
    with no_file_larger_than(limit), pytest.raises(ExportError, match=r"out cannot be written: .*File too large"):
        run(ds, templates, out)
    assert list(out.parent.iterdir()) == []
    run(ds, templates, out)
    assert bytes_of(out) == undisturbed


def test_a_folder_that_was_there_stays_when_there_is_no_room(ds, templates, out):
    out.mkdir(parents=True)
    with no_file_larger_than(1000), pytest.raises(ExportError, match="File too large"):
        run(ds, templates, out)
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("room", [0, 1, 2.5])
def test_a_disk_that_is_full_in_the_middle_loses_nothing_and_the_same_call_goes_on(ds, templates, out, undisturbed, monkeypatch, room):
    run(ds, templates, out, rank=4, world_size=5)  # the last batch: the file has its length
    size = (len(undisturbed) - np.load(out / "likelihood.npy").nbytes) + int(room * BATCH * np.load(out / "likelihood.npy").itemsize)
    told = r"likelihood\.npy cannot be written: .*File too large\. What is there is kept; the same call continues it"
    with no_file_larger_than(size), pytest.raises(ExportError, match=told):
        run(ds, templates, out)
    done = np.load(out / "likelihood.npy")["done"]
    whole = int(room) * BATCH
    assert done[:whole].all()
    assert done[-3:].all()
    assert not done[int(room * BATCH) : -3].any()
    assert (own_threads(), open_files(out)) == ([], [])
    fail_after(monkeypatch, 4 - int(room))
    run(ds, templates, out)
    assert bytes_of(out) == undisturbed


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for 200 kB."""
    with disk_of(tmp_path / "disk", "200k") as disk:
        yield disk


def test_a_disk_that_fills_up_is_told_and_the_same_call_goes_on_when_there_is_room(ds, small_disk, tmp_path):
    many = make_templates(rotvecs=np.random.default_rng(0).normal(size=(2000, 3)))
    options: dict[str, Any] = {"by_template": True, "displacements": [[0.0, 0.0]]}  # 80 kB a batch
    with pytest.raises(ExportError, match=r"by_template\.npy cannot be written: .*No space left on device\. What is there is kept"):
        run(ds, many, small_disk / "out", **options)
    np.testing.assert_array_equal(np.load(small_disk / "out/likelihood.npy")["done"], np.arange(N) < 2 * BATCH)
    subprocess.run(["mount", "-o", "remount,size=2m", small_disk], check=True)
    run(ds, many, small_disk / "out", **options)
    run(ds, many, tmp_path / "undisturbed", **options)
    assert contents(small_disk / "out") == contents(tmp_path / "undisturbed")


# --- memory


MEMORY = """
    import os
    os.environ["OMP_NUM_THREADS"] = "1"
    import sys
    import numpy as np, torch
    import cryolike_data.likelihood.streaming as streaming
    from cryolike_data import IndexedDataset
    from cryolike_data.likelihood import Templates, stream_likelihood
    from cryolike_data.transforms import PolarGrid

    torch.set_num_threads(1)
    table, output, count = sys.argv[1], sys.argv[2], int(sys.argv[3])

    from support import anonymous_bytes

    compare, seen = streaming.begin_comparison, []
    def compare_and_look(*args, **options):
        seen.append(anonymous_bytes())
        return compare(*args, **options)
    streaming.begin_comparison = compare_and_look

    dataset, grid = IndexedDataset(table), PolarGrid(3.0, 0.5, 8)
    one = torch.ones(1, grid.n_shells, 8, dtype=torch.complex64)
    templates = Templates(one, grid, dataset.box * dataset.pixel_size, torch.zeros(1, 3))
    for number in (10_000, count):
        few = dataset.select(slice(0, number))
        few.particles.columns()
        seen.clear()
        found = stream_likelihood(few, templates, [[0, 0]], output=f"{output}/{number}", batch_size=500, progress=False)
        assert found["done"].all() and np.isfinite(found["log_likelihood"]).all()
        print(max(seen) - seen[4])
"""


def test_memory_stays_the_same_over_a_hundred_thousand_images(tmp_path):
    # They share seven slices of one stack.
    count, images = 100_000, numbered_images(7, BOX)
    place = {"blob__path": np.full(count, "J1/all.mrc"), "blob__idx": np.arange(count, dtype=np.uint32) % 7}
    path, _ = write_particles(tmp_path, count, box=1, stacks=1, blob__shape=np.full((count, 2), BOX, np.uint32), **place)
    write_stack(tmp_path / "J1/all.mrc", images)
    ran = run_python(MEMORY, path, tmp_path, count)
    assert ran.returncode == 0, ran.stderr
    few, many = map(int, ran.stdout.split())
    # The images are 102 MB, their records 11 MB.
    assert few < 6e6
    assert many < 6e6


# --- the terminal


def test_without_progress_nothing_is_printed(ds, templates, out, capfd):
    run(ds, templates, out)
    run(ds, templates, out)
    assert capfd.readouterr() == ("", "")


def test_progress_is_a_bar_on_the_error_stream(ds, templates, out, capfd):
    run(ds, templates, out, progress=True)
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "23/23" in shown.err


def test_progress_counts_the_particles_of_this_rank_and_those_that_are_there(ds, templates, out, capfd, caplog):
    run(ds, templates, out, rank=0, world_size=2)
    with caplog.at_level(logging.INFO):
        run(ds, templates, out, progress=True)
    assert "13 of 23 images are there already" in caplog.text
    assert "0/23" in capfd.readouterr().err


# --- arguments


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "batch_size": ({"batch_size": 0}, "batch_size is at least 1, not 0"),
    "dtype": ({"dtype": torch.float16}, "dtype is torch.float32 or torch.float64"),
    "half a rank": ({"rank": 1}, "pass both"),
    "rank": ({"rank": 2, "world_size": 2}, "rank 2 is not one of 2 ranks"),
    "downsample": ({"downsample": 8}, "downsample is a Downsample"),
    "three displacements": ({"displacements": [[0.0, 0.0, 0.0]]}, "displacements_A is"),
    "no displacement": ({"displacements": np.zeros((0, 2))}, "displacements_A is"),
    "memory": ({"memory_bytes": 0}, "memory_bytes is positive"),
    "device": ({"device": "gpu"}, "device='gpu' is not a device of torch"),
} | ({} if torch.cuda.is_available() else {"gpu": ({"device": "cuda"}, "device='cuda' needs a GPU")})


@pytest.mark.parametrize(("options", "told"), BAD.values(), ids=BAD)
def test_arguments_that_cannot_work_are_refused(ds, templates, options, told):
    with pytest.raises(ArgumentError, match=told):
        run(ds, templates, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 0},
        {"dtype": torch.float16},
        {"memory_bytes": 0},
        *(wrong for wrong in ({"displacements": [[0.0, 0.0, 0.0]]}, {"downsample": 8}, {"ctf_terms": ("defocus",)})),
    ],
    ids=str,
)
def test_a_call_that_cannot_work_leaves_no_folder_in_the_way_of_the_right_one(ds, templates, out, undisturbed, options):
    with pytest.raises(ArgumentError):
        run(ds, templates, out, **options)
    run(ds, templates, out)
    assert bytes_of(out) == undisturbed


def test_the_matrix_needs_a_folder(ds, templates):
    with pytest.raises(ArgumentError, match="by_template needs output="):
        run(ds, templates, by_template=True)


def test_templates_of_another_box_are_refused(ds):
    with pytest.raises(ArgumentError, match="must share a box; the images' is 24 A, the templates' 32 A"):
        run(ds, make_templates(pixel_size=2.0))


def test_a_table_without_optics_is_an_error_that_says_what_to_pass(tmp_path, templates):
    names = ("exp_group_id", "accel_kv", "cs_mm", "amp_contrast", "df1_A", "df2_A", "df_angle_rad", "phase_shift_rad")
    path, _ = write_particles(tmp_path, N, box=BOX, **{f"ctf__{name}": None for name in names})
    with pytest.raises(TableError, match="passthrough="):
        run(IndexedDataset(path), templates)


def test_other_things_than_a_data_set_and_templates_are_refused(demo: DemoProject, templates: Templates) -> None:
    wrong: Any
    for wrong in ((IndexedDataset(demo.indexed), "volume.mrc"), ("particles.cs", templates)):
        with pytest.raises(ArgumentError, match=r"takes a data set, .*, and Templates, .* not a \w+ and a \w+"):
            stream_likelihood(*wrong, [[0.0, 0.0]])


def test_shifts_are_for_the_stored_images_where_pooling_moves_the_centre(demo: DemoProject, tmp_path: Path) -> None:
    particles, rule = IndexedDataset(demo.indexed).select(range(6)), Downsample(factor=2, method="mean")
    grid = PolarGrid(4.0, 0.25, 32)
    templates = Templates.from_volume(demo.volume, grid, step_deg=60)
    tried = displacement_grid(3, 4.0)
    export_zarr(particles, tmp_path / "pooled.zarr", downsample=rule)
    pooled = stream_likelihood(ZarrDataset(tmp_path / "pooled.zarr"), templates, tried, batch_size=4, dtype=torch.float64)
    found = stream_likelihood(particles, templates, tried, batch_size=4, dtype=torch.float64, downsample=rule)
    np.testing.assert_array_equal(found["template"], pooled["template"])
    np.testing.assert_allclose(found["shift_A"], pooled["shift_A"] - 0.5 * particles.pixel_size, rtol=0, atol=1e-9)
