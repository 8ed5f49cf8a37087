"""Encoders in and out: the only module that knows transformers' models.

    configuration(path)              the model's config alone: cheap checks before any weight is read
    check_files(path)                whether its weights can be read, by their headers alone
    load(path, head, ...)            folder or hub name -> model with the head asked for, set to flat attention
    create(architecture, head, ...)  a new model
    save(model, folder)              model -> an ordinary Hugging Face folder
    trace(model, batch, needs)       one flat forward -> Trace
    Served                           [B, S] -> outputs, as transformers itself runs a model
    Frozen                           batch -> Trace of a model that does not learn: the teacher, or one under evaluation
    label_order(path, head, labels)  whether a model has the head of a task, and in which order its labels
    shape, parameters                sizes of a model

Batches are flat, so attention alone must know where sequences end. transformers lets a model run with an attention
function of our own (`AttentionInterface`); ours takes the `_Flat` that `trace` hands through the forward as a keyword,
records q, k and v where they are needed, and keeps sequences apart. On a GPU that is a variable-length kernel;
elsewhere it pads, inside attention only. Families with an attention of their own (`families.py`) run padded as a whole
(`_Padded`). A hook on the encoder picks the rows that the head reads, so that an MLM head works on masked positions
alone.

N tokens of all sequences, U spans of S places, R rows that the head reads, D width, H heads, V outputs.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import (
    CONFIG_MAPPING,
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from lad_dist import families
from lad_dist.config.errors import UserError
from lad_dist.core.batch import Batch, Head, one_span_per_sequence, pad, unpad
from lad_dist.core.outputs import ModelDims, ModelOutputs, OutputSpec
from lad_dist.utils.suggest import did_you_mean

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

ATTENTION = "lad_dist_flat"
AMPERE, MULTIPLE = (8, 0), 8  # what the variable-length kernel asks of a GPU, and of a head's size
# Settings of a config that change nothing of what the model computes.
UNHEARD = frozenset("_name_or_path architectures dtype id2label label2id problem_type transformers_version".split())
SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
REASON = 120  # characters of a library's complaint
CLASSES = {
    "none": AutoModel,
    "mlm": AutoModelForMaskedLM,
    "classification": AutoModelForSequenceClassification,
    "regression": AutoModelForSequenceClassification,
    "tagging": AutoModelForTokenClassification,
    "question_answering": AutoModelForQuestionAnswering,
}
# How the names of architectures end that have the head of a task.
ENDINGS = {
    "classification": "ForSequenceClassification",
    "regression": "ForSequenceClassification",
    "tagging": "ForTokenClassification",
    "question_answering": "ForQuestionAnswering",
}


def configuration(path: str) -> PreTrainedConfig:
    """The config of a model folder or hub name. Raises UserError when there is none, or none of a known family."""
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # a malformed one provokes anything from OSError to TypeError: the user gets one line
        raise UserError(f"{path}: no model can be read there ({first_line(error)})") from None
    families.check(config, path)
    for name in SIZES:
        size = getattr(config, name)
        if not isinstance(size, int) or size < 1:
            raise UserError(f"{path}: its config.json says {name} = {size!r}; copy the folder again")
    return config


def check_files(path: str) -> None:
    """Raises UserError where the weights in a folder are missing, cut off, or no weights. Hub names pass: their files
    may still have to be fetched."""
    folder = Path(path)
    if not folder.is_dir():
        return
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise UserError(f"{path}: no weights there, neither model.safetensors nor pytorch_model.bin")
    for file in files:
        try:
            _open(file)
        except Exception as error:  # of Rust, zip and pickle
            raise UserError(f"{file}: no weights can be read there ({first_line(error)})") from None


def _open(file: Path) -> None:
    """Reads what the file says of its tensors. Of a pickle, nothing but tensors is made, or it raises."""
    if file.suffix == ".safetensors":
        with safe_open(file, "pt"):
            return
    torch.load(file, map_location="meta", weights_only=True)


def load(
    path: str, head: Head, *, labels: Sequence[str] = (), dtype: torch.dtype = torch.float32, whole: bool = False
) -> PreTrainedModel:
    """The model at `path` with a head of the kind asked for, in flat attention. A head that the folder lacks, or whose
    labels are others, is new, unless `whole` forbids it. Raises UserError when the folder cannot be read or lacks what
    `whole` wants."""
    config = configuration(path)
    keep_head = whole or head in ("none", "mlm") or keeps_head(config, head, labels)
    if not keep_head:
        _set_labels(config, head, labels)
    try:
        model, report = CLASSES[head].from_pretrained(
            path,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=not whole,
            trust_remote_code=False,
        )
    except Exception as error:  # of Rust, zip and pickle too
        raise UserError(f"{path}: the model cannot be loaded ({first_line(error)})") from None
    missing = sorted(key for key in report["missing_keys"] if "pooler" not in key)
    _check_encoder(path, model, missing, report["mismatched_keys"])
    if whole and missing:
        raise UserError(f"{path}: this model has no {head} head ({missing[0]} is missing)")
    if not keep_head:
        _new_head(model)
    return _ready(model)


def _check_encoder(path: str, model: PreTrainedModel, missing: Sequence[str], mismatched: Iterable[Any]) -> None:
    """Raises UserError where the folder lacks weights below the head, or has them in other shapes: transformers would
    draw them at random."""
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    lacking = [key for key in missing if key.startswith(prefix)]
    if lacking:
        raise UserError(f"{path}: lacks {len(lacking)} weights, as {lacking[0]}; its config.json is of another model")
    wrong = sorted(str(key[0]) for key in mismatched if str(key[0]).startswith(prefix))
    if wrong:
        raise UserError(f"{path}: {wrong[0]} has another shape than config.json says; it is of another model")


def _new_head(model: PreTrainedModel) -> None:
    inside = set(model.base_model.modules())
    for module in model.modules():
        if isinstance(module, nn.Linear) and module not in inside:
            nn.init.normal_(module.weight, std=model.config.initializer_range)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def create(
    architecture: dict[str, Any],
    head: Head,
    *,
    vocabulary: int,
    special: Mapping[str, int] = MappingProxyType({}),
    labels: Sequence[str] = (),
) -> PreTrainedModel:
    """A new model in the words of its Hugging Face config, weights from torch's global generator."""
    return new(architecture_config(architecture, vocabulary, special), head, labels)


