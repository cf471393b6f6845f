from __future__ import annotations

import gc
import gzip
import io
import json
import os
import pickle
import stat
import struct
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import ctf_columns, uids, write_particles, write_table

from cryolike_data import IndexedDataset, read_table
from cryolike_data.cryosparc import rows as rows_module
from cryolike_data.errors import MissingDependencyError, MissingStackError, TableError


def some_columns(n: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {
        "uid": uids(n),
        "blob__path": np.array([f"J1/extract/{i % 3}_particles.mrc" for i in range(n)], dtype="S40"),
        "blob__idx": rng.integers(0, 99, n).astype("<u4"),
        "blob__shape": np.full((n, 2), 64, "<u4"),
        "alignments3D__pose": rng.normal(size=(n, 3)).astype("<f4"),
        **ctf_columns(n),
    }


def csdat(columns: dict[str, np.ndarray | list[str]], *, packed: bool = True, rows: int | None = None) -> bytes:
    """A CSDAT table written by hand from its description; lists of str become columns of objects."""
    import lz4.block

    heap = b"\0"
    specs, body = [], b""
    for name, values in columns.items():
        if isinstance(values, list):
            offsets = []
            for text in values:
                offsets.append(len(heap) if text else 0)
                heap += text.encode() + b"\0" if text else b""
            specs.append([name, "|O"])
            raw = np.array(offsets, "<u8").tobytes()
        else:
            specs.append([name, values.dtype.str, *([list(values.shape[1:])] if values.ndim > 1 else [])])
            raw = values.tobytes()
        raw = lz4.block.compress(raw, store_size=False) if packed and name != "uid" else raw
        body += struct.pack("<I", len(raw)) + raw
    n = len(next(iter(columns.values()))) if rows is None else rows
    header = {"length": n, "dtype": specs, "compression": "lz4" if packed else None}
    header["compressed_fields"] = [name for name in columns if name != "uid"] if packed else []
    text = json.dumps(header).encode()
    return b"\x95CSDAT" + struct.pack("<I", len(text)) + text + (body if n else b"") + heap


def save_quietly(path: Path, array: np.ndarray, **options: object) -> Path:
    with path.open("wb") as file:
        np.save(file, array, **options)
    return path


@pytest.mark.parametrize("name", ["particles.cs", "particles.cs.npy", "no_suffix", "particles.mrc"])
def test_a_numpy_table_gives_back_every_column_whatever_its_name(tmp_path: Path, name: str) -> None:
    columns = some_columns(7)
    table = read_table(write_table(tmp_path / name, **columns))
    assert len(table) == 7
    for key, values in columns.items():
        np.testing.assert_array_equal(table[key.replace("__", "/")], values)


def test_a_table_says_what_it_holds_in_one_line(tmp_path: Path) -> None:
    path = write_table(tmp_path / "t.cs", uid=uids(7), blob__idx=np.arange(7), ctf__df1_A=np.ones(7))
    assert repr(read_table(path)) == f"Table({path}: 7 rows, 3 fields in blob/*, ctf/*)"


def test_a_table_is_found_from_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_table(tmp_path / "t.cs", uid=uids(7))
    assert len(read_table("~/t.cs")) == 7


def test_the_file_of_a_table_is_known_wherever_the_working_directory_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_table(Path("t.cs"), uid=uids(7), blob__idx=np.arange(7))
    assert read_table("t.cs").files == (str(tmp_path / "t.cs"),)


def test_columns_are_contiguous(tmp_path: Path) -> None:
    table = read_table(write_table(tmp_path / "t.cs", **some_columns(7)))
    assert all(table[name].flags.c_contiguous for name in table.fields)


@pytest.mark.parametrize("rows", [1, 3])
def test_columns_are_copies_and_no_views_of_the_mapped_file(tmp_path: Path, rows: int) -> None:
    # A view would crash the process if another program cut the file short.
    table = read_table(write_table(tmp_path / "t.cs", **some_columns(rows)))
    assert all(table[name].flags.writeable for name in table.fields)


def test_columns_of_a_csdat_table_may_be_changed_and_the_table_stays(tmp_path: Path) -> None:
    (tmp_path / "t.cs").write_bytes(csdat({"uid": uids(4)}))
    table = read_table(tmp_path / "t.cs")
    table["uid"][:] = 0
    np.testing.assert_array_equal(table["uid"], uids(4))


@pytest.mark.parametrize("container", ["numpy", "csdat"])
def test_columns_of_big_endian_tables_come_in_native_byte_order(tmp_path: Path, container: str) -> None:
    columns = {"uid": uids(4).astype(">u8"), "ctf/df1_A": np.arange(4, dtype=">f4")}
    path = write_table(tmp_path / "t.cs", **columns)
    if container == "csdat":
        path.write_bytes(csdat(columns))
    table = read_table(path)
    assert [table[name].dtype.isnative for name in table.fields] == [True, True]
    np.testing.assert_array_equal(table["uid"], uids(4))
    np.testing.assert_array_equal(table["ctf/df1_A"], [0, 1, 2, 3])


def test_uids_beyond_2_to_the_63_stay_exact(tmp_path: Path) -> None:
    uid = np.array([2**64 - 1, 2**63 + 1, 2**53 + 1, 1], np.uint64)
    column = read_table(write_table(tmp_path / "t.cs", uid=uid))["uid"]
    assert column.dtype == np.uint64
    assert column.tolist() == [2**64 - 1, 2**63 + 1, 2**53 + 1, 1]


@pytest.mark.filterwarnings("ignore:Stored array in format 2.0:UserWarning")
@pytest.mark.parametrize("fields", [400, 2000], ids=["header beyond numpy's 10 kB limit", "version 2 header beyond 64 kB"])
def test_tables_with_hundreds_of_fields_are_read(tmp_path: Path, fields: int) -> None:
    dtype = [("uid", "<u8"), *[(f"alignments_class3D_{i:04d}/class_posterior", "<f4") for i in range(fields)]]
    array = np.zeros(2, dtype)
    array["uid"] = [5, 6]
    array["alignments_class3D_0399/class_posterior"] = [0.25, 0.5]
    table = read_table(save_quietly(tmp_path / "t.cs", array))
    assert len(table.fields) == fields + 1
    assert table["alignments_class3D_0399/class_posterior"].tolist() == [0.25, 0.5]


def test_field_names_in_latin_1_keep_their_letters(tmp_path: Path) -> None:
    path = save_quietly(tmp_path / "t.cs", np.zeros(2, [("uid", "<u8"), ("user/größe", "<f4")]))
    assert list(read_table(path).fields) == ["uid", "user/größe"]


@pytest.mark.filterwarnings("ignore:Stored array in format 3.0:UserWarning")
def test_field_names_beyond_latin_1_keep_their_letters(tmp_path: Path) -> None:
    path = save_quietly(tmp_path / "t.cs", np.zeros(2, [("uid", "<u8"), ("user/αβ", "<f4")]))
    assert list(read_table(path).fields) == ["uid", "user/αβ"]


def test_a_table_is_not_loaded_when_it_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "huge.cs"
    rows = 100_000_000
    with path.open("wb") as file:
        descr = [("uid", "<u8"), ("blob/path", "S200")]
        np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": (rows,)})
        file.truncate(file.tell() + rows * 208)  # 20 GB, none of them on disk
    assert len(read_table(path)) == rows


@pytest.mark.parametrize("text", ["U", "S"])
def test_strings_of_either_kind_are_read(tmp_path: Path, text: str) -> None:
    array = np.zeros(2, [("uid", "<u8"), ("blob/path", f"{text}20")])
    array["blob/path"] = ["a.mrc", "b.mrc"]
    values = read_table(save_quietly(tmp_path / "t.cs", array))["blob/path"]
    assert values.astype(f"{text}5").tolist() == (["a.mrc", "b.mrc"] if text == "U" else [b"a.mrc", b"b.mrc"])


def test_a_table_without_rows_has_its_columns(tmp_path: Path) -> None:
    table = read_table(write_table(tmp_path / "t.cs", **some_columns(0)))
    assert (len(table), table["alignments3D/pose"].shape, table["uid"].dtype) == (0, (0, 3), np.uint64)


def test_a_table_whose_columns_hold_no_bytes_is_read(tmp_path: Path) -> None:
    table = read_table(save_quietly(tmp_path / "t.cs", np.zeros(3, [("user/nothing", "S0")])))
    assert (len(table), table["user/nothing"].tolist()) == (3, [b""] * 3)


def test_a_missing_column_is_an_error_that_names_the_groups_there_are(tmp_path: Path) -> None:
    table = read_table(write_table(tmp_path / "t.cs", **some_columns(2)))
    with pytest.raises(TableError, match=r"no column 'location/center_x_frac'.*blob/\*, alignments3D/\*, ctf/\*"):
        table["location/center_x_frac"]
    assert table.get("location/center_x_frac") is None
    of_no_group = read_table(write_table(tmp_path / "u.cs", uid=uids(2)))
    with pytest.raises(TableError, match=r"no column 'blob/path'\. It has no columns of any known group\."):
        of_no_group["blob/path"]


@pytest.mark.parametrize("block", [3, 4, 7, 100])
@pytest.mark.parametrize("few", [(), ("blob/shape", "blob/idx")])
def test_a_table_read_in_blocks_and_by_several_threads_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, few: tuple[str, ...]
) -> None:
    monkeypatch.setattr(rows_module, "BLOCK_ROWS", block)
    monkeypatch.setattr(rows_module, "processors", lambda: 3)
    path = write_table(tmp_path / "t.cs", **some_columns(50))
    table, stored = read_table(path), np.load(path)
    shuffled = np.random.default_rng(1).permutation(np.arange(9, 45))
    numbered, paths, number = table.load_numbered(lambda name: True, "blob/path", few=few)
    assert [paths[k] for k in number] == stored["blob/path"].tolist()
    for name in stored.dtype.names:
        np.testing.assert_array_equal(table[name], stored[name], err_msg=name)
        np.testing.assert_array_equal(numbered[name], stored[name], err_msg=name)
        for rows in (shuffled, np.arange(9, 45), np.array([48, 2]), np.arange(0)):
            np.testing.assert_array_equal(table.load(lambda _: True, rows=rows)[name], stored[name][rows], err_msg=name)


