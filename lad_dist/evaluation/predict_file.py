"""Predictions for all examples of a file, however large: a chunk is read, predicted and written before the next one.

The examples of a classification or a regression are rows, those of tagging sentences, those of question answering
questions. SQuAD's JSON is the one kind of file that is read as a whole.
"""

import contextlib
import csv
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from lad_dist.config.errors import UserError
from lad_dist.config.evaluation_schema import EvaluateDataConfig, PredictConfig
from lad_dist.config.load import check_writable, lookup
from lad_dist.data.tasks import metrics, squad, tagging
from lad_dist.data.tasks.examples import Logits, QuestionExamples, TaskExamples
from lad_dist.data.tasks.files import MissingColumn, number_label, reader_of
from lad_dist.data.tasks.label_names import SEPARATOR, label_list, label_name
from lad_dist.data.tasks.squad import Questions
from lad_dist.data.tasks.streams import count_lines, stream_columns
from lad_dist.data.tasks.tagging import Sentences
from lad_dist.data.tasks.task import PAIR, RawExamples
from lad_dist.evaluation.prediction import (
    CHUNK_ROWS,
    Prediction,
    check_temperature,
    chunk_logits,
    encode_chunk,
    predictions_of_logits,
    sequence_length,
    texts_without_labels,
)
from lad_dist.evaluation.predictor import Predictor, open_predictor
from lad_dist.utils import progress
from lad_dist.utils.atomic_io import fsync, temporary_path

LABEL = "label"  # the column of labels unless the config names another
Record = dict[str, Any]  # what is written of an example


class Chunk(NamedTuple):
    """Examples to predict, and what the file says of each: a label, tags of words, answers; None where nothing."""

    raw: RawExamples
    golds: Sequence[Any]


@dataclass
class FileScore:
    """How well predictions agree with the labels of a file, as far as it has any.

    Attributes:
        examples: That were predicted.
        cut: Of these, how many lost tokens.
        labelled: Rows, words or questions with a label that the model knows.
        unknown: Rows or words with a label that the model does not know, so that it cannot be right.
    """

    examples: int = 0
    cut: int = 0
    labelled: int = 0
    unknown: int = 0
    _sums: Counter[str] = field(default_factory=Counter)

    @property
    def metrics(self) -> dict[str, float]:
        """Return means over what is labelled; none where nothing is."""
        return {name: total / self.labelled for name, total in self._sums.items()} if self.labelled else {}

    def add(self, **values: float) -> None:
        """Count one more label, and what each metric is there."""
        self.labelled += 1
        self._sums.update(values)

    def add_decision(self, label: str, gold: Any, labels: Sequence[str]) -> None:
        """Count a decision against the label of the file, if that is one."""
        with contextlib.suppress(ValueError):
            gold = label_name(gold)
            if gold in labels:
                self.add(accuracy=float(label == gold))
            else:
                self.unknown += 1


def predict_file(config: PredictConfig) -> FileScore:
    """Write the predictions of a model for each example of a file, in order; return how well they agree with labels.

    The predictions are written beside their final place and renamed at the end: they are whole or absent.

    Raises:
        UserError: The model, the file or a row of it cannot be read, or the file for the predictions exists.
    """
    file, out = Path(config.file), Path(config.out)
    write = lookup(f"{out}: file type", out.suffix.lower(), WRITERS)
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    if out.exists():
        raise UserError(f"{out}: exists; remove it, or write to another file")
    check_writable("out", out.parent)
    predictor = open_predictor(config.model)
    check_temperature(predictor, config.temperature)
    labels, data = _labels(predictor, config.labels), _data_config(config, predictor)
    chunks, score = KINDS[predictor.kind][0](config, file), FileScore()
    records = _records(predictor, chunks, labels, data, config, score)
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = temporary_path(out)
    try:
        with draft.open("w", encoding="utf-8", newline="") as stream:
            write(stream, records)
        fsync(draft)
        draft.replace(out)
    finally:
        draft.unlink(missing_ok=True)
    return score


def _labels(predictor: Predictor, names: Sequence[str] | None) -> Sequence[str]:
    """Return the names of the model's outputs: the user's, where given."""
    if names is None or predictor.kind not in ("classification", "multilabel", "tagging"):
        return predictor.labels
    if len(set(names)) < len(names):
        raise UserError(f"labels: {', '.join(names)}: one name occurs twice")
    if len(names) != len(predictor.labels):
        own = ", ".join(predictor.labels)
        raise UserError(f"labels: {len(names)} names, but {predictor.path} has {len(predictor.labels)} outputs ({own})")
    return names


