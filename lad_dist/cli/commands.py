"""Commands of the launch scripts: functions from a config to an exit code."""

from collections.abc import Mapping
from typing import Any

from lad_dist.cli.console import Console, print_table, say
from lad_dist.config.errors import EXIT_DONE, EXIT_RUN_AGAIN
from lad_dist.config.schema import EvaluateConfig, TrainConfig
from lad_dist.evaluation.evaluate import evaluate
from lad_dist.runs.model_card import totals
from lad_dist.training.train import train


def train_command(config: TrainConfig) -> int:
    """Train with progress on the terminal, and print where everything is."""
    console = Console(config.run.name)
    try:
        result = train(config, report=console)
    finally:
        console.close()
    if result.results is None:
        say(f"{result.folder}: stopped early and saved; run the same command again to go on")
        return EXIT_RUN_AGAIN
    print_table(config.run.name, ("", "student", "teacher"), _rows(result.results))
    say(f"model in {result.folder / 'export'}, curves: tensorboard --logdir {result.folder}")
    return EXIT_DONE


def _rows(results: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    student = {**totals(results["student"]), **results["metrics"]}
    return [(name, value, results["teacher"].get(name, "")) for name, value in student.items()]


def evaluate_command(config: EvaluateConfig) -> int:
    """Evaluate a model folder and print a table."""
    scores = evaluate(config)
    teacher = scores.get("teacher", {})
    print_table(
        config.model.path, ("", "model", "teacher"), [(k, v, teacher.get(k, "")) for k, v in scores["model"].items()]
    )
    return EXIT_DONE
