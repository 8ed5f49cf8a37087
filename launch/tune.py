"""Searches the hyper-parameters of a task distillation with Ray Tune, or runs a grid.

A search writes the best config, for task_distill. launch/report.py compares the runs of a grid: methods, tasks, seeds.

usage: python launch/tune.py CONFIG.toml [dotted.key=value …]
       With RAY_ADDRESS set it joins the cluster at that address, otherwise it starts Ray on this machine.

example: python launch/tune.py configs/tune/lad.toml search.num_samples=8
         python launch/tune.py configs/tune/compare.toml
"""

from pathlib import Path

from lad_dist.cli.app import run_script
from lad_dist.cli.console import print_table, say
from lad_dist.config.errors import EXIT_DONE, EXIT_RUN_AGAIN
from lad_dist.config.schema import SearchConfig


def main(config: SearchConfig) -> int:
    from lad_dist.search.tune import search

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
    best = f"best config: {result.best}; python launch/task_distill.py {result.best}"
    say(best if result.best else f"compare them: python launch/report.py {folder} --out {folder}/report")
    return EXIT_DONE


if __name__ == "__main__":
    run_script(__doc__, SearchConfig, main)
