from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from support import ctf_columns, uids, write_particles, write_table

from cryolike_data import IndexedDataset, read_table
from cryolike_data.cryosparc.join import load_table
from cryolike_data.errors import ArgumentError, CryolikeDataError, MissingDependencyError, MissingStackError, PairingError, TableError

N = 6


def halves(folder: Path, left: Any = None, right: Any = None) -> tuple[Path, Path]:
    """Two tables, of blob/idx and of ctf/df1_A, with given uids."""
    left = uids(N) if left is None else np.asarray(left, np.uint64)
    right = uids(N) if right is None else np.asarray(right, np.uint64)
    blob = write_table(folder / "blob.cs", uid=left, blob__idx=np.arange(len(left), dtype="u4"))
    ctf = write_table(folder / "ctf.cs", uid=right, ctf__df1_A=10.0 * np.arange(len(right), dtype="f4"))
    return blob, ctf


def write_group(path: Path, metafiles: dict[str, str], *, items: int = N, kind: str = "particle", **extra: Any) -> Path:
    results = {slot: {"metafile": name, "num_items": items, "type": f"{kind}.{slot}"} for slot, name in metafiles.items()}
    group = {"description": "", "name": "particles", "title": "Particles", "type": kind}
    text = yaml.safe_dump({"group": group, "results": results, "version": "v4.5.3", **extra})
    path.write_text("created: 2020-10-05 17:01:57.926000\n" + text, "utf-8")
    return path


# Joins


def test_passthrough_rows_are_joined_by_uid_and_not_by_row(tmp_path: Path) -> None:
    shuffle = np.array([3, 0, 5, 1, 4, 2])
    blob, ctf = halves(tmp_path, right=uids(N)[shuffle])
    table = load_table(blob, passthrough=ctf)
    assert table["ctf/df1_A"].tolist() == [10.0 * shuffle.tolist().index(i) for i in range(N)]
    np.testing.assert_array_equal(table["uid"], uids(N))
    np.testing.assert_array_equal(table["blob/idx"], np.arange(N))


def test_uids_that_a_float_cannot_tell_apart_are_joined_exactly(tmp_path: Path) -> None:
    close = [2**63 + i for i in range(N)]
    blob, ctf = halves(tmp_path, close, close[::-1])
    assert load_table(blob, passthrough=ctf)["ctf/df1_A"].tolist() == [50, 40, 30, 20, 10, 0]


def test_uids_with_a_sign_are_joined_by_their_bits(tmp_path: Path) -> None:
    close = np.array([2**63 + i for i in range(N)], np.uint64)
    blob, _ = halves(tmp_path, close)
    ctf = write_table(tmp_path / "signed.cs", uid=close[::-1].view(np.int64), ctf__df1_A=10.0 * np.arange(N, dtype="f4"))
    assert load_table(blob, passthrough=ctf)["ctf/df1_A"].tolist() == [50, 40, 30, 20, 10, 0]


def test_several_passthrough_tables_are_joined_one_after_another(tmp_path: Path) -> None:
    blob, ctf = halves(tmp_path)
    pose = write_table(tmp_path / "pose.cs", uid=uids(N)[::-1], alignments3D__pose=np.arange(3 * N, dtype="f4").reshape(N, 3))
    table = load_table(blob, passthrough=[ctf, pose])
    assert set(table.slots) == {"blob", "ctf", "alignments3D"}
    assert table["alignments3D/pose"][:, 0].tolist() == [15, 12, 9, 6, 3, 0]


def test_a_column_group_of_both_tables_comes_whole_from_the_first(tmp_path: Path) -> None:
    blob, _ = halves(tmp_path)
    stale = write_table(tmp_path / "stale.cs", uid=uids(N), blob__idx=np.full(N, 99, "u4"), blob__psize_A=np.full(N, 9, "f4"))
    table = load_table(blob, passthrough=stale)
    assert table["blob/idx"].tolist() == list(range(N))
    assert "blob/psize_A" not in table


def test_of_several_passthrough_tables_the_first_wins(tmp_path: Path) -> None:
    blob, ctf = halves(tmp_path)
    stale = write_table(tmp_path / "stale.cs", uid=uids(N), ctf__df1_A=np.full(N, 99, "f4"))
    assert load_table(blob, passthrough=[ctf, stale])["ctf/df1_A"].tolist() == [0, 10, 20, 30, 40, 50]


