from __future__ import annotations

import logging
import os
import pickle
import re
from pathlib import Path
from typing import Any, Literal

import mrcfile
import numpy as np
import pytest
from support import ctf_columns, numbered_images, uids, write_particles, write_stack, write_table

from cryolike_data import IndexedDataset
from cryolike_data.errors import ArgumentError, MissingStackError, MixedParticlesError, StackError, TableError

N = 6


def column(value: Any, dtype: str = "f4") -> np.ndarray:
    return np.full(N, value, dtype)


def mixed_boxes(folder: Path) -> tuple[Path, dict[int, np.ndarray]]:
    """Four particles of 8 pixels at 3 A and two of 12 pixels at 2 A in one table."""
    images = {box: numbered_images(n, box) for box, n in ((8, 4), (12, 2))}
    for box, part in images.items():
        write_stack(folder / f"{box}.mrc", part)
    return write_table(
        folder / "t.cs",
        uid=uids(N),
        blob__path=["8.mrc"] * 4 + ["12.mrc"] * 2,
        blob__idx=np.array([0, 1, 2, 3, 0, 1], "u4"),
        blob__psize_A=np.array([3, 3, 3, 3, 2, 2], "f4"),
    ), images


# Rows and images


@pytest.mark.parametrize("stacks", [1, 2, 6])
def test_row_i_is_item_i(tmp_path: Path, stacks: int) -> None:
    cs, images = write_particles(tmp_path, N, stacks=stacks)
    ds = IndexedDataset(cs)
    assert len(ds) == N
    np.testing.assert_array_equal(ds.read(range(N)).numpy(), images)
    np.testing.assert_array_equal(ds.particles.uid, uids(N))
    np.testing.assert_array_equal(ds.particles.row, np.arange(N))


def test_two_rows_may_name_one_image(tmp_path: Path) -> None:
    # Symmetry expansion does that.
    cs, images = write_particles(tmp_path, N, stacks=1, blob__idx=np.zeros(N, "u4"))
    found = IndexedDataset(cs).read(range(N)).numpy()
    assert all(np.array_equal(image, found[0]) for image in found)
    assert any(np.array_equal(image, found[0]) for image in images)


def test_image_numbers_count_from_zero_unless_told_otherwise(tmp_path: Path) -> None:
    cs, images = write_particles(tmp_path, N)
    idx = np.load(cs)["blob/idx"]
    one_based, _ = write_particles(tmp_path, N, blob__idx=idx + 1)
    np.testing.assert_array_equal(IndexedDataset(one_based, index_base=1).read(range(N)).numpy(), images)


def test_image_numbers_from_one_are_noticed_where_they_run_over_and_the_remedy_named(tmp_path: Path) -> None:
    cs, _ = write_particles(tmp_path, N)
    one_based, _ = write_particles(tmp_path, N, blob__idx=np.load(cs)["blob/idx"] + 1)
    with pytest.raises(StackError, match=r"has 3 images, 0 to 2; image 3 is asked for.*index_base=1"):
        IndexedDataset(one_based)


def test_images_far_beyond_the_end_of_a_stack_are_not_put_down_to_counting_from_one(tmp_path: Path) -> None:
    cs, images = write_particles(tmp_path, N, stacks=1)
    write_stack(tmp_path / "J1/extract/stack_0.mrc", images, nz=1)
    with pytest.raises(StackError, match=r"has 1 images, 0 to 0; image 5 is asked for") as caught:
        IndexedDataset(cs)
    assert "index_base" not in str(caught.value)


@pytest.mark.parametrize("kind", ["u1", "i8", "u8", "f4", "f8", ">u4"])
@pytest.mark.parametrize("base", [0, 1])
def test_image_numbers_of_any_type_are_read(tmp_path: Path, kind: str, base: Literal[0, 1]) -> None:
    write_stack(tmp_path / "a.mrc", np.arange(3 * 16, dtype="f4").reshape(3, 4, 4))
    write_table(
        tmp_path / "a.cs", blob__path=["a.mrc"] * 3, blob__idx=np.array([2, 0, 1]).astype(kind) + base, blob__psize_A=np.ones(3, "f4")
    )
    dataset = IndexedDataset(tmp_path / "a.cs", index_base=base)
    assert dataset.particles.slice.tolist() == [2, 0, 1]
    assert dataset.read([0])[0, 0, 0] == 32


def test_image_numbers_from_zero_with_index_base_one_are_an_error(tmp_path: Path) -> None:
    cs, _ = write_particles(tmp_path, N)
    with pytest.raises(StackError, match="index_base=1 out"):
        IndexedDataset(cs, index_base=1)


@pytest.mark.parametrize("base", [2, -1, "0", None])
def test_another_index_base_is_an_error(tmp_path: Path, base: Any) -> None:
    with pytest.raises(ArgumentError, match="index_base"):
        IndexedDataset(tmp_path / "t.cs", index_base=base)


def test_the_home_directory_is_expanded_in_the_name_of_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_particles(tmp_path, N)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(IndexedDataset("~/J1/particles.cs")) == N


def test_a_file_whose_name_begins_with_a_tilde_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    table, _ = write_particles(tmp_path, N)
    table.rename(tmp_path / "~particles.cs")
    assert len(IndexedDataset("~particles.cs")) == N


@pytest.mark.parametrize("name", ["~nobody-by-this-name/particles.cs", "~nobody-by-this-name"])
def test_a_table_in_nobodys_home_is_an_error_that_says_so(name: str) -> None:
    with pytest.raises(ArgumentError, match=f"{name} cannot be found: ~nobody-by-this-name is no user's home folder"):
        IndexedDataset(name)


