"""Descriptors: CryoLike's defaults, the exact file contents, files with pickled None, and the choice of a grid for reduced images."""

import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import no_file_larger_than

from cryolike_data.descriptor import ImageDescriptor, read_npz_without_pickles
from cryolike_data.errors import ArgumentError, ExportError, ExportExistsError, MissingStackError

# key: (dtype, shape) in a file that CryoLike wrote
LAYOUT = {
    "n_pixels": ("<i8", (2,)),
    "pixel_size": ("<f8", (2,)),
    "radius_max": ("<f8", ()),
    "dist_radii": ("<f8", ()),
    "n_inplanes": ("<i8", ()),
    "precision": ("<U6", ()),
    "viewing_distance": ("<f8", ()),
    "atom_radii": ("<f8", (0,)),  # None: size 0
    "atom_selection": ("<U7", ()),
    "use_protein_residue_model": ("|b1", ()),
    "atom_shape": ("<U8", ()),
}


def write_as_cryolike(path, **changes):
    """An npz as CryoLike writes it: None is a 0-d object array."""
    arrays = ImageDescriptor.from_individual_values(64, 1.3, n_inplanes=48).to_npz_dict() | {"atom_radii": np.array(None)} | changes
    np.savez_compressed(path, **{key: value for key, value in arrays.items() if value is not ...})


def test_defaults_are_cryolikes():
    made = ImageDescriptor.from_individual_values(64, 1.3, resolution_factor=0.5)
    assert (made.radius_max, made.dist_radii, made.n_inplanes) == (8.0, 0.25, 128)
    assert made.viewing_distance == pytest.approx(0.15915494309189535, rel=1e-15)
    assert (made.precision, made.atom_selection, made.atom_radii, made.atom_shape) == ("single", "name CA", None, "gaussian")
    assert made.use_protein_residue_model is True


def test_derived_values_follow_the_precision():
    single = ImageDescriptor.from_individual_values(64, 1.3)
    double = ImageDescriptor.from_individual_values(64, 1.3, "double")
    assert (single.eps, single.complex_dtype) == (1e-6, torch.complex64)
    assert (double.eps, double.complex_dtype) == (1e-12, torch.complex128)
    assert single.box_size_A == pytest.approx(83.2)
    assert (single.polar_grid.n_shells, single.polar_grid.n_inplanes) == (65, 128)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    n_pixels=st.integers(1, 1000),
    pixel_size=st.floats(0.1, 10),
    precision=st.sampled_from(["single", "double"]),
    resolution_factor=st.floats(0.1, 1),
    atom_radii=st.none() | st.floats(0.1, 5),
    atom_selection=st.none() | st.sampled_from(["name CA", "all"]),
    use_protein_residue_model=st.booleans(),
    atom_shape=st.sampled_from(["gaussian", "hard-sphere"]),
)
def test_a_saved_descriptor_loads_as_it_was(tmp_path_factory, **values):
    path = tmp_path_factory.mktemp("descriptor") / "params.npz"
    made = ImageDescriptor.from_individual_values(**values)
    made.save(path)
    assert ImageDescriptor.load(path) == made


def test_the_file_has_cryolikes_keys_dtypes_and_no_pickles(tmp_path):
    ImageDescriptor.from_individual_values(64, 1.3).save(tmp_path / "params.npz")
    with np.load(tmp_path / "params.npz", allow_pickle=False) as file:
        assert {key: (file[key].dtype.str, file[key].shape) for key in file.files} == LAYOUT


def test_saving_refuses_to_overwrite_unless_asked(tmp_path):
    path = tmp_path / "params.npz"
    ImageDescriptor.from_individual_values(64, 1.3).save(path)
    other = ImageDescriptor.from_individual_values(32, 2.6)
    with pytest.raises(ExportExistsError, match="overwrite=True"):
        other.save(path)
    assert ImageDescriptor.load(path).n_pixels == 64
    other.save(path, overwrite=True)
    assert ImageDescriptor.load(path) == other


def test_a_descriptor_for_which_there_is_no_room_leaves_nothing_behind(tmp_path):
    with no_file_larger_than(1000), pytest.raises(ExportError, match=r"params\.npz cannot be written: File too large"):
        ImageDescriptor.from_individual_values(64, 1.3).save(tmp_path / "params.npz")
    assert not list(tmp_path.iterdir())


def test_saving_leaves_nothing_but_the_file(tmp_path):
    ImageDescriptor.from_individual_values(64, 1.3).save(str(tmp_path / "a.b.npz"))
    assert os.listdir(tmp_path) == ["a.b.npz"]


