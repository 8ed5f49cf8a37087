"""What a model says of texts, words and questions: `predict(model, texts)`."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lad_dist.config.errors import UserError
from lad_dist.config.evaluation_schema import EvaluateDataConfig
from lad_dist.core.batch import TEXT_HEADS
from lad_dist.data.tasks import multilabel
from lad_dist.data.tasks.examples import Logits, TaskExamples, tokenize
from lad_dist.data.tasks.files import Texts
from lad_dist.data.tasks.task import RawExamples, Task
from lad_dist.evaluation.predictor import Predictor, open_predictor
from lad_dist.models.heads import FIXED_OUTPUTS
from lad_dist.utils import progress

BATCH_SIZE = 64
CHUNK_ROWS = 1024  # texts that are in memory at a time; a multiple of the batch size
MAX_LENGTH = 512  # tokens, where the model has positions for as many


class Prediction(NamedTuple):
    """What a model says of one text."""

    label: str | None  # the most probable of `labels`; None where there is none
    score: float  # the probability of the most probable label, or the number of a regression
    probabilities: dict[str, float]  # of each label; empty for a regression
    labels: tuple[str, ...] = ()  # what the text gets, the most probable first; several or none of a multi-label model


def predict(
    model: str | Path | Predictor,
    texts: Sequence[str | tuple[str, str]],
    *,
    max_length: int | None = None,
    temperature: float = 1.0,
) -> list[Prediction]:
    """Predict the labels of texts, or the numbers of a regression.

    A multi-label model gives a text every label whose probability reaches its threshold in config.json, or 0.5.

    Args:
        model: A model folder, a run folder, an .onnx file, a compact.safetensors, or a hub name; or one of them opened
            before by `lad_dist.evaluation.predictor.open_predictor`, which saves loading it again.
        texts: Texts, or pairs of texts.
        max_length: Tokens of the longest sequence; longer texts are cut. Default: 512, or what the model has
            positions for.
        temperature: Divisor of the logits; `lad-dist evaluate` with fit_temperature = true fits it.

    Returns:
        A prediction for each text, in order.

    Raises:
        UserError: The model is no classifier and no regression of texts, or broken, or has fewer positions than
            `max_length`.
    """
    predictor = model if isinstance(model, Predictor) else open_predictor(model)
    if predictor.kind not in TEXT_HEADS:
        raise UserError(f"{predictor.path}: a model for {predictor.kind.replace('_', ' ')} does not classify texts")
    check_temperature(predictor, temperature)
    length = sequence_length(predictor, max_length)
    first = [text if isinstance(text, str) else text[0] for text in texts]
    second = [text[1] for text in texts if not isinstance(text, str)]
    if second and len(second) != len(first):
        raise UserError("texts: some are pairs and some are not; give the one or the other")
    data = EvaluateDataConfig.model_validate({"dev": "texts", "kind": predictor.kind, "max_length": length})
    predictions: list[Prediction] = []
    for begin in range(0, len(first), CHUNK_ROWS):
        chunk = slice(begin, begin + CHUNK_ROWS)
        raw = texts_without_labels(first[chunk], second[chunk] or None)
        logits = chunk_logits(predictor, encode_chunk(predictor, raw, data, predictor.labels), BATCH_SIZE)
        predictions += predictions_of_logits(predictor, logits / temperature, predictor.labels)
        progress.report("predicting", len(predictions), len(first))
    return predictions


def sequence_length(predictor: Predictor, max_length: int | None) -> int:
    """Return the tokens of the longest sequence; raise UserError where the model has fewer positions."""
    positions = predictor.max_positions
    if max_length is not None and max_length > positions:
        raise UserError(f"max_length: {max_length} tokens, but {predictor.path} has {positions} positions")
    return max_length or min(MAX_LENGTH, positions)


def texts_without_labels(texts: list[str], pairs: list[str] | None) -> Texts:
    """Return texts to predict, their labels 0."""
    return Texts(texts, pairs, np.zeros(len(texts), dtype=np.int64))


def encode_chunk(
    predictor: Predictor, raw: RawExamples, data: EvaluateDataConfig, labels: Sequence[str]
) -> TaskExamples[Any]:
    """Return examples in the model's tokens."""
    names = () if predictor.kind in FIXED_OUTPUTS else tuple(labels)
    task = Task(str(data.dev), predictor.kind, names, (), raw, {})  # type: ignore[arg-type]
    return tokenize(task, raw, predictor.tokenizer, data, str(data.dev), check_text=False)


def chunk_logits(predictor: Predictor, examples: TaskExamples[Any], batch_size: int) -> Logits:
    """Return the logits [R, V] of examples. Raise UserError where they are not finite."""
    batches = [predictor(batch()).cpu().numpy() for batch in examples.in_order(batch_size)]
    logits = np.concatenate(batches).astype(np.float64)
    if not np.isfinite(logits).all():
        raise UserError(f"{predictor.path}: broken, as logits are not finite")
    return logits


def predictions_of_logits(predictor: Predictor, logits: Logits, labels: Sequence[str]) -> Iterator[Prediction]:
    """Yield the prediction of each row of a model's logits [R, V], with `labels` as the names of the outputs."""
    if predictor.kind == "regression":
        yield from (Prediction(None, value, {}) for value in logits[:, 0].tolist())
        return
    if predictor.kind == "multilabel":
        yield from _multilabel_predictions(logits, labels, predictor.thresholds)
        return
    rows = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)).tolist()
    for row in rows:
        probabilities = dict(zip(labels, row, strict=True))
        label = max(probabilities, key=probabilities.__getitem__)
        yield Prediction(label, probabilities[label], probabilities, (label,))


def _multilabel_predictions(logits: Logits, labels: Sequence[str], thresholds: Sequence[float]) -> Iterator[Prediction]:
    probabilities = multilabel.probabilities(logits)
    decided = multilabel.decisions(logits, thresholds or multilabel.DEFAULT_THRESHOLD)
    for values, is_given in zip(probabilities.tolist(), decided.tolist(), strict=True):
        row = dict(zip(labels, values, strict=True))
        given = [name for name, has in zip(labels, is_given, strict=True) if has]
        given.sort(key=row.__getitem__, reverse=True)
        yield Prediction(given[0] if given else None, max(values), row, tuple(given))


def check_temperature(predictor: Predictor, temperature: float) -> None:
    """Raise UserError for a temperature of a model whose outputs are no distribution over labels."""
    if temperature != 1 and predictor.kind not in ("classification", "tagging"):
        kind = predictor.kind.replace("_", " ")
        raise UserError(f"temperature: calibrates the probabilities of labels; {predictor.path} is for {kind}")
