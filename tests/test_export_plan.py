"""Plans of exports: units that can be run anywhere and in any order, what continues them, and who may be at work on them."""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support import EXPORTS, contents, numbered_images, own_threads, results, run_python, write_particles, write_stack, write_table

from cryolike_data import (
    Downsample,
    ImageDescriptor,
    IndexedDataset,
    ParticleDataset,
    ZarrDataset,
    export_cryolike,
    export_mrc,
    export_zarr,
)
from cryolike_data.errors import ArgumentError, ExportError, ExportExistsError, MissingStackError, StackError
from cryolike_data.export import ExportPlan, ExportReport, finish, plan_export, run, run_unit, unit_range
from cryolike_data.export.pixels import Pixels
from cryolike_data.export.place import LocalPlace
from cryolike_data.export.state import at_work_on, living_runs
from cryolike_data.export.zarr import ZarrFormat
from cryolike_data.progress import Progress

N, BOX, UNIT = 23, 16, 5
FORMATS = list(EXPORTS)
EXPORTERS: dict[str, Any] = {"zarr": export_zarr, "cryolike": export_cryolike, "mrc": export_mrc}
FILES = {
    "zarr": ["images/c/{}/0/0"],
    "cryolike": ["phys/particles_phys_stack_{:06d}.pt", "fft/particles_fourier_stack_{:06d}.pt", "fft/particles_fourier_stack_{:06d}.npz"],
    "mrc": ["particles/stack_{:06d}.mrcs"],
}
MODES0: list[Any] = ["signed", "unsigned"]
SEALS = {"zarr": "zarr.json", "cryolike": "export.json", "mrc": "export.json"}

each_format = pytest.mark.parametrize("kind", FORMATS)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of one table and its two stacks; tests read it only."""
    folder = tmp_path_factory.mktemp("project")
    write_particles(folder, N, box=BOX)
    return folder


@pytest.fixture(scope="module")
def dataset(project: Path) -> ParticleDataset:
    return IndexedDataset(project / "J1/particles.cs")


@pytest.fixture(scope="module")
def undisturbed(dataset: ParticleDataset, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """The files of an export, by format, of one call that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for kind, export in EXPORTERS.items():
        export(dataset, folder / kind, **EXPORTS[kind])
    return {kind: contents(folder / kind) for kind in EXPORTERS}


def plan_of(kind: str, dataset: ParticleDataset, target: Path | str, **changes: Any) -> ExportPlan:
    return plan_export(dataset, target, format=kind, **(EXPORTS[kind] | changes))


@pytest.fixture
def copied(project: Path, tmp_path: Path) -> Path:
    """A copy of the project that a test may change; modification times are kept."""
    return shutil.copytree(project, tmp_path / "project")


# --- plans


@each_format
def test_a_plan_says_which_rows_and_files_each_unit_holds(dataset, tmp_path, kind):
    plan = plan_of(kind, dataset, tmp_path / "out")
    assert (len(plan), plan.units) == (5, range(5))
    assert [plan.rows(unit) for unit in plan.units] == [range(0, 5), range(5, 10), range(10, 15), range(15, 20), range(20, 23)]
    assert [plan.files(unit) for unit in plan.units] == [tuple(name.format(unit) for name in FILES[kind]) for unit in range(5)]
    assert plan.needed_bytes >= N * BOX * BOX * 4
    assert repr(plan) == f"ExportPlan(23 particles as {kind} to {tmp_path / 'out'}, 5 units)"


