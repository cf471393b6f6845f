from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import ctf_columns, numbered_images, uids, write_job, write_stack, write_table

from cryolike_data import JobDirectoryDataset
from cryolike_data.errors import (
    ArgumentError,
    CryolikeDataError,
    MissingDependencyError,
    MissingStackError,
    PairingError,
    StackError,
    TableError,
)

COUNTS = [4, 2, 3]
N = sum(COUNTS)
FILE = np.repeat([0, 1, 2], COUNTS)
IDX = np.concatenate([np.arange(n) for n in COUNTS]).astype("u4")
MIXED = np.array([5, 2, 8, 0, 7, 3, 1, 6, 4])


def names(file: np.ndarray, *, job: str = "J4/restack", digits: int = 6, word: str = "restacked") -> list[str]:
    return [f"{job}/batch_{number:0{digits}d}_{word}.mrc" for number in file]


def write_record(job: Path, order: np.ndarray, *, name: str = "restacked_particles.cs", **changes: Any) -> Path:
    """The job's own table, which says that image k (in sequence) is that of passthrough row ``order[k]``."""
    columns: dict[str, Any] = {
        "uid": uids(N, seed=4)[order],
        "blob__path": names(FILE),
        "blob__idx": IDX,
        "blob__psize_A": np.full(N, 2.25, "f4"),
    } | changes
    return write_table(job / name, **{key: values for key, values in columns.items() if values is not None})


def same_images(ds: JobDirectoryDataset, images: np.ndarray) -> None:
    assert len(ds) == len(images)
    np.testing.assert_array_equal(ds.read(range(len(ds))).numpy(), images)


# Stacks in sequence


@pytest.mark.parametrize("kind", ["restack", "downsample"])
@pytest.mark.parametrize("digits", [1, 3, 6])
def test_row_k_is_image_k_over_the_numbered_stacks(tmp_path: Path, kind: str, digits: int) -> None:
    _, images = write_job(tmp_path, 4, COUNTS, kind=kind, digits=digits)
    ds = JobDirectoryDataset(tmp_path, 4)
    same_images(ds, images)
    np.testing.assert_array_equal(ds.particles.uid, uids(N, seed=4))
    np.testing.assert_array_equal(ds.particles.ctf.defocus_u, ctf_columns(N, seed=4)["ctf__df1_A"])


def test_stack_numbers_are_sorted_as_numbers(tmp_path: Path) -> None:
    # As words, batch_10 comes before batch_2.
    _, images = write_job(tmp_path, 4, [1] * 12, digits=1)
    same_images(JobDirectoryDataset(tmp_path, 4), images)


def test_padded_and_unpadded_numbers_may_mix(tmp_path: Path) -> None:
    job, images = write_job(tmp_path, 4, COUNTS)
    (job / "restack/batch_000001_restacked.mrc").rename(job / "restack/batch_1_restacked.mrc")
    same_images(JobDirectoryDataset(tmp_path, 4), images)


def test_stacks_may_end_in_mrcs(tmp_path: Path) -> None:
    job, images = write_job(tmp_path, 4, COUNTS)
    for path in list((job / "restack").iterdir()):
        path.rename(path.with_suffix(".mrcs"))
    same_images(JobDirectoryDataset(tmp_path, 4), images)


def test_restacked_images_are_preferred_to_downsampled_ones(tmp_path: Path) -> None:
    write_job(tmp_path, 4, [3] * 3, kind="downsample", box=4)
    _, images = write_job(tmp_path, 4, COUNTS)
    same_images(JobDirectoryDataset(tmp_path, 4), images)


def test_an_empty_restack_folder_gives_way_to_downsampled_images(tmp_path: Path) -> None:
    job, images = write_job(tmp_path, 4, COUNTS, kind="downsample")
    (job / "restack").mkdir()
    same_images(JobDirectoryDataset(tmp_path, 4), images)


