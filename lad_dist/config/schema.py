"""The tables of a config: every key with its type, default and description.

`[objective]` and `[[compression]]` hold a name and the keyword arguments of that class or function: their signatures
are the schema (`load.validate_arguments`). `[deepspeed]` is in DeepSpeed's own words.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class ConfigTable(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]


TEACHER_PATH = "teacher"  # as student.path


class RunConfig(ConfigTable):
    name: str = Field(description="name of the run's folder", min_length=1)
    dir: str = Field("runs", description="folder of the run folders")
    seed: int = Field(0, ge=0, description="the only source of randomness: order, masks, dropout, new weights")
    steps: PositiveInt | None = Field(None, description="optimizer steps; give this or epochs")
    epochs: PositiveFloat | None = Field(None, description="passes over the training data; give this or steps")
    log_every: PositiveInt = Field(10, description="steps between reports")
    eval_every: int = Field(0, ge=0, description="steps between evaluations; 0: at the end only")
    replica_check_every: int = Field(
        100, ge=0, description="steps between comparisons of the weights that processes hold alike; 0: none"
    )
    max_skips: PositiveInt = Field(
        5,
        description="updates skipped in a row, their loss or gradient not finite, after which the run goes back to its "
        "last checkpoint and leaves these steps out",
    )
    spike_sigma: float = Field(
        0.0, ge=0, description="a loss so many standard deviations above the last 128 is skipped likewise; 0: none is"
    )
    watchdog_timeout: float = Field(
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


class TeacherConfig(ConfigTable):
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


class StudentConfig(ConfigTable):
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
    layers: Literal["even", "first", "last"] | list[PositiveInt] = Field(
        "even", description="layers to keep: a rule for depth, or their numbers from 1"
    )
    num_hidden_layers: PositiveInt | None = Field(
        None, description="number of layers that the rule keeps; default: all"
    )
    dropout: float | None = Field(None, ge=0, lt=1, description="of hidden states while training; default: the model's")
    attention_dropout: float | None = Field(
        None, ge=0, lt=1, description="of attention; default: the model's; 0 lets fast attention kernels run"
    )
    embeddings: Literal["copy", "random"] = Field("copy", description="keep the embeddings, or draw them anew")
    hidden_size: PositiveInt | None = Field(None, description="of hidden states, where less than the model's at path")
    num_attention_heads: PositiveInt | None = Field(
        None, description="attention heads that stay; they divide width; default: all"
    )
    intermediate_size: PositiveInt | None = Field(
        None, description="units of feed-forward blocks that stay; default: the model's share of width"
    )
    width_basis: Literal["principal", "random"] = Field(
        "principal", description="which directions of hidden states a smaller width keeps"
    )

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.path is None) == (self.architecture is None):
            raise ValueError("give exactly one of path and architecture")
        if isinstance(self.layers, list) and self.num_hidden_layers not in (None, len(self.layers)):
            raise ValueError(f"depth = {self.num_hidden_layers} contradicts the {len(self.layers)} layers listed")
        for key in ("hidden_size", "num_attention_heads", "intermediate_size"):
            if self.path is None and getattr(self, key) is not None:
                raise ValueError(f"{key} narrows the model at path; say the sizes of a new one in architecture")
        if self.is_narrowed and self.embeddings == "random":
            raise ValueError('embeddings = "random" throws away what a narrower model is fitted to; keep "copy"')
        return self

    @property
    def is_narrowed(self) -> bool:
        """Whether any size of the model at path is named."""
        return (self.hidden_size, self.num_attention_heads, self.intermediate_size) != (None, None, None)


class DataConfig(ConfigTable):
    max_length: int = Field(128, ge=8, description="tokens of the longest sequence, special ones included")
    micro_batches_per_step: PositiveInt = Field(
        1, description="micro-batches of one step, shared out over the processes"
    )
    num_workers: int = Field(
        1, ge=0, description="processes that load ahead of each training process; 0: load in it, when data are needed"
    )


class CorpusDataConfig(DataConfig):
    shards: str = Field(description="folder written by prepare_corpus")
    micro_batch_tokens: PositiveInt = Field(4096, description="tokens of one micro-batch, a multiple of max_length")
    mlm_probability: float = Field(0.15, gt=0, lt=1, description="share of the tokens that MLM masks")
    whole_word_mask: bool = Field(False, description="mask whole words, not single tokens")
    cross_documents: bool = Field(
        False, description="let a sequence run on into the next document, and attention with it"
    )
    source_weights: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {}, description="how often an epoch reads a source, by its name; default: as prepared"
    )

    @model_validator(mode="after")
    def _whole_windows(self) -> Self:
        if self.micro_batch_tokens % self.max_length:
            near = max(1, round(self.micro_batch_tokens / self.max_length)) * self.max_length
            raise ValueError(
                f"tokens_per_slot = {self.micro_batch_tokens} is no multiple of max_length = {self.max_length}; {near} is"
            )
        return self


class TaskDataConfig(DataConfig):
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
    doc_stride: PositiveInt | None = Field(
        None, description="tokens that neighbouring windows of a question's context share; default: max_length / 3"
    )
    max_answer_length: PositiveInt = Field(30, description="tokens of the longest answer to a question")
    null_score_diff_threshold: float = Field(
        0.0, description="by how much the score of no answer must exceed the best answer's, where some have none"
    )
    micro_batch_size: PositiveInt = Field(32, description="examples of one micro-batch")
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
        for key in ("doc_stride", "max_answer_length", "null_score_diff_threshold"):
            if self.kind != "question_answering" and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f'{key} goes with kind = "question_answering" alone')
        if self.doc_stride is not None and self.doc_stride >= self.max_length // 2:
            raise ValueError(f"stride = {self.doc_stride} must be less than half of max_length = {self.max_length}")
        return self

    @property
    def overlap(self) -> int:
        """`stride`, or its default."""
        return self.max_length // 3 if self.doc_stride is None else self.doc_stride


class NamedOptions(ConfigTable):
    """A name and the keyword arguments that go with it."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)
    name: str = Field(description="name, beside it the keyword arguments that go with it")

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class OptimConfig(ConfigTable):
    lr: PositiveFloat = Field(description="peak learning rate of the student")
    objective_lr: PositiveFloat | None = Field(
        None, description="peak learning rate of what the objective learns; default: lr"
    )
    weight_decay: float = Field(0.01, ge=0, description="AdamW's, not on biases and norms")
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(
        [0.9, 0.999], min_length=2, max_length=2, description="AdamW's"
    )
    eps: PositiveFloat = Field(1e-8, description="AdamW's")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="after the warm-up")