def new(config: PreTrainedConfig, head: Head, labels: Sequence[str] = ()) -> PreTrainedModel:
    """A model with this config, which becomes its own, and new weights; on the meta device, with none."""
    if labels:
        _set_labels(config, head, labels)
    return _ready(CLASSES[head].from_config(config))


def architecture_config(
    architecture: dict[str, Any], vocabulary: int, special: Mapping[str, int] = MappingProxyType({})
) -> PreTrainedConfig:
    """The config of a new model for a tokenizer of `vocabulary` tokens, whose `special` ones have these numbers
    (pad_token_id and so on). Raises UserError for a setting that its family does not have."""
    kind = architecture.get("model_type", "bert")
    if kind not in families.FAMILIES:
        raise UserError(f'student.architecture.model_type "{kind}" is unknown; {did_you_mean(kind, families.FAMILIES)}')
    family = CONFIG_MAPPING[kind]
    names = [name for name in family().to_dict() if not name.startswith("_")] + [*families.FAMILIES[kind].settings]
    words = {name: value for name, value in architecture.items() if name != "model_type"}
    for name in words:
        if name not in names:
            raise UserError(f"student.architecture.{name}: {kind} has no such setting; {did_you_mean(name, names)}")
    try:
        config = family(
            **{"vocab_size": vocabulary, **{k: v for k, v in special.items() if k in names}, **words},
        )
    except Exception as error:  # the family's own validation, of many kinds
        raise UserError(f"student.architecture: {first_line(error)}") from None
    if config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"student.architecture: {config.num_attention_heads} heads do not divide a width of {config.hidden_size}"
        )
    families.check(config, "student.architecture")
    return config


def save(model: PreTrainedModel, folder: Path) -> None:
    """Writes the model as an ordinary Hugging Face folder, in fp32."""
    model.float().save_pretrained(folder)


def first_line(error: Exception) -> str:
    said = " ".join(str(error).split())
    return (said if len(said) <= REASON else f"{said[:REASON]}…").rstrip(".") or type(error).__name__


def _set_labels(config: PreTrainedConfig, head: Head, labels: Sequence[str]) -> None:
    config.id2label = dict(enumerate(labels))
    config.label2id = {name: index for index, name in enumerate(labels)}
    if ENDINGS[head] == "ForSequenceClassification":
        config.problem_type = "regression" if head == "regression" else "single_label_classification"


