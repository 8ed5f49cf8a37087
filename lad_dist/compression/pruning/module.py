"""Modules with masks, and the ranking that tightens all masks of a student while it trains.

    MaskedModule       the compressed module in the place of a linear map or embedding: it computes with weight · mask
    ScheduledPruning   a compressed module of the whole student: it moves masks along a schedule
    GlobalPruning      the same, by one ranking of all weights under masks
    insert_masks       inserts masks and their GlobalPruning

The weight itself stays as it is, and whoever reads it reads weight · mask. Where the mask is 0 it does not learn, and
the optimizer forgets its moments. Masks are a function of the weights, the scores and the step, so that all processes
of ZeRO's stages up to 2 have the same ones without communication. They are saved with the student.

O rows and I columns of a weight.
"""

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from lad_dist.compression.compressed_module import CompressedModule
from lad_dist.compression.pruning.criteria import Mask
from lad_dist.compression.pruning.schedule import Pattern, Schedule
from lad_dist.config.errors import UserError
from lad_dist.core.step_state import StepState


class MaskedModule(CompressedModule):
    """A linear map or embedding that computes with weight · mask. Its other attributes are those of `inner`."""

    def __init__(self, inner: nn.Linear | nn.Embedding, mask: Mask):
        super().__init__()
        self.inner, self.mask = inner, mask

    @property
    def origin(self) -> nn.Parameter:
        """The weight without its mask."""
        return cast(nn.Parameter, self.inner.weight)

    @property
    def weight(self) -> Tensor:
        """The weight with its mask."""
        return self.mask(self.origin)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.functional_call(self.inner, {"weight": self.weight}, (x,))

    def merge(self) -> nn.Module:
        """Return the inner module with zeros in its weight."""
        merged = copy.deepcopy(self.inner)
        merged.weight = nn.Parameter(self.weight.detach().clone())
        return merged


class ScheduledPruning(CompressedModule):
    """What moves all masks of a student along one schedule. It stands beside the student's modules."""

    def __init__(self, schedule: Schedule):
        super().__init__()
        self.schedule = schedule
        self.last_step = -1
        """The step of the last `on_step_start`."""

    def on_step_start(self, state: StepState) -> None:
        # Steps that were skipped after a bad update count all the same.
        first_step, self.last_step = self.last_step + 1, state.step
        due = [step for step in range(first_step, state.step + 1) if self._is_due(step, state.steps)]
        if due:
            self.tighten(self.schedule.sparsity_at(due[-1], state.steps))
        if self.schedule.span(state.steps)[1] in due:
            self.finish()

    def is_final(self, state: StepState) -> bool:
        """Return whether the last weights have gone; learnt scores may exchange them still."""
        return state.step >= self.schedule.span(state.steps)[1]

    def _is_due(self, step: int, steps: int) -> bool:
        first, last = self.schedule.span(steps)
        if step < first or (step > last and not self.learns):
            return False
        return step == last or (step - first) % self.schedule.update_every == 0

    @property
    def learns(self) -> bool:
        """Whether importance goes on changing after the last weight was to go."""
        return False

    def tighten(self, sparsity: float) -> None:
        """Prune the least important, up to this share of all."""
        raise NotImplementedError

    def finish(self) -> None:
        """Take note that the last have gone."""

    def get_extra_state(self) -> dict[str, int]:
        return {"last_step": self.last_step}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.last_step = state["last_step"]

    def merge(self) -> None:
        """Return None: the zeros are in the weights of the masked modules."""


