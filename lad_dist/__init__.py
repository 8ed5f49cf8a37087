"""Distillation and compression of BERT-like encoders, on one machine or on a cluster.

A package imports only the packages on lines below it; packages on one line do not import each other.

cli                                                commands: parse, run, exit code, console
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
"""