def label_names(config: PreTrainedConfig) -> tuple[str, ...]:
    names = config.id2label or {}
    return tuple(str(names[index]) for index in range(len(names)))  # type: ignore[index]


def _has_head(config: PreTrainedConfig, head: Head) -> bool:
    """Whether the folder may hold a head of that kind, as far as it says what it holds."""
    return not config.architectures or any(name.endswith(ENDINGS[head]) for name in config.architectures)


def head_of(architectures: Sequence[str]) -> Head:
    """The head of a task that architectures of these names have; "none" where they have none, as pre-trained ones."""
    held = [head for head, ending in ENDINGS.items() if any(name.endswith(ending) for name in architectures)]
    return held[0] if held else "none"  # type: ignore[return-value]


def _same_outputs(config: PreTrainedConfig, head: Head, labels: Sequence[str]) -> bool:
    names = label_names(config)
    # Heads for questions have two outputs of fixed meaning, whatever their folder calls them.
    return len(names) == len(labels) and (head == "question_answering" or names == tuple(labels))


def label_order(path: str, head: Head, labels: Sequence[str]) -> list[int] | None:
    """Where each of the task's labels stands among the outputs of the model at `path`; None when in the same order.
    Raises UserError when it has no such head, or the labels do not fit it."""
    config = configuration(path)
    if not _has_head(config, head):
        found = ", ".join(config.architectures or ())
        raise UserError(f"{path}: its architecture is {found}, which has no head for {head.replace('_', ' ')}")
    names = label_names(config)
    if len(names) != len(labels):
        raise UserError(
            f"{path}: its head has {len(names)} outputs ({', '.join(names)}), "
            f"the task has {len(labels)} labels ({', '.join(labels)})"
        )
    unnamed = all(name.startswith("LABEL_") for name in names)
    if unnamed or _same_outputs(config, head, labels):
        return None
    if set(names) != set(labels):
        raise UserError(f"{path}: its labels are {', '.join(names)}, the task's are {', '.join(labels)}")
    return [names.index(label) for label in labels]


def _ready(model: PreTrainedModel) -> PreTrainedModel:
    if families.of(model.config).flat:
        model.set_attn_implementation(ATTENTION)
    return model


def layers(model: PreTrainedModel) -> nn.ModuleList:
    """The model's layers, first to last; one, where they share their weights."""
    base = model.base_model
    inside = (child for module in (base, *base.children()) for child in module.children())
    return next(child for child in inside if isinstance(child, nn.ModuleList))


def shape(config: PreTrainedConfig, head: Head, *, labels: int = 0, span: int | None = None) -> ModelDims:
    """What an objective needs to know of a model's sizes."""
    outputs = {"none": 0, "mlm": config.vocab_size}.get(head, labels)
    return ModelDims(config.num_hidden_layers, config.hidden_size, config.num_attention_heads, head, outputs, span)


def positions(config: PreTrainedConfig) -> int:
    """Tokens of the longest sequence that the model has positions for."""
    return int(config.max_position_embeddings) - families.of(config).first_position(config)


def check_length(config: PreTrainedConfig, name: str, longest: int) -> None:
    """Raises UserError when the model has no positions for sequences of `longest` tokens."""
    room = positions(config)
    if longest > room:
        raise UserError(f"data.max_length: {longest} tokens, but {name} has {room} positions")


def check_vocabulary(config: PreTrainedConfig, name: str, tokens: int) -> None:
    """Raises UserError when the model has embeddings for fewer than so many tokens."""
    if config.vocab_size < tokens:
        raise UserError(
            f"{name}: its tokenizer has {tokens} tokens, the model only {config.vocab_size}; one is not its"
        )


def keeps_head(config: PreTrainedConfig, head: Head, labels: Sequence[str]) -> bool:
    """Whether a folder's own head is the one that `load` gives, as far as its config says what it holds."""
    if head == "mlm":
        return has_mlm_head(config)
    return head == "none" or (_has_head(config, head) and _same_outputs(config, head, labels))


def has_mlm_head(config: PreTrainedConfig) -> bool:
    """Whether the folder says that it holds a masked-language-model head. (ELECTRA's discriminator has none.)"""
    names = [name for name in config.architectures or () if name != "ElectraForPreTraining"]
    return any(name.endswith(("ForMaskedLM", "ForPreTraining")) for name in names)


