"""How CryoSPARC writes tables, paths and job folders."""

from .indexed import IndexedDataset
from .job_directory import JobDirectoryDataset
from .table import Table, read_table

__all__ = ["IndexedDataset", "JobDirectoryDataset", "Table", "read_table"]
