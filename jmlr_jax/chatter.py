"""Keeps what other libraries say of themselves off the terminal, so that a command prints what is ours.

Their errors are still shown. A variable that the user has set stays as it is.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
from types import ModuleType

VARIABLES = {"TRANSFORMERS_VERBOSITY": "error"}  # it misses PyTorch, which is not needed here
LOGGERS = ("matplotlib",)  # it builds a cache of fonts once
# C++ libraries that log through Abseil take its level from no variable; the name is that of the release they hold.
_SET_MIN_LOG_LEVEL = "_ZN4absl12lts_2025012714SetMinLogLevelENS0_18LogSeverityAtLeastE"
_ERROR = 2  # absl::LogSeverityAtLeast::kError


def hush() -> None:
    """Silences the libraries; to be called before they are imported."""
    from absl import logging as absl  # Orbax, Grain and tensorflow-datasets speak through it

    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    absl.set_verbosity(absl.ERROR)


def hush_abseil(library: ModuleType) -> None:
    """Silences the C++ logs of an extension module up to warnings; a release of another Abseil goes on logging."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(str(library.__file__))[_SET_MIN_LOG_LEVEL](_ERROR)
