"""The command tune."""

from pathlib import Path

from lad_dist.cli.console import TERMINAL_PROGRESS, loading_libraries, print_table, say
from lad_dist.config.errors import EXIT_DONE, EXIT_RUN_AGAIN
from lad_dist.config.schema import SearchConfig


def tune(config: SearchConfig) -> int:
    """Search the hyper-parameters of a task distillation with Ray Tune, or run a grid.

    A search writes the best config, for `lad-dist distill`. `lad-dist report` compares the runs of a grid. With
    RAY_ADDRESS set the search joins the cluster at that address; otherwise it starts Ray on this machine.

    usage: lad-dist tune CONFIG [key=value …]

    example: lad-dist tune configs:tune/lad.toml search.num_samples=8
    """
    with loading_libraries():
        from lad_dist.search.tune import search

    TERMINAL_PROGRESS.without_lines.add(config.search.name)  # where there is no bar, the lines of trials are enough
    result = search(config)
    if result is None:
        say(f"{config.search.name}: stopped early; run the same command again to go on")
        return EXIT_RUN_AGAIN
    header = list(result.trials[0])
    print_table(config.search.name, header, [[row[key] for key in header] for row in result.trials])
    folder = Path(config.search.dir) / config.search.name
    if result.failed:
        first = result.failed[0]
        count = len(result.trials) + len(result.failed)
        line = f"{len(result.failed)} of {count} trials failed; {first['trial']}: {first['error']}"
        say(f"{line}; to run them again remove {folder}/results.json")
    if result.best:
        say(f"best config: {result.best}; lad-dist distill {result.best}")
    else:
        say(f"compare them: lad-dist report {folder} --out {folder}/report")
    return EXIT_DONE
