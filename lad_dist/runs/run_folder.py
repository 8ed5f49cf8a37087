"""The run folder.

<dir>/<name>/config.toml          as resolved, every default written out
             metrics.jsonl        one row per report; TensorBoard events in tensorboard/, what W&B holds in wandb/
             teacher_layers.png   which teacher layers each student layer read in the end, of lad, alp and emd
             checkpoints/         for resuming: checkpointing/store.py
             skipped_steps.json   updates that were skipped and why, and the steps that the run skips because of them
             stacks/              where each process stood when one of them hung
             lock                 held while a process trains in the folder
             crashes.json         how often in a row the run died, and after which checkpoint; absent in good health
             wandb_run_id         under which a tracker knows the run; mlflow_run_id
             STOP                 made by hand: the run saves, stops, and removes the file
             teacher_cache/       the teacher's outputs, while the run lasts, where teacher.cache names no folder
             export/              for people: config.json, model.safetensors, tokenizer, README.md
             results.json         written last: a run is complete if it exists
"""

import json
import math
import shutil
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
from lad_dist.config.load import dump_config, is_of_earlier_version, with_defaults
from lad_dist.config.schema import CHANGEABLE_KEYS, TrainConfig
from lad_dist.distributed import processes, ranks
from lad_dist.distributed.logs import get_logger
from lad_dist.runs.model_card import model_card
from lad_dist.runs.trackers import Ending, Tracker, start_trackers
from lad_dist.utils.atomic_io import append_text, file_lock, list_files, write_text
from lad_dist.utils.tables import flatten

RESULTS = "results.json"
CRASHES = "crashes.json"
MAX_CRASHES = 3  # in a row without a new checkpoint, after which a run does not begin again
STOP_CHECK_SECONDS = 1.0  # between looks for STOP: a network file system takes long to answer
LOCK_SECONDS = 120.0  # for which a session before this one may hold the lock; a network file system frees it late

logger = get_logger(__name__)


class RunOccupied(UserError):
    """Another session of the run goes on; the same command is right once it has ended."""

    code = EXIT_RUN_AGAIN