@each_format
def test_making_a_plan_writes_nothing(dataset, tmp_path, kind):
    plan_of(kind, dataset, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@each_format
def test_what_is_no_downsample_is_refused(dataset, tmp_path, kind):
    with pytest.raises(ArgumentError, match=r"downsample is a Downsample, such as Downsample\(box=128\), not 2"):
        plan_of(kind, dataset, tmp_path / "out", downsample=2)


@pytest.mark.parametrize("kind", ["cryolike", "mrc"])
def test_a_stack_holds_one_image_at_least(dataset, tmp_path, kind):
    with pytest.raises(ArgumentError, match="batch_size is at least 1"):
        plan_of(kind, dataset, tmp_path / "out", batch_size=0)
    assert len(plan_of(kind, dataset, tmp_path / "out", batch_size=1)) == N


def test_units_that_are_no_range_are_refused_and_nothing_is_written(dataset, tmp_path):
    with pytest.raises(ArgumentError, match=r"units is a range, such as range\(0, 4\), or None for all of them, not \[0, 3\]"):
        run(plan_of("zarr", dataset, tmp_path / "out"), units=[0, 3])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("units", [range(3, 6), range(-1, 2)])
def test_a_range_with_units_that_are_not_in_the_plan_is_refused_and_nothing_is_written(dataset, tmp_path, units):
    with pytest.raises(ArgumentError, match=r"no unit (5|-1): this export has 5, 0 to 4"):
        run(plan_of("zarr", dataset, tmp_path / "out"), units=units)
    assert list(tmp_path.iterdir()) == []


@each_format
@pytest.mark.parametrize("unit", [-1, 5])
def test_a_unit_that_is_not_in_the_plan_is_refused(dataset, tmp_path, kind, unit):
    plan = plan_of(kind, dataset, tmp_path / "out")
    for call in (plan.rows, plan.files, lambda unit: run_unit(plan, unit)):
        with pytest.raises(ArgumentError, match=f"no unit {unit}: this export has 5, 0 to 4"):
            call(unit)
    assert list(tmp_path.iterdir()) == []


@each_format
def test_integers_of_numpy_are_integers(dataset, tmp_path, undisturbed, kind):
    options = {name: np.int64(value) if isinstance(value, int) else value for name, value in EXPORTS[kind].items()}
    plan = plan_export(dataset, tmp_path / kind, format=kind, **options)
    for unit in np.arange(len(plan)):
        run_unit(plan, unit)
    finish(plan)
    assert contents(tmp_path / kind) == undisturbed[kind]


def test_bits_to_keep_may_be_an_integer_of_numpy(dataset, tmp_path):
    export_zarr(dataset, tmp_path / "a.zarr", keep_bits=np.int64(5))
    export_zarr(dataset, tmp_path / "b.zarr", keep_bits=5)
    assert contents(tmp_path / "a.zarr") == contents(tmp_path / "b.zarr")


@each_format
def test_a_plan_travels_to_another_process_and_means_the_same_there(dataset, tmp_path, undisturbed, kind):
    plan = plan_of(kind, dataset, tmp_path / "out")
    (tmp_path / "plan.pickle").write_bytes(pickle.dumps(plan))
    code = """
        import pickle, sys
        from cryolike_data.export import run_unit
        plan = pickle.load(open(sys.argv[1], "rb"))
        for unit in plan.units:
            run_unit(plan, unit)
    """
    assert (done := run_python(code, tmp_path / "plan.pickle")).returncode == 0, done.stderr
    finish(plan)
    assert contents(tmp_path / "out") == undisturbed[kind]


@each_format
def test_a_pickled_plan_is_about_as_large_as_the_columns_of_its_particles(tmp_path, kind):
    n = 10_000
    write_stack(tmp_path / "J1/extract/stack_0.mrc", np.zeros((1, BOX, BOX), "f4"))
    table, _ = write_particles(tmp_path, 2, box=BOX, stacks=1)
    rows = np.load(table, allow_pickle=False)
    with table.open("wb") as file:
        np.save(file, np.repeat(rows, n // 2))
    dataset = IndexedDataset(table)
    columns = sum(column.nbytes for column in dataset.particles.columns().values())
    assert len(pickle.dumps(plan_of(kind, dataset, tmp_path / "out"))) < columns + 20_000


def test_a_name_in_zarr_means_a_store(dataset, tmp_path):
    assert plan_export(dataset, tmp_path / "a.zarr").format.kind == "zarr"
    assert plan_export(dataset, f"{tmp_path}/a.zarr/").format.kind == "zarr"
    assert plan_export(dataset, "memory://bucket/a.zarr").format.kind == "zarr"


@pytest.mark.parametrize("format", [None, "h5", "ZARR"])
def test_a_format_that_is_not_known_is_refused(dataset, tmp_path, format):
    with pytest.raises(ArgumentError, match=rf"zarr, cryolike, mrc .*not {format!r}"):
        plan_export(dataset, tmp_path / "out", format=format)


@pytest.mark.parametrize(
    ("kind", "settings", "told"),
    [
        ("zarr", {"batch_size": 4}, "batch_size"),
        ("mrc", {"descriptor": None}, "descriptor"),
        ("cryolike", {"shard_bytes": 4}, "shard_bytes"),
        ("cryolike", {}, "descriptor"),
        ("zarr", {"overwrite": True}, "overwrite"),
    ],
    ids=str,
)
def test_a_setting_that_a_format_does_not_know_or_lacks_is_named(dataset, tmp_path, kind, settings, told):
    with pytest.raises(ArgumentError, match=rf"not settings of the format '{kind}'.*{told}"):
        plan_export(dataset, tmp_path / "out", format=kind, **settings)


NUMBERS = [("zarr", "shard_bytes", 5120), ("zarr", "keep_bits", 7), ("mrc", "batch_size", 5), ("cryolike", "batch_size", 5)]


@pytest.mark.parametrize(("kind", "name", "number"), [*NUMBERS, ("cryolike", "n_stacks_max", 2)])
def test_a_number_of_numpy_means_what_one_of_python_does(dataset, tmp_path, kind, name, number):
    for given in (number, np.int64(number)):
        report = run(plan_of(kind, dataset, tmp_path / "out", **{name: given}))
    assert report.written == 0
    assert report.sealed


@pytest.mark.parametrize(("kind", "name", "number"), NUMBERS)
@pytest.mark.parametrize("given", [str, float, lambda number: [number]], ids=["text", "float", "list"])
def test_a_setting_that_is_no_whole_number_is_named(dataset, tmp_path, kind, name, number, given):
    with pytest.raises(ArgumentError, match=re.escape(f"{name} is a whole number, not {given(number)!r}")):
        plan_of(kind, dataset, tmp_path / "out", **{name: given(number)})


@each_format
def test_a_subset_is_refused_with_what_to_pass_instead(dataset, tmp_path, kind):
    subset = torch.utils.data.Subset(dataset, [7, 3])
    with pytest.raises(ArgumentError, match=re.escape("not a Subset; dataset.select(subset.indices) is")):
        plan_of(kind, subset, tmp_path / "out")
    assert plan_of(kind, dataset.select(subset.indices), tmp_path / "out").dataset.particles.row.tolist() == [7, 3]


@each_format
def test_an_export_into_nobodys_home_is_refused_and_makes_no_folder(dataset, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ArgumentError, match="~nobody-by-this-name is no user's home folder"):
        run(plan_of(kind, dataset, "~nobody-by-this-name/out"))
    assert contents(tmp_path) == before


def test_a_target_that_is_a_loop_of_links_is_refused(dataset, tmp_path):
    (tmp_path / "one").symlink_to(tmp_path / "other")
    (tmp_path / "other").symlink_to(tmp_path / "one")
    for target in ("one", "one/out"):
        with pytest.raises(ExportError, match=rf"{tmp_path}/{target}.* cannot be (found|read): "):  # newer Pythons resolve it
            run(plan_of("zarr", dataset, tmp_path / target))


def test_a_file_of_an_export_that_cannot_be_read_is_named(dataset, tmp_path):
    (tmp_path / "out/.export").mkdir(parents=True)
    (tmp_path / "out/.export/plan.json").symlink_to("plan.json")
    with pytest.raises(ExportError, match=r"plan\.json cannot be read: Too many levels of symbolic links"):
        run(plan_of("zarr", dataset, tmp_path / "out"))


@each_format
def test_a_plan_of_no_particles_is_refused(dataset, tmp_path, kind):
    with pytest.raises(ArgumentError, match="no particles to export"):
        plan_of(kind, dataset.select([]), tmp_path / "out")


@each_format
def test_stacks_that_are_gone_are_all_named_before_anything_is_written(copied, tmp_path, kind):
    dataset = IndexedDataset(copied / "J1/particles.cs")
    shutil.rmtree(copied / "J1/extract")
    with pytest.raises(MissingStackError, match=r"2 of 2 stacks are gone:\n  .*stack_[01]\.mrc\n  .*stack_[01]\.mrc$"):
        plan_of(kind, dataset, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["cryolike", "mrc"])
def test_folders_are_not_written_to_a_url(dataset, kind):
    with pytest.raises(ExportError, match="Only Zarr stores can be written to a URL"):
        run(plan_of(kind, dataset, "memory://test-folders/out"))


# --- units and the end


@each_format
@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [4, 2, 0, 3, 1], [1, 1, 0, 4, 3, 4, 2, 0]], ids=str)
def test_units_in_any_order_make_what_one_call_makes(dataset, tmp_path, undisturbed, kind, order):
    plan = plan_of(kind, dataset, tmp_path / "out")
    for unit in order:
        run_unit(plan, unit)
    finish(plan)
    assert contents(tmp_path / "out") == undisturbed[kind]


@each_format
def test_a_unit_gives_its_record_and_tells_of_all_its_images(dataset, tmp_path, kind):
    told: list[tuple[int, int]] = []
    plan = plan_of(kind, dataset, tmp_path / "out")
    record = run_unit(plan, 4, advance=lambda images, size: told.append((images, size)))
    assert (record.unit, [file.name for file in record.files]) == (4, list(plan.files(4)))
    assert [file.size for file in record.files] == [(tmp_path / "out" / name).stat().st_size for name in plan.files(4)]
    assert sum(images for images, _ in told) == 3
    assert 3 * BOX * BOX * 4 <= sum(size for _, size in told) <= record.size


def test_units_in_threads_leave_torch_the_number_of_its_threads(dataset, tmp_path):
    ran = run_python(
        """
        import sys, threading, torch
        from cryolike_data import IndexedDataset, plan_export, run_unit
        plan, first, second, over = plan_export(IndexedDataset(sys.argv[1]), sys.argv[2]), *(threading.Event() for _ in range(3))
        torch.set_num_threads(4)

        def begin(*_):
            first.set()
            second.wait(60)

        def go_on(*_):
            second.set()
            over.wait(60)

        threads = [threading.Thread(target=run_unit, args=(plan, 0), kwargs={"advance": advance}) for advance in (begin, go_on)]
        threads[0].start()
        first.wait(60)
        threads[1].start()
        threads[0].join()
        over.set()
        threads[1].join()
        new = threading.Thread(target=lambda: print(torch.get_num_threads()))
        new.start()
        new.join()
        print(torch.get_num_threads())
        """,
        *(dataset.tables[0], tmp_path / "out.zarr"),
    )
    assert (ran.stdout.split(), ran.stderr) == (["4", "4"], "")


@each_format
def test_nothing_is_sealed_before_all_units_are_there(dataset, tmp_path, kind):
    plan = plan_of(kind, dataset, tmp_path / "out")
    for unit in (1, 3, 4):
        run_unit(plan, unit)
    before = contents(tmp_path / "out")
    with pytest.raises(ExportError, match=r"out cannot be sealed yet: 2 of 5 units are not there \(0, 2\)\. Run the same export again"):
        finish(plan)
    assert contents(tmp_path / "out") == before
    assert SEALS[kind] not in before


@each_format
def test_a_unit_whose_file_is_gone_is_missing(dataset, tmp_path, kind):
    plan = plan_of(kind, dataset, tmp_path / "out")
    for unit in plan.units:
        run_unit(plan, unit)
    (tmp_path / "out" / plan.files(3)[0]).unlink()
    with pytest.raises(ExportError, match=r"1 of 5 units are not there \(3\)"):
        finish(plan)
    assert SEALS[kind] not in contents(tmp_path / "out")


def test_finishing_what_was_never_begun_leaves_nothing_behind(dataset, tmp_path):
    with pytest.raises(ExportError, match=r"5 of 5 units are not there \(0, 1, 2, 3, 4\)"):
        finish(plan_of("zarr", dataset, tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


@each_format
def test_finishing_twice_changes_nothing(dataset, tmp_path, undisturbed, kind):
    plan = plan_of(kind, dataset, tmp_path / "out")
    run(plan)
    finish(plan)
    assert contents(tmp_path / "out") == undisturbed[kind]


@each_format
@pytest.mark.parametrize(
    "damage",
    [
        lambda manifest: manifest.pop("rest"),
        lambda manifest: manifest["units"][2].pop("files"),
        lambda manifest: manifest["units"][2].update(unit="two"),
        lambda manifest: manifest["rest"][0].update(parts=[[1, 2, 3]]),
        lambda manifest: manifest.update(units=None),
        lambda manifest: manifest.pop("inputs"),
        "{}",
        "[]",
        "{",
    ],
)
def test_a_damaged_manifest_is_that_of_no_export(dataset, tmp_path, undisturbed, kind, damage):
    plan = plan_of(kind, dataset, tmp_path / "out")
    run(plan)
    path = tmp_path / "out" / ("source/zarr.json" if kind == "zarr" else SEALS[kind])
    values = json.loads(path.read_text())
    if isinstance(damage, str):
        path.write_text(damage)
    else:
        damage(values["attributes"]["export"] if kind == "zarr" else values)
        path.write_text(json.dumps(values))
    before = contents(tmp_path / "out")
    for again in (lambda: run(plan), lambda: run_unit(plan, 1), lambda: finish(plan)):
        with pytest.raises((ExportExistsError, ExportError), match=r"did not write .*overwrite=True|cannot be sealed yet: 5 of 5 units"):
            again()
    assert contents(tmp_path / "out") == before
    run(plan, overwrite=True)
    assert contents(tmp_path / "out") == undisturbed[kind]


@each_format
def test_finishing_is_for_the_same_plan_only(dataset, tmp_path, kind):
    run(plan_of(kind, dataset, tmp_path / "out"))
    before = contents(tmp_path / "out")
    with pytest.raises(ExportExistsError, match="particles is 23 there and 22 here"):
        finish(plan_of(kind, dataset.select(slice(1, None)), tmp_path / "out"))
    assert contents(tmp_path / "out") == before


@each_format
def test_one_thread_and_many_write_the_same_bytes(tmp_path, kind):
    # Reductions and transforms that several threads share would differ in their last bits.
    table, _ = write_particles(tmp_path / "project", 40, box=128, stacks=1)
    code = """
        import sys
        import torch
        torch.set_num_threads(int(sys.argv[4]))
        from cryolike_data import Downsample, ImageDescriptor, IndexedDataset
        from cryolike_data.export import plan_export, run
        dataset, (kind, _, target) = IndexedDataset(sys.argv[2]), sys.argv[1:4]
        if kind == "cryolike":
            more = {"descriptor": ImageDescriptor.from_individual_values(128, 1.5)}
        else:
            more = {"downsample": Downsample(box=80)}
        run(plan_export(dataset, target, format=kind, **more))
    """
    for threads in (1, 2):
        done = run_python(code, kind, table, tmp_path / f"{threads}", threads)
        assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


# --- what is said of the images


def changed_pixels(folder: Path, dtype: str, **pixels: float) -> ParticleDataset:
    """23 particles of one stack, whose images ``i<number>`` have these values in two pixels."""
    table, _ = write_particles(folder, N, box=BOX, dtype=dtype, stacks=1)
    stack = np.memmap(folder / "J1/extract/stack_0.mrc", dtype, "r+", 1024, (N, BOX, BOX))
    places = np.load(table)["blob/idx"]
    for name, value in pixels.items():
        stack[places[int(name[1:])], 3:5, 6] = value
    stack.flush()
    return IndexedDataset(table)


@each_format
@pytest.mark.parametrize("dtype", ["f4", "f2"])
def test_images_that_are_not_finite_are_counted_in_a_warning(tmp_path, kind, dtype):
    plan = plan_of(kind, changed_pixels(tmp_path, dtype, i4=np.nan, i9=np.inf, i22=-np.inf), tmp_path / "out")
    with pytest.warns(UserWarning, match="^1 of [58] images have pixels that are NaN or infinite") as told:
        run(plan, units=range(1))
    assert len(told) == 1
    for _ in range(2):  # when they are written, and when they are there
        with pytest.warns(UserWarning, match="^3 of 23 images have pixels that are NaN or infinite") as told:
            run(plan)
        assert len(told) == 1


@pytest.mark.parametrize("kind", ["zarr", "mrc"])
@pytest.mark.parametrize(("dtype", "largest"), [("f4", 3e38), ("f2", 65504), ("u1", 255)])
def test_images_of_large_pixels_are_finite(tmp_path, kind, dtype, largest):
    report = run(plan_of(kind, changed_pixels(tmp_path, dtype, i4=largest), tmp_path / "out"))
    assert report.sealed


# --- inputs that change


def touch_stack(project: Path) -> None:
    path = project / "J1/extract/stack_1.mrc"
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 1))


def change_column(project: Path) -> None:
    table = np.load(project / "J1/particles.cs", allow_pickle=False)
    table["ctf/df1_A"][7] += 1
    with (project / "J1/particles.cs").open("wb") as file:
        np.save(file, table)


CHANGES = {
    touch_stack: "the input stacks (their paths, sizes or modification times) differ",
    change_column: "the particles or their order, optics or poses differ",
}


@each_format
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("there", ["finished", "stopped"])
def test_changed_inputs_make_another_plan(copied, tmp_path, kind, change, there):
    plan = plan_of(kind, IndexedDataset(copied / "J1/particles.cs"), tmp_path / "out")
    run(plan, units=None if there == "finished" else range(2))
    before = contents(tmp_path / "out")
    change(copied)
    with pytest.raises(ExportExistsError, match=re.escape(f"{CHANGES[change]}. Choose another place, repeat the call")):
        run(plan_of(kind, IndexedDataset(copied / "J1/particles.cs"), tmp_path / "out"))
    assert contents(tmp_path / "out") == before


SETTINGS: list[tuple[str, dict[str, Any]]] = [
    *((kind, {"dtype": "float16"}) for kind in ("zarr", "mrc")),
    *((kind, {"downsample": Downsample(box=8)}) for kind in ("zarr", "mrc")),
    ("zarr", {"shard_bytes": 6 * BOX * BOX * 4}),
    ("zarr", {"compression": "zstd"}),
    ("zarr", {"keep_bits": 7}),
    ("mrc", {"batch_size": 6}),
    ("mrc", {"star": False}),
]


@pytest.mark.parametrize(("kind", "change"), SETTINGS, ids=str)
def test_another_setting_makes_another_plan(dataset, tmp_path, undisturbed, kind, change):
    run(plan_of(kind, dataset, tmp_path / "out"))
    with pytest.raises(ExportExistsError, match=r"settings\.\w+ is .* there and .* here"):
        run(plan_of(kind, dataset, tmp_path / "out", **change))
    assert contents(tmp_path / "out") == undisturbed[kind]


@pytest.mark.parametrize("kind", ["zarr", "mrc"])
def test_another_way_to_downsample_makes_another_plan(dataset, tmp_path, kind):
    run(plan_of(kind, dataset, tmp_path / "out", downsample=Downsample(box=8)))
    before = contents(tmp_path / "out")
    for method in ("mean", "max"):
        with pytest.raises(ExportExistsError, match=rf"settings\.downsample\.method is 'fourier' there and '{method}' here"):
            run(plan_of(kind, dataset, tmp_path / "out", downsample=Downsample(box=8, method=method)))
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("other", [[], ["f4"]], ids=["8 bits alone", "beside others"])
@pytest.mark.parametrize("there", ["finished", "stopped"])
def test_8_bits_with_and_without_a_sign_are_other_inputs(tmp_path, other, there):
    for number, dtype in enumerate(["i1", *other]):
        write_stack(tmp_path / f"stack_{number}.mrc", numbered_images(N, BOX, dtype=dtype))
    n = N * (1 + len(other))
    table = write_table(
        tmp_path / "particles.cs",
        blob__path=[f"stack_{row // N}.mrc" for row in range(n)],
        blob__idx=np.arange(n, dtype="u4") % N,
        blob__psize_A=np.ones(n, "f4"),
    )
    signed, unsigned = (plan_of("zarr", IndexedDataset(table, mode0=mode0), tmp_path / "out", dtype="float32") for mode0 in MODES0)
    run(signed, units=None if there == "finished" else range(2))
    before = contents(tmp_path / "out")
    with pytest.raises(ExportExistsError, match=r"inputs.pixels_of_8_bits is 'int8' there and 'uint8' here\. Choose another"):
        run(unsigned)
    assert contents(tmp_path / "out") == before
    assert plan_of("zarr", IndexedDataset(table), tmp_path / "out", dtype="float32").about == signed.about


def test_a_stack_of_which_no_image_is_chosen_is_no_input(copied, tmp_path):
    def inputs():
        dataset = IndexedDataset(copied / "J1/particles.cs")
        others = dataset.select(lambda p: ~np.char.endswith(p.paths, "stack_1.mrc")[p.file])
        return plan_of("mrc", others, tmp_path / "out").about["inputs"]

    before = inputs()
    touch_stack(copied)
    assert inputs() == before


def use_absolute_paths(project: Path) -> None:
    """Have the table name the same stacks in another way."""
    table = np.load(project / "J1/particles.cs", allow_pickle=False)
    columns = {name.replace("/", "__"): table[name] for name in table.dtype.names}
    write_table(project / "J1/particles.cs", **columns | {"blob__path": [f"{project}/{name.decode()}" for name in table["blob/path"]]})


@each_format
def test_stacks_that_the_table_names_otherwise_make_another_plan(copied, tmp_path, kind):
    # CryoLike's files and the source of a store have these names.
    run(plan_of(kind, IndexedDataset(copied / "J1/particles.cs"), tmp_path / "out"), units=range(1))
    before = contents(tmp_path / "out")
    use_absolute_paths(copied)
    again = plan_of(kind, IndexedDataset(copied / "J1/particles.cs"), tmp_path / "out")
    with pytest.raises(ExportExistsError, match=r"holds .* not finished: the names of the stacks in the table .* differ\. Choose another"):
        run(again)
    assert contents(tmp_path / "out") == before
    run(again, overwrite=True)
    run(replace(again, target=str(tmp_path / "fresh")))
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


@each_format
def test_what_an_earlier_version_finished_is_kept_and_what_it_left_is_not_gone_on_with(dataset, tmp_path, kind):
    plan = plan_of(kind, dataset, tmp_path / "out")
    inputs = {name: value for name, value in plan.about["inputs"].items() if name != "pixels_of_8_bits"}
    earlier = replace(plan, about={name: value for name, value in plan.about.items() if name != "names"} | {"inputs": inputs})
    run(earlier, units=range(1))
    with pytest.raises(ExportExistsError, match=r"the names of the stacks in the table \(which earlier versions did not note\) differ"):
        run(plan)
    run(earlier)
    before = contents(tmp_path / "out")
    assert (run(plan).kept, finish(plan).sealed) == (5, True)
    assert contents(tmp_path / "out") == before


def test_stacks_of_another_size_or_path_are_other_inputs_whatever_their_times(copied, tmp_path):
    def inputs(project):
        return plan_of("mrc", IndexedDataset(project / "J1/particles.cs"), tmp_path / "out").about["inputs"]

    before = inputs(copied)
    moved = inputs(shutil.copytree(copied, tmp_path / "moved"))  # with their times
    path = copied / "J1/extract/stack_1.mrc"
    status = path.stat()
    with path.open("ab") as file:
        file.write(b"more")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    grown = inputs(copied)
    for other in (moved, grown):
        assert other["stacks"] != before["stacks"]
        assert other["table"] == before["table"]


@each_format
def test_what_was_made_of_stacks_that_changed_meanwhile_is_not_sealed(copied, tmp_path, kind):
    plan = plan_of(kind, IndexedDataset(copied / "J1/particles.cs"), tmp_path / "out")
    run(plan, units=plan.units)
    touch_stack(copied)
    with pytest.raises(ExportError, match=r"have changed while they were exported.*overwrite=True"):
        finish(plan)
    assert SEALS[kind] not in contents(tmp_path / "out")
    again = plan_of(kind, IndexedDataset(copied / "J1/particles.cs"), tmp_path / "out")
    assert run(again, overwrite=True).written == 5


@each_format
def test_another_version_of_the_program_may_go_on(dataset, tmp_path, undisturbed, kind):
    plan = plan_of(kind, dataset, tmp_path / "out")
    run(plan, units=range(2))
    noted = tmp_path / "out/.export/plan.json"
    noted.write_text(json.dumps(json.loads(noted.read_text()) | {"version": "0.0.1"}))
    assert run(plan).kept == 2
    assert contents(tmp_path / "out") == undisturbed[kind]


# --- going on


@each_format
def test_a_run_tells_what_it_did(dataset, tmp_path, kind):
    plan = plan_of(kind, dataset, tmp_path / "out")
    part, rest, again = run(plan, units=range(1, 3)), run(plan), run(plan)
    sizes = [sum((tmp_path / "out" / name).stat().st_size for name in plan.files(unit)) for unit in plan.units]
    for report, expected in (
        (part, {"written": 2, "kept": 0, "bytes": sum(sizes[1:3]), "sealed": False}),
        (rest, {"written": 3, "kept": 2, "bytes": sum(sizes), "sealed": True}),
        (again, {"written": 0, "kept": 5, "bytes": sum(sizes), "sealed": True, "images_per_second": 0}),
    ):
        told = report.to_dict()
        expected = expected | {"target": str(tmp_path / "out"), "format": kind, "particles": N, "units": 5}
        assert {name: told[name] for name in expected} == expected
        assert json.loads(json.dumps(told)) == told
        assert isinstance(report, ExportReport)
    assert min(part.images_per_second, part.seconds) > 0


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "gone":
        path.unlink()
    elif how == "cut short":
        path.write_bytes(content[:-1])
    elif how == "longer":
        path.write_bytes(content + b"\0")
    else:
        at = {"first byte": 0, "one bit": len(content) // 2, "last byte": len(content) - 1}[how]
        path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])


