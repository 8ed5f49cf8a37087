"""The tables of a config that prepares data: sources of text, token shards, tokenizers."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from lad_dist.config.schema import ConfigTable, PositiveFloat, PositiveInt

KINDS_OF_KEY = {
    "column": ("jsonl", "parquet", "hub"),
    "config": ("hub",),
    "split": ("hub",),
    "document": ("text",),
}
SOURCE_SUFFIXES = (".txt", ".jsonl", ".json", ".parquet", ".gz", ".bz2", ".xz", ".zst")


class SourceConfig(ConfigTable):
    """`[[source]]`: text to read."""

    kind: Literal["wikiextractor", "text", "jsonl", "parquet", "hub"] = Field(
        description="WikiExtractor's output, .txt files, JSON lines (all three also .gz, .bz2, .xz, .zst), Parquet, "
        "or what `datasets` loads: a hub dataset, a folder of Arrow files"
    )
    path: str = Field(description="file, folder searched for the kind's files, or dataset name")
    name: str | None = Field(
        None, pattern=r"^\w[\w.-]*$", description="folder in out; default: the last part of path without suffixes"
    )
    weight: PositiveFloat = Field(1.0, description="how often an epoch reads the source")
    column: str = Field("text", description="tables and hub: the column with the text")
    config: str | None = Field(None, description="hub: the dataset's configuration, such as 20231101.en")
    split: str = Field("train", description="hub: the split")
    document: Literal["file", "block"] = Field(
        "file", description="text: what a document is, a file or a block between blank lines"
    )

    @model_validator(mode="after")
    def _keys_of_the_kind(self) -> Self:
        for key, kinds in KINDS_OF_KEY.items():
            if self.kind not in kinds and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f'{key} does not go with kind = "{self.kind}", only with {", ".join(kinds)}')
        if self.folder in ("", "..", "tokenizer", "manifest.json"):
            raise ValueError(f'"{self.folder}" cannot be the name of a source; set name')
        return self

    @property
    def folder(self) -> str:
        """The name of the source's folder: `name`, or the end of the path."""
        name = Path(self.path).name
        while self.name is None and name.endswith(SOURCE_SUFFIXES):
            name = name.rpartition(".")[0]
        return self.name or name

    def settings(self) -> dict[str, Any]:
        """Return the keys that the source's kind reads, the name among them."""
        unused = {key for key, kinds in KINDS_OF_KEY.items() if self.kind not in kinds}
        return {"name": self.folder} | self.model_dump(exclude=unused | {"name"}, exclude_none=True)


class PrepareConfig(ConfigTable):
    """The config of prepare."""

    out: str = Field(description="folder for the token shards")
    tokenizer: str = Field(description="tokenizer folder or hub name")
    held_out: float = Field(
        0.005, ge=0, lt=1, description="share of the documents for evaluation; above 0, at least one of several"
    )
    tokens_per_shard: PositiveInt = Field(100_000_000, description="tokens of one shard")
    min_tokens: PositiveInt = Field(8, description="tokens of the shortest document; shorter ones are dropped")
    deduplicate: bool = Field(True, description="drop documents with the same text as an earlier one")
    on_error: Literal["stop", "skip"] = Field(
        "stop", description="at a damaged document: stop, or skip it and list it in the manifest"
    )
    num_workers: int = Field(0, ge=0, description="processes that tokenize; 0: one for each CPU core")
    part: int | None = Field(
        None, ge=0, description="do only this part of the tokenizing, counted from 0; goes with parts"
    )
    parts: PositiveInt | None = Field(
        None, description="number of parts; when all are done, run once without part and parts to finish"
    )
    source: list[SourceConfig] = Field(min_length=1, description="where the text comes from")

    @model_validator(mode="after")
    def _shares_and_names(self) -> Self:
        if (self.part is None) != (self.parts is None):
            raise ValueError("give both of part and parts, or none")
        if self.part is not None and self.parts is not None and self.part >= self.parts:
            raise ValueError(f"part = {self.part}, but parts = {self.parts} are numbered from 0")
        folders = [source.folder for source in self.source]
        for folder in folders:
            if folders.count(folder) > 1:
                raise ValueError(f'two sources are called "{folder}"; give one of them another name')
        return self


class TokenizerConfig(ConfigTable):
    """The config of train-tokenizer."""

    out: str = Field(description="folder for the tokenizer")
    kind: Literal["wordpiece", "unigram"] = Field(description="BERT's WordPiece, or sentencepiece's unigram model")
    vocab_size: PositiveInt = Field(description="number of tokens, special ones included")
    lowercase: bool = Field(description="lower-case the text; WordPiece then drops accents too")
    max_characters: int = Field(
        100_000_000,
        ge=1,
        le=1_000_000_000,
        description="characters to learn from, shared out over the sources by weight",
    )
    source: list[SourceConfig] = Field(min_length=1, description="where the text comes from")