def _data_config(config: PredictConfig, predictor: Predictor) -> EvaluateDataConfig:
    values: dict[str, Any] = {"dev": config.file, "kind": predictor.kind}
    values["max_length"] = sequence_length(predictor, config.max_length)
    if predictor.kind == "question_answering":
        values["max_answer_length"] = config.max_answer_length
        values["null_score_diff_threshold"] = config.null_score_diff_threshold or 0.0
    return EvaluateDataConfig.model_validate(values)


def _chunk_rows(config: PredictConfig) -> int:
    """Return the examples that are in memory at a time: whole batches."""
    return max(1, CHUNK_ROWS // config.batch_size) * config.batch_size


def _text_chunks(config: PredictConfig, file: Path) -> Iterator[Chunk]:
    required = [name for name in (config.text, config.text_pair, config.label) if name is not None]
    optional = [name for name, given in ((PAIR, config.text_pair), (LABEL, config.label)) if given is None]
    try:
        names, chunks = stream_columns(file, required, optional, _chunk_rows(config))
    except MissingColumn as error:
        raise UserError(f"{error}; text=, text_pair= and label= name the columns") from None
    pair, label = config.text_pair or PAIR, config.label or LABEL
    return (
        Chunk(
            texts_without_labels(rows.texts(config.text), rows.texts(pair) if pair in names else None),
            rows.columns[label] if label in names else [None] * len(rows.lines),
        )
        for rows in chunks
    )


def _sentence_chunks(config: PredictConfig, file: Path) -> Iterator[Chunk]:
    sentences = reader_of(file, tagging.READERS)(file, labelled=False)
    return (_sentence_chunk(list(chunk)) for chunk in _batched(sentences, _chunk_rows(config), file, "sentences"))


def _sentence_chunk(sentences: Sequence[tagging.TaggedSentence]) -> Chunk:
    words = [sentence.words for sentence in sentences]
    tags = [np.zeros(len(sentence), dtype=np.int64) for sentence in words]
    return Chunk(Sentences(words, tags), [sentence.tags for sentence in sentences])


def _question_chunks(config: PredictConfig, file: Path) -> Iterator[Chunk]:
    questions = reader_of(file, squad.READERS)(file, labelled=False)
    labelled = any(questions.answers)
    may_lack = config.null_score_diff_threshold is not None or (labelled and not all(questions.answers))
    rows = zip(questions.questions, questions.contexts, questions.answers, strict=True)
    for chunk in _batched(rows, _chunk_rows(config), file, "questions"):
        texts, contexts, answers = map(list, zip(*chunk, strict=True))
        raw = Questions(texts, contexts, answers, may_lack)
        yield Chunk(raw, answers if labelled else [None] * len(texts))


def _batched(items: Iterable[Any], size: int, file: Path, name: str) -> Iterator[list[Any]]:
    iterator, is_empty = iter(items), True
    while chunk := list(itertools.islice(iterator, size)):
        is_empty = False
        yield chunk
    if is_empty:
        raise UserError(f"{file}: no {name}")


def _records(
    predictor: Predictor,
    chunks: Iterator[Chunk],
    labels: Sequence[str],
    data: EvaluateDataConfig,
    config: PredictConfig,
    score: FileScore,
) -> Iterator[Record]:
    """Yield what is written of each example, and count the predictions in `score`."""
    total, records_of = count_lines(Path(config.file)), KINDS[predictor.kind][1]
    for chunk in chunks:
        examples = encode_chunk(predictor, chunk.raw, data, labels)
        if not score.examples:
            examples.refuse_unknown(predictor.tokenizer)
        logits = chunk_logits(predictor, examples, config.batch_size)
        yield from records_of(Predicted(predictor, chunk, examples, logits / config.temperature, labels), score)
        score.examples += len(chunk.golds)
        score.cut += examples.cut
        progress.report("predicting", min(score.examples, total - 1), total)
    progress.report("predicting", total, total)


class Predicted(NamedTuple):
    """A chunk and its logits [R, V]."""

    predictor: Predictor
    chunk: Chunk
    examples: TaskExamples[Any]
    logits: Logits
    labels: Sequence[str]

    def predictions(self) -> Iterator[Prediction]:
        """Yield the prediction of each row."""
        return predictions_of_logits(self.predictor, self.logits, self.labels)


def _label_records(predicted: Predicted, score: FileScore) -> Iterator[Record]:
    for prediction, gold in zip(predicted.predictions(), predicted.chunk.golds, strict=True):
        assert prediction.label is not None
        score.add_decision(prediction.label, gold, predicted.labels)
        yield {"label": prediction.label, "score": _short(prediction.score), "probabilities": _shares(prediction)}


def _multilabel_records(predicted: Predicted, score: FileScore) -> Iterator[Record]:
    for prediction, gold in zip(predicted.predictions(), predicted.chunk.golds, strict=True):
        with contextlib.suppress(ValueError):  # a row without labels
            golds = label_list(predicted.labels, gold)
            if set(golds) <= set(predicted.labels):
                score.add(subset_accuracy=float(set(golds) == set(prediction.labels)))
            else:
                score.unknown += 1
        yield {"labels": list(prediction.labels), "probabilities": _shares(prediction)}


def _shares(prediction: Prediction) -> dict[str, float]:
    return {name: _short(value) for name, value in prediction.probabilities.items()}


def _number_records(predicted: Predicted, score: FileScore) -> Iterator[Record]:
    for number, gold in zip(predicted.logits[:, 0].tolist(), predicted.chunk.golds, strict=True):
        with contextlib.suppress(ValueError):  # a row without a label
            score.add(mean_squared_error=(number - number_label(gold)) ** 2)
        yield {"score": _short(number)}


def _tag_records(predicted: Predicted, score: FileScore) -> Iterator[Record]:
    words = predicted.chunk.raw.words  # type: ignore[union-attr]
    predictions = predicted.predictions()
    for tokens, golds in zip(words, predicted.chunk.golds, strict=True):
        tags = list(itertools.islice(predictions, len(tokens)))
        for tag, gold in zip(tags, golds, strict=True):
            score.add_decision(str(tag.label), gold, predicted.labels)
        yield {"tokens": tokens, "tags": [tag.label for tag in tags], "scores": [_short(tag.score) for tag in tags]}


def _answer_records(predicted: Predicted, score: FileScore) -> Iterator[Record]:
    questions = predicted.chunk.raw
    assert isinstance(questions, Questions)
    assert isinstance(predicted.examples, QuestionExamples)
    answers = predicted.examples.answers(predicted.logits)
    for question, answer, golds in zip(questions.questions, answers, predicted.chunk.golds, strict=True):
        if golds is not None:
            texts = [gold.text for gold in golds]
            values = metrics.answer_metrics([answer], [texts], questions.unanswerable)
            score.add(exact_match=values["exact_match"], f1=values["f1"])
        yield {"question": question, "answer": answer}


def _short(value: float) -> float:
    """Return the number with six digits."""
    return float(f"{value:.6g}")


# What reads the examples of a file, and what writes down their predictions.
KINDS: Mapping[str, tuple[Callable[[PredictConfig, Path], Iterator[Chunk]], Callable[..., Iterator[Record]]]] = {
    "classification": (_text_chunks, _label_records),
    "multilabel": (_text_chunks, _multilabel_records),
    "regression": (_text_chunks, _number_records),
    "tagging": (_sentence_chunks, _tag_records),
    "question_answering": (_question_chunks, _answer_records),
}


def _write_jsonl(stream: IO[str], records: Iterable[Record]) -> None:
    for record in records:
        stream.write(json.dumps(record, ensure_ascii=False) + "\n")


def _write_csv(stream: IO[str], records: Iterable[Record]) -> None:
    writer: csv.DictWriter[str] | None = None
    for number, record in enumerate(records, start=1):
        for row in _table_rows(number, record):
            if writer is None:
                writer = csv.DictWriter(stream, list(row), lineterminator="\n")
                writer.writeheader()
            writer.writerow(row)


def _table_rows(number: int, record: Record) -> Iterator[Record]:
    """Yield a record as rows of a table: one, or one for each word of sentence `number`."""
    if "tokens" not in record:
        probabilities = {f"probability_{name}": value for name, value in record.pop("probabilities", {}).items()}
        if "labels" in record:
            record["labels"] = SEPARATOR.join(record["labels"])
        yield record | probabilities
        return
    for token, tag, score in zip(record["tokens"], record["tags"], record["scores"], strict=True):
        yield {"sentence": number, "token": token, "tag": tag, "score": score}


WRITERS = {".csv": _write_csv, ".jsonl": _write_jsonl}
