"""Fine-tunes a model for a task: the teacher of a later distillation.

usage: python launch/finetune_teacher.py CONFIG.toml [dotted.key=value …]
       deepspeed launch/finetune_teacher.py …   (or torchrun, or srun python: the world comes from the environment)

example: python launch/finetune_teacher.py configs/task/teacher.toml data.task=rte
"""

from lad_dist.cli.app import run_script
from lad_dist.cli.commands import train_command
from lad_dist.config.schema import TaskConfig

if __name__ == "__main__":
    run_script(__doc__, TaskConfig, train_command)
