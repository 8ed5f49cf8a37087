"""The compression `heads`: attention heads and feed-forward units that matter least go while the student trains.

    Heads               the compression
    UnitMask            which heads of an attention, or units of a feed-forward block, stay, and how important each is
    PrunedOutputs       the compressed module of a linear map that computes these heads or units
    PrunedInputs        the compressed module of the linear map that reads them; it measures their importance
    ImportancePruning   moves the masks of all layers along a schedule

A gate ξ = 1 stands before the map that reads a head. The importance of the head is E |∂L/∂ξ|, a mean over tokens, for
any loss L (Michel, Levy and Neubig, NeurIPS 2019, equations 4 and 5). Each layer's importances are divided by their
norm, and all layers are ranked together. A feed-forward unit is treated as a head of size 1. Backward passes of the
training measure importance, so no further pass runs. Each layer keeps at least one head and one unit.

The ordinary export keeps its shape: the rows and columns of what went are 0. The compact form lacks them.

G heads or units of a layer, each d numbers wide; N tokens.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from lad_dist.compression.base import NO_DATA, Compression, CompressionContext, RunSettings
from lad_dist.compression.compressed_module import CompressedModule
from lad_dist.compression.options import Begin, End, UpdateEvery
from lad_dist.compression.products import copy_linear
from lad_dist.compression.pruning.module import ScheduledPruning, add_pruning, largest
from lad_dist.compression.pruning.schedule import Schedule, check_span
from lad_dist.config.errors import UserError
from lad_dist.core.step_state import StepState
from lad_dist.distributed import processes
from lad_dist.models import families
from lad_dist.models.dims import encoder_layers
from lad_dist.models.loading import PreTrainedModel

PATIENCE = 20  # steps that pruning waits for a layer that the loss does not reach
HEAD_ROLES = ("query", "key", "value", "qkv")


class UnitMask(nn.Module):
    """Which of G heads or units stay, and what backward passes measured of their importance.

    Attributes:
        keep: bool [G], True where one stays.
        importance: fp32 [G], of all processes: a moving sum over steps.
        measured: fp32 [G], of this process in this step.
    """

    keep: Tensor

    def __init__(self, count: int, size: int, device: torch.device):
        super().__init__()
        self.size = size
        self.register_buffer("keep", torch.ones(count, dtype=torch.bool, device=device))
        # Not buffers, which DeepSpeed would cast to bf16.
        self.importance = torch.zeros(count, device=device)
        self.measured = torch.zeros(count, device=device)

    def columns(self, repeats: int = 1) -> Tensor:
        """Return bool [repeats · G · d]: where the numbers of heads or units stay."""
        return self.keep.repeat_interleave(self.size).repeat(repeats)

    def measure(self, x: Tensor, gradient: Tensor) -> None:
        """Add |∂L/∂ξ| of each token, from the gated numbers [..., G · d] and the gradient of the loss."""
        products = (x.float() * gradient.float()).unflatten(-1, (len(self.keep), self.size))
        self.measured = self.measured.to(x.device)
        self.measured += products.sum(dim=-1).abs().flatten(0, -2).sum(dim=0)


class _MeasuredGate(torch.autograd.Function):
    """x · gate forwards; backwards it also measures importance."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, mask: UnitMask) -> Tensor:
        ctx.save_for_backward(x, gate)
        ctx.mask = mask
        return x * gate

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, gate = ctx.saved_tensors
        ctx.mask.measure(x, gradients[0])
        return gradients[0] * gate, None, None


class PrunedOutputs(CompressedModule):
    """A linear map whose outputs [N, repeats · G · d] are those of heads or units: 0 where they went."""

    mask: UnitMask

    def __init__(self, inner: nn.Linear, mask: UnitMask):
        super().__init__()
        self.inner = inner
        self.__dict__["mask"] = mask  # not as a submodule: PrunedInputs has it
        self.repeats = inner.out_features // (len(mask.keep) * mask.size)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.mask.columns(self.repeats)

    def merge(self) -> nn.Linear:
        """Return the map with rows of 0."""
        merged, rows = copy.deepcopy(self.inner), self.mask.columns(self.repeats)
        merged.weight = nn.Parameter(merged.weight.detach() * rows[:, None])
        if merged.bias is not None:
            merged.bias = nn.Parameter(merged.bias.detach() * rows)
        return merged

    def to_compact(self) -> nn.Linear:
        """Return the map without the rows of what went."""
        if self.inner.weight.is_meta:
            return self.merge()
        rows = self.mask.columns(self.repeats)
        return copy_linear(self.inner.weight[rows], None if self.inner.bias is None else self.inner.bias[rows])


class PrunedInputs(CompressedModule):
    """A linear map that reads heads or units [N, G · d], with 0 for those that went."""

    def __init__(self, inner: nn.Linear, mask: UnitMask):
        super().__init__()
        self.inner, self.mask = inner, mask

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(_MeasuredGate.apply(x, self.mask.columns().to(x.dtype), self.mask))

    def merge(self) -> nn.Linear:
        """Return the map with columns of 0."""
        merged = copy.deepcopy(self.inner)
        merged.weight = nn.Parameter(merged.weight.detach() * self.mask.columns())
        return merged

    def to_compact(self) -> nn.Linear:
        """Return the map without the columns of what went."""
        if self.inner.weight.is_meta:
            return self.merge()
        return copy_linear(self.inner.weight[:, self.mask.columns()], self.inner.bias)


