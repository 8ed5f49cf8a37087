"""Task-agnostic distillation into a small encoder, on token shards written by prepare_corpus.

usage: python launch/pretrain_distill.py CONFIG.toml [dotted.key=value …]
       deepspeed launch/pretrain_distill.py …   (or torchrun, or srun python: the world comes from the environment)

example: deepspeed launch/pretrain_distill.py configs/pretrain/kd.toml data.shards=corpora/wikipedia
"""

from lad_dist import cli
from lad_dist.config import PretrainConfig


def main(config: PretrainConfig) -> int:
    from lad_dist.jobs import train_job

    return train_job(config)


def named() -> cli.Named:
    from lad_dist.objectives import OBJECTIVES
    from lad_dist.surgery import SURGERIES

    return {"objective": OBJECTIVES, "surgery": SURGERIES}


if __name__ == "__main__":
    cli.run(__doc__, PretrainConfig, main, named)
