"""Keeps what other libraries say of themselves off the terminal, so that a command prints what is ours.

Their errors are still shown. A variable that the user has set stays as it is.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import sys
from types import ModuleType

VARIABLES = {"TRANSFORMERS_VERBOSITY": "error"}  # it misses PyTorch, which is not needed here
LOGGERS = ("matplotlib",)  # it builds a cache of fonts once
# C++ libraries that log through Abseil take its level from no variable; the name is that of the release they hold.
_SET_MIN_LOG_LEVEL = "_ZN4absl12lts_2025012714SetMinLogLevelENS0_18LogSeverityAtLeastE"
_ERROR = 2  # absl::LogSeverityAtLeast::kError
_LATE = "Event loop is closed"


def hush() -> None:
    """Silences the libraries; to be called before they are imported."""
    from absl import logging as absl  # Orbax, Grain and tensorflow-datasets speak through it

    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    absl.set_verbosity(absl.ERROR)
    logging.getLogger("absl").addFilter(_not_of_orbax)
    sys.unraisablehook = _unraisable


def hush_abseil(library: ModuleType) -> None:
    """Silences the C++ logs of an extension module up to warnings; a release of another Abseil goes on logging."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(str(library.__file__))[_SET_MIN_LOG_LEVEL](_ERROR)


def _not_of_orbax(record: logging.LogRecord) -> bool:
    """Whether a record is no traceback of Orbax: what it fails with, in threads too, it raises here as well."""
    return not (record.exc_info and "/orbax/" in record.pathname)


def _unraisable(told: sys.UnraisableHookArgs) -> None:
    """Shows an error that nobody can catch, but for one.

    A checkpoint that cannot be read or written, which we tell in a line, leaves work on its other arrays under way;
    threads of TensorStore tell, when it ends, that Orbax's loop is gone.
    """
    if str(told.exc_value) != _LATE:
        sys.__unraisablehook__(told)
