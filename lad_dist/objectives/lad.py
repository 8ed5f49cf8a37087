"""LAD, layer-wise adaptive distillation (Lin, Chen and Kao, Sensors 2023, 23(3):1483).

Gates aggregate all teacher layers H_1 … H_L, so that none is skipped:

    A_1 = H_1
    G_l = sigmoid(A_{l-1} W_l + b_l)
    A_l = LN_l(G_l · H_l + (1 - G_l) · A_{l-1})                          l = 2 … L

Student layer m of M is matched to A at teacher layer ⌊m L / M⌋, beside plain distillation:

    L = hidden · 1/M Σ_m MSE(S_m, A_⌊mL/M⌋) + hard · CE + soft · T² KL

One chain runs over all layers and is never restarted. The gates learn from the hidden term, at
`optim.objective_lr`. The first gate is bypassed, so it does not exist. On a corpus the same gates aggregate a
pre-trained teacher.

`variant = "paper"` is the authors' code: a norm over [S, D] jointly with S · D affine weights, which needs
`data.pad_to`, and gates that start at random. `"ours"` normalises over D alone: each token's target then has unit
variance whatever the gates do, and no padding is needed. The other keys change one thing each, None leaving it as the
variant has it; they are there to find out what the gates are worth. A constant openness of 1 leaves LN(H_l) alone,
without aggregation.

The hidden term pulls both ways: gates that learn from it move towards what the student finds easy, which are the lowest
layers, however little these say about the task. `anchor` gives them a task of their own: a learnt linear map of each
target's rows has to tell the teacher's decision.

    L += anchor · 1/M Σ_m T² KL(softmax(z_t / T) || softmax(P_m A_⌊mL/M⌋ / T))

`detached` takes the hidden term's gradient away from the gates; without an anchor that is `gates = "frozen"`.

Logged are `gate/l`, the mean openness; `target/m`, the variance over tokens; and `teacher_layer_weight/m/l`, the share of H_l in what
student layer m is matched to: openness times size, through all norms in between.
"""

import math
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from lad_dist.config.errors import UserError
from lad_dist.core.batch import Batch
from lad_dist.core.outputs import ModelDims, ModelOutputs
from lad_dist.objectives import losses
from lad_dist.objectives.base import check_same_width, teacher_layer_weights, uniform_layer_map
from lad_dist.objectives.kd import KD, Weight

Gates = Literal["learnt", "frozen", "constant"]
GateInput = Literal["aggregate", "both"]
Norm = Literal["token", "sequence"]


class GateConfig(NamedTuple):
    """What a gate is made like. `openness` is where it starts or stays, None for a random start."""

    gates: Gates
    gate_init: float | None
    gate_input: GateInput
    norm: Norm
    affine: bool


VARIANTS = {
    "ours": GateConfig("learnt", None, "aggregate", "token", False),
    "paper": GateConfig("learnt", None, "aggregate", "sequence", True),
}


class Gate(nn.Module):
    """(aggregate, layer) -> (mixed, openness), all [N, D]."""

    def __init__(self, width: int, recipe: GateConfig):
        super().__init__()
        self.recipe = recipe
        if recipe.gates == "constant":
            return
        self.linear = nn.Linear(width if recipe.gate_input == "aggregate" else 2 * width, width)
        nn.init.xavier_uniform_(self.linear.weight)
        if recipe.gate_init is not None:
            nn.init.constant_(self.linear.bias, math.log(recipe.gate_init / (1 - recipe.gate_init)))
        self.linear.requires_grad_(recipe.gates == "learnt")

    def forward(self, aggregate: Tensor, layer: Tensor) -> tuple[Tensor, Tensor]:
        openness = self.openness(aggregate, layer)
        return torch.lerp(aggregate, layer, openness), openness

    def openness(self, aggregate: Tensor, layer: Tensor) -> Tensor:
        if self.recipe.gates == "constant":
            assert self.recipe.gate_init is not None
            return torch.full_like(layer, self.recipe.gate_init)
        seen = aggregate if self.recipe.gate_input == "aggregate" else torch.cat([aggregate, layer], dim=-1)
        return torch.sigmoid(self.linear(seen))