def test_downsampled_images_do_not_stand_in_for_restacked_ones_that_are_out_of_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, _ = write_job(tmp_path, 4, COUNTS, kind="downsample")
    (job / "restack").symlink_to("/old/disk/J4/restack")
    with pytest.raises(MissingStackError, match="link to /old/disk/J4/restack"):
        JobDirectoryDataset(tmp_path, 4)
    (job / "restack").unlink()
    (job / "restack").mkdir()
    listed = os.listdir

    def refuse(folder: str | Path) -> list[str]:
        if str(folder).endswith("restack"):
            raise PermissionError(13, "Permission denied", str(folder))
        return listed(folder)

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(MissingStackError, match=r"restack cannot be listed: Permission denied"):
        JobDirectoryDataset(tmp_path, 4)


def test_other_files_among_the_stacks_are_ignored(tmp_path: Path) -> None:
    job, images = write_job(tmp_path, 4, COUNTS)
    for name in (
        "batch_000003_downsample.mrc",
        "batch_x_restacked.mrc",
        "batch_3_restacked.mrc.tmp",
        "notes.txt",
        "batch_3_restacked_old.mrc",
    ):
        (job / "restack" / name).write_bytes(b"")
    same_images(JobDirectoryDataset(tmp_path, 4), images)


@pytest.mark.parametrize("pairing", ["sequence", "uid"])
def test_links_beside_the_stacks_under_relions_names_are_no_other_stacks(tmp_path: Path, pairing: Any) -> None:
    job, images = write_job(tmp_path, 4, COUNTS)
    write_record(job, np.arange(N))
    for stack in list((job / "restack").iterdir()):
        stack.with_suffix(".mrcs").symlink_to(stack)
    same_images(JobDirectoryDataset(tmp_path, 4, pairing=pairing), images)


def test_two_stacks_of_one_number_are_an_error(tmp_path: Path) -> None:
    job, _ = write_job(tmp_path, 4, COUNTS)
    write_stack(job / "restack/batch_1_restacked.mrc", numbered_images(2, 8))
    with pytest.raises(PairingError, match=r"batch_000001_restacked\.mrc and batch_1_restacked\.mrc .*same number"):
        JobDirectoryDataset(tmp_path, 4)


def test_the_home_directory_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, images = write_job(tmp_path, 4, COUNTS)
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    same_images(JobDirectoryDataset(f"~/{tmp_path.name}", 4), images)


def test_a_data_set_survives_a_change_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, images = write_job(tmp_path, 4, COUNTS)
    monkeypatch.chdir(tmp_path)
    ds = JobDirectoryDataset(".", 4)
    monkeypatch.chdir("/")
    same_images(ds, images)


def test_a_selection_takes_rows_of_the_sequence(tmp_path: Path) -> None:
    _, images = write_job(tmp_path, 4, COUNTS)
    same_images(JobDirectoryDataset(tmp_path, 4, select=[8, 0, 4]), images[[8, 0, 4]])


# Counts that differ


