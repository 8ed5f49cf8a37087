"""Fine-tunes a model for a task: the teacher of a later distillation.

usage: python launch/finetune_teacher.py CONFIG.toml [dotted.key=value …]
       deepspeed launch/finetune_teacher.py …   (or torchrun, or srun python: the world comes from the environment)

example: python launch/finetune_teacher.py configs/task/teacher.toml data.task=rte
"""

from lad_dist import cli
from lad_dist.config import TaskConfig


def main(config: TaskConfig) -> int:
    from lad_dist.jobs import train_job

    return train_job(config)


def named() -> cli.Named:
    from lad_dist.objectives import OBJECTIVES
    from lad_dist.surgery import SURGERIES

    return {"objective": OBJECTIVES, "surgery": SURGERIES}


if __name__ == "__main__":
    cli.run(__doc__, TaskConfig, main, named)
