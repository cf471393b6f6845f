"""``IndexedDataset``: one table whose rows name a file (``blob/path``) and an image in it (``blob/idx``)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from ..dataset import ParticleDataset
from ..errors import ArgumentError
from ..mrc import Mode0
from ..particles import Selection
from ..stacks import images_needed, open_stacks
from .assemble import assemble
from .columns import image_numbers, require_images, require_known_columns, says_where
from .join import Unmatched, load_table
from .paths import decode, resolve_paths

_HINTS = {
    0: ". If blob/idx of this table counts from 1, pass index_base=1",
    1: ". CryoSPARC itself counts blob/idx from 0: leave index_base=1 out if this table does",
}


class IndexedDataset(ParticleDataset):
    """The particles of a CryoSPARC table that says where each image lies. Row i of the table is item i.

    Parameters
    ----------
    file_cs : a ``.cs`` table or a ``.csg`` group
    folder : where the stacks lie, directly in it, found by file name; without it ``blob/path`` is taken as written
        (absolute or from the working directory), then from the folder of the table and the folders above it, by links and without
    index_base : 0 as CryoSPARC counts images; 1 if this table counts them from 1
    passthrough : further table(s) with column groups that ``file_cs`` lacks, joined by uid
    pixel_size : angstrom; default ``blob/psize_A``, then the MRC header where it is plausible
    unmatched : "error", or "drop" to leave out rows without a partner when tables are joined
    select : which rows to take: a mask, row numbers, a slice, or a function of the particles
    mode0 : how to read 8-bit pixels, see ``cryolike_data.mrc.read_header``
    check_headers : read the header of every stack now. False reads the first one only and expects the others to be laid out
        alike, which is checked when each is first read: for many thousands of stacks on a slow file system. The pixel size
        then comes from the table or ``pixel_size``.

    Raises
    ------
    MissingStackError
        listing every stack that is not there
    TableError, PairingError, StackError, MixedParticlesError
        if tables, stacks or their contents do not fit; says where and what to do
    """

    def __init__(
        self,
        file_cs: str | os.PathLike[str],
        *,
        folder: str | os.PathLike[str] | None = None,
        index_base: Literal[0, 1] = 0,
        passthrough: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
        pixel_size: Any = None,
        unmatched: Unmatched = "error",
        select: Selection = None,
        mode0: Mode0 = "auto",
        check_headers: bool = True,
    ) -> None:
        if index_base not in (0, 1):
            raise ArgumentError(f"index_base is 0 or 1, not {index_base!r}")
        table = load_table(file_cs, passthrough=passthrough, unmatched=unmatched)
        require_images(table)
        require_known_columns(table)
        blob, values, file = table.load_numbered(says_where, "blob/path", few=("blob/shape", "blob/psize_A", "blob/sign"))
        names = decode(values)
        paths = resolve_paths(names, lambda: np.bincount(file).tolist(), table=table.origin("blob/path"), folder=folder or None)
        image = image_numbers(blob, base=index_base)
        needed = images_needed(file, image, len(paths))
        hint = _HINTS[index_base]
        pool = open_stacks(paths, mode0=mode0, needed=needed, check_headers=check_headers, index_hint=hint)
        particles = assemble(table, blob, pool, file, image, needed, blob_paths=names, pixel_size=pixel_size, index_hint=hint)
        super().__init__(particles, pool, select=select)
        self.tables = table.files
