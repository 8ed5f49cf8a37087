"""The run folder.

<dir>/<name>/config.toml      as resolved, every default written out
             metrics.jsonl    one row per report; TensorBoard events in tensorboard/
             teacher_layers.png        which teacher layers each student layer read in the end, of lad, alp and emd
             checkpoints/     for resuming: checkpoints.py
             skipped_steps.json     updates that were skipped and why, and the steps that are left out because of them
             stacks/          where each process stood when one of them hung
             lock             held while a process trains there
             crashes.json      how often in a row the run died, and after which checkpoint; absent in good health
             STOP             made by hand: the run saves, stops, and takes the file away
             teacher_cache/         the teacher's, while the run lasts, where teacher.cache names no folder
             export/          for people: config.json, model.safetensors, tokenizer, README.md
             results.json     written last: its presence says that the run is complete
"""

import json
import math
import shutil
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from lad_dist.checkpointing.store import CheckpointStore
from lad_dist.config.errors import EXIT_NO_PROGRESS, EXIT_RUN_AGAIN, UserError
from lad_dist.config.load import dump_config, with_defaults
from lad_dist.config.schema import TrainConfig
from lad_dist.distributed import processes
from lad_dist.runs.model_card import model_card
from lad_dist.utils.atomic_io import append_text, file_lock, write_text

RESULTS = "results.json"
MAX_CRASHES = 3  # in a row without a new checkpoint, after which a run is not begun again
LOOK_EVERY = 1.0  # seconds between looks for STOP: a network file system is asked in vain for hours
LOCK_SECONDS = (
    120.0  # seconds that are left to processes of the life before; a network file system has their locks longer
)
# What changes nothing of what is learnt may differ when a run is taken up again.
CHANGEABLE_KEYS = {
    *(
        f"run.{key}"
        for key in "log_every eval_every save_every keep keep_every check_every max_skips hang_seconds".split()
    ),
    "data.num_workers",
    "teacher.cache",
    "deepspeed.zero_optimization.stage",  # resize.py refuses what it cannot convert
}


class RunOccupied(UserError):
    """Another life of the run goes on. When it has ended, the same command is right."""

    code = EXIT_RUN_AGAIN


class NoProgress(UserError):
    """The run died too often at the same place: trying again would burn the allocation."""

    code = EXIT_NO_PROGRESS


