"""InputError: the error for everything that the user can correct."""


class InputError(Exception):
    """An argument, a file or a configuration is wrong.

    The message is one line: what is wrong (a path, a URL, a key), why, and what to do. It contains
    no credentials. The command line prints it and ends with exit code 2.
    """
