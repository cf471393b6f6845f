"""On macOS and Windows the package does the same without what only Linux has: here a process is made to look like one on such a system."""

from __future__ import annotations

import json
from pathlib import Path

from support import contents, run_python

from cryolike_data.demo import DemoProject

#: What is gone, by system and module.
GONE = {
    "darwin": {
        "os": "posix_fadvise posix_fallocate sched_getaffinity copy_file_range memfd_create O_DIRECT pidfd_open RWF_NOWAIT",
        "mmap": "MADV_HUGEPAGE MAP_POPULATE",
        "resource": "RUSAGE_THREAD",
    },
    "win32": {
        "os": "register_at_fork fork getuid geteuid O_CLOEXEC pread pwrite preadv sysconf",
        "mmap": "MAP_PRIVATE MAP_SHARED MAP_ANON MAP_ANONYMOUS PROT_READ PROT_WRITE madvise",
        "resource": "getrusage",
    },
}
GONE["win32"] = {module: f"{GONE['darwin'][module]} {names}" for module, names in GONE["win32"].items()}

MAKE = """
    import asyncio, builtins, importlib, json, os, sys
    from pathlib import Path
    import finufft, mrcfile, numpy as np, torch, tqdm, zarr

    system, gone, project, out = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    asyncio.new_event_loop().close()  # others take this system for what it is
    if gone:
        for module, names in gone.items():
            for name in names.split():
                vars(importlib.import_module(module)).pop(name, None)
        os.process_cpu_count = os.cpu_count  # which asks for it where there is one
        import ctypes
        load, there = ctypes.CDLL, open

        def library(name, *arguments, **options):
            assert name is not None, "the C library of Linux"
            return load(name, *arguments, **options)

        def opened(path, *arguments, **options):
            if str(path).startswith(("/proc", "/sys")):
                raise FileNotFoundError(path)
            return there(path, *arguments, **options)

        ctypes.CDLL = ctypes.PyDLL = library
        builtins.open = opened
        if system == "win32":
            sys.modules["resource"] = sys.modules["fcntl"] = None
        sys.platform = system
    import cryolike_data as cd
    from cryolike_data.likelihood import Templates, displacement_grid, stream_likelihood

    dataset = cd.IndexedDataset(project)
    np.save(out / "images.npy", np.concatenate([b.images.numpy() for b in cd.stream(dataset, batch_size=7, shuffle=True, seed=1)]))
    cd.export_zarr(dataset, out / "a.zarr", downsample=cd.Downsample(box=16))
    np.save(out / "zarr.npy", cd.ZarrDataset(out / "a.zarr").read(range(60)))
    cd.export_mrc(dataset, out / "mrc", downsample=cd.Downsample(factor=2))
    cd.export_cryolike(
        dataset.select(lambda p: p.ctf.voltage_kv == 300), out / "cryolike", descriptor=cd.ImageDescriptor(32, 2.0, 8.0, 0.25, 32)
    )
    templates = Templates.from_volume(sys.argv[5], cd.PolarGrid(8.0, 0.25, 32), step_deg=60)
    found = stream_likelihood(dataset, templates, displacement_grid(5, 2.5), batch_size=8, output=Path(f"{out}-likelihood"))
    np.save(out / "template.npy", found["template"][found["done"] == 1])
"""


def made(demo: DemoProject, folder: Path, system: str, gone: dict[str, str]) -> dict[str, str]:
    folder.mkdir()
    done = run_python(MAKE, system, json.dumps(gone), demo.indexed, folder, demo.volume, timeout=300)
    assert done.returncode == 0, done.stderr
    # An archive says which system made it, and a seal has its checksum.
    return {name: content for name, content in contents(folder).items() if not name.endswith((".npz", "cryolike/export.json"))}


def test_other_systems_read_stream_export_and_compute_the_same(tmp_path: Path, demo: DemoProject) -> None:
    here = made(demo, tmp_path / "here", "", {})
    for system, gone in GONE.items():
        assert made(demo, tmp_path / system, system, gone) == here