class TrainConfig(ConfigTable):
    run: RunConfig
    student: StudentConfig
    teacher: TeacherConfig | None = None
    data: DataConfig
    objective: NamedOptions
    compression: list[NamedOptions] = Field(
        [], description="changes to the student, in order: a name and its arguments"
    )
    optim: OptimConfig
    deepspeed: dict[str, Any] = Field({}, description="DeepSpeed's own config: zero_optimization, bf16, …")

    @property
    def zero_stage(self) -> int:
        return int(self.deepspeed.get("zero_optimization", {}).get("stage", 0))

    @model_validator(mode="before")
    @classmethod
    def _student_of_its_teacher(cls, tables: dict[str, Any]) -> dict[str, Any]:
        student, teacher = tables.get("student"), tables.get("teacher")
        if not isinstance(student, dict) or student.get("path") != TEACHER_PATH:
            return tables
        if isinstance(teacher, dict) and "path" in teacher:
            return {**tables, "student": {**student, "path": teacher["path"]}}
        if teacher is not None or not tables.keys() <= cls.model_fields.keys():
            return tables  # there is a misspelt or missing key to complain of
        raise ValueError(f'student.path = "{TEACHER_PATH}": there is no teacher, set teacher.path')


class PretrainConfig(TrainConfig):
    data: CorpusDataConfig

    @model_validator(mode="after")
    def _no_answers_to_keep(self) -> Self:
        if self.teacher is not None and self.teacher.cache is not None:
            raise ValueError("teacher.cache is for tasks: a corpus is masked anew each time it is read")
        return self


class TaskConfig(TrainConfig):
    data: TaskDataConfig


KINDS_OF_KEY = {
    "column": ("jsonl", "parquet", "arrow", "hub"),
    "config": ("hub",),
    "split": ("hub",),
    "document": ("text",),
}
SOURCE_SUFFIXES = (".txt", ".jsonl", ".json", ".parquet", ".arrow", ".gz", ".bz2", ".xz", ".zst")


