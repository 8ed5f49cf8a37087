"""The command report."""

from collections.abc import Sequence

from lad_dist.cli.command import ArgumentParser
from lad_dist.cli.console import loading_libraries, say
from lad_dist.config.errors import EXIT_DONE


def report(arguments: Sequence[str]) -> int:
    """Compare many run folders: methods by tasks, mean ± sd over seeds, best first, the teacher on top.

    All complete runs on tasks below the folders are compared; the table is Markdown, on standard output. Runs of one
    run.label are one method. A grid writes it; without one it is the names of objective and compressions.

    The folder of a search with a [space] is shown as such, also while it runs: trials, best first, and their hours.

    usage: lad-dist report FOLDER [FOLDER …] [--out DIR] [--baseline LABEL]

    --out DIR         also writes report.md, report.csv (a row per run with every metric) and report.png to DIR, and
                      pareto.png, quality against latency and bytes, where `lad-dist latency` has measured runs; of a
                      search trials.csv, history.png, parallel.png (samples by key), importance.png (of each key) and
                      front.png (of several metrics); of several searches each in a folder below DIR
    --baseline LABEL  the method that the others are tested against (default: kd)

    example: lad-dist report runs/compare/teacher-*-low-* --baseline teacher-kd-low
    """
    parser = ArgumentParser("report")
    parser.add_argument("folders", metavar="FOLDER", nargs="+")
    parser.add_argument("--out", metavar="DIR")
    parser.add_argument("--baseline", metavar="LABEL")
    options = parser.parse_intermixed_args(arguments)
    with loading_libraries():
        from lad_dist.report.build import build_report

    say(build_report(options.folders, options.baseline, options.out).rstrip("\n"))
    return EXIT_DONE