def test_stacks_in_a_folder_of_their_own_are_read(tmp_path: Path) -> None:
    cs, images = write_particles(tmp_path, N)
    (tmp_path / "J1/extract").rename(tmp_path / "moved")
    np.testing.assert_array_equal(IndexedDataset(cs, folder=tmp_path / "moved").read(range(N)).numpy(), images)


def test_one_missing_stack_is_an_error_and_no_row_is_skipped(tmp_path: Path) -> None:
    cs, _ = write_particles(tmp_path, N)
    (tmp_path / "J1/extract/stack_1.mrc").unlink()
    with pytest.raises(MissingStackError, match=r"1 of 2 stacks(.|\n)*stack_1\.mrc \(3 rows\)"):
        IndexedDataset(cs)


@pytest.mark.parametrize("relative", ["table", "folder"])
def test_a_data_set_survives_a_change_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, relative: str) -> None:
    _, images = write_particles(tmp_path, N)
    monkeypatch.chdir(tmp_path / "J1")
    ds = IndexedDataset("particles.cs", folder="extract" if relative == "folder" else None)
    monkeypatch.chdir("/")
    np.testing.assert_array_equal(ds.read(range(N)).numpy(), images)


@pytest.mark.parametrize(("mode0", "dtype"), [("auto", "i1"), ("signed", "i1"), ("unsigned", "u1")])
def test_the_reading_of_bytes_can_be_chosen(tmp_path: Path, mode0: Any, dtype: str) -> None:
    cs, images = write_particles(tmp_path, N, dtype="i1")
    np.testing.assert_array_equal(IndexedDataset(cs, mode0=mode0).read(range(N)).numpy(), images.view(dtype))


# What does not fit


def test_image_numbers_beyond_the_stacks_are_listed_file_by_file_before_anything_is_read(tmp_path: Path) -> None:
    cs, _ = write_particles(
        tmp_path, N, blob__idx=np.array([0, 0, 7, 0, 0, 9], "u4"), blob__path=[f"J1/extract/stack_{i % 2}.mrc" for i in range(N)]
    )
    with pytest.raises(StackError) as caught:
        IndexedDataset(cs)
    said = str(caught.value)
    assert "stack_0.mrc has 3 images, 0 to 2; image 7 is asked for (1 rows, first row 2)" in said
    assert "stack_1.mrc has 3 images, 0 to 2; image 9 is asked for (1 rows, first row 5)" in said


def test_rows_in_the_missing_part_of_a_truncated_stack_are_an_error(tmp_path: Path) -> None:
    cs, _ = write_particles(tmp_path, N)
    stack = tmp_path / "J1/extract/stack_1.mrc"
    stack.write_bytes(stack.read_bytes()[:-10])
    with pytest.raises(StackError, match=r"stack_1\.mrc is truncated: 2 of 3 images are complete; 1 rows need later ones"):
        IndexedDataset(cs)


def test_a_truncated_stack_is_fine_where_its_complete_images_are_enough(tmp_path: Path) -> None:
    cs, images = write_particles(tmp_path, N, stacks=1)
    stack = tmp_path / "J1/extract/stack_0.mrc"
    stack.write_bytes(stack.read_bytes()[:-10])
    rows = np.load(cs)
    keep = rows["blob/idx"] < N - 1
    fewer = write_table(cs, **{name.replace("/", "__"): rows[name][keep] for name in rows.dtype.names})
    np.testing.assert_array_equal(IndexedDataset(fewer).read(range(N - 1)).numpy(), images[keep])


@pytest.mark.parametrize("n", [1, 2])
def test_images_that_are_not_square_are_refused(tmp_path: Path, n: int) -> None:
    write_stack(tmp_path / "a.mrc", np.zeros((n, 8, 10), "f4"))
    cs = write_table(
        tmp_path / "t.cs", uid=uids(n), blob__path=["a.mrc"] * n, blob__idx=np.arange(n, dtype="u4"), blob__psize_A=np.ones(n, "f4")
    )
    with pytest.raises(StackError, match=r"a\.mrc holds images of 10 x 8 pixels; particles have to be square"):
        IndexedDataset(cs)


def test_a_table_without_rows_is_an_error(tmp_path: Path) -> None:
    cs = write_table(tmp_path / "t.cs", uid=uids(0), blob__path=np.empty(0, "S1"), blob__idx=np.empty(0, "u4"))
    with pytest.raises(TableError, match="no rows"):
        IndexedDataset(cs)


@pytest.mark.parametrize("absent", ["blob__path", "blob__idx"])
def test_a_table_that_names_no_images_says_what_to_pass(tmp_path: Path, absent: str) -> None:
    cs, _ = write_particles(tmp_path, N, **{absent: None})
    write_table(cs.parent / "J1_passthrough_particles.cs", uid=uids(N))
    with pytest.raises(TableError) as caught:
        IndexedDataset(cs)
    said = str(caught.value)
    assert f"no {absent.replace('__', '/')}," in said
    assert "passthrough=" in said
    assert "J1_passthrough_particles.cs" in said


