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
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lad_dist.config.errors import UserError
from lad_dist.parts import Moment, Part


class Mask(nn.Module):
    """weight [O, I] -> weight · kept. `kept` is True where a weight stays."""

    kept: Tensor
    learns = False  # whether what matters goes on changing after the last weight was to go
    freezes = False  # whether it is about weights that do not change

    def __init__(self, weight: Tensor):
        super().__init__()
        self.register_buffer("kept", torch.ones_like(weight, dtype=torch.bool))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.kept

    def importance(self, weight: Tensor) -> Tensor:
        """[O, I] in fp32: the least important go first."""
        raise NotImplementedError

    def settle(self, threshold: Tensor) -> None:
        """Told whenever weights went: the importance below which."""

    def finish(self) -> None:
        """Told when the last weights have gone."""


class Magnitude(Mask):
    def importance(self, weight: Tensor) -> Tensor:
        return weight.detach().float().abs()


class Random(Mask):
    scores: Tensor

    def __init__(self, weight: Tensor):
        super().__init__(weight)
        # Turned round: the same seed gives AdaptingPaper its start from the same row of random numbers.
        self.register_buffer("scores", torch.rand(weight.shape, device=weight.device).flip(0, 1))

    def importance(self, weight: Tensor) -> Tensor:
        return self.scores.float()