def test_a_name_or_folder_that_cannot_work_is_refused(tmp_path):
    made = ImageDescriptor.from_individual_values(64, 1.3)
    with pytest.raises(ArgumentError, match=r"\.npz"):
        made.save(tmp_path / "params")
    with pytest.raises(ExportError, match="create it first"):
        made.save(tmp_path / "absent" / "params.npz")


def test_cryolikes_own_none_loads_as_none(tmp_path):
    write_as_cryolike(tmp_path / "params.npz", atom_selection=np.array(None), viewing_distance=np.zeros(0))
    loaded = ImageDescriptor.load(tmp_path / "params.npz")
    assert (loaded.atom_radii, loaded.atom_selection, loaded.viewing_distance) == (None, None, None)
    assert loaded.n_pixels == 64


class Trap:
    """Unpickling one of these leaves a mark."""

    sprung = False

    def __reduce__(self):
        return setattr, (Trap, "sprung", True)


def test_nothing_is_ever_unpickled(tmp_path):
    trap = np.empty((), dtype=object)
    trap[()] = Trap()
    write_as_cryolike(tmp_path / "params.npz", atom_radii=trap)
    assert ImageDescriptor.load(tmp_path / "params.npz").atom_radii is None
    assert not Trap.sprung
    pickle.loads(pickle.dumps(Trap()))  # the trap does work
    assert Trap.sprung


def test_an_array_of_objects_is_refused_by_name(tmp_path):
    write_as_cryolike(tmp_path / "params.npz", atom_radii=np.array([None, 1.0]))
    with pytest.raises(ArgumentError, match="atom_radii is an array of Python objects"):
        ImageDescriptor.load(tmp_path / "params.npz")


def test_all_missing_keys_are_listed(tmp_path):
    write_as_cryolike(tmp_path / "params.npz", n_inplanes=..., precision=...)
    with pytest.raises(ArgumentError, match="lacks n_inplanes, precision"):
        ImageDescriptor.load(tmp_path / "params.npz")


def test_a_required_value_that_is_none_is_refused(tmp_path):
    write_as_cryolike(tmp_path / "params.npz", n_inplanes=np.array(None))
    with pytest.raises(ArgumentError, match="no value for n_inplanes"):
        ImageDescriptor.load(tmp_path / "params.npz")


def test_a_missing_file_and_a_file_of_another_kind_are_told_apart(tmp_path):
    with pytest.raises(MissingStackError, match="does not exist"):
        ImageDescriptor.load(tmp_path / "absent.npz")
    (tmp_path / "text.npz").write_text("not a zip")
    with pytest.raises(ArgumentError, match="not a readable npz"):
        ImageDescriptor.load(tmp_path / "text.npz")
    with zipfile.ZipFile(tmp_path / "other.npz", "w") as archive:
        archive.writestr("n_pixels.npy", b"not an array")
    with pytest.raises(ArgumentError, match="not a readable npz"):
        ImageDescriptor.load(tmp_path / "other.npz")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"n_pixels": np.array([64, 62])}, "square"),
        ({"n_pixels": np.array([64.5, 64.5])}, "integer"),
        ({"n_pixels": np.array([np.inf, np.inf])}, "integer"),
        ({"n_inplanes": np.array(np.nan)}, "n_inplanes"),
        ({"n_inplanes": np.array(np.inf)}, "n_inplanes"),
        ({"pixel_size": np.array([1.3, 1.31])}, "square"),
        ({"pixel_size": np.array([0.0, 0.0])}, "must be positive"),
        ({"precision": np.array("half")}, "'single', 'double'"),
        ({"atom_shape": np.array("cube")}, "'gaussian', 'hard-sphere'"),
        ({"radius_max": np.array(-1.0)}, "radius_max"),
    ],
)
def test_values_out_of_range_are_refused(tmp_path, changes, told):
    write_as_cryolike(tmp_path / "params.npz", **changes)
    with pytest.raises(ArgumentError, match=told):
        ImageDescriptor.load(tmp_path / "params.npz")


@pytest.mark.parametrize("given", [{"n_pixels": "64"}, {"pixel_size": "1.3"}, {"pixel_size": None}], ids=str)
def test_what_is_no_number_is_named(given):
    (name, value), *_ = given.items()
    with pytest.raises(ArgumentError, match=f"{name}={value} is not one number"):
        ImageDescriptor.from_individual_values(**{"n_pixels": 64, "pixel_size": 1.3, **given})


