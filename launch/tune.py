"""Searches the hyper-parameters of a task distillation with Ray Tune, and writes the best config for task_distill; or
runs a grid of methods, tasks and seeds for launch/report.py to compare.

usage: python launch/tune.py CONFIG.toml [dotted.key=value …]
       With RAY_ADDRESS set it joins that cluster, otherwise it starts Ray on this machine.

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

    found = search(config)
    if found is None:
        say(f"{config.search.name}: stopped early; run the same command again to go on")
        return EXIT_RUN_AGAIN
    header = list(found.trials[0])
    print_table(config.search.name, header, [[row[key] for key in header] for row in found.trials])
    folder = Path(config.search.dir) / config.search.name
    if found.failed:
        first = found.failed[0]
        count = len(found.trials) + len(found.failed)
        failed = f"{len(found.failed)} of {count} trials failed; {first['trial']}: {first['error']}"
        say(f"{failed}; to run them again remove {folder}/results.json")
    best = f"best config: {found.best}; python launch/task_distill.py {found.best}"
    say(best if found.best else f"compare them: python launch/report.py {folder} --out {folder}/report")
    return EXIT_DONE


if __name__ == "__main__":
    run_script(__doc__, SearchConfig, main)
