"""What an exported model says of texts: `predict(folder, texts)`."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from lad_dist.config.errors import UserError
from lad_dist.core.batch import TEXT_HEADS, Head
from lad_dist.core.collate import collate
from lad_dist.data.tasks import multilabel
from lad_dist.data.tokenization.encoding import encode_framed
from lad_dist.data.tokenization.loading import load_tokenizer
from lad_dist.data.tokenization.special_tokens import special_token_frame
from lad_dist.distributed import processes
from lad_dist.evaluation.evaluate import logits_of
from lad_dist.models.dims import max_positions
from lad_dist.models.frozen import FrozenModel
from lad_dist.models.heads import head_of, label_names, label_thresholds
from lad_dist.models.hf_config import load_hf_config
from lad_dist.models.loading import check_weight_files
from lad_dist.utils import progress

BATCH_SIZE = 64
MAX_LENGTH = 512  # tokens, where the model has positions for as many


class Prediction(NamedTuple):
    """What a model says of one text."""

    label: str | None  # the most probable of `labels`; None where there is none
    score: float  # the probability of the most probable label, or the number of a regression
    probabilities: dict[str, float]  # of each label; empty for a regression
    labels: tuple[str, ...] = ()  # what the text gets, the most probable first; several or none of a multi-label model


def predict(
    path: str | Path, texts: Sequence[str | tuple[str, str]], *, max_length: int | None = None
) -> list[Prediction]:
    """Predict the labels of texts, or the numbers of a regression.

    A multi-label model gives a text every label whose probability reaches its threshold in config.json, or 0.5.

    Args:
        path: A model folder, such as a run's export, or a hub name.
        texts: Texts, or pairs of texts.
        max_length: Tokens of the longest sequence; longer texts are cut. Default: 512, or what the model has
            positions for.

    Returns:
        A prediction for each text, in order.

    Raises:
        UserError: The folder holds no classifier and no regression of texts, a broken one, or one with fewer positions
            than `max_length`.
    """
    path = str(path)
    config = load_hf_config(path)
    names = label_names(config)
    if head_of(config) not in TEXT_HEADS:
        raise UserError(f"{path}: {', '.join(config.architectures or ['no head'])} does not classify texts")
    check_weight_files(path)
    kind: Head = "classification" if len(names) > 1 else "regression"
    if head_of(config) == "multilabel":
        kind = "multilabel"
    thresholds = label_thresholds(config)
    tokenizer = load_tokenizer(path)
    model = FrozenModel(path, kind, device=processes.device())
    first = [text if isinstance(text, str) else text[0] for text in texts]
    second = [text[1] for text in texts if not isinstance(text, str)]
    if second and len(second) != len(first):
        raise UserError("texts: some are pairs and some are not; give the one or the other")
    positions = max_positions(config)
    if max_length is not None and max_length > positions:
        raise UserError(f"max_length: {max_length} tokens, but {path} has {positions} positions")
    encoded = encode_framed(tokenizer, first, second or None, max_length or min(MAX_LENGTH, positions))
    predictions: list[Prediction] = []
    pad = special_token_frame(tokenizer).pad
    for begin in range(0, len(first), BATCH_SIZE):
        ids, segments = (part[begin : begin + BATCH_SIZE] for part in (encoded.ids, encoded.segments))
        starts = np.cumsum([0, *map(len, ids)])[:-1]
        batch = collate(ids, segments, starts, np.zeros(len(ids), dtype=np.int64), None, pad)
        logits = logits_of(model, batch.to(processes.device()))
        if not logits.isfinite().all():
            raise UserError(f"{path}: broken, as logits are not finite")
        if kind == "multilabel":
            predictions += _multilabel_predictions(logits, names, thresholds)
        else:
            predictions += _predictions(logits, names, kind)
        progress.report("predicting", len(predictions), len(first))
    return predictions


def _predictions(logits: torch.Tensor, names: Sequence[str], kind: Head) -> list[Prediction]:
    if kind == "regression":
        return [Prediction(None, value, {}) for value in logits[:, 0].tolist()]
    rows = [dict(zip(names, row, strict=True)) for row in logits.float().softmax(dim=1).tolist()]
    return [Prediction(label, row[label], row, (label,)) for row in rows for label in [max(row, key=row.__getitem__)]]


def _multilabel_predictions(
    logits: torch.Tensor, names: Sequence[str], thresholds: Sequence[float]
) -> list[Prediction]:
    given = multilabel.decisions(logits.cpu().numpy(), thresholds or multilabel.DEFAULT_THRESHOLD)
    predictions = []
    for values, decided in zip(logits.double().sigmoid().tolist(), given.tolist(), strict=True):
        row = dict(zip(names, values, strict=True))
        labels = [name for name, is_given in zip(names, decided, strict=True) if is_given]
        labels.sort(key=row.__getitem__, reverse=True)
        predictions.append(Prediction(labels[0] if labels else None, max(values), row, tuple(labels)))
    return predictions
