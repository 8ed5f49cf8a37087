"""Loggers of a run of many processes: the main process alone emits records, unless one is for every rank."""

import logging

from lad_dist.distributed import ranks

EVERY_RANK = {"every_rank": True}  # `extra` of a record that each process emits


def is_emitted(record: logging.LogRecord) -> bool:
    """Return whether this process emits the record: it is the main process, or the record is for every rank."""
    return getattr(record, "every_rank", False) or ranks.is_main()


def get_logger(name: str) -> logging.Logger:
    """Return the logger of a module, silent on all processes but the main one."""
    logger = logging.getLogger(name)
    logger.addFilter(is_emitted)  # once: Python adds no filter twice
    return logger