class Run:
    """A run folder, opened for one config. Only the main process writes."""

    def __init__(self, config: TrainConfig):
        self.folder = config.run.folder
        self.checkpoints = CheckpointStore(self.folder / "checkpoints", config.run.keep, config.run.keep_every)
        self.export = self.folder / "export"
        self.teacher_cache = self.folder / "teacher_cache"
        self._metrics = self.folder / "metrics.jsonl"
        self._results = self.folder / RESULTS
        self._config = self.folder / "config.toml"
        self._deaths = self.folder / "crashes.json"
        self._stop = self.folder / "STOP"
        self._lock = self.folder / "lock"
        self._skipped = self.folder / "skipped_steps.json"
        self._looked = -math.inf
        self._tensorboard = str(self.folder / "tensorboard")
        self._board: SummaryWriter | None = None
        self._check_same(config)
        self._text = dump_config(config)

    def _check_same(self, config: TrainConfig) -> None:
        if not self._config.exists():
            return
        before = _flatten(with_defaults(type(config), _config_in(self._config)))
        now = _flatten(tomllib.loads(dump_config(config)))
        changed = sorted(k for k in (before.keys() | now.keys()) - CHANGEABLE_KEYS if before.get(k) != now.get(k))
        if changed:
            key = changed[0]
            raise UserError(
                f"{self.folder}: holds a run with {key} = {before.get(key)!r}, the config says {now.get(key)!r}; "
                "choose another run.name, or remove the folder"
            )

    @property
    def results(self) -> dict[str, Any] | None:
        """What a complete run found, None while it is not complete."""
        return _table_in(self._results) if self._results.exists() else None

    def begin(self, step: int) -> None:
        """Opens the folder for writing from `step` on; rows that a lost stretch had reported after it are dropped: from
        step 0 on, all of them."""
        if not processes.is_main():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self._config, self._text)
        rows = self._metrics.read_text(errors="replace").splitlines() if self._metrics.exists() else []
        kept = [row for row in rows if step and _step_of(row) <= step]
        write_text(self._metrics, "".join(f"{row}\n" for row in kept))
        self._board = SummaryWriter(self._tensorboard, purge_step=step + 1)

    def record(self, row: Mapping[str, Any]) -> None:
        """Adds a row to metrics.jsonl and to TensorBoard. A full disk costs rows, not the run."""
        if not processes.is_main():
            return
        try:
            append_text(self._metrics, json.dumps(row) + "\n")
        except OSError as error:
            print(f"{self._metrics}: the row of step {row['step']} is lost: {error}", file=sys.stderr)
        self._show(lambda board: _add_scalars(board, row))

    def _show(self, add: Callable[[SummaryWriter], None]) -> None:
        """In TensorBoard, as far as the disk lets it."""
        try:
            if self._board is None:
                self._board = SummaryWriter(self._tensorboard)
            add(self._board)
            self._board.flush()
        except OSError:
            self._board = None  # its thread has ended and would say so for ever: the next row makes another

    def finish(self, results: Mapping[str, Any]) -> None:
        """Marks the run complete."""
        if processes.is_main():
            self._draw()
            _write_results(self.folder, results)
            shutil.rmtree(self.teacher_cache, ignore_errors=True)
            self._show(SummaryWriter.close)
        processes.barrier()

    def _draw(self) -> None:
        from lad_dist.runs.plots import teacher_layer_figure  # noqa: PLC0415 (matplotlib: a second at every start)

        rows = [json.loads(row) for row in self._metrics.read_text().splitlines() if _step_of(row) < math.inf]
        figure = teacher_layer_figure(rows)
        if figure is not None:
            figure.savefig(self.folder / "teacher_layers.png", dpi=120)
            self._show(lambda board: board.add_figure("reads", figure, rows[-1]["step"]))

    def newest_checkpoint(self) -> Path | None:
        """The newest valid checkpoint, the same on all processes; None when there never was one. Raises
        NothingToResume."""
        return processes.on_main(self.checkpoints.newest)

    @contextmanager
    def session(self) -> Iterator[None]:
        """The folder, to this run's processes alone; what dies in here is counted. Raises NoProgress instead of a
        fourth try from the same checkpoint."""
        with ExitStack() as stack:
            processes.on_main(lambda: stack.enter_context(self._exclusive_lock()))
            with self._count_crashes():
                yield

    @contextmanager
    def _exclusive_lock(self) -> Iterator[None]:
        """Waits for a life before this one that is still ending. Raises Occupied."""
        end, lock = time.monotonic() + LOCK_SECONDS, ExitStack()
        while True:
            try:
                lock.enter_context(file_lock(self._lock))
                break
            except BlockingIOError:
                if time.monotonic() >= end:
                    raise RunOccupied(
                        f"{self.folder}: another process trains there; wait for its end, or choose another run.name"
                    ) from None
                time.sleep(LOOK_EVERY)
        with lock:
            yield

    @contextmanager
    def _count_crashes(self) -> Iterator[None]:
        state, died = processes.on_main(self._crash_count)
        if died >= MAX_CRASHES:
            raise NoProgress(
                f"{self.folder}: died {died} times in a row at {state}, before another checkpoint was saved; find out "
                f"why in the log, then remove {self._deaths} to try again"
            )
        self._write_deaths({"at": state, "deaths": died + 1})  # of which this life takes one back when it ends well
        try:
            yield
        except (UserError, KeyboardInterrupt):
            self._write_deaths(None)
            raise
        self._write_deaths(None)

    def _crash_count(self) -> tuple[str, int]:
        """The newest checkpoint, and how many lives in a row have ended without another one."""
        state = self.checkpoints.newest_name() or "the beginning"
        try:
            found = json.loads(self._deaths.read_text())
            return state, int(found["deaths"]) if found["at"] == state else 0
        except (OSError, ValueError, KeyError, TypeError):
            return state, 0

    def _write_deaths(self, found: Mapping[str, Any] | None) -> None:
        if not processes.is_main():
            return
        if found is None:
            self._deaths.unlink(missing_ok=True)
        else:
            write_text(self._deaths, json.dumps(found) + "\n")

    def skipped_steps(self) -> list[int]:
        """The steps that the run leaves out, the same on all processes."""
        return processes.on_main(self._read_skipped)["left_out"]

    def _read_skipped(self) -> dict[str, list[Any]]:
        return _table_in(self._skipped) if self._skipped.exists() else {"left_out": [], "skipped": []}

    def record_skip(self, row: Mapping[str, Any], left_out: Sequence[int]) -> None:
        """Notes an update that was skipped, and the steps that are left out from now on."""
        if not processes.is_main():
            return
        print(f"{self.folder}: the update of step {row['step']} was skipped: {row['why']}", file=sys.stderr)
        before = self._read_skipped()["skipped"]
        write_text(self._skipped, json.dumps({"left_out": list(left_out), "skipped": [*before, row]}) + "\n")

    def go_back(self, step: int) -> None:
        """Makes the newest checkpoint one that is not later than the step, where there is one."""
        kept = processes.on_main(partial(self.checkpoints.go_back, step))
        if processes.is_main():
            print(f"{self.folder}: going back to {kept or 'the beginning'}", file=sys.stderr)

    def stop_requested(self) -> bool:
        """Whether the file STOP is there: looked for by the main process, and not at every step."""
        if not processes.is_main() or time.monotonic() - self._looked < LOOK_EVERY:
            return False
        self._looked = time.monotonic()
        return self._stop.exists()

    def clear_stop_request(self) -> None:
        """The wish was granted."""
        if processes.is_main():
            self._stop.unlink(missing_ok=True)


