"""Metrics of a training: means over the micro-batches between two rows of the log."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lad_dist.core.batch import Batch
from lad_dist.distributed import processes


@dataclass
class MetricAccumulator:
    """Sums, on the device, of the metrics of micro-batches since the last row.

    Nothing waits for the device until a row is due.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    count: int = 0
    tokens: int = 0
    started_at: float = field(default_factory=time.perf_counter)

    def add(self, batch: Batch, values: Mapping[str, Tensor]) -> None:
        """Add the metrics of a micro-batch: scalars by name."""
        for name, value in values.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value.to(torch.float32, copy=True)
        self.count += 1
        self.tokens += batch.num_tokens

    def row(self) -> dict[str, float]:
        """Return means over micro-batches and processes, and the tokens per second of all processes; start anew."""
        values = {name: value / self.count for name, value in self.sums.items()}
        device = next(iter(values.values())).device
        means = processes.means(values | {"tokens": torch.tensor(float(self.tokens), device=device)})
        means["tokens_per_second"] = (
            means.pop("tokens") * processes.world_size() / (time.perf_counter() - self.started_at)
        )
        self.__init__()  # type: ignore[misc]
        return means
