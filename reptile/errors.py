"""The errors that a person can mend; everything else is a defect of this project."""


class InputError(ValueError):
    """Bad input: the message names the value, the limit and the way out.

    Raised for files, settings and arrays that cannot be used. The command line prints it as one
    line and exits with code 2; it never shows a traceback for it.
    """


class DivergedError(InputError):
    """Adaptation whose numbers are no longer finite: a smaller learning rate or fewer steps."""
