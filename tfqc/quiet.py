"""Importing other packages without what they say of each other: versions that do not fit, kernels that are absent."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Generator


@contextlib.contextmanager
def quiet_import() -> Generator[None]:
    """For imports alone: warnings, log lines up to WARNING, and what is printed are not shown.

    The user's filters and loggers are afterwards as they were. An import that fails raises as ever.
    """
    before = logging.root.manager.disable
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        logging.disable(max(before, logging.WARNING))
        try:
            yield
        finally:
            logging.disable(before)
