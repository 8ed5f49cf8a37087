"""The compression `quantize`: the student trains with the rounding of its int8 file (Q8BERT, Zafrir et al., 2019).

    Grid                 the evenly spaced values that numbers are rounded to
    QuantizedLinear      the compressed module of a linear map: it rounds its weight and its inputs
    QuantizedEmbedding   that of an embedding: it rounds its table
    Quantize             the compression

Rounding is that of `onnxruntime.quantization.quantize_dynamic`, as `evaluation/onnx_export.py` calls it: a student
scores in training what its int8 file scores.

    weight of a linear map   whole multiples of max |w| / 64 of its row, from -64 to 64 of them: 7 bits, zero is exact
    embeddings               256 steps from the least to the greatest number of the whole table, zero is one of them
    inputs of linear maps    the same over all tokens of a forward, at each forward anew

Backwards, rounding is the identity (straight-through estimator, Bengio et al., 2013). All ranges are functions of the
weights and of the micro-batch, so a checkpoint holds nothing of them. Rounding is computed in fp32, whatever the
precision of the training. What is between linear maps, such as attention's scores, the file does not round either.

Two differences stay. The range of an input depends on what else is in the batch: a served batch is another one, and its
padding counts. And where two programs add up in another order, a number half-way between two values may go to the other
one: in a deep model such steps spread, so that single outputs differ, though less than by int8 itself.

O rows and I columns of a weight, V words, D width.
"""

from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from lad_dist.compression.base import NO_DATA, Compression, CompressionContext, RunSettings
from lad_dist.compression.compressed_module import CompressedModule
from lad_dist.compression.products import LowRankEmbedding, copy_embedding, copy_linear
from lad_dist.config.errors import UserError
from lad_dist.core.step_state import StepState
from lad_dist.models import families
from lad_dist.models.loading import PreTrainedModel

WEIGHT_STEPS = 64  # of a weight on each side of 0: onnxruntime's `reduce_range`
TABLE_STEPS = 255  # of a table or an input from its least number to its greatest
TINY = torch.finfo(torch.float32).tiny


class Grid(NamedTuple):
    """The values that numbers are rounded to: scale · n, with n whole and between `low` and `high`."""

    scale: Tensor  # fp32, [O, 1] or a scalar
    low: Tensor  # fp32, scalars
    high: Tensor

    @classmethod
    def of_weight(cls, weight: Tensor) -> "Grid":
        """Return the grid of each row of a weight [O, I]."""
        scale = weight.detach().float().abs().amax(dim=1, keepdim=True) / WEIGHT_STEPS
        high = torch.full((), float(WEIGHT_STEPS), device=weight.device)
        return cls(torch.where(scale < TINY, 1.0, scale), -high, high)

    @classmethod
    def of_table(cls, table: Tensor) -> "Grid":
        """Return the grid of embeddings [V, D], computed in fp64 as onnxruntime does."""
        low, high = torch.aminmax(table.detach())
        return cls._between(low.double(), high.double())

    @classmethod
    def of_inputs(cls, x: Tensor) -> "Grid":
        """Return the grid of the inputs of a linear map, [..., I]."""
        low, high = torch.aminmax(x.detach())
        return cls._between(low.float(), high.float())

    @classmethod
    def _between(cls, low: Tensor, high: Tensor) -> "Grid":
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        scale = (high - low) / TABLE_STEPS
        scale = torch.where(scale < TINY, torch.ones_like(scale), scale)
        zero = (-low / scale).round().float()
        return cls(scale.float(), -zero, TABLE_STEPS - zero)

    def codes(self, x: Tensor) -> Tensor:
        """Return n of the nearest value to each number, in fp32; halves go to the even one."""
        return x.float().div(self.scale).round_().clamp_(self.low, self.high)

    def round(self, x: Tensor) -> Tensor:
        """Return the nearest values in fp32."""
        return self.codes(x).mul_(self.scale)


