"""What a run's student weighs and how fast it is, measured against its teacher in the same process: one sequence and
32, of 128 and of 512 tokens, on this CPU, and on a GPU if there is one. The figures go into the run's results.json and
model card.

usage: python launch/ledger.py FOLDER [--onnx] [--int8] [--rounds N] [--teacher PATH]

FOLDER          a complete run: runs/NAME
--onnx          also exports it to export/onnx/model.onnx, holds it against the model, and measures it in onnxruntime
--int8          also quantizes that to export/onnx/model.int8.onnx, and says how far it decides as the student does
--rounds N      forwards of each form and shape; default: 5 to 30, as many as fit in ten seconds
--teacher PATH  where the teacher lies, if it is no longer where the run found it

Threads are those that OMP_NUM_THREADS says, or all cores.

example: python launch/ledger.py runs/lad-rte --int8
"""

import argparse
from pathlib import Path
from typing import NoReturn

from lad_dist.cli.app import plain_script
from lad_dist.cli.console import print_table, say
from lad_dist.config.errors import EXIT_DONE, UserError


class Words(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"ledger: {message}; see --help")


def main() -> int:
    words = Words(add_help=False, allow_abbrev=False)
    words.add_argument("folder", metavar="FOLDER", type=Path)
    words.add_argument("--onnx", action="store_true")
    words.add_argument("--int8", action="store_true")
    words.add_argument("--rounds", metavar="N", type=int)
    words.add_argument("--teacher", metavar="PATH")
    given = words.parse_intermixed_args()
    if given.rounds is not None and given.rounds < 1:
        raise UserError(f"ledger: --rounds {given.rounds}: at least 1")
    from lad_dist.evaluation.latency import LatencyRequest, measure
    from lad_dist.runs.model_card import conditions, latency_remarks, latency_table

    ledger = measure(LatencyRequest(**vars(given)))
    print_table(str(given.folder), *latency_table(ledger))
    for line in (conditions(ledger), *latency_remarks(ledger["student"], ledger)):
        say(line)
    return EXIT_DONE


if __name__ == "__main__":
    plain_script(__doc__, main)
