"""What lorank logs. pytest's ``caplog`` hears nothing after the command line has run in the same process."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def warnings_of_lorank() -> Iterator[list[str]]:
    """The warnings that lorank logs inside the context, one text each."""
    heard: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]  # a sink
    logging.getLogger("lorank").addHandler(handler)
    try:
        yield heard
    finally:
        logging.getLogger("lorank").removeHandler(handler)