def test_rows_that_are_larger_than_a_block_are_read_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "_BLOCK_BYTES", 1)
    table = read_table(write_table(tmp_path / "t.cs", uid=uids(7)))
    np.testing.assert_array_equal(table["uid"], uids(7))


@pytest.mark.parametrize("container", ["numpy", "csdat"])
def test_of_columns_that_are_only_numbered_none_is_kept(tmp_path: Path, container: str) -> None:
    path = write_table(tmp_path / "t.cs", **some_columns(5))
    if container == "csdat":
        path.write_bytes(csdat({"blob/path": ["a", "b", "a", "a", "b"], "blob/idx": np.arange(5, dtype="u4")}))
    numbered, _, _ = read_table(path).load_numbered(lambda name: name == "blob/idx", "blob/path", few=("blob/shape",))
    assert list(numbered.fields) == ["blob/idx"]


def test_a_column_that_is_taken_out_of_a_loaded_table_is_not_kept_there(tmp_path: Path) -> None:
    loaded = read_table(write_table(tmp_path / "t.cs", **some_columns(5))).load(lambda _: True)
    column = weakref.ref(loaded.pop("uid"))
    gc.collect()
    assert column() is None


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes cannot be kept from processors here")
def test_as_many_threads_go_through_a_table_as_there_are_processors_for_this_process() -> None:
    allowed = os.sched_getaffinity(0)
    assert rows_module.processors() == len(allowed)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert rows_module.processors() == 1
        assert len(rows_module.in_row_ranges(100 * rows_module.BLOCK_ROWS, lambda start, stop: (start, stop))) == 1
    finally:
        os.sched_setaffinity(0, allowed)