def test_a_fitting_job_gives_no_warning(tmp_path: Path) -> None:
    write_job(tmp_path, 4, COUNTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        JobDirectoryDataset(tmp_path, 4)


def test_a_record_that_names_other_stacks_too_is_still_checked(tmp_path: Path) -> None:
    job, _ = write_job(tmp_path, 4, COUNTS)
    elsewhere = [*names(FILE[:-1]), "J2/restack/batch_000002_restacked.mrc"]
    write_record(job, np.arange(N), blob__path=elsewhere)
    with pytest.raises(PairingError, match=f"1 of {N} rows belong to another image"):
        JobDirectoryDataset(tmp_path, 4)


def test_more_rows_than_images_are_a_warning_with_both_counts(tmp_path: Path) -> None:
    _, images = write_job(tmp_path, 4, COUNTS, uid=uids(N + 3), **ctf_columns(N + 3))
    with pytest.warns(UserWarning, match=f"has {N + 3} rows and .* has {N} images") as caught:
        ds = JobDirectoryDataset(tmp_path, 4)
    assert caught[0].filename == __file__
    same_images(ds, images)
    np.testing.assert_array_equal(ds.particles.uid, uids(N + 3)[:N])
    with pytest.warns(UserWarning, match=f"The first {N} rows are used"):
        assert len(JobDirectoryDataset(tmp_path, 4, pixel_size=3.0).particles.pixel_size) == N


def test_stacks_beyond_a_gap_are_left_out_with_a_warning_that_names_them(tmp_path: Path) -> None:
    job, images = write_job(tmp_path, 4, COUNTS)
    (job / "restack/batch_000001_restacked.mrc").unlink()
    with pytest.warns(UserWarning, match=r"has 9 rows and .* has 4 images in 1 stacks.*batch_000002_restacked\.mrc"):
        ds = JobDirectoryDataset(tmp_path, 4)
    same_images(ds, images[:4])


def test_stacks_beyond_a_gap_warn_even_where_the_rows_fit(tmp_path: Path) -> None:
    job, _ = write_job(tmp_path, 4, COUNTS)
    write_stack(job / "restack/batch_000007_restacked.mrc", numbered_images(2, 8))
    with pytest.warns(UserWarning, match="batch_000007"):
        assert len(JobDirectoryDataset(tmp_path, 4)) == N


def test_rows_that_run_out_are_an_error_with_both_counts(tmp_path: Path) -> None:
    write_job(tmp_path, 4, COUNTS, uid=uids(N - 1), **ctf_columns(N - 1))
    with pytest.raises(PairingError, match=f"has {N - 1} rows and .* has {N} images.*rows run out"):
        JobDirectoryDataset(tmp_path, 4)


def test_a_truncated_stack_is_an_error_and_shifts_no_rows(tmp_path: Path) -> None:
    job, _ = write_job(tmp_path, 4, COUNTS)
    stack = job / "restack/batch_000000_restacked.mrc"
    stack.write_bytes(stack.read_bytes()[:-1])
    with pytest.raises(StackError, match=r"batch_000000_restacked\.mrc is truncated"):
        JobDirectoryDataset(tmp_path, 4)


# What is not there


def test_a_missing_job_names_those_there_are(tmp_path: Path) -> None:
    write_job(tmp_path, 4, COUNTS)
    with pytest.raises(MissingStackError, match=r"no job folder .*J5; there are J4\."):
        JobDirectoryDataset(tmp_path, 5)


def test_a_job_folder_in_place_of_its_project_is_told_from_a_missing_job(tmp_path: Path) -> None:
    write_job(tmp_path, 4, COUNTS)
    with pytest.raises(MissingStackError, match=r"no job folder .*J4/J4; give the project folder, the one that holds J4\."):
        JobDirectoryDataset(tmp_path / "J4", 4)


def test_a_missing_project_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MissingStackError, match="no job folder"):
        JobDirectoryDataset(tmp_path / "nowhere", 4)


def test_a_job_without_passthrough_table_names_the_tables_there_are(tmp_path: Path) -> None:
    job, _ = write_job(tmp_path, 4, COUNTS)
    (job / "J4_passthrough_particles.cs").rename(job / "extracted_particles.cs")
    with pytest.raises(MissingStackError, match=r"J4_passthrough_particles\.cs.*extracted_particles\.cs.*IndexedDataset"):
        JobDirectoryDataset(tmp_path, 4)


def test_a_job_without_stacks_says_where_it_looked(tmp_path: Path) -> None:
    write_table(tmp_path / "J4/J4_passthrough_particles.cs", uid=uids(N))
    with pytest.raises(MissingStackError, match=r"restack/batch_\*_restacked\.mrc and .*downsample/batch_\*_downsample\.mrc"):
        JobDirectoryDataset(tmp_path, 4)


def test_stacks_that_do_not_start_at_zero_are_an_error(tmp_path: Path) -> None:
    write_job(tmp_path, 4, COUNTS, first=1)
    with pytest.raises(MissingStackError, match="no stack number 0"):
        JobDirectoryDataset(tmp_path, 4)


