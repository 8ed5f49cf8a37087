"""LAD: layer-wise adaptive distillation. Gates aggregate all teacher layers into the student's targets."""

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
    """How gates are built. `gate_init` is their first value, or their only one; None starts them at random."""

    gates: Gates
    gate_init: float | None
    gate_input: GateInput
    norm: Norm
    affine: bool


VARIANTS = {
    "per_token": GateConfig("learnt", None, "aggregate", "token", False),
    "paper": GateConfig("learnt", None, "aggregate", "sequence", True),
}


class Gate(nn.Module):
    """Gate between the aggregate of the layers below and a teacher layer: G · H_l + (1 - G) · A_{l-1}."""

    def __init__(self, width: int, config: GateConfig):
        """Build a gate for hidden states of `width`."""
        super().__init__()
        self.config = config
        if config.gates == "constant":
            return
        self.linear = nn.Linear(width if config.gate_input == "aggregate" else 2 * width, width)
        nn.init.xavier_uniform_(self.linear.weight)
        if config.gate_init is not None:
            nn.init.constant_(self.linear.bias, math.log(config.gate_init / (1 - config.gate_init)))
        self.linear.requires_grad_(config.gates == "learnt")

    def forward(self, aggregate: Tensor, layer: Tensor) -> tuple[Tensor, Tensor]:
        """Mix the aggregate A_{l-1} [N, D] with the layer H_l [N, D].

        Returns:
            The mixture [N, D] before its norm, and the gate's values G_l [N, D]: 1 takes the layer, 0 the aggregate.
        """
        if self.config.gates == "constant":
            assert self.config.gate_init is not None
            value = torch.full_like(layer, self.config.gate_init)
        else:
            inputs = aggregate if self.config.gate_input == "aggregate" else torch.cat([aggregate, layer], dim=-1)
            value = torch.sigmoid(self.linear(inputs))
        return torch.lerp(aggregate, layer, value), value


class LAD(KD):
    """Layer-wise adaptive distillation (Lin, Chen and Kao, Sensors 2023, 23(3):1483).

    Gates aggregate all teacher layers H_1 … H_L [N, D], so that none is skipped:

        A_1 = H_1
        G_l = sigmoid(A_{l-1} W_l + b_l)
        A_l = LN_l(G_l · H_l + (1 - G_l) · A_{l-1})                          l = 2 … L

    The target of student layer m of M is A at teacher layer ⌊m L / M⌋. Plain distillation is added:

        L = hidden · 1/M Σ_m MSE(S_m, A_⌊mL/M⌋) + hard · CE + soft · T² KL

    One chain of gates runs over all layers and is never restarted. The gates learn from the hidden term, at
    `optim.objective_lr`. The paper bypasses the first gate, so it does not exist here. On a corpus the same gates
    aggregate a pre-trained teacher.

    `variant = "paper"` is the authors' code. Its norms are over [S, D] jointly with S · D affine weights, which needs
    `data.pad_to`; its gates start at random. `variant = "per_token"` normalises over D alone. Each token's target
    then has unit variance whatever the gates do, and no padding is needed. Each other option changes one property of
    the variant; None keeps the variant's. They show what the gates are worth. Constant gates of value 1 leave LN(H_l)
    alone, without aggregation.

    The hidden term pulls both ways. Gates that learn from it move towards what the student finds easy: the lowest
    layers, however little these say about the task. `gate_supervision` gives the gates a task of their own. A learnt
    linear map P_m of each target's rows predicts the teacher's logits z_t:

        L += gate_supervision · 1/M Σ_m T² KL(softmax(z_t / T) || softmax(P_m A_⌊mL/M⌋ / T))

    `detach_gates` keeps the hidden term's gradient from the gates. Without gate supervision, use `gates = "frozen"`
    instead.

    The objective logs `gate/l`, the mean gate value; `target/m`, the variance of a target over the tokens of a
    micro-batch; and `teacher_layer_weight/m/l`, the share of H_l in the target of student layer m: gate value times
    size, through all norms in between.
    """

    def __init__(
        self,
        student: ModelDims,
        teacher: ModelDims,
        *,
        hidden: Weight = 1.0,
        variant: Literal["per_token", "paper"] = "per_token",
        gates: Annotated[
            Gates | None, Field(description="whether gates learn, stay as they start, or are one constant")
        ] = None,
        gate_init: Annotated[
            float | None, Field(gt=0, le=1, description="where gates start, or stay if constant; default: random")
        ] = None,
        gate_input: Annotated[GateInput | None, Field(description="what a gate reads: A_{l-1}, or H_l too")] = None,
        norm: Norm | None = None,
        affine: Annotated[bool | None, Field(description="learnt scale and shift after the norm")] = None,
        gate_supervision: Annotated[
            float, Field(ge=0, description="weight of the gates' own task: to predict the teacher's logits")
        ] = 0.0,
        detach_gates: Annotated[bool, Field(description="keep the hidden term from training the gates")] = False,
        soft: Weight = 0.5,
        hard: Weight = 0.5,
        temperature: Annotated[float, Field(gt=0)] = 2.0,
    ):
        """Build the objective; beside kd's errors raise UserError for dimensions or options that exclude each other."""
        super().__init__(student, teacher, soft=soft, hard=hard, temperature=temperature)
        check_same_width("lad", student, teacher)
        options: dict[str, Any] = {
            "gates": gates,
            "gate_init": gate_init,
            "gate_input": gate_input,
            "norm": norm,
            "affine": affine,
        }
        config = VARIANTS[variant]._replace(**{name: x for name, x in options.items() if x is not None})
        _check_gates(config, teacher, gate_supervision, detach_gates)
        self.hidden, self.gate_supervision, self.detach_gates = hidden, gate_supervision, detach_gates
        self.layer_map = uniform_layer_map("lad", student, teacher)
        self.normalized_shape = (
            [teacher.hidden_size] if config.norm == "token" else [teacher.padded_length or 0, teacher.hidden_size]
        )
        above_first = range(2, teacher.num_hidden_layers + 1)
        self.gates = nn.ModuleList(Gate(teacher.hidden_size, config) for _ in above_first)
        self.norms = nn.ModuleList(
            nn.LayerNorm(self.normalized_shape, elementwise_affine=config.affine) for _ in above_first
        )
        self.probes = nn.ModuleList(
            nn.Linear(teacher.hidden_size, teacher.num_outputs) for _ in self.layer_map if gate_supervision
        )
        every_layer = tuple(range(1, teacher.num_hidden_layers + 1))
        self.student_spec = self.student_spec._replace(hidden=tuple(m for m, _ in self.layer_map))
        self.teacher_spec = self.teacher_spec._replace(hidden=every_layer, logits=soft > 0 or gate_supervision > 0)

    def forward(self, student: ModelOutputs, teacher: ModelOutputs | None, batch: Batch) -> dict[str, Tensor]:
        """Return KD's terms, "hidden", and with gate supervision "gate_supervision"."""
        assert teacher is not None
        dtype = student.hidden[1].dtype  # that of the gates too
        aggregates = self.aggregate({layer: x.to(dtype) for layer, x in teacher.hidden.items()}, batch)
        targets = [aggregates[layer] for _, layer in self.layer_map]
        self.metrics |= {f"target/{m}": x.detach().float().var(dim=0).mean() for m, x in enumerate(targets, start=1)}
        terms = super().forward(student, teacher, batch)
        if self.gate_supervision:
            terms["gate_supervision"] = self.gate_supervision * self._probe_loss(targets, teacher, batch)
        if self.detach_gates:
            targets = [x.detach() for x in targets]
        errors = [losses.squared_error(student.hidden[m], x) for m, x in enumerate(targets, start=1)]
        means = [losses.mean_over_padded_tokens(error, batch) for error in errors]
        return terms | {"hidden": self.hidden * torch.stack(means).mean()}

    def _probe_loss(self, targets: list[Tensor], teacher: ModelOutputs, batch: Batch) -> Tensor:
        """Return the loss of the logits that linear maps predict from the targets, mean over targets."""
        assert teacher.logits is not None
        logits = [probe(x.index_select(0, batch.head_positions)) for probe, x in zip(self.probes, targets, strict=True)]
        pairs = [self.comparable_logits(z, teacher.logits) for z in logits]
        return torch.stack([losses.soft_label_loss(*pair, batch, self.head, self.temperature) for pair in pairs]).mean()

    def aggregate(self, hidden: dict[int, Tensor], batch: Batch) -> dict[int, Tensor]:
        """Return aggregates {l: A_l [N, D]} of teacher layers {l: H_l [N, D]}, l = 1 … L, and set the metrics."""
        self.metrics = {}
        aggregates, shares = {1: hidden[1]}, {1: _size(hidden[1])[None]}
        for layer, (gate, norm) in enumerate(zip(self.gates, self.norms, strict=True), start=2):
            mixed, value = gate(aggregates[layer - 1], hidden[layer])
            aggregates[layer] = norm(mixed.view(-1, *self.normalized_shape)).view_as(mixed)
            shares[layer] = _shares(shares[layer - 1], value, hidden[layer], mixed)
            self.metrics[f"gate/{layer}"] = losses.mean_over_padded_tokens(value.detach().float(), batch)
        for m, layer in self.layer_map:
            weights = (shares[layer] / shares[layer].sum(dim=0)).sum(dim=1) / batch.divisors.padded_tokens
            self.metrics |= teacher_layer_weights(m, weights)
        return aggregates


