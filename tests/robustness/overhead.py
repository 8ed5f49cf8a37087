"""What saving and the health checks cost.

usage: LAD_DIST_TEST_DATA=FOLDER python tests/robustness/overhead.py TEACHER FOLDER [STEPS]

TEACHER is a model folder, of which only the encoder is used. The script distils it into three layers on CoLA, in two
processes of one thread each: STEPS steps (default 210, of which the first 10 do not count) with a checkpoint every 100,
the watchdog, the update guard and the replica check. Each of these is timed by itself, as seconds of the processor and
of the wall, and compared with the rest of the main thread: other work on the machine then matters little. What the
other threads cost matters where no core is free for them.
"""

import csv
import functools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chaos
import tomli_w
from chaos import Victim

from lad_dist.data.tokenization.loading import load_tokenizer
from lad_dist.models import loading
from lad_dist.models.loading import save_model

EVERY, WARM_UP = 100, 10
Seconds = list[float]  # of the processor, of the wall


def timed(out: Path) -> None:
    """Write the seconds of each piece of work into a file of each rank."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    from lad_dist.checkpointing.async_save import AsyncCheckpointer
    from lad_dist.distributed.watchdog import Watchdog
    from lad_dist.training.resumption import Resumption
    from lad_dist.training.trainer import Trainer
    from lad_dist.training.update_guard import UpdateGuard

    seconds: dict[str, Seconds] = {}
    for name, owner, method in (
        ("backward, guarded", UpdateGuard, "backward"),
        ("backward", DeepSpeedEngine, "backward"),
        ("update check", UpdateGuard, "action"),
        ("marks", Watchdog, "mark"),
        ("watchdog thread", Watchdog, "_run"),
        ("replica check", Resumption, "check_replicas"),
        ("saving, main thread", AsyncCheckpointer, "on_step_end"),
        ("saving, its thread", AsyncCheckpointer, "_write"),
    ):
        setattr(owner, method, _added_up(getattr(owner, method), name, seconds))
    step, fit, enter, begun = Trainer.train_step, Trainer.fit, Watchdog.__enter__, _now()
    watchdogs: list[Watchdog] = []

    def watched(self: Watchdog) -> Watchdog:
        watchdogs.append(self)
        return enter(self)

    def first(self: Trainer, number: int, *words: Any) -> None:
        nonlocal begun
        if number == WARM_UP:
            seconds.clear()
            begun = _now()
        step(self, number, *words)

    def timed_fit(self: Trainer, *words: Any) -> Any:
        status = fit(self, *words)
        seconds["all"] = [now - then for now, then in zip(_now(), begun, strict=True)]
        watchdogs[0].__exit__(None, None, None)  # its thread adds its seconds when it ends
        out.with_suffix(f".{os.environ['RANK']}").write_text(json.dumps(seconds))
        return status

    Trainer.train_step, Trainer.fit = first, timed_fit  # type: ignore[method-assign]
    Watchdog.__enter__ = watched  # type: ignore[method-assign]


def _now() -> Seconds:
    return [time.thread_time(), time.perf_counter()]


def _added_up(method: Callable[..., Any], name: str, seconds: dict[str, Seconds]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*words: Any, **named: Any) -> Any:
        begin = _now()
        try:
            return method(*words, **named)
        finally:
            spent = [now - then for now, then in zip(_now(), begin, strict=True)]
            seconds[name] = [a + b for a, b in zip(seconds.get(name, [0.0, 0.0]), spent, strict=True)]

    return call


def run(teacher: str, folder: Path, steps: int) -> Victim:
    tables = {
        "run": {"name": "run", "dir": str(folder), "steps": steps, "save_every": EVERY, "replica_check_every": EVERY},
        "teacher": {"path": teacher, "baseline_check": False},
        "student": {"path": teacher, "num_hidden_layers": 3},
        "data": {
            "train": str(folder / "train.csv"), "dev": str(folder / "dev.csv"), "max_length": 128, "num_workers": 0,
            "micro_batch_size": 8, "micro_batches_per_step": 4,
        },
        "objective": {"name": "lad", "hidden": 10.0},
        "optim": {"lr": 5e-5, "objective_lr": 3e-5},
        "deepspeed": {"bf16": {"enabled": False}, "zero_optimization": {"stage": 1}},
    }  # fmt: skip
    path = folder / "run.toml"
    path.write_text(tomli_w.dumps(tables))
    return Victim(folder / "run", path)


def write_data(folder: Path) -> None:
    """1,000 sentences, so that the teacher cache is soon filled."""
    source = Path(os.environ["LAD_DIST_TEST_DATA"]) / "glue" / "CoLA"
    for name, rows in (("train", 1000), ("dev", 100)):
        lines = (source / f"{name}.tsv").read_text().splitlines()[:rows]
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            writer.writerows([line.split("\t")[3], line.split("\t")[1]] for line in lines)


def with_a_head(teacher: str, folder: Path) -> str:
    save_model(loading.load_model(teacher, "classification", labels=("0", "1")), folder)
    load_tokenizer(teacher).save_pretrained(folder)
    return str(folder)


def main() -> None:
    teacher, place, *rest = sys.argv[1:]
    folder, steps = Path(place), int(rest[0]) if rest else 210
    folder.mkdir(parents=True, exist_ok=True)
    write_data(folder)
    victim = run(with_a_head(teacher, folder / "teacher"), folder, steps)
    life = chaos.begin(victim, prepare=functools.partial(timed, folder / "seconds"))
    codes = life.end(7200)
    assert codes == [0, 0], life.output[-3000:]
    size = sum(path.stat().st_size for path in victim.saved[-1].rglob("*") if path.is_file())
    print(f"{steps - WARM_UP} steps; a checkpoint is {size / 1e6:.0f} MB")
    for rank in range(2):
        _print_seconds(rank, json.loads((folder / f"seconds.{rank}").read_text()), steps - WARM_UP)


def _print_seconds(rank: int, seconds: dict[str, Seconds], steps: int) -> None:
    whole, inner = seconds.pop("all"), seconds.pop("backward")
    seconds["guard's backward"] = [a - b for a, b in zip(seconds.pop("backward, guarded"), inner, strict=True)]
    main_thread = [spent for name, spent in seconds.items() if "its thread" not in name and "watch" not in name]
    rest = [whole[kind] - sum(spent[kind] for spent in main_thread) for kind in range(2)]
    print(f"rank {rank}: a step without them {rest[0] / steps:.3f} s of the processor, {rest[1] / steps:.3f} s")
    for name, spent in seconds.items():
        print(f"| {name} | {spent[0] / rest[0]:.2%} of the processor | {spent[1] / rest[1]:.2%} of the wall |")


if __name__ == "__main__":
    main()
