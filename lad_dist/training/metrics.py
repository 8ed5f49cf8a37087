"""Metrics of a training: sums on the device between two rows of the log."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lad_dist.core.batch import Batch
from lad_dist.distributed import processes


@dataclass
class MetricAccumulator:
    """Sums on the device of what micro-batches reported since the last row: nothing waits for the device until a row
    is due."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    count: int = 0
    tokens: int = 0
    since: float = field(default_factory=time.perf_counter)

    def add(self, batch: Batch, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value.to(torch.float32, copy=True)
        self.count += 1
        self.tokens += batch.num_tokens

    def row(self) -> dict[str, float]:
        """Means over micro-batches and processes, tokens per second of all processes; starts anew."""
        values = {name: value / self.count for name, value in self.sums.items()}
        device = next(iter(values.values())).device
        means = processes.means(values | {"tokens": torch.tensor(float(self.tokens), device=device)})
        means["tokens_per_second"] = means.pop("tokens") * processes.world_size() / (time.perf_counter() - self.since)
        self.__init__()  # type: ignore[misc]
        return means
