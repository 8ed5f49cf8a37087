"""Many run folders as one comparison: methods by tasks, mean ± sd over seeds, best first, the teacher on top;
whether a method differs from plain distillation, and how far it decides as its teacher does.

usage: python launch/report.py FOLDER [FOLDER …] [--out DIR] [--baseline NAME]

All complete runs on tasks below the folders are compared; the table is Markdown, on standard output.
--out DIR        also writes report.md, report.csv (a row per run with every metric) and report.png to DIR, and where
                 launch/ledger.py has measured runs pareto.png, quality against latency and bytes
--baseline NAME  the method that the others are tested against (default: kd): a row of the table; or an objective, or a
                 word of the runs' names as a search writes them (kd of kd-low-mrpc-0), and then for each the one
                 that has the same settings or else the rest of its name

example: python launch/report.py runs/compare --out runs/compare/report
"""

import argparse
from typing import NoReturn

from lad_dist.cli.app import plain_script
from lad_dist.cli.console import say
from lad_dist.config.errors import EXIT_DONE, UserError


class Words(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"report: {message}; see --help")


def main() -> int:
    words = Words(add_help=False, allow_abbrev=False)
    words.add_argument("folders", metavar="FOLDER", nargs="+")
    words.add_argument("--out", metavar="DIR")
    words.add_argument("--baseline", metavar="NAME")
    given = words.parse_intermixed_args()
    from lad_dist.report import report

    say(report(given.folders, given.baseline, given.out).rstrip("\n"))
    return EXIT_DONE


if __name__ == "__main__":
    plain_script(__doc__, main)
