"""Metrics of a training: means over the micro-batches between two rows of the log, and the throughput."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lad_dist.core.batch import Batch
from lad_dist.distributed import processes, ranks


@dataclass
class Throughput:
    """Real tokens of this process, since a point in time."""

    tokens: int = 0
    started_at: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """The seconds since then."""
        return time.perf_counter() - self.started_at

    def tokens_per_second(self) -> float:
        """Return the tokens per second of all processes, which call it together."""
        tokens = torch.tensor(float(self.tokens), device=processes.device())
        return processes.means({"": tokens})[""] * ranks.world_size() / self.seconds


@dataclass
class MetricAccumulator:
    """Sums, on the device, of the metrics of micro-batches since the last row.

    Nothing waits for the device until a row is due.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    count: int = 0
    interval: Throughput = field(default_factory=Throughput)  # since the last row
    session: Throughput = field(default_factory=Throughput)

    def add(self, batch: Batch, values: Mapping[str, Tensor]) -> None:
        """Add the metrics of a micro-batch: scalars by name."""
        for name, value in values.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value.to(torch.float32, copy=True)
        self.count += 1
        self.interval.tokens += batch.num_tokens
        self.session.tokens += batch.num_tokens

    def row(self) -> dict[str, float]:
        """Return means over micro-batches and processes, and the tokens per second of all processes; start anew."""
        means = processes.means({name: value / self.count for name, value in self.sums.items()})
        row = means | {"tokens_per_second": self.interval.tokens_per_second()}
        self.sums, self.count, self.interval = {}, 0, Throughput()
        return row
