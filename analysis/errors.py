"""The one error that a person, not a programmer, is meant to read."""


class InputError(Exception):
    """What the user gave cannot be used.

    The message is one sentence that says what is wrong and what to do. The command line prints it
    on stderr and exits with code 2; nothing was written.
    """