@pytest.mark.parametrize("pairing", ["row", None, "UID"])
def test_an_unknown_pairing_is_an_error(tmp_path: Path, pairing: Any) -> None:
    with pytest.raises(ArgumentError, match="pairing"):
        JobDirectoryDataset(tmp_path, 4, pairing=pairing)


# Pixel size


def test_the_pixel_size_is_an_argument_else_the_tables_else_the_headers(tmp_path: Path) -> None:
    job, _ = write_job(tmp_path, 4, COUNTS)
    assert JobDirectoryDataset(tmp_path, 4).pixel_size == pytest.approx(1.7)  # write_job puts 1.7 into the headers
    write_record(job, np.arange(N))
    assert JobDirectoryDataset(tmp_path, 4).pixel_size == 2.25
    assert JobDirectoryDataset(tmp_path, 4, pixel_size=3.0).pixel_size == 3.0


def test_an_unknown_pixel_size_names_the_argument(tmp_path: Path) -> None:
    job, images = write_job(tmp_path, 4, [N])
    write_stack(job / "restack/batch_000000_restacked.mrc", images)
    with pytest.raises(TableError, match="Pass pixel_size="):
        JobDirectoryDataset(tmp_path, 4)


# The job's own record of its images


RECORDS = {
    "restacked_particles.cs": {},
    "unpadded names": {"blob__path": names(FILE, digits=1)},
    "names relative to the table": {"blob__path": names(FILE, job=">restack")},
}


@pytest.mark.parametrize("changes", RECORDS.values(), ids=RECORDS.keys())
def test_a_record_that_agrees_with_the_sequence_is_accepted(tmp_path: Path, changes: dict[str, Any]) -> None:
    job, images = write_job(tmp_path, 4, COUNTS)
    write_record(job, np.arange(N), **changes)
    same_images(JobDirectoryDataset(tmp_path, 4), images)


@pytest.mark.parametrize("changes", RECORDS.values(), ids=RECORDS.keys())
def test_a_record_of_another_order_is_an_error_that_names_the_remedy_and_the_remedy_works(tmp_path: Path, changes: dict[str, Any]) -> None:
    job, images = write_job(tmp_path, 4, COUNTS)
    write_record(job, MIXED, **changes)
    with pytest.raises(PairingError, match=r"by restacked_particles\.cs, 9 of 9 rows belong to another image.*pairing=\"uid\""):
        JobDirectoryDataset(tmp_path, 4)
    ds = JobDirectoryDataset(tmp_path, 4, pairing="uid")
    np.testing.assert_array_equal(ds.particles.uid, uids(N, seed=4))
    same_images(ds, images[np.argsort(MIXED)])


def test_one_swapped_pair_of_rows_is_noticed(tmp_path: Path) -> None:
    job, _ = write_job(tmp_path, 4, COUNTS)
    order = np.arange(N)
    order[[2, 3]] = 3, 2
    write_record(job, order)
    with pytest.raises(PairingError, match=r"2 of 9 rows belong to another image \(row 2 is image 3 of"):
        JobDirectoryDataset(tmp_path, 4)


def test_the_record_may_list_its_rows_in_any_order(tmp_path: Path) -> None:
    job, images = write_job(tmp_path, 4, COUNTS)
    write_record(job, MIXED, blob__path=names(FILE[MIXED]), blob__idx=IDX[MIXED])
    same_images(JobDirectoryDataset(tmp_path, 4), images)


def test_rows_that_the_record_does_not_have_contradict_it(tmp_path: Path) -> None:
    job, _ = write_job(tmp_path, 4, COUNTS)
    write_record(job, np.arange(N), uid=uids(N, seed=99))
    with pytest.raises(PairingError, match="row 0 is not in it"):
        JobDirectoryDataset(tmp_path, 4)


def test_a_last_row_that_the_record_does_not_have_contradicts_it(tmp_path: Path) -> None:
    job, _ = write_job(tmp_path, 4, COUNTS)
    write_record(job, np.arange(N), uid=np.append(uids(N, seed=4)[:-1], np.uint64(5)))
    with pytest.raises(PairingError, match=r"1 of 9 rows belong to another image \(row 8 is not in it"):
        JobDirectoryDataset(tmp_path, 4)


