"""Choosing particles on the way out: by conditions on columns, half sets, numbers and a random order, in Python and on the command line."""

from __future__ import annotations

import json
import operator
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.lib.recfunctions import repack_fields
from support import ctf_columns, numbered_images, stored_images, uids, write_job, write_particles, write_stack, write_table

from cryolike_data import IndexedDataset, ZarrDataset
from cryolike_data.cli import main
from cryolike_data.demo import DemoProject
from cryolike_data.errors import ArgumentError, RowIndexError
from cryolike_data.selection import choose

N = 40
RNG = np.random.default_rng(6)
COLUMNS: dict[str, np.ndarray] = {
    "alignments3D/alpha": RNG.uniform(0, 2, N).astype("f4"),
    "alignments3D/class": RNG.integers(0, 4, N).astype("u4"),
    "alignments3D/shift": RNG.normal(scale=3, size=(N, 2)).astype("f4"),
    "alignments3D_multi/pose": np.zeros((N, 2, 3), "f4"),
    "location/center_x_frac": RNG.uniform(0, 1, N).astype("f4"),
    "location/rank": RNG.integers(-5, 6, N).astype("i4"),
    "uid": uids(N),
}
COMPARE = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq, "=": operator.eq, "!=": operator.ne}
SCALARS = [name for name, column in COLUMNS.items() if column.ndim == 1]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A table with columns that this package makes nothing of, half sets, and a stack whose name has spaces and an "and"."""
    folder = tmp_path_factory.mktemp("project")
    columns: dict[str, Any] = {name.replace("/", "__"): column for name, column in COLUMNS.items()}
    columns["location__micrograph_path"] = [f"S1/mic_{k % 3} Ä and more.mrc" for k in range(N)]
    columns["alignments3D__split"] = (np.arange(N) % 3 == 0).astype("u4")
    columns["alignments3D__psize_A"] = np.full(N, 1.5, "f4")
    columns["alignments3D__pose"] = RNG.normal(size=(N, 3)).astype("f4")
    columns["ctf__exp_group_id"] = (np.arange(N) % 4).astype("u4")
    return write_particles(folder, N, **columns)


@pytest.fixture(scope="module")
def table(written: tuple[Path, np.ndarray]) -> np.ndarray:
    return np.load(written[0])


@pytest.fixture(scope="module")
def whole(written: tuple[Path, np.ndarray]) -> IndexedDataset:
    return IndexedDataset(written[0])


def chosen(whole: IndexedDataset, *where: str, **options: Any) -> list[int]:
    """Rows that ``choose`` takes."""
    rows: list[int] = choose(whole.particles, column=COLUMNS.__getitem__, where=where, **options).tolist()
    return rows


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def exported(table: Path, target: Path, *options: object) -> list[int]:
    """Uids of a store that the command line writes, in order."""
    assert run("export", table, target, *options) == 0
    found: list[int] = ZarrDataset(target).particles.uid.tolist()
    return found


# --- the rows that are taken


def conditions(name: str) -> st.SearchStrategy[tuple[str, str, float]]:
    """Comparisons of a column with its own values, as they are printed, and with other numbers."""
    column = COLUMNS[name]
    number = st.floats(-4, 4).map(lambda value: round(value, 3)) if column.dtype.kind == "f" else st.integers(-6, 2**64)
    return st.tuples(st.just(name), st.sampled_from(list(COMPARE)), st.sampled_from([float(str(v)) for v in column[:8]]) | number)


@given(
    where=st.lists(st.sampled_from(SCALARS[:4]).flatmap(conditions), max_size=3),
    half=st.sampled_from([None, "A", "B"]),
    every=st.none() | st.integers(1, 50),
    limit=st.none() | st.integers(1, 50),
    seed=st.none() | st.integers(0, 2**64),
    together=st.booleans(),
)
def test_the_rows_are_those_of_numpy_masks(
    whole: IndexedDataset,
    table: np.ndarray,
    where: list[tuple[str, str, float]],
    half: Any,
    every: int | None,
    limit: int | None,
    seed: int | None,
    together: bool,
) -> None:
    mask = np.ones(N, bool)
    for name, sign, value in where:
        # The shortest decimal of a number stands for that number, in the precision of the column.
        mask &= COMPARE[sign](table[name], np.float32(value) if table[name].dtype.kind == "f" else value)
    if half is not None:
        mask &= table["alignments3D/split"] == {"A": 0, "B": 1}[half]
    expected = np.flatnonzero(mask)[:: every or 1].tolist()
    texts = [f"{name} {sign} {value!r}" for name, sign, value in where]
    texts = [" and ".join(texts)] if together and texts else texts
    options = {"half": half, "every": every, "limit": limit}
    if not expected:
        with pytest.raises(ArgumentError, match=f"None of the {N} particles is left"):
            chosen(whole, *texts, shuffle=seed, **options)
        return
    found = chosen(whole, *texts, shuffle=seed, **options)
    if seed is None:
        assert found == expected[:limit]
    else:
        order = chosen(whole, *texts, shuffle=seed, half=half, every=every)
        assert sorted(order) == expected
        assert found == order[:limit]


@pytest.mark.parametrize("text", ["uid=={0}", "uid == {0}", "  uid  =  {0}  ", "uid == +{0}"])
@pytest.mark.parametrize("row", [3, 17])
def test_uids_are_compared_to_the_last_digit(whole: IndexedDataset, row: int, text: str) -> None:
    uid = COLUMNS["uid"][row]
    assert uid > 2**53
    assert chosen(whole, text.format(uid)) == [row]
    assert chosen(whole, f"uid >= {uid} and uid <= {uid}") == [row]
    assert len(chosen(whole, f"uid != {uid}")) == N - 1
    with pytest.raises(ArgumentError, match="None of the 40 particles is left"):
        chosen(whole, f"uid == {uid + np.uint64(1)}")


@pytest.mark.parametrize("text", ["uid > -1", f"uid < {2**64}", f"uid != {2**70}", "uid >= 0", "location/rank < 1e9"])
def test_numbers_that_the_column_cannot_hold_are_compared_too(whole: IndexedDataset, text: str) -> None:
    assert chosen(whole, text) == list(range(N))


def test_a_number_with_few_digits_is_equal_to_its_nearest_float32(whole: IndexedDataset) -> None:
    column = COLUMNS["alignments3D/alpha"]
    assert chosen(whole, f"alignments3D/alpha == {column[5]:.6g}") == [5]
    assert 5 not in chosen(whole, f"alignments3D/alpha != {column[5]:.6g}")


def test_one_value_of_a_vector_is_compared(whole: IndexedDataset) -> None:
    shift = COLUMNS["alignments3D/shift"]
    assert (
        chosen(whole, "alignments3D/shift[0] < 0", "alignments3D/shift[ 1 ]>=0.5")
        == np.flatnonzero((shift[:, 0] < 0) & (shift[:, 1] >= 0.5)).tolist()
    )


@pytest.mark.parametrize(
    ("condition", "told"),
    [
        ("", "is no condition"),
        ("alignments3D/alpha", "is no condition"),
        ("< 3", "is no condition"),
        ("__import__('os')", "is no condition"),
        ("alignments3D/alpha < __import__('os').getpid()", "holds numbers"),
        ("uid.__class__ == 3", "uid.__class__"),
        ("(alignments3D/alpha) < 1", "is no condition"),
        ("alignments3D/alpha < 1 and", "holds numbers|is no condition"),
        ("alignments3D/alpha < 1 or uid > 3", "holds numbers"),
        ("0 < alignments3D/alpha < 1", "0"),
        ("alignments3D/alpha <", "holds numbers"),
        ("alignments3D/alpha < low", "'low'"),
        ("uid == 0x10", "'0x10'"),
        ("alignments3D/shift < 1", r"shift\[0\] to alignments3D/shift\[1\]"),
        ("alignments3D/shift[2] < 1", r"shift\[0\] to alignments3D/shift\[1\]"),
        ("alignments3D/shift[-1] < 1", "is no condition"),
        ("alignments3D/alpha[0] < 1", r"leave out \[0\]"),
        ("alignments3D_multi/pose[0] < 1", r"alignments3D_multi/pose has \(2, 3\) values a particle"),
        ("alignments3D_multi/pose < 1", r"alignments3D_multi/pose has \(2, 3\) values a particle"),
    ],
)
def test_wrong_conditions_are_explained(whole: IndexedDataset, condition: str, told: str) -> None:
    def column(name: str) -> np.ndarray:
        if name not in COLUMNS:
            raise ArgumentError(f"There is no column {name}.")
        return COLUMNS[name]

    with pytest.raises(ArgumentError, match=told):
        choose(whole.particles, column=column, where=[condition])


@pytest.mark.parametrize("options", [{"every": 0}, {"limit": 0}, {"every": -2}, {"limit": -1}], ids=str)
def test_numbers_below_one_are_refused(whole: IndexedDataset, options: dict[str, int]) -> None:
    with pytest.raises(ArgumentError, match=f"{next(iter(options))} is at least 1"):
        chosen(whole, **options)


def test_half_sets_that_are_not_known_cannot_be_chosen(tmp_path: Path) -> None:
    table, _ = write_particles(tmp_path, 6)
    with pytest.raises(ArgumentError, match="no half sets"):
        chosen(IndexedDataset(table), half="A")


# --- the random order


def test_the_order_is_a_permutation_that_the_seed_decides(whole: IndexedDataset) -> None:
    orders = [chosen(whole, shuffle=seed) for seed in range(20)]
    assert [chosen(whole, shuffle=seed) for seed in range(20)] == orders
    assert all(sorted(order) == list(range(N)) for order in orders)
    assert len(set(map(tuple, orders))) == 20
    assert list(range(N)) not in orders


def test_every_particle_may_come_first(whole: IndexedDataset) -> None:
    first = [chosen(whole, shuffle=seed, limit=1)[0] for seed in range(400)]
    assert len(set(first)) == N


# --- the command line


@pytest.fixture
def uid(table: np.ndarray) -> np.ndarray:
    return table["uid"]


def test_columns_without_a_meaning_here_can_be_chosen_by(written: Any, table: np.ndarray, uid: np.ndarray, tmp_path: Path) -> None:
    mask = (table["alignments3D/alpha"] < 1.2) & (table["location/center_x_frac"] >= 0.25) & (table["location/rank"] != 2)
    options = ("--where", "alignments3D/alpha < 1.2", "--where", "location/center_x_frac >= 0.25 and location/rank != 2")
    assert exported(written[0], tmp_path / "a.zarr", *options) == uid[mask].tolist()
    assert 0 < mask.sum() < N


@pytest.mark.parametrize("name", ["ctf/df1_A", "ctf/defocus_u"])
def test_optics_go_by_cryosparcs_names_and_by_ours(written: Any, table: np.ndarray, uid: np.ndarray, tmp_path: Path, name: str) -> None:
    mask = table["ctf/df1_A"] < 15000
    assert exported(written[0], tmp_path / "a.zarr", "--where", f"{name} < 15000") == uid[mask].tolist()


def test_text_is_compared_as_it_is_written(written: Any, table: np.ndarray, uid: np.ndarray, tmp_path: Path) -> None:
    wanted = "S1/mic_1 Ä and more.mrc"
    mask = table["location/micrograph_path"] == wanted.encode()
    for number, condition in enumerate((f"== '{wanted}'", f'= "{wanted}"', f"== '{wanted}' and uid > 0")):
        assert exported(written[0], tmp_path / f"{number}.zarr", "--where", f"location/micrograph_path {condition}") == uid[mask].tolist()
    assert exported(written[0], tmp_path / "b.zarr", "--where", f"location/micrograph_path != '{wanted}'") == uid[~mask].tolist()
    assert (
        exported(written[0], tmp_path / "c.zarr", "--where", "blob/path == J1/extract/stack_1.mrc")
        == uid[table["blob/path"] == b"J1/extract/stack_1.mrc"].tolist()
    )


def test_one_particle_is_found_by_its_uid(written: Any, uid: np.ndarray, tmp_path: Path) -> None:
    assert uid[11] > 2**53
    assert exported(written[0], tmp_path / "a.zarr", "--where", f"uid == {uid[11]}") == [uid[11]]


def test_all_options_together(written: Any, table: np.ndarray, uid: np.ndarray, tmp_path: Path) -> None:
    mask = (table["alignments3D/split"] == 0) & (table["location/rank"] > -4)
    expected = uid[mask][::2]
    options = ("--half", "A", "--every", 2, "--where", "location/rank > -4")
    assert exported(written[0], tmp_path / "a.zarr", *options) == expected.tolist()
    shuffled = exported(written[0], tmp_path / "b.zarr", *options, "--shuffle", 3)
    assert shuffled != expected.tolist()
    assert sorted(shuffled) == sorted(expected.tolist())
    assert exported(written[0], tmp_path / "c.zarr", *options, "--shuffle", 3, "--limit", 5) == shuffled[:5]


def test_conditions_count_among_the_particles_of_a_group(written: Any, table: np.ndarray, uid: np.ndarray, tmp_path: Path) -> None:
    mask = (table["ctf/exp_group_id"] == 1) & (table["alignments3D/alpha"] < 1)
    assert exported(written[0], tmp_path / "a.zarr", "--group", 1, "--where", "alignments3D/alpha < 1") == uid[mask].tolist()


def test_columns_of_a_passthrough_can_be_chosen_by(written: Any, table: np.ndarray, uid: np.ndarray, tmp_path: Path) -> None:
    shutil.copytree(written[0].parent, tmp_path / "J1")
    bare = [name for name in table.dtype.names if not name.startswith("alignments3D/")]
    np.save(tmp_path / "J1/bare.npy", repack_fields(table[bare]))
    np.save(tmp_path / "J1/more.npy", repack_fields(table[["uid", "alignments3D/alpha"]])[RNG.permutation(N)])
    options = ("--passthrough", tmp_path / "J1/more.npy", "--where", "alignments3D/alpha < 1")
    found = exported(tmp_path / "J1/bare.npy", tmp_path / "a.zarr", *options)
    assert found == uid[table["alignments3D/alpha"] < 1].tolist()


def test_a_shuffled_store_read_in_order_is_random_and_whole(written: Any, table: np.ndarray, uid: np.ndarray, tmp_path: Path) -> None:
    assert run("export", written[0], tmp_path / "a.zarr", "--shuffle", 7) == 0
    store = ZarrDataset(tmp_path / "a.zarr")
    row = {value: place for place, value in enumerate(uid.tolist())}
    order = [row[value] for value in store.particles.uid.tolist()]
    assert order != list(range(N))
    assert sorted(order) == list(range(N))
    np.testing.assert_array_equal(store.particles.row, order)
    np.testing.assert_array_equal(store.read(slice(None)), written[1][order])
    np.testing.assert_array_equal(store.particles.pose, table["alignments3D/pose"][order])


def test_every_format_writes_the_same_order(written: Any, tmp_path: Path) -> None:
    options = ("--shuffle", 7, "--where", "alignments3D/alpha < 1.5")
    expected = exported(written[0], tmp_path / "a.zarr", *options)
    assert run("export", written[0], tmp_path / "mrc", "--format", "mrc", *options) == 0
    assert np.load(tmp_path / "mrc/particles.cs")["uid"].tolist() == expected
    stack = mrcfile.read(tmp_path / "mrc/particles/stack_000000.mrcs")
    np.testing.assert_array_equal(stack, ZarrDataset(tmp_path / "a.zarr").read(slice(None)))


def test_a_store_can_be_chosen_from_by_our_names(written: Any, table: np.ndarray, uid: np.ndarray, tmp_path: Path) -> None:
    run("export", written[0], tmp_path / "a.zarr")
    mask = (table["ctf/df1_A"] < 15000) & (table["alignments3D/shift"][:, 0] * 1.5 > 0)
    options = ("--where", "ctf/df1_A < 15000 and shift_A[0] > 0")
    assert exported(tmp_path / "a.zarr", tmp_path / "b.zarr", *options) == uid[mask].tolist()


def test_a_job_can_be_chosen_from(demo: DemoProject, tmp_path: Path) -> None:
    table = np.load(demo.folder / "J4/J4_passthrough_particles.cs")
    mask = table["ctf/df1_A"] < np.median(table["ctf/df1_A"])
    options = ("--job", 4, "--where", f"ctf/df1_A < {np.median(table['ctf/df1_A'])}")
    assert exported(demo.folder, tmp_path / "a.zarr", *options) == table["uid"][mask].tolist()


@pytest.mark.parametrize("pairing", ["sequence", "uid"])
def test_a_job_can_be_chosen_from_by_columns_of_its_table(tmp_path: Path, pairing: str) -> None:
    shift = RNG.normal(size=(7, 2)).astype("f4")
    job, _ = write_job(tmp_path, 4, [3, 4], uid=uids(7), alignments3D__shift=shift)
    order = np.arange(7) if pairing == "sequence" else np.array([3, 5, 0, 6, 1, 4, 2])
    places = [f"J4/restack/batch_{k // 3:06d}_restacked.mrc" for k in (0, 1, 2, 3, 4, 5, 5)]
    write_table(job / "restacked_particles.cs", uid=uids(7)[order], blob__path=places, blob__idx=np.array([0, 1, 2, 0, 1, 2, 3], "u4"))
    options = ("--job", 4, "--pairing", pairing, "--where", "alignments3D/shift[0] > 0")
    assert exported(tmp_path, tmp_path / "a.zarr", *options) == uids(7)[shift[:, 0] > 0].tolist()


def test_images_go_with_their_rows(demo: DemoProject, tmp_path: Path) -> None:
    table = np.load(demo.indexed)
    assert run("export", demo.indexed, tmp_path / "a.zarr", "--half", "B", "--shuffle", 1) == 0
    store = ZarrDataset(tmp_path / "a.zarr")
    rows = [np.flatnonzero(table["uid"] == value)[0] for value in store.particles.uid]
    assert sorted(rows) == np.flatnonzero(table["alignments3D/split"] == 1).tolist()
    np.testing.assert_array_equal(store.read(slice(None)), stored_images(demo.folder, table[rows]))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--where", "location/rank > 99"), f"None of the {N} particles is left"),
        (("--where", "__import__('os').system('touch hacked')"), "is no condition"),
        (("--where", "ctf/df1_A < open('hacked', 'w')"), "holds numbers"),
        (("--where", "location/micrograph_path < 3"), "text"),
        (("--every", 0), "every is at least 1"),
        (("--limit", 0), "limit is at least 1"),
    ],
    ids=str,
)
def test_what_goes_wrong_is_one_message_and_nothing_is_written(
    written: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, options: Any, told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("export", written[0], "a.zarr", *options) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("cryolike-data: ")
    assert told in captured.err
    assert "Traceback" not in captured.err
    assert os.listdir(tmp_path) == []


def test_an_unknown_column_lists_those_that_there_are(written: Any, table: np.ndarray, tmp_path: Path, capsys: Any) -> None:
    assert run("export", written[0], tmp_path / "a.zarr", "--where", "alignments3D/alfa < 1") == 1
    told = capsys.readouterr().err
    assert "no column 'alignments3D/alfa'" in told
    listed = told.partition("there are ")[2].strip().rstrip(".").split(", ")
    assert {*table.dtype.names, "ctf/defocus_u", "shift_A", "half_set"} <= set(listed)


# --- the summary as JSON

KEYS = {"target", "format", "particles", "units", "written", "kept", "bytes", "seconds", "images_per_second", "sealed"}


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A table of three images of 8 px and 1.5 A, and five of 16 px and 1.2 A."""
    for name, count, box in (("small", 3, 8), ("large", 5, 16)):
        write_stack(tmp_path / f"{name}.mrc", numbered_images(count, box))
    columns = ctf_columns(8) | {"ctf__exp_group_id": np.array([4] * 3 + [9] * 5, "u4")}
    return write_table(
        tmp_path / "particles.cs",
        uid=uids(8),
        blob__path=["small.mrc"] * 3 + ["large.mrc"] * 5,
        blob__idx=np.array([0, 1, 2, 0, 1, 2, 3, 4], "u4"),
        blob__psize_A=np.array([1.5] * 3 + [1.2] * 5, "f4"),
        **columns,
    )