# CSDAT


@pytest.mark.parametrize("packed", [True, False])
def test_csdat_tables_give_back_every_column(tmp_path: Path, packed: bool) -> None:
    columns = {key.replace("__", "/"): values for key, values in some_columns(5).items() if values.dtype.kind != "S"}
    paths = ["", "J1/é.mrc", "J1/b.mrc", "J1/b.mrc", "c"]
    (tmp_path / "t.cs").write_bytes(csdat(columns | {"blob/path": paths}, packed=packed))
    table = read_table(tmp_path / "t.cs")
    assert len(table) == 5
    assert [value.decode() for value in table["blob/path"].tolist()] == paths
    for name, values in columns.items():
        np.testing.assert_array_equal(table[name], values)
        assert table[name].dtype == values.dtype


def test_csdat_written_by_cryosparc_tools_equals_the_numpy_table(tmp_path: Path) -> None:
    dataset = pytest.importorskip("cryosparc.dataset")
    plain = write_table(tmp_path / "plain.cs", **some_columns(50))
    dataset.Dataset.load(plain).save(tmp_path / "packed.cs", format=dataset.CSDAT_FORMAT)
    assert (tmp_path / "packed.cs").read_bytes()[:6] == b"\x95CSDAT"
    expected, found = np.load(plain), read_table(tmp_path / "packed.cs")
    assert set(found.fields) == set(expected.dtype.names)
    for name in expected.dtype.names:
        np.testing.assert_array_equal(found[name], expected[name])


