"""The base of every error that is the user's to mend: the command line prints it without a traceback."""


class JmlrError(Exception):
    """A problem with the input, the configuration or the machine; its message says where it is and what mends it."""
