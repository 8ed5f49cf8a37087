"""The Python API: what the commands do, as functions."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lad_dist.config.load import apply_overrides, parse_config, read_toml, schema_of
from lad_dist.evaluation.evaluate import evaluate
from lad_dist.evaluation.prediction import Prediction, predict
from lad_dist.training.reporting import Report, silent
from lad_dist.training.results import RunResult
from lad_dist.training.train import train

__all__ = ["Prediction", "RunResult", "distill", "evaluate", "load_config", "predict", "train"]


def load_config(path: str | Path, changes: Mapping[str, Any] | None = None) -> Any:
    """Read a config, with changes of its keys.

    Args:
        path: A TOML file, or a shipped config: "configs:task/lad.toml".
        changes: Values of dotted keys: {"data.task": "rte"}; None unsets a key.

    Returns:
        The config, for `train` or `evaluate`, as its tables say.

    Raises:
        UserError: The file or a key is wrong; the message names the nearest right key.
    """
    tables = apply_overrides(read_toml(path), (changes or {}).items())
    return parse_config(schema_of(tables), tables, str(path))


def distill(
    teacher: str | Path,
    *,
    train: str | Path,
    dev: str | Path,
    num_hidden_layers: int,
    method: str = "lad",
    name: str = "student",
    changes: Mapping[str, Any] | None = None,
    report: Report = silent,
) -> RunResult:
    """Distil a fine-tuned classifier into one of fewer layers, on your own files.

    The student starts from the teacher's own layers. A run of that name that was stopped is resumed; the result of a
    complete one is returned as it is.

    Args:
        teacher: The folder or hub name of the classifier.
        train: A CSV, TSV, JSONL or Parquet file with columns text, label and perhaps text_pair, or with those that
            `changes` names by data.text, data.label and data.text_pair.
        dev: The same, for evaluation.
        num_hidden_layers: The number of layers that the student keeps.
        method: The name of a config in `configs:task/`: "lad", "kd", "pkd", …
        name: The name of the run: everything goes to runs/NAME.
        changes: Values of other keys: {"run.epochs": 3.0, "optim.lr": 1e-4}.
        report: Called with every row of metrics.

    Returns:
        The result: its `export_dir` is the student, its `results` are the scores.

    Raises:
        UserError: An argument, a file or the teacher does not allow the run.
    """
    places = {"teacher.path": str(teacher), "student.path": "teacher", "student.num_hidden_layers": num_hidden_layers}
    files = {"data.task": None, "data.train": str(train), "data.dev": str(dev), "run.name": name}
    config = load_config(f"configs:task/{method}.toml", {**places, **files, **(changes or {})})
    return _train(config, report)


_train = train  # in `distill` the name is that of a file