class ImportancePruning(ScheduledPruning):
    """The schedule of the masks of all layers, which are ranked together by importance."""

    masks: Sequence[UnitMask]

    def __init__(self, masks: Sequence[UnitMask], schedule: Schedule):
        super().__init__(schedule)
        self.__dict__["masks"] = masks  # not as submodules: they are those of the layers
        self.postponed = 0
        """For how many steps pruning waits, as the importance of some layer is not measured yet."""

    def on_step_start(self, state: StepState) -> None:
        super().on_step_start(state)
        if self.postponed:
            self.tighten(self.schedule.sparsity_at(state.step, state.steps))
        if self.postponed > PATIENCE or (self.postponed and state.step == state.steps - 1):
            layer = next(number for number, mask in enumerate(self.masks, start=1) if not mask.importance.any())
            raise UserError(
                f"compression heads: after {state.step} steps the loss says nothing of layer {layer}; raise "
                "run.steps, or take an objective that reads the output of the last layer"
            )

    def is_final(self, state: StepState) -> bool:
        return super().is_final(state) and not self.postponed

    def on_step_end(self) -> None:
        measured = processes.average(torch.cat([mask.measured for mask in self.masks]))
        decay, is_finite = 1 - 1 / self.schedule.update_every, measured.isfinite().all()
        for mask, values in zip(self.masks, measured.split([len(mask.keep) for mask in self.masks]), strict=True):
            importance = mask.importance.to(values.device)
            # A loss that is not finite says nothing, nor does a step without this layer, as Theseus has them.
            mask.importance = torch.where(is_finite & values.any(), decay * importance + values, importance)
            mask.measured = torch.zeros_like(mask.measured)

    @torch.no_grad()
    def tighten(self, sparsity: float) -> None:
        """Let the least important heads or units go, up to this share of all, once all layers are measured."""
        is_measured = all(mask.importance.any() for mask in self.masks)
        self.postponed = 0 if is_measured or not sparsity else self.postponed + 1
        if not is_measured:
            return
        stay, _ = largest(torch.cat([_relative_importance(mask) for mask in self.masks]), sparsity)
        for mask, keep in zip(self.masks, stay.split([len(mask.keep) for mask in self.masks]), strict=True):
            mask.keep.copy_(keep)

    def get_extra_state(self) -> dict[str, Any]:
        importance = [mask.importance.cpu() for mask in self.masks]
        return {**super().get_extra_state(), "importance": importance, "postponed": self.postponed}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        super().set_extra_state(state)
        self.postponed = state["postponed"]
        for mask, importance in zip(self.masks, state["importance"], strict=True):
            mask.importance = importance.to(mask.keep.device)


def _relative_importance(mask: UnitMask) -> Tensor:
    """Return the importance [G] relative to the layer's norm: least for what went, infinite for one that must stay."""
    relative = mask.importance / mask.importance.norm().clamp(min=torch.finfo(torch.float32).tiny)
    relative = relative.masked_fill(~mask.keep, -torch.inf)
    relative[relative.argmax()] = torch.inf
    return relative


@dataclass(frozen=True, kw_only=True)
class Heads(Compression):
    """Prune attention heads and feed-forward units by importance (Michel, Levy and Neubig, NeurIPS 2019)."""

    name = "heads"
    inserts = frozenset({"gates"})

    heads: Annotated[float, Field(ge=0, lt=1, description="share of the attention heads that goes")] = 0.0
    units: Annotated[float, Field(ge=0, lt=1, description="share of the feed-forward units that goes")] = 0.0
    begin: Begin = 0.0
    end: End = 0.5
    update_every: UpdateEvery = 20

    def check(self, spec: RunSettings) -> None:
        """Raise UserError where nothing would go, or before importance is measured."""
        check_span(self.name, self.begin, self.end)
        if not self.heads and not self.units:
            raise UserError("compression heads: heads and units are 0, which leaves all as it is; set one of them")
        if not self.end:
            raise UserError("compression heads: before the first step no importance is measured; set end above 0")

    def apply(self, model: PreTrainedModel, context: CompressionContext = NO_DATA) -> PreTrainedModel:
        """Insert the masks; raise UserError for more heads or units than can go."""
        family, num_heads = families.family_of(model.config), model.config.num_attention_heads
        paths = family.modules.by_role()
        if self.heads:
            if not family.flat:
                raise UserError(
                    f"compression heads: the attention of {model.config.model_type} needs all heads; set heads = 0"
                )
            outputs = [paths[role] for role in HEAD_ROLES if role in paths]
            self._insert(model, "heads", outputs, paths["attention_output"], num_heads)
        if self.units:
            self._insert(model, "units", [paths["intermediate"]], paths["output"])
        return model

    def _insert(
        self, model: PreTrainedModel, option: str, outputs: Sequence[str], reader: str, count: int | None = None
    ) -> None:
        """Insert masks of the heads or units that the maps `outputs` of each layer compute and `reader` reads."""
        share, masks = getattr(self, option), []
        for layer in encoder_layers(model):
            inputs: Any = layer.get_submodule(reader)
            width = inputs.in_features
            mask = UnitMask(count or width, width // (count or width), inputs.weight.device)
            layer.set_submodule(reader, PrunedInputs(inputs, mask))
            for path in outputs:
                inner: Any = layer.get_submodule(path)
                layer.set_submodule(path, PrunedOutputs(inner, mask))
            masks.append(mask)
        total = sum(len(mask.keep) for mask in masks)
        if round(share * total) > total - len(masks):
            raise UserError(
                f"compression heads: {option} = {share:g}, but each of the {len(masks)} layers keeps one; set at most "
                f"{1 - len(masks) / total:.3g}"
            )
        schedule = Schedule(share, begin=self.begin, end=self.end, update_every=self.update_every)
        add_pruning(model, ImportancePruning(masks, schedule))
