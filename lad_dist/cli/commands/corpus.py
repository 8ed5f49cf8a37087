"""Commands that turn text into what pre-training reads: prepare, verify, train-tokenizer."""

import time
from collections.abc import Sequence

from lad_dist.cli.command import ArgumentParser
from lad_dist.cli.console import loading_libraries, say
from lad_dist.config.corpus_schema import PrepareConfig, TokenizerConfig
from lad_dist.config.errors import EXIT_DONE, EXIT_RUN_AGAIN
from lad_dist.utils.text import megabytes


def prepare(config: PrepareConfig) -> int:
    """Turn text into token shards for pre-training.

    Text is WikiExtractor's output, .txt, JSON lines, Parquet, or a Hugging Face dataset. A stopped or
    killed preparation goes on where it was. With part and parts, several machines share the tokenizing
    (slurm/prepare.sbatch does); a run without them merges.

    usage: lad-dist prepare CONFIG [key=value …]

    example: lad-dist prepare configs:pretrain/corpus.toml out=corpora/wikipedia-books
    """
    with loading_libraries():
        from lad_dist.data.shards.prepare import corpus_summary
        from lad_dist.data.shards.prepare import prepare as write_shards

    if not write_shards(config):
        say(f"{config.out}: stopped early; run again to go on")
        return EXIT_RUN_AGAIN
    if config.part is None:
        say(corpus_summary(config.out))
    else:
        say(f"{config.out}: part {config.part} of {config.parts} is done; run without part and parts to merge")
    return EXIT_DONE


def verify(arguments: Sequence[str]) -> int:
    """Compare token shards with the checksums in their manifest.

    usage: lad-dist verify FOLDER
    """
    parser = ArgumentParser("verify")
    parser.add_argument("folder", metavar="FOLDER")
    folder = parser.parse_args(arguments).folder
    from lad_dist.data.shards import reader

    begin = time.monotonic()
    size = megabytes(reader.verify(folder))
    say(f"{folder}: the shards agree with their manifest; {size} in {time.monotonic() - begin:.1f} s")
    return EXIT_DONE


def train_tokenizer(config: TokenizerConfig) -> int:
    """Train a tokenizer on the sources of a corpus: WordPiece, or sentencepiece's unigram model.

    usage: lad-dist train-tokenizer CONFIG [key=value …]

    example: lad-dist train-tokenizer configs:pretrain/tokenizer_unigram.toml vocab_size=16000
    """
    with loading_libraries():
        from lad_dist.data.tokenization import train

    say(f"{config.out}: {train.train_tokenizer(config):,} tokens")
    return EXIT_DONE
