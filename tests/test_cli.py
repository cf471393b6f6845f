"""The command line: what it tells, what it writes, and that everything that goes wrong is one message on the error stream."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from support import (
    centred,
    contents,
    ctf_columns,
    load_cryolike_stack,
    numbered_images,
    run_python,
    stored_images,
    uids,
    write_job,
    write_stack,
    write_table,
)

from cryolike_data import ImageDescriptor, IndexedDataset, ZarrDataset
from cryolike_data.cli import main
from cryolike_data.demo import DemoProject
from cryolike_data.export.cryolike import CryoLikeFormat
from cryolike_data.export.zarr import ZarrFormat

SCRIPT = Path(sys.executable).with_name("cryolike-data")


@pytest.fixture
def one_group(tmp_path: Path) -> Path:
    """A table of ten particles of one exposure group and its stack, in ``tmp_path/data``."""
    images = numbered_images(10, 16)
    write_stack(tmp_path / "data/stacks/a.mrc", images)
    return write_table(
        tmp_path / "data/particles.cs",
        uid=uids(10),
        blob__path=["stacks/a.mrc"] * 10,
        blob__idx=np.arange(10, dtype="u4"),
        blob__psize_A=np.full(10, 1.5, "f4"),
        **ctf_columns(10),
    )


@pytest.fixture
def moved(one_group: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The table of ``one_group`` and the folder where its stack lies now."""
    shutil.move(tmp_path / "data/stacks", tmp_path / "elsewhere")
    return one_group, tmp_path / "elsewhere"


def run(*arguments: Any) -> int:
    return main([str(argument) for argument in arguments])


def out(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


def assert_one_message(captured: Any) -> None:
    assert captured.err.startswith("cryolike-data: ")
    assert captured.err.count("cryolike-data: ") == 1
    assert "Traceback" not in captured.err


# --- info


@pytest.mark.parametrize(
    "fact",
    [
        "rows 60",
        "blob/*, ctf/*, alignments3D/*",
        "60 particles in 5 files",
        "32 x 32 px",
        "2 A/pixel",
        "float32",
        "2 exposure groups",
        "group 0 37 particles, 300 kV, 2.7 mm Cs, 0.1 amplitude contrast",
        "group 3 23 particles, 200 kV, 1.4 mm Cs, 0.07 amplitude contrast",
        "bytes 246 kB of images, 4.1 kB each",
        "pose, shift_A, half_set",
    ],
)
def test_info_tells_what_is_in_a_table(demo, capsys, fact):
    assert run("info", demo.indexed) == 0
    assert fact in out(capsys)


def test_a_command_may_run_in_any_thread(one_group, capsys):
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run, "info", one_group).result() == 0
    assert "10 particles" in out(capsys)


def test_info_counts_the_fields(demo, capsys):
    run("info", demo.indexed)
    assert f"fields {len(np.load(demo.indexed, allow_pickle=False).dtype.names)}" in out(capsys)


@pytest.mark.parametrize(
    ("job", "facts"), [(4, ("30 particles", "32 x 32 px", "2 A/pixel")), (5, ("60 particles", "16 x 16 px", "4 A/pixel"))]
)
def test_info_tells_what_is_in_a_job(demo, capsys, job, facts):
    assert run("info", demo.folder, "--job", job) == 0
    told = out(capsys)
    assert [fact for fact in facts if fact not in told] == []


def test_info_tells_what_is_in_a_store(demo, tmp_path, capsys):
    run("export", demo.indexed, tmp_path / "a.zarr", "--box", 16, "--dtype", "float16")
    capsys.readouterr()
    assert run("info", tmp_path / "a.zarr") == 0
    told = out(capsys)
    expected = ("60 particles", "16 x 16 px", "4 A/pixel", "float16", "group 0 37 particles", "bytes 30.7 kB of images, 512 B each")
    assert [fact for fact in expected if fact not in told] == []


def test_info_of_a_table_without_its_stacks_tells_what_the_table_holds_first(moved, capsys):
    assert run("info", moved[0]) == 1
    captured = capsys.readouterr()
    assert "rows       10" in captured.out
    assert "stacks/a.mrc (10 rows)" in captured.err
    assert_one_message(captured)


def test_info_of_a_table_without_optics_tells_the_bytes_too(tmp_path, capsys):
    write_stack(tmp_path / "a.mrc", numbered_images(3, 16))
    table = write_table(tmp_path / "a.cs", blob__path=["a.mrc"] * 3, blob__idx=np.arange(3, dtype="u4"), blob__psize_A=np.full(3, 2, "f4"))
    assert run("info", table) == 0
    assert "bytes 3.07 kB of images, 1.02 kB each" in out(capsys)


