"""How CryoSPARC writes tables, paths and job folders."""

from .indexed import IndexedDataset
from .job_directory import JobDirectoryDataset
from .join import load_table as read_table
from .table import Table

__all__ = ["IndexedDataset", "JobDirectoryDataset", "Table", "read_table"]
