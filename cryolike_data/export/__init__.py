"""Materialising particles into files: CryoLike's own and Zarr."""

from .cryolike import export_cryolike
from .zarr import export_zarr

__all__ = ["export_cryolike", "export_zarr"]
