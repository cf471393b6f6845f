"""The scripts that the page on exports offers for SLURM arrays, torchrun and dask: each gives the bytes of one process."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import contents

from cryolike_data import IndexedDataset, export_zarr
from cryolike_data.demo import DemoProject

SCRIPTS = Path(__file__).resolve().parents[1] / "docs" / "scripts"
SHARD_BYTES = 5 * 32 * 32 * 4
OPTIONS = ["--shard-bytes", str(SHARD_BYTES), "--where", "ctf/df1_A > 0"]


@pytest.fixture(scope="module")
def expected(demo: DemoProject, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return contents(Path(export_zarr(IndexedDataset(demo.indexed), tmp_path_factory.mktemp("one") / "a.zarr", shard_bytes=SHARD_BYTES)))


def run(command: list[str], folder: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run a script with the commands of this environment, one thread to a process."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"} | settings
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True, timeout=120)


def test_the_array_script_without_slurm_runs_its_parts_at_once(demo, expected, tmp_path):
    run(["bash", str(SCRIPTS / "export_array.sh"), str(demo.indexed), "out.zarr", *OPTIONS], tmp_path, TASKS="3")
    assert contents(tmp_path / "out.zarr") == expected


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM], ids=lambda how: how.name)
def test_what_stops_the_array_script_stops_its_parts(tmp_path, how):
    exporter = tmp_path / "bin" / "cryolike-data"
    exporter.parent.mkdir()
    exporter.write_text('#!/usr/bin/env bash\necho $$ > "part$BASHPID.pid"\nexec sleep 600\n')
    exporter.chmod(0o755)
    path = os.pathsep.join([str(exporter.parent), "/usr/bin", "/bin"])
    # Where the tests themselves run in the background, no shell below them hears Ctrl-C.
    hears = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execvp('bash', ['bash', *sys.argv[1:]])"
    command = [sys.executable, "-c", hears, str(SCRIPTS / "export_array.sh"), "TABLE.cs", "OUT.zarr"]
    with subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"PATH": path, "TASKS": "2"}, start_new_session=True) as script:
        deadline = time.monotonic() + 30
        while len(parts := [int(text) for file in tmp_path.glob("*.pid") if (text := file.read_text())]) < 2:
            assert time.monotonic() < deadline
        if how == signal.SIGINT:
            os.killpg(script.pid, how)  # as a terminal does, to all
        else:
            script.send_signal(how)
        assert script.wait(30) == -how
    for part in parts:
        with pytest.raises(ProcessLookupError):
            os.kill(part, signal.SIGKILL)


def test_the_array_script_submits_an_array_and_a_job_that_follows_it(demo, expected, tmp_path):
    # A scheduler that runs what it is given at once, one task after the other, as SLURM would.
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(
        "#!/usr/bin/env bash\n"
        'for word in "$@"; do case $word in --array=*) last=${word##*-} ;; --dependency=*) echo "$word" >> dependency ;; esac; done\n'
        'for ((task = 0; task <= ${last:-0}; task++)); do SLURM_ARRAY_TASK_ID=$task bash -c "${@: -1}" >&2; done\n'
        "echo 1234\n"
    )
    sbatch.chmod(0o755)
    run(
        ["bash", str(SCRIPTS / "export_array.sh"), str(demo.indexed), "out.zarr", *OPTIONS],
        tmp_path,
        TASKS="2",
        PATH=os.pathsep.join([str(sbatch.parent), str(Path(sys.executable).parent), os.environ["PATH"]]),
    )
    assert contents(tmp_path / "out.zarr") == expected
    assert (tmp_path / "dependency").read_text() == "--dependency=afterok:1234\n"


@pytest.mark.skipif(shutil.which("torchrun", path=str(Path(sys.executable).parent)) is None, reason="torchrun is not installed")
def test_the_torchrun_script_gives_each_rank_its_part(demo, expected, tmp_path):
    run(["bash", str(SCRIPTS / "export_torchrun.sh"), str(demo.indexed), "out.zarr", *OPTIONS], tmp_path, PROCESSES="2")
    assert contents(tmp_path / "out.zarr") == expected


@pytest.mark.parametrize(("number", "sealed"), [("0", True), ("1", False)])
def test_of_several_machines_with_the_torchrun_script_the_first_seals(demo, tmp_path, number, sealed):
    torchrun = tmp_path / "bin" / "torchrun"
    torchrun.parent.mkdir()
    torchrun.write_text('#!/usr/bin/env bash\nshift 3\nRANK=0 WORLD_SIZE=1 exec "$@"\n')  # as if its own part were all
    torchrun.chmod(0o755)
    run(
        ["bash", str(SCRIPTS / "export_torchrun.sh"), str(demo.indexed), "out.zarr", *OPTIONS],
        tmp_path,
        PET_NODE_RANK=number,
        PATH=os.pathsep.join([str(torchrun.parent), str(Path(sys.executable).parent), os.environ["PATH"]]),
    )
    assert (tmp_path / "out.zarr/images/c/0/0/0").exists()
    assert (tmp_path / "out.zarr/zarr.json").exists() == sealed


def test_the_dask_script_runs_on_workers_of_this_machine(demo, tmp_path):
    pytest.importorskip("distributed")
    run([sys.executable, str(SCRIPTS / "export_dask.py"), str(demo.indexed), "out.zarr"], tmp_path)
    export_zarr(IndexedDataset(demo.indexed), tmp_path / "one.zarr")
    assert contents(tmp_path / "out.zarr") == contents(tmp_path / "one.zarr")
