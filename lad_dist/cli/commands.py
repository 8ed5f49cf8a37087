"""Commands of the launch scripts: functions from a config to an exit code.

What a command runs is imported in it: a mistake in a config must not wait for deepspeed.
"""

import contextlib

from lad_dist.cli.console import Console, print_table, say
from lad_dist.config.errors import EXIT_DONE, EXIT_RUN_AGAIN
from lad_dist.config.schema import EvaluateConfig, TrainConfig


def train_command(config: TrainConfig) -> int:
    """Train with progress on the terminal, and print where everything is."""
    from lad_dist.runs.model_card import totals
    from lad_dist.training.train import RunStatus, train

    with contextlib.closing(Console(config.run.name)) as console:
        result = train(config, report=console)
    if result.status is RunStatus.STOPPED:
        say(f"{result.folder}: stopped early and saved; run the same command again to go on")
        return EXIT_RUN_AGAIN
    assert result.results is not None
    student = {**totals(result.results["student"]), **result.results["metrics"]}
    teacher = result.results["teacher"]
    rows = [(name, value, teacher.get(name, "")) for name, value in student.items()]
    print_table(config.run.name, ("", "student", "teacher"), rows)
    say(f"model in {result.export_dir}, curves: tensorboard --logdir {result.folder}")
    return EXIT_DONE


def evaluate_command(config: EvaluateConfig) -> int:
    """Evaluate a model folder and print a table."""
    from lad_dist.evaluation.evaluate import evaluate

    scores = evaluate(config)
    teacher = scores.get("teacher", {})
    print_table(
        config.model.path, ("", "model", "teacher"), [(k, v, teacher.get(k, "")) for k, v in scores["model"].items()]
    )
    return EXIT_DONE
