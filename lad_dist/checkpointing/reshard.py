"""Load an engine's state from a checkpoint of any number of processes and of any ZeRO stage up to 2.

Under ZeRO-1 and 2 a process saves its share of each parameter group: flat slices of the fp32 weights and of the
moments, and a table of which parameter lies where in them (`param_slice_mappings`, from which DeepSpeed makes its
universal checkpoint). Another layout cuts the same numbers elsewhere. So nothing is converted on disk: each process
maps the files of all shares into memory, and reads the parameters that its new share holds a piece of, one at a time.

This replaces DeepSpeed's converter and its loader (ds_to_universal, `load_universal`). They know no stage 0, leave out
buffers and frozen parameters, end in an IndexError where a share is padding alone, write everything once more, and
unpickle whatever the files hold. A test compares the numbers of both.
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
from lad_dist.distributed import processes, ranks

Layout = Mapping[str, int]  # number of "processes", and the ZeRO stage as "zero"

TAG = "state"  # the folder in a checkpoint that DeepSpeed writes to
WEIGHTS = "fp32"  # key of the weights, beside the optimizer's keys of the moments
# All classes that DeepSpeed's own optimizer files hold beside tensors.
SAFE_CLASSES = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
# The state of fp16's loss scaler; the rest of it is configured.
LOSS_SCALE_KEYS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def load_checkpoint(engine: Any, checkpoint: Path, saved: Layout, current: Layout) -> None:
    """Load weights, buffers, optimizer and counters of layout `saved` into an engine of layout `current`.

    All processes call it together.

    Raises:
        UserError: ZeRO-3 would have to be cut anew, or a file holds more than tensors.
    """
    # Without partitions nothing depends on the number of processes.
    if saved == current or saved["zero"] == current["zero"] == 0:
        engine.load_checkpoint(str(checkpoint), tag=TAG)
        return
    if 3 in (saved["zero"], current["zero"]):
        raise UserError(
            f"{checkpoint}: {_layout_change(saved, current)}; resume ZeRO 3 with the layout that it was saved with"
        )
    engine.load_checkpoint(str(checkpoint), tag=TAG, load_optimizer_states=False)
    state = _read_state(engine, checkpoint, saved)
    mismatches = [name for name in processes.all_gather(_mismatch(engine, state)) if name]
    if mismatches:
        raise UserError(
            f"{checkpoint}: {_layout_change(saved, current)}, and the optimizer's copy of {mismatches[0]} is not where "
            "DeepSpeed expects it; resume with the layout that it was saved with"
        )
    (_fill if current["zero"] else _fill_whole)(engine, state)


def read(path: Path, *, mapped: bool = False) -> Any:
    """Return what torch.save wrote to the file, on the CPU. `mapped`: tensors are read when they are touched.

    Raises UserError where the file holds anything but tensors, plain data and SAFE_CLASSES.
    """
    try:
        with torch.serialization.safe_globals(SAFE_CLASSES):
            mapped = mapped and zipfile.is_zipfile(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path}: holds more than tensors, and none of it was executed; remove the checkpoint"
        ) from None


def _layout_change(saved: Layout, current: Layout) -> str:
    return (
        f"saved by {saved['processes']} processes under ZeRO {saved['zero']}, the run now has {current['processes']} "
        f"under ZeRO {current['zero']}"
    )


@dataclass
class _SavedState:
    """The saved state of an optimizer by whole parameters; nothing is read before it is used."""

    pieces: dict[str, dict[str, list[Tensor]]] = field(default_factory=dict)  # by parameter, WEIGHTS or moment
    counts: list[dict[str, Any]] = field(default_factory=list)  # by group: the number of steps
    loss_scale: dict[str, Any] = field(default_factory=dict)

    def add(self, parameter: str, key: str, piece: Tensor) -> None:
        """Add the next piece of a parameter's weights or moment."""
        self.pieces.setdefault(parameter, {}).setdefault(key, []).append(piece.flatten())

    @property
    def keys(self) -> set[str]:
        """WEIGHTS and the names of the moments."""
        return {WEIGHTS}.union(*self.pieces.values())

    def values(self, parameter: str) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights and moments of a parameter by key, flat."""
        return ((key, torch.cat(pieces)) for key, pieces in self.pieces[parameter].items())


def _read_state(engine: Any, checkpoint: Path, layout: Layout) -> _SavedState:
    folder = checkpoint / TAG
    if layout["zero"] == 0:
        return _read_unpartitioned(engine, read(folder / "mp_rank_00_model_states.pt", mapped=True))
    saved = _SavedState()
    for rank in range(layout["processes"]):
        (path,) = folder.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        _add_share(saved, read(path, mapped=True)["optimizer_state_dict"])
    return saved


def _add_share(saved: _SavedState, share: dict[str, Any]) -> None:
    """Add what one process of ZeRO-1 or 2 saved; call it in the order of ranks, along which a parameter continues."""
    states = share["base_optimizer_state"]["state"]
    pairs = zip(share["param_slice_mappings"], share["single_partition_of_fp32_groups"], strict=True)
    for number, (slices, weights) in enumerate(pairs):
        moments, counts = _split_state(states.get(number, {}))
        for parameter, address in slices.items():
            for key, flat in {WEIGHTS: weights, **moments}.items():
                saved.add(parameter, key, flat.narrow(0, address.start, address.numel))
        if number == len(saved.counts):
            saved.counts.append(counts)
    saved.loss_scale = vars(share["loss_scaler"]) if "loss_scaler" in share else {}


def _read_unpartitioned(engine: Any, file: dict[str, Any]) -> _SavedState:
    """Return the state of stage 0, whose optimizer is torch's own in fp32, in fp16 with fp32 weights beside it."""
    optimizer = file["optimizer"]
    inner = optimizer.get("optimizer_state_dict", optimizer)
    saved = _SavedState(loss_scale=optimizer)
    for number, (parameters, group) in enumerate(zip(groups(engine), inner["param_groups"], strict=True)):
        names = [engine.param_names[parameter] for parameter in parameters]
        weights = optimizer["fp32_groups"][number] if "fp32_groups" in optimizer else [file["module"][n] for n in names]
        saved.counts.append({})
        for name, index, weight in zip(names, group["params"], weights, strict=True):
            moments, counts = _split_state(inner["state"].get(index, {}))
            saved.counts[-1] |= counts
            for key, tensor in {WEIGHTS: weight, **moments}.items():
                saved.add(name, key, tensor)
    return saved