def test_each_column_knows_the_file_it_came_from(tmp_path: Path) -> None:
    blob, ctf = halves(tmp_path)
    pose = write_table(tmp_path / "pose.cs", uid=uids(N), alignments3D__pose=np.zeros((N, 3), "f4"))
    table = load_table(blob, passthrough=[ctf, pose])
    assert [table.origin(name) for name in ("blob/idx", "ctf/df1_A", "alignments3D/pose")] == [blob, ctf, pose]


def test_a_data_set_pairs_images_and_optics_of_two_tables_by_uid(tmp_path: Path) -> None:
    cs, images = write_particles(tmp_path, N, **dict.fromkeys(ctf_columns(1)))
    shuffle = np.array([3, 0, 5, 1, 4, 2])
    defocus = 1e4 + np.arange(N, dtype="f4")
    other = write_table(tmp_path / "J2/pass.cs", uid=uids(N)[shuffle], ctf__df1_A=defocus[shuffle])
    ds = IndexedDataset(cs, passthrough=other)
    batch = ds.batch(range(N))
    np.testing.assert_array_equal(batch.images.numpy(), images)
    np.testing.assert_array_equal(batch.ctf.defocus_u.numpy(), defocus)


@pytest.mark.parametrize("order", ["first", "second"])
def test_stacks_are_looked_for_from_the_table_that_names_them(tmp_path: Path, order: str) -> None:
    cs, images = write_particles(tmp_path / "project", N, **dict.fromkeys(ctf_columns(1)))
    far = write_table(tmp_path / "elsewhere/pass.cs", uid=uids(N), **ctf_columns(N))
    ds = IndexedDataset(cs, passthrough=far) if order == "first" else IndexedDataset(far, passthrough=cs)
    np.testing.assert_array_equal(ds.read(range(N)).numpy(), images)


def test_image_numbers_with_a_fraction_are_said_to_lie_in_the_table_that_has_them(tmp_path: Path) -> None:
    cs, _ = write_particles(tmp_path, N, blob__idx=np.full(N, 0.5))
    optics = write_table(tmp_path / "J2/optics.cs", uid=uids(N), **ctf_columns(N))
    with pytest.raises(TableError, match=rf"blob/idx of {cs} holds 0\.5 in row 0"):
        IndexedDataset(optics, passthrough=cs)


@pytest.mark.parametrize(("n_left", "n_right"), [(2, 0), (0, 2), (2, 3)])
def test_rows_without_a_partner_are_an_error_with_both_counts_and_the_first_uids(tmp_path: Path, n_left: int, n_right: int) -> None:
    left, right = [1, 2, 3, *range(100, 100 + n_left)], [3, 2, 1, *range(200, 200 + n_right)]
    blob, ctf = halves(tmp_path, left, right)
    with pytest.raises(PairingError) as caught:
        load_table(blob, passthrough=ctf)
    said = str(caught.value)
    assert f"{n_left} of {3 + n_left} rows" in said
    assert f"{n_right} of {3 + n_right} rows" in said
    assert ("100, 101" in said) == (n_left > 0)
    assert ("200, 201" in said) == (n_right > 0)
    assert 'unmatched="drop"' in said


def test_dropping_keeps_the_common_rows_in_the_order_of_the_first_table(tmp_path: Path) -> None:
    blob, ctf = halves(tmp_path, [5, 1, 9, 2, 7], [7, 2, 8, 5])
    table = load_table(blob, passthrough=ctf, unmatched="drop")
    assert len(table) == 3
    assert table["uid"].tolist() == [5, 2, 7]
    assert table["blob/idx"].tolist() == [0, 3, 4]
    assert table["ctf/df1_A"].tolist() == [30, 10, 0]


def test_dropping_logs_how_many_rows_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    blob, ctf = halves(tmp_path, [5, 1, 9, 2, 7], [7, 2, 8, 5])
    with caplog.at_level(logging.WARNING, "cryolike_data"):
        load_table(blob, passthrough=ctf, unmatched="drop")
    assert "2 of 5 rows" in caplog.text
    assert "1 of 4 rows" in caplog.text


def test_nothing_is_logged_where_nothing_is_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    blob, ctf = halves(tmp_path)
    load_table(blob, passthrough=ctf, unmatched="drop")
    assert not caplog.records


