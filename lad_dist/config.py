"""Configs: strict, frozen, read from TOML, changed by dotted overrides.

    load(schema, path, overrides)   TOML file + ["optim.lr=1e-4", ...] -> a frozen config, or UserError naming the place
    override(tables, overrides)     the same change on plain tables: the command line, a search space and tests share it
    dump(config)                    TOML text with every default written out
    describe(schema)                the keys with types, units and defaults: what `--help` prints

`[objective]` and `[[surgery]]` are a name and the keyword arguments of that class or function: their signatures are
the schema (`arguments`). `[deepspeed]` is in DeepSpeed's own words. Every mistake is a UserError of one line that
names the nearest right name.
"""

import inspect
import os
import re
import tomllib
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from lad_dist.utils.suggest import did_you_mean, nearest

# Exit codes. They tell the scheduler what to do with a job.
DONE, DIED, MISTAKE, NOTHING_VALID, AGAIN, NO_PROGRESS, INTERRUPTED = 0, 1, 2, 3, 75, 93, 130


class UserError(ValueError):
    """The user's mistake: one line saying where it is and what to do. Scripts print it and exit with its code."""

    code = MISTAKE


class Fault(Exception):
    """Not the user's mistake: one line too, and trying again, perhaps elsewhere, may help."""

    code = DIED


class Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0)]


TEACHERS_OWN = "teacher"  # as student.path
DEEPEST = 16  # tables in tables
SHOWN = 60  # characters of a wrong value


class Run(Table):
    name: str = Field(description="name of the run's folder", min_length=1)
    dir: str = Field("runs", description="folder of the run folders")
    seed: int = Field(0, ge=0, description="the only source of randomness: order, masks, dropout, new weights")
    steps: Positive | None = Field(None, description="optimizer steps; give this or epochs")
    epochs: Rate | None = Field(None, description="passes over the training data; give this or steps")
    log_every: Positive = Field(10, description="steps between reports")
    eval_every: int = Field(0, ge=0, description="steps between evaluations; 0: at the end only")
    check_every: int = Field(
        100, ge=0, description="steps between comparisons of the weights that processes hold alike; 0: none"
    )
    max_skips: Positive = Field(
        5,
        description="updates skipped in a row, their loss or gradient not finite, after which the run goes back to its "
        "last checkpoint and leaves these steps out",
    )
    spike_sigma: float = Field(
        0.0, ge=0, description="a loss so many standard deviations above the last 128 is skipped likewise; 0: none is"
    )
    hang_seconds: float = Field(
        60.0,
        ge=0,
        description="without progress on any process, or 10 median steps where that is more, after which the run ends "
        "with 75; 0: never",
    )
    save_every: int = Field(
        0, ge=0, description="steps that a crash may cost at most; 0: checkpoints only when stopped early"
    )
    keep: int = Field(2, ge=2, description="newest checkpoints that stay: a damaged one gives way to the next")
    keep_every: int = Field(0, ge=0, description="every so many-th checkpoint stays for good; 0: none")

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        return self

    @property
    def folder(self) -> Path:
        return Path(self.dir) / self.name


class Teacher(Table):
    path: str = Field(description="model folder or hub name")
    dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="precision of the frozen teacher; default: the student's"
    )
    cache: str | None = Field(
        None,
        description="folder for what it says of a task's training examples, shared by runs; default: the run's own, "
        "removed at its end",
    )
    cache_gb: float = Field(
        20.0, ge=0, description="where that takes more than so many GB, the teacher is asked anew at each step"
    )


