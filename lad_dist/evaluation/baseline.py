"""What a score on a dev set says against a model: one constant answer scores as much, or another order of its outputs.

transformers calls the outputs of a head LABEL_0, LABEL_1, … unless it was given names. Read in another order than that
of its training, a good model scores less than a constant answer.
"""

import json

import numpy as np

from lad_dist.data.tasks import metrics, multilabel
from lad_dist.data.tasks.examples import Logits, TaskExamples
from lad_dist.evaluation.predictor import Predictor
from lad_dist.models.frozen import FrozenModel
from lad_dist.utils.text import plain_number


def weakness(model: FrozenModel | Predictor, examples: TaskExamples, logits: Logits) -> str | None:
    """Return what a model's logits [R, V] on a dev set say against it, and the likely cause; None if nothing.

    They say something where the task's first metric is no better than that of one constant answer, with several labels
    neither that nor the loss, where the squared error of a regression is no better than that of the mean, or where
    outputs without names score better in another order.
    """
    metric, score = next(iter(examples.score(logits).items()))
    constant = examples.baseline()
    finding = f"{metric} on the dev set is {plain_number(score)}, that of one constant answer {plain_number(constant)}"
    says_more = score > constant
    if examples.kind == "multilabel":  # of rare labels a good model may give none at 0.5
        says_more |= examples.loss(logits) < multilabel.constant_loss(examples.labels)
    if examples.kind == "regression":
        return _weakness_of_numbers(finding, logits[:, 0], examples.labels, says_more)
    if examples.kind == "question_answering" or model.has_label_names:
        return None if says_more else f"{finding}; is it fine-tuned for this task?"
    order = metrics.best_output_order(logits, examples.labels)
    best = examples.score(logits[:, order.argsort()])[metric]
    if best > max(score, constant):
        labels = json.dumps([examples.outputs[label] for label in order], ensure_ascii=False)
        return f"{finding}, that of the outputs in another order {plain_number(best)}: set data.labels = {labels}"
    labels = json.dumps(list(examples.outputs), ensure_ascii=False)
    unnamed = f"; the outputs have no names and are read as data.labels = {labels}; no other order is clearly better"
    return None if says_more else finding + unnamed


def _weakness_of_numbers(finding: str, outputs: Logits, labels: np.ndarray, correlates: bool) -> str | None:
    error, variance = float(np.square(outputs - labels).mean()), float(labels.var())
    if correlates and error < variance:
        return None
    ranges = " and the labels ".join(f"{x.min():.3g} to {x.max():.3g}" for x in (outputs, labels))
    errors = f"squared error {plain_number(error)}, that of the labels' mean {plain_number(variance)}"
    return f"{finding}; {errors}; the outputs are {ranges}"
