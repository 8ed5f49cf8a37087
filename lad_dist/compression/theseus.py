"""BERT-of-Theseus (Xu et al., 2020): a student's layers replace a predecessor's blocks, more and more often.

    TheseusBlock              the compressed module: a frozen block of the predecessor and the layer that succeeds it
    replacement_probability   the probability of the successors as a function of progress
    Theseus                   the compression: it wraps every layer of the student

The M layers of the student succeed M consecutive blocks of the predecessor's L layers: layer m those from
⌊(m - 1) L / M⌋ + 1 to ⌊m L / M⌋. Each learns between neighbours that are now the predecessor's, now the student's.
Evaluation and the export are the student alone.

A coin decides which of the two runs. It is a function of (seed, step, block): all processes and all micro-batches of a
step decide alike. A layer that did not run gets gradients of 0, as in the authors' code: its optimizer moments decay in
every ZeRO stage alike, and every process has the same gradients to send. The predecessor's dropout is off (in the
authors' code it is on): the predecessor does not learn, so its noise could only blur what its successors have to fit.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from lad_dist.compression.base import NO_DATA, Compression, CompressionContext, RunSettings
from lad_dist.compression.compressed_module import CompressedModule
from lad_dist.config.errors import UserError
from lad_dist.core.step_state import StepState
from lad_dist.models import families, loading
from lad_dist.models.dims import encoder_layers
from lad_dist.models.hf_config import load_hf_config
from lad_dist.models.loading import PreTrainedModel, check_weight_files, new_model
from lad_dist.utils.rng import COIN, derive_key

DIGITS = 53  # of a float: at a probability of 0 or 1 the coin has one side

Curriculum = Literal["linear", "constant"]


def replacement_probability(progress: float, start: float, end: float, curriculum: Curriculum) -> float:
    """Return the probability of the successors at `progress` in [0, 1].

    It rises from `start` to 1 at `end`, or is `start` until then. Afterwards it is 1, so that the successors learn
    together (section 3.3).
    """
    if progress >= end:
        return 1.0
    return start + (1 - start) * progress / end if curriculum == "linear" else start


class TheseusBlock(CompressedModule):
    """A block of a predecessor and the layer that succeeds it, one of which runs. Its interface is that of a layer.

    Where it is not training, and before the first `on_step_start`, the successor runs.

    Args:
        predecessor: one or more layers, which it freezes
        successor: one layer
        probability: the successor's as a function of progress
        number: of the block, from 1, for its coin
    """

    def __init__(
        self, predecessor: Sequence[nn.Module], successor: nn.Module, probability: Callable[[float], float], number: int
    ):
        super().__init__()
        self.predecessor = nn.ModuleList(predecessor).requires_grad_(False).eval()
        self.successor = successor
        self._probability = probability
        self._number = number
        self.runs_successor = True

    def train(self, mode: bool = True) -> "TheseusBlock":
        super().train(mode)
        self.predecessor.eval()
        return self

    def on_step_start(self, state: StepState) -> None:
        coin = derive_key(COIN, state.seed, state.step, self._number) >> 64 - DIGITS
        self.runs_successor = coin < self._probability(state.progress) * 2**DIGITS

    def is_final(self, state: StepState) -> bool:
        """Return whether only successors run, as they learn together only then."""
        return self._probability(state.progress) == 1

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.runs_successor or not self.training:
            return self.successor(hidden_states, *args, **kwargs)
        output: Any = _with_zero_gradients(hidden_states, self.successor.parameters())
        for layer in self.predecessor:
            output = layer(_hidden_states(output), *args, **kwargs)
        return output

    def merge(self) -> nn.Module:
        return self.successor


def _hidden_states(output: Any) -> Tensor:
    """Return the hidden states of a layer's output, which is a tuple in some families."""
    return output[0] if isinstance(output, tuple) else output


def _with_zero_gradients(x: Tensor, weights: Iterable[nn.Parameter]) -> Tensor:
    """Return x, through which these weights get gradients of 0."""
    return _ZeroGradients.apply(x, *(weight for weight in weights if weight.requires_grad))


class _ZeroGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(*weights)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient, *map(torch.zeros_like, ctx.saved_tensors)


