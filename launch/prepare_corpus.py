"""Turns text into token shards for pretrain_distill: WikiExtractor folders, .txt files, Hugging Face datasets by name.

usage: python launch/prepare_corpus.py CONFIG.toml [dotted.key=value …]

example: python launch/prepare_corpus.py configs/pretrain/corpus.toml out=corpora/wikipedia
"""

from lad_dist import cli
from lad_dist.config import PrepareConfig


def main(config: PrepareConfig) -> int:
    from lad_dist.data.prepare import prepare

    prepare(config)
    return cli.DONE


if __name__ == "__main__":
    cli.run(__doc__, PrepareConfig, main)
