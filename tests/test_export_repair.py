"""Finished exports that lost or damaged a file, and writers of an older export that come too late."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import EXPORTS, contents, write_particles

from cryolike_data import IndexedDataset, ParticleDataset
from cryolike_data.errors import ExportError
from cryolike_data.export import plan_export, run, run_unit

REST = {
    "zarr": ["uid/c/0", "uid/zarr.json", "images/zarr.json", "ctf/zarr.json", "ctf/defocus_u/c/0", "source/file/c/0"],
    "cryolike": ["fft/image_descriptor.npz"],
    "mrc": ["particles.cs", "particles.star"],
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> ParticleDataset:
    folder = tmp_path_factory.mktemp("project")
    write_particles(folder, 23, box=16)
    return IndexedDataset(folder / "J1/particles.cs")


@pytest.mark.parametrize("damage", ["lost", "cut short", "changed"])
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in REST.items() for name in names])
def test_a_file_that_belongs_to_no_unit_is_written_again(
    dataset: ParticleDataset, tmp_path: Path, kind: str, name: str, damage: str
) -> None:
    plan = plan_export(dataset, tmp_path / "out", format=kind, **EXPORTS[kind])
    run(plan)
    before = contents(tmp_path / "out")
    path = tmp_path / "out" / name
    content = path.read_bytes()
    if damage == "lost":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if damage == "cut short" else content[:-1] + bytes([content[-1] ^ 1]))
    report = run(plan)
    assert (report.written, report.sealed) == (0, True)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("kind", EXPORTS)
def test_a_writer_of_an_older_export_does_not_touch_the_one_that_replaced_it(dataset: ParticleDataset, tmp_path: Path, kind: str) -> None:
    older = plan_export(dataset, tmp_path / "out", format=kind, **EXPORTS[kind])
    newer = plan_export(dataset.select(slice(None, None, -1)), tmp_path / "out", format=kind, **EXPORTS[kind])
    replaced = []

    def replace(images: int, size: int) -> None:
        if not replaced:
            replaced.append(run(newer, overwrite=True))

    with pytest.raises(ExportError, match="another export"):
        run_unit(older, 0, advance=replace)
    run(plan_export(newer.dataset, tmp_path / "fresh", format=kind, **EXPORTS[kind]))
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