@pytest.mark.parametrize(
    ("options", "count"),
    [
        (("--where", "box == 8"), 3),
        (("--where", "blob/psize_A > 1.3"), 3),
        (("--where", "box == 16", "--limit", 2), 2),
        (("--group", 9), 5),
        (("--group", 9, "--every", 2), 3),
    ],
    ids=str,
)
def test_a_table_of_mixed_boxes_is_narrowed_down_while_it_is_opened(mixed: Path, capsys: Any, options: tuple[Any, ...], count: int) -> None:
    assert run("info", mixed, *options) == 0
    assert f"{count} particles in" in capsys.readouterr().out


def test_a_table_of_mixed_boxes_is_exported_part_by_part(mixed: Path, tmp_path: Path) -> None:
    assert run("export", mixed, tmp_path / "out.zarr", "--where", "box == 16") == 0
    assert torch.equal(ZarrDataset(tmp_path / "out.zarr").read(slice(None)), torch.from_numpy(numbered_images(5, 16)))


def test_the_remedy_for_mixed_boxes_works_as_it_is_written(mixed: Path, capsys: Any) -> None:
    assert run("info", mixed) == 1
    what, remedy = re.split(r"\s{2,}", capsys.readouterr().err.splitlines()[-1].strip())
    assert (what, remedy) == ("box 16: 5 particles", "--where 'box == 16'")
    assert run("info", mixed, *shlex.split(remedy)) == 0