class Student(Table):
    path: str | None = Field(
        None, description='model folder or hub name to start from; "teacher": what teacher.path names'
    )
    architecture: dict[str, Any] | None = Field(
        None,
        description="instead of path: a new model, in its Hugging Face config's words (model_type, hidden_size, …)",
    )
    tokenizer: str | None = Field(
        None, description="tokenizer folder or hub name; default: the model's, or the corpus's"
    )
    layers: Literal["even", "first", "last"] | list[Positive] = Field(
        "even", description="layers to keep: a rule for depth, or their numbers from 1"
    )
    depth: Positive | None = Field(None, description="number of layers that the rule keeps; default: all")
    dropout: float | None = Field(None, ge=0, lt=1, description="of hidden states while training; default: the model's")
    attention_dropout: float | None = Field(
        None, ge=0, lt=1, description="of attention; default: the model's; 0 lets fast attention kernels run"
    )
    embeddings: Literal["copy", "random"] = Field("copy", description="keep the embeddings, or draw them anew")
    width: Positive | None = Field(None, description="of hidden states, where less than the model's at path")
    heads: Positive | None = Field(None, description="attention heads that stay; they divide width; default: all")
    inner: Positive | None = Field(
        None, description="units of feed-forward blocks that stay; default: the model's share of width"
    )
    directions: Literal["principal", "random"] = Field(
        "principal", description="which directions of hidden states a smaller width keeps"
    )

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.path is None) == (self.architecture is None):
            raise ValueError("give exactly one of path and architecture")
        if isinstance(self.layers, list) and self.depth not in (None, len(self.layers)):
            raise ValueError(f"depth = {self.depth} contradicts the {len(self.layers)} layers listed")
        for key in ("width", "heads", "inner"):
            if self.path is None and getattr(self, key) is not None:
                raise ValueError(f"{key} narrows the model at path; say the sizes of a new one in architecture")
        if self.narrowed and self.embeddings == "random":
            raise ValueError('embeddings = "random" throws away what a narrower model is fitted to; keep "copy"')
        return self

    @property
    def narrowed(self) -> bool:
        """Whether any size of the model at path is named."""
        return (self.width, self.heads, self.inner) != (None, None, None)


class Data(Table):
    max_length: int = Field(128, ge=8, description="tokens of the longest sequence, special ones included")
    slots: Positive = Field(1, description="micro-batches of one step, shared out over the processes")
    workers: int = Field(
        1, ge=0, description="processes that load ahead of each training process; 0: load in it, when data are needed"
    )


class CorpusData(Data):
    shards: str = Field(description="folder written by prepare_corpus")
    tokens_per_slot: Positive = Field(4096, description="tokens of one micro-batch, a multiple of max_length")
    mask: float = Field(0.15, gt=0, lt=1, description="share of the tokens that MLM masks")
    whole_words: bool = Field(False, description="mask whole words, not single tokens")
    cross_documents: bool = Field(
        False, description="let a sequence run on into the next document, and attention with it"
    )
    weights: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {}, description="how often an epoch reads a source, by its name; default: as prepared"
    )

    @model_validator(mode="after")
    def _whole_windows(self) -> Self:
        if self.tokens_per_slot % self.max_length:
            near = max(1, round(self.tokens_per_slot / self.max_length)) * self.max_length
            raise ValueError(
                f"tokens_per_slot = {self.tokens_per_slot} is no multiple of max_length = {self.max_length}; {near} is"
            )
        return self


class TaskData(Data):
    task: str | None = Field(None, description="a GLUE task by name; or give train and dev")
    path: str | None = Field(None, description="folder in GLUE's layout (RTE/train.tsv …); default: from the hub")
    train: str | None = Field(
        None,
        description="own .csv, .tsv, .jsonl or .parquet: text, text_pair (optional), label; for tagging CoNLL or "
        ".jsonl, for question answering SQuAD's .json",
    )
    dev: str | None = Field(None, description="the same for evaluation")
    kind: Literal["classification", "regression", "tagging", "question_answering"] = Field(
        "classification", description="of the user's own task"
    )
    stride: Positive | None = Field(
        None, description="tokens that neighbouring windows of a question's context share; default: max_length / 3"
    )
    answer_length: Positive = Field(30, description="tokens of the longest answer to a question")
    null_threshold: float = Field(
        0.0, description="by how much the score of no answer must exceed the best answer's, where some have none"
    )
    examples_per_slot: Positive = Field(32, description="examples of one micro-batch")
    pad_to: int | None = Field(
        None, ge=8, description="pad every sequence to this many tokens, as LAD's reference does"
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.task is None and (self.train is None or self.dev is None):
            raise ValueError("give a GLUE task, or both train and dev files")
        if self.task is not None and (self.train or self.dev):
            raise ValueError("give a GLUE task or train and dev files, not both")
        if self.pad_to is not None and self.pad_to < self.max_length:
            raise ValueError(f"pad_to = {self.pad_to} is shorter than max_length = {self.max_length}")
        return self

    @model_validator(mode="after")
    def _keys_of_the_kind(self) -> Self:
        if self.task is not None and self.kind in ("tagging", "question_answering"):
            raise ValueError(f'kind = "{self.kind}" is for train and dev files; a GLUE task has its own')
        for key in ("stride", "answer_length", "null_threshold"):
            if self.kind != "question_answering" and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f'{key} goes with kind = "question_answering" alone')
        if self.stride is not None and self.stride >= self.max_length // 2:
            raise ValueError(f"stride = {self.stride} must be less than half of max_length = {self.max_length}")
        return self

    @property
    def overlap(self) -> int:
        """`stride`, or its default."""
        return self.max_length // 3 if self.stride is None else self.stride