def _check_gates(config: GateConfig, teacher: ModelDims, gate_supervision: float, detach_gates: bool) -> None:
    """Raise UserError if options of the gates exclude each other."""
    if config.norm == "sequence" and teacher.padded_length is None:
        raise UserError('objective.norm = "sequence": it normalises over whole sequences, so set data.pad_to')
    if config.gates == "constant" and config.gate_init is None:
        raise UserError('objective.gates = "constant": set their value, as in objective.gate_init = 0.5')
    if config.gates != "constant" and config.gate_init == 1:
        raise UserError(
            "objective.gate_init = 1: only constant gates can have this value; set it below 1, "
            'or objective.gates = "constant"'
        )
    if gate_supervision and teacher.head in ("none", "mlm"):
        raise UserError(
            "objective.gate_supervision: on a corpus the teacher makes no decision to predict; "
            "set objective.gate_supervision = 0"
        )
    if gate_supervision and config.gates != "learnt":
        raise UserError(
            f'objective.gate_supervision: gates = "{config.gates}" learn nothing; set objective.gate_supervision = 0'
        )
    if detach_gates and config.gates == "learnt" and not gate_supervision:
        raise UserError(
            'objective.detach_gates: nothing trains the gates; set objective.gates = "frozen", '
            "or objective.gate_supervision above 0"
        )


@torch.no_grad()
def _shares(below: Tensor, value: Tensor, layer: Tensor, mixed: Tensor) -> Tensor:
    """Return the sizes [l, N] of each teacher layer in A_l, from those [l - 1, N] in A_{l-1}."""
    mean = value.float().mean(dim=-1)
    sizes = torch.cat([below * (1 - mean), (mean * _size(layer))[None]])
    return sizes / mixed.float().std(dim=-1)


@torch.no_grad()
def _size(x: Tensor) -> Tensor:
    """Return the root mean square over the width, [N, D] to [N]."""
    return x.float().square().mean(dim=-1).sqrt()