def test_downsampling_jobs_keep_their_record_under_another_name(tmp_path: Path) -> None:
    job, images = write_job(tmp_path, 4, COUNTS, kind="downsample")
    write_record(job, MIXED, name="downsampled_particles.cs", blob__path=names(FILE, job="J4/downsample", word="downsample"))
    with pytest.raises(PairingError, match=r"by downsampled_particles\.cs"):
        JobDirectoryDataset(tmp_path, 4)
    same_images(JobDirectoryDataset(tmp_path, 4, pairing="uid"), images[np.argsort(MIXED)])


def test_a_group_file_names_the_record(tmp_path: Path) -> None:
    job, images = write_job(tmp_path, 4, COUNTS)
    write_record(job, MIXED, name="whatever.cs")
    entry = f"{{metafile: '>whatever.cs', num_items: {N}, type: particle.blob}}"
    (job / "J4_particles.csg").write_text(f"group: {{type: particle}}\nresults:\n  blob: {entry}\n")
    with pytest.raises(PairingError, match=r"by whatever\.cs"):
        JobDirectoryDataset(tmp_path, 4)
    same_images(JobDirectoryDataset(tmp_path, 4, pairing="uid"), images[np.argsort(MIXED)])


def test_blob_columns_of_the_passthrough_table_itself_are_a_record(tmp_path: Path) -> None:
    inverse = np.argsort(MIXED)
    blob = {"blob__path": names(FILE[inverse]), "blob__idx": IDX[inverse], "blob__psize_A": np.full(N, 2.25, "f4")}
    _, images = write_job(tmp_path, 4, COUNTS, **blob)
    with pytest.raises(PairingError, match=r"by J4_passthrough_particles\.cs, 9 of 9"):
        JobDirectoryDataset(tmp_path, 4)
    same_images(JobDirectoryDataset(tmp_path, 4, pairing="uid"), images[inverse])


def test_the_record_of_the_job_is_believed_before_blob_columns_of_the_passthrough_table(tmp_path: Path) -> None:
    job, images = write_job(tmp_path, 4, COUNTS, blob__path=names(FILE), blob__idx=IDX)
    write_record(job, MIXED)
    with pytest.raises(PairingError, match=r"by restacked_particles\.cs, 9 of 9"):
        JobDirectoryDataset(tmp_path, 4)
    same_images(JobDirectoryDataset(tmp_path, 4, pairing="uid"), images[np.argsort(MIXED)])


def test_blob_columns_of_an_earlier_job_prove_nothing_and_are_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stale = {"blob__path": ["J2/extract/a.mrc"] * N, "blob__idx": IDX[MIXED], "blob__shape": np.full((N, 2), 99, "u4")}
    _, images = write_job(tmp_path, 4, COUNTS, blob__psize_A=np.full(N, 9, "f4"), **stale)
    with caplog.at_level(logging.WARNING, "cryolike_data"):
        ds = JobDirectoryDataset(tmp_path, 4)
    same_images(ds, images)
    assert ds.pixel_size == pytest.approx(1.7)
    assert "names other stacks" in caplog.text


