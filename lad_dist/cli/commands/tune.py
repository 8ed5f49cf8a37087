"""The command tune."""

from typing import Any

from lad_dist.cli.console import TERMINAL_PROGRESS, loading_libraries, print_table, say
from lad_dist.config.errors import EXIT_DONE, EXIT_RUN_AGAIN
from lad_dist.config.search_schema import SearchConfig
from lad_dist.utils.text import plain_number


def tune(config: SearchConfig) -> int:
    """Search the hyper-parameters of pre-training and distillation with Ray Tune, or run a grid.

    A search writes the best config. `lad-dist report` compares the runs of a grid, and shows a search. With
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
    _print(config, result)
    return EXIT_DONE


def _print(config: SearchConfig, result: Any) -> None:
    folder = config.search.folder
    keys = list(dict.fromkeys(key for row in result.trials for key in row["sample"]))
    names = result.metrics if config.space else ["score"]
    header = ["trial", *keys, *([] if config.space else ["metric"]), *names, "step", "minutes"]
    print_table(config.search.name, header, [_cells(row, keys, result, config) for row in result.trials])
    failed = [row for row in result.failed if row["status"] == "failed"]
    refused = len(result.failed) - len(failed)
    if refused:
        say(f"{refused} samples are above [limit] and were not trained")
    if failed:
        count = len(result.trials) + len(failed)
        line = f"{len(failed)} of {count} trials failed; {failed[0]['trial']}: {failed[0]['error']}"
        say(f"{line}; to run them again remove {folder}/results.json")
    say(f"pictures and hours: lad-dist report {folder} --out {folder}/report")
    if result.front:
        say(f"no other trial is better by all metrics: {', '.join(f'{folder}/{name}/export' for name in result.front)}")
    elif result.best is not None:
        say(f"best config: {folder / 'best.toml'}; lad-dist distill {folder / 'best.toml'}")
        say(f"best student: {folder / result.best / 'export'}")


def _cells(row: dict[str, Any], keys: list[str], result: Any, config: SearchConfig) -> list[str]:
    sample = [_text(row["sample"].get(key, "")) for key in keys]
    if not config.space:
        scores = [row["metric"], plain_number(row["score"])]
    elif row["error"] is not None:
        scores = [f"{plain_number(row['score'])} ± {plain_number(row['error'], 2)} (n = {row['n']})"]
    else:
        scores = [_text(row["values"].get(name, "")) for name in result.metrics]
    return [row["trial"], *sample, *scores, str(row["step"]), f"{row['seconds'] / 60:.1f}"]


def _text(value: Any) -> str:
    return plain_number(value) if isinstance(value, float) else str(value)
