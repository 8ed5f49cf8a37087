"""Parts: compressed pieces of a student.

A Part stands where a plain module stood and trains with the student. `at(moment)` moves its schedule, `penalty()` adds
loss terms, `pruned()` says which weights it has just taken away. Two plain modules have its function: `fold()` returns
one of the kind that stood there, for the ordinary folder that is exported; `compact()` the one that computes least.
Surgeries put Parts in.

    LowRank   a linear map as a product of two thin ones
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn


class Moment(NamedTuple):
    """Where a training stands: the same on all processes."""

    step: int
    steps: int
    seed: int

    @property
    def progress(self) -> float:
        """Of all steps, in [0, 1]."""
        return self.step / self.steps


class Part(nn.Module):
    def at(self, moment: Moment) -> None:
        """Moves schedules, once before the micro-batches of each step. What it leaves behind is a function of the
        moment and of what a checkpoint holds, and so the same on all processes and after a resumption."""

    def pruned(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Weights of which the last `at` took some away, with masks that are True where they stay: the optimizer
        forgets the rest."""
        return iter(())

    def penalty(self) -> dict[str, Tensor]:
        """Weighted loss terms of the Part itself."""
        return {}

    def fold(self) -> nn.Module | None:
        """The plain module with the same function, of the kind that the Part replaced; None where it replaced none."""
        raise NotImplementedError

    def compact(self) -> nn.Module | None:
        """The plain module with the same function that computes least."""
        return self.fold()


class LowRank(Part):
    """x -> B (A x) + b with A [rank, in], B [out, rank]: the truncated SVD of a linear map, the nearest of its rank in
    Frobenius norm (Eckart and Young, 1936). The singular values are shared evenly between A and B, so that both learn
    at one pace."""

    def __init__(self, inner: nn.Linear, outer: nn.Linear):
        super().__init__()
        self.inner = inner
        self.outer = outer

    @classmethod
    def of(cls, linear: nn.Linear, rank: int) -> Self:
        left, values, right = torch.linalg.svd(linear.weight.detach().double(), full_matrices=False)
        root = values[:rank].sqrt()
        inner = nn.Linear(linear.in_features, rank, bias=False)
        outer = nn.Linear(rank, linear.out_features, bias=linear.bias is not None)
        with torch.no_grad():
            inner.weight.copy_(root[:, None] * right[:rank])
            outer.weight.copy_(left[:, :rank] * root)
            if linear.bias is not None:
                outer.bias.copy_(linear.bias)
        return cls(inner, outer)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x))

    def fold(self) -> nn.Module:
        linear = nn.Linear(self.inner.in_features, self.outer.out_features, bias=self.outer.bias is not None)
        with torch.no_grad():
            linear.weight.copy_(self.outer.weight @ self.inner.weight)
            if self.outer.bias is not None:
                linear.bias.copy_(self.outer.bias)
        return linear.to(self.inner.weight.device)

    def compact(self) -> nn.Module:
        """The pair, where it has fewer weights than its product."""
        rows, columns, rank = self.outer.out_features, self.inner.in_features, self.inner.out_features
        return nn.Sequential(self.inner, self.outer) if rank * (rows + columns) < rows * columns else self.fold()


def parts(model: nn.Module) -> list[Part]:
    """The model's Parts, in the order of its modules."""
    return [module for module in model.modules() if isinstance(module, Part)]


def fold(model: nn.Module) -> nn.Module:
    """The model, each Part replaced by the module that it folds into, in place."""
    return _replaced(model, lambda part: part.fold())


def compact(model: nn.Module) -> nn.Module:
    """The model, each Part replaced by the module that computes least, in place."""
    return _replaced(model, lambda part: part.compact())


def _replaced(model: nn.Module, plain: Callable[[Part], nn.Module | None]) -> nn.Module:
    for name, child in list(model.named_children()):
        own = plain(child) if isinstance(child, Part) else child
        if own is None:
            delattr(model, name)
        else:
            setattr(model, name, _replaced(own, plain))
    return model
