"""Inputs and targets of others: what is closed to this user is an error of ours that says so. Modes bind root here, too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import EXPORTS, contents, run_python, uids, with_mode, write_job, write_particles, write_table

import cryolike_data.arena as arena_module
from cryolike_data import (
    ImageDescriptor,
    IndexedDataset,
    JobDirectoryDataset,
    PolarGrid,
    ZarrDataset,
    convert_particle_stacks_from_indexed_cryosparc,
    export_zarr,
)
from cryolike_data.cli import main
from cryolike_data.demo import write_project
from cryolike_data.errors import CryolikeDataError, ExportError, MissingStackError, PairingError, StackError, TableError
from cryolike_data.export import finish, plan_export, run
from cryolike_data.likelihood import Templates, stream_likelihood
from cryolike_data.on_disk import is_file, is_folder


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_particles(tmp_path_factory.mktemp("project"), 12, box=16)[0]


@pytest.fixture
def ds(table: Path) -> IndexedDataset:
    return IndexedDataset(table)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder whose mode is changed."""
    (tmp_path / "of somebody").mkdir()
    return tmp_path / "of somebody"


# --- inputs

OPENERS: dict[str, Callable[[Path, Path], object]] = {
    "table": lambda folder, table: IndexedDataset(folder / "a.cs"),
    "group": lambda folder, table: IndexedDataset(folder / "a.csg"),
    "folder of stacks": lambda folder, table: IndexedDataset(table, folder=folder / "extract"),
    "project": lambda folder, table: JobDirectoryDataset(folder, 4),
    "job folder": lambda folder, table: JobDirectoryDataset(folder.parent, 4),
    "store": lambda folder, table: ZarrDataset(folder / "a.zarr"),
    "params file": lambda folder, table: ImageDescriptor.load(folder / "params.npz"),
    "volume": lambda folder, table: Templates.from_volume(folder / "volume.mrc", PolarGrid.of_box(16, n_inplanes=8), step_deg=90),
}


@pytest.mark.parametrize("what", OPENERS)
def test_what_lies_in_a_closed_folder_is_not_said_to_be_missing(tmp_path: Path, table: Path, what: str) -> None:
    folder = tmp_path / "J4"
    folder.mkdir()
    with with_mode(folder, 0), pytest.raises(CryolikeDataError, match=r"J4/[^ ]+ cannot be (reached|read): Permission denied\.$"):
        OPENERS[what](folder, table)


def test_a_closed_folder_in_place_of_a_table_is_said_to_be_a_folder(folder: Path) -> None:
    with with_mode(folder, 0), pytest.raises(MissingStackError, match=r"it is a folder; give the \.cs file in it\.$"):
        IndexedDataset(folder)


def test_jobs_that_are_there_are_told_beside_a_link_to_what_is_closed(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "J7").symlink_to(folder / "J7")
    (tmp_path / "J8").mkdir()
    with with_mode(folder, 0), pytest.raises(MissingStackError, match=r"no job folder .*/J9; there are J8\.$"):
        JobDirectoryDataset(tmp_path, 9)


def record_behind_a_link(job: Path, table: Path) -> Path:
    (job / "restacked_particles.cs").symlink_to(table)
    return table.parent


def record_of_a_group(job: Path, table: Path) -> Path:
    (job / "particles.csg").write_text("results: {blob: {metafile: J5/record.cs, type: particle.blob}}")
    return table.parent


def group_in_a_closed_folder(job: Path, table: Path) -> Path:
    record_of_a_group(job, table)
    return job


@pytest.mark.parametrize("record", [record_behind_a_link, record_of_a_group, group_in_a_closed_folder])
def test_a_record_that_contradicts_the_sequence_is_not_passed_over_because_it_is_closed(
    tmp_path: Path, record: Callable[[Path, Path], Path]
) -> None:
    job, _ = write_job(tmp_path, 4, [2, 2])
    names = [f"J4/restack/batch_{k // 2:06d}_restacked.mrc" for k in range(4)]
    columns = {"blob__path": names, "blob__idx": np.arange(4, dtype="u4") % 2}
    (tmp_path / "J5").mkdir()
    closed = record(job, write_table(tmp_path / "J5/record.cs", uid=uids(4, seed=4)[::-1], **columns))
    with pytest.raises(PairingError, match="4 of 4 rows belong to another image"):
        JobDirectoryDataset(tmp_path, 4)
    with with_mode(closed, 0o111 if closed == job else 0), pytest.raises(MissingStackError, match=r" cannot be .*: Permission denied\.$"):
        JobDirectoryDataset(tmp_path, 4)