def test_dropping_every_row_is_an_error_about_uids(tmp_path: Path) -> None:
    cs, _ = write_particles(tmp_path, N)
    other = write_table(tmp_path / "pass.cs", uid=uids(N, seed=5), alignments3D__pose=np.zeros((N, 3), "f4"))
    with pytest.raises(CryolikeDataError, match="uid"):
        IndexedDataset(cs, passthrough=other, unmatched="drop")


def test_the_row_of_a_particle_is_its_row_in_the_first_file_after_dropping(tmp_path: Path) -> None:
    cs, _ = write_particles(tmp_path, N)
    keep = np.array([1, 4, 5])
    other = write_table(tmp_path / "pass.cs", uid=uids(N)[keep], alignments3D__pose=np.zeros((3, 3), "f4"))
    ds = IndexedDataset(cs, passthrough=other, unmatched="drop")
    np.testing.assert_array_equal(ds.particles.uid, np.load(cs)["uid"][keep])
    np.testing.assert_array_equal(ds.particles.row, keep)
    third = write_table(tmp_path / "third.cs", uid=uids(N)[[5, 0, 4]], alignments2D__pose=np.array([50, 0, 40], "f4"))
    twice = IndexedDataset(cs, passthrough=[other, third], unmatched="drop")
    for chosen, rows in ((twice.select([1, 0]), [5, 4]), (twice, [4, 5])):
        assert chosen.particles.row.tolist() == rows
        np.testing.assert_array_equal(chosen.particles.uid, uids(N)[rows])
        np.testing.assert_array_equal(chosen.particles.ctf.defocus_u, ctf_columns(N)["ctf__df1_A"][rows])


@pytest.mark.parametrize("unmatched", ["error", "drop"])
@pytest.mark.parametrize("side", ["first", "second"])
def test_duplicate_uids_in_either_table_are_an_error_that_shows_them(tmp_path: Path, side: str, unmatched: Any) -> None:
    double = [11, 12, 13, 11, 12]
    blob, ctf = halves(tmp_path, *((double, [11, 12, 13]) if side == "first" else ([11, 12, 13], double)))
    with pytest.raises(PairingError, match=r"2 uids of .*occur more than once.*11, 12"):
        load_table(blob, passthrough=ctf, unmatched=unmatched)


@pytest.mark.parametrize("unmatched", ["error", "drop"])
@pytest.mark.parametrize("side", ["first", "second"])
def test_uids_that_are_all_zero_are_an_error(tmp_path: Path, side: str, unmatched: Any) -> None:
    blob, ctf = halves(tmp_path, *((np.zeros(3), [1, 2, 3]) if side == "first" else ([1, 2, 3], np.zeros(3))))
    with pytest.raises(PairingError, match=f"All 3 uids of .*{'blob' if side == 'first' else 'ctf'}.cs are zero"):
        load_table(blob, passthrough=ctf, unmatched=unmatched)


def test_a_table_without_uids_cannot_be_joined(tmp_path: Path) -> None:
    blob, _ = halves(tmp_path)
    bare = write_table(tmp_path / "bare.cs", ctf__df1_A=np.zeros(N, "f4"))
    with pytest.raises(PairingError, match=r"bare\.cs has no uid column"):
        load_table(blob, passthrough=bare)


@pytest.mark.parametrize("uid", [uids(N).astype("f8"), np.full(N, b"none"), uids(N)[:, None]], ids=["rounded", "text", "a row each"])
def test_uids_that_are_no_integers_cannot_be_joined(tmp_path: Path, uid: np.ndarray) -> None:
    blob, _ = halves(tmp_path)
    other = write_table(tmp_path / "other.cs", uid=uid, ctf__df1_A=np.zeros(N, "f4"))
    with pytest.raises(TableError, match=r"uid of .*other\.cs holds .* for each particle, and should hold an integer"):
        load_table(blob, passthrough=other)


@pytest.mark.parametrize("joined", [True, False])
def test_an_unknown_rule_for_unmatched_rows_is_an_error(tmp_path: Path, joined: bool) -> None:
    blob, ctf = halves(tmp_path)
    with pytest.raises(ArgumentError, match="unmatched"):
        load_table(blob, passthrough=ctf if joined else None, unmatched="ignore")  # type: ignore[arg-type]


# Groups