@each_format
@pytest.mark.parametrize("how", ["gone", "cut short", "longer", "first byte", "one bit", "last byte"])
@pytest.mark.parametrize("there", ["finished", "stopped"])
def test_damaged_units_are_found_and_written_again(dataset, tmp_path, undisturbed, kind, how, there):
    plan = plan_of(kind, dataset, tmp_path / "out")
    run(plan, units=None if there == "finished" else plan.units)
    damage(tmp_path / "out" / plan.files(2)[0], how)
    report = run(plan)
    assert (report.written, report.kept, report.sealed) == (1, 4, True)
    assert contents(tmp_path / "out") == undisturbed[kind]


@each_format
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"{}", b'{"unit": 1, "files": [[1]], "notes": {}}', b"\xff\xfe"])
def test_a_damaged_record_means_a_unit_that_is_written_again(dataset, tmp_path, undisturbed, kind, content):
    plan = plan_of(kind, dataset, tmp_path / "out")
    run(plan, units=plan.units)
    (tmp_path / "out/.export/units/000001.json").write_bytes(content)
    (tmp_path / "out/.export/units/.nfs00000000000a1b2c").write_bytes(content)  # of a network file system
    with pytest.raises(ExportError, match=r"1 of 5 units are not there \(1\)"):
        finish(plan)
    assert run(plan).written == 1
    assert contents(tmp_path / "out") == undisturbed[kind]