class _Gate(torch.autograd.Function):
    """kept forwards; backwards, to scores S, gradient · slope."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, kept: Tensor, slope: Tensor | float) -> Tensor:
        ctx.slope = slope
        return kept.to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0] * ctx.slope, None, None


class Movement(Mask):
    """Scores S from 0 with ∂L/∂S = ∂L/∂(weight · mask) · weight: they sum up how far each step would move a weight away
    from 0 (Sanh et al., 2020, section 3). S is flat, as a bias is, and does not decay."""

    learns = True

    def __init__(self, weight: Tensor):
        super().__init__(weight)
        self.scores = nn.Parameter(self.start(weight))

    def start(self, weight: Tensor) -> Tensor:
        return torch.zeros(weight.numel(), device=weight.device)

    def slope(self, scores: Tensor) -> Tensor | float:
        """Of the gate that gradients pass."""
        return 1.0

    def forward(self, weight: Tensor) -> Tensor:
        scores = self.scores.view_as(weight)
        return weight * _Gate.apply(scores, self.kept, self.slope(scores.detach()))

    def importance(self, weight: Tensor) -> Tensor:
        return self.scores.detach().float().view_as(weight)


class Adapting(Movement):
    """Scores θ over frozen weights w: gate 1[θ > c] forwards, σ(t (θ - c)) backwards, so that
    ∂L/∂θ = ∂L/∂(w · mask) · w · t σ'(t (θ - c)) (Gao et al., 2021, section 3; the published gate is σ(t_l θ) forwards
    with t_l = 1e5: here t_l → ∞, so that what was trained is what is exported). θ starts at |w|: small weights go first
    while nothing is learnt yet, and what is learnt reorders them."""

    freezes = True
    threshold: Tensor
    sharpness = 1.0  # t

    def __init__(self, weight: Tensor):
        super().__init__(weight)
        self.register_buffer("threshold", torch.zeros((), device=weight.device))

    def start(self, weight: Tensor) -> Tensor:
        return weight.detach().abs().flatten()

    def slope(self, scores: Tensor) -> Tensor:
        open_ = torch.sigmoid(self.sharpness * (scores - self.threshold))
        return self.sharpness * open_ * (1 - open_)

    def settle(self, threshold: Tensor) -> None:
        self.threshold.copy_(threshold)


class AdaptingPaper(Adapting):
    """θ starts at N(0, 0.001²): around 0.01 as published, less what all have in common, which changes nothing."""

    spread = 0.001

    def start(self, weight: Tensor) -> Tensor:
        return self.spread * torch.randn(weight.numel(), device=weight.device)


class Iterative(Mask):
    """A copy of the weight trains while it is pruned by magnitude; then what stays goes back to the weight it started
    from, and no longer changes."""

    freezes = True
    rewound: Tensor

    def __init__(self, weight: Tensor):
        super().__init__(weight)
        self.trained = nn.Parameter(weight.detach().float().flatten().clone())
        self.register_buffer("rewound", torch.zeros((), dtype=torch.bool, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        trained = self.trained.view_as(weight).to(weight.dtype)
        return torch.where(self.rewound, weight, trained) * self.kept

    def importance(self, weight: Tensor) -> Tensor:
        return self.trained.detach().float().abs().view_as(weight)

    def finish(self) -> None:
        self.rewound.fill_(True)


CRITERIA: dict[str, type[Mask]] = {
    "magnitude": Magnitude,
    "random": Random,
    "movement": Movement,
    "adapting": Adapting,
    "adapting_paper": AdaptingPaper,
    "iterative": Iterative,
}


@dataclass(frozen=True)
class Schedule:
    """Sparsity s(p) = s₁ + (s₀ - s₁) (1 - (p - begin) / (end - begin))³ between two shares of the training (Zhu and
    Gupta, 2017), in stairs of `every` steps."""

    sparsity: float
    initial: float = 0.0
    begin: float = 0.0
    end: float = 0.0
    every: int = 1

    def at(self, step: int, steps: int) -> float:
        first, last = self.span(steps)
        if step >= last:
            return self.sparsity
        if step < first:
            return 0.0
        left = 1 - (step - first) / (last - first)
        return self.sparsity + (self.initial - self.sparsity) * left**3

    def span(self, steps: int) -> tuple[int, int]:
        """The steps at which the first and the last weights go: no later than the last step, so that it too trains what
        is exported."""
        last = min(round(self.end * steps), steps - 1)
        return min(round(self.begin * steps), last), last


class Pattern(NamedTuple):
    """Weights that go together. unstructured: each for itself; N:M: of each M neighbours in a row N stay, as sparse
    tensor cores want it; block: rows x columns at a time."""

    kept: int = 0  # N
    group: int = 0  # M
    rows: int = 1
    columns: int = 1

    @classmethod
    def of(cls, text: str) -> Self:
        """Raises ValueError."""
        if text == "unstructured":
            return cls()
        if found := re.fullmatch(r"([1-9]\d*):([1-9]\d*)", text):
            kept, group = map(int, found.groups())
            if kept < group:
                return cls(kept=kept, group=group)
        if found := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text):
            rows, columns = map(int, found.groups())
            return cls(rows=rows, columns=columns)
        raise ValueError('must be "unstructured", N:M as "2:4" with N below M, or rows x columns as "32x1"')

    def check(self, name: str, weight: Tensor, sparsity: float) -> None:
        """Raises UserError where the pattern does not fit."""
        rows, columns = weight.shape
        if self.group and columns % self.group:
            raise UserError(f"surgery prune: {name} has {columns} columns, which {self.group} does not divide")
        if rows % self.rows or columns % self.columns:
            raise UserError(
                f"surgery prune: {name} is {rows} x {columns}, no whole blocks of {self.rows} x {self.columns}"
            )
        if self.group and sparsity > 1 - self.kept / self.group:
            raise UserError(
                f"surgery prune: sparsity = {sparsity:g}, but {self.kept}:{self.group} takes "
                f"{1 - self.kept / self.group:g} away at most"
            )

    def units(self, importance: Tensor) -> Tensor:
        """[O, I] -> importance of what goes together, infinite where it has to stay."""
        if self.group:
            groups = importance.unflatten(1, (-1, self.group))
            stay = groups.topk(self.kept, dim=-1).indices
            return groups.scatter(-1, stay, torch.inf).flatten(1)
        if self.rows * self.columns == 1:
            return importance
        return F.avg_pool2d(importance[None], (self.rows, self.columns))[0]

    def spread(self, units: Tensor) -> Tensor:
        """Back to [O, I]."""
        return units.repeat_interleave(self.rows, 0).repeat_interleave(self.columns, 1)


class Masked(Part):
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

    def fold(self) -> nn.Module:
        """With zeros in its weight."""
        made = copy.deepcopy(self.inner)
        made.weight = nn.Parameter(self.weight.detach().clone())
        return made


class Pruning(Part):
    """What becomes of these masks. `recover`: whether learnt scores may bring weights back."""

    masked: Mapping[str, Masked]

    def __init__(self, masked: Mapping[str, Masked], schedule: Schedule, pattern: Pattern, recover: bool):
        super().__init__()
        self.__dict__["masked"] = masked  # modules of the student, and not of this Part
        self.schedule, self.pattern, self.recover = schedule, pattern, recover
        self.changed: list[Masked] = []
        self.seen = -1
        """The last step that `at` was told."""

    def at(self, moment: Moment) -> None:
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
        return step == last or (step - first) % self.schedule.every == 0

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
        kept = [part.mask.kept for part in self.masked.values()]
        return 1 - sum(int(mask.sum()) for mask in kept) / sum(mask.numel() for mask in kept)

    @torch.no_grad()
    def tighten(self, sparsity: float) -> None:
        """Takes the least important weights away, up to this share of all."""
        parts = self.masked.values()
        ranked = [self.pattern.units(self._importance(part)) for part in parts]
        stays, threshold = _largest(torch.cat([units.flatten() for units in ranked]), sparsity)
        for part, units, kept in zip(parts, ranked, stays.split([u.numel() for u in ranked]), strict=True):
            mask = self.pattern.spread(kept.view_as(units))
            if not torch.equal(mask, part.mask.kept):
                part.mask.kept.copy_(mask)
                self.changed.append(part)
            if threshold is not None:
                part.mask.settle(threshold)

    def _importance(self, part: Masked) -> Tensor:
        found = part.mask.importance(part.origin)
        if part.mask.learns and self.recover:
            return found
        return found.masked_fill(~part.mask.kept, -torch.inf)

    def pruned(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        return ((part.origin, part.mask.kept) for part in self.changed)

    def fold(self) -> None:
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


def prune(
    model: nn.Module, names: Sequence[str], kind: type[Mask], schedule: Schedule, pattern: Pattern, recover: bool
) -> None:
    """Puts masks over the weights of linear maps and embeddings, given by name. Raises UserError where the pattern does
    not fit, a weight has a mask already, or several modules share it."""
    users = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    masked: dict[str, Masked] = {}
    for name in names:
        module, (parent, _, child) = model.get_submodule(name), name.rpartition(".")
        assert isinstance(module, nn.Linear | nn.Embedding)
        pattern.check(name, module.weight, schedule.sparsity)
        if isinstance(model.get_submodule(parent), Masked):
            raise UserError(f"surgery prune: {parent} is pruned already; one surgery can take only what others leave")
        if users[id(module.weight)] > 1:
            raise UserError(f"surgery prune: {name} shares its weight with another module; leave it out of `modules`")
        masked[name] = Masked(module, kind(module.weight))
        setattr(model.get_submodule(parent), child, masked[name])
    number = sum(isinstance(child, Pruning) for child in model.children())
    model.add_module(f"pruning_{number}", Pruning(masked, schedule, pattern, recover))