def test_a_selection_of_a_csdat_table_has_its_rows(tmp_path: Path) -> None:
    cs, images = write_particles(tmp_path, 6)
    table = np.load(cs)
    columns = {name: table[name] for name in table.dtype.names or ()}
    cs.write_bytes(csdat(columns | {"blob/path": [path.decode() for path in table["blob/path"].tolist()]}))
    chosen = IndexedDataset(cs).select([4, 1, 3]).select([2, 0])
    np.testing.assert_array_equal(chosen.read([0, 1]).numpy(), images[[3, 4]])
    assert chosen.particles.row.tolist() == [3, 4]
    np.testing.assert_array_equal(chosen.particles.uid, table["uid"][[3, 4]])
    np.testing.assert_array_equal(chosen.particles.ctf.defocus_u, table["ctf/df1_A"][[3, 4]])


def test_a_csdat_table_without_rows_is_read(tmp_path: Path) -> None:
    (tmp_path / "t.cs").write_bytes(csdat({"uid": np.empty(0, "<u8"), "blob/path": [], "alignments3D/pose": np.empty((0, 3), "<f4")}))
    table = read_table(tmp_path / "t.cs")
    assert (len(table), table["alignments3D/pose"].shape) == (0, (0, 3))
    assert (len(table["blob/path"]), table["blob/path"].dtype.kind) == (0, "S")


@pytest.mark.parametrize("part", [0.02, 0.1, 0.3, 0.6, 0.9, 0.999])
def test_a_truncated_csdat_table_is_an_error(tmp_path: Path, part: float) -> None:
    whole = csdat({"uid": uids(50), "ctf/df1_A": np.random.default_rng(0).normal(size=50), "blob/path": [f"{i}.mrc" for i in range(50)]})
    (tmp_path / "t.cs").write_bytes(whole[: max(6, int(part * len(whole)))])
    with pytest.raises(TableError, match=r"t\.cs is a damaged or truncated CSDAT table"):
        read_table(tmp_path / "t.cs")