def tells_segments(config: PreTrainedConfig) -> bool:
    """Whether the model sees which tokens are those of the second text."""
    return getattr(config, "type_vocab_size", 0) > 1


def parameters(model: nn.Module) -> int:
    """Number of weights, shared ones counted once."""
    return sum(p.numel() for p in model.parameters())


@dataclass
class _Flat:
    """One forward over flat tokens: how the model sees them, what the attention function needs to know of the batch,
    and where it leaves q, k and v."""

    batch: Batch
    wanted: tuple[int, ...]
    layer: int = 0  # the one that runs, from 1: some families run one layer many times
    biases: dict[int | None, Tensor | None] = field(default_factory=dict)  # of attention's scores, by window
    qkv: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    @property
    def words(self) -> dict[str, Any]:
        return {"flat": self}

    def lay_out(self, x: Tensor) -> Tensor:
        """[N] to [1, N and filler], which linear layers see and nothing else does."""
        return F.pad(x, (0, self.batch.filled - len(x)))[None]

    def flatten(self, x: Tensor) -> Tensor:
        """[1, N and filler, D] to [N, D]."""
        return x[0, : len(self.batch.input_ids)]

    def recording(self, model: PreTrainedModel) -> list[RemovableHandle]:
        """The attention function records by itself."""
        return []

    def record(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """A Part in a layer's place may hold several: the last one's stay."""
        if self.layer in self.wanted:
            self.qkv[self.layer] = (q, k, v)

    def bias_like(self, q: Tensor, window: int | None) -> Tensor | None:
        """[U, 1, S or 1, S] in the type of q: 0 where a place attends to another, which is `window` places away at
        most; the least number elsewhere."""
        if window is not None and window >= self.batch.longest - 1:
            window = None
        if window not in self.biases:
            self.biases[window] = self._bias_like(q, window)
        return self.biases[window]

    def _bias_like(self, q: Tensor, window: int | None) -> Tensor | None:
        if window is None and not (self.batch.ragged or self.batch.packed):
            return None
        visible = self.batch.visible[:, None]
        if window is not None:
            places = torch.arange(self.batch.longest, device=q.device)
            distance = (places[:, None] - places).abs()
            visible = visible & (distance <= window) | (distance == 0)  # a place without a token too sees something
        return q.new_zeros(visible.shape).masked_fill(~visible, torch.finfo(q.dtype).min)


@dataclass
class _Padded:
    """One forward of a family with an attention of its own: [B, S], a sequence a span, and a mask of two dimensions."""

    batch: Batch
    wanted: tuple[int, ...]
    layer: int = 0
    found: dict[int, dict[str, list[Tensor]]] = field(default_factory=dict)  # by layer and attention in it
    heads: int = 0

    def __post_init__(self) -> None:
        self.batch = one_span_per_sequence(self.batch)

    @property
    def words(self) -> dict[str, Any]:
        return {"attention_mask": self.batch.attended.long()}

    @property
    def qkv(self) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
        last = {number: list(each.values())[-1] for number, each in self.found.items()}
        split = {n: [self.flatten(x).unflatten(-1, (self.heads, -1)) for x in each] for n, each in last.items()}
        return {number: (q, k, v) for number, (q, k, v) in split.items()}

    def lay_out(self, x: Tensor) -> Tensor:
        """[N] to [B, S]."""
        return pad(x, self.batch)

    def flatten(self, x: Tensor) -> Tensor:
        """[B, S, D] to [N, D]."""
        return unpad(x, self.batch)

    def recording(self, model: PreTrainedModel) -> list[RemovableHandle]:
        """Hooks on the maps to q, k and v of the layers wanted."""
        names = families.of(model.config).projections
        assert names is not None
        self.heads = model.config.num_attention_heads
        handles = []
        for number in self.wanted:
            for path, module in layers(model)[number - 1].named_modules():
                attention, _, name = path.rpartition(".")
                if name in names:
                    handles.append(module.register_forward_hook(self._keep(number, attention, names.index(name))))
        return handles

    def _keep(self, number: int, attention: str, place: int) -> Callable[..., None]:
        """A Part in a layer's place may hold several attentions: that of the last one to run stays."""

        def keep(_: nn.Module, __: Any, output: Tensor) -> None:
            kept = self.found.setdefault(number, {}).setdefault(attention, [])
            if len(kept) == place:  # DeBERTa sends its relative positions through the same maps afterwards
                kept.append(output)

        return keep


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    flat: _Flat,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """query, key, value [1, H, N, D / H] -> [1, N, H, D / H]: every token attends to the tokens of its own sequence,
    those less than `sliding_window` away where it is given."""
    tokens = len(flat.batch.input_ids)
    q, k, v = (x[0].transpose(0, 1)[:tokens] for x in (query, key, value))
    flat.record(q, k, v)
    # The kernel knows neither fp32 nor dropout, nor keys inside a span that do not count; these go the padded way.
    kernel = _has_kernel(q.device, q.dtype) and not dropout and flat.batch.tokens == tokens
    attend = _kernel_attention if kernel else _padded_attention
    window = None if sliding_window is None else sliding_window - 1
    out = attend(q, k, v, flat, scaling, dropout, window)
    return F.pad(out, (0, 0, 0, 0, 0, query.shape[2] - tokens))[None], None


@cache
def _has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    half = dtype in (torch.bfloat16, torch.float16)
    return half and device.type == "cuda" and torch.cuda.get_device_capability(device) >= AMPERE


def _kernel_attention(
    q: Tensor, k: Tensor, v: Tensor, flat: _Flat, scaling: float | None, _: float, window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    spans, longest, size = flat.batch.cu_seqlens, flat.batch.longest, q.shape[-1]
    q, k, v = (F.pad(x, (0, -size % MULTIPLE)).contiguous() for x in (q, k, v))
    scale = size**-0.5 if scaling is None else scaling
    reach = (-1, -1) if window is None else (window, window)
    out = varlen_attn(q, k, v, spans, spans, longest, longest, scale=scale, window_size=reach)
    assert isinstance(out, Tensor)
    return out[..., :size]


def _padded_attention(
    q: Tensor, k: Tensor, v: Tensor, flat: _Flat, scaling: float | None, dropout: float, window: int | None
) -> Tensor:
    q, k, v = (pad(x, flat.batch).transpose(1, 2) for x in (q, k, v))
    # PyTorch's fused attention on a CPU has a backward slower than the products themselves, in bf16 by half again.
    explicit = q.device.type == "cpu" and q.requires_grad and (dropout or q.dtype == torch.bfloat16)
    attend = _explicit_attention if explicit else F.scaled_dot_product_attention
    out = attend(q, k, v, attn_mask=flat.bias_like(q, window), dropout_p=dropout, scale=scaling)
    return unpad(out.transpose(1, 2), flat.batch)


def _explicit_attention(
    q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor | None, dropout_p: float, scale: float | None
) -> Tensor:
    """F.scaled_dot_product_attention of [U, H, S, D / H], product by product."""
    heads, (length, size) = q.shape[:2], q.shape[2:]
    q, k, v = (x.reshape(-1, length, size) for x in (q, k, v))
    bias = q.new_zeros(1, 1, 1)
    if attn_mask is not None:
        bias = attn_mask.expand(*heads, -1, -1).reshape(-1, *attn_mask.shape[2:])
    scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=size**-0.5 if scale is None else scale)
    weights = F.dropout(torch.softmax(scores, dim=-1), dropout_p, training=dropout_p > 0)
    return (weights @ v).view(*heads, length, size)


def _no_mask(*_: Any, **__: Any) -> None:
    """Flat attention keeps sequences apart by itself."""


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _no_mask)