def test_a_descriptor_of_the_output_grid_is_used_as_it_is():
    made = ImageDescriptor.from_individual_values(32, 2.6)
    assert made.for_images(source_box=64, source_pixel_size=1.3, box=32, pixel_size=2.6) is made


def test_a_descriptor_of_the_source_grid_is_reduced_to_the_new_nyquist():
    made = ImageDescriptor.from_individual_values(64, 1.3, n_inplanes=48)
    reduced = made.for_images(source_box=64, source_pixel_size=1.3001, box=32, pixel_size=2.6002)
    assert (reduced.n_pixels, reduced.pixel_size, reduced.radius_max) == (32, 2.6, 8.0)
    assert reduced.box_size_A == pytest.approx(made.box_size_A, rel=1e-12)
    assert (reduced.dist_radii, reduced.n_inplanes, reduced.viewing_distance) == (0.25, 48, made.viewing_distance)


def test_a_polar_grid_within_the_new_nyquist_keeps_its_extent():
    made = ImageDescriptor.from_individual_values(64, 1.3, resolution_factor=0.25)
    assert made.for_images(source_box=64, source_pixel_size=1.3, box=32, pixel_size=2.6).radius_max == 4.0


def test_without_downsampling_the_descriptor_is_used_as_it_is():
    made = ImageDescriptor.from_individual_values(64, 1.3)
    assert made.for_images(source_box=64, source_pixel_size=1.3, box=64, pixel_size=1.3) is made


@pytest.mark.parametrize(("n_pixels", "pixel_size"), [(48, 1.3), (64, 1.4), (64, 1.3026), (32, 1.3)])
def test_a_descriptor_of_another_grid_is_refused_with_the_right_call(n_pixels, pixel_size):
    made = ImageDescriptor.from_individual_values(n_pixels, pixel_size)
    with pytest.raises(ArgumentError, match=r"n_pixels=32, pixel_size=2\.6"):
        made.for_images(source_box=64, source_pixel_size=1.3, box=32, pixel_size=2.6)


@pytest.mark.shared
@pytest.mark.parametrize(
    ("case", "values"),
    [
        ("A_indexed", {"n_pixels": 64, "pixel_size": 1.3}),
        ("D_indexed_mean2_desc32", {"n_pixels": 32, "pixel_size": 2.6}),
        ("G_indexed_double", {"n_pixels": 64, "pixel_size": 1.3, "precision": "double", "resolution_factor": 0.5}),
    ],
)
@pytest.mark.parametrize("file", ["params_input.npz", "fft/particles_fourier_stack_000000.npz"])
def test_cryolikes_own_files_load(shared, case, values, file):
    loaded = ImageDescriptor.load(shared / f"golden/{case}/{file}")
    assert loaded == ImageDescriptor.from_individual_values(**values, n_inplanes=48)


@pytest.mark.shared
def test_cryolikes_own_file_has_our_keys_and_dtypes(shared):
    members = read_npz_without_pickles(shared / "golden/A_indexed/params_input.npz")
    ours = ImageDescriptor.from_individual_values(64, 1.3, n_inplanes=48).to_npz_dict()
    assert list(members) == list(ours)
    for key, theirs in members.items():
        if theirs is not None:
            assert (ours[key].dtype, ours[key].shape) == (theirs.dtype, theirs.shape), key
            np.testing.assert_array_equal(ours[key], theirs)


@pytest.mark.shared
def test_the_stack_file_reads_with_none_where_cryolike_wrote_none(shared):
    members = read_npz_without_pickles(shared / "golden/A_indexed/fft/particles_fourier_stack_000000.npz")
    assert [key for key, value in members.items() if value is None] == [
        "atom_radii",
        "angleRotation",
        "angleTilt",
        "anglePsi",
        "ctfBfactor",
        "ctfScalefactor",
    ]
    assert members["defocusU"].shape == (30,)


@pytest.mark.parametrize(
    ("at", "byte"), [(6, 173), (8, 1), (10, 99)], ids=["of another version", "said to be encrypted", "compressed in an unknown way"]
)
def test_an_archive_with_a_damaged_directory_is_an_argument_error(tmp_path, at, byte):
    path = tmp_path / "params.npz"
    ImageDescriptor.from_individual_values(n_pixels=8, pixel_size=1.5).save(path)
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"PK\x01\x02") + at] = byte
    path.write_bytes(raw)
    with pytest.raises(ArgumentError, match=r"params\.npz is not a readable npz file"):
        ImageDescriptor.load(path)