def test_blob_columns_that_name_no_stack_give_pixel_size_and_sign(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, images = write_job(tmp_path, 4, COUNTS, blob__psize_A=np.full(N, 2.25, "f4"), blob__sign=np.full(N, -1, "f4"))
    with caplog.at_level(logging.WARNING, "cryolike_data"):
        ds = JobDirectoryDataset(tmp_path, 4)
    same_images(ds, images)
    assert ds.pixel_size == 2.25
    assert (ds.particles.sign == -1).all()
    assert not caplog.text


@pytest.mark.parametrize("pairing", ["sequence", "uid"])
def test_blob_columns_of_another_restack_job_are_no_record_of_this_one(tmp_path: Path, pairing: Any) -> None:
    # J4 restacked what J2 had restacked; its passthrough still says where the images lay in J2, under the same file names.
    stale = {"blob__path": names(FILE[MIXED], job="J2/restack"), "blob__idx": IDX[MIXED], "blob__psize_A": np.full(N, 9, "f4")}
    _, images = write_job(tmp_path, 4, COUNTS, **stale)
    if pairing == "uid":
        with pytest.raises(PairingError, match="needs the job's record"):
            JobDirectoryDataset(tmp_path, 4, pairing="uid")
    else:
        ds = JobDirectoryDataset(tmp_path, 4)
        same_images(ds, images)
        assert ds.pixel_size == pytest.approx(1.7)


def test_the_record_decides_on_the_pixel_size_over_a_stale_blob(tmp_path: Path) -> None:
    stale = {"blob__path": ["J2/extract/a.mrc"] * N, "blob__idx": IDX, "blob__psize_A": np.full(N, 9, "f4")}
    job, images = write_job(tmp_path, 4, COUNTS, **stale)
    write_record(job, np.arange(N))
    for pairing in ("sequence", "uid"):
        ds = JobDirectoryDataset(tmp_path, 4, pairing=pairing)
        assert ds.pixel_size == 2.25
        same_images(ds, images)


def test_a_stale_blob_gives_nothing_that_the_record_lacks(tmp_path: Path) -> None:
    stale = {"blob__path": ["J2/extract/a.mrc"] * N, "blob__idx": IDX, "blob__psize_A": np.full(N, 9, "f4")}
    job, _ = write_job(tmp_path, 4, COUNTS, **stale)
    write_record(job, np.arange(N), blob__psize_A=None)
    for pairing in ("sequence", "uid"):
        assert JobDirectoryDataset(tmp_path, 4, pairing=pairing).pixel_size == pytest.approx(1.7)


def test_a_stale_blob_is_not_used_where_the_record_cannot_be_matched(tmp_path: Path) -> None:
    stale = {"blob__path": ["J2/extract/a.mrc"] * N, "blob__idx": IDX, "blob__psize_A": np.full(N, 9, "f4")}
    job, images = write_job(tmp_path, 4, COUNTS, uid=np.zeros(N, "u8"), **stale)
    write_record(job, np.arange(N))
    ds = JobDirectoryDataset(tmp_path, 4)
    same_images(ds, images)
    assert ds.pixel_size != 9


@pytest.mark.parametrize("uid", [None, np.zeros(N, "u8")], ids=["no uids", "zero uids"])
def test_an_order_that_cannot_be_checked_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture, uid: Any) -> None:
    job, images = write_job(tmp_path, 4, COUNTS, uid=uid)
    write_record(job, MIXED)
    with caplog.at_level(logging.WARNING, "cryolike_data"):
        ds = JobDirectoryDataset(tmp_path, 4)
    same_images(ds, images)
    assert "cannot be checked" in caplog.text


def test_a_record_that_a_group_names_and_that_is_missing_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    job, images = write_job(tmp_path, 4, COUNTS)
    entry = f"{{metafile: '>restacked_particles.cs', num_items: {N}, type: particle.blob}}"
    (job / "J4_particles.csg").write_text(f"group: {{type: particle}}\nresults:\n  blob: {entry}\n")
    with caplog.at_level(logging.WARNING, "cryolike_data"):
        same_images(JobDirectoryDataset(tmp_path, 4), images)
    assert re.search(r"cannot be checked against \S+/restacked_particles\.cs, which \S+/J4_particles\.csg names", caplog.text)
    write_record(job, np.arange(N))
    caplog.clear()
    same_images(JobDirectoryDataset(tmp_path, 4), images)
    assert not caplog.records


def test_a_record_that_names_the_stacks_of_another_job_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    job, images = write_job(tmp_path, 4, COUNTS)  # this was J7 when its record was written
    write_record(job, MIXED, blob__path=names(FILE, job="J7/restack"))
    with caplog.at_level(logging.WARNING, "cryolike_data"):
        ds = JobDirectoryDataset(tmp_path, 4)
    same_images(ds, images)
    assert re.search(r"J4/restacked_particles\.cs names other stacks .* cannot be checked .* renamed\?", caplog.text)
    with pytest.raises(PairingError, match="needs the job's record"):
        JobDirectoryDataset(tmp_path, 4, pairing="uid")