def _split_state(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the moments, which have a parameter's size, and the counts."""
    moments = {key: x for key, x in state.items() if isinstance(x, Tensor) and x.dim()}
    return moments, {key: x for key, x in state.items() if key not in moments}


def groups(engine: Any) -> list[list[Any]]:
    """Return the parameters of each of the optimizer's groups, in order, under any stage and precision."""
    for name in ("bit16_groups", "bf16_groups", "fp16_groups"):
        if hasattr(engine.optimizer, name):
            return getattr(engine.optimizer, name)
    return [group["params"] for group in engine.optimizer.param_groups]


def _mismatch(engine: Any, saved: _SavedState) -> str | None:
    """Return the name of a parameter whose fp32 copy is not the weight that the model has loaded.

    Each process checks a share of the parameters.
    """
    parameters = [parameter for group in groups(engine) for parameter in group]
    for parameter in parameters[ranks.rank() :: ranks.world_size()]:
        name = engine.param_names[parameter]
        copy = torch.cat(saved.pieces.get(name, {}).get(WEIGHTS, [torch.empty(0)]))
        if not torch.equal(copy.to(parameter.dtype), parameter.detach().flatten().cpu()):
            return name
    return None


def _fill(engine: Any, saved: _SavedState) -> None:
    """Fill this process's share under ZeRO-1 or 2: the optimizer's own state of this layout, with the saved numbers."""
    optimizer = engine.optimizer
    state = optimizer.state_dict()
    inner = state["base_optimizer_state"]["state"] = {}
    for number, (group, counts) in enumerate(zip(groups(engine), saved.counts, strict=True)):
        (flat,) = optimizer.optimizer.param_groups[number]["params"]
        share = {key: torch.zeros_like(flat) for key in saved.keys}
        for parameter in group:
            mapping = parameter._hp_mapping
            if mapping is None:  # other processes hold all of it
                continue
            source, target = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
            for key, value in saved.values(engine.param_names[parameter]):
                share[key].narrow(0, target.start, target.numel).copy_(value.narrow(0, source.start, source.numel))
        flat.data.copy_(share.pop(WEIGHTS))  # the state's weights are views of it
        if counts:
            inner[number] = share | _copied(counts)
    if hasattr(optimizer, "loss_scaler"):
        _fill_loss_scale(vars(optimizer.loss_scaler), saved)
    optimizer.load_state_dict([state] * ranks.world_size(), load_from_fp32_weights=True)


def _fill_whole(engine: Any, saved: _SavedState) -> None:
    """Fill the optimizer of stage 0: the same numbers by parameter."""
    optimizer = engine.optimizer
    state = optimizer.state_dict()
    inner = state.get("optimizer_state_dict", state)
    inner["state"] = {}
    rows = zip(groups(engine), inner["param_groups"], saved.counts, strict=True)
    for number, (group, saved_group, counts) in enumerate(rows):
        for position, (parameter, index) in enumerate(zip(group, saved_group["params"], strict=True)):
            values = {key: x.view_as(parameter) for key, x in saved.values(engine.param_names[parameter])}
            weights = values.pop(WEIGHTS)
            if "fp32_groups" in state:
                state["fp32_groups"][number][position].data.copy_(weights)
            inner["state"][index] = values | _copied(counts)
    _fill_loss_scale(state, saved)
    optimizer.load_state_dict(state)


def _fill_loss_scale(target: dict[str, Any], saved: _SavedState) -> None:
    target.update({key: saved.loss_scale[key] for key in LOSS_SCALE_KEYS if key in target and key in saved.loss_scale})


def _copied(counts: Mapping[str, Any]) -> dict[str, Any]:
    return {key: x.clone() if isinstance(x, Tensor) else x for key, x in counts.items()}
