from __future__ import annotations

import bz2
import gzip
import struct
import warnings
from pathlib import Path

import mrcfile
import numpy as np
import pytest
from support import numbered_images, open_files, write_stack

from cryolike_data.errors import ArgumentError, StackError
from cryolike_data.mrc import map_stack, read_header

DTYPES = ["i1", "i2", "f4", "u2", "f2"]


def read(path: Path, **options: object) -> np.ndarray:
    return map_stack(path, read_header(path, **options))  # type: ignore[arg-type]


def by_mrcfile(path: Path) -> np.ndarray:
    """What mrcfile reads, with the stack axis that it drops from stacks of one or splits in volume stacks put back."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with mrcfile.open(path, permissive=True) as mrc:
            data = np.array(mrc.data)
    return data.reshape(-1, *data.shape[-2:])


def poke(path: Path, at: int, raw: bytes) -> Path:
    """Overwrite bytes of a file."""
    with path.open("r+b") as file:
        file.seek(at)
        file.write(raw)
    return path


# Every kind of pixel, against the images written and against mrcfile


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_mode_in_both_byte_orders_reads_as_written(tmp_path: Path, dtype: str, order: str) -> None:
    images = numbered_images(3, 8, dtype=dtype)
    path = write_stack(tmp_path / "a.mrc", images, order=order)
    header = read_header(path)
    assert (header.nx, header.ny, header.nz, header.n_complete) == (8, 8, 3, 3)
    assert header.dtype == np.dtype(order + dtype)
    np.testing.assert_array_equal(read(path), images)
    np.testing.assert_array_equal(by_mrcfile(path), images)


@pytest.mark.parametrize("dtype", DTYPES)
def test_stacks_written_by_mrcfile_are_read(tmp_path: Path, dtype: str) -> None:
    images = numbered_images(3, 8, dtype=dtype)
    with mrcfile.new(tmp_path / "a.mrc") as mrc:
        mrc.set_data(images)
        mrc.voxel_size = 1.7
    np.testing.assert_array_equal(read(tmp_path / "a.mrc"), images)
    assert read_header(tmp_path / "a.mrc").pixel_size == pytest.approx(1.7)


@pytest.mark.parametrize("extended", [80, 1024, 1, 77, 131073])
@pytest.mark.parametrize("order", ["<", ">"])
def test_extended_headers_of_any_length_are_skipped(tmp_path: Path, extended: int, order: str) -> None:
    images = numbered_images(2, 8)
    path = write_stack(tmp_path / "a.mrc", images, extended=extended, order=order)
    np.testing.assert_array_equal(read(path), images)
    np.testing.assert_array_equal(by_mrcfile(path), images)


def test_images_that_are_not_square_keep_rows_as_y_and_columns_as_x(tmp_path: Path) -> None:
    images = np.arange(2 * 3 * 5, dtype="f4").reshape(2, 3, 5)
    path = write_stack(tmp_path / "a.mrc", images)
    assert (read_header(path).ny, read_header(path).nx) == (3, 5)
    np.testing.assert_array_equal(read(path), images)


@pytest.mark.parametrize("ispg", [0, 1])
def test_a_stack_of_one_image_has_three_axes(tmp_path: Path, ispg: int) -> None:
    images = numbered_images(1, 8)
    with mrcfile.new(tmp_path / "a.mrc") as mrc:
        mrc.set_data(images if ispg else images[0])
        mrc.header.ispg = ispg
    assert read(tmp_path / "a.mrc").shape == (1, 8, 8)
    np.testing.assert_array_equal(read(tmp_path / "a.mrc"), images)


def test_a_stack_of_volumes_reads_as_a_stack_of_their_sections(tmp_path: Path) -> None:
    images = numbered_images(6, 8)
    path = write_stack(tmp_path / "a.mrc", images)
    poke(path, 36, struct.pack("<i", 2))  # mz
    poke(path, 88, struct.pack("<i", 401))  # ispg
    np.testing.assert_array_equal(read(path), images)
    np.testing.assert_array_equal(by_mrcfile(path), images)


@pytest.mark.parametrize("shape", [(1, 1, 0x5A42), (1, 1, 0x8B1F), (1, 1 << 17, 1), (300_000, 1, 1)])
def test_stacks_may_be_large_in_any_direction(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    # The widths begin as files of bzip2 and gzip do.
    images = np.resize(numbered_images(1, 512, dtype="i2"), shape)
    np.testing.assert_array_equal(read(write_stack(tmp_path / "a.mrc", images)), images)


# Headers that are wrong in what does not matter

WRONG = {
    "mz of one": (36, struct.pack("<i", 1)),
    "mz of zero": (36, struct.pack("<i", 0)),
    "ispg of a volume": (88, struct.pack("<i", 1)),
    "ispg of nothing": (88, struct.pack("<i", -7)),
    "axes swapped": (64, struct.pack("<3i", 2, 1, 3)),
    "statistics of another file": (76, struct.pack("<3f", 5, -5, 9)),
    "statistics that are no numbers": (76, struct.pack("<3f", np.nan, np.inf, np.nan)),
    "origin": (196, struct.pack("<3f", 1, 2, 3)),
    "start": (16, struct.pack("<3i", -4, -4, 9)),
    "no MAP": (208, bytes(4)),
    "other MAP": (208, b"map\0"),
    "no stamp": (212, bytes(4)),
    "stamp 44 41": (212, b"\x44\x41\0\0"),
    "stamp 44 00": (212, b"\x44\0\0\0"),
    "stamp of the other order": (212, b"\x11\x11\0\0"),
    "neither MAP nor stamp": (208, bytes(8)),
    "labels beyond ten": (220, struct.pack("<i", 99)),
}


@pytest.mark.parametrize("dtype", ["f4", "i1"])
@pytest.mark.parametrize(("at", "raw"), WRONG.values(), ids=WRONG.keys())
def test_what_other_programs_get_wrong_is_not_believed(tmp_path: Path, at: int, raw: bytes, dtype: str) -> None:
    images = numbered_images(3, 8, dtype=dtype)
    path = poke(write_stack(tmp_path / "a.mrc", images), at, raw)
    np.testing.assert_array_equal(read(path), images)


@pytest.mark.parametrize("stamp", [b"\0\0\0\0", b"\x44\x44\0\0", b"\x11\x11\0\0"], ids=["none", "little", "big"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", ["i1", "i2", "f4"])
@pytest.mark.parametrize("box", [8, 256, 512])
def test_the_byte_order_is_found_whatever_the_stamp_says(tmp_path: Path, stamp: bytes, order: str, dtype: str, box: int) -> None:
    # Mode 0 and boxes such as 256 and 512 make sense in either order: 256 read the wrong way round is 65,536.
    images = numbered_images(2, box, dtype=dtype)
    path = write_stack(tmp_path / "a.mrc", images, order=order, stamp=stamp, map_word=bytes(4))
    header = read_header(path)
    assert (header.nx, header.ny, header.nz) == (box, box, 2)
    np.testing.assert_array_equal(read(path), images)


@pytest.mark.parametrize(
    ("flags", "mode0", "dtype"),
    [
        (None, "auto", "i1"),
        (1, "auto", "i1"),
        (0, "auto", "u1"),
        (6, "auto", "u1"),
        (None, "unsigned", "u1"),
        (1, "unsigned", "u1"),
        (0, "signed", "i1"),
    ],
)
@pytest.mark.parametrize("order", ["<", ">"])
def test_bytes_are_signed_unless_imod_or_the_caller_says_otherwise(
    tmp_path: Path, flags: int | None, mode0: str, dtype: str, order: str
) -> None:
    images = numbered_images(2, 8, dtype=dtype)
    path = write_stack(tmp_path / "a.mrc", images, imod_flags=flags, order=order)
    np.testing.assert_array_equal(read(path, mode0=mode0), images)


def test_an_unknown_reading_of_bytes_is_an_error(tmp_path: Path) -> None:
    path = write_stack(tmp_path / "a.mrc", numbered_images(2, 8, dtype="u1"))
    with pytest.raises(ArgumentError, match="mode0"):
        read_header(path, mode0="uint8")  # type: ignore[arg-type]


@pytest.mark.parametrize("mode0", ["signed", "unsigned"])
@pytest.mark.parametrize("dtype", ["i2", "f4"])
def test_how_to_read_bytes_matters_to_no_other_mode(tmp_path: Path, dtype: str, mode0: str) -> None:
    images = numbered_images(2, 8, dtype=dtype)
    np.testing.assert_array_equal(read(write_stack(tmp_path / "a.mrc", images), mode0=mode0), images)


# Sizes


def test_a_truncated_stack_gives_its_complete_images(tmp_path: Path) -> None:
    images = numbered_images(5, 8)
    path = write_stack(tmp_path / "a.mrc", images)
    path.write_bytes(path.read_bytes()[:-1])
    header = read_header(path)
    assert (header.nz, header.n_complete) == (5, 4)
    np.testing.assert_array_equal(read(path), images[:4])


@pytest.mark.parametrize("order", ["<", ">"])
def test_the_byte_order_of_a_truncated_stack_is_found_without_a_stamp(tmp_path: Path, order: str) -> None:
    images = numbered_images(2, 256, dtype="i1")
    path = write_stack(tmp_path / "a.mrc", images, order=order, stamp=bytes(4))
    path.write_bytes(path.read_bytes()[:-1])
    assert read_header(path).nz == 2
    np.testing.assert_array_equal(read(path), images[:1])


@pytest.mark.parametrize(("box", "stamp"), [(8, bytes(4)), (256, None)], ids=["as it makes sense", "as stamped"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_the_byte_order_of_a_stack_without_a_complete_image_is_found(tmp_path: Path, order: str, box: int, stamp: bytes | None) -> None:
    path = write_stack(tmp_path / "a.mrc", numbered_images(2, box, dtype="i1"), order=order, stamp=stamp)
    path.write_bytes(path.read_bytes()[:1030])
    header = read_header(path)
    assert (header.nx, header.ny, header.nz, header.n_complete) == (box, box, 2, 0)


@pytest.mark.parametrize("extended", [0, 4096])
@pytest.mark.parametrize("size", [1024, 1030, 1024 + 8 * 8 * 4 - 1])
def test_a_stack_without_a_complete_image_gives_none(tmp_path: Path, size: int, extended: int) -> None:
    path = write_stack(tmp_path / "a.mrc", numbered_images(5, 8), extended=extended)
    path.write_bytes(path.read_bytes()[:size])
    assert read_header(path).n_complete == 0
    assert read(path).shape == (0, 8, 8)


def test_bytes_after_the_last_image_are_ignored(tmp_path: Path) -> None:
    images = numbered_images(5, 8)
    path = write_stack(tmp_path / "a.mrc", images, nz=3)
    np.testing.assert_array_equal(read(path), images[:3])


@pytest.mark.parametrize("size", [2000, 1024 + 5 * 8 * 8 * 4 - 1])
def test_a_stack_that_shrank_after_its_header_was_read_is_an_error(tmp_path: Path, size: int) -> None:
    path = write_stack(tmp_path / "a.mrc", numbered_images(5, 8))
    header = read_header(path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(StackError, match="has shrunk"):
        map_stack(path, header)
    assert open_files(tmp_path) == []


# Pixel sizes


@pytest.mark.parametrize("size", [0.5, 1.31, 20.0])
def test_a_plausible_pixel_size_is_taken_from_the_cell(tmp_path: Path, size: float) -> None:
    assert read_header(write_stack(tmp_path / "a.mrc", numbered_images(2, 8), pixel_size=size)).pixel_size == pytest.approx(size)


@pytest.mark.parametrize("size", [0.0, 1.0, -1.3, 1e-9, 5000.0, np.nan, np.inf])
def test_a_placeholder_for_the_pixel_size_is_none(tmp_path: Path, size: float) -> None:
    assert read_header(write_stack(tmp_path / "a.mrc", numbered_images(2, 8), pixel_size=size)).pixel_size is None


def test_different_pixel_sizes_in_x_and_y_are_none(tmp_path: Path) -> None:
    path = write_stack(tmp_path / "a.mrc", numbered_images(2, 8), pixel_size=2.0)
    assert read_header(poke(path, 40, struct.pack("<f", 24.0))).pixel_size is None


def test_a_cell_of_another_grid_gives_no_pixel_size(tmp_path: Path) -> None:
    path = write_stack(tmp_path / "a.mrc", numbered_images(2, 8), pixel_size=2.0)
    assert read_header(poke(path, 28, struct.pack("<3i", 1, 1, 1))).pixel_size is None


# What is refused


@pytest.mark.parametrize(("mode", "said"), [(3, "complex"), (4, "complex"), (16, "RGB"), (101, "4-bit")])
@pytest.mark.parametrize("order", ["<", ">"])
def test_pixels_that_are_no_real_numbers_are_refused_with_what_to_do(tmp_path: Path, mode: int, said: str, order: str) -> None:
    path = write_stack(tmp_path / "a.mrc", numbered_images(2, 8), order=order)
    poke(path, 12, struct.pack(f"{order}i", mode))
    with pytest.raises(StackError, match=rf"a\.mrc holds .*{said}.*mode {mode}\).*mode 2 or 12"):
        read_header(path)


def test_a_complex_stack_of_mrcfile_is_refused(tmp_path: Path) -> None:
    with mrcfile.new(tmp_path / "a.mrc") as mrc:
        mrc.set_data(np.ones((2, 8, 8), "c8"))
    with pytest.raises(StackError, match="complex"):
        read_header(tmp_path / "a.mrc")


@pytest.mark.parametrize("pack", [gzip, bz2])
@pytest.mark.parametrize("box", [2, 64])
def test_compressed_stacks_are_refused_with_the_command_that_unpacks_them(tmp_path: Path, pack: object, box: int) -> None:
    raw = write_stack(tmp_path / "a.mrc", numbered_images(2, box)).read_bytes()
    path = tmp_path / "a.mrc.packed"
    path.write_bytes(pack.compress(raw))  # type: ignore[attr-defined]
    with pytest.raises(StackError, match="gunzip" if pack is gzip else "bunzip2"):
        read_header(path)


def test_a_file_that_the_system_cannot_read_is_a_stack_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(StackError, match=r"absent\.mrc cannot be read: No such file"):
        read_header(tmp_path / "absent.mrc")
    # It can be opened and not be read, like a file on a disk that fails: such an error of the system names no file.
    with pytest.raises(StackError, match=r"/proc/self/mem cannot be read: "):
        read_header("/proc/self/mem")


@pytest.mark.parametrize("size", [0, 1, 1023])
def test_a_file_shorter_than_a_header_is_refused(tmp_path: Path, size: int) -> None:
    (tmp_path / "a.mrc").write_bytes(bytes(size))
    with pytest.raises(StackError, match=f"has {size} bytes"):
        read_header(tmp_path / "a.mrc")


@pytest.mark.parametrize(
    "raw", [b"II*\0" + bytes(3000), b"data_particles\n" * 200, bytes(3000), b"\xff" * 3000], ids=["tiff", "star", "zeros", "ones"]
)
def test_files_of_other_kinds_are_refused(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "a.mrc").write_bytes(raw)
    with pytest.raises(StackError, match="not an MRC stack"):
        read_header(tmp_path / "a.mrc")


@pytest.mark.parametrize("at", [0, 4, 8], ids=["nx", "ny", "nz"])
@pytest.mark.parametrize("value", [0, -8])
def test_a_stack_without_extent_is_refused(tmp_path: Path, at: int, value: int) -> None:
    path = poke(write_stack(tmp_path / "a.mrc", numbered_images(2, 8)), at, struct.pack("<i", value))
    with pytest.raises(StackError, match=f"={value} "):
        read_header(path)


def test_a_negative_extended_header_is_named_as_what_is_wrong(tmp_path: Path) -> None:
    path = poke(write_stack(tmp_path / "a.mrc", numbered_images(2, 8)), 92, struct.pack("<i", -80))
    with pytest.raises(StackError, match="nsymbt=-80"):
        read_header(path)


# The map


def test_a_map_cannot_be_written_through(tmp_path: Path) -> None:
    path = write_stack(tmp_path / "a.mrc", numbered_images(2, 8))
    before = path.read_bytes()
    stack = read(path)
    with pytest.raises(ValueError, match="read-only"):
        stack[0] = 0
    with pytest.raises(ValueError):
        stack.flags.writeable = True
    assert path.read_bytes() == before


def test_a_map_stays_readable_after_the_file_is_removed(tmp_path: Path) -> None:
    images = numbered_images(2, 8)
    path = write_stack(tmp_path / "a.mrc", images)
    stack = read(path)
    path.unlink()
    np.testing.assert_array_equal(stack, images)


@pytest.mark.shared
def test_a_real_stack_equals_what_mrcfile_reads(shared: Path) -> None:
    path = shared / "real/empiar_10076/empiar_10076_7.mrc"
    assert read(path).shape == (7, 320, 320)
    np.testing.assert_array_equal(read(path), by_mrcfile(path))
