"""Narrower: an encoder of fewer coordinates, heads and inner units that computes what the wide one did, as far as they
allow.

    check(config, width, heads, …)   the sizes of the narrow model; refuses what cannot be made
    resized(config, size)            its config
    narrow(model, batches, …)        wide model -> narrow model, and what was lost on the way

Hidden states of all layers live in one space, for each layer adds to them: so one map A [D, d] with orthonormal columns
narrows them all, h' ≈ Aᵀh. What writes into the stream gets Aᵀ in front. A spans the principal directions of the hidden
states of a sample, their mean taken away (a mean costs no direction: biases hold it) and every layer counted alike.

A LayerNorm subtracts the mean over coordinates and has one scale for each, so it commutes with no rotation. Of all
bases of its span A therefore takes the one nearest to d of the old coordinates (found by pivoted QR, turned by the
orthogonal Procrustes solution): coordinates stay what they were, and outliers among them stay alone.

Then the narrow model is built from its embeddings up, on what it makes of the sample itself: a norm's scale and offset
are fitted by least squares to Aᵀh, and what reads the stream reads h ≈ lift h' + offset, a ridge regression that starts
from A. Inside an attention head, q and k are cut to the largest singular values of the scores, v and the output map to
those of their product; a student with fewer heads keeps those whose output varies most. A feed-forward block and a
head's dense layer keep the units whose output varies most, the means of the others going into the next bias. What is as
large as before stays as it was, so that nothing is lost at full width.

N tokens, D old width, d new width, E old and e new size of a head, F inner units, V outputs.
"""

import contextlib
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Literal

import scipy.linalg
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lad_dist.config.errors import UserError
from lad_dist.core.batch import Batch
from lad_dist.models import activations
from lad_dist.models.dims import encoder_layers
from lad_dist.models.loading import PreTrainedModel

WidthBasis = Literal["principal", "random"]

BERT = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "mixed": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "inner": "intermediate.dense",
    "outer": "output.dense",
    "layer_norm": "output.LayerNorm",
}
DISTILBERT = {
    "query": "attention.q_lin",
    "key": "attention.k_lin",
    "value": "attention.v_lin",
    "mixed": "attention.out_lin",
    "attention_norm": "sa_layer_norm",
    "inner": "ffn.lin1",
    "outer": "ffn.lin2",
    "layer_norm": "output_layer_norm",
}
# Those that normalise after adding, and whose attention is scores of q and k alone.
NAMES = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "data2vec-text", "electra"), BERT),
    "distilbert": DISTILBERT,
}
FLOOR = 1e-10  # of the largest eigenvalue: less than that is rounding
RIDGE = 1e-2  # of the mean variance, where few rows speak for many units


@dataclass(frozen=True)
class Widths:
    width: int
    heads: int
    inner: int


