"""The run folder.

    <dir>/<name>/config.toml      as resolved, every default written out
                 metrics.jsonl    one row per report; TensorBoard events in tensorboard/
                 reads.png        which teacher layers each student layer read in the end, of lad, alp and emd
                 checkpoints/     for resuming: step-…/ with a manifest, `latest` names the newest
                 answers/         the teacher's, while the run lasts, where teacher.cache names no folder
                 export/          for people: config.json, model.safetensors, tokenizer, README.md
                 results.json     written last: its presence says that the run is complete

A checkpoint is committed, not written: into a temporary folder, a manifest with every file's sha256, all synced, then
renamed. Loading verifies the manifest; a damaged newest one is reported and the one before it is used.
"""

import json
import math
import shutil
import sys
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from lad_dist import processes
from lad_dist.config import TrainConfig, UserError, dump
from lad_dist.disk import commit, files, sha256, write_text

KEEP = 2
# What changes nothing of what is learnt may differ when a run is taken up again.
FREE = {"run.log_every", "run.eval_every", "run.save_every", "data.workers", "teacher.cache"}


class NothingToResume(UserError):
    """Checkpoints are there, none of them valid: a fresh start would hide the loss."""

    code = 3


class Run:
    """A run folder, opened for one config. Only the main process writes."""

    def __init__(self, config: TrainConfig):
        self.folder = config.run.folder
        self.checkpoints = self.folder / "checkpoints"
        self.export = self.folder / "export"
        self.answers = self.folder / "answers"
        self._metrics = self.folder / "metrics.jsonl"
        self._results = self.folder / "results.json"
        self._config = self.folder / "config.toml"
        self._board: SummaryWriter | None = None
        self._check_same(config)
        self._text = dump(config)

    def _check_same(self, config: TrainConfig) -> None:
        if not self._config.exists():
            return
        before, now = (_flatten(tomllib.loads(text)) for text in (self._config.read_text(), dump(config)))
        changed = sorted(k for k in (before.keys() | now.keys()) - FREE if before.get(k) != now.get(k))
        if changed:
            key = changed[0]
            raise UserError(
                f"{self.folder}: holds a run with {key} = {before.get(key)!r}, the config says {now.get(key)!r}; "
                "choose another run.name, or remove the folder"
            )

    @property
    def results(self) -> dict[str, Any] | None:
        """What a complete run found, None while it is not complete."""
        return json.loads(self._results.read_text()) if self._results.exists() else None

    def begin(self, step: int) -> None:
        """Opens the folder for writing from `step` on; rows that a lost stretch had reported after it are dropped: from
        step 0 on, all of them."""
        if not processes.main():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self._config, self._text)
        rows = self._metrics.read_text().splitlines() if self._metrics.exists() else []
        kept = [row for row in rows if step and _step_of(row) <= step]
        write_text(self._metrics, "".join(f"{row}\n" for row in kept))
        self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1)

    def record(self, row: Mapping[str, Any]) -> None:
        """Adds a row to metrics.jsonl and to TensorBoard."""
        if self._board is None:
            return
        with self._metrics.open("a") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in row.items():
            if name != "step":
                self._board.add_scalar(name, value, row["step"])
        self._board.flush()

    def finish(self, results: Mapping[str, Any]) -> None:
        """Marks the run complete."""
        if processes.main():
            self._draw()
            write_text(self.export / "README.md", _card(results))
            write_text(self._results, json.dumps(results, indent=2) + "\n")
            shutil.rmtree(self.answers, ignore_errors=True)
        if self._board is not None:
            self._board.close()
        processes.barrier()

    def _draw(self) -> None:
        from lad_dist.plots import reading  # noqa: PLC0415 (matplotlib: a second at every start)

        rows = [json.loads(row) for row in self._metrics.read_text().splitlines()]
        figure = reading(rows)
        if figure is not None:
            figure.savefig(self.folder / "reads.png", dpi=120)
            assert self._board is not None
            self._board.add_figure("reads", figure, rows[-1]["step"])

    def save(self, step: int, write: Callable[[Path], None], facts: Mapping[str, Any]) -> None:
        """Commits a checkpoint: `write` puts its files into the folder it is given, on all processes."""
        final = self.checkpoints / f"step-{step:09d}"
        draft = final.with_suffix(".draft")
        if processes.main():
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
        processes.barrier()
        write(draft)
        processes.barrier()
        if processes.main():
            _commit(draft, final, facts)
            for old in _saved(self.checkpoints)[:-KEEP]:
                shutil.rmtree(old)
        processes.barrier()

    def newest(self) -> Path | None:
        """The newest valid checkpoint, the same on all processes; None when there never was one. Raises
        NothingToResume."""
        return processes.from_main(_newest_valid(self.checkpoints) if processes.main() else None)


def _step_of(row: str) -> float:
    """Never, for a row that a crash cut off."""
    try:
        return json.loads(row)["step"]
    except ValueError:
        return math.inf


def facts_of(checkpoint: Path) -> dict[str, Any]:
    """What was recorded with a checkpoint."""
    return json.loads((checkpoint / "manifest.json").read_text())["facts"]


def _saved(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.suffix != ".draft") if folder.exists() else []


def _commit(draft: Path, final: Path, facts: Mapping[str, Any]) -> None:
    digests = {str(path.relative_to(draft)): sha256(path) for path in files(draft)}
    write_text(draft / "manifest.json", json.dumps({"facts": facts, "files": digests}, indent=1))
    if final.exists():
        shutil.rmtree(final)
    commit(draft, final)
    write_text(final.parent / "latest", final.name)


def _newest_valid(folder: Path) -> Path | None:
    saved = _saved(folder)
    for checkpoint in reversed(saved):
        fault = _fault(checkpoint)
        if fault is None:
            return checkpoint
        print(f"{checkpoint}: damaged ({fault}), trying the one before it", file=sys.stderr)
    if saved:
        raise NothingToResume(
            f"{folder}: none of the {len(saved)} checkpoints is valid; remove the run folder to start afresh"
        )
    return None


def _fault(checkpoint: Path) -> str | None:
    try:
        digests = json.loads((checkpoint / "manifest.json").read_text())["files"]
        wrong = [name for name, digest in digests.items() if sha256(checkpoint / name) != digest]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return f"{wrong[0]} is not what was written" if wrong else None


def _flatten(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for key, value in tables.items():
        rows |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return rows


def _card(results: Mapping[str, Any]) -> str:
    """The model card: how good, how small, how fast and how faithful, with the command that measured it."""
    config = results["config"]
    rows = [f"| {name} | {_number(value)} |" for name, value in {**results["student"], **results["metrics"]}.items()]
    taught = f", taught by `{config['teacher']['path']}`" if config.get("teacher") else ""
    tags = "".join(f"- {tag}\n" for tag in ("lad_dist", config["objective"]["name"]))
    return (
        f"---\nlibrary_name: transformers\ntags:\n{tags}---\n# {config['run']['name']}\n\n"
        f"A student trained with objective `{config['objective']['name']}`{taught}.\n\n"
        "| measured | value |\n|---|---|\n" + "\n".join(rows) + "\n\n"
        f"Measured by\n```\n{results['command']}\n```\n"
        f"in {results['seconds']:.0f} seconds and {results['steps']} steps on {results['processes']} process(es), "
        f"{results['device']}; metrics are those of the dev set, or of held-out text.\n"
    )


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
