"""The command latency."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from lad_dist.cli.command import ArgumentParser, add_form_options, requested_forms
from lad_dist.cli.console import loading_libraries, print_table, say
from lad_dist.config.errors import EXIT_DONE, UserError


def latency(arguments: Sequence[str]) -> int:
    """Measure size, quality and latency of a run's student against its teacher, form by form, in the same process.

    Quantize first, then distil: int8 makes the teacher faster too, and the table tells what the student adds to that.
    The forms run on this CPU, PyTorch's also on a GPU if there is one. The figures go into the run's results.json and
    model card.

    usage: lad-dist latency FOLDER [--onnx] [--fp16] [--int8] [--batch N,…] [--length N,…] [--rounds N] [--teacher PATH]

    FOLDER          a complete run: runs/NAME
    --onnx          also measures both in onnxruntime; the student's file is export/onnx/model.onnx
    --fp16          the same in fp16: model.fp16.onnx, a form for GPUs
    --int8          the same in int8: model.int8.onnx
    --batch N,…     sequences at once; default: 1,32
    --length N,…    tokens of each; default: median and maximum of the dev set, data.max_length of a pre-training
    --rounds N      forwards of each form and shape; default: 5 to 30, as many as fit in ten seconds
    --teacher PATH  where the teacher is now, if it has moved since the run

    OMP_NUM_THREADS sets the number of threads; the default is all cores.

    example: lad-dist latency runs/lad-rte --int8 --batch 1 --length 48
    """
    parser = ArgumentParser("latency")
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    add_form_options(parser)
    parser.add_argument("--batch", metavar="N", dest="batches", type=_numbers(1), default=(1, 32))
    parser.add_argument("--length", metavar="N", dest="lengths", type=_numbers(2))
    parser.add_argument("--rounds", metavar="N", type=int)
    parser.add_argument("--teacher", metavar="PATH")
    options = parser.parse_intermixed_args(arguments)
    if options.rounds is not None and options.rounds < 1:
        raise UserError(f"latency: --rounds {options.rounds}: at least 1")
    with loading_libraries():
        from lad_dist.evaluation.latency import LatencyRequest, measure
        from lad_dist.runs.latency_table import latency_conditions, latency_remarks, latency_tables

    measured = measure(
        LatencyRequest(
            options.folder,
            forms=requested_forms(options),
            batches=options.batches,
            lengths=options.lengths,
            rounds=options.rounds,
            teacher=options.teacher,
        )
    )
    for title, table in zip(("size and quality", "latency"), latency_tables(measured), strict=True):
        print_table(f"{options.folder}: {title}", *table)
    for line in (latency_conditions(measured), *latency_remarks(measured["student"], measured)):
        say(line)
    return EXIT_DONE


def _numbers(least: int) -> Callable[[str], tuple[int, ...]]:
    """Return a parser of whole numbers with commas between them, none smaller than the least."""

    def parse(text: str) -> tuple[int, ...]:
        numbers = text.split(",")
        if not all(number.isdecimal() and int(number) >= least for number in numbers):
            raise argparse.ArgumentTypeError(f"{text!r}: whole numbers from {least} on, with commas between them")
        return tuple(sorted({int(number) for number in numbers}))

    return parse
