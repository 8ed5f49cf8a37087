"""The state of an engine, read from a checkpoint of any number of processes and of any ZeRO stage up to 2.

    load(engine, checkpoint, was, now)   the one place where an engine's state is read
    read(path)                           the tensors of a file; nothing in it is executed

Under ZeRO-1 and 2 a process saves its share of each parameter group: flat slices of the fp32 weights and of the
moments, and a table of which parameter lies where in them (`param_slice_mappings`, which DeepSpeed's universal
checkpoint is made by). Another layout cuts the same numbers elsewhere. So nothing is converted on disk: each process
maps the files of all shares into memory, and reads out of them those parameters of which its new share holds something,
one at a time.

That replaces DeepSpeed's converter and the loading of what it wrote (ds_to_universal, `load_universal`), which know no
stage 0, leave out buffers and frozen parameters, end in an IndexError where a share is padding alone, write everything
once more, and unpickle whatever the files hold. A test holds both to the same numbers.
"""

import pickle
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor

from lad_dist.config.errors import UserError
from lad_dist.distributed import processes

Layout = Mapping[str, int]  # "processes", and the stage as "zero"

TAG = "state"  # the folder in a checkpoint that DeepSpeed writes to
WEIGHTS = "fp32"  # beside the optimizer's own names of its moments
# All that DeepSpeed's own optimizer files hold beside tensors.
SAFE = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
# What moves of fp16's loss scale; the rest of it is configured.
SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def load_checkpoint(engine: Any, checkpoint: Path, was: Layout, now: Layout) -> None:
    """Weights, buffers, optimizer and counters, saved under layout `was`, into an engine of layout `now`. All processes
    call it together. Raises UserError where ZeRO-3 would have to be cut anew, and for a file of more than tensors."""
    # Without partitions nothing depends on the number of processes.
    if was == now or was["zero"] == now["zero"] == 0:
        engine.load_checkpoint(str(checkpoint), tag=TAG)
        return
    if 3 in (was["zero"], now["zero"]):
        raise UserError(f"{checkpoint}: {_change(was, now)}; ZeRO 3 is resumed with what it was saved with")
    engine.load_checkpoint(str(checkpoint), tag=TAG, load_optimizer_states=False)
    saved = _saved(engine, checkpoint, was)
    wrong = [name for name in processes.all_gather(_mismatch(engine, saved)) if name]
    if wrong:
        raise UserError(
            f"{checkpoint}: {_change(was, now)}, and the optimizer's copy of {wrong[0]} is not where DeepSpeed says; "
            "resume with what it was saved with"
        )
    (_fill if now["zero"] else _fill_whole)(engine, saved)


