"""``stream_likelihood``: a whole data set against templates, straight from its stacks, with results that are on disk as they come."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch

from ..arguments import integer
from ..ctf import CtfTerm, require_optics
from ..dataset import ParticleDataset
from ..errors import ArgumentError, ExportError
from ..fingerprint import fingerprint, fingerprint_of_files
from ..on_disk import expanded
from ..polar_batch import PolarBatch, PolarCollate
from ..progress import Progress
from ..sampler import ParticleSampler, place_among_ranks
from ..stream import ParticleStream
from ..transforms import Downsample
from ..transforms.downsample import moved_centre_A, resized
from ..transforms.polar_grid import require_within_nyquist
from .integrated import begin_comparison
from .records import Results
from .result import ImageLikelihood
from .templates import Templates, as_displacements, require_fit

log = logging.getLogger(__name__)

#: Batches that are read ahead.
_PREFETCH = 3


def stream_likelihood(
    dataset: ParticleDataset,
    templates: Templates,
    displacements_A: Any,
    *,
    output: str | os.PathLike[str] | None = None,
    batch_size: int = 256,
    downsample: Downsample | None = None,
    normalize: Literal["max", "std"] = "max",
    unit_power: bool = True,
    ctf_terms: tuple[CtfTerm, ...] = (),
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    by_template: bool = False,
    memory_bytes: int | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
) -> np.ndarray:
    """Log-likelihood and most likely pose of every particle of a data set, see ``integrated_log_likelihood``.

    Each batch is read, transformed and compared while the next ones are read; no image is written. With ``output``, the results of
    a batch are written before the next one's, and the same call continues a run that was stopped. A batch holds the same rows
    whatever the number of ranks, and in whichever run it is done, so that the results are the same too.

    Parameters
    ----------
    dataset : the particles
    templates : on the grid of the transforms; their box is that of the images, in angstrom
    displacements_A : (n, 2) displacements (x, y) that are tried, angstrom
    output : folder for ``likelihood.npy`` (a record for each particle, in the order of the data set), ``likelihood.json`` (what it was
        made from) and, with ``by_template``, ``by_template.npy``. Ranks on several machines need a file system that they share.
    batch_size : particles that are compared at a time
    downsample, normalize, unit_power, ctf_terms : what is done to images and CTF, see ``PolarCollate``. By default images are scaled
        as CryoLike does; the scale adds a constant to the log-likelihood of each image. ``normalize`` is one that gives images mean 0.
    device : where the work is done; by default that of the templates
    dtype : float32 or float64
    by_template : also write the (N, S) float64 matrix of log-likelihoods given each template
    memory_bytes : see ``integrated_log_likelihood``; neither it nor ``device`` is part of what a run can be continued with
    rank, world_size : this process among those that share the work; by default as ``torch.distributed`` says
    overwrite : begin anew where other results are in ``output``; not with several ranks
    progress : show a progress bar; by default on a terminal only, elsewhere a line is logged every so often

    Returns
    -------
    (N,) records with the fields ``row``, ``uid``, those of ``ImageLikelihood``, and ``done``, which is 1 where a particle has been
        compared: other ranks may still be at work. ``shift_A`` is for the images as they are stored, also where
        ``downsample`` pools. With ``output`` it is a read-only map of the file.

    Raises
    ------
    ExportExistsError
        if other results are in ``output``; says what differs
    ExportError
        if a result cannot be written, or the images changed while results that are kept were made of them
    ArgumentError, TableError
        if images and templates do not fit each other, the table has no optics, or there is no such device
    """
    if not isinstance(dataset, ParticleDataset) or not isinstance(templates, Templates):
        raise ArgumentError(
            "The likelihood takes a data set, such as IndexedDataset(...), and Templates, such as Templates.from_volume(...), "
            f"and not a {type(dataset).__name__} and a {type(templates).__name__}."
        )
    batch_size = integer("batch_size", batch_size, least=1)
    if dtype not in (torch.float32, torch.float64):
        raise ArgumentError(f"dtype is torch.float32 or torch.float64, not {dtype}")
    if normalize not in ("max", "std"):
        raise ArgumentError(f'normalize is "max" or "std", not {normalize!r}: images of another mean than 0 would have a wrong likelihood')
    if by_template and output is None:
        raise ArgumentError("by_template needs output=: the matrix of all particles by all templates is written there")
    rank, world_size = place_among_ranks(rank, world_size)
    chosen = templates.to(device, dtype.to_complex())
    if world_size > 1 and overwrite:
        raise ArgumentError(
            "overwrite is for a process that is alone, because ranks could remove each other's results; remove the folder first"
        )
    if len(dataset) == 0:
        raise ArgumentError("There are no particles: the selection is empty.")
    tried = as_displacements(displacements_A, templates.box_A)
    collate = PolarCollate(
        chosen.grid,
        downsample=downsample,
        normalize=normalize,
        dtype=dtype,
        unit_power=unit_power,
        ctf_terms=ctf_terms,
        device=chosen.device,
    )
    # What does not fit is found out before anything is written.
    box, pixel_size = resized(downsample, dataset.box, dataset.pixel_size)
    require_fit(chosen.grid, box, pixel_size, chosen, memory_bytes)
    require_within_nyquist(chosen.grid, box)
    require_optics(dataset.describe([0]).ctf, collate.ctf_terms)
    folder = None if output is None else expanded(output).resolve()
    offset_A = moved_centre_A(downsample, dataset.box, dataset.pixel_size)
    settings = {
        "batch_size": batch_size,
        "downsample": repr(downsample),
        "normalize": normalize,
        "unit_power": unit_power,
        "ctf_terms": list(collate.ctf_terms),
        "dtype": str(dtype).removeprefix("torch."),
        "by_template": by_template,
    } | ({"shift_offset_A": offset_A} if offset_A else {})
    about = {} if folder is None else _about(dataset, chosen, tried) | {"settings": settings}
    unknown = 0
    with closing(Results(folder, len(dataset), len(templates) if by_template else 0, about, overwrite=overwrite)) as results:
        mine = [range(start, min(start + batch_size, len(dataset))) for start in range(0, len(dataset), batch_size)][rank::world_size]
        left = [rows for rows in mine if not results.has(rows)]
        if left:
            results.begin_writing()
        name = "likelihood" if folder is None else folder.name
        with Progress(name, sum(map(len, mine)), show=progress) as bar:
            bar.skip(sum(map(len, mine)) - sum(map(len, left)))
            bar.start()
            for rows, found in _compared(dataset, left, batch_size, collate, chosen, tried, by_template, memory_bytes):
                unknown += int(found.log_likelihood.isnan().sum())
                row, uid = (column[rows.start : rows.stop] for column in (dataset.particles.row, dataset.particles.uid))
                results.write(rows, row, uid, replace(found, shift_A=found.shift_A - offset_A))
                bar.advance(len(rows))
        if left and about and fingerprint_of_files(dataset) != about["inputs"]["stacks"]:
            raise ExportError(f"The input stacks have changed while {folder} was made of them; begin anew with overwrite=True.")
        if unknown:
            log.warning(
                "%d of %d images are constant or not finite; their results are NaN. So are those of optics that give no finite CTF, "
                "as an amplitude contrast over 1 does.",
                unknown,
                sum(map(len, left)),
            )
        return results.records()


def _compared(
    dataset: ParticleDataset,
    batches: Sequence[range],
    batch_size: int,
    collate: PolarCollate,
    templates: Templates,
    displacements_A: torch.Tensor,
    by_template: bool,
    memory_bytes: int | None,
) -> Iterator[tuple[range, ImageLikelihood]]:
    """The rows of each batch and what is found about them; all batches are of one size, but for the last one of the data set."""
    rows = np.concatenate([np.asarray(each) for each in batches]) if batches else np.empty(0, np.int64)
    part = dataset if len(rows) == len(dataset) else dataset.select(rows)
    sampler = ParticleSampler(part, batch_size, shuffle=False, rank=0, world_size=1)
    with ParticleStream(part, sampler, collate, templates.device, _PREFETCH) as stream:
        begun: deque[tuple[range, Callable[[], ImageLikelihood]]] = deque()

        def finished() -> tuple[range, ImageLikelihood]:
            each, finish = begun.popleft()
            return each, finish()

        for each, batch in zip(batches, stream, strict=True):
            assert isinstance(batch, PolarBatch)
            begun.append((each, begin_comparison(batch, templates, displacements_A, by_template=by_template, memory_bytes=memory_bytes)))
            # A GPU is given the next batch before the results of this one are waited for.
            if len(begun) > batch.images.is_cuda:
                yield finished()
        while begun:
            yield finished()


def _about(dataset: ParticleDataset, templates: Templates, displacements_A: torch.Tensor) -> dict[str, Any]:
    """What results are made from but for settings, as plain values."""
    return {
        "particles": len(dataset),
        "inputs": fingerprint(dataset),
        "templates": templates.about(),
        "displacements_A": displacements_A.tolist(),
    }
