"""Numbering the values of a string column: the same as a dictionary row by row, whatever the strings, blocks and ranges."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cryolike_data.cryosparc import numbering as numbering_module
from cryolike_data.cryosparc import rows as rows_module
from cryolike_data.cryosparc.rows import RowsInMemory, copy_columns, number_rows


def one_by_one(values: list[Any]) -> tuple[list[Any], list[int]]:
    """What numbering means, row by row."""
    known: dict[Any, int] = {}
    numbers = [known.setdefault(value, len(known)) for value in values]
    return list(known), numbers


def by_bytes(columns: list[np.ndarray]) -> tuple[int, list[int]]:
    """How many different rows there are, and which of them each row is."""
    values, numbers = one_by_one(list(zip(*([value.tobytes() for value in column] for column in columns), strict=True)))
    return len(values), numbers


def check(column: np.ndarray) -> None:
    values, numbers = number_rows(column)
    assert (values, numbers.tolist()) == one_by_one(column.tolist())
    assert numbers.dtype == np.int32


@pytest.fixture(params=[4, 16], ids=["blocks of 4", "blocks of 16"])
def small_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks, and several ranges of rows at a time."""
    monkeypatch.setattr(rows_module, "BLOCK_ROWS", request.param)
    monkeypatch.setattr(rows_module, "processors", lambda: 3)


STRINGS = st.one_of(
    st.lists(st.binary(max_size=20), max_size=60),
    st.lists(st.text(max_size=6), max_size=60),
    st.lists(st.sampled_from([b"", b"\xff" * 8, b"\xff" * 9, b"abcdefgh", b"abcdefgi", b"a", b"b"]), max_size=200),
)


@pytest.mark.usefixtures("small_blocks")
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(strings=STRINGS, size=st.integers(1, 33), repeat=st.integers(1, 9))
@example(strings=[b""] * 5 + [b"a"], size=8, repeat=3)
@example(strings=[b"x" * 16, b"x" * 15 + b"y"] * 20, size=16, repeat=1)
def test_strings_of_any_kind_and_size_are_numbered(strings: list[Any], size: int, repeat: int) -> None:
    kind = "U" if strings and isinstance(strings[0], str) else "S"
    column = np.repeat(np.array(strings, f"{kind}{size}"), repeat)
    check(column)
    check(column[::-1])
    check(np.random.default_rng(len(column)).permutation(column))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("order", ["in order", "shuffled", "alternating"])
def test_thousands_of_paths_are_numbered(order: str) -> None:
    paths = np.array([f"J7/extract/{k:09d}_particles.mrc".encode() for k in range(700)])
    column = {"in order": np.repeat(paths, 5), "alternating": np.tile(paths, 5)}.get(
        order, np.random.default_rng(0).permutation(np.repeat(paths, 5))
    )
    check(column)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("bits", [1, 3])
def test_values_that_share_a_place_are_told_apart(monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    monkeypatch.setattr(numbering_module, "_PLACE_BITS", bits)
    check(np.random.default_rng(0).permutation(np.repeat([f"{k:040d}".encode() for k in range(50)], 9)))


@pytest.fixture
def alike_to_the_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """All values meet at one place."""
    made = numbering_module.Numbering.__init__

    def without_keys(self: Any, *arguments: Any) -> None:
        made(self, *arguments)
        self._keys[:] = 0

    monkeypatch.setattr(numbering_module.Numbering, "__init__", without_keys)


@pytest.mark.usefixtures("small_blocks", "alike_to_the_keys")
def test_values_that_look_alike_to_the_keys_are_told_apart() -> None:
    check(np.random.default_rng(0).permutation(np.repeat([f"{k:040d}".encode() for k in range(50)], 9)))


def test_a_word_that_changes_where_hardly_any_row_does_tells_later_values_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "BLOCK_ROWS", 16)
    varied = [f"{k % 8:08d}".encode() for k in range(16)]
    first, last = [value + b"a" * 8 for value in varied], [value + b"b" * 8 for value in varied]
    between = [first[-1]] * 8 + [last[-1]] * 8
    check(np.array(first + between + last))


