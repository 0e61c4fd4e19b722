"""The one error that a user can mend."""


class InputError(Exception):
    """Something that the user gave is wrong.

    The message is one line: it names the thing (a path, a URL, a key) and says what to do about it.
    Credentials never stand in it. The command line prints it and ends with exit code 2.
    """
