"""The errors that a person can mend, by kind; everything else is a defect of this project.

The command line prints such an error as one line and ends with the kind's exit code; it never shows
a traceback for one.
"""


class ReptileError(Exception):
    """Base of all: the message names the value, the limit and the way out."""

    exit_code = 1


class InputError(ReptileError, ValueError):
    """Files, settings or arrays that cannot be used."""

    exit_code = 2


class GateError(ReptileError):
    """An evaluation below what the settings demand of it: no bundle is exported."""

    exit_code = 3


class DivergedError(ReptileError, ValueError):
    """Training or adaptation whose numbers are no longer finite."""

    exit_code = 4


class VerificationError(ReptileError):
    """A bundle that does not do what eager PyTorch does."""

    exit_code = 5


class PlatformError(ReptileError):
    """What this machine does not give: a device, a compiler, memory, another process of the run."""

    exit_code = 6


class ClusterError(ReptileError):
    """A cluster that cannot be reached, or refuses what it is asked."""

    exit_code = 7