class Named(Table):
    """A name and the keyword arguments that go with it."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)
    name: str = Field(description="name, beside it the keyword arguments that go with it")

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Optim(Table):
    lr: Rate = Field(description="peak learning rate of the student")
    objective_lr: Rate | None = Field(None, description="peak learning rate of what the objective learns; default: lr")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's, not on biases and norms")
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(
        [0.9, 0.999], min_length=2, max_length=2, description="AdamW's"
    )
    eps: Rate = Field(1e-8, description="AdamW's")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="after the warm-up")


class TrainConfig(Table):
    run: Run
    student: Student
    teacher: Teacher | None = None
    data: Data
    objective: Named
    surgery: list[Named] = Field([], description="changes to the student, in order: a name and its arguments")
    optim: Optim
    deepspeed: dict[str, Any] = Field({}, description="DeepSpeed's own config: zero_optimization, bf16, …")

    @property
    def zero_stage(self) -> int:
        return int(self.deepspeed.get("zero_optimization", {}).get("stage", 0))

    @model_validator(mode="before")
    @classmethod
    def _student_of_its_teacher(cls, tables: dict[str, Any]) -> dict[str, Any]:
        student, teacher = tables.get("student"), tables.get("teacher")
        if not isinstance(student, dict) or student.get("path") != TEACHERS_OWN:
            return tables
        if isinstance(teacher, dict) and "path" in teacher:
            return {**tables, "student": {**student, "path": teacher["path"]}}
        if teacher is not None or not tables.keys() <= cls.model_fields.keys():
            return tables  # there is a misspelt or missing key to complain of
        raise ValueError(f'student.path = "{TEACHERS_OWN}": there is no teacher, set teacher.path')


class PretrainConfig(TrainConfig):
    data: CorpusData

    @model_validator(mode="after")
    def _no_answers_to_keep(self) -> Self:
        if self.teacher is not None and self.teacher.cache is not None:
            raise ValueError("teacher.cache is for tasks: a corpus is masked anew each time it is read")
        return self


class TaskConfig(TrainConfig):
    data: TaskData


KINDS_WITH = {
    "column": ("jsonl", "parquet", "arrow", "hub"),
    "config": ("hub",),
    "split": ("hub",),
    "document": ("text",),
}
ENDINGS = (".txt", ".jsonl", ".json", ".parquet", ".arrow", ".gz", ".bz2", ".xz", ".zst")


class Source(Table):
    kind: Literal["wikiextractor", "text", "jsonl", "parquet", "arrow", "hub"] = Field(
        description="WikiExtractor's output, .txt files, JSON lines (all three also .gz, .bz2, .xz, .zst), Parquet, "
        "Arrow, or a hub dataset"
    )
    path: str = Field(description="file, folder searched for the kind's files, or dataset name", min_length=1)
    name: str | None = Field(
        None, pattern=r"^\w[\w.-]*$", description="its folder in out; default: the last part of path without endings"
    )
    weight: Rate = Field(1.0, description="how often an epoch reads it")
    column: str = Field("text", description="tables and hub: the column with the text")
    config: str | None = Field(None, description="hub: the dataset's configuration, such as 20231101.en")
    split: str = Field("train", description="hub: the split")
    document: Literal["file", "block"] = Field(
        "file", description="text: what a document is, a file or a block between blank lines"
    )

    @model_validator(mode="after")
    def _keys_of_the_kind(self) -> Self:
        for key, kinds in KINDS_WITH.items():
            if self.kind not in kinds and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f'{key} does not go with kind = "{self.kind}", only with {", ".join(kinds)}')
        if self.folder in ("", "..", "tokenizer", "manifest.json"):
            raise ValueError(f'"{self.folder}" cannot be the name of a source; set name')
        return self

    @property
    def folder(self) -> str:
        """The name, given or taken from the path."""
        name = Path(self.path).name
        while self.name is None and name.endswith(ENDINGS):
            name = name.rpartition(".")[0]
        return self.name or name

    def settings(self) -> dict[str, Any]:
        """The keys that its kind reads, the name among them."""
        idle = {key for key, kinds in KINDS_WITH.items() if self.kind not in kinds}
        return {"name": self.folder} | self.model_dump(exclude=idle | {"name"}, exclude_none=True)


def train_schema(tables: Mapping[str, Any]) -> type[TrainConfig]:
    """Of the plain tables of a training: its data say whether it is a pre-training."""
    data = tables.get("data")
    return PretrainConfig if isinstance(data, Mapping) and "shards" in data else TaskConfig


class PrepareConfig(Table):
    out: str = Field(description="folder for the token shards")
    tokenizer: str = Field(description="tokenizer folder or hub name")
    held_out: float = Field(0.005, ge=0, lt=1, description="share of the documents kept for evaluation")
    tokens_per_shard: Positive = Field(100_000_000, description="tokens of one shard")
    min_tokens: Positive = Field(8, description="shorter documents are dropped")
    deduplicate: bool = Field(True, description="drop documents with the same text as an earlier one")
    on_error: Literal["stop", "skip"] = Field(
        "stop", description="what to do about a damaged document: stop, or skip it and list it in the manifest"
    )
    workers: int = Field(0, ge=0, description="processes; 0: one for each core it may use")
    part: int | None = Field(None, ge=0, description="do only this share of the tokenizing, from 0; needs parts")
    parts: Positive | None = Field(None, description="number of shares; a run without part and parts then finishes")
    source: list[Source] = Field(min_length=1, description="where the text comes from")

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


class TokenizerConfig(Table):
    out: str = Field(description="folder for the tokenizer")
    kind: Literal["wordpiece", "unigram"] = Field(description="BERT's WordPiece, or sentencepiece's unigram model")
    vocabulary: Positive = Field(description="number of tokens, special ones included")
    lowercase: bool = Field(description="read text in lower case; WordPiece then drops accents too")
    characters: int = Field(
        100_000_000, ge=1, le=1_000_000_000, description="text to learn from, shared out over the sources by weight"
    )
    source: list[Source] = Field(min_length=1, description="where the text comes from")


class ModelPath(Table):
    path: str = Field(description="model folder or hub name")


class EvaluateConfig(Table):
    model: ModelPath
    teacher: ModelPath | None = Field(None, description="to measure loyalty against")
    data: TaskData
    out: str | None = Field(None, description="JSON file for the result; default: only printed")


class Search(Table):
    name: str = Field(description="name of the search's folder", min_length=1)
    dir: str = Field("runs", description="folder of the search folders")
    base: str = Field(description="config of a task distillation; the search changes it")
    samples: Positive = Field(1, description="trials drawn from the space, for each combination of the grid")
    concurrent: int = Field(0, ge=0, description="trials at once; 0: as many as the cluster holds")
    cpus: Rate = Field(1.0, description="CPU cores of one trial")
    gpus: float = Field(0.0, ge=0, description="GPUs of one trial; a fraction shares one")
    metric: str | None = Field(None, description="metric of the dev set to maximise; default: the task's first")
    grace: Positive = Field(1, description="evaluations before ASHA may stop a trial")
    reduction: int = Field(3, ge=2, description="ASHA keeps one in so many at each rung")
    seed: int = Field(0, ge=0, description="of the samples drawn")


class SearchConfig(Table):
    search: Search
    override: dict[str, Any] = Field({}, description='fixed changes to base: "data.task" = "rte"')
    grid: dict[str, dict[str, dict[str, Any]]] = Field(
        {}, description='what is compared: axis.choice = {"data.task" = "rte"}; base = FILE in a choice: another config'
    )
    space: dict[str, dict[str, Any]] = Field(
        {}, description='what is searched: "optim.lr" = {loguniform = [1e-5, 1e-3]}; uniform, choice, randint too'
    )

    @model_validator(mode="after")
    def _something_to_try(self) -> Self:
        if not self.grid and not self.space:
            raise ValueError("give [grid], [space] or both: there is nothing to try")
        if not self.space and self.search.samples > 1:
            raise ValueError(f"search.samples = {self.search.samples}: there is no [space] to draw them from")
        for axis, choices in self.grid.items():
            wrong = [name for name in choices if not re.fullmatch(r"\w[\w.]*", name)]
            if not choices or wrong:
                raise ValueError(f"grid.{axis}: give choices whose names are letters, digits, _ and dots")
        return self


Schema = TypeVar("Schema", bound=Table)


def load(schema: type[Schema], path: str | Path, overrides: Iterable[str] = ()) -> Schema:
    """The config in the TOML file `path` after the overrides. Raises UserError, naming file, key and nearest right
    key."""
    return parse(schema, override(read(path), map(assignment, overrides)), where=str(path))


def read(path: str | Path) -> dict[str, Any]:
    """The plain tables of a TOML file."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the config ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (at byte {error.start}); a config is TOML, a text in UTF-8") from None
    except (ValueError, RecursionError) as error:  # of its own, and of a number with thousands of digits
        raise UserError(f"{path}: not valid TOML: {error}; mend the file") from None


