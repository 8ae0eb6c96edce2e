"""Exceptions that are one line and an exit code, and how such a line is shown."""

RESTART = 75  # exit code: stopped early, and safe to start again (EX_TEMPFAIL of sysexits.h)
LONGEST = 1000  # characters of a line; fields of the user's may be longer


def printable(text: str) -> str:
    """A text as one line for a terminal: what users and models wrote may hold line ends and escape sequences."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(text.splitlines()))


class InputError(ValueError):
    """The user's input is wrong; the message is one line: where, what is wrong, how to mend it.

    The command line prints the message alone and exits with code 2.
    """

    def __init__(self, message: str):
        shown = printable(message)
        super().__init__(shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 300]} ... {shown[-290:]}")


class Stopped(SystemExit):
    """The work was told to stop before its end, and goes on when it is started again; the message is one line.

    As KeyboardInterrupt it is no ``Exception``: what turns errors into lines about files lets it through.
    """

    def __init__(self, message: str):
        super().__init__(message)
        self.code = RESTART