def read_results(folder: Path) -> dict[str, Any]:
    """What a complete run found. Raises UserError where there is none, or no run."""
    file = folder / RESULTS
    if not file.exists():
        raise UserError(f"{folder}: no complete run there, which would have a {RESULTS}")
    found = _table_in(file)
    lacking = [name for name in ("config", "metrics", "student") if not isinstance(found.get(name), dict)]
    if lacking or "parameters" not in found["student"]:
        what = [*lacking, "student.parameters"][0]
        raise UserError(f"{file}: of no run, or damaged (no {what} in it); name the folder of one run")
    return found


def add_to_results(folder: Path, more: Mapping[str, Mapping[str, Any]]) -> None:
    """Into tables of a complete run's results, and its card anew."""
    found = read_results(folder)
    _write_results(folder, found | {name: {**found.get(name, {}), **table} for name, table in more.items()})


def _write_results(folder: Path, results: Mapping[str, Any]) -> None:
    """The last makes the run complete."""
    write_text(folder / "export" / "README.md", model_card(results))
    write_text(folder / RESULTS, json.dumps(results, indent=2) + "\n")


def _config_in(file: Path) -> dict[str, Any]:
    """Raises UserError when it is no TOML."""
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: damaged ({error}); remove the run folder to start afresh") from None


def _table_in(file: Path) -> dict[str, Any]:
    """Raises UserError when it is no JSON object."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: damaged ({error}); remove it to let the run go on") from None
    if not isinstance(found, dict):
        raise UserError(f"{file}: damaged (no JSON object); remove it to let the run go on")
    return found


def _add_scalars(board: SummaryWriter, row: Mapping[str, Any]) -> None:
    for name, value in row.items():
        if name != "step":
            board.add_scalar(name, value, row["step"])


def _step_of(row: str) -> float:
    """Never, for a row that a crash or a full disk cut off."""
    try:
        return json.loads(row)["step"]
    except (ValueError, TypeError, KeyError):
        return math.inf


def _flatten(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for key, value in tables.items():
        rows |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return rows
