"""The errors that a user can fix; any other exception is a defect of this project.

The command line prints such an error as one line, without a traceback, and exits with the class's
code.
"""


class ReptileError(Exception):
    """Base of all: the message names the value, the limit and the way out."""

    exit_code = 1


class InputError(ReptileError, ValueError):
    """Files, settings or arrays that cannot be used."""

    exit_code = 2


class GateError(ReptileError):
    """An evaluation below the gate in the settings: no bundle is exported."""

    exit_code = 3


class DivergedError(ReptileError, ValueError):
    """Training or adaptation whose numbers are no longer finite."""

    exit_code = 4


class VerificationError(ReptileError):
    """A bundle whose results differ from eager PyTorch's."""

    exit_code = 5


class PlatformError(ReptileError):
    """What this machine lacks: a device, a compiler, memory, another process of the run."""

    exit_code = 6


class StoppedError(ReptileError):
    """Training that was asked to stop by a signal; what was done so far is in its checkpoint."""

    exit_code = 143
    """128 + SIGTERM. After SIGINT an instance has 130."""


class ClusterError(ReptileError):
    """A cluster that cannot be reached, or refuses a request."""

    exit_code = 7