class _StraightThrough(torch.autograd.Function):
    """Round forwards; backwards the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: Grid) -> Tensor:
        return grid.round(x).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], None


class QuantizedModule(CompressedModule):
    """A module that rounds as its int8 file does: in evaluation always, in training after a share `begin` of it."""

    begin: float
    has_begun = True

    def on_step_start(self, state: StepState) -> None:
        self.has_begun = state.progress >= self.begin

    @property
    def rounds(self) -> bool:
        """Whether a forward rounds now."""
        return self.has_begun or not self.training


class QuantizedLinear(QuantizedModule, nn.Linear):
    """A linear map that rounds its weight and its inputs. It takes over the weight and the bias of `linear`.

    `rounds_inputs` is False where the inputs are rounded already, as looked-up embeddings are.
    """

    def __init__(self, linear: nn.Linear, begin: float = 0.0, *, rounds_inputs: bool = True):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.begin, self.rounds_inputs = begin, rounds_inputs
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        if not self.rounds:
            return super().forward(x)
        if self.rounds_inputs:
            x = _StraightThrough.apply(x, Grid.of_inputs(x))
        return F.linear(x, _StraightThrough.apply(self.weight, Grid.of_weight(self.weight)), self.bias)

    def merge(self) -> nn.Linear:
        """Return the map with rounded weights, in fp32. To round them again changes nothing."""
        bias = None if self.bias is None else self.bias.detach()
        return copy_linear(Grid.of_weight(self.weight).round(self.weight.detach()), bias)


class QuantizedEmbedding(QuantizedModule, nn.Embedding):
    """An embedding that rounds its table. It takes over the weight of `embedding`."""

    def __init__(self, embedding: nn.Embedding, begin: float = 0.0):
        rows, width = embedding.weight.shape
        super().__init__(rows, width, embedding.padding_idx, device="meta")
        self.weight = embedding.weight
        self.begin = begin
        self.train(embedding.training)

    def forward(self, ids: Tensor) -> Tensor:
        rows = super().forward(ids)  # rounded after the look-up, for a batch needs few of the rows
        return _StraightThrough.apply(rows, Grid.of_table(self.weight)) if self.rounds else rows

    def merge(self) -> nn.Embedding:
        """Return the embedding with a rounded table, in fp32. To round it again changes nothing."""
        table = Grid.of_table(self.weight).round(self.weight.detach())
        # The ends of a rounded table are rounded numbers themselves, so its grid may differ in the last bit.
        while not table.is_meta and _differ(table, again := Grid.of_table(table).round(table)):
            table = again
        return copy_embedding(table, self.padding_idx)


def _differ(x: Tensor, y: Tensor) -> bool:
    """Return whether any two numbers differ; NaN, of a student that broke, does not."""
    return bool(((x < y) | (x > y)).any())


@dataclass(frozen=True, kw_only=True)
class Quantize(Compression):
    """Train with the rounding of the int8 file: quantization-aware training (Q8BERT, Zafrir et al., 2019).

    All linear maps and embeddings are rounded, as the file rounds them. There is no file of fewer bits, and hence no
    option for them.
    """

    name = "quantize"
    inserts = frozenset({"quantized"})
    may_follow = frozenset({"products", "masks"})

    begin: Annotated[
        float, Field(ge=0, le=1, description="share of the training after which it rounds too; evaluations always do")
    ] = 0.0

    def check(self, spec: RunSettings) -> None:
        """Raise UserError for a head that the int8 file does not have."""
        if spec.head == "mlm":
            raise UserError(
                "compression quantize: the MLM head reads the word embeddings, and the int8 file is without it; "
                "quantize on a task, or pre-train with an objective that needs no head"
            )

    def apply(self, model: PreTrainedModel, context: CompressionContext = NO_DATA) -> PreTrainedModel:
        """Replace all linear maps and embeddings; raise UserError for a model that its int8 file rounds otherwise."""
        family, config = families.family_of(model.config), model.config
        if family.relative_position_maps(config) or any(isinstance(module, nn.Conv1d) for module in model.modules()):
            raise UserError(
                f"compression quantize: the int8 file of a {config.model_type} rounds maps of relative positions and "
                "convolutions otherwise; take a student of another family"
            )
        products = [module for module in model.modules() if isinstance(module, LowRankEmbedding)]
        reads_embeddings = {module for product in products for module in product.outer.modules()}
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear):
                rounds_inputs = module not in reads_embeddings
                model.set_submodule(name, QuantizedLinear(module, self.begin, rounds_inputs=rounds_inputs))
            elif isinstance(module, nn.Embedding):
                model.set_submodule(name, QuantizedEmbedding(module, self.begin))
        return model
