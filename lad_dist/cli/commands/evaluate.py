"""The command evaluate."""

from lad_dist.cli.console import loading_libraries, print_table
from lad_dist.config.errors import EXIT_DONE
from lad_dist.config.evaluation_schema import EvaluateConfig


def evaluate(config: EvaluateConfig) -> int:
    """Evaluate a model folder on a task's dev set; with a teacher, also the loyalty to it and the speed-up.

    usage: lad-dist evaluate CONFIG [key=value …]
           deepspeed launch/evaluate.py CONFIG [key=value …]   (or torchrun, or srun python)

    example: lad-dist evaluate configs:task/evaluate.toml data.task=rte model.path=runs/lad-rte/export \
teacher.path=runs/teacher-rte/export
    """
    with loading_libraries():
        from lad_dist.evaluation import evaluate as evaluation

    scores = evaluation.evaluate(config)
    teacher = scores.get("teacher", {})
    rows = [(name, value, teacher.get(name, "")) for name, value in scores["model"].items()]
    print_table(config.model.path, ("", "model", "teacher"), rows)
    return EXIT_DONE