@pytest.mark.parametrize("name", ["absent", "n" * 300, "a\0b", "loop", "file/inside"])
def test_what_cannot_be_at_all_is_missing_and_not_closed(tmp_path: Path, name: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    assert not is_file(tmp_path / name)
    assert not is_folder(tmp_path / name)
    with pytest.raises(MissingStackError, match="does not exist or is not a file"):
        ImageDescriptor.load(tmp_path / name)


@pytest.mark.parametrize("options", [["a.cs"], ["a.cs", "--half", "A"], ["a.zarr"], [".", "--job", "4"]], ids=" ".join)
def test_the_command_line_says_of_what_is_closed_that_it_cannot_be_reached(
    folder: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    with with_mode(folder, 0):
        assert main(["info", f"{folder}/{options[0]}", *options[1:]]) == 1
    assert capsys.readouterr().err.endswith(" cannot be reached: Permission denied.\n")


# In a process of its own: zarr reads in threads, which others may have started as root.
OPEN_CLOSED = """
    import sys
    from pathlib import Path
    from support import with_mode
    from cryolike_data import ZarrDataset
    from cryolike_data.errors import StackError

    store, *closed = sys.argv[1:]
    for name in closed:
        with with_mode(Path(store, name), 0):
            try:
                ZarrDataset(store).particles.uid
            except StackError as error:
                print(error)
"""


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_what_is_closed_of_a_store_is_told_without_the_advice_to_copy_it(ds: IndexedDataset, tmp_path: Path, compression: Any) -> None:
    export_zarr(ds, tmp_path / "a.zarr", compression=compression)
    closed = ["", "zarr.json", "images", "images/c/0/0/0", "uid", "uid/c/0", "source"]
    result = run_python(OPEN_CLOSED, tmp_path / "a.zarr", *closed)
    assert result.stdout.count("Permission denied") == len(closed), result.stderr
    assert "again" not in result.stdout


def test_stacks_that_are_closed_while_they_are_read_are_an_error_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_module, "CHECK_EVERY", -1.0)
    dataset = IndexedDataset(write_particles(tmp_path, 6)[0])
    dataset.batch(range(6))
    with with_mode(tmp_path / "J1/extract", 0), pytest.raises(StackError, match=r"mrc cannot be reached any more: Permission denied"):
        dataset.batch(range(6))


def test_a_table_that_is_closed_before_its_columns_are_asked_for_is_an_error_of_ours(table: Path) -> None:
    particles = IndexedDataset(table).particles
    with with_mode(table, 0), pytest.raises(TableError, match=r"particles\.cs cannot be read any more: Permission denied"):
        _ = particles.uid


def test_stacks_that_are_closed_before_an_export_is_sealed_are_an_error_of_ours(tmp_path: Path) -> None:
    plan = plan_export(IndexedDataset(write_particles(tmp_path, 6)[0]), tmp_path / "out", format="mrc", star=False)
    run(plan, units=plan.units)
    with with_mode(tmp_path / "J1/extract", 0), pytest.raises(StackError, match=r"mrc cannot be reached any more: Permission denied"):
        finish(plan)


# --- targets


def likelihood(dataset: IndexedDataset, output: Path) -> None:
    grid = PolarGrid.of_box(16, resolution_factor=0.5, n_inplanes=8)
    templates = Templates.from_volume(torch.ones(16, 16, 16), grid, rotvecs=[[0, 0, 0]], pixel_size=1.5)
    stream_likelihood(dataset, templates, [[0.0, 0.0]], output=output, progress=False)


WRITERS: dict[str, Callable[[IndexedDataset, Path], object]] = {
    **{kind: lambda ds, out, kind=kind: run(plan_export(ds, out, format=kind, **EXPORTS[kind]), progress=False) for kind in EXPORTS},
    "likelihood": likelihood,
    "converter": lambda ds, out: convert_particle_stacks_from_indexed_cryosparc(
        ImageDescriptor.from_individual_values(16, 1.5, n_inplanes=8), ds.tables[0], folder_output=out, flag_plots=False
    ),
    "demo": lambda ds, out: write_project(out, n_particles=12, box=16, n_stacks=2),
    "params file": lambda ds, out: ImageDescriptor.from_individual_values(16, 1.5).save(out.with_suffix(".npz")),
}


@pytest.mark.parametrize("mode", [0, 0o444, 0o555])
@pytest.mark.parametrize("what", WRITERS)
def test_a_target_in_a_folder_that_cannot_be_written_is_an_export_error(ds: IndexedDataset, folder: Path, what: str, mode: int) -> None:
    with with_mode(folder, mode), pytest.raises(ExportError, match=rf"{folder}.* cannot be .*Permission denied") as caught:
        WRITERS[what](ds, folder / "out")
    assert "again" not in str(caught.value)
    assert not list(folder.iterdir())


@pytest.mark.parametrize("mode", [0, 0o333, 0o444, 0o555])
@pytest.mark.parametrize("what", ["zarr", "likelihood", "demo"])  # the others leave what else is in their folder alone
def test_a_folder_of_somebody_else_as_the_target_is_an_export_error(ds: IndexedDataset, folder: Path, what: str, mode: int) -> None:
    with with_mode(folder, mode), pytest.raises(ExportError, match=rf"{folder}.* cannot be .*Permission denied"):
        WRITERS[what](ds, folder)
    assert not list(folder.iterdir())


def test_a_demo_project_that_is_closed_is_not_said_to_be_something_else(folder: Path) -> None:
    write_project(folder, n_particles=12, box=16, n_stacks=2)
    with with_mode(folder, 0o444), pytest.raises(ExportError, match=rf"{folder} cannot be .*Permission denied"):
        write_project(folder, n_particles=12, box=16, n_stacks=2)


def test_results_of_a_likelihood_that_cannot_be_read_are_not_taken_for_something_else(ds: IndexedDataset, tmp_path: Path) -> None:
    likelihood(ds, tmp_path / "out")
    with with_mode(tmp_path / "out/likelihood.json", 0), pytest.raises(ExportError, match=r"Permission denied: .*likelihood\.json"):
        likelihood(ds, tmp_path / "out")


def test_finished_results_of_somebody_else_can_be_looked_at_and_not_continued(ds: IndexedDataset, tmp_path: Path) -> None:
    likelihood(ds, tmp_path / "out")
    file = tmp_path / "out/likelihood.npy"
    content = file.read_bytes()
    with with_mode(tmp_path / "out", 0o555), with_mode(file, 0o444):
        likelihood(ds, tmp_path / "out")
    assert file.read_bytes() == content
    file.write_bytes(content[:-8] + bytes(8))  # the last particle is not done
    with with_mode(file, 0o444), pytest.raises(ExportError, match=r"out cannot be written: .*Permission denied: .*likelihood\.npy"):
        likelihood(ds, tmp_path / "out")
    likelihood(ds, tmp_path / "out")
    assert file.read_bytes() == content


@pytest.mark.parametrize(
    ("kind", "closed"), [("zarr", "images/c/0/0/0"), ("zarr", "images/c/0"), ("mrc", "particles/stack_000000.mrcs"), ("mrc", "export.json")]
)
def test_a_file_of_an_export_that_is_closed_is_named(ds: IndexedDataset, tmp_path: Path, kind: str, closed: str) -> None:
    export = WRITERS[kind]
    export(ds, tmp_path / "out")
    with with_mode(tmp_path / "out" / closed, 0), pytest.raises(ExportError, match=rf"{closed}[^ ]* cannot be read: Permission denied"):
        export(ds, tmp_path / "out")


def test_claims_that_cannot_be_listed_are_an_export_error(ds: IndexedDataset, tmp_path: Path) -> None:
    plan = plan_export(ds, tmp_path / "out", format="zarr", **EXPORTS["zarr"])
    run(plan, units=range(1))
    with with_mode(tmp_path / "out/.export/runs", 0o333), pytest.raises(ExportError, match=r"runs cannot be listed: Permission denied"):
        run(plan)


@pytest.mark.parametrize("kind", EXPORTS)
def test_a_finished_export_may_be_checked_by_who_cannot_write_to_it(ds: IndexedDataset, tmp_path: Path, kind: str) -> None:
    plan = plan_export(ds, tmp_path / "out", format=kind, **EXPORTS[kind])
    run(plan)
    with with_mode(tmp_path / "out", 0o555):
        assert (run(plan).written, finish(plan).sealed) == (0, True)


@pytest.mark.parametrize(("kind", "closed"), [("zarr", "images/c/0"), ("zarr", "uid"), ("mrc", "particles"), ("cryolike", "phys")])
def test_an_export_of_which_a_part_cannot_be_removed_is_not_begun_to_be_replaced(
    ds: IndexedDataset, tmp_path: Path, kind: str, closed: str
) -> None:
    out = tmp_path / "out"
    WRITERS[kind](ds, out)
    whole = contents(out)
    others = plan_export(ds.select(slice(6)), out, format=kind, **EXPORTS[kind])
    for mode in (0, 0o333, 0o444, 0o555):
        with with_mode(out / closed, mode), pytest.raises(CryolikeDataError, match=rf"out/{closed}[^ ]* cannot be .*: Permission denied"):
            run(others, overwrite=True)
        assert contents(out) == whole
    assert run(others, overwrite=True).sealed
