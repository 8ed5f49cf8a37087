"""Where the weights that pruning left stand: sparsity by layer and component, overlaps of masks between methods and
tasks beside what chance gives, and whether shuffled masks do as well.

usage: python launch/topology.py FOLDER [FOLDER …] [--out DIR] [--shuffles N] [--base MODEL]

FOLDER is a run of the surgery prune, its export, or a mask.safetensors.
--out DIR       also writes mask_analysis.json and mask_analysis.png to DIR
--shuffles N    evaluates N shuffled masks of each run whose weights did not change (default: 0)
--base MODEL    where the weights under the masks lie now (default: where they lay)

example: python launch/topology.py runs/adapt-mrpc runs/movement-mrpc --out runs/topology --shuffles 3
"""

import argparse
from typing import NoReturn

from lad_dist.cli.app import plain_script
from lad_dist.cli.console import print_table
from lad_dist.config.errors import EXIT_DONE, UserError


class Words(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"topology: {message}; see --help")


def main() -> int:
    words = Words(add_help=False, allow_abbrev=False)
    words.add_argument("folders", metavar="FOLDER", nargs="+")
    words.add_argument("--out", metavar="DIR")
    words.add_argument("--shuffles", metavar="N", type=int, choices=range(1000), default=0)
    words.add_argument("--base", metavar="MODEL")
    given = words.parse_intermixed_args()
    from lad_dist.evaluation.mask_analysis import report

    for title, header, rows in report(given.folders, given.out, given.shuffles, given.base):
        print_table(title, header, rows)
    return EXIT_DONE


if __name__ == "__main__":
    plain_script(__doc__, main)