def assignment(text: str) -> tuple[str, Any]:
    """`"a.b=value"` as `("a.b", value)`: the value in TOML, a bare word as a string."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"{text!r}: an override is written key.subkey=value")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except (ValueError, RecursionError) as error:
        if value.lstrip()[:1] in ("[", "{", '"', "'"):
            raise UserError(f"{text!r}: not a TOML value: {error}") from None
        return key.strip(), value


def override(tables: Mapping[str, Any], changes: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """A copy of the tables with each `("a.b", value)` set; `("a.0.b", value)`: in the first of a list of tables."""
    result = dict(tables)
    for key, value in changes:
        result = _with(result, key.split("."), value, key)
    return result


def _with(tables: Any, path: list[str], value: Any, key: str) -> Any:
    """A copy of a table, or of a list of them, with the value set."""
    head, *rest = path
    if isinstance(tables, list):
        numbered = {str(number): table for number, table in enumerate(tables)}
        if head not in numbered:
            meant = 'did you mean "0"?' if len(tables) == 1 else did_you_mean(head, numbered)
            raise UserError(f"{key}: there is no {head} in a list of {len(tables)}, counted from 0; {meant}")
        return list(_with(numbered, path, value, key).values())
    if not rest:
        return {**tables, head: value}
    inner = tables.get(head, {})
    if not isinstance(inner, dict | list):
        raise UserError(f"{key}: {head} is not a table, nothing can be set inside it")
    return {**tables, head: _with(inner, rest, value, key)}


def parse(schema: type[Schema], tables: Mapping[str, Any], where: str) -> Schema:
    """Plain tables as a config. Raises UserError for the first mistake, `where` in front."""
    _check_values(tables, where)
    try:
        return schema.model_validate(dict(tables))
    except ValidationError as error:
        raise UserError(f"{where}: {_explain(schema, error)}") from None


def _check_values(tables: Mapping[str, Any], where: str) -> None:
    """Refuses what TOML allows and nothing here can use: tables in tables without end, and texts that no file has."""
    level: list[tuple[str, Any]] = [("", tables)]
    for _ in range(DEEPEST):
        level = [inner for place, value in level for inner in _inside(place, value)]
        for place, value in level:
            if isinstance(value, str) and not _is_text(value):
                raise UserError(f"{where}: {place}: {_shown(value)} holds a character that no text can; write it anew")
    if level:
        raise UserError(f"{where}: {level[0][0][:40]}…: more than {DEEPEST} tables deep; no key stands there")


def _inside(place: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping | list):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        yield from ((f"{place}.{key}" if place else str(key), inner) for key, inner in items)


def _is_text(value: str) -> bool:
    """Whether it can be written down, and handed to the system as a path."""
    return "\0" not in value and not any("\ud800" <= character <= "\udfff" for character in value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def dump(config: Table) -> str:
    """TOML with every default written out; what is None is left away."""
    return tomli_w.dumps(config.model_dump(exclude_none=True))


def filled(schema: type[Table], tables: Mapping[str, Any]) -> dict[str, Any]:
    """The tables of a config as an earlier version wrote it, with the keys that it did not know at their defaults."""
    found = dict(tables)
    for name, field in schema.model_fields.items():
        inner = _tables_in(field.annotation)
        if inner and isinstance(found.get(name), Mapping):
            found[name] = filled(inner[0], found[name])
        elif not inner and field.default is not PydanticUndefined and field.default is not None:
            found.setdefault(name, field.default)
    return found


def check_place(key: str, folder: str | Path) -> None:
    """Raises UserError where no such folder can be made or written to."""
    place = Path(folder)
    try:
        while not place.exists():
            place = place.parent
        fit = place.is_dir() and os.access(place, os.W_OK | os.X_OK)
    except OSError:  # a name that is too long
        fit = False
    if not fit:
        raise UserError(f"{key} = {_shown(str(folder))}: {place} is no folder that can be written; give another")


def pick(what: str, name: str, choices: Mapping[str, Any]) -> Any:
    """choices[name], or UserError with the nearest name."""
    if name not in choices:
        raise UserError(f'{what} "{name}" is unknown: {did_you_mean(name, choices)}')
    return choices[name]


def arguments(where: str, function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword-only arguments of `function` with `options` filled in, checked against its signature and completed
    by its defaults. Raises UserError naming `where`."""
    fields = {name: _keyword(parameter) for name, parameter in keywords(function).items()}
    schema: type[Table] = create_model(where, __base__=Table, **fields)  # type: ignore[call-overload]
    return parse(schema, options, where).model_dump()


