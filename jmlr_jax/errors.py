"""The base of every error that is the user's to mend: the command line prints it without a traceback."""


class JmlrError(Exception):
    """A problem with the input, the configuration or the machine; its message says where it is and what mends it."""


def first_line(error: BaseException) -> str:
    """What a library's error says, short enough for a line: without what TensorStore adds for its developers."""
    said = str(error).partition("See full")[0].strip()
    return (said.splitlines() or [type(error).__name__])[0][:200]