def trace(model: PreTrainedModel, batch: Batch, needs: OutputSpec) -> ModelOutputs:
    """One forward over a flat batch, leaving what is needed."""
    base, family = model.base_model, families.of(model.config)
    run = (_Flat if family.flat else _Padded)(batch, needs.qkv)
    inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids + family.first_position(model.config)}
    segments = getattr(model.config, "type_vocab_size", 0)
    if segments:
        inputs["token_type_ids"] = batch.token_type_ids.clamp(max=segments - 1)
    hidden: dict[int, Tensor] = {}
    with _hooks(model, run, batch, needs, hidden):
        output = (model if needs.logits else base)(**{k: run.lay_out(x) for k, x in inputs.items()}, **run.words)
    return ModelOutputs(_logits(output) if needs.logits else None, hidden, run.qkv)


def _logits(output: Any) -> Tensor:
    """What a head says of rows that it took for sequences of one token, as [R, V]."""
    if "start_logits" in output:
        return torch.cat([output.start_logits, output.end_logits], dim=-1)
    return output.logits.view(-1, output.logits.shape[-1])


@contextlib.contextmanager
def _hooks(
    model: PreTrainedModel, run: _Flat | _Padded, batch: Batch, needs: OutputSpec, hidden: dict[int, Tensor]
) -> Iterator[None]:
    """Within it, a forward leaves the layers it `needs` in `hidden` and hands the head only its rows."""

    def keep(layer: int, x: Tensor) -> None:
        if layer in needs.hidden:
            hidden[layer] = run.flatten(x)

    def before_layer(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(run.layer, args[0] if args else kwargs["hidden_states"])
        run.layer += 1

    def at_end(_: nn.Module, __: Any, output: Any) -> Any:
        keep(run.layer, output.last_hidden_state)
        if needs.logits:
            # As sequences of one token: heads that read a sequence's first token and heads that read each both fit.
            output.last_hidden_state = _read(model, run.flatten(output.last_hidden_state), batch)[:, None]
        return output

    handles = [
        layer.register_forward_pre_hook(before_layer, with_kwargs=True) for layer in dict.fromkeys(layers(model))
    ]
    handles += [_end(model).register_forward_hook(at_end), *run.recording(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _end(model: PreTrainedModel) -> nn.Module:
    """The module whose output heads and poolers read."""
    base = model.base_model
    return base if getattr(base, "pooler", None) is None else base.get_submodule("encoder")


def _read(model: PreTrainedModel, x: Tensor, batch: Batch) -> Tensor:
    """[N, D] to [R, D]: what the head reads of it."""
    averaged = getattr(model.config, "classifier_pooling", "cls") == "mean"
    if not averaged or not type(model).__name__.endswith("ForSequenceClassification"):
        return x.index_select(0, batch.rows)
    spans = one_span_per_sequence(batch)
    real = pad(x, spans).masked_fill(~spans.attended[..., None], 0.0)
    return real.sum(dim=1) / batch.lengths[: batch.nonempty, None]


class Served(nn.Module):
    """A model as those run it who have its folder alone: input_ids, attention_mask and, where it tells segments,
    token_type_ids, all [B, S] -> `outputs`, by transformers' own attention. It takes the model over."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        if families.of(model.config).flat:
            model.set_attn_implementation("sdpa")
        self.model = model.eval().requires_grad_(False)
        self.inputs = INPUTS if tells_segments(model.config) else INPUTS[:2]
        self.outputs: tuple[str, ...] = ("logits",)
        if model.base_model is model:
            self.outputs = ("last_hidden_state",)
        elif head_of([type(model).__name__]) == "question_answering":
            self.outputs = ("start_logits", "end_logits")

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        given = dict(zip(INPUTS, (input_ids, attention_mask, token_type_ids), strict=True))
        output = self.model(**{name: given[name] for name in self.inputs})
        return tuple(output[name] for name in self.outputs)


class Frozen:
    """batch -> Trace of a model that does not learn. It stays outside the engine, so nothing of it is clipped, cast or
    saved."""

    def __init__(
        self,
        path: str,
        head: Head,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        labels: Sequence[str] = (),
    ):
        self.order = label_order(path, head, labels) if labels else None
        self.model = load(path, head, dtype=dtype, labels=labels, whole=head != "none").eval().to(device)
        self.model.requires_grad_(False)

    @torch.no_grad()
    def __call__(self, batch: Batch, needs: OutputSpec) -> ModelOutputs:
        seen = trace(self.model, batch, needs)
        if self.order is None or seen.logits is None:
            return seen
        return seen._replace(logits=seen.logits[:, self.order])

    @property
    def identity(self) -> dict[str, Any]:
        """What its answers depend on, beside the batch."""
        config = {name: value for name, value in self.model.config.to_dict().items() if name not in UNHEARD}
        return {"weights": digest(self.model), "config": config, "labels": self.order, "dtype": str(self.model.dtype)}


def digest(model: nn.Module) -> str:
    """sha256 over the model's weights, name by name."""
    return digest_of(model.state_dict())


def digest_of(weights: Mapping[str, Tensor]) -> str:
    """sha256 over weights by name."""
    total = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        total.update(name.encode())
        total.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()