def test_a_picture_names_particles_by_their_rows_in_the_table(mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plots = pytest.importorskip("cryolike_data.plots")
    montage, named = plots.montage, []
    monkeypatch.setattr(plots, "montage", lambda images, *, titles: (named.extend(titles), montage(images, titles=titles))[1])
    assert run("show", mixed, tmp_path / "a.png", "--group", 9, "--count", 2) == 0
    assert named == ["row 3", "row 7"]


def test_a_group_that_is_not_there_is_named(mixed: Path, capsys: Any) -> None:
    assert run("info", mixed, "--group", 5) == 1
    assert "None of the 8 particles is left by this selection: ctf/exp_group_id == 5." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "options"),
    [("zarr", ()), ("mrc", ("--batch-size", 10)), ("cryolike", ("--no-fourier", "--batch-size", 10))],
    ids=["zarr", "mrc", "cryolike"],
)
def test_json_is_one_object_and_nothing_else(
    written: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str, options: tuple[object, ...]
) -> None:
    arguments = ("export", written[0], tmp_path / "out", "--format", kind, "--json", "--limit", 25, *options)
    assert run(*arguments) == 0
    captured = capfd.readouterr()
    assert captured.err == ""
    report = json.loads(captured.out)
    assert report.keys() == KEYS
    units = 1 if kind == "zarr" else 3
    due = {"target": str(tmp_path / "out"), "format": kind, "particles": 25, "units": units, "written": units, "kept": 0, "sealed": True}
    assert {name: report[name] for name in due} == due
    assert 25 * 8 * 8 * 4 <= report["bytes"] <= sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert report["seconds"] > 0
    assert report["images_per_second"] > 0

    assert run(*arguments) == 0
    again = json.loads(capfd.readouterr().out)
    assert (again["written"], again["kept"], again["sealed"]) == (0, units, True)
    assert again["bytes"] == report["bytes"]


