"""Going through particles stretch by stretch: the same columns as all at once, of tables that are read no further than that."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import ctf_columns, uids, write_particles, write_table

from cryolike_data import (
    ImageDescriptor,
    IndexedDataset,
    ParticleDataset,
    Particles,
    ZarrDataset,
    export_cryolike,
    export_zarr,
    particles,
)
from cryolike_data.cryosparc.table import Table, read_table
from cryolike_data.export import plan_export, run_unit
from cryolike_data.fingerprint import fingerprint

N = 50
POSE = np.arange(3 * N, dtype="f4").reshape(N, 3)
ALIGNED: dict[str, Any] = {
    "alignments3D__pose": POSE,
    "alignments3D__shift": POSE[:, :2] + 1,
    "alignments3D__psize_A": np.full(N, 1.5, "f4"),
    "alignments3D__split": np.arange(N, dtype="u4") % 2,
}


@pytest.fixture
def rows_read(monkeypatch: pytest.MonkeyPatch) -> list[list[int] | None]:
    """Which rows of tables were loaded, None for all, in order; no table has few rows."""
    monkeypatch.setattr(particles, "FEW_ROWS", 0)
    read: list[list[int] | None] = []
    load = Table.load

    def noted(table: Table, wanted: Callable[[str], bool], *, rows: np.ndarray | None = None, **how: Any) -> Table:
        read.append(None if rows is None else rows.tolist())
        return load(table, wanted, rows=rows, **how)

    monkeypatch.setattr(Table, "load", noted)
    return read


def in_order(folder: Path) -> ParticleDataset:
    return IndexedDataset(write_particles(folder, N, **ALIGNED)[0])


def joined(folder: Path) -> ParticleDataset:
    """A table whose optics lie in another one, in another order, and its poses in a third one, in the same order."""
    names = [*ctf_columns(N), *ALIGNED]
    blob, _ = write_particles(folder, N, **dict.fromkeys(names))
    mixed = np.random.default_rng(1).permutation(N)
    optics = write_table(folder / "J1/optics.cs", uid=uids(N)[mixed], **{name: column[mixed] for name, column in ctf_columns(N).items()})
    poses = write_table(folder / "J1/poses.cs", uid=uids(N), **ALIGNED)
    return IndexedDataset(blob, passthrough=[optics, poses])


def in_zarr(folder: Path) -> ParticleDataset:
    return ZarrDataset(export_zarr(in_order(folder), folder / "store", progress=False))


SELECTED: dict[str, Callable[[ParticleDataset], ParticleDataset]] = {
    "all": lambda ds: ds,
    "part": lambda ds: ds.select(slice(7, 41)),
    "every ninth": lambda ds: ds.select(slice(None, None, 9)),
    "shuffled": lambda ds: ds.select(np.random.default_rng(2).permutation(N)),
    "twice": lambda ds: ds.select([3, 3, 30, 2]).select([1, 3, 0]),
    "already read": lambda ds: (ds.particles.ctf, ds)[1],
}


@pytest.mark.parametrize("select", SELECTED)
@pytest.mark.parametrize("make", [in_order, joined, in_zarr])
@pytest.mark.parametrize(("size", "few"), [(1, 0), (16, 0), (16, N), (1000, 0)])
def test_stretches_make_up_the_columns(
    make: Callable[[Path], ParticleDataset], select: str, size: int, few: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(particles, "FEW_ROWS", few)
    ds = make(tmp_path)
    stretches = list(SELECTED[select](ds).particles.stretches(size))
    whole = SELECTED[select](make(tmp_path / "again")).particles.columns()
    assert {len(part) for part in stretches[:-1]} <= {size}
    for name, column in whole.items():
        parts = [part.columns()[name] for part in stretches]
        assert {part.dtype for part in parts} == {column.dtype}
        np.testing.assert_array_equal(np.concatenate(parts), column, err_msg=name)
    assert all(part.columns().keys() == whole.keys() for part in stretches)


@pytest.mark.parametrize(
    ("there", "all_of_it"),
    [
        (lambda here: here, None),
        (lambda here: pickle.loads(pickle.dumps(here)), None),
        (lambda here: here[::-1][::-1], list(range(N))),
    ],
    ids=["here", "another process", "selected"],
)
def test_no_more_of_a_table_is_read_than_the_stretch(
    tmp_path: Path, rows_read: list[list[int] | None], there: Callable[[Particles], Particles], all_of_it: list[int] | None
) -> None:
    all_rows = there(in_order(tmp_path).particles)
    for part in all_rows.stretches(20):
        assert part.uid.tolist() == uids(N)[part.row].tolist()
    assert rows_read == [list(range(20)), list(range(20, 40)), list(range(40, 50))]
    _ = all_rows.uid
    assert rows_read[3:] == [all_of_it]
    assert [len(part.uid) for part in all_rows.stretches(20)] == [20, 20, 10]
    assert len(rows_read) == 4  # they were there already


def test_columns_of_few_particles_are_read_once_and_kept(
    tmp_path: Path, rows_read: list[list[int] | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(particles, "FEW_ROWS", N)
    dataset = in_order(tmp_path)
    grid = ImageDescriptor.from_individual_values(dataset.box, dataset.pixel_size)
    export_cryolike(dataset, tmp_path / "out", descriptor=grid, batch_size=20, fourier=False, progress=False)
    assert rows_read == [None]


def test_a_stack_of_cryolike_reads_its_own_rows(tmp_path: Path, rows_read: list[list[int] | None]) -> None:
    dataset = in_order(tmp_path)
    grid = ImageDescriptor.from_individual_values(dataset.box, dataset.pixel_size)
    plan = plan_export(dataset, tmp_path / "out", format="cryolike", descriptor=grid, batch_size=20, fourier=False)
    del rows_read[:]
    for unit in plan.units:
        run_unit(plan, unit)
    assert rows_read == [list(range(20)), list(range(20, 40)), list(range(40, 50))]


def test_one_row_without_a_unit_leaves_out_the_shifts_of_all(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    unit = np.full(N, 1.5, "f4")
    unit[-1] = 0
    ds = IndexedDataset(write_particles(tmp_path, N, **ALIGNED | {"alignments3D__psize_A": unit})[0])
    with caplog.at_level(logging.WARNING, "cryolike_data"):
        assert [part.shift_A for part in ds.particles.stretches(20)] == [None] * 3
        assert ds.particles.shift_A is None
    assert [record.getMessage().count("the shifts are left out") for record in caplog.records] == [1]


@given(rows=st.lists(st.integers(0, N - 1), max_size=30))
def test_any_rows_of_a_table_are_loaded_in_their_order(rows: list[int], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.cs"
    if not path.exists():
        write_table(path, uid=uids(N), **ctf_columns(N))
    table = read_table(path)
    chosen = np.array(rows, np.int64)
    loaded = table.load(lambda name: name != "ctf/df2_A", rows=chosen)
    assert "ctf/df2_A" not in loaded
    assert len(loaded) == len(rows)
    for name in loaded.fields:
        np.testing.assert_array_equal(loaded[name], table[name][chosen])


def test_a_fingerprint_does_not_depend_on_how_columns_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ds = in_order(tmp_path)
    piecewise = fingerprint(ds)
    stretches = Particles.stretches
    monkeypatch.setattr(Particles, "stretches", lambda particles: stretches(particles, 7))
    assert fingerprint(ds) == piecewise
    _ = ds.particles.uid
    assert fingerprint(ds) == piecewise
    assert fingerprint(ds.select(slice(None, None, -1)))["table"] != piecewise["table"]
