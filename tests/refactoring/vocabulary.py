"""What commits call the same thing: the tables to edit when a refactoring renames keys, logged names or files.

Cases are written in the newest words. Each table says "newest: older". A commit's own `--help` tells which of two words
for a config key it knows, so that commits in the midst of a renaming are understood too; what it logged and wrote is
given its newest name.
"""

import re
from collections.abc import Mapping
from itertools import product
from typing import Any

# The renaming that followed fe5c21f.
TABLES = {"compression": "surgery"}
KEYS = {
    "run.watchdog_timeout": "hang_seconds",
    "run.replica_check_every": "check_every",
    "data.micro_batches_per_step": "slots",
    "data.micro_batch_tokens": "tokens_per_slot",
    "data.micro_batch_size": "examples_per_slot",
    "data.mlm_probability": "mask",
    "data.num_workers": "workers",
    "data.source_weights": "weights",
    "data.max_answer_length": "answer_length",
    "data.doc_stride": "stride",
    "data.null_score_diff_threshold": "null_threshold",
    "data.whole_word_mask": "whole_words",
    "student.num_hidden_layers": "depth",
    "student.hidden_size": "width",
    "student.num_attention_heads": "heads",
    "student.intermediate_size": "inner",
    "student.width_basis": "directions",
    "compression.activation_aware": "weighted",
    "compression.update_every": "every",
    "compression.scale": "share",
    "objective.gate_init": "openness",
    "objective.gate_input": "sees",
    "objective.gate_supervision": "anchor",
    "objective.detach_gates": "detached",
    "vocab_size": "vocabulary",  # of launch/train_tokenizer.py
    "max_characters": "characters",
    "num_workers": "workers",  # of launch/prepare_corpus.py
}
VALUES = {
    ("objective.name", "supervised"): "task",
    ("compression.name", "scale_position_embeddings"): "quiet_positions",
}
LOGGED = {"teacher_layer_weight/": "reads/", "budget/requested/": "budget/asked/"}  # beginnings, after `dev/` too
ADDED = ("teacher/",)  # beginnings of columns that older commits do not log: the teacher's scores before the first step
FILES = {"teacher_layers.png": "reads.png", "skipped_steps.json": "skipped.json", "crashes.json": "deaths.json"}


def known_words(help_text: str) -> set[str]:
    """The keys that a script's --help lists, and as `key = value` the names that it knows for objectives and such."""
    keys = re.findall(r"^ *([\w.\[\]]+) \(", help_text, re.MULTILINE)
    names = re.findall(r'^With (\S+ = ".*"):$', help_text, re.MULTILINE)
    return {word.replace("[]", "").replace('"', "") for word in (*keys, *names)}


def overrides_for(known: set[str], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A case's overrides in the words of a commit that knows these."""
    return {_key_for(known, key): _value_for(known, key, value) for key, value in overrides.items()}


def _key_for(known: set[str], key: str) -> str:
    """Of its table and its name either may be the older one: the first pair that is known, or else the newest."""
    *tables, name = key.split(".")
    numberless = [table for table in tables if not table.isdigit()]
    names = [name, KEYS.get(".".join([*numberless, name]), name)]
    spellings = [tables, [TABLES.get(table, table) for table in tables]]
    choices = [[*spelling, choice] for spelling, choice in product(spellings, names)]
    fitting = [words for words in choices if ".".join(x for x in words if not x.isdigit()) in known]
    return ".".join((fitting or choices)[0])


def _value_for(known: set[str], key: str, value: Any) -> Any:
    key = re.sub(r"\.\d+\.", ".", key)
    if not isinstance(value, str) or (key, value) not in VALUES:
        return value
    return value if f"{key} = {value}" in known else VALUES[key, value]


def newest_name(logged: str) -> str:
    """Of a column or metric."""
    for newest, older in LOGGED.items():
        logged = re.sub(f"^(dev/)?{re.escape(older)}", rf"\g<1>{newest}", logged)
    return logged


def is_added(logged: str) -> bool:
    """Of a column."""
    return logged.startswith(ADDED)


def newest_file(path: str) -> str:
    """Of a file in a run's folder."""
    return {older: newest for newest, older in FILES.items()}.get(path, path)
