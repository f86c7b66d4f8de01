"""Other libraries at work: their warnings and bars are kept off the terminal for as long as that takes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

_LOGGERS = ("bitsandbytes",)  # which PEFT imports: it logs the kernels that it does not find


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps the libraries' warnings and bars off the terminal; what matters is in the report."""
    import warnings

    from transformers.utils import logging as transformers

    level, bars = transformers.get_verbosity(), transformers.is_progress_bar_enabled()
    transformers.set_verbosity_error()
    transformers.disable_progress_bar()
    loggers = [logger for name in _LOGGERS if _is_usual(logger := logging.getLogger(name))]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, before in zip(loggers, levels, strict=True):
            logger.setLevel(before)
        transformers.set_verbosity(level)
        if bars:
            transformers.enable_progress_bar()


def _is_usual(logger: logging.Logger) -> bool:
    """Whether nobody has asked it for more than warnings, or for less."""
    return logger.getEffectiveLevel() == logging.WARNING