class LAD(KD):
    def __init__(
        self,
        student: ModelDims,
        teacher: ModelDims,
        *,
        hidden: Weight = 1.0,
        variant: Literal["ours", "paper"] = "ours",
        gates: Annotated[Gates | None, Field(description="what becomes of their openness")] = None,
        gate_init: Annotated[
            float | None, Field(gt=0, le=1, description="where gates start, or stay if constant; default: random")
        ] = None,
        gate_input: Annotated[GateInput | None, Field(description="what a gate looks at: A_{l-1}, or H_l too")] = None,
        norm: Norm | None = None,
        affine: Annotated[bool | None, Field(description="learnt scale and shift after the norm")] = None,
        gate_supervision: Annotated[
            float, Field(ge=0, description="weight of the gates' own task, to tell what the teacher decides")
        ] = 0.0,
        detach_gates: Annotated[bool, Field(description="keep the hidden term from teaching the gates")] = False,
        soft: Weight = 0.5,
        hard: Weight = 0.5,
        temperature: Annotated[float, Field(gt=0)] = 2.0,
    ):
        super().__init__(student, teacher, soft=soft, hard=hard, temperature=temperature)
        check_same_width("lad", student, teacher)
        given: dict[str, Any] = {
            "gates": gates,
            "gate_init": gate_init,
            "gate_input": gate_input,
            "norm": norm,
            "affine": affine,
        }
        recipe = VARIANTS[variant]._replace(**{name: x for name, x in given.items() if x is not None})
        _check(recipe, teacher, gate_supervision, detach_gates)
        self.hidden, self.anchor, self.detached = hidden, gate_supervision, detach_gates
        self.matches = uniform_layer_map("lad", student, teacher)
        self.normalised = (
            [teacher.hidden_size] if recipe.norm == "token" else [teacher.padded_length or 0, teacher.hidden_size]
        )
        above_first = range(2, teacher.num_hidden_layers + 1)
        self.gates = nn.ModuleList(Gate(teacher.hidden_size, recipe) for _ in above_first)
        self.norms = nn.ModuleList(nn.LayerNorm(self.normalised, elementwise_affine=recipe.affine) for _ in above_first)
        self.probes = nn.ModuleList(
            nn.Linear(teacher.hidden_size, teacher.num_outputs) for _ in self.matches if gate_supervision
        )
        every_layer = tuple(range(1, teacher.num_hidden_layers + 1))
        self.student_outputs = self.student_outputs._replace(hidden=tuple(m for m, _ in self.matches))
        self.teacher_outputs = self.teacher_outputs._replace(
            hidden=every_layer, logits=soft > 0 or gate_supervision > 0
        )

    def forward(self, student: ModelOutputs, teacher: ModelOutputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        dtype = student.hidden[1].dtype  # that of the gates too
        targets = self.aggregate({layer: x.to(dtype) for layer, x in teacher.hidden.items()})
        matched = [targets[layer] for _, layer in self.matches]
        self.metrics |= {f"target/{m}": x.detach().float().var(dim=0).mean() for m, x in enumerate(matched, start=1)}
        terms = super().forward(student, teacher, batch)
        if self.anchor:
            terms["gate_supervision"] = self.anchor * self._decisions(matched, teacher, batch)
        if self.detached:
            matched = [x.detach() for x in matched]
        distances = [losses.squared(student.hidden[m], x).mean() for m, x in enumerate(matched, start=1)]
        return terms | {"hidden": self.hidden * torch.stack(distances).mean()}

    def _decisions(self, targets: list[Tensor], teacher: ModelOutputs, batch: Batch) -> Tensor:
        assert teacher.logits is not None
        told = [probe(x.index_select(0, batch.head_positions)) for probe, x in zip(self.probes, targets, strict=True)]
        return torch.stack([losses.soft(x, teacher.logits, batch, self.head, self.temperature) for x in told]).mean()

    def aggregate(self, hidden: dict[int, Tensor]) -> dict[int, Tensor]:
        """Teacher layers {l: H_l [N, D]} to aggregates {l: A_l [N, D]}."""
        self.metrics = {}
        aggregates, shares = {1: hidden[1]}, {1: _size(hidden[1])[None]}
        for layer, (gate, norm) in enumerate(zip(self.gates, self.norms, strict=True), start=2):
            mixed, openness = gate(aggregates[layer - 1], hidden[layer])
            aggregates[layer] = norm(mixed.view(-1, *self.normalised)).view_as(mixed)
            shares[layer] = _shares(shares[layer - 1], openness, hidden[layer], mixed)
            self.metrics[f"gate/{layer}"] = openness.detach().float().mean()
        for m, layer in self.matches:
            read = (shares[layer] / shares[layer].sum(dim=0)).mean(dim=1)
            self.metrics |= teacher_layer_weights(m, read)
        return aggregates


def _check(recipe: GateConfig, teacher: ModelDims, anchor: float, detached: bool) -> None:
    if recipe.norm == "sequence" and teacher.padded_length is None:
        raise UserError('objective.norm = "sequence": it normalises over whole sequences, so set data.pad_to')
    if recipe.gates == "constant" and recipe.gate_init is None:
        raise UserError('objective.gates = "constant": say how open they are, objective.gate_init = 0.5')
    if recipe.gates != "constant" and recipe.gate_init == 1:
        raise UserError('objective.gate_init = 1: a gate cannot start wide open and learn; take gates = "constant"')
    if anchor and teacher.head in ("none", "mlm"):
        raise UserError(
            "objective.gate_supervision: the teacher decides nothing on a corpus; set objective.gate_supervision = 0"
        )
    if anchor and recipe.gates != "learnt":
        raise UserError(
            f'objective.gate_supervision: gates = "{recipe.gates}" learn nothing; set objective.gate_supervision = 0'
        )
    if detached and recipe.gates == "learnt" and not anchor:
        raise UserError('objective.detach_gates: nothing teaches the gates then; take gates = "frozen", or an anchor')


@torch.no_grad()
def _shares(before: Tensor, openness: Tensor, layer: Tensor, mixed: Tensor) -> Tensor:
    """Sizes [l, N] of what each teacher layer has in A_l, from those [l - 1, N] in A_{l-1}."""
    opened = openness.float().mean(dim=-1)
    sizes = torch.cat([before * (1 - opened), (opened * _size(layer))[None]])
    return sizes / mixed.float().std(dim=-1)


@torch.no_grad()
def _size(x: Tensor) -> Tensor:
    """Root mean square over the width, [N, D] to [N]."""
    return x.float().square().mean(dim=-1).sqrt()
