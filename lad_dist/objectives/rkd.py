"""RKD: relational knowledge distillation, distances and angles between the sequences of a micro-batch."""

from functools import partial
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from lad_dist.core.batch import Batch
from lad_dist.core.outputs import ModelDims, ModelOutputs
from lad_dist.objectives import losses
from lad_dist.objectives.kd import KD, Weight

CHUNK_ANGLES = 1 << 22  # angles that are computed at a time


class RKD(KD):
    """Relational knowledge distillation (Park et al., CVPR 2019), beside plain distillation.

        d_ij = ‖x_i - x_j‖ / µ       with µ the mean of ‖x_i - x_j‖ over all pairs of the micro-batch
        a_ijk = cosine of the angle at x_j between x_i and x_k
        L = distance · mean of Huber(d_ij(S), d_ij(T)) + angle · mean of Huber(a_ijk(S), a_ijk(T)) + hard · CE
            + soft · T² KL

    x_i [B, D] stands for a sequence: the mean of its tokens' last hidden states, which makes better sentence embeddings
    than the first token (Reimers and Gurevych, EMNLP 2019, table 6). With `pooled = "first"` it is the first token,
    which the head of a classifier reads. Widths may differ, and nothing is projected. Means over pairs and triplets
    stand for the paper's sums (section 3.2); the weights have the paper's ratio of 1 to 2.

    A sequence of a corpus is what a window holds of a document. Sequences are compared within a micro-batch, so larger
    ones teach more: one sequence has no pair, and two have no angle, nor a distance that differs from its mean. So a
    step depends on its micro-batches, and not on its examples alone. Of 32 examples of MRPC, micro-batches of 8, 4 and
    1 have gradients that differ by 18 %, 29 % and 31 % from that of all at once. Points in the same place have no
    direction, so they take part in no angle.
    """

    def __init__(
        self,
        student: ModelDims,
        teacher: ModelDims,
        *,
        distance: Weight = 1.0,
        angle: Weight = 2.0,
        pooled: Literal["mean", "first"] = "mean",
        max_sequences: Annotated[int, Field(ge=2, description="first ones of a micro-batch, which are compared")] = 256,
        soft: Weight = 0.5,
        hard: Weight = 0.5,
        temperature: Annotated[float, Field(gt=0)] = 2.0,
    ):
        """Build the objective for two models.

        Args:
            student: Dimensions of the student.
            teacher: Dimensions of the teacher.
            distance: Weight of the distances.
            angle: Weight of the angles.
            pooled: Whether a sequence is the mean of its tokens or the first of them.
            max_sequences: Number of sequences of a micro-batch that are compared; angles grow with its third power.
            soft: Weight of the teacher's logits.
            hard: Weight of the labels.
            temperature: T.

        Raises:
            UserError: The teacher lacks the head that `soft` needs.
        """
        super().__init__(student, teacher, soft=soft, hard=hard, temperature=temperature)
        self.distance, self.angle, self.pooled, self.max_sequences = distance, angle, pooled, max_sequences
        self.student_layer, self.teacher_layer = student.num_hidden_layers, teacher.num_hidden_layers
        if distance or angle:
            self.student_spec = self.student_spec._replace(hidden=(self.student_layer,))
            self.teacher_spec = self.teacher_spec._replace(hidden=(self.teacher_layer,))

    def forward(self, student: ModelOutputs, teacher: ModelOutputs | None, batch: Batch) -> dict[str, Tensor]:
        """Compute KD's terms and the errors of distances and angles.

        Returns:
            KD's terms, and "distance" and "angle", each only if its weight is not 0.
        """
        assert teacher is not None
        terms = super().forward(student, teacher, batch)
        if not (self.distance or self.angle):
            return terms
        nonempty = batch.lengths[: self.max_sequences] > 0
        pairs = (nonempty[:, None] & nonempty).fill_diagonal_(False)
        products = (
            self._products(student.hidden[self.student_layer], batch, nonempty),
            self._products(teacher.hidden[self.teacher_layer], batch, nonempty),
        )
        if self.distance:
            terms["distance"] = self.distance * _distance_error(*products, pairs)
        if self.angle:
            terms["angle"] = self.angle * _angle_error(*products, pairs)
        return terms

    def _products(self, x: Tensor, batch: Batch, nonempty: Tensor) -> Tensor:
        """Return inner products [B, B] of the sequences in hidden states [N, D], seen from their mean."""
        if self.pooled == "mean":
            points = losses.sequence_means(x, batch, limit=len(nonempty))
        else:
            points = losses.first_tokens(x, batch)[: len(nonempty)]
        # Products of neighbouring points differ in the last digits alone: of those fp64 has enough.
        points = points.double().masked_fill(~nonempty[:, None], 0.0)
        points = points - points.sum(dim=0) / nonempty.sum()
        return losses.products(points[None], heads=1)[0, 0]


def _distance_error(student: Tensor, teacher: Tensor, pairs: Tensor) -> Tensor:
    """Return the mean Huber loss of the pairs' distances from products [B, B], fp32; 0 without a pair."""
    errors = F.smooth_l1_loss(_distances(student, pairs), _distances(teacher, pairs), reduction="none")
    return (errors.sum() / pairs.sum().clamp(min=1)).float()


def _distances(products: Tensor, pairs: Tensor) -> Tensor:
    """Return distances [B, B] divided by their mean over the pairs; 0 outside of them."""
    squares = _squared_distances(products)
    apart = pairs & (squares > losses.MIN_SQUARED_DISTANCE)  # the root of 0 has no gradient
    distances = squares.masked_fill(~apart, 1.0).sqrt().masked_fill(~apart, 0.0)
    mean = distances.sum() / pairs.sum().clamp(min=1)
    return distances / mean.clamp(min=losses.MIN_SQUARED_DISTANCE)


def _angle_error(student: Tensor, teacher: Tensor, pairs: Tensor) -> Tensor:
    """Return the mean Huber loss of the triplets' cosines from products [B, B], fp32; 0 without a triplet."""
    for products in (student, teacher):
        pairs = pairs & (_squared_distances(products) > losses.MIN_SQUARED_DISTANCE)
    triplets = losses.all_triplets(pairs)
    vertices_at_a_time = max(1, CHUNK_ANGLES // pairs.numel())
    errors = [
        losses.recompute_in_backward(
            partial(losses.angle_error, triplets=losses.Triplets(*chunk)), student[None, None], teacher[None, None]
        )
        for chunk in zip(*(x.split(vertices_at_a_time, dim=1) for x in triplets), strict=True)
    ]
    return (torch.stack(errors).sum() / triplets.num_angles.clamp(min=1)).float()


def _squared_distances(products: Tensor) -> Tensor:
    """Return ‖x_i - x_j‖² [B, B] from x_i · x_j."""
    squares = products.diagonal()
    return squares[:, None] + squares - 2 * products
