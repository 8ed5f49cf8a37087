"""Distils a teacher into a small encoder, without a task, on token shards written by prepare_corpus.

usage: python launch/pretrain_distill.py CONFIG.toml [dotted.key=value …]
       deepspeed launch/pretrain_distill.py …   (or torchrun, or srun python: the world comes from the environment)

example: deepspeed launch/pretrain_distill.py configs/pretrain/kd.toml data.shards=corpora/wikipedia-books
"""

from lad_dist.cli.app import run_script
from lad_dist.cli.commands import train_command
from lad_dist.config.schema import PretrainConfig

if __name__ == "__main__":
    run_script(__doc__, PretrainConfig, train_command)