# pairing="uid"


def test_pairing_by_uid_without_a_record_says_what_is_needed(tmp_path: Path) -> None:
    write_job(tmp_path, 4, COUNTS)
    with pytest.raises(PairingError, match=r"restacked_particles\.cs, or a \.csg"):
        JobDirectoryDataset(tmp_path, 4, pairing="uid")


def test_a_stack_of_the_record_that_is_missing_belongs_into_the_job(tmp_path: Path) -> None:
    job, _ = write_job(tmp_path, 4, COUNTS)
    write_record(job, MIXED)
    next((job / "restack").glob("batch_*1_restacked.mrc")).unlink()
    with pytest.raises(MissingStackError) as caught:
        JobDirectoryDataset(tmp_path, 4, pairing="uid")
    assert str(caught.value).endswith(f"have to lie in {job / 'restack'}.")
    assert "folder=" not in str(caught.value)


def test_pairing_by_uid_does_not_need_as_many_rows_as_images(tmp_path: Path) -> None:
    job, images = write_job(tmp_path, 4, COUNTS, uid=uids(N, seed=4)[:5], **ctf_columns(5))
    write_record(job, MIXED)
    with pytest.raises(PairingError, match="4 of 9 rows of the second"):
        JobDirectoryDataset(tmp_path, 4, pairing="uid")
    same_images(JobDirectoryDataset(tmp_path, 4, pairing="uid", unmatched="drop"), images[np.argsort(MIXED)][:5])


@pytest.mark.parametrize("pairing", ["sequence", "uid"])
@pytest.mark.parametrize("unmatched", ["Error", "raise", None])
def test_rows_without_a_partner_are_left_out_for_nothing_but_drop(tmp_path: Path, pairing: Any, unmatched: Any) -> None:
    job, _ = write_job(tmp_path, 4, COUNTS)
    write_record(job, np.arange(N))
    with pytest.raises(ArgumentError, match=r'unmatched is "error" or "drop"'):
        JobDirectoryDataset(tmp_path, 4, pairing=pairing, unmatched=unmatched)


@pytest.mark.parametrize("digits", [1, 6])
@pytest.mark.parametrize("suffix", [".mrc", ".mrcs"])
def test_pairing_by_uid_finds_stacks_by_their_number_whatever_its_padding(tmp_path: Path, digits: int, suffix: str) -> None:
    job, images = write_job(tmp_path, 4, COUNTS, digits=7 - digits)
    for path in list((job / "restack").iterdir()):
        path.rename(path.with_suffix(suffix))
    write_record(job, MIXED, blob__path=names(FILE, digits=digits))
    same_images(JobDirectoryDataset(tmp_path, 4, pairing="uid"), images[np.argsort(MIXED)])


def test_pairing_by_uid_crosses_a_gap_in_the_numbers(tmp_path: Path) -> None:
    job, images = write_job(tmp_path, 4, COUNTS)
    (job / "restack/batch_000002_restacked.mrc").rename(job / "restack/batch_000005_restacked.mrc")
    write_record(job, MIXED, blob__path=names(np.where(FILE == 2, 5, FILE)))
    same_images(JobDirectoryDataset(tmp_path, 4, pairing="uid"), images[np.argsort(MIXED)])


def test_a_record_that_names_a_missing_stack_is_an_error_that_names_it(tmp_path: Path) -> None:
    job, _ = write_job(tmp_path, 4, COUNTS)
    write_record(job, MIXED)
    (job / "restack/batch_000002_restacked.mrc").unlink()
    with pytest.raises(MissingStackError, match=r"batch_000002_restacked\.mrc"):
        JobDirectoryDataset(tmp_path, 4, pairing="uid")