@pytest.mark.usefixtures("alike_to_the_keys")
def test_a_word_that_begins_to_vary_is_not_compared_with_what_its_memory_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "BLOCK_ROWS", 16)
    monkeypatch.setattr(np, "empty", np.zeros)  # as the second word of short strings is
    varied = [f"{k % 8:08d}".encode() for k in range(16)]
    check(np.array([value + b"a" * 8 for value in varied] + varied))


PATHS = [f"J7/{k:09d}_particles.mrc".encode() for k in range(700)]
#: What tells these apart are the last bytes of words, which are the first bits of numbers.
LAST_BYTES = [f"0000000{chr(65 + k // 27)}0000000{chr(65 + k % 27)}".encode() for k in range(700)]


@pytest.mark.parametrize(("values", "bits", "most"), [(PATHS, 12, 3000), (PATHS, 5, 20_000), (LAST_BYTES, 12, 20_000)], ids=range(3))
def test_python_sees_few_of_many_rows(monkeypatch: pytest.MonkeyPatch, values: list[bytes], bits: int, most: int) -> None:
    monkeypatch.setattr(numbering_module, "_PLACE_BITS", bits)  # with 5 there are far too few places at first
    monkeypatch.setattr(rows_module, "BLOCK_ROWS", 1 << 12)
    monkeypatch.setattr(rows_module, "processors", lambda: 1)
    by_python, seen = numbering_module.Numbering._by_python, []

    def count(self: Any, rows: np.ndarray) -> np.ndarray:
        seen.append(len(rows))
        return by_python(self, rows)

    monkeypatch.setattr(numbering_module.Numbering, "_by_python", count)
    check(np.random.default_rng(0).permutation(np.repeat(values, 200)))
    assert 700 <= sum(seen) <= most


FIELDS = st.lists(
    st.sampled_from(["u1", "<u2", "<u4", "<f8", ">f4", "S3", "S24", "(2,)<f4", "(3,)<f4", "(2,2)>u2", "<c16", "U3", "S0", "(0,)<f4"]),
    min_size=1,
    max_size=7,
)


@pytest.mark.usefixtures("small_blocks")
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(formats=FIELDS, n=st.integers(0, 70), data=st.data(), gaps=st.lists(st.integers(0, 9), min_size=7, max_size=7))
def test_columns_are_copied_whatever_lies_between_and_beside_them(formats: list[str], n: int, data: st.DataObject, gaps: list[int]) -> None:
    dtypes = [np.dtype(text) for text in formats]
    offsets = np.cumsum([gap + dtype.itemsize for gap, dtype in zip(gaps, dtypes, strict=False)]) - [dtype.itemsize for dtype in dtypes]
    names = [f"field {k}" for k in range(len(dtypes))]
    layout: Any = {
        "names": names,
        "formats": dtypes,
        "offsets": offsets.tolist(),
        "itemsize": max(1, int(offsets[-1]) + dtypes[-1].itemsize + gaps[-1]),
    }
    rows = np.zeros(n, np.dtype(layout))
    rng = np.random.default_rng(n)
    for name, dtype in zip(names, dtypes, strict=True):
        part = rng.integers(97, 100, rows[name].shape)
        rows[name] = part.astype(dtype.base) if dtype.base.kind not in "SU" else part.astype("u1").view("S1")
    wanted = data.draw(st.sets(st.sampled_from(names)))
    counted = data.draw(st.sets(st.sampled_from(names)))
    columns, kinds = copy_columns(RowsInMemory(rows), wanted, kinds_of=counted)
    assert set(columns) == wanted
    for name in wanted:
        np.testing.assert_array_equal(columns[name], rows[name])
        assert columns[name].dtype.isnative
        assert columns[name].flags.c_contiguous
    if not counted:
        return
    assert (len(kinds.rows), kinds.number.tolist()) == by_bytes([rows[name] for name in sorted(counted)])
    for name in counted:
        np.testing.assert_array_equal(kinds.column(name), rows[name])
        assert kinds.column(name).dtype.isnative
        if rows.dtype[name].kind in "SU":
            values, numbers = kinds.values(name)
            assert (values, numbers.tolist()) == one_by_one(rows[name].tolist())
            assert numbers.dtype == np.int32