def test_a_group_is_read_in_place_of_its_tables(tmp_path: Path) -> None:
    cs, images = write_particles(tmp_path, N, **dict.fromkeys(ctf_columns(1)))
    defocus = 1e4 + np.arange(N, dtype="f4")
    write_table(tmp_path / "J1/J1_passthrough_particles.cs", uid=uids(N)[::-1], ctf__df1_A=defocus[::-1])
    group = write_group(cs.parent / "particles.csg", {"ctf": ">J1_passthrough_particles.cs", "blob": ">particles.cs"})
    ds = IndexedDataset(group)
    np.testing.assert_array_equal(ds.read(range(N)).numpy(), images)
    np.testing.assert_array_equal(ds.particles.ctf.defocus_u, defocus)


@pytest.mark.parametrize("metafile", [">particles.cs", "J1/particles.cs"])
def test_a_group_that_is_reached_by_a_link_finds_its_tables_and_stacks(tmp_path: Path, metafile: str) -> None:
    cs, images = write_particles(tmp_path / "project", N)
    group = write_group(cs.parent / "particles.csg", {"blob": metafile})
    (link := tmp_path / "mine.csg").symlink_to(group)
    np.testing.assert_array_equal(IndexedDataset(link).read(range(N)).numpy(), images)


def test_images_may_be_named_by_the_passthrough_table_of_a_group(tmp_path: Path) -> None:
    # As in refinements: the rows are those of the main table, the blob columns lie in the passthrough table.
    cs, images = write_particles(tmp_path, N, **dict.fromkeys(ctf_columns(1)))
    cs.rename(cs.parent / "J1_passthrough_particles.cs")
    write_table(tmp_path / "J1/J1_005_particles.cs", uid=uids(N)[::-1], **ctf_columns(N))
    group = write_group(cs.parent / "particles.csg", {"ctf": ">J1_005_particles.cs", "blob": ">J1_passthrough_particles.cs"})
    np.testing.assert_array_equal(IndexedDataset(group).read(range(N)).numpy(), images[::-1])


def test_a_group_decides_which_table_a_column_group_comes_from(tmp_path: Path) -> None:
    # The main table may still carry blob columns of an earlier job; the group names the table that holds.
    blob, _ = halves(tmp_path)
    write_table(tmp_path / "main.cs", uid=uids(N), ctf__df1_A=np.zeros(N, "f4"), blob__idx=np.full(N, 99, "u4"))
    blob.rename(tmp_path / "passthrough_blob.cs")
    table = load_table(write_group(tmp_path / "g.csg", {"ctf": ">main.cs", "blob": ">passthrough_blob.cs"}))
    assert table["blob/idx"].tolist() == list(range(N))


def test_metafiles_may_be_named_from_the_project_folder(tmp_path: Path) -> None:
    halves(tmp_path / "project/J7")
    (tmp_path / "project/exports").mkdir()
    group = write_group(tmp_path / "project/exports/g.csg", {"blob": "J7/blob.cs", "ctf": "J7/ctf.cs"})
    assert load_table(group)["ctf/df1_A"].tolist() == [0, 10, 20, 30, 40, 50]


def test_a_group_works_as_passthrough(tmp_path: Path) -> None:
    blob, _ = halves(tmp_path)
    assert "ctf/df1_A" in load_table(blob, passthrough=write_group(tmp_path / "g.csg", {"ctf": ">ctf.cs"}))


@pytest.mark.parametrize("place", ["first", "passthrough"])
def test_rows_without_a_partner_inside_a_group_can_be_dropped(tmp_path: Path, place: str) -> None:
    blob, _ = halves(tmp_path, [5, 1, 9, 2], [2, 8, 7, 5])
    group = write_group(tmp_path / "g.csg", {"blob": ">blob.cs", "ctf": ">ctf.cs"}, items=4)
    with pytest.raises(PairingError, match="do not hold the same particles"):
        load_table(group)
    table = load_table(group, unmatched="drop") if place == "first" else load_table(blob, passthrough=group, unmatched="drop")
    assert table["uid"].tolist() == [5, 2]
    assert table["ctf/df1_A"].tolist() == [30, 0]


def test_a_group_takes_every_column_group_that_it_names_a_table_for(tmp_path: Path) -> None:
    main = write_table(tmp_path / "main.cs", uid=uids(N), blob__idx=np.arange(N, dtype="u4"), ctf__df1_A=np.zeros(N, "f4"))
    write_table(tmp_path / "pose.cs", uid=uids(N), alignments3D__pose=np.zeros((N, 3), "f4"))
    group = write_group(tmp_path / "g.csg", {"blob": f">{main.name}", "ctf": f">{main.name}", "alignments3D": ">pose.cs"})
    assert set(load_table(group).slots) == {"blob", "ctf", "alignments3D"}


