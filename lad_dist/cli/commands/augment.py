"""The command augment."""

import json
from collections.abc import Sequence
from pathlib import Path

from lad_dist.cli.command import ArgumentParser
from lad_dist.cli.console import loading_libraries, say
from lad_dist.config.errors import EXIT_DONE, UserError
from lad_dist.config.load import check_writable, load_config, read_toml
from lad_dist.config.schema import TaskConfig, train_schema


def augment(arguments: Sequence[str]) -> int:
    """Write more texts like those of a task, in which a masked language model replaces words, as TinyBERT does.

    A training learns them from the teacher alone, as data.unlabelled. CONFIG is one of distill, with the same changes
    of keys: of it [data] and run.seed are read.

    usage: lad-dist augment CONFIG --model PATH --out FILE [options] [key=value …]

    --model PATH     folder or hub name of the masked language model
    --out FILE       .jsonl with the columns data.text and, of pairs, data.text_pair
    --samples N      texts of each training example, before equal ones are left out (default: 20)
    --candidates K   words that may replace a word (default: 15)
    --probability P  that a word is replaced (default: 0.4)

    example: lad-dist augment configs:task/tinybert_prediction.toml data.task=rte \
--model google-bert/bert-base-uncased --out rte.jsonl
    """
    parser = ArgumentParser("augment")
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*")
    parser.add_argument("--model", metavar="PATH", required=True)
    parser.add_argument("--out", metavar="FILE", type=Path, required=True)
    parser.add_argument("--samples", metavar="N", type=int, default=20)
    parser.add_argument("--candidates", metavar="K", type=int, default=15)
    parser.add_argument("--probability", metavar="P", type=float, default=0.4)
    options = parser.parse_intermixed_args(arguments)
    for name in ("samples", "candidates"):
        if getattr(options, name) < 1:
            raise UserError(f"augment: --{name} {getattr(options, name)}: at least 1")
    if not 0 < options.probability <= 1:
        raise UserError(f"augment: --probability {options.probability:g}: above 0 and at most 1")
    if options.out.suffix != ".jsonl" or options.out.exists():
        raise UserError(f"augment: --out {options.out}: give a .jsonl file that does not exist yet")
    check_writable("--out", options.out.parent)
    config = load_config(train_schema(read_toml(options.config)), options.config, options.overrides)
    if not isinstance(config, TaskConfig) or config.data.kind in ("tagging", "question_answering"):
        raise UserError(f"{options.config}: augment takes a config of a task whose examples are texts")
    with loading_libraries():
        from lad_dist.data.tasks import augmentation
        from lad_dist.data.tasks.files import PAIR, Texts
        from lad_dist.data.tasks.task import load_task
        from lad_dist.distributed import processes
        from lad_dist.utils.atomic_io import write_text

    task = load_task(config.data.model_copy(update={"unlabelled": None}))  # it may name the file to be written
    assert isinstance(task.train, Texts)
    settings = augmentation.Augmentation(options.samples, options.candidates, options.probability, config.run.seed)
    propose = augmentation.WordProposer(options.model, config.data.max_length, settings.candidates, processes.device())
    columns = (config.data.text, config.data.text_pair or PAIR)
    rows = [dict(zip(columns, row, strict=False)) for row in augmentation.augment(task.train, propose, settings)]
    write_text(options.out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    say(f"{options.out}: {len(rows):,} texts like the {len(task.train.texts):,} of {task.name}")
    say(f"train on them with data.unlabelled={options.out}")
    return EXIT_DONE
