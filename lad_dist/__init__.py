"""Distillation and compression of BERT-like encoders, on one machine or on a cluster.

A package imports only the packages on lines below it; packages on one line do not import each other.

cli | api                                          commands; the same as functions
search | benchmarks                                hyper-parameter searches and grids; throughput
training                                           one training: resolve a config, build the run, train, export
evaluation | report                                how good, small and fast a model is; many runs as one comparison
runs                                               run folders, model cards, plots
compression | objectives | data | checkpointing    smaller models; losses; batches from text; resuming
models | distributed | cluster                     Hugging Face encoders; ranks, watchdog, replica check; Ray connection
config                                             schema, loading and checks of configs; errors and exit codes
core | utils                                       batches, model outputs, step state; files, random numbers, texts

Five files to read first:

config/schema.py        every key of a config
core/batch.py           a flat batch: sequences end to end, without padding
objectives/base.py      what an objective computes from the outputs of student and teacher
training/distiller.py   the module that DeepSpeed trains: a student with its objective
training/trainer.py     the loop

The Python API is imported on first use, so that what needs a part of the package does not load all of it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lad_dist.api import distill, evaluate, load_config, predict, train

__all__ = ["distill", "evaluate", "load_config", "predict", "train"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lad_dist import api  # noqa: PLC0415

    return getattr(api, name)
