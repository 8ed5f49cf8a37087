"""Fits: a narrow model, from its embeddings up, to what its earlier modules compute on the sample.

N tokens, D old width, d new width, F intermediate units.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lad_dist.compression.width_pruning.heads import FLOOR, cut_attention
from lad_dist.compression.width_pruning.modules import ModuleMap, assign, weight_and_bias
from lad_dist.compression.width_pruning.statistics import Reconstruction, Statistics, with_ridge
from lad_dist.core.batch import Batch
from lad_dist.models import activations


class Fit:
    """The fit of a narrow model along axes [D, d]. `errors` are those of its hidden states, in its coordinates.

    They are sums over tokens and coordinates of squares, by place of the stream.
    """

    def __init__(
        self, wide: ModuleMap, narrow: ModuleMap, axes: Tensor, batches: Sequence[Batch], statistics: Statistics
    ):
        self.wide, self.narrow, self.axes, self.batches, self.statistics = wide, narrow, axes, batches, statistics
        self.errors: list[float] = []

    @torch.no_grad()
    def run(self) -> None:
        """Set all weights of the narrow model."""
        num_heads, num_narrow_heads = (side.model.config.num_attention_heads for side in (self.wide, self.narrow))
        self._cut_embeddings()
        inputs = self._fit_place(0)
        for number, (wide_layer, layer) in enumerate(zip(self.wide.layers, self.narrow.layers, strict=True)):
            cut_attention(wide_layer, layer, self.axes, inputs, num_heads, num_narrow_heads)
            inputs = self._fit_place(2 * number + 1)
            self._cut_feed_forward(number, inputs)
            inputs = self._fit_place(2 * number + 2)
        self._cut_head(inputs)

    def _cut_embeddings(self) -> None:
        """Project the embeddings; where a map follows them, project its outputs instead."""
        wide, narrow, axes = self.wide, self.narrow, self.axes
        if wide.projection is not None:
            assert narrow.projection is not None
            narrow.embeddings.load_state_dict(wide.embeddings.state_dict())
            weight, bias = weight_and_bias(wide.projection)
            assign(narrow.projection, axes.T @ weight, axes.T @ bias)
            return
        for wide_module, module in zip(wide.embeddings.modules(), narrow.embeddings.modules(), strict=True):
            if isinstance(wide_module, nn.Embedding):
                module.weight.copy_(wide_module.weight.double().cpu() @ axes)

    def _fit_place(self, place: int) -> Reconstruction:
        """Fit the norm at a place of the stream. Return how to reconstruct the wide hidden states from its outputs."""
        module, states = self.narrow.stream[place], self.statistics.states[place]
        projection = self.axes.float().to(states[0].device)
        targets = [x @ projection for x in states]
        pairs = zip(self._inputs_of(module), self.batches, strict=True)
        inputs = [activations.token_rows(x, batch).float() for x, batch in pairs]
        if isinstance(module, nn.LayerNorm):
            _fit_norm(module, inputs, targets)
        outputs = [module(x.to(next(module.parameters()))).float() for x in inputs]
        squares = [(x - y).double().square().sum().item() for x, y in zip(targets, outputs, strict=True)]
        self.errors.append(sum(squares))
        return Reconstruction.fit(outputs, states, self.axes)

    def _inputs_of(self, module: nn.Module) -> list[Tensor]:
        """Return what a module of the narrow model reads, for each batch."""
        inputs: list[Tensor] = []
        for batch in self.batches:
            with activations.capture([module], lambda _, x, __: inputs.append(x)):
                activations.compute_logits(self.narrow.model, batch)
        return inputs

    def _cut_feed_forward(self, number: int, inputs: Reconstruction) -> None:
        """Set a feed-forward block: the units whose output varies most, the means of the others a bias."""
        wide, narrow = self.wide.layers[number], self.narrow.layers[number]
        weight, bias = inputs.compose(wide["intermediate"])
        out, out_bias = (self.axes.T @ x for x in weight_and_bias(wide["output"]))
        importance = self.statistics.unit_variances[number] * out.square().sum(dim=0)
        units = _largest(importance, len(narrow["intermediate"].weight))
        dropped = torch.ones(len(weight), dtype=torch.bool).index_fill_(0, units, False)
        assign(narrow["intermediate"], weight[units], bias[units])
        means = self.statistics.unit_means[number]
        assign(narrow["output"], out[:, units], out_bias + out[:, dropped] @ means[dropped])

    def _cut_head(self, inputs: Reconstruction) -> None:
        """Set what reads the last hidden states.

        After its dense layer, where it has one, come units (a classifier's) or states in the space of the embeddings (a
        masked language model's).
        """
        wide, narrow = self.wide, self.narrow
        for name, parameter in wide.outside.items():
            if parameter.shape == narrow.outside[name].shape:
                narrow.outside[name].copy_(parameter)
        if not wide.head:
            return
        weight, bias = inputs.compose(wide.head[0])
        if len(wide.head[0].weight) == len(narrow.head[0].weight):
            assign(narrow.head[0], weight, bias)
            return
        axes = self._head_axes()
        assign(narrow.head[0], axes.T @ weight, axes.T @ bias)
        if self.statistics.head is None:
            return
        _, mean, covariance = self.statistics.head
        for wide_map, narrow_map in zip(wide.head[1:], narrow.head[1:], strict=True):
            lift = torch.linalg.solve(with_ridge(axes.T @ covariance @ axes), axes.T @ covariance).T
            weight, bias = weight_and_bias(wide_map)
            assign(narrow_map, weight @ lift, bias + weight @ (mean - lift @ (axes.T @ mean)))
        if wide.is_tied and narrow.decoder_bias is not None:
            lost_mean = mean - axes @ (axes.T @ mean)
            narrow.decoder_bias.add_((wide.word_embeddings @ lost_mean).to(narrow.decoder_bias))
        if narrow.head_norm is not None:
            projection = axes.float().to(wide.model.device)
            targets = [x.float() @ projection for x in self.statistics.head_states]
            _fit_norm(narrow.head_norm, [x.flatten(0, -2) for x in self._inputs_of(narrow.head_norm)], targets)

    def _head_axes(self) -> Tensor:
        """Return [D, d] from the outputs of the head's dense layer to the narrow one's."""
        if self.wide.is_tied or self.statistics.head is None:
            return self.axes
        weight, _ = weight_and_bias(self.wide.head[1])
        importance = self.statistics.head.covariance.diagonal() * weight.square().sum(dim=0)
        return torch.eye(len(self.axes), dtype=self.axes.dtype)[:, _largest(importance, self.axes.shape[1])]


def _largest(importance: Tensor, count: int) -> Tensor:
    """Return the numbers of the `count` largest, rising."""
    return importance.argsort(descending=True, stable=True)[:count].sort().values


def _fit_norm(norm: nn.LayerNorm, inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """Set scale and offset by least squares: from inputs [N, d] to targets [N, d], of each batch."""
    sums: Tensor | float = 0.0
    for batch_inputs, batch_targets in zip(inputs, targets, strict=True):
        x = F.layer_norm(batch_inputs.float(), batch_inputs.shape[-1:], eps=norm.eps).double()
        y = batch_targets.double()
        sums = sums + torch.stack([x.sum(0), y.sum(0), x.square().sum(0), (x * y).sum(0)])
    mean_x, mean_y, mean_square, mean_product = torch.as_tensor(sums) / sum(map(len, inputs))
    scale = (mean_product - mean_x * mean_y) / (mean_square - mean_x * mean_x).clamp(min=FLOOR)
    norm.weight.copy_(scale)
    norm.bias.copy_(mean_y - scale * mean_x)