def test_a_truncated_csdat_table_tells_how_many_bytes_were_found(tmp_path: Path) -> None:
    (tmp_path / "t.cs").write_bytes(csdat({"uid": uids(50)})[:-2])  # and of the heap there was one
    with pytest.raises(TableError, match=r"400 bytes announced, 399 found"):
        read_table(tmp_path / "t.cs")


@pytest.mark.parametrize(
    "header",
    [
        '{"length": Infinity}',
        '{"length": -1, "dtype": [["uid", "<u8"]]}',
        '{"length": 1}',
        '{"length": 1, "dtype": [["uid", "01u8"]]}',
        '{"length": 0, "dtype": [["uid", "V"]]}',
        "[]",
        "[" * 100_000,
    ],
    ids=["rows without end", "less than no rows", "no columns", "a type that is none", "a type of no size", "a list", "brackets"],
)
def test_a_csdat_table_with_a_garbled_header_is_a_table_error(tmp_path: Path, header: str) -> None:
    (tmp_path / "t.cs").write_bytes(b"\x95CSDAT" + struct.pack("<I", len(header)) + header.encode() + bytes(100))
    with pytest.raises(TableError, match=r"t\.cs is a damaged or truncated CSDAT table"):
        read_table(tmp_path / "t.cs")


def test_csdat_without_lz4_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.cs").write_bytes(csdat({"uid": uids(2)}))
    monkeypatch.setitem(sys.modules, "lz4.block", None)
    with pytest.raises(MissingDependencyError, match=r"cryolike-data\[csdat\]"):
        read_table(tmp_path / "t.cs")


# What is refused


@pytest.mark.parametrize(
    ("start", "said"),
    [
        (b"\x94CSDAT" + bytes(100), "old Snappy CSDAT format"),
        (b"", "not a CryoSPARC table"),
        (b"\x93NUM", r"not a CryoSPARC table: it starts with b'\x93NUM', not with a NumPy or CSDAT header"),
        (b"data_\n\nloop_\n_rlnImageName #1\n", "a RELION star file"),
        (b"\ndata_particles\n\nloop_\n", "a RELION star file"),
        (b"# version 30001\n\ndata_optics\n", "a RELION star file"),
        (b"\n# version 30001\n\ndata_optics\n", "a RELION star file"),
        (pickle.dumps({"uid": [1]}), "pickle, which could run code"),
        (gzip.compress(b"\x93NUMPY"), "gunzip"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
    ],
    ids=[
        "snappy",
        "empty",
        "cut inside the magic",
        "star",
        "star after an empty line",
        "star with its version",
        "star with version after an empty line",
        "pickle",
        "gzip",
        "hdf5",
    ],
)
def test_files_that_are_no_tables_are_refused_with_what_they_are(tmp_path: Path, start: bytes, said: str) -> None:
    (tmp_path / "t.cs").write_bytes(start)
    with pytest.raises(TableError) as caught:
        read_table(tmp_path / "t.cs")
    assert said in str(caught.value)
    assert "t.cs" in str(caught.value)


def test_an_npz_archive_under_the_name_of_a_table_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "t.cs").open("wb") as file:
        np.savez(file, uid=uids(3))
    with pytest.raises(TableError, match=r"\.npz"):
        read_table(tmp_path / "t.cs")


def test_object_columns_are_refused_by_name_and_never_unpickled(tmp_path: Path) -> None:
    array = np.zeros(2, [("uid", "<u8"), ("blob/path", "O"), ("user/note", "O")])
    path = save_quietly(tmp_path / "t.cs", array, allow_pickle=True)
    with pytest.raises(TableError, match=r"Python objects \(columns blob/path, user/note\)"):
        read_table(path)


@pytest.mark.parametrize(
    "array",
    [np.zeros((3, 4)), np.zeros(5), np.zeros((2, 2), [("uid", "<u8")]), np.zeros(2, [])],
    ids=["2-D", "1-D", "2-D structured", "no columns"],
)
def test_plain_arrays_are_refused(tmp_path: Path, array: np.ndarray) -> None:
    with pytest.raises(TableError, match="not a table"):
        read_table(save_quietly(tmp_path / "t.cs", array))


