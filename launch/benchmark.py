"""Times training and data preparation on this machine.

All figures of one call come from one run: read their ratios.

usage: python launch/benchmark.py step CONFIG.toml [dotted.key=value …]
       python launch/benchmark.py data CONFIG.toml [dotted.key=value …]
       deepspeed launch/benchmark.py step …   (or torchrun, or srun python)

step: a training step of the run that the config describes: real tokens per second, FLOP/s and their share of the
      matrix-product peak measured in the same run, and where the time goes.
data: the first 32 million characters of the sources of a config of prepare_corpus: how fast they become token shards,
      against the tokenizer alone and against datasets.map, and how fast these become batches; memory of both, also at
      ten times the text; whether a small student waits for data.

example: python launch/benchmark.py step configs/task/lad.toml data.task=rte
         python launch/benchmark.py data configs/pretrain/corpus.toml
"""

from lad_dist.cli.app import plain_script, user_arguments
from lad_dist.cli.console import print_table
from lad_dist.config.corpus_schema import PrepareConfig
from lad_dist.config.errors import EXIT_DONE, UserError
from lad_dist.config.load import load_config, read_toml
from lad_dist.config.schema import train_schema


def step(path: str, overrides: list[str]) -> None:
    config = load_config(train_schema(read_toml(path)), path, overrides)
    from lad_dist.benchmarks.step import measure

    print_table(f"a step of {config.run.name}", ("", ""), measure(config).rows)


def data(path: str, overrides: list[str]) -> None:
    config = load_config(PrepareConfig, path, overrides)
    from lad_dist.benchmarks.data import measure

    print_table(f"the data of {path}", ("", ""), measure(config))


BENCHMARKS = {"step": step, "data": data}


def main() -> int:
    arguments = user_arguments()
    if len(arguments) < 2 or arguments[0] not in BENCHMARKS:
        text = " ".join(arguments) or "nothing"
        raise UserError(f"benchmark: name what to time, {' or '.join(BENCHMARKS)}, and a CONFIG.toml, not {text}")
    BENCHMARKS[arguments[0]](arguments[1], arguments[2:])
    return EXIT_DONE


if __name__ == "__main__":
    plain_script(__doc__, main)