class GlobalPruning(ScheduledPruning):
    """The schedule of masks that are ranked together. `recover`: whether learnt scores may bring weights back."""

    masked: Mapping[str, MaskedModule]

    def __init__(self, masked: Mapping[str, MaskedModule], schedule: Schedule, pattern: Pattern, recover: bool):
        super().__init__(schedule)
        self.__dict__["masked"] = masked  # not as submodules: they are those of the student
        self.pattern, self.recover = pattern, recover
        self.changed_modules: list[MaskedModule] = []

    def on_step_start(self, state: StepState) -> None:
        self.changed_modules = []
        super().on_step_start(state)

    def finish(self) -> None:
        for module in self.masked.values():
            module.mask.finish()

    @property
    def learns(self) -> bool:
        """Whether importance goes on changing after the last weight was to go."""
        return any(module.mask.learns for module in self.masked.values())

    @property
    def sparsity(self) -> float:
        """The share of the weights under masks that is gone now."""
        masks = [module.mask.keep for module in self.masked.values()]
        return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)

    @torch.no_grad()
    def tighten(self, sparsity: float) -> None:
        """Prune the least important weights, up to this share of all."""
        modules = self.masked.values()
        unit_importance = [self.pattern.units(self._importance(module)) for module in modules]
        stay, threshold = largest(torch.cat([units.flatten() for units in unit_importance]), sparsity)
        stay_by_module = stay.split([units.numel() for units in unit_importance])
        for module, units, units_stay in zip(modules, unit_importance, stay_by_module, strict=True):
            mask = self.pattern.spread(units_stay.view_as(units))
            if not torch.equal(mask, module.mask.keep):
                module.mask.keep.copy_(mask)
                self.changed_modules.append(module)
            if threshold is not None:
                module.mask.set_threshold(threshold)

    def _importance(self, module: MaskedModule) -> Tensor:
        importance = module.mask.importance(module.origin)
        if module.mask.learns and self.recover:
            return importance
        return importance.masked_fill(~module.mask.keep, -torch.inf)

    def newly_pruned(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        return ((module.origin, module.mask.keep) for module in self.changed_modules)


def largest(importance: Tensor, sparsity: float) -> tuple[Tensor, Tensor | None]:
    """Return which stay, all but exactly the share `sparsity` of them, and the importance of the last that goes.

    Of equals, the first ones go first. The importance is None where none goes.
    """
    num_pruned = round(sparsity * len(importance))
    if not num_pruned:
        return torch.ones_like(importance, dtype=torch.bool), None
    threshold = _smallest(importance, num_pruned)
    go = importance < threshold
    tied = (importance == threshold).nonzero().flatten()
    go[tied[: num_pruned - int(go.count_nonzero())]] = True
    return ~go, threshold


def _smallest(values: Tensor, number: int) -> Tensor:
    """Return the number-th smallest."""
    if values.device.type != "cpu":
        return values.kthvalue(number).values
    # numpy is several times as fast on a CPU.
    return torch.tensor(np.partition(values.numpy(), number - 1)[number - 1])


def insert_masks(
    model: nn.Module, names: Sequence[str], kind: type[Mask], schedule: Schedule, pattern: Pattern, recover: bool
) -> None:
    """Put masks over the weights of linear maps and embeddings, given by name.

    Raise UserError where the pattern does not fit, a weight has a mask already, or several modules share it.
    """
    users = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    masked: dict[str, MaskedModule] = {}
    for name in names:
        module, (parent, _, child) = model.get_submodule(name), name.rpartition(".")
        assert isinstance(module, nn.Linear | nn.Embedding)
        pattern.check(name, module.weight, schedule.sparsity)
        if isinstance(model.get_submodule(parent), MaskedModule):
            raise UserError(
                f"compression prune: {parent} is pruned already; match it by `modules` of one compression alone"
            )
        if users[id(module.weight)] > 1:
            raise UserError(f"compression prune: {name} shares the weight of another module; leave it out of `modules`")
        masked[name] = MaskedModule(module, kind(module.weight))
        setattr(model.get_submodule(parent), child, masked[name])
    add_pruning(model, GlobalPruning(masked, schedule, pattern, recover))


def add_pruning(model: nn.Module, pruning: ScheduledPruning) -> None:
    """Register what moves masks of the model, beside its other modules."""
    number = sum(isinstance(child, ScheduledPruning) for child in model.children())
    model.add_module(f"pruning_{number}", pruning)