@pytest.mark.parametrize("optics", [{}, ctf_columns(1)], ids=["", "with optics"])
@pytest.mark.parametrize(
    ("slot", "what"), [("map", "a volume"), ("mask", "a mask"), ("micrograph_blob", "micrographs"), ("movie_blob", "movies")]
)
def test_tables_of_other_things_are_said_to_be_those(tmp_path: Path, slot: str, what: str, optics: dict[str, Any]) -> None:
    cs = write_table(tmp_path / "t.cs", **{"uid": uids(1), f"{slot}/path": ["J1/x.mrc"]}, **optics)
    with pytest.raises(TableError, match=f"describes {what}, not particles"):
        IndexedDataset(cs)


def test_particles_that_were_only_picked_are_said_to_have_no_images_yet(tmp_path: Path) -> None:
    cs = write_table(tmp_path / "t.cs", uid=uids(1), location__center_x_frac=np.zeros(1, "f4"), **ctf_columns(1))
    with pytest.raises(TableError, match=r"passthrough=.* picked and not extracted have none yet"):
        IndexedDataset(cs)


# Box sizes and shapes


def test_mixed_boxes_are_an_error_whose_advice_works(tmp_path: Path) -> None:
    cs, images = mixed_boxes(tmp_path)
    with pytest.raises(MixedParticlesError) as caught:
        IndexedDataset(cs)
    said = str(caught.value)
    assert "box 8: 4 particles" in said
    assert "box 12: 2 particles" in said
    for line in said.splitlines()[1:]:
        ds = IndexedDataset(cs, select=eval(line.split("select=")[1], {"np": np}))
        np.testing.assert_array_equal(ds.read(range(len(ds))).numpy(), images[ds.box])


def test_mixed_pixel_sizes_are_an_error_whose_advice_works(tmp_path: Path) -> None:
    cs, images = write_particles(tmp_path, N, blob__psize_A=np.array([1.31, 1.3, 1.31, 1.31, 1.3, 1.31], "f4"))
    with pytest.raises(MixedParticlesError, match=r"pixel_size 1\.3: 2 particles") as caught:
        IndexedDataset(cs)
    line = next(line for line in str(caught.value).splitlines() if "1.3:" in line)
    ds = IndexedDataset(cs, select=eval(line.split("select=")[1], {"np": np}))
    assert ds.pixel_size == 1.3
    np.testing.assert_array_equal(ds.read([0, 1]).numpy(), images[[1, 4]])


@pytest.mark.parametrize("select", [[], np.zeros(N, bool), slice(3, 3), lambda p: p.box > 99])
def test_selecting_no_particle_is_an_error(tmp_path: Path, select: Any) -> None:
    cs, _ = write_particles(tmp_path, N)
    with pytest.raises(ArgumentError, match="none of the 6 particles"):
        IndexedDataset(cs, select=select)


def test_a_shape_that_agrees_is_accepted(tmp_path: Path) -> None:
    cs, _ = write_particles(tmp_path, N, blob__shape=np.full((N, 2), 8, "u4"))
    assert IndexedDataset(cs).box == 8


@pytest.mark.parametrize(("shape", "said"), [((8, 16), "16 x 8"), ((16, 8), "8 x 16")])
def test_a_shape_that_differs_along_one_side_is_an_error(tmp_path: Path, shape: tuple[int, int], said: str) -> None:
    cs, _ = write_particles(tmp_path, N, blob__shape=np.tile(np.uint32(shape), (N, 1)))
    with pytest.raises(StackError, match=f"blob/shape says {said}"):
        IndexedDataset(cs)


def test_a_shape_that_differs_from_the_stack_is_an_error(tmp_path: Path) -> None:
    cs, _ = write_particles(tmp_path, N, blob__shape=np.full((N, 2), 16, "u4"))
    with pytest.raises(StackError, match=r"stack_0.mrc holds images of 8 x 8 pixels and blob/shape says 16 x 16 \(3 rows\)"):
        IndexedDataset(cs)


def test_resampled_stacks_are_accepted_with_a_pixel_size_and_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cs, _ = write_particles(tmp_path, N, blob__shape=np.full((N, 2), 16, "u4"))
    ds = IndexedDataset(cs, pixel_size=3.0)
    assert (ds.box, ds.pixel_size) == (8, 3.0)
    assert "blob/shape" in caplog.text


# Pixel size


def test_the_pixel_size_is_that_of_the_table_without_float32_digits(tmp_path: Path) -> None:
    cs, _ = write_particles(tmp_path, N, blob__psize_A=column(1.3))
    assert IndexedDataset(cs).pixel_size == 1.3


@pytest.mark.parametrize(("given", "size"), [(2.5, 2.5), (2, 2.0), ((2.5, 2.5), 2.5), (np.float32(2.5), 2.5), (np.array([2.5, 2.5]), 2.5)])
def test_an_argument_beats_the_pixel_size_of_the_table(tmp_path: Path, given: Any, size: float) -> None:
    cs, _ = write_particles(tmp_path, N)
    assert IndexedDataset(cs, pixel_size=given).pixel_size == size


def test_an_argument_that_contradicts_the_table_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cs, _ = write_particles(tmp_path, N)
    IndexedDataset(cs, pixel_size=1.5)
    assert not caplog.records
    IndexedDataset(cs, pixel_size=2.5)
    assert "pixel_size=2.5 is used" in caplog.text
    assert "1.5" in caplog.text


@pytest.mark.parametrize("given", [0, -1.3, np.nan, np.inf, (1.3, 1.4), (1, 1, 1), (), "a", [None]])
def test_a_pixel_size_that_cannot_be_is_an_error(tmp_path: Path, given: Any) -> None:
    cs, _ = write_particles(tmp_path, N)
    with pytest.raises(ArgumentError, match="pixel_size"):
        IndexedDataset(cs, pixel_size=given)


