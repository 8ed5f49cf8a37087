"""BERT-EMD, many-to-many layer mapping by the earth mover's distance (Li et al., EMNLP 2020).

    D^H_ml = MSE(S_m W_h, H_l)       D^A_ml = MSE(A_m, A_l)                              m = 1 … M, l = 1 … L
    F = argmin Σ F_ml D_ml           with row sums w_s, column sums w_t; one plan for each of D^H and D^A
    L = hidden · Σ F^H D^H + attention · Σ F^A D^A + embedding · MSE(E_s W_e, E_t) + hard · CE + soft · T² KL

S_m and H_l [N, D] are outputs of student and teacher layers, A attention scores Q Kᵀ / √d before the softmax (a mean
over heads and pairs of tokens of one sequence), E [N, D] embedding outputs; W_h and W_e are learnt where widths differ.
Numbers of heads must be equal, unless attention = 0. Masses w begin equal; cost attention then shifts them to layers
that are cheap to reach: w_i ∝ exp(Σ_k C_k / (C_i · cost_temperature)), C_i the cost of a unit of w_i, averaged over
both plans. Weights of 0.01 are the authors' 0.005 for two labels, whose soft term is half of ours.

Plans and masses are renewed once a step, from the mean costs of all micro-batches of all processes in the step before;
in the first step every layer learns from every other in proportion to the masses. So a step has one plan, the same on
all processes and however many they are, and the device is waited for once a step. The gradient flows through D alone.
`teacher_layer_weight/m/l` is logged: the share of teacher layer l in what moves to student layer m, by hidden states if they count.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from lad_dist.config.errors import UserError
from lad_dist.core.batch import Batch
from lad_dist.core.outputs import ModelDims, ModelOutputs
from lad_dist.distributed import processes
from lad_dist.objectives import losses, optimal_transport
from lad_dist.objectives.base import check_same_heads, projection, teacher_layer_weights
from lad_dist.objectives.kd import KD, Weight
from lad_dist.objectives.optimal_transport import Array


class EMD(KD):
    def __init__(
        self,
        student: ModelDims,
        teacher: ModelDims,
        *,
        hidden: Weight = 0.01,
        attention: Weight = 0.01,
        embedding: Weight = 0.01,
        cost_temperature: Annotated[float, Field(gt=0, description="the higher, the more equal the masses")] = 1.0,
        soft: Weight = 1.0,
        hard: Weight = 0.0,
        temperature: Annotated[float, Field(gt=0)] = 1.0,
    ):
        super().__init__(student, teacher, soft=soft, hard=hard, temperature=temperature)
        weights = {"hidden": hidden, "attention": attention}
        self.weights = {kind: weight for kind, weight in weights.items() if weight}
        if not self.weights:
            raise UserError("objective.name = emd: hidden and attention are 0, so no layers are compared; take kd")
        if attention:
            check_same_heads("emd", student, teacher)
        self.heads = teacher.num_attention_heads
        self.embedding, self.cost_temperature = embedding, cost_temperature
        self.hidden_projection = projection(student, teacher)
        self.embedding_projection = projection(student, teacher)
        mine, its = (tuple(range(1, shape.num_hidden_layers + 1)) for shape in (student, teacher))
        first = (0,) * bool(embedding)
        self.student_outputs = self.student_outputs._replace(
            hidden=first + mine * bool(hidden), qkv=mine * bool(attention)
        )
        self.teacher_outputs = self.teacher_outputs._replace(
            hidden=first + its * bool(hidden), qkv=its * bool(attention)
        )
        self.masses: Sequence[Array] = [
            np.full(shape.num_hidden_layers, 1 / shape.num_hidden_layers) for shape in (student, teacher)
        ]
        self.plans = dict.fromkeys(self.weights, np.outer(*self.masses))
        self.costs = torch.zeros(len(self.weights), student.num_hidden_layers, teacher.num_hidden_layers)
        """Sums over the micro-batches of this step, means over the processes."""
        self.count = 0

    def on_step_start(self, progress: float) -> None:
        if self.count:
            self.renew((self.costs / self.count).double().cpu().numpy())
        self.costs, self.count = torch.zeros_like(self.costs), 0

    def renew(self, costs: Array) -> None:
        """New plans for costs [1 or 2, M, L], of hidden states and of attention, and the masses that they lead to.
        A step that overflowed changes nothing."""
        if not np.isfinite(costs).all():
            return
        self.plans = {
            kind: optimal_transport.transport_plan(cost, *self.masses)
            for kind, cost in zip(self.plans, costs, strict=True)
        }
        found = zip(self.plans.values(), costs, strict=True)
        sides = [optimal_transport.masses(plan, cost, self.cost_temperature) for plan, cost in found]
        self.masses = [np.mean(side, axis=0) for side in zip(*sides, strict=True)]

    def forward(self, student: ModelOutputs, teacher: ModelOutputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        projected = {m: self.hidden_projection(x) for m, x in student.hidden.items() if m and "hidden" in self.plans}
        mine, its = (
            {layer: losses.scores((q, k), batch, self.heads) for layer, (q, k, _) in trace.qkv.items()}
            for trace in (student, teacher)
        )

        def hidden(m: int, layer: int) -> Tensor:
            return losses.over_tokens(losses.squared(projected[m], teacher.hidden[layer]), batch)

        def attention(m: int, layer: int) -> Tensor:
            return losses.score_error(mine[m], its[layer], batch)

        distances = {"hidden": hidden, "attention": attention}
        moved = {kind: _moved(plan, distances[kind]) for kind, plan in self.plans.items()}
        if self.training:
            self._count(torch.stack([costs for _, costs in moved.values()]))
        self._observe(batch.input_ids.device)
        terms = super().forward(student, teacher, batch)
        terms |= {kind: self.weights[kind] * loss for kind, (loss, _) in moved.items()}
        if self.embedding:
            mapped = self.embedding_projection(student.hidden[0])
            terms["embedding"] = self.embedding * losses.over_tokens(losses.squared(mapped, teacher.hidden[0]), batch)
        return terms

    def _count(self, costs: Tensor) -> None:
        self.costs = self.costs.to(costs.device) + processes.average(costs)
        self.count += 1

    def _observe(self, device: torch.device) -> None:
        plan = next(iter(self.plans.values()))
        shares = (plan / plan.sum(axis=1, keepdims=True)).tolist()
        for m, row in enumerate(shares, start=1):
            self.metrics |= teacher_layer_weights(m, (torch.full((), share, device=device) for share in row))

    def get_extra_state(self) -> dict[str, Any]:
        """What a checkpoint needs beside parameters; buffers would be rounded with a model in half precision."""
        return {
            "masses": [torch.from_numpy(x) for x in self.masses],
            "plans": {kind: torch.from_numpy(x) for kind, x in self.plans.items()},
            "costs": self.costs.cpu(),
            "count": self.count,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.masses = [x.cpu().numpy() for x in state["masses"]]
        self.plans = {kind: x.cpu().numpy() for kind, x in state["plans"].items()}
        self.costs, self.count = state["costs"], state["count"]


def _moved(plan: Array, distance: Callable[[int, int], Tensor]) -> tuple[Tensor, Tensor]:
    """Σ plan · distance(m, l), and all distances [M, L]. Only those that the plan uses are differentiated."""
    used, every = [], []
    for (m, layer), share in np.ndenumerate(plan):
        with torch.set_grad_enabled(torch.is_grad_enabled() and bool(share)):
            cost = distance(m + 1, layer + 1)
        every.append(cost.detach())
        used += [share.item() * cost] if share else []
    return torch.stack(used).sum(), torch.stack(every).view(plan.shape)
