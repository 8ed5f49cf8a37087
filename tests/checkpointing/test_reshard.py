"""A run continues under another number of processes or another ZeRO stage as if nothing had changed."""

import itertools
import shutil
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import sweep
import torch
import toy
from checkpoint_damage import Bomb
from conftest import World
from deepspeed.accelerator import get_accelerator
from deepspeed.checkpoint import ds_to_universal
from deepspeed.utils.tensor_fragment import fragment_address
from hypothesis import given
from hypothesis import strategies as st
from resharding import State, Stretch, run, start, state

from lad_dist.checkpointing import reshard
from lad_dist.config.errors import UserError
from lad_dist.distributed import processes

STEPS, SAVED = 8, 2


def layout(name: str) -> dict[str, int]:
    """Return the layout of PROCESSESxSTAGE."""
    return {"processes": int(name[0]), "zero": int(name[2])}


# LAD has all four parameter groups, two of them of a few numbers; emd a state beside parameters; the MLM head is tied
# to the embedding; masks are buffers, and their scores parameters. In bf16 stage 1 has an optimizer of its own when
# gradients are summed in fp32.
LAYOUTS = {
    "lad": ("1x0", "1x1", "1x2", "2x0", "2x1", "2x2"),
    "emd": ("1x0", "2x2"),
    "minilm": ("1x0", "2x1"),
    "bf16": ("1x2", "2x1"),
    "pruned": ("1x1", "2x1"),
}
LAST = "2x1"  # of the chains of those three
if sweep.enabled:
    LAYOUTS |= {kind: (*names, "2x2") for kind, names in LAYOUTS.items() if "2x2" not in names}
    LAST = "2x2"
PAIRS = [(kind, was, now) for kind, names in LAYOUTS.items() for was, now in itertools.product(names, repeat=2)]
# What a run begins as, and what it goes on as from one step and from another.
CHAINS = {
    ("lad", "2x1", 1, "1x0", 3, "2x2"),
    ("lad", "2x1", 3, "1x2", 6, "2x0"),
    ("lad", "2x1", 5, "1x1", 7, "2x1"),
    ("emd", "2x2", 3, "1x0", 5, "2x2"),
    ("minilm", "2x1", 2, "1x0", 5, LAST),
    ("bf16", "2x1", 3, "1x2", 5, LAST),
    ("pruned", "2x1", 3, "1x1", 5, LAST),
}


def config(kind: str, world: World) -> dict[str, Any]:
    """Two micro-batches, so that the sum over processes is the sum over micro-batches in the same order."""
    if kind == "minilm":
        tables = toy.corpus_config(
            Path(), world.corpus, world.pretrained, world.pretrained, objective={"name": "minilm"}
        )
    else:
        tables = toy.task_config(Path(), world.files, world.teacher, world.pretrained)
    if kind == "emd":
        tables["objective"] = {"name": "emd", "attention": 1.0, "hidden": 1.0}
    if kind == "pruned":  # masks are tightened before the first cut, between the cuts and after the second
        masks = {"name": "prune", "sparsity": 0.6, "end": 0.8, "update_every": 2}
        tables["compression"] = [
            {"name": "low_rank", "keep": 0.8, "embeddings": 0.8},
            {**masks, "criterion": "movement"},
        ]
    if kind == "bf16":
        tables["deepspeed"] = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
        tables["teacher"]["dtype"] = "float32"  # a CPU may have no arithmetic for less
    tables["run"] |= {"name": kind, "steps": STEPS}
    tables["student"] |= {"dropout": 0.1, "attention_dropout": 0.1}
    tables["data"] |= {"micro_batches_per_step": 2, "num_workers": 0}
    return tables


class Runs:
    """All stretches of this file, those of two processes in two launches.

    The runs in LAYOUTS go to SAVED, and those that begin CHAINS to the end. Then one engine of each layout loads all
    checkpoints of SAVED, and continues with its chain.
    """

    def __init__(self, world: World, work: Path):
        self.first = {
            (kind, name): Stretch(config(kind, world), layout(name), str(work / f"{kind}-{name}"), 0, SAVED, [SAVED])
            for kind, names in LAYOUTS.items()
            for name in names
        }
        self.resumed = {
            (kind, now): Stretch(run.config, run.layout, f"{run.folder}-resumed", starts=self._saved(kind))
            for (kind, now), run in self.first.items()
        }
        for kind, first, cut, second, again, third in sorted(CHAINS):
            whole, middle, end = self.first[kind, first], self.resumed[kind, second], self.resumed[kind, third]
            whole.last = STEPS
            whole.saves.append(cut)
            middle.starts.append(whole.checkpoint(cut))
            middle.first, middle.last, middle.saves = cut, again, [again]
            end.starts.append(middle.checkpoint(again))
            end.first, end.last = again, STEPS
        run([*self.first.values()])
        run([*self.resumed.values()])

    def _saved(self, kind: str) -> list[tuple[str, dict[str, int]]]:
        return [self.first[kind, name].checkpoint(SAVED) for name in LAYOUTS[kind]]


