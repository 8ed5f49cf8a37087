"""What the launch scripts run, each a function from a config to an exit code."""

from collections.abc import Mapping
from typing import Any

from lad_dist.cli.console import Console, print_table, say
from lad_dist.config.errors import EXIT_DONE, EXIT_RUN_AGAIN
from lad_dist.config.schema import EvaluateConfig, TrainConfig
from lad_dist.evaluation.evaluate import evaluate
from lad_dist.runs.model_card import totals
from lad_dist.training.train import train


def train_command(config: TrainConfig) -> int:
    """Trains with progress on the terminal and prints where everything is."""
    console = Console(config.run.name)
    try:
        outcome = train(config, report=console)
    finally:
        console.close()
    if outcome.results is None:
        say(f"{outcome.folder}: stopped early and saved; run the same command again to go on")
        return EXIT_RUN_AGAIN
    print_table(config.run.name, ("", "student", "teacher"), _rows(outcome.results))
    say(f"model in {outcome.folder / 'export'}, curves: tensorboard --logdir {outcome.folder}")
    return EXIT_DONE


def _rows(results: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    student = {**totals(results["student"]), **results["metrics"]}
    return [(name, value, results["teacher"].get(name, "")) for name, value in student.items()]


def evaluate_command(config: EvaluateConfig) -> int:
    """Evaluates a model folder and prints a table."""
    result = evaluate(config)
    teacher = result.get("teacher", {})
    print_table(
        config.model.path, ("", "model", "teacher"), [(k, v, teacher.get(k, "")) for k, v in result["model"].items()]
    )
    return EXIT_DONE
