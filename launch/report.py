"""Compares many run folders: methods by tasks, mean ± sd over seeds, best first, the teacher on top.

Also whether a method differs from plain distillation, and how often it decides as its teacher does.

usage: python launch/report.py FOLDER [FOLDER …] [--out DIR] [--baseline LABEL]

All complete runs on tasks below the folders are compared; the table is Markdown, on standard output. Runs of one
run.label are one method. A grid writes it; without one it is the objective's name and those of compressions.
--out DIR         also writes report.md, report.csv (a row per run with every metric) and report.png to DIR, and where
                  launch/measure_latency.py has measured runs pareto.png, quality against latency and bytes
--baseline LABEL  the method that the others are tested against (default: kd)

example: python launch/report.py runs/compare/*-teacher-low-* --baseline kd-teacher-low
"""

from lad_dist.cli.app import ArgumentParser, plain_script
from lad_dist.cli.console import say
from lad_dist.config.errors import EXIT_DONE


def main() -> int:
    parser = ArgumentParser("report")
    parser.add_argument("folders", metavar="FOLDER", nargs="+")
    parser.add_argument("--out", metavar="DIR")
    parser.add_argument("--baseline", metavar="LABEL")
    arguments = parser.parse_intermixed_args()
    from lad_dist.report.build import build_report

    say(build_report(arguments.folders, arguments.baseline, arguments.out).rstrip("\n"))
    return EXIT_DONE


if __name__ == "__main__":
    plain_script(__doc__, main)