@pytest.fixture(scope="module")
def runs(world: World, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(world, tmp_path_factory.mktemp("runs"))


def numbers(state: Any, place: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """All that is in a state as tensors, by where it is. A moment that is not there yet is 0."""
    if isinstance(state, dict):
        for key, value in state.items():
            yield from numbers(value, f"{place}/{key}")
    elif isinstance(state, list | tuple):
        for index, value in enumerate(state):
            yield from numbers(value, f"{place}/{index}")
    elif isinstance(state, torch.Tensor):
        yield place, state
    elif isinstance(state, int | float):
        yield place, torch.tensor(float(state))


def difference(one: State, other: State) -> float:
    """The largest of any two numbers that correspond."""
    left, right = dict(numbers(one)), dict(numbers(other))
    assert left.keys() == right.keys()
    return max((left[name].double() - right[name].double()).abs().max().item() for name in left)


@pytest.mark.processes
@pytest.mark.parametrize(("kind", "was", "now"), PAIRS)
def test_the_loaded_state_is_the_saved_one(kind: str, was: str, now: str, runs: Runs) -> None:
    """Bit for bit: weights, fp32 copies, moments, the objective's state, counters, rates.

    One engine loads several checkpoints, one after another.
    """
    saved = runs.first[kind, was].states["saves"][SAVED]
    loaded = runs.resumed[kind, now].states["starts"][LAYOUTS[kind].index(was)]
    assert len(saved["parameters"]) > 20
    assert saved["counts"] == [[SAVED]] * len(saved["counts"])
    assert difference(saved, loaded) == 0


@pytest.mark.processes
@pytest.mark.parametrize(("kind", "first", "cut", "second", "again", "third"), sorted(CHAINS))
def test_a_run_that_changes_layout_twice_ends_as_one_that_does_not(
    kind: str, first: str, cut: int, second: str, again: int, third: str, runs: Runs
) -> None:
    """The same samples in the same micro-batches, and the same bits under ZeRO's stages 1 and 2 in fp32.

    Stage 0 works tensor by tensor, and torch's fused AdamW rounds the last elements of a tensor in another way.
    """
    whole, middle, end = (
        x.states for x in (runs.first[kind, first], runs.resumed[kind, second], runs.resumed[kind, third])
    )
    assert middle["samples"] | end["samples"] == {key: x for key, x in whole["samples"].items() if key[0] >= cut}
    states = [{name: x["fp32"] for name, x in state["end"]["parameters"].items()} for state in (whole, end)]
    if all(name[2] != "0" for name in (first, second, third)) and kind != "bf16":
        assert difference(*states) == 0
    assert difference(*states) <= (1e-3 if kind == "bf16" else 1e-6)


@pytest.mark.processes
def test_it_reads_the_same_numbers_as_deepspeeds_converter(runs: Runs, tmp_path: Path) -> None:
    folder, out = Path(runs.first["lad", "2x1"].checkpoint(SAVED)[0]), tmp_path / "universal"
    ds_to_universal.main(
        Namespace(
            input_folder=str(folder / "state"), output_folder=str(out), num_extract_workers=1, num_merge_workers=1,
            keep_temp_folder=False, strict=True, inject_missing_state=False,
        )
    )  # fmt: skip
    saved = reshard._read_state(None, folder, layout("2x1"))
    names = {path.parent.relative_to(out / "zero").as_posix() for path in out.rglob("exp_avg.pt")}
    assert saved.pieces.keys() == names
    for name in names:
        for key, values in saved.values(name):
            converted = torch.load(out / "zero" / name / f"{key}.pt")["param"]
            assert torch.equal(values, converted.flatten()), (name, key)


class Half(torch.nn.Module):
    """Beside what trains, a frozen layer and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.frozen = (torch.nn.Linear(3, 3) for _ in range(3))
        self.frozen.requires_grad_(False)
        self.register_buffer("buffer", torch.randn(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.frozen(self.second(self.first(x))).square().mean()


def half_engine(stage: int, seed: int) -> Any:
    torch.manual_seed(seed)
    module = Half()
    groups = [{"params": [*layer.parameters()], "lr": 1e-2} for layer in (module.first, module.second)]
    options = {
        "train_batch_size": 1,
        "fp16": {"enabled": True, "initial_scale_power": 4, "loss_scale_window": 2},
        "zero_optimization": {"stage": stage},
    }
    engine, *_ = deepspeed.initialize(model=module, optimizer=torch.optim.AdamW(groups), config=options)
    return engine


def test_fp16_keeps_the_loss_scale_and_frozen_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processes.start()
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    monkeypatch.setattr(deepspeed.ops, "__compatible_ops__", {})
    before = None
    for number, (was, now) in enumerate(itertools.pairwise((0, 1, 0, 2, 1, 2, 0))):
        engine = half_engine(was, seed=number)
        if before is not None:
            reshard.load_checkpoint(engine, tmp_path / str(number - 1), *before)
        for _ in range(3):
            loss = engine(torch.randn(2, 3).half())
            engine.backward(loss)
            engine.step()
        engine.save_checkpoint(str(tmp_path / str(number)), tag=reshard.TAG, save_latest=False)
        before = layout(f"1x{was}"), layout(f"1x{now}")
        other = half_engine(now, seed=100)
        reshard.load_checkpoint(other, tmp_path / str(number), *before)
        assert difference(state(engine), state(other)) == 0
        assert state(other)["scale"][0] > 16


@pytest.mark.processes
@pytest.mark.parametrize("zipped", [True, False])
def test_no_file_of_a_checkpoint_executes_anything(zipped: bool, runs: Runs, world: World, tmp_path: Path) -> None:
    source = Path(runs.first["lad", "2x1"].checkpoint(SAVED)[0]) / "state"
    trainer = start(Stretch(config("lad", world), layout("1x0"), str(tmp_path)))
    names = sorted(path.name for path in source.iterdir())
    assert len(names) == 3  # the module's, and two shares of the optimizer
    for name in names:
        checkpoint = tmp_path / name
        shutil.copytree(source, checkpoint / "state")
        bomb = Bomb(tmp_path / "exploded")
        torch.save({"optimizer_state_dict": bomb}, checkpoint / "state" / name, _use_new_zipfile_serialization=zipped)
        with pytest.raises(UserError) as caught:
            reshard.load_checkpoint(trainer.engine, checkpoint, layout("2x1"), layout("1x0"))
        assert str(caught.value).startswith(f"{checkpoint / 'state' / name}: holds more than tensors")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.processes
def test_shares_that_are_not_where_deepspeed_says_are_refused(runs: Runs, world: World, tmp_path: Path) -> None:
    source = Path(runs.first["lad", "2x1"].checkpoint(SAVED)[0]) / "state"
    shutil.copytree(source, tmp_path / "state")
    (path,) = tmp_path.glob("state/*rank_1_mp*")
    share = reshard.read(path)
    slices = share["optimizer_state_dict"]["param_slice_mappings"][0]
    next(iter(slices.values())).start += 1
    torch.save(share, path)
    trainer = start(Stretch(config("lad", world), layout("1x0"), str(tmp_path)))
    with pytest.raises(
        UserError, match="saved by 2 processes under ZeRO 1, the run now has 1 under ZeRO 0, and the opt"
    ):
        reshard.load_checkpoint(trainer.engine, tmp_path, layout("2x1"), layout("1x0"))


@pytest.mark.parametrize(("was", "now"), [("2x3", "1x3"), ("2x3", "2x1"), ("2x0", "2x3")])
def test_zero_3_stays_as_it_is(was: str, now: str) -> None:
    with pytest.raises(UserError) as caught:
        reshard.load_checkpoint(None, Path("step-000000010"), layout(was), layout(now))
    assert str(caught.value).startswith("step-000000010: saved by 2 processes under ZeRO ")
    assert str(caught.value).endswith("; resume ZeRO 3 with the layout that it was saved with")


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6), ranks=st.integers(1, 5), alignment=st.integers(1, 4))
def test_shares_make_a_whole(sizes: list[int], ranks: int, alignment: int) -> None:
    """Parameters end to end, padded, cut into equal shares: some hold pieces of one, some padding alone."""
    total = sum(sizes)
    flat = torch.zeros(-(-total // (alignment * ranks)) * alignment * ranks)
    flat[:total] = torch.arange(1, total + 1)
    span, saved = len(flat) // ranks, reshard._SavedState()
    for rank in range(ranks):
        share_weights, slices, position = flat[rank * span : (rank + 1) * span], {}, 0
        for number, size in enumerate(sizes):
            first, last = max(position, rank * span), min(position + size, (rank + 1) * span)
            if first < last:
                slices[f"p{number}"] = fragment_address(numel=last - first, start=first - rank * span)
            position += size
        state = {0: {"exp_avg": -share_weights, "step": torch.tensor(7.0)}}
        share = {"base_optimizer_state": {"state": state}, "param_slice_mappings": [slices]}
        reshard._add_share(saved, share | {"single_partition_of_fp32_groups": [share_weights]})
    assert saved.counts == [{"step": 7.0}]
    for number, piece in enumerate(flat[:total].split(sizes)):
        values = dict(saved.values(f"p{number}"))
        assert torch.equal(values["fp32"], piece)
        assert torch.equal(values["exp_avg"], -piece)
