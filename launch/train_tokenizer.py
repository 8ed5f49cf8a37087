"""Trains a tokenizer on the sources of a corpus, for prepare_corpus: WordPiece, or sentencepiece's unigram model.

usage: python launch/train_tokenizer.py CONFIG.toml [dotted.key=value …]

example: python launch/train_tokenizer.py configs/pretrain/tokenizer_unigram.toml vocab_size=16000
"""

from lad_dist.cli.app import run_script
from lad_dist.cli.console import say
from lad_dist.config.corpus_schema import TokenizerConfig
from lad_dist.config.errors import EXIT_DONE


def main(config: TokenizerConfig) -> int:
    from lad_dist.data.tokenization.train import train_tokenizer

    say(f"{config.out}: {train_tokenizer(config):,} tokens")
    return EXIT_DONE


if __name__ == "__main__":
    run_script(__doc__, TokenizerConfig, main)