@pytest.mark.parametrize("lost", [1, 100])
def test_a_table_shorter_than_its_header_says_is_truncated(tmp_path: Path, lost: int) -> None:
    path = write_table(tmp_path / "t.cs", **some_columns(20))
    size = 20 * np.load(path).itemsize
    path.write_bytes(path.read_bytes()[:-lost])
    with pytest.raises(TableError, match=rf"truncated: 20 rows need {size} bytes and {size - lost} are there"):
        read_table(path)


def test_what_follows_the_rows_of_a_table_is_left_aside(tmp_path: Path) -> None:
    path = write_table(tmp_path / "t.cs", uid=uids(20))
    with path.open("ab") as file:
        file.write(bytes(100))
    np.testing.assert_array_equal(read_table(path)["uid"], np.load(path)["uid"])


@pytest.mark.parametrize("seen", [True, False], ids=["noticed when it is opened again", "noticed while it is read"])
def test_a_table_that_shrinks_after_it_was_opened_is_a_table_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: bool) -> None:
    path = write_table(tmp_path / "t.cs", uid=uids(20))
    table = read_table(path)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 8)
    if not seen:
        monkeypatch.setattr(rows_module, "stamp_of", lambda file: table._source.stamp)
    with pytest.raises(TableError, match="has changed since" if seen else "has become shorter"):
        table["uid"]


@pytest.mark.parametrize("cut", [7, 9, 30, 200])
def test_a_table_cut_inside_its_header_is_a_table_error(tmp_path: Path, cut: int) -> None:
    path = write_table(tmp_path / "t.cs", **some_columns(20))
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(TableError, match="damaged"):
        read_table(path)


@pytest.mark.parametrize("junk", [b"{", b"\0", b"[", b"\n ", b"\\"])
def test_a_table_with_a_garbled_header_is_a_table_error(tmp_path: Path, junk: bytes) -> None:
    path = write_table(tmp_path / "t.cs", **some_columns(20))
    raw = bytearray(path.read_bytes())
    raw[60 : 60 + len(junk)] = junk
    path.write_bytes(raw)
    with pytest.raises(TableError, match="damaged"):
        read_table(path)


@pytest.mark.parametrize(
    ("version", "header"),
    [
        (2, "{'descr': " + "-" * 60_000 + "1}"),
        (2, "1+" * 20_000 + "1"),
        (1, "{[]: 1}"),
        (1, "{'descr': (), 'fortran_order': False, 'shape': (0,)}"),
        (3, "{'descr': [('a\xfe', '<u8'), ('a\xff', '<u8')], 'fortran_order': False, 'shape': (0,)}"),
    ],
    ids=["signs", "sums", "a list for a name", "a type of nothing", "names that are no UTF-8"],
)
def test_a_header_that_python_cannot_take_in_is_a_table_error(tmp_path: Path, version: int, header: str) -> None:
    raw = header.encode("latin1") + b"\n"
    (tmp_path / "t.cs").write_bytes(b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(raw)) + raw)
    with pytest.raises(TableError, match=r"t\.cs has a damaged NumPy header"):
        read_table(tmp_path / "t.cs")


def test_a_table_that_the_system_does_not_let_be_read_is_a_table_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TableError, match=r"nnn\.cs cannot be read: File name too long"):
        read_table(tmp_path / ("n" * 300 + ".cs"))
    path = write_table(tmp_path / "t.cs", uid=uids(2))
    monkeypatch.setattr(Path, "open", lambda *_: os.open(tmp_path, os.O_WRONLY))
    with pytest.raises(TableError, match=r"t\.cs cannot be read: Is a directory"):
        read_table(path)