@pytest.mark.parametrize(
    "stated",
    [None, column(0), column(-1), column(np.nan), column(np.inf), np.float32([0, 1.7, 1.7, 1.7, 1.7, 1.7])],
    ids=["absent", "zero", "negative", "nan", "infinite", "zero in one row"],
)
def test_the_header_gives_the_pixel_size_where_the_table_does_not(tmp_path: Path, stated: np.ndarray | None) -> None:
    cs, _ = write_particles(tmp_path, N, stacks=1, blob__psize_A=stated)
    stack = tmp_path / "J1/extract/stack_0.mrc"
    write_stack(stack, numbered_images(N, 8), pixel_size=1.7)
    assert IndexedDataset(cs).pixel_size == pytest.approx(1.7)


def test_rows_without_a_pixel_size_leave_that_of_the_others_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cs, _ = write_particles(tmp_path, N, stacks=1, blob__psize_A=np.float32([2, 2, 2, 2, 0, 0]))
    stack = tmp_path / "J1/extract/stack_0.mrc"
    write_stack(stack, numbered_images(N, 8), pixel_size=1.7)
    assert IndexedDataset(cs, select=slice(0, 4)).pixel_size == 2
    assert "no size in 2 of 6 rows" in caplog.text
    with pytest.raises(MixedParticlesError, match=r"1\.7: 2 particles(.|\n)*2\.0: 4 particles"):
        IndexedDataset(cs)
    write_stack(stack, numbered_images(N, 8), pixel_size=0)
    assert IndexedDataset(cs, select=slice(0, 4)).pixel_size == 2
    with pytest.raises(TableError, match=r"of 2 of 6 particles is not known(.|\n)*select="):
        IndexedDataset(cs)
    caplog.clear()
    assert IndexedDataset(cs, pixel_size=2).pixel_size == 2
    assert not caplog.records


@pytest.mark.parametrize("header", [0.0, 1.0])
def test_an_unknown_pixel_size_is_an_error_that_names_the_argument(tmp_path: Path, header: float) -> None:
    cs, _ = write_particles(tmp_path, N, stacks=1, blob__psize_A=None)
    write_stack(tmp_path / "J1/extract/stack_0.mrc", numbered_images(N, 8), pixel_size=header)
    with pytest.raises(TableError, match="Pass pixel_size="):
        IndexedDataset(cs)


def test_one_header_of_two_does_not_give_the_pixel_size(tmp_path: Path) -> None:
    cs, _ = write_particles(tmp_path, N, stacks=2, blob__psize_A=None)
    write_stack(tmp_path / "J1/extract/stack_0.mrc", numbered_images(N, 8), pixel_size=1.7)
    with pytest.raises(TableError, match="Pass pixel_size="):
        IndexedDataset(cs)


# Optics, poses, and the rest


