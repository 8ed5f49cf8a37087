"""The command line: `lad-dist COMMAND CONFIG [key=value …]`.

A launcher starts the same: `deepspeed --module lad_dist.cli COMMAND …`, or in a clone `deepspeed launch/NAME.py …`.
"""

import sys
from collections.abc import Mapping
from typing import NoReturn

from lad_dist.cli.command import Command, ConfigCommand, documentation, wrapped, wrapped_document
from lad_dist.cli.commands.augment import augment
from lad_dist.cli.commands.benchmark import benchmark
from lad_dist.cli.commands.corpus import prepare, train_tokenizer, verify
from lad_dist.cli.commands.evaluate import evaluate
from lad_dist.cli.commands.export import export
from lad_dist.cli.commands.information import configs, env
from lad_dist.cli.commands.latency import latency
from lad_dist.cli.commands.masks import masks
from lad_dist.cli.commands.plan import plan
from lad_dist.cli.commands.predict import predict
from lad_dist.cli.commands.push import push
from lad_dist.cli.commands.quickstart import quickstart
from lad_dist.cli.commands.report import report
from lad_dist.cli.commands.train import distill, finetune, pretrain
from lad_dist.cli.commands.tune import tune
from lad_dist.cli.console import say
from lad_dist.cli.errors import one_line_errors
from lad_dist.config.corpus_schema import PrepareConfig, TokenizerConfig
from lad_dist.config.errors import EXIT_DONE, EXIT_USER_ERROR
from lad_dist.config.evaluation_schema import EvaluateConfig
from lad_dist.config.load import lookup
from lad_dist.config.schema import PretrainConfig, TaskConfig
from lad_dist.config.search_schema import SearchConfig
from lad_dist.utils.text import LAUNCHER_ARGUMENTS

TASK_KEYS = (
    "run.name", "run.epochs", "run.seed", "student.path", "student.num_hidden_layers", "data.task", "data.path",
    "data.train", "data.dev", "data.max_length", "data.micro_batch_size", "objective.name", "optim.lr",
)  # fmt: skip
PRETRAIN_KEYS = (
    "run.name", "run.steps", "run.seed", "run.save_every", "student.path", "student.num_hidden_layers", "teacher.path",
    "data.shards", "data.max_length", "data.micro_batch_tokens", "data.micro_batches_per_step", "objective.name",
    "optim.lr",
)  # fmt: skip
PREPARE_KEYS = ("out", "tokenizer", "source[].kind", "source[].path", "source[].column", "held_out", "num_workers")
TOKENIZER_KEYS = ("out", "kind", "vocab_size", "lowercase", "source[].kind", "source[].path", "source[].column")
EVALUATE_KEYS = (
    "model.path", "teacher.path", "data.task", "data.path", "data.dev", "data.text", "data.label", "data.labels", "out",
    "fit_temperature",
)  # fmt: skip
SEARCH_KEYS = (
    "search.name", "search.metric", "search.num_samples", "search.processes", "search.cpus", "search.gpus",
    "stage[].name", "stage[].base", "override", "grid", "space",
)  # fmt: skip

COMMANDS: Mapping[str, Command] = {
    "quickstart": quickstart,
    "prepare": ConfigCommand(prepare, PrepareConfig, PREPARE_KEYS),
    "verify": verify,
    "train-tokenizer": ConfigCommand(train_tokenizer, TokenizerConfig, TOKENIZER_KEYS),
    "pretrain": ConfigCommand(pretrain, PretrainConfig, PRETRAIN_KEYS),
    "finetune": ConfigCommand(finetune, TaskConfig, TASK_KEYS),
    "distill": ConfigCommand(distill, TaskConfig, ("teacher.path", *TASK_KEYS)),
    "augment": augment,
    "predict": predict,
    "evaluate": ConfigCommand(evaluate, EvaluateConfig, EVALUATE_KEYS),
    "tune": ConfigCommand(tune, SearchConfig, SEARCH_KEYS),
    "export": export,
    "report": report,
    "masks": masks,
    "plan": plan,
    "latency": latency,
    "push": push,
    "benchmark": benchmark,
    "configs": configs,
    "env": env,
}


def main(name: str | None = None) -> NoReturn:
    """Run a command and exit with its code.

    Args:
        name: The command; default: the first argument.
    """
    arguments = [argument for argument in sys.argv[1:] if not LAUNCHER_ARGUMENTS.fullmatch(argument)]
    with one_line_errors():
        if name is None:
            if not arguments or arguments[0] in ("-h", "--help"):
                say(overview())
                sys.exit(EXIT_DONE if arguments else EXIT_USER_ERROR)
            name, *arguments = arguments
        command = lookup("command", name, COMMANDS)
        if {"-h", "--help"} & set(arguments) or (not arguments and isinstance(command, ConfigCommand)):
            say(help_text(name, everything="all" in arguments))
            sys.exit(EXIT_DONE if arguments else EXIT_USER_ERROR)
        sys.exit(command(arguments))


def overview() -> str:
    """Return the list of commands."""
    width = max(map(len, COMMANDS))
    summaries = {name: documentation(command).partition("\n")[0] for name, command in COMMANDS.items()}
    lines = [
        line for name, text in summaries.items() for line in wrapped(text, f"  {name:{width}}  ", " " * (width + 4))
    ]
    return "\n".join(
        ["usage: lad-dist COMMAND CONFIG [key=value …]", "", *lines, "", "lad-dist COMMAND --help explains a command."]
    )


def help_text(name: str, everything: bool) -> str:
    """Return what `--help` of a command prints; `everything`: with every key of its config."""
    command = COMMANDS[name]
    keys = ["", *command.help_lines(name, everything)] if isinstance(command, ConfigCommand) else []
    return "\n".join([*wrapped_document(documentation(command)), *keys])
