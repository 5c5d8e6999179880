"""The errors a user of training can cause. Anything else that is raised is our own fault."""


class TrainError(RuntimeError):
    """A problem the user can mend; the command line prints it as one line and exits with `exit_code`."""

    exit_code: int = 2


class DataError(TrainError):
    """A problem in a data file, a store, or a split. The message names the place and the remedy."""


class ImportStopped(DataError):
    """An import was asked to stop; what is committed stays, and the same command continues it."""

    exit_code = 130