def check_widths(config: Any, width: int | None, heads: int | None, inner: int | None, name: str) -> Widths:
    """The sizes of the narrow model made of one with this config, called `name`. Raises UserError where it cannot be
    made."""
    if config.model_type not in NAMES:
        raise UserError(
            f"student.hidden_size: {config.model_type} cannot be narrowed, only {', '.join(NAMES)} can; "
            "take student.architecture for a new model of another width"
        )
    old = Widths(config.hidden_size, config.num_attention_heads, _inner(config))
    width = width or old.width
    new = Widths(width, heads or old.heads, inner or max(1, round(old.inner * width / old.width)))
    for key in ("width", "heads", "inner"):
        if getattr(new, key) > getattr(old, key):
            raise UserError(f"student.{key} = {getattr(new, key)}, but {name} has {getattr(old, key)}")
    if new.width != old.width and new.width == getattr(config, "embedding_size", None):
        raise UserError(
            f"student.hidden_size = {new.width}: as wide as {name}'s embeddings, whose map to hidden states it then has no "
            "place for; take another"
        )
    fitting = [n for n in range(1, old.heads + 1) if width % n == 0 and width // n <= old.width // old.heads]
    if new.heads not in fitting:
        choices = f"take {' or '.join(map(str, fitting))}" if fitting else "take another student.hidden_size"
        raise UserError(
            f"student.num_attention_heads: {new.heads} heads do not divide a width of {width} into sizes of at most "
            f"{old.width // old.heads}, as {name} has them; {choices}"
        )
    return new


def resized_config(config: Any, size: Widths) -> Any:
    """A copy of the config with these sizes."""
    config = deepcopy(config)
    if getattr(config, "embedding_size", None) == config.hidden_size:
        config.embedding_size = size.width
    config.hidden_size, config.num_attention_heads = size.width, size.heads
    setattr(config, _inner_name(config), size.inner)
    return config


def _inner_name(config: Any) -> str:
    return "hidden_dim" if config.model_type == "distilbert" else "intermediate_size"


def _inner(config: Any) -> int:
    return int(getattr(config, _inner_name(config)))


def narrow_model(
    model: PreTrainedModel, batches: Sequence[Batch], size: Widths, directions: WidthBasis
) -> tuple[PreTrainedModel, dict[str, float]]:
    """The model at the size given, fitted to a sample of what it will read, and the errors there (see `_errors`).

    Every process of a run must give it the same batches; "random" draws from torch's global generator."""
    training, model = model.training, model.eval()
    wide = _ModuleMap(model)
    found = _measure(wide, batches)
    axes = _axes(found.stream, size.width, directions)
    student = type(model)(resized_config(model.config, size)).eval()
    student.to(device=model.device, dtype=model.dtype)
    if model.config._attn_implementation != student.config._attn_implementation:
        student.set_attn_implementation(model.config._attn_implementation)
    thin = _ModuleMap(student)
    with torch.no_grad():
        _cut_embeddings(wide, thin, axes)
        read = _Fit(wide, thin, axes, batches, found).fit()
        _cut_head(wide, thin, axes, read, found)
        _fit_head_norm(wide, thin, axes, found, batches)
    return student.train(training), _errors(wide, thin, axes, found, batches)


_Layer = dict[str, Any]


class _ModuleMap:
    """The modules of a model, by what they are for. `stream`: those whose outputs are hidden states, in order."""

    def __init__(self, model: PreTrainedModel):
        names = NAMES[model.config.model_type]
        base: Any = model.base_model
        self.model = model
        self.embeddings = base.embeddings
        self.project: nn.Linear | None = getattr(base, "embeddings_project", None)
        self.layers = [
            {role: layer.get_submodule(name) for role, name in names.items()} for layer in encoder_layers(model)
        ]
        first = self.embeddings.LayerNorm if self.project is None else self.project
        self.stream = [first, *(layer[norm] for layer in self.layers for norm in ("attention_norm", "layer_norm"))]
        inside = {
            *self.embeddings.modules(),
            *(m for layer in encoder_layers(model) for m in layer.modules()),
            self.project,
        }
        embedded = model.get_input_embeddings().get_parameter("weight")
        self.words = embedded.detach().double().cpu()
        outside = [module for module in model.modules() if module not in inside]
        self.tied = any(getattr(m, "weight", None) is embedded for m in outside)
        self.head = [m for m in outside if isinstance(m, nn.Linear) and m.weight is not embedded]
        self.head_norm = next((m for m in outside if isinstance(m, nn.LayerNorm)), None)
        self.decoder_bias: Any = next((m.bias for m in outside if getattr(m, "weight", None) is embedded), None)
        known = {id(p) for m in inside if m is not None for p in m.parameters()}
        self.outside = {name: p for name, p in model.named_parameters() if id(p) not in known}


@dataclass
class _Moments:
    """Sums over rows [N, D], in fp64."""

    count: int = 0
    total: Tensor | float = 0.0
    products: Tensor | float = 0.0

    def add(self, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1]).double().cpu()
        self.count += len(x)
        self.total = self.total + x.sum(dim=0)
        self.products = self.products + x.T @ x

    @property
    def mean(self) -> Tensor:
        return torch.as_tensor(self.total) / self.count

    @property
    def covariance(self) -> Tensor:
        return torch.as_tensor(self.products) / self.count - torch.outer(self.mean, self.mean)


@dataclass
class _Units:
    """Sums over rows [N, F] of units that are looked at one by one, in fp64."""

    count: int = 0
    total: Tensor | float = 0.0
    squares: Tensor | float = 0.0

    def add(self, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1]).double()
        self.count += len(x)
        self.total = self.total + x.sum(dim=0).cpu()
        self.squares = self.squares + x.square().sum(dim=0).cpu()

    @property
    def mean(self) -> Tensor:
        return torch.as_tensor(self.total) / self.count

    @property
    def variance(self) -> Tensor:
        return (torch.as_tensor(self.squares) / self.count - self.mean.square()).clamp(min=0.0)


