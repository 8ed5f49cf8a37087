"""Criteria: masks over weights, and which weights matter.

The scores of Movement and Adapting learn through a gate that is hard forwards and soft backwards. Only their order
counts: rank decides which weights stay, so that the sparsity is what the schedule says. The uniform push by which the
paper lets all scores sink together is here the threshold that rises.

O rows and I columns of a weight.
"""

from typing import Any

import torch
from torch import Tensor, nn


class Mask(nn.Module):
    """weight [O, I] -> weight · keep. `keep` is True where a weight stays."""

    keep: Tensor
    learns = False  # whether importance goes on changing after the last weight was to go
    freezes = False  # whether it is for weights that do not change

    def __init__(self, weight: Tensor):
        super().__init__()
        self.register_buffer("keep", torch.ones_like(weight, dtype=torch.bool))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.keep

    def importance(self, weight: Tensor) -> Tensor:
        """Return the importance [O, I] in fp32: the least important go first."""
        raise NotImplementedError

    def set_threshold(self, threshold: Tensor) -> None:
        """Take note, whenever weights went, of the importance below which they did."""

    def finish(self) -> None:
        """Take note that the last weights have gone."""


class Magnitude(Mask):
    """Large weights stay: |w| (Han et al., 2015)."""

    def importance(self, weight: Tensor) -> Tensor:
        return weight.detach().float().abs()


class Random(Mask):
    """Random numbers, drawn once: the null hypothesis for all others."""

    scores: Tensor

    def __init__(self, weight: Tensor):
        super().__init__(weight)
        # Flipped: the same seed gives AdaptingPaper its start from the same row of random numbers.
        self.register_buffer("scores", torch.rand(weight.shape, device=weight.device).flip(0, 1))

    def importance(self, weight: Tensor) -> Tensor:
        return self.scores.float()


class _StraightThroughGate(torch.autograd.Function):
    """keep forwards; backwards, to scores S, gradient · slope."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, keep: Tensor, slope: Tensor | float) -> Tensor:
        ctx.slope = slope
        return keep.to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0] * ctx.slope, None, None


class Movement(Mask):
    """Scores S from 0 with ∂L/∂S = ∂L/∂(weight · mask) · weight.

    They sum up how far each step would move a weight away from 0 (Sanh et al., 2020, section 3). S is flat, as a bias
    is, and does not decay.
    """

    learns = True

    def __init__(self, weight: Tensor):
        super().__init__(weight)
        self.scores = nn.Parameter(self.start(weight))

    def start(self, weight: Tensor) -> Tensor:
        """Return the scores before training."""
        return torch.zeros(weight.numel(), device=weight.device)

    def slope(self, scores: Tensor) -> Tensor | float:
        """Return the slope of the gate that gradients pass."""
        return 1.0

    def forward(self, weight: Tensor) -> Tensor:
        scores = self.scores.view_as(weight)
        return weight * _StraightThroughGate.apply(scores, self.keep, self.slope(scores.detach()))

    def importance(self, weight: Tensor) -> Tensor:
        return self.scores.detach().float().view_as(weight)


class Adapting(Movement):
    """Scores θ over frozen weights w: the gate is 1[θ > c] forwards, σ(θ - c) backwards.

    So ∂L/∂θ = ∂L/∂(w · mask) · w · σ'(θ - c) ("adapting by pruning", Gao, Colombo and Wang, 2021, section 3). The
    published gate is σ(t_l θ) forwards with t_l = 1e5: here t_l → ∞, so that what was trained is what is exported. θ
    starts at |w|: small weights go first while nothing is learnt yet, and what is learnt reorders them.
    """

    freezes = True
    threshold: Tensor

    def __init__(self, weight: Tensor):
        super().__init__(weight)
        self.register_buffer("threshold", torch.zeros((), device=weight.device))

    def start(self, weight: Tensor) -> Tensor:
        return weight.detach().abs().flatten()

    def slope(self, scores: Tensor) -> Tensor:
        gate = torch.sigmoid(scores - self.threshold)
        return gate * (1 - gate)

    def set_threshold(self, threshold: Tensor) -> None:
        self.threshold.copy_(threshold)


class AdaptingPaper(Adapting):
    """θ starts at N(0, 0.001²): around 0.01 as published, less what all have in common, which changes nothing.

    The paper's 0.001 is read as a standard deviation. As the variance that it says, 38 % of θ would start below 0.
    """

    spread = 0.001

    def start(self, weight: Tensor) -> Tensor:
        return self.spread * torch.randn(weight.numel(), device=weight.device)


class Iterative(Mask):
    """A copy of the weight trains while it is pruned by magnitude (Frankle and Carbin, 2019).

    Then what stays goes back to the weight that the copy started from, and no longer changes.
    """

    freezes = True
    rewound: Tensor

    def __init__(self, weight: Tensor):
        super().__init__(weight)
        self.trained = nn.Parameter(weight.detach().float().flatten().clone())
        self.register_buffer("rewound", torch.zeros((), dtype=torch.bool, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        trained = self.trained.view_as(weight).to(weight.dtype)
        return torch.where(self.rewound, weight, trained) * self.keep

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