@each_format
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"particles": 23}'])
def test_a_damaged_plan_is_not_continued_unasked(dataset, tmp_path, undisturbed, kind, content):
    plan = plan_of(kind, dataset, tmp_path / "out")
    run(plan, units=range(3))
    (tmp_path / "out/.export/plan.json").write_bytes(content)
    before = contents(tmp_path / "out")
    with pytest.raises(ExportExistsError):
        run(plan)
    assert contents(tmp_path / "out") == before


@each_format
def test_a_run_stopped_between_sealing_and_tidying_up_is_whole(dataset, tmp_path, undisturbed, kind, monkeypatch):
    plan = plan_of(kind, dataset, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(plan)
    assert "plan.json" in [path.name for path in (tmp_path / "out/.export").iterdir()]
    assert {name: contents(tmp_path / "out")[name] for name in results(tmp_path / "out")} == undisturbed[kind]
    if kind == "zarr":
        assert len(ZarrDataset(tmp_path / "out")) == N
    report = run(plan)
    assert (report.written, report.kept) == (0, 5)
    assert contents(tmp_path / "out") == undisturbed[kind]


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@each_format
def test_what_dead_runs_were_writing_is_gone_in_the_end(dataset, tmp_path, undisturbed, kind):
    plan = plan_of(kind, dataset, tmp_path / "out")
    run(plan, units=range(1))
    (tmp_path / "out/.export/partial/0123456789abcdef").write_bytes(b"half a file")
    run(plan)
    assert contents(tmp_path / "out") == undisturbed[kind]


# --- replacing


@pytest.mark.parametrize("old", ["cryolike", "mrc"])
@pytest.mark.parametrize("there", ["finished", "stopped"])
def test_replacing_stacks_of_another_format_leaves_nothing_of_them(dataset, tmp_path, undisturbed, old, there):
    new = {"cryolike": "mrc", "mrc": "cryolike"}[old]
    first = plan_of(old, dataset, tmp_path / "out")
    run(first, units=None if there == "finished" else range(3))
    (tmp_path / "out/notes.txt").write_text("mine")
    with pytest.raises(ExportExistsError, match=f"format is '{old}' there and '{new}' here"):
        run(plan_of(new, dataset, tmp_path / "out"))
    run(plan_of(new, dataset, tmp_path / "out"), overwrite=True)
    (tmp_path / "out/notes.txt").unlink()
    assert contents(tmp_path / "out") == undisturbed[new]


@pytest.mark.parametrize("step", range(8))
@pytest.mark.parametrize("old", FORMATS)
def test_a_replacement_stopped_anywhere_while_it_removes_is_continued_to_the_same_end(
    dataset, tmp_path, undisturbed, old, step, monkeypatch
):
    new = {"cryolike": "mrc", "mrc": "cryolike", "zarr": "zarr"}[old]
    run(plan_of(old, dataset.select(slice(0, 12)), tmp_path / "out"))
    before = contents(tmp_path / "out")
    plan = plan_of(new, dataset, tmp_path / "out")
    remove, left = LocalPlace.remove, iter(range(step))

    def stopping(self: LocalPlace, name: str) -> None:
        if not name.startswith(".export/runs") and next(left, None) is None:
            raise KeyboardInterrupt
        remove(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(LocalPlace, "remove", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(plan, overwrite=True)
    found = {name: content for name, content in contents(tmp_path / "out").items() if not name.startswith(".export/")}
    if SEALS[new] in found:
        assert found in (before, undisturbed[new])
    elif old == "zarr":
        with pytest.raises(StackError, match="not finished"):
            ZarrDataset(tmp_path / "out")
    run(plan)
    assert contents(tmp_path / "out") == undisturbed[new]


@each_format
def test_a_replacement_stopped_before_it_notes_its_first_unit_keeps_no_record_of_the_old_one(
    dataset, tmp_path, undisturbed, kind, monkeypatch
):
    other = dataset.select(np.arange(len(dataset))[::-1])  # whose files are as large
    run(plan_of(kind, other, tmp_path / "out"), units=range(1))
    plan = plan_of(kind, dataset, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["cryolike_data.export.run"], "write_record", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(plan, overwrite=True)
    run(plan, units=range(1, len(plan)))
    with pytest.raises(ExportError, match="1 of"):
        finish(plan)
    assert run(plan).sealed
    assert contents(tmp_path / "out") == undisturbed[kind]


@each_format
def test_a_replacement_leaves_nothing_of_a_run_that_ends_while_it_begins(dataset, tmp_path, monkeypatch, undisturbed, kind):
    old, usage, left = plan_of(kind, dataset.select(slice(None, None, -1)), tmp_path / "out"), shutil.disk_usage, [range(3, 5)]
    run(old, units=range(3))

    def seen_late(folder: Path) -> Any:
        while left:
            run(old, units=left.pop())
        return usage(folder)

    plan = plan_of(kind, dataset.select(slice(UNIT)), tmp_path / "out")
    monkeypatch.setattr(shutil, "disk_usage", seen_late)
    run(plan, overwrite=True)
    assert left == []
    run(replace(plan, target=str(tmp_path / "alone")))
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def test_a_second_replacement_is_told_of_the_first_one_that_is_removing(dataset, tmp_path, monkeypatch):
    old, plan = (plan_of("zarr", dataset.select(rows), tmp_path / "out") for rows in (slice(None, None, -1), slice(UNIT)))
    run(old)
    scandir, gone = os.scandir, tmp_path / "out/ctf"

    def too_late(path: Any = ".") -> Any:
        if str(path) == str(gone) and gone.exists():
            monkeypatch.undo()
            shutil.rmtree(gone)
        return scandir(path)

    with at_work_on(LocalPlace(tmp_path / "out"), range(1)):
        monkeypatch.setattr(os, "scandir", too_late)
        with pytest.raises(ExportError, match="Another run is at work on this target: process"):
            run(plan, overwrite=True)
    assert not gone.exists()


@each_format
def test_a_part_of_the_units_is_not_for_replacing(dataset, tmp_path, kind):
    run(plan_of(kind, dataset.select([1]), tmp_path / "out"))
    before = contents(tmp_path / "out")
    with pytest.raises(ArgumentError, match="overwrite=True is for a run of all units"):
        run(plan_of(kind, dataset, tmp_path / "out"), units=range(2), overwrite=True)
    assert contents(tmp_path / "out") == before


def test_stacks_that_are_read_are_never_replaced(copied, tmp_path):
    dataset = IndexedDataset(copied / "J1/particles.cs")
    table = export_mrc(dataset, tmp_path / "out", batch_size=5)
    (tmp_path / "link").symlink_to(tmp_path / "out")
    before = contents(tmp_path / "out")
    for path in (table, tmp_path / "link/particles.cs"):
        for target in (tmp_path / "out", tmp_path / "link"):
            with pytest.raises(ExportError, match=r"holds the particles that are to be exported \(.*stack_000000\.mrcs\)"):
                export_mrc(IndexedDataset(path), target, downsample=Downsample(2), overwrite=True)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("kind", ["cryolike", "mrc"])
@pytest.mark.parametrize("there", ["finished", "stopped"])
def test_stores_and_folders_do_not_replace_each_other(dataset, tmp_path, kind, there):
    units = None if there == "finished" else range(2)
    run(plan_of("zarr", dataset, tmp_path / "store"), units=units)
    run(plan_of(kind, dataset, tmp_path / "folder"), units=units)
    before = contents(tmp_path)
    for plan in (plan_of(kind, dataset, tmp_path / "store"), plan_of("zarr", dataset, tmp_path / "folder")):
        with pytest.raises(ExportExistsError, match="choose another"):
            run(plan, overwrite=True)
    assert contents(tmp_path) == before


# --- who is at work


def claim(folder: Path, **values: Any) -> Path:
    """What a run that is at work leaves in ``.export/runs``."""
    about = {"host": "elsewhere", "machine": "another machine", "pid": 4711, "began": "1", "first": 0, "stop": 5, "seen": time.time()}
    path = folder / ".export/runs/0123.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(about | values))
    return path


@each_format
def test_two_runs_at_once_on_the_same_units_are_detected(dataset, tmp_path, undisturbed, kind):
    plan = plan_of(kind, dataset, tmp_path / "out")
    place = LocalPlace(tmp_path / "out")
    run(plan, units=range(1))
    with at_work_on(place, range(2, 4)):
        before = {name for name in contents(tmp_path / "out") if "/runs/" in name}
        told = f"Another run is at work on this target: process {os.getpid()} on {socket.gethostname()}, units 2 to 3. Wait"
        for units in (None, range(1, 3), range(3, 5)):
            with pytest.raises(ExportError, match=re.escape(told)):
                run(plan, units=units)
        assert {name for name in contents(tmp_path / "out") if "/runs/" in name} == before
        assert run(plan, units=range(4, 5)).written == 1
        assert run(plan, units=range(0, 2)).written == 1
        with pytest.raises(ExportError, match=f"cannot be sealed yet: process {os.getpid()}"):
            finish(plan)
    assert run(plan).written == 2
    assert contents(tmp_path / "out") == undisturbed[kind]


def test_units_may_be_shared_in_steps(dataset, tmp_path, undisturbed):
    plan = plan_of("zarr", dataset, tmp_path / "out")
    with at_work_on(LocalPlace(tmp_path / "out"), plan.units[0::2]):
        for units in (plan.units[::-1], plan.units[2::2], range(2, 4), range(4, 0, -2)):
            with pytest.raises(ExportError, match=r"units 0 to 4 in steps of 2\. Wait"):
                run(plan, units=units)
        assert run(plan, units=plan.units[1::2]).written == 2
    assert run(plan).written == 3
    assert contents(tmp_path / "out") == undisturbed["zarr"]


@pytest.mark.parametrize(("units", "kept"), [(range(3, 5), True), (range(0), False)])
def test_what_is_being_written_stays_while_any_run_is_at_work(dataset, tmp_path, units, kept):
    # A unit may take minutes from one piece to the next.
    plan = plan_of("zarr", dataset, tmp_path / "out")
    run(plan, units=range(1))
    partial = tmp_path / "out/.export/partial/0123456789abcdef"
    with at_work_on(LocalPlace(tmp_path / "out"), units):
        partial.write_bytes(b"half a file")
        os.utime(partial, (0, 0))
        run(plan, units=range(1, 3))
    assert partial.exists() == kept


@pytest.mark.parametrize(("silent", "kept"), [(100, True), (121, False)])
def test_what_was_written_to_two_minutes_ago_may_be_of_a_unit_that_runs_alone(dataset, tmp_path, silent, kept):
    plan = plan_of("zarr", dataset, tmp_path / "out")
    run(plan, units=range(1))
    partial = tmp_path / "out/.export/partial/0123456789abcdef"
    partial.write_bytes(b"half a file")
    os.utime(partial, (time.time() - silent,) * 2)
    run(plan, units=range(1, 2))
    assert partial.exists() == kept


def test_what_another_run_has_just_removed_is_no_error(dataset, tmp_path, undisturbed, monkeypatch):
    names = LocalPlace.names
    monkeypatch.setattr(LocalPlace, "names", lambda self, folder: [*names(self, folder), "gone"])
    run(plan_of("zarr", dataset, tmp_path / "out"))
    assert contents(tmp_path / "out") == undisturbed["zarr"]


@each_format
def test_others_may_read_what_the_umask_lets_them(dataset, tmp_path, kind):
    before = os.umask(0o027)
    try:
        run(plan_of(kind, dataset, tmp_path / "out"))
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert modes == {0o640}


def test_a_compressed_unit_is_encoded_before_its_file_is_begun(dataset, tmp_path, monkeypatch):
    plan, pieces, begun = plan_of("zarr", dataset, tmp_path / "out", compression="zstd"), Pixels.pieces, []

    def looking(self: Any, *args: Any, **kwargs: Any) -> Any:
        for piece in pieces(self, *args, **kwargs):
            begun.extend((tmp_path / "out/.export/partial").iterdir())
            yield piece

    monkeypatch.setattr(Pixels, "pieces", looking)
    run_unit(plan, 0)
    assert begun == []


def test_a_run_that_is_at_work_is_not_replaced(dataset, tmp_path):
    plan = plan_of("zarr", dataset, tmp_path / "out")
    run(plan, units=range(2))
    with at_work_on(LocalPlace(tmp_path / "out"), range(4, 5)):
        with pytest.raises(ExportError, match="Another run is at work"):
            run(plan_of("zarr", dataset.select([0]), tmp_path / "out"), overwrite=True)
        assert results(tmp_path / "out") == ["images/c/0/0/0", "images/c/1/0/0"]
    assert run(plan).kept == 2


BLOCKED = """
    import os, sys
    from cryolike_data import IndexedDataset
    from cryolike_data.export import plan_export, run
    from cryolike_data.export.zarr import ZarrFormat

    write = ZarrFormat.write_unit
    def blocked(self, dataset, unit, rows, place, advance):
        if rows.start >= 10:
            os.write(1, b"blocked\\n")
            sys.stdin.read()
        return write(self, dataset, unit, rows, place, advance)
    ZarrFormat.write_unit = blocked
    run(plan_export(IndexedDataset(sys.argv[1]), sys.argv[2], format="zarr", shard_bytes=int(sys.argv[3])))
"""


@pytest.fixture
def blocked(project: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that exports to ``out`` and hangs in its third unit."""
    code = "\n".join(line[4:] for line in BLOCKED.splitlines())
    command = [sys.executable, "-c", code, str(project / "J1/particles.cs"), str(tmp_path / "out"), str(EXPORTS["zarr"]["shard_bytes"])]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "blocked\n"
        yield process
        process.kill()


def test_a_second_process_is_refused_until_the_first_is_dead(dataset, tmp_path, undisturbed, blocked):
    plan = plan_of("zarr", dataset, tmp_path / "out")
    with pytest.raises(ExportError, match=rf"process {blocked.pid} on {socket.gethostname()}, units 0 to 4"):
        run(plan)
    os.kill(blocked.pid, signal.SIGKILL)
    blocked.wait()
    assert list((tmp_path / "out/.export/runs").iterdir()) != []
    assert run(plan).sealed
    assert contents(tmp_path / "out") == undisturbed["zarr"]


def test_a_killed_process_that_nobody_has_waited_for_is_dead(dataset, tmp_path, blocked):
    os.kill(blocked.pid, signal.SIGKILL)
    while "Z" not in Path(f"/proc/{blocked.pid}/stat").read_text().rpartition(")")[2].split()[0]:
        time.sleep(0.001)
    assert run(plan_of("zarr", dataset, tmp_path / "out")).sealed


def test_another_process_with_the_number_of_a_dead_one_is_not_at_work(dataset, tmp_path):
    plan = plan_of("zarr", dataset, tmp_path / "out")
    with at_work_on(LocalPlace(tmp_path / "out"), plan.units):
        (path,) = (tmp_path / "out/.export/runs").iterdir()
        own = json.loads(path.read_text())
    claim(tmp_path / "out", **(own | {"began": "1"}))
    assert run(plan).sealed


def test_a_run_that_ended_while_its_disk_was_away_is_not_at_work(dataset, tmp_path, undisturbed, monkeypatch):
    plan, write_unit = plan_of("zarr", dataset, tmp_path / "out"), ZarrFormat.write_unit

    def away(*_: Any) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def disturbed(*arguments: Any) -> Any:
        patch.setattr(os, "write", away)
        patch.setattr(os, "unlink", away)
        return write_unit(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ZarrFormat, "write_unit", disturbed)
        with pytest.raises((ExportError, OSError), match="Input/output error"):
            run(plan)
    assert list((tmp_path / "out/.export/runs").iterdir()) != []
    assert run(plan).sealed
    assert results(tmp_path / "out") == list(undisturbed["zarr"])


@pytest.mark.parametrize("own", [False, True], ids=["of another user", "of this user, where there is no /proc"])
@pytest.mark.parametrize("hides", [FileNotFoundError, PermissionError])
def test_a_run_of_which_the_system_does_not_tell_when_it_began_counts_as_one_on_another_machine(dataset, tmp_path, monkeypatch, hides, own):
    plan, there = plan_of("zarr", dataset, tmp_path / "out"), open
    with at_work_on(LocalPlace(tmp_path / "out"), plan.units):
        (path,) = (tmp_path / "out/.export/runs").iterdir()
        other = json.loads(path.read_text()) | {"pid": 4711}

    def hidden(name: Any, *arguments: Any, **options: Any) -> Any:
        if name == "/proc/4711/stat":
            raise hides
        return there(name, *arguments, **options)

    def kill(*_: Any) -> None:
        if not own:
            raise PermissionError

    monkeypatch.setattr("builtins.open", hidden)
    monkeypatch.setattr(os, "kill", kill)
    claim(tmp_path / "out", **other)
    with pytest.raises(ExportError, match="Another run is at work on this target: process 4711 on"):
        run(plan)
    claim(tmp_path / "out", **(other | {"seen": time.time() - 121}))
    assert run(plan).sealed


@pytest.mark.parametrize(("silent", "alive"), [(0, True), (100, True), (121, False), (1e6, False)])
def test_a_run_on_another_machine_counts_until_it_was_silent_for_two_minutes(dataset, tmp_path, silent, alive):
    plan = plan_of("zarr", dataset, tmp_path / "out")
    path = claim(tmp_path / "out", seen=time.time() - silent, first=3, stop=4)
    if not alive:
        assert run(plan).sealed
        return
    with pytest.raises(ExportError, match="process 4711 on elsewhere, units 3 to 3"):
        run(plan)
    assert run(plan, units=range(0, 3)).written == 3
    assert path.exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"{}", b'{"machine": "another", "seen": 0}', b"\xff\xfe"])
def test_what_a_power_cut_left_of_a_sign_of_life_is_in_nobodys_way(dataset, tmp_path, undisturbed, content):
    claim(tmp_path / "out").write_bytes(content)
    run(plan_of("zarr", dataset, tmp_path / "out"), units=range(2))
    claim(tmp_path / "out").write_bytes(content)
    assert run(plan_of("zarr", dataset, tmp_path / "out")).kept == 2
    assert contents(tmp_path / "out") == undisturbed["zarr"]
    claim(tmp_path / "out").write_bytes(content)
    run(plan_of("zarr", dataset.select([1]), tmp_path / "out"), overwrite=True)
    assert not (tmp_path / "out/.export").exists()


def test_a_sign_of_life_that_a_network_file_system_keeps_for_a_reader_is_nobodys(dataset, tmp_path):
    claim(tmp_path / "out").rename(kept := tmp_path / "out/.export/runs/.nfs00000000000a1b2c")
    assert run(plan_of("zarr", dataset, tmp_path / "out")).sealed
    assert kept.exists()


def test_a_run_keeps_making_itself_known(tmp_path, monkeypatch):
    monkeypatch.setattr("cryolike_data.export.state._HEARTBEAT_SECONDS", 0.001)
    with at_work_on(LocalPlace(tmp_path), range(3)):
        (path,) = (tmp_path / ".export/runs").iterdir()
        first = json.loads(path.read_text())["seen"]
        deadline = time.monotonic() + 30
        while json.loads(path.read_text())["seen"] == first:
            assert time.monotonic() < deadline
    assert list((tmp_path / ".export/runs").iterdir()) == []


def test_a_run_whose_sign_of_life_cannot_be_written_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("cryolike_data.export.state._HEARTBEAT_SECONDS", 0.001)
    tried = []

    def failing(*_: Any) -> None:
        tried.append(1)
        raise OSError(28, "No space left on device")

    with at_work_on(LocalPlace(tmp_path), range(3)):
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", failing)
            deadline = time.monotonic() + 30
            while len(tried) < 3:
                assert time.monotonic() < deadline
        assert len(living_runs(LocalPlace(tmp_path), range(3))) == 1


@pytest.mark.parametrize(
    "where", [(threading.Thread, "start"), (threading.Thread, "join"), (LocalPlace, "remove")], ids=["start", "join", "remove"]
)
def test_a_process_that_lives_on_after_ctrl_c_is_not_at_work(dataset, tmp_path, undisturbed, where, monkeypatch):
    monkeypatch.setattr("cryolike_data.export.state._HEARTBEAT_SECONDS", 0.001)
    plan, (owner, name) = plan_of("zarr", dataset, tmp_path / "out"), where
    done, interrupted = getattr(owner, name), []

    def interrupted_once(self: Any, *args: Any) -> None:
        ours = isinstance(self, LocalPlace) or self.name == "cryolike-export"
        if ours and not interrupted and threading.current_thread() is threading.main_thread():
            interrupted.append(1)
            if name == "start":
                done(self)
            raise KeyboardInterrupt
        done(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted_once)
        with pytest.raises(KeyboardInterrupt), at_work_on(LocalPlace(tmp_path / "out"), plan.units):
            pass
    deadline = time.monotonic() + 30
    while "cryolike-export" in own_threads():
        assert time.monotonic() < deadline
    assert run(plan).sealed
    assert contents(tmp_path / "out") == undisturbed["zarr"]


def test_several_that_begin_at_the_same_moment_do_not_take_each_other_for_strangers(dataset, tmp_path, monkeypatch, undisturbed):
    # One looks, finds nothing, and looks again for files that are in the way: by then the other has written its first unit.
    plan = plan_of("zarr", dataset, tmp_path / "out")
    leftovers, begun = type(plan.format).leftovers, []

    def late(self: Any, place: Any) -> list[str]:
        if not begun:
            begun.append(1)
            run(plan, units=range(2, 5))
        return leftovers(self, place)

    monkeypatch.setattr(type(plan.format), "leftovers", late)
    assert run(plan, units=range(0, 2)).written == 2
    finish(plan)
    assert contents(tmp_path / "out") == undisturbed["zarr"]


# --- room on the disk


@each_format
def test_a_disk_that_is_too_small_is_told_before_the_first_byte(dataset, tmp_path, monkeypatch, kind):
    usage = namedtuple("usage", "total used free")
    asked = []

    def small(folder: Any) -> Any:
        asked.append(Path(folder))
        return usage(10**9, 0, plan.needed_bytes - 1)

    plan = plan_of(kind, dataset, tmp_path / "new/out")
    monkeypatch.setattr(shutil, "disk_usage", small)
    with pytest.raises(ExportError, match=r"out needs .* and the disk has .* free"):
        run(plan)
    assert asked == [tmp_path]
    assert list(tmp_path.iterdir()) == []


def test_room_that_a_replacement_sets_free_counts(dataset, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    run(plan_of("zarr", dataset.select([0]), tmp_path / "out"))
    plan = plan_of("zarr", dataset, tmp_path / "out")
    before = contents(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**9, 0, 0))
    with pytest.raises(ExportError, match="the disk has"):
        run(plan, overwrite=True)
    assert contents(tmp_path) == before
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**9, 0, (N - 1) * BOX * BOX * 4))
    assert run(plan, overwrite=True).sealed


# --- sharing the work


@pytest.mark.parametrize(("text", "expected"), [("0/1", range(0, 10)), ("0/4", range(0, 2)), ("1/4", range(2, 5)), ("3/4", range(7, 10))])
def test_a_range_of_units_is_a_part_of_all(text, expected):
    assert unit_range(text, 10) == expected


@pytest.mark.parametrize("parts", [1, 3, 7, 50])
@pytest.mark.parametrize("count", [1, 7, 20])
def test_all_ranges_together_are_all_units_once(parts, count):
    ranges = [unit_range(f"{part}/{parts}", count) for part in range(parts)]
    assert [unit for units in ranges for unit in units] == list(range(count))
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


@pytest.mark.parametrize("text", ["", "1", "4/4", "5/4", "-1/4", "0/0", "a/b", "0/4/2", "1.0/4", "0:4", "/", "0/"])
def test_a_range_of_no_meaning_is_refused(text):
    with pytest.raises(ArgumentError, match=r"counted from 0, such as 0/4 to 3/4"):
        unit_range(text, 10)


def test_a_part_without_units_does_nothing_and_is_no_error(dataset, tmp_path, undisturbed):
    plan = plan_of("zarr", dataset, tmp_path / "out")
    for part in range(7):
        run(plan, units=unit_range(f"{part}/7", len(plan)))
    finish(plan)
    assert contents(tmp_path / "out") == undisturbed["zarr"]


# --- progress


def test_without_a_terminal_lines_are_logged_every_so_often(dataset, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("cryolike_data.progress._EVERY", 0)
    caplog.set_level(logging.INFO, "cryolike_data")
    plan = plan_of("zarr", dataset, tmp_path / "particles.zarr")
    run(plan, units=range(1))
    caplog.clear()
    run(plan)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "particles.zarr: 5 of 23 images are there already."
    pattern = r"particles\.zarr: (\d+) of 23 images \(\d+ %\), \d+ images/s, .*B/s, \d+ s left"
    found = [re.fullmatch(pattern, line) for line in lines[1:]]
    assert None not in found
    assert sorted(int(match[1]) for match in found if match)[-1] == 23
    assert len(found) == 4


def test_lines_tell_what_was_done_since_the_work_began_every_half_minute(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "cryolike_data")
    clock = count(0, 10)
    monkeypatch.setattr("cryolike_data.progress.time", SimpleNamespace(monotonic=clock.__next__, time=time.time))
    with Progress("work", 1260, show=None) as progress:
        progress.skip(60)
        next(clock)  # to find out what is there takes a while
        progress.start()
        for _ in range(12):
            progress.advance(100)
    assert [record.getMessage() for record in caplog.records] == [
        "work: 60 of 1260 images are there already.",
        "work: 360 of 1260 images (29 %), 10 images/s, 90 s left",
        "work: 660 of 1260 images (52 %), 10 images/s, 60 s left",
        "work: 960 of 1260 images (76 %), 10 images/s, 30 s left",
        "work: 1260 of 1260 images (100 %), 10 images/s, 0 s left",
    ]


def test_few_lines_are_logged_of_a_short_run(dataset, tmp_path, caplog, capsys):
    caplog.set_level(logging.INFO, "cryolike_data")
    run(plan_of("zarr", dataset, tmp_path / "out"))
    assert caplog.records == []
    assert capsys.readouterr() == ("", "")


def test_a_bar_is_shown_when_asked_for(dataset, tmp_path, capsys, caplog):
    caplog.set_level(logging.INFO, "cryolike_data")
    plan = plan_of("zarr", dataset, tmp_path / "particles.zarr")
    run(plan, progress=True)
    shown = capsys.readouterr().err.split("\r")[-1]
    assert shown.startswith("particles.zarr: 100%")
    assert "23/23" in shown
    assert caplog.records == []


@pytest.mark.parametrize("progress", [None, True])
def test_a_process_without_an_error_stream_exports(dataset, tmp_path, monkeypatch, progress):
    monkeypatch.setattr(sys, "stderr", None)
    assert run(plan_of("zarr", dataset, tmp_path / "out"), progress=progress).sealed


def test_nothing_is_shown_when_not_wanted(dataset, tmp_path, monkeypatch, caplog, capsys):
    monkeypatch.setattr("cryolike_data.progress._EVERY", 0)
    caplog.set_level(logging.INFO, "cryolike_data")
    run(plan_of("zarr", dataset, tmp_path / "out"), progress=False)
    assert [record for record in caplog.records if "images/s" in record.getMessage()] == []
    assert capsys.readouterr() == ("", "")


# --- threads and memory that stay behind


@each_format
def test_nothing_goes_on_after_an_error(dataset, tmp_path, kind, monkeypatch):
    plan, threads = plan_of(kind, dataset, tmp_path / "out"), torch.get_num_threads()
    write = type(plan.format).write_unit

    def failing(self: Any, dataset: Any, unit: int, *args: Any) -> Any:
        if unit == 2:
            raise MemoryError
        return write(self, dataset, unit, *args)

    monkeypatch.setattr(type(plan.format), "write_unit", failing)
    with pytest.raises(MemoryError):
        run(plan)
    before = contents(tmp_path / "out")
    assert not [name for name in before if "partial/" in name or "runs/" in name or name == SEALS[kind]]
    assert torch.get_num_threads() == threads
    assert contents(tmp_path / "out") == before


def test_images_of_every_kind_of_source_have_plans(dataset, tmp_path):
    # A store as the source of another export.
    export_zarr(dataset, tmp_path / "a.zarr", **EXPORTS["zarr"])
    export_mrc(ZarrDataset(tmp_path / "a.zarr"), tmp_path / "mrc", **EXPORTS["mrc"])
    found = IndexedDataset(tmp_path / "mrc/particles.cs")
    assert torch.equal(found.read(slice(None)), dataset.read(slice(None)))
    assert torch.equal(found.read(slice(None)), torch.from_numpy(numbered_images(N, BOX)))
    grid = ImageDescriptor.from_individual_values(BOX, 1.5, n_inplanes=8)
    export_cryolike(ZarrDataset(tmp_path / "a.zarr"), tmp_path / "cryolike", descriptor=grid)
    assert (tmp_path / "cryolike/export.json").is_file()
