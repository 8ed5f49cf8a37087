"""Turns text into token shards for pretrain_distill: WikiExtractor's output, .txt, JSON lines, Parquet, Arrow, and
Hugging Face datasets by name.

usage: python launch/prepare_corpus.py CONFIG.toml [dotted.key=value …]
       python launch/prepare_corpus.py --verify FOLDER     (compares shards with their manifest)

It takes up its work where it was stopped or killed. With part and parts, several machines share the tokenizing
(slurm/prepare.sbatch does); a run without them then merges. The shards do not depend on any of this. Finished pieces
are good for the same files: those of the same names and sizes.

example: python launch/prepare_corpus.py configs/pretrain/corpus.toml out=corpora/wikipedia-books
"""

import sys
import time

from lad_dist.cli.app import guarded, run_script
from lad_dist.cli.console import Console, say
from lad_dist.config.errors import EXIT_DONE, EXIT_RUN_AGAIN, UserError
from lad_dist.config.schema import PrepareConfig

LINE_EVERY = 10  # seconds


def main(config: PrepareConfig) -> int:
    from lad_dist.data.shards.prepare import prepare

    console = Console(config.out, every=LINE_EVERY)
    try:
        complete = prepare(config, progress=say, report=console)
    finally:
        console.close()
    if not complete:
        say(f"{config.out}: stopped early; run again to go on")
        return EXIT_RUN_AGAIN
    return EXIT_DONE


def verify(words: list[str]) -> int:
    from lad_dist.data.shards.reader import verify

    if len(words) != 1:
        raise UserError("--verify: give the folder of one corpus")
    begin = time.monotonic()
    size = verify(words[0], say) / 1e9
    say(f"{size:.2f} GB in {time.monotonic() - begin:.1f} s")
    return EXIT_DONE


if __name__ == "__main__":
    if sys.argv[1:2] == ["--verify"]:
        sys.exit(guarded(lambda: verify(sys.argv[2:])))
    run_script(__doc__, PrepareConfig, main)
