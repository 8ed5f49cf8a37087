"""Turns text into token shards for pretrain_distill.

Text is WikiExtractor's output, .txt, JSON lines, Parquet, Arrow, or a Hugging Face dataset by name.

usage: python launch/prepare_corpus.py CONFIG.toml [dotted.key=value …]
       python launch/prepare_corpus.py --verify FOLDER     (compares shards with their manifest)

It goes on where it was stopped or killed. With part and parts, several machines share the tokenizing
(slurm/prepare.sbatch does); a run without them then merges. The shards do not depend on any of this. Finished chunks
stay valid as long as the files keep their names and sizes.

example: python launch/prepare_corpus.py configs/pretrain/corpus.toml out=corpora/wikipedia-books
"""

import sys
import time

from lad_dist.cli.app import plain_script, run_script
from lad_dist.cli.console import say
from lad_dist.config.corpus_schema import PrepareConfig
from lad_dist.config.errors import EXIT_DONE, EXIT_RUN_AGAIN, UserError


def main(config: PrepareConfig) -> int:
    from lad_dist.data.shards.prepare import corpus_summary, prepare

    if not prepare(config):
        say(f"{config.out}: stopped early; run again to go on")
        return EXIT_RUN_AGAIN
    if config.part is None:
        say(corpus_summary(config.out))
    else:
        say(f"{config.out}: part {config.part} of {config.parts} is done; run without part and parts to merge")
    return EXIT_DONE


def verify_corpus() -> int:
    from lad_dist.data.shards.reader import verify

    folders = sys.argv[2:]
    if len(folders) != 1:
        raise UserError("--verify: give the folder of one corpus")
    begin = time.monotonic()
    size = verify(folders[0]) / 1e9
    say(f"{folders[0]}: the shards agree with their manifest; {size:.2f} GB in {time.monotonic() - begin:.1f} s")
    return EXIT_DONE


if __name__ == "__main__":
    if sys.argv[1:2] == ["--verify"]:
        plain_script(__doc__, verify_corpus)
    run_script(__doc__, PrepareConfig, main)