def test_every_optics_column_is_kept_per_particle(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    fields = {
        "voltage_kv": ("ctf__accel_kv", ()),
        "spherical_aberration_mm": ("ctf__cs_mm", ()),
        "amplitude_contrast": ("ctf__amp_contrast", ()),
        "defocus_u": ("ctf__df1_A", ()),
        "defocus_v": ("ctf__df2_A", ()),
        "astigmatism_angle_rad": ("ctf__df_angle_rad", ()),
        "phase_shift_rad": ("ctf__phase_shift_rad", ()),
        "scale": ("ctf__scale", ()),
        "bfactor_A2": ("ctf__bfactor", ()),
        "beam_shift_A": ("ctf__shift_A", (2,)),
        "tilt_A": ("ctf__tilt_A", (2,)),
        "trefoil_A": ("ctf__trefoil_A", (2,)),
        "tetrafoil_A": ("ctf__tetra_A", (4,)),
        "anisomag": ("ctf__anisomag", (4,)),
    }
    values = {name: rng.normal(size=(N, *shape)).astype("f4") for name, (_, shape) in fields.items()}
    groups = np.array([2**32 - 1, 0, 7, 7, 23, 2**31], "u4")
    cs, _ = write_particles(tmp_path, N, **{fields[name][0]: value for name, value in values.items()}, ctf__exp_group_id=groups)
    ctf = IndexedDataset(cs).particles.ctf
    for name, value in values.items():
        np.testing.assert_array_equal(getattr(ctf, name), value, err_msg=name)
    assert ctf.exposure_group.tolist() == groups.tolist()
    assert ctf.exposure_group.dtype == np.int64  # torch has no arithmetic on uint32


def test_a_table_without_optics_has_no_ctf(tmp_path: Path) -> None:
    cs, _ = write_particles(tmp_path, N, **dict.fromkeys(ctf_columns(1)))
    assert IndexedDataset(cs).particles.ctf is None


def test_old_tables_lack_the_higher_optics_only(tmp_path: Path) -> None:
    cs, _ = write_particles(tmp_path, N)
    ctf = IndexedDataset(cs).particles.ctf
    assert ctf.tilt_A is None
    assert ctf.defocus_u is not None


def test_a_shift_is_in_pixels_of_the_alignment_and_not_of_the_image(tmp_path: Path) -> None:
    shift = np.arange(2 * N, dtype="f4").reshape(N, 2)
    sizes = np.array([2, 3, 4, 5, 6, 7], "f4")
    pose = np.random.default_rng(1).normal(size=(N, 3)).astype("f4")
    cs, _ = write_particles(tmp_path, N, alignments3D__pose=pose, alignments3D__shift=shift, alignments3D__psize_A=sizes)
    particles = IndexedDataset(cs).particles
    np.testing.assert_array_equal(particles.pose, pose)
    np.testing.assert_allclose(particles.shift_A, [[2 * i * size, (2 * i + 1) * size] for i, size in enumerate(sizes)], rtol=1e-6)


def test_a_shift_without_its_pixel_size_is_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cs, _ = write_particles(tmp_path, N, alignments3D__pose=np.zeros((N, 3), "f4"), alignments3D__shift=np.ones((N, 2), "f4"))
    particles = IndexedDataset(cs).particles
    assert particles.shift_A is None
    assert particles.pose is not None
    assert "alignments3D/psize_A" in caplog.text


def test_a_2d_alignment_is_a_rotation_about_z(tmp_path: Path) -> None:
    angle = np.linspace(-3, 3, N).astype("f4")
    shift, size = np.ones((N, 2), "f4"), column(4)
    cs, _ = write_particles(tmp_path, N, alignments2D__pose=angle, alignments2D__shift=shift, alignments2D__psize_A=size)
    particles = IndexedDataset(cs).particles
    np.testing.assert_array_equal(particles.pose, [[0, 0, a] for a in angle])
    np.testing.assert_array_equal(particles.shift_A, np.full((N, 2), 4))


def test_a_3d_alignment_is_preferred_to_a_2d_one(tmp_path: Path) -> None:
    slots = {"alignments3D": (np.ones((N, 3), "f4"), 2), "alignments2D": (np.zeros(N, "f4"), 9)}
    columns: dict[str, Any] = {}
    for slot, (pose, size) in slots.items():
        columns |= {f"{slot}__pose": pose, f"{slot}__shift": np.ones((N, 2), "f4"), f"{slot}__psize_A": column(size)}
    cs, _ = write_particles(tmp_path, N, **columns)
    particles = IndexedDataset(cs).particles
    assert (particles.pose == 1).all()
    assert (particles.shift_A == 2).all()


@pytest.mark.parametrize(
    ("slots", "told"),
    [
        (("alignments_class_0", "alignments_class_1", "alignments2D"), "alignments_class_0, alignments_class_1 of .* alignments2D/pose is"),
        (("alignments3D_multi",), "alignments3D_multi of .* the particles have none"),
        (("alignments3D_multi", "alignments3D"), ""),
        (("alignments2D",), ""),
    ],
    ids=str,
)
def test_poses_of_several_classes_are_not_left_aside_in_silence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, slots: tuple[str, ...], told: str
) -> None:
    shapes = {"alignments3D_multi": (2, 3), "alignments2D": ()}
    IndexedDataset(write_particles(tmp_path, N, **{f"{slot}__pose": np.ones((N, *shapes.get(slot, (3,))), "f4") for slot in slots})[0])
    assert re.search(told, caplog.text) if told else caplog.text == ""


@pytest.mark.parametrize(("number", "told"), [(1.5, "1.5"), (np.nan, "nan"), (np.inf, "inf"), (1e17, "1e[+]17")])
def test_numbers_of_images_with_a_fraction_are_refused(tmp_path: Path, number: float, told: str) -> None:
    numbers = np.arange(N, dtype="f8")
    as_integers, as_floats = (
        IndexedDataset(write_particles(tmp_path / kind, N, blob__idx=numbers.astype(kind), stacks=1)[0]) for kind in ("u4", "f8")
    )
    np.testing.assert_array_equal(as_floats.read(slice(None)).numpy(), as_integers.read(slice(None)).numpy())
    numbers[2] = number
    cs, _ = write_particles(tmp_path, N, blob__idx=numbers, stacks=1)
    with pytest.raises(TableError, match=rf"blob/idx of .* holds {told} in row 2 \(1 rows"):
        IndexedDataset(cs)


def test_numbers_that_torch_does_not_know_are_refused(tmp_path: Path) -> None:
    cs, _ = write_particles(tmp_path, N, ctf__df1_A=np.ones(N, np.longdouble))
    with pytest.raises(TableError, match=r"ctf/df1_A of .* should hold a number"):
        IndexedDataset(cs)


def test_half_sets_are_those_of_the_alignment(tmp_path: Path) -> None:
    split = np.array([0, 1, 1, 0, 0, 1], "u4")
    cs, _ = write_particles(tmp_path, N, alignments3D__pose=np.zeros((N, 3), "f4"), alignments3D__split=split)
    ds = IndexedDataset(cs)
    assert ds.particles.half_set.tolist() == split.tolist()
    assert ds.select(lambda p: p.half_set == 1).particles.row.tolist() == [1, 2, 5]


def test_the_sign_is_kept_and_not_applied(tmp_path: Path) -> None:
    cs, images = write_particles(tmp_path, N, blob__sign=column(-1))
    ds = IndexedDataset(cs)
    assert (ds.particles.sign == -1).all()
    np.testing.assert_array_equal(ds.read(range(N)).numpy(), images)


def test_mixed_signs_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cs, _ = write_particles(tmp_path, N, blob__sign=np.array([1, 1, -1, 1, 1, 1], "f4"))
    with caplog.at_level(logging.WARNING, "cryolike_data"):
        ds = IndexedDataset(cs)
    assert "both contrast signs" in caplog.text
    assert ds.particles.sign.tolist() == [1, 1, -1, 1, 1, 1]