@pytest.mark.parametrize("which", ["table", "record"])
def test_duplicate_uids_cannot_be_paired(tmp_path: Path, which: str) -> None:
    double = np.concatenate([uids(N, seed=4)[:-1], uids(N, seed=4)[:1]])
    job, _ = write_job(tmp_path, 4, COUNTS, **({"uid": double} if which == "table" else {}))
    write_record(job, MIXED, **({"uid": double} if which == "record" else {}))
    with pytest.raises(PairingError, match="occur more than once"):
        JobDirectoryDataset(tmp_path, 4, pairing="uid")


def test_a_record_that_is_not_laid_out_as_cryosparc_does_it_is_an_error(tmp_path: Path) -> None:
    job, _ = write_job(tmp_path, 4, COUNTS)
    write_record(job, np.arange(N), blob__idx=[str(number) for number in IDX])
    with pytest.raises(TableError, match=r"blob/idx of .*restacked_particles\.cs holds \|S1"):
        JobDirectoryDataset(tmp_path, 4)


@pytest.mark.parametrize("pairing", ["sequence", "uid"])
@pytest.mark.parametrize(("mode0", "dtype"), [("signed", "i1"), ("unsigned", "u1")])
def test_bytes_are_read_as_the_caller_says(tmp_path: Path, pairing: Any, mode0: Any, dtype: str) -> None:
    job, _ = write_job(tmp_path, 4, [N])
    images = numbered_images(N, 8, dtype=dtype)
    write_stack(job / "restack/batch_000000_restacked.mrc", images)
    write_record(job, np.arange(N), blob__path=names(np.zeros(N, int)), blob__idx=np.arange(N, dtype="u4"))
    same_images(JobDirectoryDataset(tmp_path, 4, pairing=pairing, mode0=mode0), images)


def test_a_damaged_record_is_an_error_and_not_overlooked(tmp_path: Path) -> None:
    job, _ = write_job(tmp_path, 4, COUNTS)
    (job / "restacked_particles.cs").write_bytes(b"junk")
    with pytest.raises(CryolikeDataError, match=r"restacked_particles\.cs"):
        JobDirectoryDataset(tmp_path, 4)


@pytest.mark.parametrize("path", [np.arange(N), np.full((N, 2), b"batch_0_restacked.mrc")], ids=["numbers", "pairs"])
@pytest.mark.parametrize("pairing", ["sequence", "uid"])
def test_a_record_that_does_not_hold_paths_is_an_error_and_not_overlooked(tmp_path: Path, path: np.ndarray, pairing: Any) -> None:
    job, _ = write_job(tmp_path, 4, COUNTS)
    write_table(job / "restacked_particles.cs", uid=uids(N, seed=4), blob__path=path, blob__idx=np.arange(N))
    with pytest.raises(TableError, match=r"blob/path of .*restacked_particles\.cs holds .*, and should hold text"):
        JobDirectoryDataset(tmp_path, 4, pairing=pairing)


def test_a_group_file_that_names_no_possible_file_does_not_stop_a_sequence(tmp_path: Path) -> None:
    job, images = write_job(tmp_path, 4, COUNTS)
    (job / "J4_particles.csg").write_text(f"results: {{blob: {{type: particle.blob, metafile: '{'n' * 300}'}}}}")
    same_images(JobDirectoryDataset(tmp_path, 4), images)


@pytest.mark.parametrize("wrong", ["a link to nothing", "no PyYAML"])
def test_a_group_file_that_cannot_be_read_does_not_stop_a_sequence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, wrong: str
) -> None:
    job, images = write_job(tmp_path, 4, COUNTS)
    group = job / "J4_particles.csg"
    if wrong == "no PyYAML":
        group.write_text("results: {}\n")
        monkeypatch.setitem(sys.modules, "yaml", None)
    else:
        group.symlink_to(tmp_path / "nothing.csg")
    same_images(JobDirectoryDataset(tmp_path, 4), images)
    assert f"{group} is left aside" in caplog.text
    with pytest.raises(MissingDependencyError if wrong == "no PyYAML" else PairingError, match=r"csg\]|restacked_particles\.cs"):
        JobDirectoryDataset(tmp_path, 4, pairing="uid")
