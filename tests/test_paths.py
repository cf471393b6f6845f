from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from cryolike_data.cryosparc.paths import resolve_paths, unique_paths
from cryolike_data.errors import ArgumentError, MissingStackError


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def resolve(names: list[str] | str, table: Path, folder: str | Path | None = None) -> list[Path]:
    names = [names] if isinstance(names, str) else names
    return [Path(path) for path in resolve_paths(names, lambda: [1] * len(names), table=table, folder=folder)]


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A table in job J3 of a project, with the working directory somewhere else."""
    touch(tmp_path / "disk/project/J3/particles.cs")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path / "disk/project/J3/particles.cs"


# The path column


def test_unique_paths_come_in_order_of_appearance_with_each_rows_number() -> None:
    column = np.array([b"b", b"b", b"a", b"c", b"a", b"b"])
    names, file = unique_paths(column)
    assert names == ["b", "a", "c"]
    assert file.tolist() == [0, 0, 1, 2, 1, 0]


def test_paths_are_decoded_as_utf_8() -> None:
    column = np.array(["J1/é中.mrc".encode(), b"J1/a.mrc"])
    assert unique_paths(column)[0] == ["J1/é中.mrc", "J1/a.mrc"]


def test_paths_that_are_no_utf_8_still_name_the_same_bytes_on_disk(tmp_path: Path) -> None:
    raw = b"\xe9.mrc"
    with open(bytes(tmp_path) + b"/" + raw, "wb"):
        pass
    names, _ = unique_paths(np.array([raw]))
    assert bytes(resolve(names, tmp_path / "t.cs", tmp_path)[0]).endswith(raw)


def test_unicode_columns_need_no_decoding() -> None:
    assert unique_paths(np.array(["é.mrc", "a.mrc"]))[0] == ["é.mrc", "a.mrc"]


def test_an_empty_column_names_no_files() -> None:
    names, file = unique_paths(np.empty(0, "S5"))
    assert (names, len(file)) == ([], 0)


# With folder=


@pytest.mark.parametrize("name", ["a.mrc", "J1/extract/a.mrc", ">J1/imported/a.mrc", "/old/disk/a.mrc"])
def test_with_folder_a_stack_is_found_by_its_file_name(table: Path, tmp_path: Path, name: str) -> None:
    touch(tmp_path / "stacks/a.mrc")
    assert resolve(name, table, tmp_path / "stacks") == [tmp_path / "stacks/a.mrc"]


def test_with_folder_no_other_place_is_tried(table: Path, tmp_path: Path) -> None:
    touch(tmp_path / "cwd/J1/a.mrc", table.parent / "J1/a.mrc", tmp_path / "stacks/J1/a.mrc")
    with pytest.raises(MissingStackError, match="directly in that folder"):
        resolve("J1/a.mrc", table, tmp_path / "stacks")


def test_folder_expands_the_home_directory(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    touch(tmp_path / "home/stacks/a.mrc")
    assert resolve("J1/a.mrc", table, "~/stacks") == [tmp_path / "home/stacks/a.mrc"]


def test_a_folder_that_is_none_is_an_error_that_names_the_argument(table: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingStackError, match=r"folder=.*nowhere"):
        resolve("a.mrc", table, tmp_path / "nowhere")


def test_two_paths_with_one_file_name_are_refused_with_folder(table: Path, tmp_path: Path) -> None:
    touch(tmp_path / "stacks/a.mrc")
    with pytest.raises(ArgumentError) as caught:
        resolve(["J1/a.mrc", "J2/a.mrc"], table, tmp_path / "stacks")
    assert "J1/a.mrc and J2/a.mrc" in str(caught.value)
    assert "leave folder= out" in str(caught.value)


def test_a_path_in_two_spellings_is_no_collision(table: Path, tmp_path: Path) -> None:
    touch(tmp_path / "stacks/a.mrc")
    found = resolve(["J1/a.mrc", ">J1/a.mrc", "J1//./a.mrc"], table, tmp_path / "stacks")
    assert found == [tmp_path / "stacks/a.mrc"] * 3


def test_two_links_to_one_stack_are_no_collision(table: Path, tmp_path: Path) -> None:
    touch(tmp_path / "stacks/real.mrc")
    for name in ("a.mrc", "b.mrc"):
        (tmp_path / "stacks" / name).symlink_to(tmp_path / "stacks/real.mrc")
    assert len(resolve(["J1/a.mrc", "J2/b.mrc"], table, tmp_path / "stacks")) == 2


# Without folder=


def test_an_absolute_path_is_taken_as_it_is(table: Path, tmp_path: Path) -> None:
    touch(tmp_path / "other/a.mrc")
    assert resolve(str(tmp_path / "other/a.mrc"), table) == [tmp_path / "other/a.mrc"]


def test_an_absolute_path_is_not_looked_for_elsewhere(table: Path) -> None:
    touch(table.parent / "a.mrc")
    with pytest.raises(MissingStackError):
        resolve("/no/such/disk/a.mrc", table)


@pytest.mark.parametrize("place", ["cwd", "disk/project/J3", "disk/project", "disk", "."])
def test_a_relative_path_is_found_from_here_from_the_table_and_from_the_folders_above(table: Path, tmp_path: Path, place: str) -> None:
    touch(tmp_path / place / "J1/extract/a.mrc")
    assert resolve("J1/extract/a.mrc", table) == [tmp_path / place / "J1/extract/a.mrc"]


def test_places_are_tried_in_order(table: Path, tmp_path: Path) -> None:
    order = ["cwd", "disk/project/J3", "disk/project", "disk", "."]
    for place in reversed(order):
        touch(tmp_path / place / "J1/a.mrc")
        assert resolve("J1/a.mrc", table) == [tmp_path / place / "J1/a.mrc"]


def test_a_leading_angle_bracket_means_the_folder_of_the_table_first(table: Path, tmp_path: Path) -> None:
    touch(tmp_path / "cwd/J1/a.mrc", table.parent / "J1/a.mrc", tmp_path / "disk/J1/a.mrc")
    assert resolve(">J1/a.mrc", table) == [table.parent / "J1/a.mrc"]


def test_a_table_named_relative_to_the_working_directory_has_folders_above(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(table.parent.parent / "J1/a.mrc")
    monkeypatch.chdir(table.parent)
    assert resolve("J1/a.mrc", Path("particles.cs")) == [table.parent.parent / "J1/a.mrc"]


@pytest.mark.parametrize("link", ["particles.cs", "J3", "project"])
def test_a_table_that_is_reached_by_a_link_has_its_stacks_where_it_lies(table: Path, tmp_path: Path, link: str) -> None:
    touch(stack := table.parent.parent / "J1/a.mrc")
    elsewhere = tmp_path / "home" / link
    elsewhere.parent.mkdir()
    target = next(path for path in (table, *table.parents) if path.name == link)
    elsewhere.symlink_to(target)
    by_link = elsewhere / table.relative_to(target)
    assert [path.resolve() for path in resolve("J1/a.mrc", by_link)] == [stack]
    touch(beside := tmp_path / "home/J1/a.mrc")
    assert [path.resolve() for path in resolve("J1/a.mrc", by_link)] == [stack if link == "project" else beside]


@pytest.mark.parametrize(("named", "there"), [("a.mrc", "a.mrcs"), ("a.mrcs", "a.mrc")])
@pytest.mark.parametrize("with_folder", [True, False])
def test_mrc_and_mrcs_stand_in_for_each_other(table: Path, named: str, there: str, with_folder: bool) -> None:
    touch(table.parent / there)
    assert resolve(named, table, table.parent if with_folder else None) == [table.parent / there]


def test_a_file_of_the_exact_name_farther_away_beats_a_swapped_suffix(table: Path, tmp_path: Path) -> None:
    touch(table.parent / "J1/a.mrcs", tmp_path / "J1/a.mrc")
    assert resolve("J1/a.mrc", table) == [tmp_path / "J1/a.mrc"]


@pytest.mark.parametrize("names", [["J1/a.mrc", "J1/a.mrcs"], ["J1/a.mrcs", "J1/a.mrc"]])
def test_two_names_that_differ_in_the_suffix_do_not_share_a_file(table: Path, names: list[str]) -> None:
    touch(table.parent / "J1/a.mrc")
    with pytest.raises(ArgumentError, match="same file"):
        resolve(names, table)


def test_equal_file_names_in_different_jobs_are_different_stacks(table: Path) -> None:
    project = table.parent.parent
    touch(project / "J1/a.mrc", project / "J2/a.mrc")
    assert resolve(["J1/a.mrc", "J2/a.mrc"], table) == [project / "J1/a.mrc", project / "J2/a.mrc"]


@pytest.mark.parametrize("with_folder", [True, False])
def test_found_files_do_not_depend_on_the_working_directory(table: Path, monkeypatch: pytest.MonkeyPatch, with_folder: bool) -> None:
    touch(table.parent / "stacks/a.mrc")
    monkeypatch.chdir(table.parent)
    assert resolve("stacks/a.mrc", Path("particles.cs"), "stacks" if with_folder else None) == [table.parent / "stacks/a.mrc"]


@pytest.mark.parametrize(
    "more", [[], ["J1/sub/b.mrc"], ["J1/sub/deep/b.mrc", "J1/sub2/b.mrc"], ["J2/b.mrc"], ["b.mrc"], [">J1/c.mrc"], [">d.mrc"]]
)
def test_stacks_of_one_folder_are_found_whatever_lies_beside_and_below_it(table: Path, tmp_path: Path, more: list[str]) -> None:
    names = ["J1/sub/a.mrc", "J1/sub/z.mrc", *more, "J1/sub/k.mrc"]
    expected = [(table.parent if name.startswith(">") else table.parent.parent) / name.removeprefix(">") for name in names]
    touch(*expected)
    assert resolve(names, table) == expected


def test_many_stacks_in_folders_below_a_common_one_are_found(table: Path) -> None:
    names = ["J1/a.mrc", *(f"J1/b/{number}.mrc" for number in range(40)), "J1/z.mrc"]
    touch(*(table.parent / name for name in names))
    assert resolve(names, table) == [table.parent / name for name in names]


def test_a_link_to_a_stack_is_a_stack(table: Path, tmp_path: Path) -> None:
    touch(tmp_path / "elsewhere/real.mrc")
    (table.parent / "a.mrc").symlink_to(tmp_path / "elsewhere/real.mrc")
    assert resolve("a.mrc", table) == [table.parent / "a.mrc"]


# What is not there


def test_dangling_links_and_missing_files_are_told_apart(table: Path, tmp_path: Path) -> None:
    (table.parent / "a.mrc").symlink_to(tmp_path / "unmounted/real.mrc")
    with pytest.raises(MissingStackError) as caught:
        resolve(["a.mrc", "b.mrc"], table)
    link, missing = [line for line in str(caught.value).splitlines() if ".mrc " in line]
    assert f"a.mrc (1 rows) is a link at {table.parent / 'a.mrc'} to {tmp_path / 'unmounted/real.mrc'}, which does not exist" in link
    assert "b.mrc (1 rows) looked in:" in missing


@pytest.mark.parametrize("folder", ["J1", "J1/extract"])
def test_a_dangling_link_to_a_folder_is_told(table: Path, tmp_path: Path, folder: str) -> None:
    project = table.parents[1]
    (project / folder).parent.mkdir(exist_ok=True)
    (project / folder).symlink_to(tmp_path / "unmounted")
    with pytest.raises(MissingStackError) as caught:
        resolve(["J1/extract/a.mrc", "J2/extract/b.mrc"], table)
    link, missing = [line for line in str(caught.value).splitlines() if ".mrc " in line]
    assert link == f"  J1/extract/a.mrc (1 rows) lies behind {project / folder}, a link to {tmp_path / 'unmounted'}, which does not exist"
    assert "looked in" in missing


def test_all_missing_stacks_are_in_one_error_with_their_rows_and_a_remedy(table: Path) -> None:
    touch(table.parent / "there.mrc")
    names = [f"J1/gone_{i}.mrc" for i in range(30)] + ["there.mrc"]
    with pytest.raises(MissingStackError) as caught:
        resolve_paths(names, lambda: list(range(1, 32)), table=table)
    said = str(caught.value)
    assert "30 of 31 stacks" in said
    assert all(f"J1/gone_{i}.mrc ({i + 1} rows)" in said for i in range(30))
    assert "folder=" in said


def test_the_error_names_the_folders_that_were_searched(table: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingStackError) as caught:
        resolve("J1/extract/a.mrc", table)
    assert f"looked in: {tmp_path / 'cwd'}, {table.parent}, {table.parent.parent}, and the folders above" in str(caught.value)


def test_with_folder_the_error_names_that_folder_as_the_place_searched(table: Path, tmp_path: Path) -> None:
    (tmp_path / "disk/stacks").mkdir()
    with pytest.raises(MissingStackError) as caught:
        resolve("J1/extract/a.mrc", table, tmp_path / "disk/stacks")
    assert f"looked in: {tmp_path / 'disk/stacks'}\n" in str(caught.value)


def test_a_folder_under_the_name_of_a_stack_is_said_to_be_one(table: Path) -> None:
    (table.parent / "a.mrc").mkdir()
    with pytest.raises(MissingStackError, match=r"a\.mrc \(1 rows\) is a folder"):
        resolve("a.mrc", table)


def test_a_pipe_under_the_name_of_a_stack_is_said_to_be_no_file(table: Path) -> None:
    os.mkfifo(table.parent / "a.mrc")
    with pytest.raises(MissingStackError, match=r"a\.mrc \(1 rows\) is no file"):
        resolve_paths(["a.mrc"], lambda: [1], table=table)


@pytest.mark.parametrize("with_folder", [True, False])
@pytest.mark.parametrize("name", ["", ">"])
def test_a_row_without_a_path_is_said_to_have_none(table: Path, tmp_path: Path, name: str, with_folder: bool) -> None:
    with pytest.raises(MissingStackError, match=rf"'{name}' \(7 rows\) is no path"):
        resolve_paths([name], lambda: [7], table=table, folder=tmp_path if with_folder else None)


def test_spaces_at_the_end_of_a_path_can_be_seen_in_the_error(table: Path) -> None:
    with pytest.raises(MissingStackError, match=r"'a\.mrc ' \(1 rows\) looked in"):
        resolve_paths(["a.mrc "], lambda: [1], table=table)


@pytest.mark.parametrize("missing", ["gone", "folder", "link"])
def test_of_many_stacks_in_one_folder_those_that_are_no_files_are_missing(table: Path, missing: str) -> None:
    names = [f"J1/extract/{number}.mrc" for number in range(20)]
    touch(*(table.parents[1] / name for name in names))
    (table.parents[1] / names[7]).unlink()
    if missing == "folder":
        (table.parents[1] / names[7]).mkdir()
    elif missing == "link":  # to itself, which cannot be followed
        (table.parents[1] / names[7]).symlink_to(table.parents[1] / names[7])
    with pytest.raises(MissingStackError, match="1 of 20 stacks") as caught:
        resolve(names, table)
    assert names[7] in str(caught.value)


@pytest.mark.parametrize("number", [1, 20])
def test_stacks_of_a_folder_that_no_disk_can_have_are_missing_like_any_others(table: Path, number: int) -> None:
    with pytest.raises(MissingStackError, match=f"{number} of {number} stacks"):
        resolve([f"J1/a\0b/{k}.mrc" for k in range(number)], table)


@pytest.mark.parametrize("name", ["", "x" * 300 + ".mrc", "a\0b.mrc", "J1/"], ids=["empty", "too long", "zero byte", "slash"])
def test_a_path_that_no_file_can_have_is_missing_like_any_other(table: Path, name: str) -> None:
    with pytest.raises(MissingStackError, match="1 of 1 stacks"):
        resolve(name, table)


def test_a_folder_that_cannot_be_listed_is_asked_file_by_file(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As shared folders are that may be searched and not read (mode 711): what can be read there comes before what lies elsewhere.
    names = [f"J1/extract/s{k}.mrc" for k in range(40)]
    here, project = Path.cwd(), table.parents[1]
    touch(*(here / name for name in names), *(project / name for name in names[:-1]))
    listed = os.scandir

    def scandir(folder: str) -> object:
        if folder.startswith(str(here)):
            raise PermissionError(13, "Permission denied", folder)
        return listed(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    assert resolve(names, table) == [here / name for name in names]
    (here / names[3]).unlink()
    assert resolve(names, table)[2:5] == [here / names[2], project / names[3], here / names[4]]