def test_numbers_of_other_widths_are_given_as_documented(tmp_path: Path) -> None:
    pose = np.linspace(-2, 2, 3 * N).reshape(N, 3)
    found = {"pose": pose, "shift": np.ones((N, 2)), "psize_A": np.full(N, 1.5), "split": np.arange(N) % 2.0}
    columns = {f"alignments3D__{name}": values for name, values in found.items()}
    cs, _ = write_particles(tmp_path, N, uid=np.arange(1, N + 1, dtype="i4"), **columns)
    particles = IndexedDataset(cs).particles
    expected = {
        "uid": np.arange(1, N + 1, dtype=np.uint64),
        "pose": pose.astype(np.float32),
        "shift_A": np.full((N, 2), 1.5, np.float32),
        "half_set": np.arange(N) % 2,
    }
    for name, values in expected.items():
        np.testing.assert_array_equal(getattr(particles, name), values, err_msg=name)
        assert getattr(particles, name).dtype == values.dtype, name


def test_uids_of_zero_are_no_trouble_without_a_join(tmp_path: Path) -> None:
    cs, images = write_particles(tmp_path, N, uid=np.zeros(N, "u8"))
    np.testing.assert_array_equal(IndexedDataset(cs).read(range(N)).numpy(), images)


def test_a_table_without_uids_is_read(tmp_path: Path) -> None:
    cs, images = write_particles(tmp_path, N, uid=None)
    ds = IndexedDataset(cs)
    np.testing.assert_array_equal(ds.read(range(N)).numpy(), images)
    assert not ds.particles.uid.any()


# Real files


@pytest.mark.shared
def test_the_real_data_set_empiar_10076_agrees_with_mrcfile_and_its_star_file(shared: Path) -> None:
    folder = shared / "real/empiar_10076"
    ds = IndexedDataset(folder / "empiar_10076_7.cs")
    with mrcfile.open(folder / "empiar_10076_7.mrc") as mrc:
        np.testing.assert_array_equal(ds.read(range(7)).numpy(), mrc.data)
    rows = [line.split() for line in (folder / "empiar_10076_7.star").read_text().splitlines() if "@" in line]
    star = {name: np.array([float(row[i]) for row in rows]) for i, name in enumerate(["u", "v", "angle", "kv", "cs", "w"], start=2)}
    ctf = ds.particles.ctf
    np.testing.assert_allclose(ctf.defocus_u, star["u"], rtol=1e-5)
    np.testing.assert_allclose(ctf.defocus_v, star["v"], rtol=1e-5)
    np.testing.assert_allclose(np.rad2deg(ctf.astigmatism_angle_rad), star["angle"], atol=0.01)
    np.testing.assert_allclose(ctf.voltage_kv, star["kv"])
    np.testing.assert_allclose(ctf.spherical_aberration_mm, star["cs"])
    np.testing.assert_allclose(ctf.amplitude_contrast, star["w"])
    assert ds.pixel_size == pytest.approx(1.31, rel=1e-5)  # detector pixel 5 um at a magnification of 38168
    assert (ds.box, [int(row[0].split("@")[0]) - 1 for row in rows]) == (320, ds.particles.slice.tolist())


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("cryosparc_J2_particles_exported.cs", ">J1/imported/000090334788266266069_18jam15b_0345_ali_DW.mrcs"),
        ("cryosparc_P12_J24_001_particles.cs", "J19/extract/20150917_05196_DNA-TET-25k-DE20_raw.region_000.sum-all_003-072_particles.mrc"),
    ],
)
def test_real_tables_without_their_stacks_are_refused_and_the_stacks_named(shared: Path, name: str, path: str) -> None:
    with pytest.raises(MissingStackError) as caught:
        IndexedDataset(shared / "real/metadata" / name)
    assert path in str(caught.value)


@pytest.mark.shared
def test_a_real_table_without_blob_columns_is_refused(shared: Path) -> None:
    with pytest.raises(TableError, match="no blob/path and blob/idx"):
        IndexedDataset(shared / "real/metadata/4k_dataset.cs")


def test_unchecked_headers_give_the_same_images(tmp_path: Path) -> None:
    cs, images = write_particles(tmp_path, N)
    np.testing.assert_array_equal(IndexedDataset(cs, check_headers=False).read(slice(None)).numpy(), images)


def test_unchecked_headers_are_checked_when_a_stack_is_first_read(tmp_path: Path) -> None:
    cs, _ = write_particles(tmp_path, N, stacks=2)
    stack = tmp_path / "J1/extract/stack_1.mrc"
    write_stack(stack, numbered_images(N, 8), extended=1024)
    opened = IndexedDataset(cs, check_headers=False)
    for ds in (opened, pickle.loads(pickle.dumps(opened))):
        ds.read(np.flatnonzero(ds.particles.file == 0))
        with pytest.raises(StackError, match=r"stack_1\.mrc has images of .* check_headers=True"):
            ds.read(np.flatnonzero(ds.particles.file == 1))


def test_a_pixel_size_is_not_taken_from_headers_that_are_not_read(tmp_path: Path) -> None:
    cs, images = write_particles(tmp_path, N, stacks=2, blob__psize_A=None)
    for number, size in enumerate((1.7, 2.5)):
        stack = tmp_path / f"J1/extract/stack_{number}.mrc"
        write_stack(stack, numbered_images(N, 8), pixel_size=size)
    with pytest.raises(TableError, match=r"The pixel size of 3 of 6 particles is not known(.|\n)*Pass pixel_size="):
        IndexedDataset(cs, check_headers=False)
    assert IndexedDataset(cs, check_headers=False, pixel_size=2).pixel_size == 2
    with_one_stack, _ = write_particles(tmp_path / "one", N, stacks=1, blob__psize_A=None)
    write_stack(tmp_path / "one/J1/extract/stack_0.mrc", images, pixel_size=1.7)
    assert IndexedDataset(with_one_stack, check_headers=False).pixel_size == pytest.approx(1.7)


