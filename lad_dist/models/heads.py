"""Heads of models: which one a folder holds, the names and the order of its labels."""

from collections.abc import Sequence

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
from lad_dist.models.hf_config import load_hf_config

MODEL_CLASSES = {
    "none": AutoModel,
    "mlm": AutoModelForMaskedLM,
    "classification": AutoModelForSequenceClassification,
    "regression": AutoModelForSequenceClassification,
    "tagging": AutoModelForTokenClassification,
    "question_answering": AutoModelForQuestionAnswering,
}
# How the names of architectures end that have the head of a task.
ARCHITECTURE_SUFFIXES = {
    "classification": "ForSequenceClassification",
    "regression": "ForSequenceClassification",
    "tagging": "ForTokenClassification",
    "question_answering": "ForQuestionAnswering",
}


def set_labels(config: PreTrainedConfig, head: Head, labels: Sequence[str]) -> None:
    config.id2label = dict(enumerate(labels))
    config.label2id = {name: index for index, name in enumerate(labels)}
    if ARCHITECTURE_SUFFIXES[head] == "ForSequenceClassification":
        config.problem_type = "regression" if head == "regression" else "single_label_classification"


def label_names(config: PreTrainedConfig) -> tuple[str, ...]:
    names = config.id2label or {}
    return tuple(str(names[index]) for index in range(len(names)))  # type: ignore[index]


def _has_head(config: PreTrainedConfig, head: Head) -> bool:
    """Whether the folder may hold a head of that kind, as far as it says what it holds."""
    return not config.architectures or any(name.endswith(ARCHITECTURE_SUFFIXES[head]) for name in config.architectures)


def head_of_architectures(architectures: Sequence[str]) -> Head:
    """The head of a task that architectures of these names have; "none" where they have none, as pre-trained ones."""
    held = [
        head for head, ending in ARCHITECTURE_SUFFIXES.items() if any(name.endswith(ending) for name in architectures)
    ]
    return held[0] if held else "none"  # type: ignore[return-value]


def _same_outputs(config: PreTrainedConfig, head: Head, labels: Sequence[str]) -> bool:
    names = label_names(config)
    # Heads for questions have two outputs of fixed meaning, whatever their folder calls them.
    return len(names) == len(labels) and (head == "question_answering" or names == tuple(labels))


def label_order(path: str, head: Head, labels: Sequence[str]) -> list[int] | None:
    """Where each of the task's labels stands among the outputs of the model at `path`; None when in the same order.
    Raises UserError when it has no such head, or the labels do not fit it."""
    config = load_hf_config(path)
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


def keeps_head(config: PreTrainedConfig, head: Head, labels: Sequence[str]) -> bool:
    """Whether a folder's own head is the one that `load` gives, as far as its config says what it holds."""
    if head == "mlm":
        return has_mlm_head(config)
    return head == "none" or (_has_head(config, head) and _same_outputs(config, head, labels))


def has_mlm_head(config: PreTrainedConfig) -> bool:
    """Whether the folder says that it holds a masked-language-model head. (ELECTRA's discriminator has none.)"""
    names = [name for name in config.architectures or () if name != "ElectraForPreTraining"]
    return any(name.endswith(("ForMaskedLM", "ForPreTraining")) for name in names)