class SourceConfig(ConfigTable):
    kind: Literal["wikiextractor", "text", "jsonl", "parquet", "arrow", "hub"] = Field(
        description="WikiExtractor's output, .txt files, JSON lines (all three also .gz, .bz2, .xz, .zst), Parquet, "
        "Arrow, or a hub dataset"
    )
    path: str = Field(description="file, folder searched for the kind's files, or dataset name", min_length=1)
    name: str | None = Field(
        None, pattern=r"^\w[\w.-]*$", description="its folder in out; default: the last part of path without endings"
    )
    weight: PositiveFloat = Field(1.0, description="how often an epoch reads it")
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
        """The name, given or taken from the path."""
        name = Path(self.path).name
        while self.name is None and name.endswith(SOURCE_SUFFIXES):
            name = name.rpartition(".")[0]
        return self.name or name

    def settings(self) -> dict[str, Any]:
        """The keys that its kind reads, the name among them."""
        idle = {key for key, kinds in KINDS_OF_KEY.items() if self.kind not in kinds}
        return {"name": self.folder} | self.model_dump(exclude=idle | {"name"}, exclude_none=True)


def train_schema(tables: Mapping[str, Any]) -> type[TrainConfig]:
    """Of the plain tables of a training: its data say whether it is a pre-training."""
    data = tables.get("data")
    return PretrainConfig if isinstance(data, Mapping) and "shards" in data else TaskConfig


class PrepareConfig(ConfigTable):
    out: str = Field(description="folder for the token shards")
    tokenizer: str = Field(description="tokenizer folder or hub name")
    held_out: float = Field(0.005, ge=0, lt=1, description="share of the documents kept for evaluation")
    tokens_per_shard: PositiveInt = Field(100_000_000, description="tokens of one shard")
    min_tokens: PositiveInt = Field(8, description="shorter documents are dropped")
    deduplicate: bool = Field(True, description="drop documents with the same text as an earlier one")
    on_error: Literal["stop", "skip"] = Field(
        "stop", description="what to do about a damaged document: stop, or skip it and list it in the manifest"
    )
    num_workers: int = Field(0, ge=0, description="processes; 0: one for each core it may use")
    part: int | None = Field(None, ge=0, description="do only this share of the tokenizing, from 0; needs parts")
    parts: PositiveInt | None = Field(None, description="number of shares; a run without part and parts then finishes")
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
    out: str = Field(description="folder for the tokenizer")
    kind: Literal["wordpiece", "unigram"] = Field(description="BERT's WordPiece, or sentencepiece's unigram model")
    vocab_size: PositiveInt = Field(description="number of tokens, special ones included")
    lowercase: bool = Field(description="read text in lower case; WordPiece then drops accents too")
    max_characters: int = Field(
        100_000_000, ge=1, le=1_000_000_000, description="text to learn from, shared out over the sources by weight"
    )
    source: list[SourceConfig] = Field(min_length=1, description="where the text comes from")


class ModelPathConfig(ConfigTable):
    path: str = Field(description="model folder or hub name")


class EvaluateConfig(ConfigTable):
    model: ModelPathConfig
    teacher: ModelPathConfig | None = Field(None, description="to measure loyalty against")
    data: TaskDataConfig
    out: str | None = Field(None, description="JSON file for the result; default: only printed")


class SearchOptions(ConfigTable):
    name: str = Field(description="name of the search's folder", min_length=1)
    dir: str = Field("runs", description="folder of the search folders")
    base: str = Field(description="config of a task distillation; the search changes it")
    num_samples: PositiveInt = Field(1, description="trials drawn from the space, for each combination of the grid")
    max_concurrent: int = Field(0, ge=0, description="trials at once; 0: as many as the cluster holds")
    cpus: PositiveFloat = Field(1.0, description="CPU cores of one trial")
    gpus: float = Field(0.0, ge=0, description="GPUs of one trial; a fraction shares one")
    metric: str | None = Field(None, description="metric of the dev set to maximise; default: the task's first")
    grace_period: PositiveInt = Field(1, description="evaluations before ASHA may stop a trial")
    reduction_factor: int = Field(3, ge=2, description="ASHA keeps one in so many at each rung")
    seed: int = Field(0, ge=0, description="of the samples drawn")


class SearchConfig(ConfigTable):
    search: SearchOptions
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
        if not self.space and self.search.num_samples > 1:
            raise ValueError(f"search.num_samples = {self.search.num_samples}: there is no [space] to draw them from")
        for axis, choices in self.grid.items():
            wrong = [name for name in choices if not re.fullmatch(r"\w[\w.]*", name)]
            if not choices or wrong:
                raise ValueError(f"grid.{axis}: give choices whose names are letters, digits, _ and dots")
        return self
