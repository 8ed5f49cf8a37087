"""Heads of models: which one a folder holds, the names and the order of its labels."""

from collections.abc import Callable, Sequence
from typing import Any

from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
)

from lad_dist.config.errors import UserError
from lad_dist.core.batch import Head
from lad_dist.models.families import family_of

MODEL_CLASSES = {
    "none": AutoModel,
    "mlm": AutoModelForMaskedLM,
    "classification": AutoModelForSequenceClassification,
    "multilabel": AutoModelForSequenceClassification,
    "regression": AutoModelForSequenceClassification,
    "tagging": AutoModelForTokenClassification,
    "question_answering": AutoModelForQuestionAnswering,
}
# Ends of the names of architectures with a task's head.
ARCHITECTURE_SUFFIXES = {
    head: kind.__name__.removeprefix("AutoModel") for head, kind in MODEL_CLASSES.items() if head not in ("none", "mlm")
}

FIXED_OUTPUTS = ("regression", "question_answering")  # heads whose outputs mean the same, whatever they are called
PROBLEM_TYPES: dict[str, Any] = {  # transformers' names of what heads on whole texts decide
    "classification": "single_label_classification",
    "multilabel": "multi_label_classification",
    "regression": "regression",
}
DECISIONS = {"classification": "one label", "multilabel": "several labels at once"}
THRESHOLDS = "label_thresholds"  # key of config.json: {label: the probability from which on a text gets it}


def set_labels(config: PreTrainedConfig, head: Head, labels: Sequence[str]) -> None:
    """Write the labels of a task, in the order of the head's outputs, into the config."""
    config.id2label = dict(enumerate(labels))
    config.label2id = {name: index for index, name in enumerate(labels)}
    set_problem_type(config, head)
    vars(config).pop(THRESHOLDS, None)  # of other labels


def set_problem_type(config: PreTrainedConfig, head: Head) -> None:
    """Write into the config what a head on whole texts decides."""
    if head in PROBLEM_TYPES:
        config.problem_type = PROBLEM_TYPES[head]


def _has_other_problem(config: PreTrainedConfig, head: Head) -> bool:
    """Return whether the config says one label where the head gives several, or the reverse; many do not say."""
    return head in DECISIONS and config.problem_type in {PROBLEM_TYPES[other] for other in DECISIONS if other != head}


def set_thresholds(config: PreTrainedConfig, thresholds: Sequence[float]) -> None:
    """Write the thresholds of probabilities into the config, in the order of the outputs."""
    setattr(config, THRESHOLDS, dict(zip(label_names(config), thresholds, strict=True)))


def label_thresholds(config: PreTrainedConfig, order: Sequence[int] | None = None) -> tuple[float, ...]:
    """Return the thresholds of probabilities, none where the config has none.

    They are in the order of the outputs, or in that of the outputs' numbers `order`.

    Raises:
        UserError: They are not a number from 0 to 1 for each label.
    """
    thresholds = getattr(config, THRESHOLDS, None)
    if thresholds is None or config.problem_type != PROBLEM_TYPES["multilabel"]:
        return ()
    names = label_names(config)
    fits = isinstance(thresholds, dict) and thresholds.keys() == set(names)
    numbers = [thresholds[name] for name in names] if fits else []
    if not fits or not all(isinstance(x, int | float) and 0 <= x <= 1 for x in numbers):
        raise UserError(
            f"{config.name_or_path}: {THRESHOLDS} in config.json is {thresholds!r}; give each of {', '.join(names)} a "
            "number from 0 to 1, or remove it"
        )
    return tuple(float(numbers[index]) for index in (range(len(names)) if order is None else order))


def label_names(config: PreTrainedConfig) -> tuple[str, ...]:
    """Return the names of the head's outputs, in their order.

    Raise UserError where two outputs have one name, or the numbers have gaps.
    """
    names = {index: str(name) for index, name in (config.id2label or {}).items()}
    if sorted(names) != list(range(len(names))) or len(set(names.values())) < len(names):
        listed = ", ".join(f"{index}: {name}" for index, name in names.items())
        raise UserError(f"{config.name_or_path}: id2label in config.json is {{{listed}}}; name each output, from 0 on")
    return tuple(names[index] for index in range(len(names)))


def _has_head(config: PreTrainedConfig, head: Head) -> bool:
    """Return whether the folder may hold a head of that kind, as far as its config lists architectures."""
    return not config.architectures or any(name.endswith(ARCHITECTURE_SUFFIXES[head]) for name in config.architectures)


def head_of_architectures(architectures: Sequence[str]) -> Head:
    """Return the head of a task that architectures of these names have; "none" for those of pre-trained models."""
    heads = [
        head for head, suffix in ARCHITECTURE_SUFFIXES.items() if any(name.endswith(suffix) for name in architectures)
    ]
    return heads[0] if heads else "none"  # type: ignore[return-value]


