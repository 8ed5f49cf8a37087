"""The schemas of all configs, and which of them a file is written for."""

from collections.abc import Mapping
from typing import Any

from lad_dist.config.corpus_schema import PrepareConfig, TokenizerConfig
from lad_dist.config.evaluation_schema import EvaluateConfig
from lad_dist.config.schema import ConfigTable, PretrainConfig, TaskConfig, train_schema
from lad_dist.config.search_schema import SearchConfig

SCHEMAS: tuple[type[ConfigTable], ...] = (
    PretrainConfig, TaskConfig, PrepareConfig, TokenizerConfig, EvaluateConfig, SearchConfig
)  # fmt: skip


def schema_of(tables: Mapping[str, Any]) -> type[ConfigTable]:
    """A file's content says what it is for."""
    if "run" in tables:
        return train_schema(tables)
    names: dict[str, type[ConfigTable]] = {
        "vocab_size": TokenizerConfig,
        "source": PrepareConfig,
        "search": SearchConfig,
        "model": EvaluateConfig,
    }
    return next(schema for key, schema in names.items() if key in tables)
