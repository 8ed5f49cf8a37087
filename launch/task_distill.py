"""Distils a fine-tuned teacher into a small student for one task.

usage: python launch/task_distill.py CONFIG.toml [dotted.key=value …]
       deepspeed launch/task_distill.py …   (or torchrun, or srun python: the world comes from the environment)

example: deepspeed launch/task_distill.py configs/task/lad.toml data.task=rte
"""

from lad_dist.cli.app import run_script
from lad_dist.cli.commands import train_command
from lad_dist.config.schema import TaskConfig

if __name__ == "__main__":
    run_script(__doc__, TaskConfig, train_command)
