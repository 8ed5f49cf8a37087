"""The command masks."""

from collections.abc import Sequence

from lad_dist.cli.command import ArgumentParser
from lad_dist.cli.console import loading_libraries, print_table
from lad_dist.config.errors import EXIT_DONE


def masks(arguments: Sequence[str]) -> int:
    """Show where pruning left weights, in the masks of one or more runs.

    Sparsity by layer and component, overlaps of masks between methods and tasks beside what chance gives, and whether
    shuffled masks do as well.

    usage: lad-dist masks FOLDER [FOLDER …] [--out DIR] [--shuffles N] [--base MODEL]

    FOLDER is a run with the compression prune, its export, or a mask.safetensors.
    --out DIR       also writes mask_analysis.json and mask_analysis.png to DIR
    --shuffles N    evaluates N shuffled masks of each run whose weights did not change (default: 0)
    --base MODEL    where the weights under the masks are now, if they have moved since the run

    example: lad-dist masks runs/adapt-mrpc runs/movement-mrpc --out runs/masks --shuffles 3
    """
    parser = ArgumentParser("masks")
    parser.add_argument("folders", metavar="FOLDER", nargs="+")
    parser.add_argument("--out", metavar="DIR")
    parser.add_argument("--shuffles", metavar="N", type=int, choices=range(1000), default=0)
    parser.add_argument("--base", metavar="MODEL")
    options = parser.parse_intermixed_args(arguments)
    with loading_libraries():
        from lad_dist.evaluation import mask_analysis

    for title, header, rows in mask_analysis.report(options.folders, options.out, options.shuffles, options.base):
        print_table(title, header, rows)
    return EXIT_DONE