def head_of(config: PreTrainedConfig) -> Head:
    """Return the head of a task that a model with this config has, "none" for a pre-trained one."""
    head = head_of_architectures(config.architectures or ())
    return "multilabel" if _has_other_problem(config, head) else head


def _same_outputs(config: PreTrainedConfig, head: Head, labels: Sequence[str]) -> bool:
    names = label_names(config)
    same_names = len(names) == len(labels) and (head in FIXED_OUTPUTS or names == tuple(labels))
    are_unnamed = bool(config.architectures) and names_outputs_by_default(config, head, labels)
    return (same_names or are_unnamed) and not _has_other_problem(config, head)


def names_outputs_by_default(config: PreTrainedConfig, head: Head, labels: Sequence[str]) -> bool:
    """Return whether a head has transformers' default names, LABEL_0, LABEL_1, …, which stand for the labels in order.

    There are as many of them as labels.
    """
    names = label_names(config)
    is_default = all(name == f"LABEL_{index}" for index, name in enumerate(names))
    return head not in FIXED_OUTPUTS and len(names) == len(labels) and is_default


def _order_by_name(names: Sequence[str], labels: Sequence[str]) -> list[int] | None:
    """Return the index of each label among the names, None where these are others. Capitals may differ."""
    spellings: tuple[Callable[[str], str], ...] = (str, str.casefold)
    for spelling in spellings:
        spelt, wanted = [spelling(name) for name in names], [spelling(label) for label in labels]
        if sorted(spelt) == sorted(wanted) and len(set(spelt)) == len(spelt):
            return [spelt.index(name) for name in wanted]
    return None


def has_label_names(config: PreTrainedConfig, labels: Sequence[str]) -> bool:
    """Return whether the head's outputs have the names of the labels, so that their order is known."""
    return _order_by_name(label_names(config), labels) is not None


def label_order(
    config: PreTrainedConfig, path: str, head: Head, labels: Sequence[str], *, fixed_order: bool = False
) -> list[int] | None:
    """Return the index of each of the task's labels among the outputs of the model at `path`, None for equal orders.

    Names decide. Outputs with transformers' default names, LABEL_0, LABEL_1, …, are in the order of the labels; so are
    outputs with other names where the user has fixed the order.

    Raises:
        UserError: The model has no such head, or the labels do not fit it.
    """
    if not _has_head(config, head):
        architectures = ", ".join(config.architectures or ())
        raise UserError(f"{path}: the architecture is {architectures}, which has no head for {head.replace('_', ' ')}")
    if _has_other_problem(config, head):
        given = next(text for other, text in DECISIONS.items() if other != head)
        raise UserError(f"{path}: the model gives a text {given}, the task gives it {DECISIONS[head]}")
    names = label_names(config)
    if len(names) != len(labels):
        hint = "" if head in FIXED_OUTPUTS else "; data.labels may name labels that no example has"
        raise UserError(
            f"{path}: the head has {len(names)} outputs ({', '.join(names)}), "
            f"the task has {len(labels)} labels ({', '.join(labels)}){hint}"
        )
    order = None if head in FIXED_OUTPUTS else _order_by_name(names, labels)
    if order is not None:
        return None if order == sorted(order) else order
    if head in FIXED_OUTPUTS or names_outputs_by_default(config, head, labels):
        return None
    if not fixed_order:
        raise UserError(
            f"{path}: the model's labels are {', '.join(names)}, the task's are {', '.join(labels)}; where they mean "
            "the same, give the task's in data.labels, in the order of the model's"
        )
    for index, (name, label) in enumerate(zip(names, labels, strict=True)):
        if name != label and name in labels:
            raise UserError(f'{path}: the model calls output {index} "{name}", data.labels calls it "{label}"')
    return None


def declares_head(config: PreTrainedConfig, head: Head, labels: Sequence[str]) -> bool:
    """Return whether the config says that the folder holds a head of this kind, with these labels."""
    if head == "mlm":
        names = set(config.architectures or ()) - set(family_of(config).discriminators)
        return any(name.endswith(("ForMaskedLM", "ForPreTraining")) for name in names)
    return head == "none" or (_has_head(config, head) and _same_outputs(config, head, labels))


def replaces_head(config: PreTrainedConfig, head: Head, labels: Sequence[str]) -> bool:
    """Return whether the folder holds a head of this kind for a task, but with other labels: a new one replaces it."""
    is_same_kind = head not in ("none", "mlm") and bool(config.architectures) and _has_head(config, head)
    return is_same_kind and not declares_head(config, head, labels)
