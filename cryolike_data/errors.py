"""The error family: every error raised on purpose is a ``CryolikeDataError`` and also the built-in it resembles."""


class CryolikeDataError(Exception):
    """Base of every error that cryolike_data raises on purpose."""


class ArgumentError(CryolikeDataError, ValueError):
    """An argument, or a combination of arguments, that cannot work."""


class TableError(CryolikeDataError, ValueError):
    """A CryoSPARC table that cannot be read, or lacks what is asked of it."""


class PairingError(TableError):
    """Rows and images, or rows of two tables, that cannot be matched."""


class StackError(CryolikeDataError, ValueError):
    """An image stack whose header or size cannot be used."""


class MissingStackError(CryolikeDataError, FileNotFoundError):
    """Tables, folders or image stacks that are not where they should be; lists them all."""


class MixedParticlesError(CryolikeDataError, ValueError):
    """Particles that differ in something that has to be the same for all."""


class RowIndexError(CryolikeDataError, IndexError):
    """A row outside the data set."""


class IterationError(CryolikeDataError, RuntimeError):
    """An iteration that cannot go on."""


class ExportError(CryolikeDataError, ValueError):
    """An export that cannot be written as asked."""


class ExportExistsError(CryolikeDataError, FileExistsError):
    """An export would run into results that are already there."""


class MissingDependencyError(CryolikeDataError, ImportError):
    """An optional package is needed for this and is not installed."""
