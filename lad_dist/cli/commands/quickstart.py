"""The command quickstart."""

import contextlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lad_dist.cli.console import Console, loading_libraries, print_table, say
from lad_dist.config.corpus_schema import PrepareConfig
from lad_dist.config.errors import EXIT_DONE, EXIT_RUN_AGAIN
from lad_dist.config.evaluation_schema import OF_TRAININGS, EvaluateConfig
from lad_dist.config.load import (
    Schema,
    apply_overrides,
    lookup,
    parse_config,
    parse_override,
    read_toml,
    validate_arguments,
)
from lad_dist.config.schema import PretrainConfig, TaskConfig, TrainConfig

FOLDER = Path("runs/quickstart")
VOCABULARY = 4000


class Stage(NamedTuple):
    title: str
    schema: type[TrainConfig]
    label: str  # in the table


RUNS = {
    "pretrain": Stage("Pre-training a small BERT on them by masked language modelling", PretrainConfig, "pre-trained"),
    "teacher": Stage("Fine-tuning it on all labels: the teacher, 4 layers", TaskConfig, "teacher"),
    "lad": Stage("Distilling it by LAD into 1 layer, on a ninth of the labels", TaskConfig, "student by LAD"),
    "alone": Stage("Training 1 layer on the same labels without the teacher", TaskConfig, "student alone"),
}
# On two cores, to tell people what to expect.
TIMES = {"pretrain": "a minute", "teacher": "two minutes", "lad": "20 seconds", "alone": "20 seconds"}
STAGES = ("text", "corpus", *RUNS)

Changes = Mapping[str, list[tuple[str, Any]]]
Results = dict[str, Any]


def quickstart(arguments: Sequence[str]) -> int:
    """Distil a teacher on text of this installation: no hub, no GPU, a few minutes on two cores.

    The documentation of Python and of installed libraries becomes a corpus and a labelled task: which library does a
    passage document? A small BERT is pre-trained on the corpus (stage pretrain) and fine-tuned on all labels (teacher).
    LAD distils it into a student of one layer that sees few labels (lad). The same student learns from these labels
    without the teacher (alone), which shows what a teacher is for. The configs are configs:quickstart/STAGE.toml.
    Everything goes to runs/quickstart; what is complete there is not run again.

    usage: lad-dist quickstart [stage.key=value …]

    example: lad-dist quickstart lad.objective.hidden=10.0   (where lad has run before, remove runs/quickstart/lad)
    """
    # Threads that spin while they wait slow a busy machine many times; sleeping ones cost an idle one little.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    changes = changes_by_stage(arguments)
    check(FOLDER, changes)
    results = run_all(FOLDER, changes)
    if results is None:
        say(f"{FOLDER}: stopped early and saved; run the same command again to go on")
        return EXIT_RUN_AGAIN
    show(FOLDER, results)
    return EXIT_DONE


def run_all(folder: Path, changes: Changes) -> Results | None:
    """Run all stages, each with changes to the config; None where a stage was stopped early.

    Returns what results.json holds.
    """
    counts = prepare(folder, changes)
    if counts is None:
        return None
    say_text(counts)
    for number, (name, stage) in enumerate(RUNS.items(), start=2):
        say(f"\n{number}/6 {stage.title}: about {TIMES[name]} on two cores.")
        if not train_stage(stage_config(stage.schema, name, folder, changes)):
            return None
    say("\n6/6 Comparing on passages of modules that none of them was trained on.")
    results = compare(folder, changes, counts["dev"])
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    return results


def check(folder: Path, changes: Changes) -> None:
    """Raise UserError for a change that some stage would refuse, before the first one begins."""
    with loading_libraries():
        from lad_dist.data.sources import docstrings
        from lad_dist.training import run_spec

    validate_arguments("text", docstrings.write, dict(changes.get("text", [])))
    stage_config(PrepareConfig, "corpus", folder, changes)
    for name, stage in RUNS.items():
        run_spec.resolve_options(stage_config(stage.schema, name, folder, changes))


def prepare(folder: Path, changes: Changes) -> dict[str, int] | None:
    """Make text, tokenizer and token shards; return counts for a person to read, None when it was stopped early."""
    from lad_dist.data.shards.prepare import prepare
    from lad_dist.data.sources import docstrings
    from lad_dist.data.tokenization.algorithms import train_wordpiece

    say("1/6 Reading the documentation of this installation: about half a minute.")
    options = validate_arguments("text", docstrings.write, dict(changes.get("text", [])))
    counts = docstrings.write(folder / "text", **options)
    if not (folder / "tokenizer" / "tokenizer_config.json").exists():
        files = sorted((folder / "text" / "corpus").glob("*.txt"))
        train_wordpiece((file.read_text(encoding="utf-8") for file in files), VOCABULARY, folder / "tokenizer")
    complete = prepare(stage_config(PrepareConfig, "corpus", folder, changes))
    return counts if complete else None


