"""Loggers of a run of many processes: the main process alone emits records, unless one is for every rank.

Usage, from the main process and from each process:

    logger = get_logger(__name__)
    logger.warning("%s: the row of step %d is lost", file, step)
    logger.warning("rank %d: no free port", rank, extra=EVERY_RANK)
"""

import logging

from lad_dist.distributed import ranks

EVERY_RANK = {"every_rank": True}  # `extra` of a record that each process emits


class RankFilter(logging.Filter):
    """Passes the records of the main process, and those that are for every rank."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether this process emits the record."""
        return getattr(record, "every_rank", False) or ranks.is_main()


def get_logger(name: str) -> logging.Logger:
    """Return the logger of a module, silent on all processes but the main one."""
    logger = logging.getLogger(name)
    if not any(isinstance(existing, RankFilter) for existing in logger.filters):
        logger.addFilter(RankFilter())
    return logger
