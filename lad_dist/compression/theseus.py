"""BERT-of-Theseus (Xu et al., 2020): a student's layers take the places of a predecessor's blocks, more and more often.

    Theseus       Part: a block of the predecessor, frozen, and the layer that succeeds it; a coin says which one runs
    replacing     the probability of the successors as a function of progress
    theseus(…)    surgery: puts one in the place of every layer of the student
    check(…)      refuses configs that it does not go with

The M layers of the student succeed M consecutive blocks of the predecessor's L layers: layer m those from
⌊(m - 1) L / M⌋ + 1 to ⌊m L / M⌋. Each learns between neighbours that are now the predecessor's, now the student's.
Evaluation and the export are the student alone.

A coin is a function of (seed, step, block): all processes and all micro-batches of a step take the same way. A layer
that was not taken gets gradients of 0, as in the authors' code: its moments decay in every ZeRO stage alike, and every
process has the same gradients to send. The predecessor's dropout is off (there it is on): it does not learn, so its
noise could only blur what its successors have to fit in with.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from lad_dist.compression.compressed_module import CompressedModule
from lad_dist.config.errors import UserError
from lad_dist.config.schema import TrainConfig
from lad_dist.core.batch import Head
from lad_dist.core.step_state import StepState
from lad_dist.models import families, loading
from lad_dist.models.dims import encoder_layers
from lad_dist.models.heads import keeps_head
from lad_dist.models.hf_config import load_hf_config
from lad_dist.models.loading import PreTrainedModel, check_weight_files, new_model
from lad_dist.utils.rng import COIN, derive_key

DIGITS = 53  # of a float: at a probability of 0 or 1 the coin has one side

Curriculum = Literal["linear", "constant"]


def replacing(progress: float, start: float, end: float, curriculum: Curriculum) -> float:
    """The probability of the successors at `progress` in [0, 1]: from `start` to 1 at `end`, or `start` until then;
    afterwards 1, so that they learn together (section 3.3)."""
    if progress >= end:
        return 1.0
    return start + (1 - start) * progress / end if curriculum == "linear" else start


class Theseus(CompressedModule):
    """`predecessor`: one or more layers, which it freezes; `successor`: one layer; `probability`: the successor's by
    progress; `number`: of the block, from 1, for its coin. Takes what a layer takes and returns what it returns. Where
    it is not training, and before its first moment, the successor runs."""

    def __init__(
        self, predecessor: Sequence[nn.Module], successor: nn.Module, probability: Callable[[float], float], number: int
    ):
        super().__init__()
        self.predecessor = nn.ModuleList(predecessor).requires_grad_(False).eval()
        self.successor = successor
        self._probability = probability
        self._number = number
        self.replaced = True

    def train(self, mode: bool = True) -> "Theseus":
        super().train(mode)
        self.predecessor.eval()
        return self

    def on_step_start(self, moment: StepState) -> None:
        drawn = derive_key(COIN, moment.seed, moment.step, self._number) >> 64 - DIGITS
        self.replaced = drawn < self._probability(moment.progress) * 2**DIGITS

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.replaced or not self.training:
            return self.successor(hidden_states, *args, **kwargs)
        output: Any = _touched(hidden_states, self.successor.parameters())
        for layer in self.predecessor:
            output = layer(_states(output), *args, **kwargs)
        return output

    def merge(self) -> nn.Module:
        return self.successor


def _states(output: Any) -> Tensor:
    """Of what a layer returned; some return a tuple."""
    return output[0] if isinstance(output, tuple) else output


def _touched(x: Tensor, weights: Iterable[nn.Parameter]) -> Tensor:
    """x, through which these weights get gradients of 0."""
    return _Touch.apply(x, *(weight for weight in weights if weight.requires_grad))


class _Touch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(*weights)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient, *map(torch.zeros_like, ctx.saved_tensors)


def theseus(
    model: PreTrainedModel,
    *,
    predecessor: Annotated[
        str | None,
        Field(description="model folder or hub name whose layers are replaced; default: what the student starts from"),
    ] = None,
    start: Annotated[float, Field(ge=0, le=1, description="probability of a successor at first")] = 0.5,
    end: Annotated[float, Field(ge=0, le=1, description="share of the steps after which only successors run")] = 0.7,
    curriculum: Annotated[
        Curriculum, Field(description="whether that probability rises until then, or stays and jumps")
    ] = "linear",
    frozen: Annotated[
        bool, Field(description="whether embeddings, pooler and head stay as they are, which is the predecessor's")
    ] = True,
) -> PreTrainedModel:
    """Makes the student's layers successors of a predecessor's blocks, which they replace while they train. Raises
    UserError where the one's layers cannot stand in the places of the other's."""
    path = predecessor or str(model.name_or_path)
    _check_layers(model, load_hf_config(path), path)
    stack = encoder_layers(model)
    old = _layers_of(path, model.device)
    if frozen:
        for weight in set(model.parameters()) - set(stack.parameters()):
            weight.requires_grad_(False)
    probability = partial(replacing, start=start, end=end, curriculum=curriculum)
    for number, (block, layer) in enumerate(zip(_blocks(old, len(stack)), list(stack), strict=True), start=1):
        stack[number - 1] = Theseus(block, layer, probability, number)
    return model


def _layers_of(path: str, device: torch.device) -> nn.ModuleList:
    """On the meta device their shapes alone."""
    if device.type == "meta":
        check_weight_files(path)
        return encoder_layers(new_model(load_hf_config(path), "none"))
    return encoder_layers(loading.load_model(path, "none").to(device=device))  # type: ignore[call-arg]


def _blocks(old: nn.ModuleList, count: int) -> list[list[nn.Module]]:
    """The layers in `count` consecutive blocks, as even as can be."""
    ends = [m * len(old) // count for m in range(count + 1)]
    return [list(old)[begin:end] for begin, end in pairwise(ends)]


def _check_layers(model: PreTrainedModel, old: Any, path: str) -> None:
    """Whether layers of a predecessor with this config can stand in the places of the model's. Raises UserError."""
    new, family = model.config, families.family_of(old)
    if old.model_type != new.model_type:
        raise UserError(f"surgery theseus: the student is of the family {new.model_type}, {path} of {old.model_type}")
    if family.shared_layers:
        raise UserError(f"surgery theseus: all layers of {old.model_type} are one, and none can be replaced")
    if getattr(old, "layer_types", None) or getattr(old, "conv_kernel_size", 0):
        raise UserError(f"surgery theseus: the layers of {path} differ in kind, and none can stand for another")
    if not family.flat and path != model.name_or_path:
        raise UserError(
            f"surgery theseus: layers of {old.model_type} need the positions of their own model; leave predecessor "
            "away, so that it is what the student starts from"
        )
    if old.hidden_size != new.hidden_size:
        raise UserError(
            f"surgery theseus: the student is {new.hidden_size} wide and {path} {old.hidden_size}; take a student as "
            "wide as its predecessor"
        )
    if old.num_hidden_layers < new.num_hidden_layers:
        raise UserError(
            f"surgery theseus: {new.num_hidden_layers} student layers, only {old.num_hidden_layers} in {path}; set "
            "student.num_hidden_layers to less"
        )


def check_theseus(
    config: TrainConfig, head: Head, labels: Sequence[str], *, predecessor: str | None, frozen: bool, **_: Any
) -> None:
    """Whether the surgery goes with the rest of the config, whose student has that head. Raises UserError."""
    if [named.name for named in config.compression].index("theseus") != len(config.compression) - 1:
        raise UserError("surgery theseus: it wraps layers as they are; list it once, after all others")
    if config.zero_stage == 3:
        raise UserError("surgery theseus: under ZeRO 3 the same layers must run in each step; set a stage up to 2")
    words = config.student
    path = predecessor or words.path
    if path is None:
        raise UserError("surgery theseus: a new student starts from no model; name its predecessor")
    if frozen and (path != words.path or words.embeddings != "copy"):
        raise UserError(
            "surgery theseus: frozen embeddings and head have to be the predecessor's; set student.path to it and "
            'student.embeddings to "copy", or frozen to false'
        )
    if frozen and not keeps_head(load_hf_config(path), head, labels):
        labelled = f" with the labels {', '.join(labels)}" if labels else ""
        raise UserError(
            f"surgery theseus: {path} has no {head} head{labelled}, and a new one would stay frozen; fine-tune it "
            "first, or set frozen to false"
        )