def test_a_tilde_is_the_home_of_the_user_where_no_shell_has_said_so(one_group, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run("export", "~/data/particles.cs", tmp_path / "a.zarr", "--where", "blob/idx < 4") == 0
    capsys.readouterr()
    assert run("info", "~/a.zarr", "--where", "ctf/df1_A > 0") == 0
    assert "4 particles" in out(capsys)


def test_a_table_in_nobodys_home_is_told_of(capsys):
    with pytest.raises(SystemExit) as ended:
        run("info", "~nobody-by-this-name/particles.cs")
    assert ended.value.code == 2
    assert "~nobody-by-this-name is no user's home folder" in capsys.readouterr().err


def test_nobody_has_to_read_what_is_told(one_group):
    ran = subprocess.run(["bash", "-c", f"{SCRIPT} info {one_group} >&-"], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")


# --- export to Zarr


def test_export_to_a_store_keeps_the_images(one_group, tmp_path):
    assert run("export", one_group, tmp_path / "a.zarr") == 0
    np.testing.assert_array_equal(zarr.open_group(tmp_path / "a.zarr", mode="r")["images"][:], numbered_images(10, 16))


@pytest.mark.parametrize("option", [("--box", 8), ("--factor", 2)])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_export_to_a_store_downsamples(one_group, tmp_path, option, dtype):
    assert run("export", one_group, tmp_path / "a.zarr", *option, "--method", "mean", "--dtype", dtype) == 0
    images = zarr.open_group(tmp_path / "a.zarr", mode="r")["images"]
    expected = numbered_images(10, 16).reshape(10, 8, 2, 8, 2).mean(axis=(2, 4))
    assert images.dtype == dtype
    assert images.attrs["pixel_size_A"] == 3.0
    np.testing.assert_allclose(images[:], expected, atol=1e-3)


def test_export_says_where_the_store_is(one_group, tmp_path, capsys):
    run("export", one_group, tmp_path / "a.zarr")
    assert str(tmp_path / "a.zarr") in capsys.readouterr().out


def test_export_of_a_job(demo, tmp_path):
    assert run("export", demo.folder, tmp_path / "a.zarr", "--job", 4) == 0
    table = np.load(demo.folder / "J4/J4_passthrough_particles.cs", allow_pickle=False)
    np.testing.assert_array_equal(zarr.open_group(tmp_path / "a.zarr", mode="r")["uid"][:], table["uid"])


def test_export_replaces_a_store_only_when_told_to(one_group, tmp_path, capsys):
    run("export", one_group, tmp_path / "a.zarr")
    capsys.readouterr()
    assert run("export", one_group, tmp_path / "a.zarr", "--factor", 2) == 1
    captured = capsys.readouterr()
    assert_one_message(captured)
    assert "a.zarr holds another export: settings.box is 16 there and 8 here" in captured.err
    assert zarr.open_group(tmp_path / "a.zarr", mode="r")["images"].shape == (10, 16, 16)
    assert run("export", one_group, tmp_path / "a.zarr", "--factor", 2, "--overwrite") == 0
    assert zarr.open_group(tmp_path / "a.zarr", mode="r")["images"].shape == (10, 8, 8)


# --- export to CryoLike


def test_export_to_a_folder_makes_a_descriptor_for_the_images(one_group, tmp_path):
    assert run("export", one_group, tmp_path / "out") == 0
    phys, fourier, metadata = load_cryolike_stack(tmp_path / "out")
    np.testing.assert_allclose(phys, centred(numbered_images(10, 16)), atol=1e-6)
    assert fourier.shape == (10, 17, 32)
    assert (metadata["n_pixels"].tolist(), metadata["pixel_size"].tolist()) == ([16, 16], [1.5, 1.5])


def test_export_to_a_folder_makes_a_descriptor_for_the_images_as_written(one_group, tmp_path):
    assert run("export", one_group, tmp_path / "out", "--factor", 2) == 0
    metadata = load_cryolike_stack(tmp_path / "out")[2]
    assert (metadata["n_pixels"].tolist(), metadata["pixel_size"].tolist()) == ([8, 8], [3, 3])


def test_export_to_a_folder_takes_the_descriptor_given(one_group, tmp_path):
    ImageDescriptor.from_individual_values(16, 1.5, "double", n_inplanes=12).save(tmp_path / "params.npz")
    assert run("export", one_group, tmp_path / "out", "--descriptor", tmp_path / "params.npz") == 0
    fourier = load_cryolike_stack(tmp_path / "out")[1]
    assert (fourier.shape[2], fourier.dtype) == (12, np.complex128)


def test_export_to_a_folder_in_batches(one_group, tmp_path):
    assert run("export", one_group, tmp_path / "out", "--batch-size", 4, "--n-stacks-max", 2) == 0
    assert sorted(path.name for path in (tmp_path / "out/phys").iterdir()) == [f"particles_phys_stack_{k:06d}.pt" for k in (0, 1)]
    assert len(load_cryolike_stack(tmp_path / "out", 1)[0]) == 4


def test_export_stops_after_some_stacks_only_where_asked_to(one_group, tmp_path, capsys):
    assert run("export", one_group, tmp_path / "out", "--batch-size", 4, "--n-stacks-max", 1) == 0
    assert run("export", one_group, tmp_path / "out", "--batch-size", 4) == 1
    assert "particles is 4 there and 10 here" in capsys.readouterr().err
    assert len(list((tmp_path / "out/phys").iterdir())) == 1


@pytest.mark.parametrize("target", ["out", "out.zarr"])
def test_the_same_command_continues_a_run_that_was_stopped(one_group, tmp_path, capsys, monkeypatch, target):
    command = ("export", one_group, tmp_path / target, *(("--shard-bytes", 4 * 16 * 16 * 4) if "." in target else ("--batch-size", 4)))
    with monkeypatch.context() as patch:
        patch.setattr(ZarrFormat, "write_rest", interrupt)
        patch.setattr(CryoLikeFormat, "write_rest", interrupt)
        assert run(*command) == 130
    assert capsys.readouterr().err.endswith("cryolike-data: stopped; the same command goes on from here\n")
    assert run("info", tmp_path / target) == 1
    assert run(*command) == 0
    assert "0 of 3 units written, 3 were there" in out(capsys)
    fresh = ("export", one_group, tmp_path / "fresh" / target, *command[3:])
    assert run(*fresh) == 0
    assert contents(tmp_path / target) == contents(tmp_path / "fresh" / target)


def test_a_command_that_is_terminated_leaves_nothing_half_written(one_group, tmp_path):
    # The signal comes while a file is being written, in a thread of its own.
    code = """
        import os, signal, sys
        from cryolike_data import cli
        from cryolike_data.export import place

        write = place._LocalOutput.write
        def terminated(self, piece):
            if "images" in self._name:
                place._LocalOutput.write = write
                os.kill(os.getpid(), signal.SIGTERM)
            write(self, piece)
        place._LocalOutput.write = terminated
        sys.exit(cli.main())
    """
    ran = run_python(code, "export", one_group, tmp_path / "a.zarr")
    assert (ran.returncode, ran.stderr) == (130, "cryolike-data: stopped; the same command goes on from here\n")
    assert set(contents(tmp_path / "a.zarr")) <= {".export/plan.json", ".export/units/000000.json", "images/c/0/0/0"}
    assert run("export", one_group, tmp_path / "a.zarr") == 0


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_store_that_is_not_finished_says_how_to_go_on(one_group, tmp_path, capsys):
    run("export", one_group, tmp_path / "a.zarr", "--shard-bytes", 4096, "--unit-range", "0/2")
    capsys.readouterr()
    assert run("info", tmp_path / "a.zarr") == 1
    captured = capsys.readouterr()
    assert_one_message(captured)
    assert "a.zarr is an export that is not finished (1 units are, of 10 particles in all)" in captured.err
    assert "--finish" in captured.err


def test_parts_that_are_all_written_are_sealed_by_finish(one_group, tmp_path, capsys):
    command = ("export", one_group, tmp_path / "a.zarr", "--shard-bytes", 4096)
    for part in (1, 0):
        assert run(*command, "--unit-range", f"{part}/2") == 0
        assert "not sealed yet" in capsys.readouterr().out
    assert run(*command, "--finish") == 0
    assert "Written to" in capsys.readouterr().out
    run("export", one_group, tmp_path / "fresh.zarr", "--shard-bytes", 4096)
    assert contents(tmp_path / "a.zarr") == contents(tmp_path / "fresh.zarr")


def test_a_part_tells_of_no_files_that_are_not_there(one_group, tmp_path, capsys):
    assert run("export", one_group, tmp_path / "out", "--format", "mrc", "--batch-size", 4, "--unit-range", "0/2") == 0
    told = out(capsys)
    assert "1 of 3 units written" in told
    assert "particles.cs" not in told
    assert not (tmp_path / "out/particles.cs").exists()


def test_finish_says_which_units_are_missing(one_group, tmp_path, capsys):
    command = ("export", one_group, tmp_path / "a.zarr", "--shard-bytes", 4096)
    run(*command, "--unit-range", "1/3")
    capsys.readouterr()
    assert run(*command, "--finish") == 1
    captured = capsys.readouterr()
    assert_one_message(captured)
    assert "2 of 3 units are not there (0, 2)" in captured.err
    assert not (tmp_path / "a.zarr/zarr.json").exists()


@pytest.mark.parametrize("target", ["out", "out.zarr"])
def test_a_summary_in_json_is_all_that_is_printed(one_group, tmp_path, capsys, target):
    assert run("export", one_group, tmp_path / target, "--json") == 0
    captured = capsys.readouterr()
    told = json.loads(captured.out)
    assert captured.err == ""
    expected = {"target": str(tmp_path / target), "particles": 10, "units": 1, "written": 1, "kept": 0, "sealed": True}
    assert {name: told[name] for name in expected} == expected
    assert told["format"] == ("zarr" if "." in target else "cryolike")
    assert told["bytes"] >= 10 * 16 * 16 * 4
    assert min(told["seconds"], told["images_per_second"]) > 0


def test_a_summary_of_finishing_counts_what_was_there(one_group, tmp_path, capsys):
    command = ("export", one_group, tmp_path / "a.zarr", "--shard-bytes", 4096, "--json")
    run(*command, "--unit-range", "0/1")
    assert json.loads(capsys.readouterr().out)["sealed"] is False
    run(*command, "--finish")
    told = json.loads(capsys.readouterr().out)
    assert (told["units"], told["written"], told["kept"], told["sealed"]) == (3, 0, 3, True)


def test_export_to_mrc_stacks_goes_back_into_the_tables(one_group, tmp_path, capsys):
    assert run("export", one_group, tmp_path / "out", "--format", "mrc", "--batch-size", 4, "--dtype", "float16") == 0
    assert "3 MRC stacks" in out(capsys)
    table = np.load(tmp_path / "out/particles.cs", allow_pickle=False)
    np.testing.assert_array_equal(table["uid"], uids(10))
    np.testing.assert_array_equal(stored_images(tmp_path / "out", table), numbered_images(10, 16).astype("f2"))
    assert (tmp_path / "out/particles.star").is_file()


def test_export_to_mrc_stacks_without_a_star_file(one_group, tmp_path):
    assert run("export", one_group, tmp_path / "out", "--format", "mrc", "--no-star") == 0
    assert not (tmp_path / "out/particles.star").exists()


def test_export_to_a_folder_without_transforms(one_group, tmp_path):
    assert run("export", one_group, tmp_path / "out", "--no-fourier") == 0
    assert sorted(contents(tmp_path / "out")) == [
        "export.json",
        "phys/image_descriptor.npz",
        "phys/particles_phys_stack_000000.npz",
        "phys/particles_phys_stack_000000.pt",
    ]


def test_export_of_a_selection(one_group, tmp_path):
    table = np.load(one_group, allow_pickle=False)
    limit = float(np.sort(table["ctf/df1_A"])[7]) + 0.5
    arguments = ("--where", f"ctf/df1_A < {limit}", "--every", 2, "--limit", 3)
    assert run("export", one_group, tmp_path / "a.zarr", *arguments) == 0
    expected = np.flatnonzero(table["ctf/df1_A"] < limit)[::2][:3]
    assert zarr.open_group(tmp_path / "a.zarr", mode="r")["row"][:].tolist() == expected.tolist()


def test_export_says_where_the_stacks_are(one_group, tmp_path, capsys):
    run("export", one_group, tmp_path / "out")
    assert f"1 stack of CryoLike in {tmp_path / 'out'}" in out(capsys)
    assert (tmp_path / "out/fft/image_descriptor.npz").is_file()


def test_the_module_runs_as_the_command_does(one_group, tmp_path):
    code = "import sys; from cryolike_data.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "export", one_group, tmp_path / "a.zarr", "--json"]
    ran = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert json.loads(ran.stdout)["sealed"] is True


def test_images_are_found_in_another_folder(moved, tmp_path):
    table, folder = moved
    assert run("export", table, tmp_path / "out", "--folder", folder) == 0
    np.testing.assert_allclose(load_cryolike_stack(tmp_path / "out")[0], centred(numbered_images(10, 16)), atol=1e-6)


def test_images_that_count_from_one_are_found(one_group, tmp_path):
    table = np.load(one_group, allow_pickle=False)
    table["blob/idx"] += 1
    with one_group.open("wb") as file:
        np.save(file, table)
    assert run("export", one_group, tmp_path / "out", "--index-base", 1) == 0
    np.testing.assert_allclose(load_cryolike_stack(tmp_path / "out")[0], centred(numbered_images(10, 16)), atol=1e-6)


def test_columns_come_from_a_passthrough(one_group, tmp_path):
    table = np.load(one_group, allow_pickle=False)
    names = [name for name in table.dtype.names if not name.startswith("ctf/")]
    bare = np.zeros(10, [(name, table.dtype[name]) for name in names])
    for name in names:
        bare[name] = table[name]
    np.save(one_group.with_name("bare.npy"), bare)
    assert run("export", one_group.with_name("bare.npy"), tmp_path / "out", "--passthrough", one_group) == 0
    np.testing.assert_array_equal(load_cryolike_stack(tmp_path / "out")[2]["defocusU"], table["ctf/df1_A"])


def test_rows_without_a_partner_in_a_passthrough_are_left_out_when_told_to(one_group, tmp_path, capsys):
    table = np.load(one_group, allow_pickle=False)
    np.save(tmp_path / "more.npy", table[4:])
    chosen = ("export", one_group, tmp_path / "a.zarr", "--passthrough", tmp_path / "more.npy", "--where", f"uid != {table['uid'][5]}")
    assert run(*chosen) == 1
    assert "4 of 10 rows" in capsys.readouterr().err
    assert run(*chosen, "--unmatched", "drop") == 0
    np.testing.assert_array_equal(ZarrDataset(tmp_path / "a.zarr").particles.uid, table["uid"][[4, 6, 7, 8, 9]])
    assert run("info", one_group, "--passthrough", tmp_path / "more.npy", "--unmatched", "drop") == 0
    assert "rows 6" in out(capsys)


def test_rows_of_a_job_without_a_partner_are_left_out_when_told_to(tmp_path, capsys):
    job, _ = write_job(tmp_path, 4, [6])
    table = np.load(job / "J4_passthrough_particles.cs", allow_pickle=False)
    stack = "J4/restack/batch_000000_restacked.mrc"
    write_table(
        job / "restacked_particles.cs",
        uid=table["uid"][2:],
        blob__path=[stack] * 4,
        blob__idx=np.arange(2, 6, dtype="u4"),
        blob__psize_A=np.full(4, 1.7, "f4"),
    )
    chosen = ("export", tmp_path, "--job", 4, tmp_path / "a.zarr", "--pairing", "uid", "--where", f"uid == {table['uid'][3]}")
    assert run(*chosen) == 1
    assert "unmatched" in capsys.readouterr().err
    assert run(*chosen, "--unmatched", "drop") == 0
    np.testing.assert_array_equal(ZarrDataset(tmp_path / "a.zarr").particles.uid, table["uid"][[3]])


@pytest.mark.parametrize(("mode0", "dtype"), [("signed", "i1"), ("unsigned", "u1")])
def test_bytes_are_read_as_the_caller_says(one_group, tmp_path, mode0, dtype):
    images = numbered_images(10, 16, dtype="i1")
    write_stack(tmp_path / "data/stacks/a.mrc", images)
    assert run("export", one_group, tmp_path / "a.zarr", "--mode0", mode0) == 0
    np.testing.assert_array_equal(ZarrDataset(tmp_path / "a.zarr").read(range(10)).numpy(), images.view(dtype))


def test_the_pixel_size_given_wins(one_group, tmp_path):
    assert run("export", one_group, tmp_path / "a.zarr", "--pixel-size", 1.7) == 0
    assert zarr.open_group(tmp_path / "a.zarr", mode="r")["images"].attrs["pixel_size_A"] == 1.7


# --- what goes wrong


ERRORS = {
    "no such table": (("info", "absent.cs"), "absent.cs"),
    "a folder": (("info", "data"), "--job N"),
    "no such job": (("info", ".", "--job", 7), "J7"),
    "no table at all": (("info", "data/stacks/a.mrc"), "not a CryoSPARC table"),
    "no such store": (("info", "absent.zarr"), "absent.zarr"),
    "stacks elsewhere": (("info", "data/particles.cs", "--folder", "data"), "stacks/a.mrc"),
    "counts from one": (("info", "data/particles.cs", "--index-base", 1), "leave --index-base 1 out"),
    "factor and box": (("export", "data/particles.cs", "out", "--factor", 2, "--box", 8), "exactly one"),
    "factor zero": (
        ("export", "data/particles.cs", "out", "--factor", 0),
        "--factor 0 must be a positive integer; for other ratios pass --box",
    ),
    "factor that does not divide": (("export", "data/particles.cs", "out", "--factor", 3), "1, 2, 4, 8, 16"),
    "larger box": (("export", "data/particles.cs", "out.zarr", "--box", 17), "--box 17"),
    "no such descriptor": (("export", "data/particles.cs", "out", "--descriptor", "absent.npz"), "absent.npz"),
    "descriptor of a store": (("export", "data/particles.cs", "out.zarr", "--descriptor", "absent.npz"), "--descriptor"),
    "pictures of a store": (("export", "data/particles.cs", "out.zarr", "--plots"), "--plots"),
    "a star file of a store": (("export", "data/particles.cs", "out.zarr", "--no-star"), "--no-star"),
    "shards of stacks": (("export", "data/particles.cs", "out", "--shard-bytes", 1), "--shard-bytes"),
    "units of no sense": (("export", "data/particles.cs", "out.zarr", "--unit-range", "4/4"), "'4/4'"),
    "overwriting a part": (("export", "data/particles.cs", "out.zarr", "--unit-range", "0/2", "--overwrite"), "overwrite"),
    "finishing a part": (("export", "data/particles.cs", "out.zarr", "--unit-range", "0/2", "--finish"), "--unit-range"),
    "finishing nothing": (("export", "data/particles.cs", "out.zarr", "--finish"), "1 of 1 units are not there"),
    "no such column": (("export", "data/particles.cs", "out.zarr", "--where", "ctf/df3_A < 1"), "ctf/df3_A"),
    "dtype of stacks": (("export", "data/particles.cs", "out", "--dtype", "float16"), "--dtype"),
    "batches of none": (("export", "data/particles.cs", "out", "--batch-size", 0), "batch_size"),
    "negative pixel size": (("info", "data/particles.cs", "--pixel-size", -1), "pixel_size"),
    "a file for a folder": (("export", "data/particles.cs", "data/particles.cs"), "data/particles.cs"),
    "a file above the folder": (("export", "data/particles.cs", "data/particles.cs/out"), "data/particles.cs"),
    "a file above the store": (("export", "data/particles.cs", "data/particles.cs/out.zarr"), "data/particles.cs"),
}


@pytest.mark.parametrize("what", ERRORS)
def test_what_goes_wrong_is_one_message_and_exit_code_1(one_group, monkeypatch, tmp_path, capsys, what):
    monkeypatch.chdir(tmp_path)
    arguments, told = ERRORS[what]
    before = one_group.read_bytes()
    assert run(*arguments) == 1
    captured = capsys.readouterr()
    assert_one_message(captured)
    assert told in captured.err
    assert not {"out", "out.zarr"} & set(os.listdir(tmp_path))
    assert one_group.read_bytes() == before


# An option that is accepted and does nothing is a mistake that nobody notices.
IGNORED = {
    "--folder with --job": ("info", "demo", "--job", 4, "--folder", "elsewhere"),
    "--index-base with --job": ("info", "demo", "--job", 4, "--index-base", 1),
    "--passthrough with --job": ("info", "demo", "--job", 4, "--passthrough", "more.cs"),
    "--pairing without --job": ("info", "demo/J3/J3_particles.cs", "--pairing", "uid"),
    "--unmatched with --job": ("info", "demo", "--job", 4, "--unmatched", "drop"),
    "--unmatched of a store": ("info", "demo.zarr", "--unmatched", "drop"),
    "--mode0 of a store": ("info", "demo.zarr", "--mode0", "signed"),
    "--pixel-size of a store": ("info", "demo.zarr", "--pixel-size", 5),
    "--folder of a store": ("info", "demo.zarr", "--folder", "elsewhere"),
    "--method without a size": ("export", "demo/J3/J3_particles.cs", "new.zarr", "--method", "mean"),
    "--batch-size of a store": ("export", "demo/J3/J3_particles.cs", "new.zarr", "--batch-size", 4),
    "--n-stacks-max of a store": ("export", "demo/J3/J3_particles.cs", "new.zarr", "--n-stacks-max", 2),
}


@pytest.mark.parametrize("what", IGNORED)
def test_an_option_that_would_do_nothing_is_refused(demo, tmp_path, monkeypatch, capsys, what):
    monkeypatch.chdir(tmp_path)
    Path("demo").symlink_to(demo.folder)
    if "demo.zarr" in IGNORED[what]:
        run("export", demo.indexed, "demo.zarr")
    capsys.readouterr()
    assert run(*IGNORED[what]) == 1
    captured = capsys.readouterr()
    assert_one_message(captured)
    assert what.split()[0] in captured.err


def test_mixed_optics_are_one_message(demo, tmp_path, capsys):
    assert run("export", demo.indexed, tmp_path / "out") == 1
    captured = capsys.readouterr()
    assert_one_message(captured)
    assert "differ in voltage_kv" in captured.err


def test_a_missing_extra_is_one_message(one_group, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "finufft", None)
    assert run("export", one_group, tmp_path / "out") == 1
    captured = capsys.readouterr()
    assert_one_message(captured)
    assert "cryolike-data[fourier]" in captured.err


@pytest.mark.parametrize("arguments", [(), ("convert",), ("info",), ("export", "a.cs"), ("info", "a.cs", "--index-base", "2")], ids=str)
def test_a_command_that_is_not_understood_shows_the_usage(capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    assert ended.value.code == 2
    assert "usage: cryolike-data" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [("--help",), ("info", "--help"), ("export", "--help"), ("demo", "--help")], ids=str)
def test_help_is_shown(capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    assert ended.value.code == 0
    assert "usage: cryolike-data" in capsys.readouterr().out


# --- demo, the installed command, real particles


def test_demo_writes_a_project_and_says_how_to_look_at_it(tmp_path, capsys):
    assert run("demo", tmp_path / "project", "--particles", 20, "--box", 16, "--seed", 5) == 0
    told = capsys.readouterr().out
    commands = [line.split()[1:] for line in told.splitlines() if line.startswith("  cryolike-data ")]
    assert [run(*command) for command in commands] == [0, 0]


def test_demo_replaces_a_project_only_when_told_to(tmp_path, capsys):
    arguments = ("demo", tmp_path / "project", "--particles", 20, "--box", 16)
    assert [run(*arguments), run(*arguments), run(*arguments, "--overwrite")] == [0, 1, 0]
    assert_one_message(capsys.readouterr())


def test_the_installed_command_works_from_any_working_directory(demo: DemoProject, tmp_path):
    ran = subprocess.run(
        [SCRIPT, "export", os.path.relpath(demo.indexed, tmp_path), "a.zarr"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    table = np.load(demo.indexed, allow_pickle=False)
    np.testing.assert_array_equal(zarr.open_group(tmp_path / "a.zarr", mode="r")["images"][:], stored_images(demo.folder, table))


def test_a_warning_is_one_line_without_source_code(demo, tmp_path):
    shutil.copytree(demo.folder / "J5", tmp_path / "J5")
    (tmp_path / "J5/downsample/batch_000007_downsample.mrc").touch()
    ran = subprocess.run([SCRIPT, "info", ".", "--job", "5"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0
    assert "stops before batch_000007_downsample.mrc" in ran.stderr
    assert len(ran.stderr.splitlines()) == 1
    assert ".py" not in ran.stderr


@pytest.mark.shared
def test_info_of_real_particles(shared, capsys):
    assert run("info", shared / "real/empiar_10076/empiar_10076_7.cs") == 0
    told = out(capsys)
    expected = ("rows 7", "7 particles in 1 files", "320 x 320 px", "1.31 A/pixel", "group 23 7 particles, 300 kV, 2.7 mm Cs, 0.07 amp")
    assert [fact for fact in expected if fact not in told] == []


@pytest.mark.shared
def test_export_of_real_particles_at_box_128(shared, tmp_path):
    assert run("export", shared / "real/empiar_10076/empiar_10076_7.cs", tmp_path / "a.zarr", "--box", 128) == 0
    images = zarr.open_group(tmp_path / "a.zarr", mode="r")["images"]
    assert images.shape == (7, 128, 128)
    assert images.attrs["pixel_size_A"] == pytest.approx(3.275, rel=1e-5)


def test_particles_of_a_job_are_not_chosen_by_where_an_earlier_job_had_them(tmp_path, capsys):
    earlier = {"blob__path": ["J2/extract/a.mrc"] * 7, "blob__idx": np.arange(7, dtype="u4"), "blob__psize_A": np.full(7, 9, "f4")}
    write_job(tmp_path, 4, [3, 4], **earlier)
    for condition in ("blob/idx < 3", "blob/psize_A == 9"):
        assert run("info", tmp_path, "--job", 4, "--where", condition) == 1
        assert re.search(r"There is no column 'blob/(idx|psize_A)' to choose by; .* pixel_size, .* slice", capsys.readouterr().err)
    assert run("info", tmp_path, "--job", 4, "--where", "slice < 3 and pixel_size == 1.7") == 0
    assert "6 particles in 2 files" in out(capsys)


# The second form is one that obstore knows too, whose stores in memory nobody finds again.
@pytest.mark.parametrize("store", ["memory://cli/particles.zarr", "memory:///cli.zarr"])
def test_a_store_at_a_url_is_written_and_read(demo, tmp_path, capsys, store):
    assert run("export", demo.indexed, store, "--box", 16) == 0
    assert store in out(capsys)
    assert run("info", store) == 0
    assert "60 particles" in out(capsys)
    assert run("export", store, tmp_path / "some.zarr", "--where", "ctf/df1_A > 0", "--limit", 7) == 0
    assert zarr.open_group(str(tmp_path / "some.zarr"), mode="r")["images"].shape == (7, 16, 16)


def test_a_store_at_a_url_has_no_job(capsys):
    assert run("info", "memory://cli/particles.zarr", "--job", 4) == 1
    assert "--job" in capsys.readouterr().err


# --- messages speak of options, and whatever happens ends without a traceback


def test_remedies_are_options(one_group, demo, tmp_path, capsys):
    table = np.load(one_group)
    columns = {name.replace("/", "__"): table[name] for name in table.dtype.names}
    unknown_size = write_table(one_group.with_name("unknown.cs"), **columns | {"blob__psize_A": np.zeros(10, "f4")})
    one_name = write_table(one_group.with_name("names.cs"), **columns | {"blob__path": ["stacks/a.mrc", "b/a.mrc"] * 5})
    wrong = {
        ("info", unknown_size): "or leave them out with --where.",
        ("info", one_name, "--folder", one_group.parent / "stacks"): "and leave --folder out",
        ("demo", demo.folder): "pass --overwrite",
        ("demo", tmp_path / "p", "--particles", 5): "--particles is at least 10",
        ("export", demo.indexed, tmp_path / "out"): "--where 'ctf/voltage_kv == 200.0'",
        ("export", one_group, tmp_path / "a.zarr", "--box", 8, "--factor", 2): "exactly one of --factor (for example 2) and --box",
        ("info", demo.folder / "J4/J4_passthrough_particles.cs"): "as --passthrough",
        ("show", one_group, tmp_path / "a.xyz"): "has to end in the name of a kind of picture: .",
        ("show", one_group, tmp_path / "a.png", "--count", 0): "--count is at least 1",
        ("bench", one_group, "--gigabytes", "inf"): "--gigabytes are positive",
    }
    for command, told in wrong.items():
        assert run(*command) == 1
        captured = capsys.readouterr()
        assert_one_message(captured)
        assert told in captured.err
    assert run("export", demo.indexed, tmp_path / "out", "--where", "ctf/voltage_kv == 200.0", "--no-fourier") == 0


def test_a_table_without_star_file_is_not_said_to_have_one(one_group, tmp_path, capsys):
    assert run("export", one_group, tmp_path / "m", "--format", "mrc", "--no-star") == 0
    assert f"1 MRC stack, particles.cs in {tmp_path / 'm'}" in out(capsys)


def test_a_star_file_is_said_to_be_one(tmp_path, capsys):
    for text in ("data_particles\n", "\n# version 30001\n\ndata_optics\n"):
        (tmp_path / "a.star").write_text(text)
        assert run("info", tmp_path / "a.star") == 1
        assert "a RELION star file, which is not read; give the .cs" in capsys.readouterr().err


@pytest.mark.parametrize("reader", ["head -n 1", "true"])
def test_who_reads_the_output_may_have_enough(one_group, reader):
    code = "import sys; from cryolike_data.cli import main; sys.exit(main(sys.argv[1:]))"
    pipe = f"{sys.executable} -c '{code}' info {one_group} | {reader}"
    ran = subprocess.run(["bash", "-c", pipe], capture_output=True, text=True, check=True)
    assert ran.stderr == ""


def test_an_export_needs_no_streams_to_write_to(one_group, tmp_path):
    code = "import sys; from cryolike_data.cli import main; sys.exit(main(sys.argv[1:]))"
    subprocess.run(["bash", "-c", f"{sys.executable} -c '{code}' export {one_group} {tmp_path}/a.zarr >&- 2>&-"], check=True)
    assert len(ZarrDataset(tmp_path / "a.zarr")) == len(IndexedDataset(one_group))


def test_names_that_a_terminal_cannot_show_are_shown_in_part(one_group, tmp_path):
    code = "import sys; from cryolike_data.cli import main; sys.exit(main(sys.argv[1:]))"
    folder = tmp_path / "pr\u00f6j"
    shutil.copytree(one_group.parent, folder)
    surroundings = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    ran = subprocess.run([sys.executable, "-c", code, "info", folder / one_group.name], capture_output=True, check=True, env=surroundings)
    assert re.search(rb"pr(\\\w+)+j/", ran.stdout)


def test_contrast_is_an_option(demo, tmp_path, capsys, caplog):
    assert run("export", demo.indexed, tmp_path / "m", "--format", "mrc") == 0
    assert "--contrast positive" in caplog.text
    caplog.clear()
    assert run("export", demo.indexed, tmp_path / "p", "--format", "mrc", "--contrast", "positive") == 0
    assert not caplog.records
    capsys.readouterr()
    assert (IndexedDataset(tmp_path / "p/particles.cs").particles.sign == 1).all()
    assert run("export", demo.indexed, tmp_path / "a.zarr", "--contrast", "positive") == 1
    assert "--contrast has no meaning for a Zarr store" in capsys.readouterr().err


def test_an_export_without_starfile_names_the_option_that_needs_none(one_group, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "starfile", None)
    assert run("export", one_group, tmp_path / "m", "--format", "mrc") == 1
    assert 'pip install "cryolike-data[star]", or pass --no-star.' in capsys.readouterr().err
    assert run("export", one_group, tmp_path / "m", "--format", "mrc", "--no-star") == 0


def test_an_export_without_finufft_names_the_options_that_need_none(one_group, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "finufft", None)
    for options, told in ([], "--no-fourier."), (["--plots"], "--no-fourier and without --plots."):
        assert run("export", one_group, tmp_path / "c", "--format", "cryolike", *options) == 1
        assert f"write the images alone with {told}" in capsys.readouterr().err
    assert run("export", one_group, tmp_path / "c", "--format", "cryolike", "--no-fourier") == 0


def test_a_picture_without_matplotlib_names_the_extra(one_group, tmp_path, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run("show", one_group, tmp_path / "a.png") == 1
    captured = capsys.readouterr()
    assert_one_message(captured)
    assert "cryolike-data[plot]" in captured.err


def test_names_of_files_are_told_as_they_are(tmp_path, capsys):
    folder = tmp_path / "box=128" / 'folder="x"'
    folder.mkdir(parents=True)
    assert run("info", folder / "particles.cs") == 1
    assert str(folder / "particles.cs") in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--keep-bits", "--shard-bytes", "--n-stacks-max"])
def test_an_option_without_a_meaning_is_refused_whatever_its_value(demo, tmp_path, capsys, option):
    for value in (0, 1):
        assert run("export", demo.indexed, tmp_path / "m", "--format", "mrc", option, value) == 1
        assert f"{option} has no meaning for MRC stacks" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