class NoProgress(UserError):
    """The run died too often at the same place; another try would waste the allocation."""

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
        self._crashes = self.folder / CRASHES
        self._stop = self.folder / "STOP"
        self._lock = self.folder / "lock"
        self._skipped_steps = self.folder / "skipped_steps.json"
        self._last_stop_check = -math.inf
        self._tensorboard = str(self.folder / "tensorboard")
        self._writer: SummaryWriter | None = None
        self._trackers: list[Tracker] | None = None  # before `begin`
        self._check_same(config)
        self._run_config = config
        self._text = dump_config(config)

    def _check_same(self, config: TrainConfig) -> None:
        if not self._config.exists():
            return
        try:
            tables = tomllib.loads(self._config.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{self._config}: damaged ({error}); remove the run folder to start afresh") from None
        if is_of_earlier_version(tables):
            raise UserError(
                f"{self.folder}: holds a run of an earlier version of lad_dist; choose another run.name, or remove the "
                "folder"
            )
        old = flatten(with_defaults(type(config), tables))
        new = flatten(tomllib.loads(dump_config(config)))
        may_change = CHANGEABLE_KEYS - ({"run.eval_every"} if config.run.best_metric is not None else set())
        changed = sorted(k for k in (old.keys() | new.keys()) - may_change if old.get(k) != new.get(k))
        if changed:
            key = changed[0]
            raise UserError(
                f"{self.folder}: holds a run with {key} = {old.get(key)!r}, the config says {new.get(key)!r}; "
                "choose another run.name, or remove the folder"
            )

    @property
    def results(self) -> dict[str, Any] | None:
        """The results of a complete run; None while it is not complete."""
        return _read_table(self._results) if self._results.exists() else None

    def begin(self, step: int) -> None:
        """Open the folder for writing from a step on.

        Drops the rows of later steps, which a crash has undone; from step 0 on, all rows.
        """
        if not ranks.is_main():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self._config, self._text)
        rows = self._metrics.read_text(errors="replace").splitlines() if self._metrics.exists() else []
        valid = [row for row in rows if step and _step_of(row) <= step]
        write_text(self._metrics, "".join(f"{row}\n" for row in valid))
        self._writer = SummaryWriter(self._tensorboard, purge_step=step + 1)
        if self._trackers is None:
            self._trackers = start_trackers(self._run_config)

    def record(self, row: Mapping[str, Any]) -> None:
        """Add a row to metrics.jsonl, TensorBoard and the trackers; a full disk costs rows, not the run."""
        if not ranks.is_main():
            return
        try:
            append_text(self._metrics, json.dumps(row) + "\n")
        except OSError as error:
            logger.warning("%s: the row of step %s is lost: %s", self._metrics, row["step"], error)

        def add_scalars(writer: SummaryWriter) -> None:
            for name, value in row.items():
                if name != "step":
                    writer.add_scalar(name, value, row["step"])

        self._write_tensorboard(add_scalars)
        for tracker in self._trackers or ():
            tracker.log(row)

    def _write_tensorboard(self, add: Callable[[SummaryWriter], None]) -> None:
        """Add to TensorBoard's events, as far as the disk lets it."""
        try:
            if self._writer is None:
                self._writer = SummaryWriter(self._tensorboard)
            add(self._writer)
            self._writer.flush()
        except OSError:
            self._writer = None  # the thread of this one has ended, each call would raise: the next row opens another

    def finish(self, results: Mapping[str, Any]) -> None:
        """Mark the run complete."""
        if ranks.is_main():
            self._plot_teacher_layers(results["exported_step"])
            for file in list_files(self.export):  # safetensors writes for the owner alone, whatever the umask
                file.chmod(self._config.stat().st_mode & 0o777)
            _write_results(self.folder, results)
            shutil.rmtree(self.teacher_cache, ignore_errors=True)
            self._write_tensorboard(SummaryWriter.close)
        processes.barrier()

    def _plot_teacher_layers(self, exported_step: int) -> None:
        from matplotlib.image import imsave  # noqa: PLC0415 (matplotlib: a second at every start)

        from lad_dist.runs.plots import drawn, teacher_layer_figure  # noqa: PLC0415 (matplotlib as well)

        rows = [json.loads(row) for row in self._metrics.read_text().splitlines() if _step_of(row) <= exported_step]
        figure = teacher_layer_figure(rows)
        if figure is not None:
            image = drawn(figure)
            imsave(self.folder / "teacher_layers.png", image)
            step = rows[-1]["step"]
            self._write_tensorboard(lambda w: w.add_image("teacher_layers", image, step, dataformats="HWC"))

    def newest_checkpoint(self) -> Path | None:
        """Return the newest valid checkpoint, the same on all processes; None where none was ever saved.

        Raises NoValidCheckpoint.
        """
        return processes.on_main(self.checkpoints.newest)

    @contextmanager
    def session(self) -> Iterator[None]:
        """Lock the folder for the processes of this run, and count crashes within.

        Raises NoProgress instead of a fourth try from the same checkpoint.
        """
        with ExitStack() as stack:
            processes.on_main(lambda: self._enter_lock(stack))
            with self._count_crashes(), self._close_trackers():
                yield

    @contextmanager
    def _close_trackers(self) -> Iterator[None]:
        """Tell the trackers in the end how the session ended."""
        ending: Ending = "FAILED"
        try:
            yield
            ending = "FINISHED" if self._results.exists() else "KILLED"
        finally:
            for tracker in self._trackers or ():
                tracker.close(ending)
            self._trackers = None

    def _enter_lock(self, stack: ExitStack) -> None:
        """Lock the folder; wait for a session before this one that is still ending. Raises RunOccupied."""
        end = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                return stack.enter_context(file_lock(self._lock))
            except BlockingIOError:
                if time.monotonic() >= end:
                    raise RunOccupied(
                        f"{self.folder}: another process trains in this folder; wait until it ends, or choose another "
                        "run.name"
                    ) from None
                time.sleep(STOP_CHECK_SECONDS)

    @contextmanager
    def _count_crashes(self) -> Iterator[None]:
        checkpoint, crashes = processes.on_main(self._crash_count)
        if crashes >= MAX_CRASHES:
            raise NoProgress(
                f"{self.folder}: died {crashes} times in a row at {checkpoint}, before another checkpoint was saved; "
                f"find out why in the log, then remove {self._crashes} to try again"
            )
        if ranks.is_main():  # a session that ends well removes the file
            write_text(self._crashes, json.dumps({"at": checkpoint, "crashes": crashes + 1}) + "\n")
        try:
            yield
        except (UserError, KeyboardInterrupt):
            self._remove_crashes()
            raise
        self._remove_crashes()

    def _crash_count(self) -> tuple[str, int]:
        """Return the newest checkpoint, and how many sessions in a row have crashed without another one."""
        checkpoint = self.checkpoints.newest_name() or "the beginning"
        try:
            record = json.loads(self._crashes.read_text())
            return checkpoint, int(record["crashes"]) if record["at"] == checkpoint else 0
        except (OSError, ValueError, KeyError, TypeError):
            return checkpoint, 0

    def _remove_crashes(self) -> None:
        if ranks.is_main():
            self._crashes.unlink(missing_ok=True)

    def skipped_steps(self) -> list[int]:
        """Return the steps that the run skips, the same on all processes."""
        return processes.on_main(self._read_skipped_steps)["skipped_steps"]

    def _read_skipped_steps(self) -> dict[str, list[Any]]:
        if not self._skipped_steps.exists():
            return {"skipped_steps": [], "skipped": []}
        return _read_table(self._skipped_steps)

    def skipped_updates(self) -> int:
        """Return how many steps of the run changed no weight, the same on all processes."""
        record = processes.on_main(self._read_skipped_steps)
        return len({*record["skipped_steps"], *(row["step"] for row in record["skipped"])})

    def record_skip(self, row: Mapping[str, Any], skipped_steps: Sequence[int]) -> None:
        """Record an update that was skipped, and the steps that the run skips from now on."""
        if not ranks.is_main():
            return
        logger.warning("%s: the update of step %s was skipped: %s", self.folder, row["step"], row["why"])
        rows = [*self._read_skipped_steps()["skipped"], row]
        write_text(self._skipped_steps, json.dumps({"skipped_steps": list(skipped_steps), "skipped": rows}) + "\n")

    def go_back(self, step: int) -> None:
        """Remove the checkpoints that are later than the step."""
        checkpoint = processes.on_main(partial(self.checkpoints.go_back, step))
        logger.warning("%s: going back to %s", self.folder, checkpoint or "the beginning")

    def stop_requested(self) -> bool:
        """Return whether the file STOP exists; the main process looks for it, and not at every step."""
        if not ranks.is_main() or time.monotonic() - self._last_stop_check < STOP_CHECK_SECONDS:
            return False
        self._last_stop_check = time.monotonic()
        return self._stop.exists()

    def clear_stop_request(self) -> None:
        """Remove the file STOP: the run stops."""
        if ranks.is_main():
            self._stop.unlink(missing_ok=True)


