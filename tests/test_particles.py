from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from cryolike_data import Ctf, Particles
from cryolike_data.errors import ArgumentError, MixedParticlesError, RowIndexError
from cryolike_data.particles import resolve_rows, shortest

N = 10


def particles(**changes: Any) -> Particles:
    """N particles every one of whose columns says which row it is of."""
    i = np.arange(N)
    columns: dict[str, Any] = {
        "row": i.astype(np.int64),
        "uid": i.astype(np.uint64) + 2**63,
        "file": (i % 2).astype(np.int32),
        "slice": 100 + i,
        "box": np.full(N, 64, np.int32),
        "pixel_size": np.full(N, 1.3, np.float32),
        "paths": ("a.mrc", "b.mrc"),
        "ctf": Ctf(defocus_u=1e4 + i.astype("f4"), exposure_group=i // 5, tilt_A=np.stack([i, -i], axis=1).astype("f4")),
        "pose": np.stack([i, i, -i], axis=1).astype("f4"),
        "shift_A": np.stack([i, 2 * i], axis=1).astype("f4"),
        "half_set": i % 2,
        "sign": -np.ones(N, "f4"),
    }
    return Particles(**(columns | changes))


def in_step(chosen: Particles, rows: list[int]) -> None:
    expected = np.asarray(rows)
    assert len(chosen) == len(rows)
    assert chosen.row.tolist() == rows
    assert chosen.uid.tolist() == [2**63 + row for row in rows]
    assert chosen.slice.tolist() == [100 + row for row in rows]
    assert (chosen.file.tolist(), chosen.half_set.tolist()) == ([row % 2 for row in rows],) * 2
    np.testing.assert_array_equal(chosen.ctf.defocus_u, 1e4 + expected)
    np.testing.assert_array_equal(chosen.ctf.tilt_A.reshape(-1, 2)[:, 1], -expected)
    np.testing.assert_array_equal(chosen.pose.reshape(-1, 3)[:, 2], -expected)
    np.testing.assert_array_equal(chosen.shift_A.reshape(-1, 2)[:, 1], 2 * expected)
    assert all(len(column) == len(rows) for column in chosen.columns().values())


SELECTIONS = {
    "slice": (slice(2, 5), [2, 3, 4]),
    "backwards": (slice(None, None, -4), [9, 5, 1]),
    "list": ([4, 1, 4], [4, 1, 4]),
    "negative": ([-1, -10], [9, 0]),
    "array": (np.array([7, 2], np.int32), [7, 2]),
    "unsigned": (np.array([7, 2], np.uint64), [7, 2]),
    "tensor": (torch.tensor([7, 2]), [7, 2]),
    "range": (range(3, 9, 3), [3, 6]),
    "mask": (np.arange(N) % 3 == 0, [0, 3, 6, 9]),
    "mask of bools": ([True, False] * 5, [0, 2, 4, 6, 8]),
    "mask tensor": (torch.arange(N) > 7, [8, 9]),
    "function": (lambda p: p.ctf.defocus_u < 10002, [0, 1]),
    "function giving rows": (lambda p: np.argsort(-p.ctf.defocus_u)[:2], [9, 8]),
    "nothing": ([], []),
    "empty slice": (slice(5, 5), []),
    "no row of a mask": (np.zeros(N, bool), []),
}


@pytest.mark.parametrize(("selection", "rows"), SELECTIONS.values(), ids=SELECTIONS.keys())
def test_every_selection_keeps_all_columns_in_step(selection: Any, rows: list[int]) -> None:
    in_step(particles()[selection], rows)


@pytest.mark.parametrize("key", [3, -7, np.int64(3), np.uint8(3)])
def test_a_single_row_is_a_table_of_one(key: Any) -> None:
    in_step(particles()[key], [3])


def test_selecting_does_not_change_the_original() -> None:
    whole = particles()
    whole[[3, 1]]
    in_step(whole, list(range(N)))


def test_a_selection_of_a_selection_keeps_the_rows_of_the_table() -> None:
    in_step(particles()[::2][[4, 0]], [8, 0])


@pytest.mark.parametrize("absent", ["ctf", "pose", "shift_A", "half_set", "sign"])
def test_absent_columns_stay_absent(absent: str) -> None:
    chosen = particles(**{absent: None})[2:4]
    assert getattr(chosen, absent) is None
    assert len(chosen) == 2


@pytest.mark.parametrize(
    "selection",
    [
        [0, 10],
        [-11],
        10,
        np.array([2**64 - 1], np.uint64),
        np.array([2**63 + 5], np.uint64),
        np.array([10], np.uint64),
        np.zeros(9, bool),
        np.zeros(11, bool),
        [True],
        [0.0, 1.0],
        np.zeros((2, 2), int),
        ["a"],
        [[0], [1, 2]],
    ],
    ids=[
        "beyond",
        "before",
        "one row beyond",
        "a uid near 2**64",
        "a uid",
        "one row beyond, unsigned",
        "short mask",
        "long mask",
        "one bool",
        "floats",
        "matrix",
        "words",
        "ragged",
    ],
)
def test_a_selection_that_cannot_be_is_an_index_error(selection: Any) -> None:
    with pytest.raises(RowIndexError) as caught:
        particles()[selection]
    assert isinstance(caught.value, IndexError)


def test_an_out_of_range_row_is_named_with_the_number_of_rows() -> None:
    with pytest.raises(RowIndexError, match=r"row 12 is out of range \(2 of 3 asked for are\): there are 10 rows"):
        particles()[[1, 12, 99]]


def test_resolved_rows_are_int64_and_none_is_negative() -> None:
    rows = resolve_rows(np.array([-1, 3], np.int16), N)
    assert (rows.dtype, rows.tolist()) == (np.int64, [9, 3])


def test_particles_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        particles().box = np.zeros(N)  # type: ignore[misc]


def test_iterating_gives_each_row() -> None:
    assert [one.row.tolist() for one in particles()] == [[i] for i in range(N)]


# where


@pytest.mark.parametrize(
    ("condition", "equal", "rows"),
    [
        (None, {"exposure_group": 1}, [5, 6, 7, 8, 9]),
        (None, {"exposure_group": 1, "half_set": 0}, [6, 8]),
        (None, {"uid": 2**63 + 4}, [4]),
        (None, {"pixel_size": 1.3, "row": 2}, [2]),
        (None, {"defocus_u": 1}, []),
        (lambda p: p.ctf.defocus_u > 10006, {}, [7, 8, 9]),
        (lambda p: p.ctf.defocus_u > 10006, {"half_set": 1}, [7, 9]),
        ([9, 2, 9], {}, [2, 9]),
        (slice(0, 4), {"half_set": 1}, [1, 3]),
        (None, {}, list(range(N))),
    ],
)
def test_where_keeps_the_rows_that_fulfil_everything(condition: Any, equal: dict[str, Any], rows: list[int]) -> None:
    in_step(particles().where(condition, **equal), rows)


def test_float_columns_compare_to_five_digits() -> None:
    # float32 1.3 is 1.29999995
    assert len(particles().where(pixel_size=1.3)) == N
    assert len(particles().where(pixel_size=1.301)) == 0


@pytest.mark.parametrize("name", ["voltage_kv", "pose", "nonsense"])
def test_where_names_the_columns_that_can_be_compared(name: str) -> None:
    with pytest.raises(ArgumentError, match=rf"no column '{name}'.*defocus_u, exposure_group, file"):
        particles().where(**{name: 1})


# Groups


def test_one_value_of_a_column_that_has_one() -> None:
    assert particles().one_value("box") == 64


def test_floats_that_differ_by_rounding_are_one_value() -> None:
    sizes = np.full(N, 1.3, np.float32)
    sizes[3] = np.nextafter(np.float32(1.3), np.float32(2))
    assert particles(pixel_size=sizes).one_value("pixel_size") == pytest.approx(1.3)


@pytest.mark.parametrize(
    ("column", "values"),
    [("box", np.repeat([64, 128], [7, 3])), ("pixel_size", np.repeat(np.float32([1.3, 1.3002]), [7, 3])), ("ctf/exposure_group", None)],
)
def test_mixed_values_are_an_error_that_names_the_groups_and_their_sizes(column: str, values: np.ndarray | None) -> None:
    mixed = particles() if values is None else particles(**{column: values})
    short = column.removeprefix("ctf/")
    groups = {"box": ("64: 7", "128: 3"), "pixel_size": ("1.3: 7", "1.3002: 3"), "exposure_group": ("0: 5", "1: 5")}[short]
    with pytest.raises(MixedParticlesError) as caught:
        mixed.one_value(column)
    assert all(f"{short} {group} particles" in str(caught.value) for group in groups)


@pytest.mark.parametrize("column", ["box", "pixel_size", "ctf/exposure_group"])
def test_the_advice_in_the_error_selects_one_group(column: str) -> None:
    sizes = np.repeat(np.float32([1.3, 2.6]), 5)
    mixed = particles(box=np.repeat([64, 128], 5), pixel_size=sizes)
    with pytest.raises(MixedParticlesError) as caught:
        mixed.one_value(column)
    advice = [line.split("select=")[1] for line in str(caught.value).splitlines() if "select=" in line]
    chosen = [mixed[eval(text, {"np": np})].row.tolist() for text in advice]
    assert chosen == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


def test_many_groups_are_counted_and_not_all_listed() -> None:
    with pytest.raises(MixedParticlesError) as caught:
        particles(row=np.arange(N), box=np.arange(N) + 8)[[*range(N)]].one_value("box")
    assert len(str(caught.value).splitlines()) == 11
    n = 40
    wide = dataclasses.replace(particles()[np.zeros(n, int)], box=np.arange(n) + 8)
    with pytest.raises(MixedParticlesError, match="and 28 more"):
        wide.one_value("box")


@pytest.mark.parametrize(("value", "text"), [(np.float32(1.3), "1.3"), (np.float64(1.0825), "1.0825"), (np.int32(64), "64")])
def test_shortest_is_what_a_person_would_write(value: Any, text: str) -> None:
    assert repr(shortest(value)) == text


def test_repr_tells_rows_files_box_optics_and_poses() -> None:
    assert repr(particles()) == "Particles(10 rows in 2 files, box 64 px, with CTF in 2 exposure groups, with poses)"
    assert repr(particles(ctf=None, pose=None)[:0]) == "Particles(0 rows in 0 files, box  px, without CTF, without poses)"


def test_particles_pickle() -> None:
    in_step(pickle.loads(pickle.dumps(particles())), list(range(N)))


def test_where_takes_one_value_and_says_how_to_ask_for_several() -> None:
    with pytest.raises(ArgumentError, match=r"lambda p: np\.isin\(p\.ctf\.exposure_group, \[0, 1\]\)"):
        particles().where(exposure_group=[0, 1])
    with pytest.raises(ArgumentError, match=r"np\.isin\(p\.box, \[8\]\)"):
        particles().where(box=[8])


@pytest.mark.parametrize(("name", "value"), [("half_set", "A"), ("exposure_group", "0"), ("pixel_size", "1.3"), ("box", None)])
def test_what_is_no_number_is_not_compared_with_a_column(name: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=f"{name}= takes a number to compare with, not {value!r}"):
        particles().where(**{name: value})


def test_one_value_of_no_column_is_an_error_that_lists_the_columns() -> None:
    with pytest.raises(ArgumentError, match=r"no column 'foo'.*pixel_size"):
        particles().one_value("foo")
