"""The one exception for input that a user can mend."""


class InputError(ValueError):
    """The user's input is wrong; the message is one line: where, what is wrong, how to mend it.

    The command line prints the message alone and exits with code 2.
    """