def test_a_group_that_names_one_table_for_all_columns_needs_no_uids(tmp_path: Path) -> None:
    write_table(tmp_path / "t.cs", uid=np.zeros(N, "u8"), blob__idx=np.arange(N, dtype="u4"), ctf__df1_A=np.zeros(N, "f4"))
    assert len(load_table(write_group(tmp_path / "g.csg", {"blob": ">t.cs", "ctf": ">t.cs"}))) == N


@pytest.mark.parametrize("items", [3, 9])
def test_a_group_with_another_number_of_rows_than_its_table_is_an_error(tmp_path: Path, items: int) -> None:
    halves(tmp_path)
    with pytest.raises(TableError, match=rf"promises {items} rows in blob\.cs, which has 6"):
        load_table(write_group(tmp_path / "g.csg", {"blob": ">blob.cs"}, items=items))


def test_a_table_that_should_lie_beside_its_group_is_not_taken_from_elsewhere(tmp_path: Path) -> None:
    halves(tmp_path / "project")
    (tmp_path / "project/J7").mkdir()
    with pytest.raises(MissingStackError, match=r"1 tables named by .*g\.csg were not found"):
        load_table(write_group(tmp_path / "project/J7/g.csg", {"blob": ">blob.cs"}))


def test_all_missing_metafiles_are_listed_together(tmp_path: Path) -> None:
    halves(tmp_path)
    group = write_group(tmp_path / "g.csg", {"blob": ">gone_a.cs", "ctf": ">ctf.cs", "location": ">gone_b.cs"})
    with pytest.raises(MissingStackError) as caught:
        load_table(group)
    assert "2 tables" in str(caught.value)
    assert "gone_a.cs" in str(caught.value)
    assert "gone_b.cs" in str(caught.value)


def test_a_group_of_volumes_is_refused(tmp_path: Path) -> None:
    halves(tmp_path)
    with pytest.raises(TableError, match="does not describe particles"):
        load_table(write_group(tmp_path / "g.csg", {"map": ">blob.cs"}, kind="volume"))


@pytest.mark.parametrize(
    "text",
    ["", "results: 3", "a: [", "- 1\n- 2", "results: {blob: 3}", "\x93NUMPY", "results: {blob: {type: particle.blob}}", "[" * 5000],
)
def test_a_damaged_group_is_a_table_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "g.csg").write_bytes(text.encode("latin-1"))
    with pytest.raises(TableError, match=r"g\.csg"):
        load_table(tmp_path / "g.csg")


def test_what_users_read_tables_with_reads_groups_too(tmp_path: Path) -> None:
    halves(tmp_path)
    table = read_table(write_group(tmp_path / "g.csg", {"blob": ">blob.cs", "ctf": ">ctf.cs"}))
    np.testing.assert_array_equal(table["blob/idx"], np.arange(N))
    np.testing.assert_array_equal(table["ctf/df1_A"], 10.0 * np.arange(N))


def test_a_group_that_names_no_possible_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "g.csg").write_text(f"results: {{blob: {{type: particle.blob, metafile: '{'n' * 300}'}}}}")
    with pytest.raises(MissingStackError, match=r"1 tables named by .*g\.csg were not found"):
        load_table(tmp_path / "g.csg")


def test_a_missing_group_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(MissingStackError, match=r"absent\.csg"):
        load_table(tmp_path / "absent.csg")


def test_a_group_without_pyyaml_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    halves(tmp_path)
    group = write_group(tmp_path / "g.csg", {"blob": ">blob.cs"})
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(MissingDependencyError, match=r"cryolike-data\[csg\]"):
        load_table(group)


def test_a_group_whose_number_of_rows_is_no_number_is_a_table_error(tmp_path: Path) -> None:
    write_table(tmp_path / "t.cs", uid=uids(3))
    group = tmp_path / "g.csg"
    group.write_text("results:\n  blob: {metafile: '>t.cs', num_items: ten, type: particle.blob}\n")
    with pytest.raises(TableError, match="not a CryoSPARC group file"):
        load_table(group)