def keywords(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of a function or of a class's constructor."""
    signature = inspect.signature(function, eval_str=True)
    return {p.name: p for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY}


def _keyword(parameter: inspect.Parameter) -> tuple[Any, Any]:
    return parameter.annotation, ... if parameter.default is parameter.empty else parameter.default


def _explain(schema: type[Table], error: ValidationError) -> str:
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")  # a misspelt key explains a missing one
    path = [str(part) for part in first["loc"] if not _is_union_tag(part)]
    place = ".".join(path)
    if first["type"] == "extra_forbidden":
        names = _names(schema, path[:-1])
        kind = "table" if first["loc"][:-1] == () and isinstance(first.get("input"), dict) else "key"
        return f"{place}: no such {kind}; {did_you_mean(path[-1], names)}"
    if first["type"] == "missing":
        *outer, name = path
        like = nearest(name, first["input"].keys() - _names(schema, outer))  # where a name may stand beside any other
        said = f'{like[0]}: no such key; did you mean "{name}"?' if like else f"{name}: missing, and it has no default"
        return ".".join([*outer, said])
    message = first["msg"].removeprefix("Value error, ")
    given = "" if isinstance(first["input"], dict | BaseModel) else f", not {_shown(first['input'])}"
    return f"{place}: {message[0].lower() + message[1:]}{given}" if place else message


def _is_union_tag(part: Any) -> bool:
    return isinstance(part, str) and ("[" in part or part in ("int", "float", "str", "bool"))


def _names(schema: Any, path: list[str]) -> list[str]:
    for part in path:
        if not part.isdigit():
            schema = _tables_in(schema.model_fields[part].annotation)[0]
    return list(schema.model_fields)


def _tables_in(annotation: Any) -> list[type[Table]]:
    """The tables named in an annotation: X, X | None, list[X]."""
    if inspect.isclass(annotation) and issubclass(annotation, Table):
        return [annotation]
    return [table for inner in typing.get_args(annotation) for table in _tables_in(inner)]


def describe(schema: type[Table], prefix: str = "") -> list[tuple[str, str, str, str]]:
    """Rows of (key, type, default, description) for every key that the schema reads."""
    rows = []
    for name, field in schema.model_fields.items():
        tables = _tables_in(field.annotation)
        repeated = typing.get_origin(field.annotation) is list
        if tables:
            rows += describe(tables[0], f"{prefix}{name}{'[]' if repeated else ''}.")
        else:
            rows.append((prefix + name, type_name(field.annotation), _default(field), field.description or ""))
    return rows


def type_name(annotation: Any) -> str:
    """An annotation as a user reads it."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return type_name(inner[0])
    if origin is Literal:
        return " | ".join(f'"{value}"' if isinstance(value, str) else str(value) for value in inner)
    if origin is list:
        return f"[{type_name(inner[0])}]"
    if origin is dict:
        return "table"
    if inner:
        return " | ".join(type_name(part) for part in inner if part is not type(None))
    return {"str": "string", "Any": "any"}.get(annotation.__name__, annotation.__name__)


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    return "-" if field.default is None else repr(field.default)
