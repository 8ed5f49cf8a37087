"""The command latency."""

from collections.abc import Sequence
from pathlib import Path

from lad_dist.cli.command import ArgumentParser
from lad_dist.cli.console import loading_libraries, print_table, say
from lad_dist.config.errors import EXIT_DONE, UserError


def latency(arguments: Sequence[str]) -> int:
    """Measure size and latency of a run's student against its teacher, in the same process.

    One sequence and 32, of 128 and of 512 tokens, on this CPU, and on a GPU if there is one. The figures go into the
    run's results.json and model card.

    usage: lad-dist latency FOLDER [--onnx] [--int8] [--rounds N] [--teacher PATH]

    FOLDER          a complete run: runs/NAME
    --onnx          also exports it to export/onnx/model.onnx, compares both, and measures it in onnxruntime
    --int8          also quantizes that to export/onnx/model.int8.onnx, and reports how often it decides as the student
    --rounds N      forwards of each form and shape; default: 5 to 30, as many as fit in ten seconds
    --teacher PATH  where the teacher is now, if it has moved since the run

    OMP_NUM_THREADS sets the number of threads; the default is all cores.

    example: lad-dist latency runs/lad-rte --int8
    """
    parser = ArgumentParser("latency")
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    parser.add_argument("--onnx", action="store_true")
    parser.add_argument("--int8", action="store_true")
    parser.add_argument("--rounds", metavar="N", type=int)
    parser.add_argument("--teacher", metavar="PATH")
    options = parser.parse_intermixed_args(arguments)
    if options.rounds is not None and options.rounds < 1:
        raise UserError(f"latency: --rounds {options.rounds}: at least 1")
    with loading_libraries():
        from lad_dist.evaluation.latency import LatencyRequest, measure
        from lad_dist.runs.model_card import latency_conditions, latency_remarks, latency_table

    measured = measure(LatencyRequest(**vars(options)))
    print_table(str(options.folder), *latency_table(measured))
    for line in (latency_conditions(measured), *latency_remarks(measured["student"], measured)):
        say(line)
    return EXIT_DONE
