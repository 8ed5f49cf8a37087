"""Pruning schedules and patterns: how many weights are gone at which step, and which go together."""

import re
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from lad_dist.config.errors import UserError


@dataclass(frozen=True)
class Schedule:
    """Sparsity s(p) = s₁ + (s₀ - s₁) (1 - (p - begin) / (end - begin))³ between two shares of the training.

    It rises in stairs of `update_every` steps (Zhu and Gupta, 2017).
    """

    sparsity: float
    initial: float = 0.0
    begin: float = 0.0
    end: float = 0.0
    update_every: int = 1

    def sparsity_at(self, step: int, steps: int) -> float:
        """Return the sparsity at a step of `steps`."""
        first, last = self.span(steps)
        if step >= last:
            return self.sparsity
        if step < first:
            return 0.0
        remaining = 1 - (step - first) / (last - first)
        return self.sparsity + (self.initial - self.sparsity) * remaining**3

    def span(self, steps: int) -> tuple[int, int]:
        """Return the steps at which the first and the last weights go.

        They are no later than the last step, so that it too trains what is exported.
        """
        last = min(round(self.end * steps), steps - 1)
        return min(round(self.begin * steps), last), last


def check_span(name: str, begin: float, end: float) -> None:
    """Raise UserError where the schedule of the compression of that name ends before it begins."""
    if begin > end:
        raise UserError(f"compression {name}: begin = {begin:g} is later than end = {end:g}")


class Pattern(NamedTuple):
    """Weights that go together.

    unstructured: each for itself. N:M: of each M neighbours in a row N stay, as sparse tensor cores want it. Block:
    rows x columns at a time.
    """

    keep: int = 0  # N
    group: int = 0  # M
    rows: int = 1
    columns: int = 1

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the pattern that a config names. Raise ValueError."""
        if text == "unstructured":
            return cls()
        if match := re.fullmatch(r"([1-9]\d*):([1-9]\d*)", text):
            keep, group = map(int, match.groups())
            if keep < group:
                return cls(keep=keep, group=group)
        if match := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text):
            rows, columns = map(int, match.groups())
            return cls(rows=rows, columns=columns)
        raise ValueError('must be "unstructured", N:M as "2:4" with N below M, or rows x columns as "32x1"')

    def check(self, name: str, weight: Tensor, sparsity: float) -> None:
        """Raise UserError where the pattern does not fit."""
        rows, columns = weight.shape
        if self.group and columns % self.group:
            raise UserError(f"compression prune: {name} has {columns} columns, which {self.group} does not divide")
        if rows % self.rows or columns % self.columns:
            raise UserError(
                f"compression prune: {name} is {rows} x {columns}, no whole blocks of {self.rows} x {self.columns}"
            )
        if self.group and sparsity > 1 - self.keep / self.group:
            raise UserError(
                f"compression prune: sparsity = {sparsity:g}, but {self.keep}:{self.group} takes "
                f"{1 - self.keep / self.group:g} away at most"
            )

    def units(self, importance: Tensor) -> Tensor:
        """Return the importance of what goes together, infinite where it has to stay, from that of weights [O, I]."""
        if self.group:
            groups = importance.unflatten(1, (-1, self.group))
            stay = groups.topk(self.keep, dim=-1).indices
            return groups.scatter(-1, stay, torch.inf).flatten(1)
        if self.rows * self.columns == 1:
            return importance
        return F.avg_pool2d(importance[None], (self.rows, self.columns))[0]

    def spread(self, units: Tensor) -> Tensor:
        """Return the values of units for their weights [O, I]."""
        return units.repeat_interleave(self.rows, 0).repeat_interleave(self.columns, 1)