def test_an_unchecked_stack_that_is_gone_is_an_error_for_who_reads_and_nobody_else(tmp_path: Path) -> None:
    cs, images = write_particles(tmp_path, N, stacks=2)
    ds = IndexedDataset(cs, check_headers=False)
    (tmp_path / "J1/extract/stack_1.mrc").unlink()
    rows = np.arange(N)
    assert not ds.ask_ahead(rows[ds.particles.file == 1])
    with pytest.raises(StackError, match=r"stack_1\.mrc cannot be opened any more"):
        ds.read(slice(None))
    np.testing.assert_array_equal(ds.read(ds.particles.file == 0).numpy(), images[ds.particles.file == 0])


def test_an_image_beyond_an_unchecked_stack_is_an_error_when_it_is_read(tmp_path: Path) -> None:
    cs, _ = write_particles(tmp_path, N, stacks=2)
    stack = tmp_path / "J1/extract/stack_1.mrc"
    write_stack(stack, numbered_images(1, 8))
    ds = IndexedDataset(cs, check_headers=False)
    with pytest.raises(StackError, match=r"stack_1\.mrc has 1 images, numbered 0 to 0, and image 2 is asked for"):
        ds.read(slice(None))


def test_a_truncated_unchecked_stack_is_named_as_such_when_it_is_read(tmp_path: Path) -> None:
    cs, _ = write_particles(tmp_path, N, stacks=2)
    stack = tmp_path / "J1/extract/stack_1.mrc"
    stack.write_bytes(stack.read_bytes()[:-1])
    ds = IndexedDataset(cs, check_headers=False)
    with pytest.raises(StackError, match=r"stack_1\.mrc is truncated: its header promises 3 images, the file holds 2 complete ones\.$"):
        ds.read(slice(None))


def test_a_data_set_with_unchecked_headers_pickles(tmp_path: Path) -> None:
    cs, images = write_particles(tmp_path, N)
    again = pickle.loads(pickle.dumps(IndexedDataset(cs, check_headers=False)))
    np.testing.assert_array_equal(again.read(slice(None)).numpy(), images)


@pytest.mark.parametrize("base", [0, 1])
def test_image_numbers_from_one_are_noticed_in_unchecked_stacks_too(tmp_path: Path, base: Literal[0, 1]) -> None:
    cs, _ = write_particles(tmp_path, N, stacks=2)
    table = np.load(cs)
    table["blob/idx"] += 1 + base
    with cs.open("wb") as file:
        np.save(file, table)
    ds = IndexedDataset(cs, check_headers=False, index_base=base)
    with pytest.raises(StackError, match="index_base=1" if base == 0 else "leave index_base=1 out"):
        ds.read(slice(None))


def test_a_box_that_was_never_looked_at_is_said_to_be_expected(tmp_path: Path) -> None:
    cs, _ = mixed_boxes(tmp_path)
    table = np.load(cs)
    with_shapes = {name.replace("/", "__"): table[name] for name in table.dtype.names or ()}
    shapes = np.array([[8, 8]] * 4 + [[12, 12]] * 2, "u4")
    cs = write_table(cs, **with_shapes, blob__shape=shapes)
    with pytest.raises(StackError, match=r"12\.mrc is expected to hold, as the first stack does, images of 8 x 8 .*check_headers=True"):
        IndexedDataset(cs, check_headers=False)


def test_half_sets_need_not_lie_beside_the_poses(tmp_path: Path) -> None:
    half_sets = np.arange(N, dtype="u4") % 2
    particles = IndexedDataset(write_particles(tmp_path, N, alignments3D__split=half_sets, alignments2D__pose=column(0.5))[0]).particles
    assert particles.half_set is not None
    assert particles.half_set.tolist() == half_sets.tolist()
    np.testing.assert_array_equal(particles.pose, np.float32([[0, 0, 0.5]] * N))


def test_headers_that_cannot_be_used_and_images_out_of_range_are_one_error(tmp_path: Path) -> None:
    cs, _ = write_particles(tmp_path, N, stacks=3)
    stacks = [tmp_path / f"J1/extract/stack_{k}.mrc" for k in range(3)]
    stacks[0].write_bytes(b"no stack" * 200)
    write_stack(stacks[1], numbered_images(1, 8))
    with pytest.raises(StackError, match=r"stack_0\.mrc(.|\n)*stack_1\.mrc has 1 images, .* and image 1 is asked for"):
        IndexedDataset(cs)