def read_results(folder: Path) -> dict[str, Any]:
    """Return the results of a complete run; raise UserError where the folder holds none."""
    file = folder / RESULTS
    if not file.exists():
        raise UserError(f"{folder}: holds no complete run: it lacks {RESULTS}")
    results = _read_table(file)
    missing = [name for name in ("config", "metrics", "student") if not isinstance(results.get(name), dict)]
    if missing or "parameters" not in results["student"]:
        key = [*missing, "student.parameters"][0]
        raise UserError(f"{file}: of no run, or damaged (no {key} in it); name the folder of one run")
    return results


def add_to_results(folder: Path, more: Mapping[str, Mapping[str, Any]]) -> None:
    """Merge tables into the results of a complete run, and write the model card anew."""
    results = read_results(folder)
    _write_results(folder, results | {name: {**results.get(name, {}), **table} for name, table in more.items()})


def _write_results(folder: Path, results: Mapping[str, Any]) -> None:
    """Write the model card and results.json, which comes last: it makes the run complete."""
    write_text(folder / "export" / "README.md", model_card(results))
    write_text(folder / RESULTS, json.dumps(results, indent=2) + "\n")


def _read_table(file: Path) -> dict[str, Any]:
    """Return the object of a JSON file; raise UserError where it is damaged."""
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: damaged ({error}); remove it to let the run go on") from None
    if not isinstance(table, dict):
        raise UserError(f"{file}: damaged (no JSON object); remove it to let the run go on")
    return table


def _step_of(row: str) -> float:
    """Return the step of a row; infinity for a row that a crash or a full disk cut off."""
    try:
        return json.loads(row)["step"]
    except (ValueError, TypeError, KeyError):
        return math.inf