def test_json_of_a_part_and_of_the_end(written: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ("export", written[0], tmp_path / "out", "--format", "mrc", "--json", "--batch-size", 10)
    reports = []
    for part in (("--unit-range", "0/2"), ("--unit-range", "1/2"), ("--finish",)):
        assert run(*arguments, *part) == 0
        reports.append(json.loads(capfd.readouterr().out))
    assert [report.keys() == KEYS for report in reports] == [True] * 3
    assert [(report["units"], report["written"], report["sealed"]) for report in reports] == [(4, 2, False), (4, 2, False), (4, 0, True)]
    assert reports[2]["bytes"] == reports[0]["bytes"] + reports[1]["bytes"]


def test_an_error_prints_no_json(written: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("export", written[0], tmp_path / "a.zarr", "--json", "--where", "nothing == 1") == 1
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("cryolike-data: ")


# What the caller does with their array afterwards


@pytest.mark.parametrize("as_given", [np.asarray, torch.from_numpy], ids=["array", "tensor"])
def test_a_selection_stays_what_it_was_when_the_array_changes(tmp_path: Path, as_given: Any) -> None:
    table, images = write_particles(tmp_path, 20)
    ds, order = IndexedDataset(table), np.arange(20)[::-1].copy()
    taken = {
        "select": ds.select(as_given(order)).batch(range(20)),
        "select=": IndexedDataset(table, select=as_given(order)).batch(range(20)),
        "batch": ds.batch(as_given(order)),
        "describe": ds.describe(as_given(order)),
    }
    particles = ds.particles[as_given(order)]
    order[:] = 3
    for name, batch in taken.items():
        np.testing.assert_array_equal(batch.uid.numpy().view(np.uint64), ds.particles.uid[::-1], err_msg=name)
        np.testing.assert_array_equal(batch.ctf.defocus_u.numpy(), ds.particles.ctf.defocus_u[::-1], err_msg=name)
        if not batch.images.is_meta:
            np.testing.assert_array_equal(batch.images.numpy(), images[::-1], err_msg=name)
    assert taken["batch"].index.tolist() == list(range(20))[::-1]
    np.testing.assert_array_equal(particles.uid, ds.particles.uid[::-1])


@pytest.mark.parametrize("rows", [np.arange(20)[::-3], slice(None, None, -3)], ids=["array", "slice"])
def test_rows_may_go_backwards(tmp_path: Path, rows: Any) -> None:
    table, images = write_particles(tmp_path, 20)
    ds = IndexedDataset(table)
    for batch in (ds.batch(rows), ds.select(rows).batch(range(7))):
        np.testing.assert_array_equal(batch.images.numpy(), images[::-3])
        np.testing.assert_array_equal(batch.ctf.defocus_u.numpy(), ds.particles.ctf.defocus_u[::-3])


def test_rows_that_may_not_be_written_to_give_no_warning(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    rows = np.arange(5)
    rows.flags.writeable = False
    assert write_and_open(tmp_path).batch(rows).index.tolist() == [0, 1, 2, 3, 4]
    assert not recwarn.list


def write_and_open(folder: Path) -> IndexedDataset:
    return IndexedDataset(write_particles(folder, 20)[0])


@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.float32, torch.int64])
def test_zeros_and_ones_of_a_function_are_no_rows(tmp_path: Path, kind: Any) -> None:
    ds = write_and_open(tmp_path)
    half = torch.arange(20, dtype=kind) % 2 if isinstance(kind, torch.dtype) else (np.arange(20) % 2).astype(kind)
    with pytest.raises(RowIndexError, match=r"compare, as in p\.half_set == 1"):
        ds.select(lambda p: half)
    with pytest.raises(RowIndexError, match="compare"):
        ds.particles.where(lambda p: half)
    assert len(ds.select(lambda p: half == 1)) == 10
    assert ds.select(lambda p: np.argsort(p.ctf.defocus_u)).particles.ctf.defocus_u.argmin() == 0