@pytest.mark.parametrize("slot", ["alignments3D", "alignments2D"])
def test_half_sets_and_shifts_are_read_where_there_is_no_pose(tmp_path: Path, slot: str) -> None:
    columns = {f"{slot}__split": np.array([0, 1, 1, 0, 0, 1], "u4"), f"{slot}__shift": np.ones((N, 2), "f4"), f"{slot}__psize_A": column(3)}
    particles = IndexedDataset(write_particles(tmp_path, N, **columns)[0]).particles
    assert particles.pose is None
    assert particles.half_set is not None
    assert particles.half_set.tolist() == [0, 1, 1, 0, 0, 1]
    assert (particles.shift_A == 3).all()


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("blob/psize_A", np.ones((N, 2), "f4")),
        ("blob/idx", np.zeros((N, 1), "u4")),
        ("blob/shape", np.full(N, 8, "u4")),
        ("blob/path", np.full((N, 1), b"J1/extract/stack_0.mrc")),
        ("uid", np.zeros(N, "V8")),
        ("uid", np.arange(N, dtype="f8")),
        ("ctf/df1_A", np.full(N, b"1.5")),
        ("ctf/tetra_A", np.zeros((N, 2), "f4")),
        ("alignments3D/shift", np.zeros((N, 3), "f4")),
        ("alignments3D/pose", np.zeros((N, 2), "f4")),
    ],
)
def test_a_column_of_another_kind_or_shape_is_named(tmp_path: Path, name: str, values: np.ndarray) -> None:
    cs, _ = write_particles(tmp_path, N)
    table = np.load(cs)
    columns = {other: table[other] for other in table.dtype.names or ()} | {name: values}
    cs = write_table(cs, **{other.replace("/", "__"): column for other, column in columns.items()})
    with pytest.raises(TableError, match=rf"{name} of .*{cs.name} holds .* and should hold"):
        IndexedDataset(cs)


def test_an_unknown_reading_of_bytes_is_one_error_about_the_argument(tmp_path: Path) -> None:
    cs, _ = write_particles(tmp_path, N, stacks=3)
    with pytest.raises(ArgumentError, match=r"^mode0 is one of"):
        IndexedDataset(cs, mode0="bad")  # type: ignore[arg-type]


def test_a_table_named_by_its_whole_path_opens_from_a_folder_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cs, images = write_particles(tmp_path / "project", N)
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    np.testing.assert_array_equal(IndexedDataset(cs).read(slice(None)).numpy(), images)


def test_damaged_and_truncated_stacks_are_one_error(tmp_path: Path) -> None:
    cs, _ = write_particles(tmp_path, N, stacks=3)
    folder = tmp_path / "J1/extract"
    (folder / "stack_0.mrc").write_bytes(b"")
    os.truncate(folder / "stack_2.mrc", 1024 + 300)
    with pytest.raises(StackError, match=r"2 of 3 stacks cannot be read:\n.*stack_0\.mrc has 0 bytes.*\n.*stack_2\.mrc is truncated"):
        IndexedDataset(cs)


@pytest.mark.parametrize(("other", "shape"), [("split", ()), ("shift", (2,))])
def test_a_slot_with_poses_is_preferred_to_one_without(tmp_path: Path, other: str, shape: tuple[int, ...]) -> None:
    columns = {f"alignments3D__{other}": np.ones((N, *shape), "f4"), "alignments2D__pose": column(0.5)}
    particles = IndexedDataset(write_particles(tmp_path, N, **columns)[0]).particles
    np.testing.assert_array_equal(particles.pose, np.tile(np.float32([0, 0, 0.5]), (N, 1)))


def test_an_image_beyond_a_stack_of_many_rows_is_noticed_before_it_is_read(tmp_path: Path) -> None:
    cs, _ = write_particles(tmp_path, 40, stacks=1)
    table = np.load(cs)
    table["blob/idx"][30] = 40
    with cs.open("wb") as file:
        np.save(file, table)
    with pytest.raises(StackError, match=r"stack_0\.mrc has 40 images, 0 to 39; image 40 is asked for \(1 rows, first row 30\)"):
        IndexedDataset(cs)


@pytest.mark.parametrize("check_headers", [True, False])
def test_rows_that_return_to_an_earlier_stack_are_held_against_that_one(tmp_path: Path, check_headers: bool) -> None:
    images = numbered_images(60, 8)
    idx = np.concatenate([np.arange(20), np.arange(20), np.arange(20, 40)])
    first = np.repeat([True, False, True], 20)
    write_stack(tmp_path / "a.mrc", images[first])
    write_stack(tmp_path / "b.mrc", images[~first])
    paths = np.where(first, "a.mrc", "b.mrc").tolist()
    cs = write_table(tmp_path / "t.cs", blob__path=paths, blob__idx=idx.astype("u4"), blob__psize_A=np.ones(60, "f4"))
    np.testing.assert_array_equal(IndexedDataset(cs, check_headers=check_headers).read(slice(None)).numpy(), images)


@pytest.mark.parametrize("dtype", ["i1", "u1"])
def test_bytes_of_unchecked_stacks_are_read_as_the_caller_says(tmp_path: Path, dtype: str) -> None:
    cs, images = write_particles(tmp_path, N, dtype=dtype)
    ds = IndexedDataset(cs, check_headers=False, mode0="unsigned" if dtype == "u1" else "signed")
    np.testing.assert_array_equal(ds.read(slice(None)).numpy(), images)


def test_images_at_odd_bytes_beside_others_are_not_seen_in_place(tmp_path: Path) -> None:
    cs, images = write_particles(tmp_path, N, stacks=2)
    file = IndexedDataset(cs).particles.file
    rows = np.flatnonzero(file == 1)
    rows = rows[np.argsort(np.load(cs)["blob/idx"][rows])]
    write_stack(tmp_path / "J1/extract/stack_1.mrc", images[rows], extended=2)
    ds = IndexedDataset(cs)
    assert ds.view_rows(rows) is None
    np.testing.assert_array_equal(ds.read(rows).numpy(), images[rows])
