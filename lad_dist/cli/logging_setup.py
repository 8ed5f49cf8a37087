"""Logging of a command: what the package has to say goes to standard error, a bare line each."""

import logging
import sys


class StderrHandler(logging.Handler):
    """Writes the bare messages of records to standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record to what is sys.stderr now: tests and notebooks replace it."""
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


def configure_logging() -> None:
    """Let the loggers of this package write to standard error, from level INFO on; a second call changes nothing."""
    logger = logging.getLogger("lad_dist")
    logger.setLevel(logging.INFO)
    logger.propagate = False  # a library that configures the root logger must not print each line again
    if not any(isinstance(handler, StderrHandler) for handler in logger.handlers):
        logger.addHandler(StderrHandler())
