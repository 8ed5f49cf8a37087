"""Every key of every config as Markdown: `python -m lad_dist.config.key_table > configs/README.md`."""

from lad_dist.config.corpus_schema import PrepareConfig, TokenizerConfig
from lad_dist.config.describe import describe_keys
from lad_dist.config.evaluation_schema import EvaluateConfig, PredictConfig
from lad_dist.config.schema import ConfigTable, PretrainConfig, TaskConfig
from lad_dist.config.search_schema import SearchConfig
from lad_dist.utils.text import markdown_table

SECTIONS: dict[str, tuple[str, type[ConfigTable]]] = {
    "Pre-training": ("`lad-dist pretrain`, configs in `pretrain/`", PretrainConfig),
    "Tasks": ("`lad-dist finetune` and `lad-dist distill`, configs in `task/`", TaskConfig),
    "Evaluation": ("`lad-dist evaluate`, `task/evaluate.toml`", EvaluateConfig),
    "Prediction": ("`lad-dist predict`, on the command line alone", PredictConfig),
    "Search": ("`lad-dist tune`, configs in `tune/`", SearchConfig),
    "Corpora": ("`lad-dist prepare`, `pretrain/corpus.toml` and `pretrain/files.toml`", PrepareConfig),
    "Tokenizers": ("`lad-dist train-tokenizer`, `pretrain/tokenizer_*.toml`", TokenizerConfig),
}
INTRODUCTION = """# Keys of the configs

Generated: `python -m lad_dist.config.key_table > configs/README.md`.

A config is a TOML file. On the command line `key=value` changes a key, `key=none` unsets it, and
`compression.0.sparsity=0.5` changes the first table of a list. Where a key is a string, `run.name=4711` is a word.
`[objective]` and each `[[compression]]` also take the
arguments of their class: `lad-dist distill --help all` lists them. `[deepspeed]` is DeepSpeed's own config. A key that
stands in an earlier section is not repeated.
"""


def key_tables() -> str:
    """Return the text of configs/README.md."""
    parts, seen = [INTRODUCTION], set()
    for title, (command, schema) in SECTIONS.items():
        rows = [row for row in describe_keys(schema) if row not in seen]
        seen |= set(rows)
        cells = [(f"`{key}`", f"{kind}, {default}", text) for key, kind, default, text in rows]
        parts.append(f"## {title}\n\n{command}\n\n{markdown_table(('key', 'type, default', ''), cells)}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    print(key_tables(), end="")
