"""Times what the product does, on this machine.

usage: python launch/benchmark.py step CONFIG.toml [dotted.key=value …]
       deepspeed launch/benchmark.py step …   (or torchrun, or srun python)

step: a training step of the run that the config describes: real tokens per second, FLOP/s and their share of the
matrix-product peak
      measured in the same run, and where the time goes.

example: python launch/benchmark.py step configs/task/lad.toml data.task=rte
"""

import sys

from lad_dist import cli
from lad_dist.config import PretrainConfig, TaskConfig, TrainConfig, UserError, read


def step(config: TrainConfig) -> int:
    from lad_dist.benchmark import step

    cli.print_table(f"a step of {config.run.name}", ("", ""), step(config).rows)
    return cli.DONE


def main() -> int:
    words = [word for word in sys.argv[1:] if not cli.LAUNCHERS_OWN.fullmatch(word)]
    if words[:1] != ["step"] or len(words) < 2:
        raise UserError(
            f"benchmark: say what to time, benchmark.py step CONFIG.toml, not {' '.join(words) or 'nothing'}"
        )
    path, *overrides = words[1:]
    schema: type[TrainConfig] = PretrainConfig if "shards" in read(path).get("data", {}) else TaskConfig
    return step(cli.load(schema, path, overrides))


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
    else:
        sys.exit(cli.guarded(main))
