"""Evaluates a model folder on a task's dev set; with a teacher, also the loyalty to it.

usage: python launch/evaluate.py CONFIG.toml [dotted.key=value …]
       deepspeed launch/evaluate.py …   (or torchrun, or srun python: the world comes from the environment)

example: python launch/evaluate.py configs/task/evaluate.toml data.task=rte model.path=runs/lad-rte/export \
    teacher.path=runs/teacher-rte/export
"""

from lad_dist.cli.app import run_script
from lad_dist.cli.commands import evaluate_command
from lad_dist.config.schema import EvaluateConfig

if __name__ == "__main__":
    run_script(__doc__, EvaluateConfig, evaluate_command)