def say_text(counts: Mapping[str, int]) -> None:
    say(
        f"    {counts['passages']:,} passages of {counts['modules']:,} modules. The task: which of "
        f"{counts['libraries']} libraries does a passage document, all names hidden?\n"
        f"    The teacher learns from {counts['train']:,} labelled passages, the students from {counts['few']:,} of "
        f"them;\n    {counts['dev']:,} of other modules are the test. Guessing scores {1 / counts['libraries']:.3f}."
    )


def stage_config(schema: type[Schema], stage: str, folder: Path, changes: Changes) -> Schema:
    """Return the config of a stage with its paths moved to `folder`, then changed."""
    file = f"configs:quickstart/{stage}.toml"
    tables = apply_overrides(move_paths(folder, read_toml(file)), changes.get(stage, []))
    return parse_config(schema, tables, where=file)


def move_paths(folder: Path, value: Any) -> Any:
    """Return the tables with FOLDER at the front of every path replaced."""
    if isinstance(value, dict):
        return {key: move_paths(folder, inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [move_paths(folder, inner) for inner in value]
    is_path = isinstance(value, str) and Path(value).is_relative_to(FOLDER)
    return str(folder / Path(value).relative_to(FOLDER)) if is_path else value


def train_stage(config: TrainConfig) -> bool:
    """Train with progress on the terminal; return whether the run is complete."""
    from lad_dist.training.train import RunStatus, train

    with contextlib.closing(Console(config.run.name)) as console:
        return train(config, report=console).status is RunStatus.COMPLETED


def compare(folder: Path, changes: Changes, examples: int) -> Results:
    """Evaluate teacher and both students on the dev set, the students also against the teacher.

    The standard error of an accuracy is that of a share of so many `examples`.
    """
    from lad_dist.evaluation.evaluate import evaluate

    data = stage_config(TaskConfig, "lad", folder, changes).data.model_dump(exclude=OF_TRAININGS)
    results: Results = {}
    for name in ("lad", "alone"):
        paths = {
            "model": {"path": str(folder / name / "export")},
            "teacher": {"path": str(folder / "teacher" / "export")},
        }
        # One architecture has one speed: it is measured once.
        result = evaluate(
            parse_config(EvaluateConfig, {**paths, "data": data}, where="quickstart"), speedup=name == "lad"
        )
        results |= {name: result["model"], "teacher": result["teacher"]}
    for scores in results.values():
        accuracy = scores["accuracy"]
        scores["accuracy_error"] = math.sqrt(accuracy * (1 - accuracy) / examples)
    return {name: results[name] for name in ("teacher", "lad", "alone")}


def show(folder: Path, results: Results) -> None:
    """Print the table, and where everything is."""
    from lad_dist.runs.plots import curves

    plots = curves([folder / "lad", folder / "alone"], folder / "plots")
    print_table("which library?", ("", *(RUNS[name].label for name in results)), list(rows(results)))
    say(
        f"\nthe student      {folder / 'lad' / 'export'}   (an ordinary Hugging Face folder)\n"
        f"numbers          {folder / 'results.json'}\n"
        f"plots            {' '.join(map(str, plots))}\n"
        f"curves           tensorboard --logdir {folder}\n"
        f"\nNext, real BERT on a GLUE task, from the hub:\n"
        f"  lad-dist finetune configs:task/teacher.toml data.task=rte run.name=teacher-rte\n"
        f"  lad-dist distill configs:task/lad.toml data.task=rte "
        f"teacher.path=runs/teacher-rte/export run.name=lad-rte"
    )


def rows(results: Results) -> Iterable[tuple[str, ...]]:
    cells = {
        "accuracy ± standard error": ("accuracy", "{accuracy:.3f} ± {accuracy_error:.3f}"),
        "same decision as the teacher": ("label_loyalty", "{label_loyalty:.3f}"),
        "parameters": ("parameters", "{parameters:,}"),
        "times faster than the teacher": ("speedup", "{speedup:.1f}"),
    }
    for title, (key, pattern) in cells.items():
        yield title, *(pattern.format(**scores) if key in scores else "" for scores in results.values())


def changes_by_stage(overrides: Iterable[str]) -> Changes:
    """Return the overrides `stage.key=value` by stage; raise UserError for an unknown stage."""
    changes: dict[str, list[tuple[str, Any]]] = {}
    for text in overrides:
        stage = parse_override(text)[0].partition(".")[0]
        lookup("stage", stage, dict.fromkeys(STAGES))
        schema = RUNS[stage].schema if stage in RUNS else None
        changes.setdefault(stage, []).append(parse_override(text.partition(".")[2], schema))
    return changes
