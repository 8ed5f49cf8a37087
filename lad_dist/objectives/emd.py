"""BERT-EMD: every student layer learns from every teacher layer, as optimal transport distributes them."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from lad_dist.config.errors import UserError
from lad_dist.core.batch import Batch
from lad_dist.core.outputs import ModelDims, ModelOutputs
from lad_dist.core.step_state import StepState
from lad_dist.distributed import processes
from lad_dist.objectives import losses, optimal_transport
from lad_dist.objectives.base import check_same_heads, projection, teacher_layer_weights
from lad_dist.objectives.kd import KD, Weight
from lad_dist.objectives.optimal_transport import Array


class EMD(KD):
    """BERT-EMD, many-to-many layer mapping by the earth mover's distance (Li et al., EMNLP 2020).

        D^H_ml = MSE(S_m W_h, H_l)       D^A_ml = MSE(A_m, A_l)                              m = 1 … M, l = 1 … L
        F = argmin Σ F_ml D_ml           with row sums w_s, column sums w_t; one plan for each of D^H and D^A
        L = hidden · Σ F^H D^H + attention · Σ F^A D^A + embedding · MSE(E_s W_e, E_t) + hard · CE + soft · T² KL

    S_m and H_l [N, D] are outputs of student and teacher layers. A are attention scores Q Kᵀ / √d before the softmax: a
    mean over heads and pairs of tokens of one sequence. E [N, D] are embedding outputs. W_h and W_e are learnt if the
    widths differ. Masses w begin equal; cost attention then shifts them to layers that are cheap to reach:

        w_i ∝ Σ_k C_k / C_i             with `cost_temperature`:  w_i ∝ exp(Σ_k C_k / (C_i · cost_temperature))

    with C_i the cost of a unit of w_i, averaged over both plans. The first is the rule of the authors' released code,
    the second the paper's. At a temperature of 1 a softmax of such ratios leaves all mass to one or two layers. Weights
    of 0.01 are the authors' 0.005 for two labels, whose soft term is half of this one.

    Plans and masses are renewed once a step, from the mean costs of all micro-batches of all processes in the step
    before. In the first step every layer learns from every other in proportion to the masses. So a step has one plan,
    the same for any number of processes, and the host waits for the device once a step. The gradient flows through D
    alone. The objective logs `teacher_layer_weight/m/l`: the share of teacher layer l in what moves to student layer m,
    by hidden states if they count.
    """

    def __init__(
        self,
        student: ModelDims,
        teacher: ModelDims,
        *,
        hidden: Weight = 0.01,
        attention: Weight = 0.01,
        embedding: Weight = 0.01,
        cost_temperature: Annotated[
            float | None,
            Field(gt=0, description="of a softmax of masses: the higher, the more equal; default: no softmax"),
        ] = None,
        soft: Weight = 1.0,
        hard: Weight = 0.0,
        temperature: Annotated[float, Field(gt=0)] = 1.0,
    ):
        """Build the objective; beside kd's errors raise UserError for other heads, or if no layers are compared."""
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
        embedding_layer = (0,) * bool(embedding)
        student_layers, teacher_layers = (tuple(range(1, dims.num_hidden_layers + 1)) for dims in (student, teacher))
        self.student_spec, self.teacher_spec = (
            spec._replace(hidden=embedding_layer + layers * bool(hidden), qkv=layers * bool(attention))
            for spec, layers in ((self.student_spec, student_layers), (self.teacher_spec, teacher_layers))
        )
        self.masses: Sequence[Array] = [
            np.full(dims.num_hidden_layers, 1 / dims.num_hidden_layers) for dims in (student, teacher)
        ]
        self.plans = dict.fromkeys(self.weights, np.outer(*self.masses))
        # Sums over the micro-batches of this step, means over the processes.
        self.costs = torch.zeros(len(self.weights), student.num_hidden_layers, teacher.num_hidden_layers)
        self.count = 0

    def on_step_start(self, state: StepState) -> None:
        """Renew plans and masses from the costs of the step before."""
        if self.count:
            self.renew_plans((self.costs / self.count).double().cpu().numpy())
        self.costs, self.count = torch.zeros_like(self.costs), 0

    def renew_plans(self, costs: Array) -> None:
        """Set new plans, and the masses that follow from them. Costs that are not finite change nothing.

        Args:
            costs: [1 or 2, M, L], of hidden states and of attention, those whose weight is not 0.
        """
        if not np.isfinite(costs).all():  # the step overflowed
            return
        self.plans = {
            kind: optimal_transport.transport_plan(cost, *self.masses)
            for kind, cost in zip(self.plans, costs, strict=True)
        }
        masses = [
            optimal_transport.cost_attention(plan, cost, self.cost_temperature)
            for plan, cost in zip(self.plans.values(), costs, strict=True)
        ]
        self.masses = [np.mean(side, axis=0) for side in zip(*masses, strict=True)]

    def forward(self, student: ModelOutputs, teacher: ModelOutputs | None, batch: Batch) -> dict[str, Tensor]:
        """Return KD's terms, "hidden", "attention" and "embedding", but those of weight 0.

        In training, the costs of the step are added up.
        """
        assert teacher is not None
        projected = {m: self.hidden_projection(x) for m, x in student.hidden.items() if m and "hidden" in self.plans}
        student_scores, teacher_scores = (
            {layer: losses.attention_scores((q, k), batch, self.heads) for layer, (q, k, _) in outputs.qkv.items()}
            for outputs in (student, teacher)
        )

        def hidden(m: int, layer: int) -> Tensor:
            return losses.mean_over_tokens(losses.squared_error(projected[m], teacher.hidden[layer]), batch)

        def attention(m: int, layer: int) -> Tensor:
            return losses.attention_score_loss(student_scores[m], teacher_scores[layer], batch)

        distances = {"hidden": hidden, "attention": attention}
        transports = {kind: _transport(plan, distances[kind]) for kind, plan in self.plans.items()}
        if self.training:
            costs = torch.stack([costs for _, costs in transports.values()])
            self.costs = self.costs.to(costs.device) + processes.average(costs)
            self.count += 1
        plan = next(iter(self.plans.values()))
        shares = torch.as_tensor(plan / plan.sum(axis=1, keepdims=True), dtype=torch.float32).to(batch.input_ids.device)
        for m, weights in enumerate(shares, start=1):
            self.metrics |= teacher_layer_weights(m, weights)
        terms = super().forward(student, teacher, batch)
        terms |= {kind: self.weights[kind] * loss for kind, (loss, _) in transports.items()}
        if self.embedding:
            mapped = self.embedding_projection(student.hidden[0])
            error = losses.mean_over_tokens(losses.squared_error(mapped, teacher.hidden[0]), batch)
            terms["embedding"] = self.embedding * error
        return terms

    def get_extra_state(self) -> dict[str, Any]:
        """Return what a checkpoint needs beside parameters.

        Buffers would be rounded with a model in half precision.
        """
        return {
            "masses": [torch.from_numpy(x) for x in self.masses],
            "plans": {kind: torch.from_numpy(x) for kind, x in self.plans.items()},
            "costs": self.costs.cpu(),
            "count": self.count,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what `get_extra_state` returned."""
        self.masses = [x.cpu().numpy() for x in state["masses"]]
        self.plans = {kind: x.cpu().numpy() for kind, x in state["plans"].items()}
        self.costs, self.count = state["costs"], state["count"]


def _transport(plan: Array, distance: Callable[[int, int], Tensor]) -> tuple[Tensor, Tensor]:
    """Return Σ plan · distance(m, l), and all distances [M, L], detached.

    Only distances that the plan uses are differentiated.
    """
    summands, costs = [], []
    for (m, layer), share in np.ndenumerate(plan):
        with torch.set_grad_enabled(torch.is_grad_enabled() and bool(share)):
            cost = distance(m + 1, layer + 1)
        costs.append(cost.detach())
        summands += [share.item() * cost] if share else []
    return torch.stack(summands).sum(), torch.stack(costs).view(plan.shape)