def read(path: Path, *, mapped: bool = False) -> Any:
    """What torch.save wrote there, on the CPU. `mapped`: tensors are read when they are touched. Raises UserError for
    what is neither a tensor, plain data, nor one of SAFE."""
    try:
        with torch.serialization.safe_globals(SAFE):
            mapped = mapped and zipfile.is_zipfile(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError:
        raise UserError(f"{path}: holds more than tensors, and nothing of it was run; remove the checkpoint") from None


def _change(was: Layout, now: Layout) -> str:
    return (
        f"saved by {was['processes']} processes under ZeRO {was['zero']}, now there are {now['processes']} under ZeRO "
        f"{now['zero']}"
    )


@dataclass
class _SavedState:
    """What an optimizer had saved, whole again. Nothing is read before it is asked for."""

    pieces: dict[str, dict[str, list[Tensor]]] = field(default_factory=dict)  # by parameter, WEIGHTS or moment
    counts: list[dict[str, Any]] = field(default_factory=list)  # by group: its number of steps
    scale: dict[str, Any] = field(default_factory=dict)

    def add(self, parameter: str, key: str, piece: Tensor) -> None:
        self.pieces.setdefault(parameter, {}).setdefault(key, []).append(piece.flatten())

    @property
    def keys(self) -> set[str]:
        return {WEIGHTS}.union(*self.pieces.values())

    def values(self, parameter: str) -> Iterator[tuple[str, Tensor]]:
        """WEIGHTS and moments of a parameter, flat, one after another."""
        return ((key, torch.cat(pieces)) for key, pieces in self.pieces[parameter].items())


def _saved(engine: Any, checkpoint: Path, was: Layout) -> _SavedState:
    folder = checkpoint / TAG
    if was["zero"] == 0:
        return _saved_whole(engine, read(folder / "mp_rank_00_model_states.pt", mapped=True))
    saved = _SavedState()
    for rank in range(was["processes"]):
        (path,) = folder.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        _add_share(saved, read(path, mapped=True)["optimizer_state_dict"])
    return saved


def _add_share(saved: _SavedState, share: dict[str, Any]) -> None:
    """What one process of ZeRO-1 or 2 saved. Called in the order of the ranks, along which a parameter goes on."""
    states = share["base_optimizer_state"]["state"]
    pairs = zip(share["param_slice_mappings"], share["single_partition_of_fp32_groups"], strict=True)
    for number, (slices, weights) in enumerate(pairs):
        moments, counts = _parted(states.get(number, {}))
        for parameter, where in slices.items():
            for key, flat in {WEIGHTS: weights, **moments}.items():
                saved.add(parameter, key, flat.narrow(0, where.start, where.numel))
        if number == len(saved.counts):
            saved.counts.append(counts)
    saved.scale = vars(share["loss_scaler"]) if "loss_scaler" in share else {}


def _saved_whole(engine: Any, file: dict[str, Any]) -> _SavedState:
    """Of stage 0, whose optimizer is one for all: torch's own in fp32, in fp16 with fp32 weights beside it."""
    optimizer = file["optimizer"]
    inner = optimizer.get("optimizer_state_dict", optimizer)
    saved = _SavedState(scale=optimizer)
    for number, (names, group) in enumerate(zip(_names(engine), inner["param_groups"], strict=True)):
        weights = optimizer["fp32_groups"][number] if "fp32_groups" in optimizer else [file["module"][n] for n in names]
        saved.counts.append({})
        for name, index, weight in zip(names, group["params"], weights, strict=True):
            moments, counts = _parted(inner["state"].get(index, {}))
            saved.counts[-1] |= counts
            for key, tensor in {WEIGHTS: weight, **moments}.items():
                saved.add(name, key, tensor)
    return saved


def _parted(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The moments, of a parameter's size, and the counts."""
    moments = {key: x for key, x in state.items() if isinstance(x, Tensor) and x.dim()}
    return moments, {key: x for key, x in state.items() if key not in moments}


def groups(engine: Any) -> list[list[Any]]:
    """The parameters of each of the optimizer's groups, in its order, under any stage and precision."""
    for name in ("bit16_groups", "bf16_groups", "fp16_groups"):
        if hasattr(engine.optimizer, name):
            return getattr(engine.optimizer, name)
    return [group["params"] for group in engine.optimizer.param_groups]


def _names(engine: Any) -> list[list[str]]:
    return [[engine.param_names[parameter] for parameter in group] for group in groups(engine)]


def _mismatch(engine: Any, saved: _SavedState) -> str | None:
    """A parameter whose fp32 copy is not the weight that the model has loaded. Parameters are shared out over the
    processes."""
    parameters = [parameter for group in groups(engine) for parameter in group]
    for parameter in parameters[processes.rank() :: processes.world_size()]:
        name = engine.param_names[parameter]
        copy = torch.cat(saved.pieces.get(name, {}).get(WEIGHTS, [torch.empty(0)]))
        if not torch.equal(copy.to(parameter.dtype), parameter.detach().flatten().cpu()):
            return name
    return None


def _fill(engine: Any, saved: _SavedState) -> None:
    """This process's share under ZeRO-1 or 2: the optimizer's own state of this layout, with the numbers saved."""
    optimizer = engine.optimizer
    state = optimizer.state_dict()
    inner = state["base_optimizer_state"]["state"] = {}
    for number, (group, counts) in enumerate(zip(groups(engine), saved.counts, strict=True)):
        (flat,) = optimizer.optimizer.param_groups[number]["params"]
        share = {key: torch.zeros_like(flat) for key in saved.keys}
        for parameter in group:
            if parameter._hp_mapping is not None:  # or all of it lies with others
                _fill_parameter(share, parameter._hp_mapping, saved.values(engine.param_names[parameter]))
        flat.data.copy_(share.pop(WEIGHTS))  # the state's weights are views of it
        if counts:
            inner[number] = share | _copied(counts)
    if hasattr(optimizer, "loss_scaler"):
        _fill_scale(vars(optimizer.loss_scaler), saved)
    optimizer.load_state_dict([state] * processes.world_size(), load_from_fp32_weights=True)


def _fill_parameter(share: dict[str, Tensor], mapping: Any, values: Iterator[tuple[str, Tensor]]) -> None:
    whole, here = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
    for key, value in values:
        share[key].narrow(0, here.start, here.numel).copy_(value.narrow(0, whole.start, whole.numel))


def _fill_whole(engine: Any, saved: _SavedState) -> None:
    """Stage 0: the same numbers by parameter."""
    optimizer = engine.optimizer
    state = optimizer.state_dict()
    inner = state.get("optimizer_state_dict", state)
    inner["state"] = {}
    rows = zip(groups(engine), inner["param_groups"], saved.counts, strict=True)
    for number, (group, words, counts) in enumerate(rows):
        for place, (parameter, index) in enumerate(zip(group, words["params"], strict=True)):
            values = {key: x.view_as(parameter) for key, x in saved.values(engine.param_names[parameter])}
            weights = values.pop(WEIGHTS)
            if "fp32_groups" in state:
                state["fp32_groups"][number][place].data.copy_(weights)
            inner["state"][index] = values | _copied(counts)
    _fill_scale(state, saved)
    optimizer.load_state_dict(state)


def _fill_scale(place: dict[str, Any], saved: _SavedState) -> None:
    place.update({key: saved.scale[key] for key in SCALE if key in place and key in saved.scale})


def _copied(counts: Mapping[str, Any]) -> dict[str, Any]:
    return {key: x.clone() if isinstance(x, Tensor) else x for key, x in counts.items()}
