"""The command benchmark."""

from collections.abc import Sequence
from pathlib import Path

from lad_dist.cli.console import loading_libraries, print_table
from lad_dist.config.corpus_schema import PrepareConfig
from lad_dist.config.errors import EXIT_DONE, UserError
from lad_dist.config.load import load_config, read_toml
from lad_dist.config.schema import train_schema


def benchmark(arguments: Sequence[str]) -> int:
    """Time training or data preparation on this machine.

    All figures of one call come from one run: read their ratios.

    usage: lad-dist benchmark step CONFIG [key=value …]
           lad-dist benchmark data CONFIG [key=value …]
           deepspeed --module lad_dist.cli benchmark step CONFIG [key=value …]   (or torchrun, or srun python -m)

    step  a training step of the run that the config describes: real tokens per second, FLOP/s and their share of the
          matrix-product peak measured in the same run, and where the time goes; the speed goes to benchmark.json in
          run.dir (runs/benchmark.json), where `lad-dist plan` finds it
    data  the first 32 million characters of the sources of a config of prepare: how fast they become token shards,
          against the tokenizer alone and against datasets.map, and how fast these become batches; memory of both,
          also at ten times the text; whether a small student waits for data

    example: lad-dist benchmark step configs:task/lad.toml data.task=rte
    """
    if len(arguments) < 2 or arguments[0] not in ("step", "data"):
        text = " ".join(arguments) or "nothing"
        raise UserError(f"benchmark: name what to time, step or data, and a CONFIG, not {text}")
    kind, path, *overrides = arguments
    if kind == "step":
        config = load_config(train_schema(read_toml(path)), path, overrides)
        with loading_libraries():
            from lad_dist.benchmarks import measured_speed, step
            from lad_dist.distributed import ranks

        figures = step.measure(config)
        print_table(f"a step of {config.run.name}", ("", ""), figures.rows)
        if ranks.is_main():
            figures.measured_speed().write(Path(config.run.dir) / measured_speed.FILE)
    else:
        sources = load_config(PrepareConfig, path, overrides)
        with loading_libraries():
            from lad_dist.benchmarks import data

        print_table(f"the data of {path}", ("", ""), data.measure(sources))
    return EXIT_DONE