@dataclass(frozen=True, kw_only=True)
class Theseus(Compression):
    """Make the student's layers the successors of a predecessor's blocks, which they replace while they train.

    Source: BERT-of-Theseus (Xu et al., 2020).
    """

    name = "theseus"
    inserts = frozenset({"blocks"})
    may_follow = frozenset({"products", "masks", "gates", "quantized"})
    supports_zero3 = False  # which needs the same layers to run in each step

    predecessor: Annotated[
        str | None,
        Field(description="model folder or hub name whose layers are replaced; default: what the student starts from"),
    ] = None
    start: Annotated[float, Field(ge=0, le=1, description="probability of a successor at first")] = 0.5
    end: Annotated[float, Field(ge=0, le=1, description="share of the steps after which only successors run")] = 0.7
    curriculum: Annotated[
        Curriculum, Field(description="whether that probability rises until then, or stays and jumps")
    ] = "linear"
    frozen: Annotated[
        bool, Field(description="whether embeddings, pooler and head stay as they are, which is the predecessor's")
    ] = True

    def check(self, spec: RunSettings) -> None:
        """Raise UserError where what would stay frozen is not the predecessor's."""
        student = spec.config.student
        path = self.predecessor or student.path
        if path is None:
            raise UserError("compression theseus: a new student starts from no model; name a predecessor")
        if self.frozen and (path != student.path or student.embeddings != "copy"):
            raise UserError(
                "compression theseus: frozen embeddings and head have to be the predecessor's; set student.path to it "
                'and student.embeddings to "copy", or frozen to false'
            )
        if self.frozen and not loading.holds_head(path, load_hf_config(path), spec.head, spec.labels):
            with_labels = f" with the labels {', '.join(spec.labels)}" if spec.labels else ""
            raise UserError(
                f"compression theseus: {path} has no {spec.head} head{with_labels}, and a new one would stay frozen; "
                "fine-tune it first, or set frozen to false"
            )

    def apply(self, model: PreTrainedModel, context: CompressionContext = NO_DATA) -> PreTrainedModel:
        """Wrap every layer; raise UserError where layers of the one cannot replace layers of the other."""
        path = self.predecessor or str(model.name_or_path)
        _check_layers(model, load_hf_config(path), path)
        stack = encoder_layers(model)
        predecessor_layers = _layers_of(path, model.device)
        if self.frozen:
            for weight in set(model.parameters()) - set(stack.parameters()):
                weight.requires_grad_(False)
        probability = partial(replacement_probability, start=self.start, end=self.end, curriculum=self.curriculum)
        blocks = _blocks(predecessor_layers, len(stack))
        for number, (block, layer) in enumerate(zip(blocks, list(stack), strict=True), start=1):
            stack[number - 1] = TheseusBlock(block, layer, probability, number)
        return model


def _layers_of(path: str, device: torch.device) -> nn.ModuleList:
    """Return the layers of a model; on the meta device without reading its weights."""
    if device.type == "meta":
        check_weight_files(path)
        return encoder_layers(new_model(load_hf_config(path), "none"))
    return encoder_layers(loading.load_model(path, "none").to(device=device))  # type: ignore[call-arg]


def _blocks(layers: nn.ModuleList, count: int) -> list[list[nn.Module]]:
    """Return the layers in `count` consecutive blocks, as even as can be."""
    ends = [m * len(layers) // count for m in range(count + 1)]
    return [list(layers)[begin:end] for begin, end in pairwise(ends)]


def _check_layers(model: PreTrainedModel, predecessor: Any, path: str) -> None:
    """Raise UserError where layers of a predecessor with this config cannot be replaced by the model's."""
    student, family = model.config, families.family_of(predecessor)
    kind = predecessor.model_type
    if kind != student.model_type:
        raise UserError(f"compression theseus: the student is of the family {student.model_type}, {path} of {kind}")
    if family.shared_layers:
        raise UserError(f"compression theseus: all layers of {kind} are one, and none can be replaced")
    if family.uneven_layers(predecessor):
        raise UserError(f"compression theseus: the layers of {path} differ in kind, and none can stand for another")
    if not family.flat and path != model.name_or_path:
        raise UserError(
            f"compression theseus: layers of {kind} need the positions of their own model; leave predecessor away, so "
            "that it is what the student starts from"
        )
    if predecessor.hidden_size != student.hidden_size:
        raise UserError(
            f"compression theseus: the student is {student.hidden_size} wide and {path} {predecessor.hidden_size}; "
            "take a student as wide as the predecessor"
        )
    if predecessor.num_hidden_layers < student.num_hidden_layers:
        raise UserError(
            f"compression theseus: {student.num_hidden_layers} student layers, only {predecessor.num_hidden_layers} in "
            f"{path}; set student.num_hidden_layers to less"
        )