@dataclass
class _Statistics:
    """What the wide model showed on the sample. `states`: its hidden states at each place of the stream, [N, D] of each
    batch. `units`: of its head, where that has a dense layer."""

    states: list[list[Tensor]]
    stream: list[_Moments]
    inner: list[_Units]
    units: _Moments = field(default_factory=_Moments)


def _measure(wide: _ModuleMap, batches: Sequence[Batch]) -> _Statistics:
    found = _Statistics([[] for _ in wide.stream], [_Moments() for _ in wide.stream], [_Units() for _ in wide.layers])
    outer = [layer["outer"] for layer in wide.layers]
    dense = [wide.head_norm] if wide.tied and wide.head_norm is not None else wide.head[1:2]
    for batch in batches:
        with (
            activations.capture(
                wide.stream,
                lambda n, _, y: found.states[n].append(activations.token_rows(y, batch).float()),  # noqa: B023
            ),
            activations.capture(outer, lambda n, x, _: found.inner[n].add(activations.token_rows(x, batch))),  # noqa: B023
            activations.capture(dense, lambda _, x, y: found.units.add(y if wide.tied else x)),
        ):
            activations.run_logits(wide.model, batch)
    for moments, states in zip(found.stream, found.states, strict=True):
        for state in states:
            moments.add(state)
    return found


def _axes(stream: Sequence[_Moments], width: int, directions: WidthBasis) -> Tensor:
    """A [D, d]."""
    total = sum(seen.covariance / seen.covariance.trace() for seen in stream)
    assert isinstance(total, Tensor)
    if width == len(total):
        return torch.eye(width, dtype=total.dtype)
    if directions == "random":
        span = torch.linalg.qr(torch.randn(len(total), width, dtype=total.dtype)).Q
    else:
        span = torch.linalg.eigh(total).eigenvectors[:, -width:]
    return _near_coordinates(span)


def _near_coordinates(span: Tensor) -> Tensor:
    """The basis of the span [D, d] that is nearest to d coordinates."""
    _, order = scipy.linalg.qr(span.T.numpy(), mode="r", pivoting=True)
    chosen = torch.as_tensor(sorted(order[: span.shape[1]].tolist()))
    left, _, right = torch.linalg.svd(span[chosen].T)
    return span @ (left @ right)


