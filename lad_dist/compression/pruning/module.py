"""Pruning: masks over weights, tightened while a student trains.

    Mask       what stands between a weight and those who use it: kind by kind, which weights matter
        Magnitude   large ones (Han et al., 2015)
        Random      drawn once: the null of all others
        Movement    those that training moves away from 0 (Sanh et al., 2020)
        Adapting    scores over weights that never change (Gao, Colombo and Wang, 2021: "adapting by pruning"), from |w|
        AdaptingPaper   the same from noise, as published
        Iterative   those large after training; what stays returns to where it started (Frankle and Carbin, 2019)
    Masked     the Part: a linear map or embedding that is seen through a mask
    Schedule   how many are gone at which step
    Pattern    which weights can only go together
    Pruning    a Part of the whole student: it moves all masks, by one ranking of all their weights

The weight itself stays as it is, and whoever reads it reads weight · mask. Where the mask is 0 it does not learn, and
the optimizer forgets its moments. Masks are a function of the weights, the scores and the step, so that all processes
of ZeRO's stages up to 2 have the same without a word; they are saved with the student.

The scores of Movement and Adapting learn through a gate that is hard forwards and soft backwards. Only their order
counts: which weights stay is decided by rank, so that the sparsity is what the schedule says, and the uniform push by
which the paper lets all scores sink together is the threshold that rises here.

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
    """A linear map or embedding that computes with weight · mask. What else is asked of it, `inner` answers."""

    def __init__(self, inner: nn.Linear | nn.Embedding, mask: Mask):
        super().__init__()
        self.inner, self.mask = inner, mask

    @property
    def origin(self) -> nn.Parameter:
        """The weight without its mask."""
        return cast(nn.Parameter, self.inner.weight)

    @property
    def weight(self) -> Tensor:
        return self.mask(self.origin)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.functional_call(self.inner, {"weight": self.weight}, (x,))

    def merge(self) -> nn.Module:
        """With zeros in its weight."""
        made = copy.deepcopy(self.inner)
        made.weight = nn.Parameter(self.weight.detach().clone())
        return made


class GlobalPruning(CompressedModule):
    """What becomes of these masks. `recover`: whether learnt scores may bring weights back."""

    masked: Mapping[str, MaskedModule]

    def __init__(self, masked: Mapping[str, MaskedModule], schedule: Schedule, pattern: Pattern, recover: bool):
        super().__init__()
        self.__dict__["masked"] = masked  # modules of the student, and not of this Part
        self.schedule, self.pattern, self.recover = schedule, pattern, recover
        self.changed: list[MaskedModule] = []
        self.seen = -1
        """The last step that `at` was told."""

    def on_step_start(self, moment: StepState) -> None:
        self.changed = []
        since, self.seen = self.seen + 1, moment.step  # steps that are left out after damage count all the same
        due = [step for step in range(since, moment.step + 1) if self._due(step, moment.steps)]
        if due:
            self.tighten(self.schedule.at(due[-1], moment.steps))
        if self.schedule.span(moment.steps)[1] in due:
            for part in self.masked.values():
                part.mask.finish()

    def _due(self, step: int, steps: int) -> bool:
        first, last = self.schedule.span(steps)
        if step < first or (step > last and not self.learns):
            return False
        return step == last or (step - first) % self.schedule.update_every == 0

    def get_extra_state(self) -> dict[str, int]:
        return {"seen": self.seen}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.seen = state["seen"]

    @property
    def learns(self) -> bool:
        """Whether what matters goes on changing after the last weight was to go."""
        return any(part.mask.learns for part in self.masked.values())

    @property
    def sparsity(self) -> float:
        """Share of the weights under masks that is gone now."""
        kept = [part.mask.keep for part in self.masked.values()]
        return 1 - sum(int(mask.sum()) for mask in kept) / sum(mask.numel() for mask in kept)

    @torch.no_grad()
    def tighten(self, sparsity: float) -> None:
        """Takes the least important weights away, up to this share of all."""
        parts = self.masked.values()
        ranked = [self.pattern.units(self._importance(part)) for part in parts]
        stays, threshold = _largest(torch.cat([units.flatten() for units in ranked]), sparsity)
        for part, units, kept in zip(parts, ranked, stays.split([u.numel() for u in ranked]), strict=True):
            mask = self.pattern.spread(kept.view_as(units))
            if not torch.equal(mask, part.mask.keep):
                part.mask.keep.copy_(mask)
                self.changed.append(part)
            if threshold is not None:
                part.mask.settle(threshold)

    def _importance(self, part: MaskedModule) -> Tensor:
        found = part.mask.importance(part.origin)
        if part.mask.learns and self.recover:
            return found
        return found.masked_fill(~part.mask.keep, -torch.inf)

    def newly_pruned(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        return ((part.origin, part.mask.keep) for part in self.changed)

    def merge(self) -> None:
        """Zeros lie in the weights, and nothing is left of it."""


def _largest(importance: Tensor, sparsity: float) -> tuple[Tensor, Tensor | None]:
    """Which stay, all but exactly the share `sparsity` of them, the first of equals going first; and the importance of
    the last that goes, if any does."""
    going = round(sparsity * len(importance))
    if not going:
        return torch.ones_like(importance, dtype=torch.bool), None
    threshold = _smallest(importance, going)
    go = importance < threshold
    tied = (importance == threshold).nonzero().flatten()
    go[tied[: going - int(go.count_nonzero())]] = True
    return ~go, threshold


def _smallest(values: Tensor, number: int) -> Tensor:
    """The number-th smallest. On a CPU numpy finds it several times as fast."""
    if values.device.type != "cpu":
        return values.kthvalue(number).values
    return torch.tensor(np.partition(values.numpy(), number - 1)[number - 1])


def insert_masks(
    model: nn.Module, names: Sequence[str], kind: type[Mask], schedule: Schedule, pattern: Pattern, recover: bool
) -> None:
    """Puts masks over the weights of linear maps and embeddings, given by name. Raises UserError where the pattern does
    not fit, a weight has a mask already, or several modules share it."""
    users = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    masked: dict[str, MaskedModule] = {}
    for name in names:
        module, (parent, _, child) = model.get_submodule(name), name.rpartition(".")
        assert isinstance(module, nn.Linear | nn.Embedding)
        pattern.check(name, module.weight, schedule.sparsity)
        if isinstance(model.get_submodule(parent), MaskedModule):
            raise UserError(f"surgery prune: {parent} is pruned already; one surgery can take only what others leave")
        if users[id(module.weight)] > 1:
            raise UserError(f"surgery prune: {name} shares its weight with another module; leave it out of `modules`")
        masked[name] = MaskedModule(module, kind(module.weight))
        setattr(model.get_submodule(parent), child, masked[name])
    number = sum(isinstance(child, GlobalPruning) for child in model.children())
    model.add_module(f"pruning_{number}", GlobalPruning(masked, schedule, pattern, recover))