def test_a_missing_table_and_a_folder_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(MissingStackError, match=r"no table .*absent\.cs\."):
        read_table(tmp_path / "absent.cs")
    (tmp_path / "moved.cs").symlink_to("/old/disk/J3/moved.cs")
    with pytest.raises(MissingStackError, match=r"moved\.cs: it is a link to /old/disk/J3/moved\.cs, which does not exist"):
        read_table(tmp_path / "moved.cs")
    with pytest.raises(MissingStackError, match=r"it is a folder; give the \.cs file in it"):
        read_table(tmp_path)
    (tmp_path / "zarr.json").touch()
    with pytest.raises(MissingStackError, match=r"it is a Zarr store; open it with ZarrDataset"):
        read_table(tmp_path)


@pytest.mark.parametrize("name", ["a\0b.cs", "file/t.cs", "loop.cs", os.devnull], ids=["zero byte", "inside a file", "loop", "device"])
def test_what_cannot_be_a_table_is_missing(tmp_path: Path, name: str) -> None:
    (tmp_path / "loop.cs").symlink_to("loop.cs")
    (tmp_path / "file").touch()
    with pytest.raises(MissingStackError, match="There is no table"):
        read_table(tmp_path / name)


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "rows", "columns"),
    [("cryosparc_J2_particles_exported.cs", 22, 42), ("cryosparc_P12_J24_001_particles.cs", 2019, 34), ("4k_dataset.cs", 0, 106)],
)
def test_real_tables_are_read_whole(shared: Path, name: str, rows: int, columns: int) -> None:
    table, expected = read_table(shared / "real/metadata" / name), np.load(shared / "real/metadata" / name)
    assert (len(table), len(table.fields)) == (rows, columns)
    for field in expected.dtype.names:
        np.testing.assert_array_equal(table[field], expected[field])


def test_a_header_with_less_than_no_rows_is_a_table_error(tmp_path: Path) -> None:
    path = write_table(tmp_path / "t.cs", **some_columns(20))
    path.write_bytes(path.read_bytes().replace(b"'shape': (20,)", b"'shape': (-2,)"))
    with pytest.raises(TableError, match="not a table"):
        read_table(path)


def test_a_table_is_the_same_through_another_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_table(tmp_path / "t.cs", uid=uids(20))
    table = pickle.loads(pickle.dumps(read_table(path)))
    status = os.fstat

    def elsewhere(descriptor: int) -> os.stat_result:
        numbers = list(status(descriptor))
        numbers[stat.ST_DEV] += 7  # file systems on a network number themselves anew on each machine
        numbers[stat.ST_INO] += 7  # and some of them their files
        exact = {name: getattr(status(descriptor), name) for name in ("st_atime_ns", "st_mtime_ns", "st_ctime_ns")}
        return os.stat_result(numbers, exact)

    monkeypatch.setattr(os, "fstat", elsewhere)
    np.testing.assert_array_equal(table["uid"], uids(20))


def test_a_table_that_was_written_again_has_changed(tmp_path: Path) -> None:
    path = write_table(tmp_path / "t.cs", uid=uids(20))
    table = read_table(path)
    written = path.stat()
    os.utime(write_table(path, uid=uids(20, seed=1)), ns=(0, 0))
    with pytest.raises(TableError, match="has changed since"):
        table["uid"]
    os.utime(write_table(path, uid=uids(30)), ns=(written.st_atime_ns, written.st_mtime_ns))  # as a copy that keeps times is
    with pytest.raises(TableError, match="has changed since"):
        table["uid"]


def test_a_file_system_that_gives_less_than_is_asked_for_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(io.FileIO):
        def readinto(self, buffer: Any, /) -> int:
            return super().readinto(memoryview(buffer)[:1000])

    path = write_table(tmp_path / "a.cs", uid=np.arange(3000, dtype="u8"), blob__idx=np.arange(3000, dtype="u4"))
    table = read_table(path)
    monkeypatch.setattr(Path, "open", lambda path, *_, **__: Slow(path))
    np.testing.assert_array_equal(table["uid"], np.arange(3000))