def _assign(linear: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    linear.weight.copy_(weight)
    if linear.bias is not None:
        linear.bias.copy_(bias)


def _weight_and_bias(linear: nn.Linear) -> tuple[Tensor, Tensor]:
    weight = linear.weight.double().cpu()
    return weight, weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.double().cpu()


@dataclass
class _Reconstruction:
    """How the narrow model's hidden states h' [d] at a place tell the wide one's, h = lift h' + offset."""

    lift: Tensor  # [D, d]
    offset: Tensor  # [D]
    mean: Tensor  # [d], of h'
    covariance: Tensor  # [d, d], of h'

    @classmethod
    def of(cls, thin: Sequence[Tensor], wide: Sequence[Tensor], axes: Tensor) -> "_Reconstruction":
        """Ridge regression, which starts from A."""
        both = _Moments()
        for x, y in zip(thin, wide, strict=True):
            both.add(torch.cat([x, y], dim=1))
        width = axes.shape[1]
        mean, its = both.mean.split([width, len(axes)])
        covariance, cross = both.covariance[:width, :width], both.covariance[width:, :width]
        ridge = RIDGE * covariance.diagonal().mean() * torch.eye(width, dtype=axes.dtype)
        lift = axes + torch.linalg.solve(covariance + ridge, (cross - axes @ covariance).T).T
        return cls(lift, its - lift @ mean, mean, covariance)

    def by(self, linear: nn.Linear) -> tuple[Tensor, Tensor]:
        """Weight and bias of a map that reads h' as the linear one reads h."""
        weight, bias = _weight_and_bias(linear)
        return weight @ self.lift, bias + weight @ self.offset


class _Fit:
    """Layer by layer, on what the layers before make of the sample."""

    def __init__(self, wide: _ModuleMap, thin: _ModuleMap, axes: Tensor, batches: Sequence[Batch], found: _Statistics):
        self.wide, self.thin, self.axes, self.batches, self.found = wide, thin, axes, batches, found
        self.states = found.states

    def fit(self) -> _Reconstruction:
        """Sets all of the layers; how to read their last output."""
        read = self._settle(0)
        for number, (old, new) in enumerate(zip(self.wide.layers, self.thin.layers, strict=True)):
            config = self.wide.model.config, self.thin.model.config
            heads, fewer = (c.num_attention_heads for c in config)
            _cut_attention(old, new, self.axes, read, heads, fewer)
            read = self._settle(2 * number + 1)
            _cut_block(old, new, self.axes, read, self.found.inner[number])
            read = self._settle(2 * number + 2)
        return read

    def _settle(self, place: int) -> _Reconstruction:
        """Fits the norm at a place of the stream."""
        module = self.thin.stream[place]
        turn = self.axes.float().to(self.states[place][0].device)
        wanted = [x @ turn for x in self.states[place]]
        inputs = zip(_inputs(self.thin, module, self.batches), self.batches, strict=True)
        given = [activations.token_rows(x, batch).float() for x, batch in inputs]
        if isinstance(module, nn.LayerNorm):
            _fit_norm(module, given, wanted)
        outputs = [module(x.to(next(module.parameters()))).float() for x in given]
        return _Reconstruction.of(outputs, self.states[place], self.axes)


def _cut_embeddings(wide: _ModuleMap, thin: _ModuleMap, axes: Tensor) -> None:
    if wide.project is not None:
        assert thin.project is not None
        thin.embeddings.load_state_dict(wide.embeddings.state_dict())
        weight, bias = _weight_and_bias(wide.project)
        _assign(thin.project, axes.T @ weight, axes.T @ bias)
        return
    for old, new in zip(wide.embeddings.modules(), thin.embeddings.modules(), strict=True):
        if isinstance(old, nn.Embedding):
            new.weight.copy_(old.weight.double().cpu() @ axes)


def _cut_attention(old: _Layer, new: _Layer, axes: Tensor, read: _Reconstruction, heads: int, fewer: int) -> None:
    covariance, mean = read.covariance, read.mean
    size = axes.shape[1] // fewer
    maps = [_by_heads(read.by(old[role]), heads) for role in ("query", "key", "value")]
    weight, bias = _weight_and_bias(old["mixed"])
    bias = axes.T @ bias
    outs = (axes.T @ weight).unflatten(1, (heads, -1)).unbind(1)
    each = list(zip(*maps, outs, strict=True))
    spread = [(out @ _root(value.covariance(covariance))[0]).square().sum().item() for _, _, value, out in each]
    kept = sorted(sorted(range(heads), key=lambda n: -spread[n])[:fewer])
    narrowed: list[tuple[_Map, _Map, _Map, Tensor]] = []
    for number, (query, key, value, out) in enumerate(each):
        before = out @ value(mean)
        if number in kept:
            query, key = _cut_scores(query, key, covariance, mean, size)
            value, out = _cut_values(value, out, covariance, size)
            narrowed.append((query, key, value, out))
            before = before - out @ value(mean)
        bias = bias + before  # attention's shares sum to one, so what is lost of the mean is lost at every token
    for role, place in (("query", 0), ("key", 1), ("value", 2)):
        joined = [head[place] for head in narrowed]
        _assign(new[role], torch.cat([x.weight for x in joined]), torch.cat([x.bias for x in joined]))  # type: ignore[union-attr]
    _assign(new["mixed"], torch.cat([head[3] for head in narrowed], dim=1), bias)


@dataclass
class _Map:
    """The map to one head's q, k or v: weight [E, d], bias [E]."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return self.weight @ x + self.bias

    def covariance(self, covariance: Tensor) -> Tensor:
        return self.weight @ covariance @ self.weight.T

    def then(self, turn: Tensor) -> "_Map":
        return _Map(turn @ self.weight, turn @ self.bias)


def _by_heads(linear: tuple[Tensor, Tensor], heads: int) -> list[_Map]:
    weights, biases = (x.unflatten(0, (heads, -1)) for x in linear)
    return [_Map(weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def _root(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """R with R Rᵀ = covariance [E, E], and its pseudo-inverse."""
    values, vectors = torch.linalg.eigh(covariance)
    there = values > FLOOR * values[-1].clamp(min=torch.finfo(values.dtype).tiny)
    root = values.clamp(min=0.0).sqrt()
    return vectors * root, torch.where(there, 1 / root, 0.0)[:, None] * vectors.T


def _cut_scores(query: _Map, key: _Map, covariance: Tensor, mean: Tensor, size: int) -> tuple[_Map, _Map]:
    """To the largest singular values of the scores q kᵀ of any two tokens. What all keys share is the same for all
    scores of a query, which the softmax does not see."""
    before = len(query.weight)
    if size == before:
        return query, key
    middle = query(mean)
    (queries, from_queries), (keys, from_keys) = (
        _root(query.covariance(covariance) + torch.outer(middle, middle)),
        _root(key.covariance(covariance)),
    )
    left, values, right = torch.linalg.svd(queries.T @ keys)
    half = values[:size].sqrt()[:, None]
    rescaled = (size / before) ** 0.5  # attention divides by the root of the new size
    return query.then(rescaled * half * (left[:, :size].T @ from_queries)), key.then(half * (right[:size] @ from_keys))


def _cut_values(value: _Map, out: Tensor, covariance: Tensor, size: int) -> tuple[_Map, Tensor]:
    """To the largest singular values of what the head's values become in the stream: out [d, E]."""
    if size == len(value.weight):
        return value, out
    root, inverse = _root(value.covariance(covariance))
    left, values, right = torch.linalg.svd(out @ root, full_matrices=False)
    half = values[:size].sqrt()
    return value.then(half[:, None] * (right[:size] @ inverse)), left[:, :size] * half


def _cut_block(old: _Layer, new: _Layer, axes: Tensor, read: _Reconstruction, inner: _Units) -> None:
    weight, bias = read.by(old["inner"])
    out, rest = (axes.T @ x for x in _weight_and_bias(old["outer"]))
    kept = _most(inner.variance * out.square().sum(dim=0), len(new["inner"].weight))
    dropped = torch.ones(len(weight), dtype=torch.bool).index_fill_(0, kept, False)
    _assign(new["inner"], weight[kept], bias[kept])
    _assign(new["outer"], out[:, kept], rest + out[:, dropped] @ inner.mean[dropped])


def _most(importance: Tensor, count: int) -> Tensor:
    """Numbers of the `count` largest, rising."""
    return importance.argsort(descending=True, stable=True)[:count].sort().values


def _cut_head(wide: _ModuleMap, thin: _ModuleMap, axes: Tensor, read: _Reconstruction, found: _Statistics) -> None:
    """What reads the last hidden states; after its dense layer, where there is one, come units (a classifier's) or
    states in the space of the embeddings (a masked language model's)."""
    same = {name: x for name, x in wide.outside.items() if x.shape == thin.outside[name].shape}
    for name, as_large in same.items():
        thin.outside[name].copy_(as_large)
    if not wide.head:
        return
    weight, bias = read.by(wide.head[0])
    turn = _head_axes(wide, thin, axes, found)
    if turn is None:
        _assign(thin.head[0], weight, bias)
        return
    _assign(thin.head[0], turn.T @ weight, turn.T @ bias)
    for old, new in zip(wide.head[1:], thin.head[1:], strict=True):
        lift = _lift(found.units.covariance, turn)
        weight, bias = _weight_and_bias(old)
        _assign(new, weight @ lift, bias + weight @ (found.units.mean - lift @ (turn.T @ found.units.mean)))
    if wide.tied and thin.decoder_bias is not None:
        lost = found.units.mean - axes @ (axes.T @ found.units.mean)
        thin.decoder_bias.add_((wide.words @ lost).to(thin.decoder_bias))


def _head_axes(wide: _ModuleMap, thin: _ModuleMap, axes: Tensor, found: _Statistics) -> Tensor | None:
    """[D, d] from the outputs of the head's dense layer to the narrow one's; None where these are as many."""
    if len(wide.head[0].weight) == len(thin.head[0].weight):
        return None
    if wide.tied or len(wide.head) == 1:
        return axes
    weight, _ = _weight_and_bias(wide.head[1])
    kept = _most(found.units.covariance.diagonal() * weight.square().sum(dim=0), axes.shape[1])
    return torch.eye(len(axes), dtype=axes.dtype)[:, kept]


def _lift(covariance: Tensor, turn: Tensor) -> Tensor:
    """[D, d]: from the units that are kept, what all of them are likely to be."""
    kept = turn.T @ covariance @ turn
    ridge = RIDGE * kept.diagonal().mean() * torch.eye(len(kept), dtype=kept.dtype)
    return torch.linalg.solve(kept + ridge, turn.T @ covariance).T


class _Enough(Exception):
    """The module that was waited for has run."""


def _inputs(parts: _ModuleMap, module: nn.Module, batches: Sequence[Batch]) -> list[Tensor]:
    """What the module is given for each batch; nothing after it runs."""
    given: list[Tensor] = []

    def keep(_: int, x: Tensor, __: Tensor) -> None:
        given.append(x)
        raise _Enough

    for batch in batches:
        with activations.capture([module], keep), contextlib.suppress(_Enough):
            activations.run_logits(parts.model, batch)
    return given


def _fit_norm(norm: nn.LayerNorm, given: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    """Scale and offset by least squares: from inputs [N, d] to outputs [N, d]."""
    sums: Tensor | float = 0.0
    for inputs, outputs in zip(given, wanted, strict=True):
        x, y = F.layer_norm(inputs.float(), inputs.shape[-1:], eps=norm.eps).double(), outputs.double()
        sums = sums + torch.stack([x.sum(0), y.sum(0), x.square().sum(0), (x * y).sum(0)])
    mean, its, square, product = torch.as_tensor(sums) / sum(map(len, given))
    scale = (product - mean * its) / (square - mean * mean).clamp(min=FLOOR)
    norm.weight.copy_(scale)
    norm.bias.copy_(its - scale * mean)


def _fit_head_norm(
    wide: _ModuleMap, thin: _ModuleMap, axes: Tensor, found: _Statistics, batches: Sequence[Batch]
) -> None:
    """Of a head whose dense layer is narrower than it was."""
    if wide.head_norm is None or thin.head_norm is None or (turn := _head_axes(wide, thin, axes, found)) is None:
        return
    wanted: list[Tensor] = []
    turn = turn.float().to(wide.model.device)
    for batch in batches:
        with activations.capture([wide.head_norm], lambda _, __, y: wanted.append(y.flatten(0, -2).float() @ turn)):
            activations.run_logits(wide.model, batch)
    given = [x.flatten(0, -2) for x in _inputs(thin, thin.head_norm, batches)]
    _fit_norm(thin.head_norm, given, wanted)


def _errors(
    wide: _ModuleMap, thin: _ModuleMap, axes: Tensor, found: _Statistics, batches: Sequence[Batch]
) -> dict[str, float]:
    """On the sample, relative to how far the wide model's own values lie from their mean (root mean squares):
    "hidden/l" of the narrow model's hidden states against the wide one's in its coordinates, "lost/l" of what these
    coordinates leave out, layer 0 being the embeddings' output; "logits", where there is a head."""
    points = range(0, len(wide.stream), 2)
    states = [0.0] * len(points)
    logits: list[tuple[Tensor, Tensor]] = []
    turn = axes.float().to(wide.model.device)
    for batch in batches:
        outputs = []
        for parts in (wide, thin):
            seen: list[list[Tensor]] = [[] for _ in points]
            with activations.capture([parts.stream[n] for n in points], lambda n, _, y: seen[n].append(y)):  # noqa: B023
                outputs.append(
                    (activations.run_logits(parts.model, batch), [activations.token_rows(x[0], batch) for x in seen])
                )
        (z, h), (z_thin, h_thin) = outputs
        states = [
            total + (x @ turn - y).double().square().sum().item() for total, x, y in zip(states, h, h_thin, strict=True)
        ]
        logits += [(z, z_thin)] if z is not None and z_thin is not None else []
    errors: dict[str, float] = {}
    for layer, (total, moments) in enumerate(zip(states, (found.stream[n] for n in points), strict=True)):
        whole, kept = moments.covariance.trace(), (axes.T @ moments.covariance @ axes).trace()
        errors[f"hidden/{layer}"] = (total / moments.count / kept.item()) ** 0.5
        errors[f"lost/{layer}"] = ((whole - kept).clamp(min=0.0) / whole).sqrt().item()
    if logits:
        its, mine = (torch.cat(side).double() for side in zip(*logits, strict=True))
        errors["logits"] = ((its - mine).norm() / (its - its.mean(dim=0)).norm()).item()
    return errors
