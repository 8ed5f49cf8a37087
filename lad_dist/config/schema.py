"""The tables of a config: every key with its type, default and description.

`[objective]` and `[[compression]]` hold a name and the keyword arguments of that class, whose signature is
the schema (`load.validate_arguments`). `[deepspeed]` is DeepSpeed's own config.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class ConfigTable(BaseModel):
    """A table of a config: frozen, without unknown keys, empty texts and conversions between types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, str_min_length=1)


PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
# A label as files spell it; TOML reads 1 as a number.
LabelName = Annotated[str, BeforeValidator(lambda value: str(value) if type(value) is int else value)]
# These keys change nothing of what is learnt: they may differ when a run resumes.
CHANGEABLE_KEYS = {
    "run.label", "run.trackers", "run.log_every", "run.eval_every", "run.replica_check_every", "run.max_skips",
    "run.watchdog_timeout", "run.save_every", "run.keep", "run.keep_every", "teacher.cache", "teacher.baseline_check",
    "data.num_workers", "data.test",
    "deepspeed.zero_optimization.stage",  # checkpointing/reshard.py refuses what it cannot convert
}  # fmt: skip


TEACHER_PATH = "teacher"  # the value of student.path that stands for teacher.path


class RunConfig(ConfigTable):
    """`[run]`: folder, length, checkpoints and checks of a run."""

    name: str = Field(description="name of the run's folder")
    dir: str = Field("runs", description="folder of the run folders")
    label: str | None = Field(
        None,
        pattern=r"^\P{Cc}+$",
        description="the method's name in reports; default: the names of objective and compressions (kd + prune)",
    )
    seed: int = Field(0, ge=0, description="the only source of randomness: order, masks, dropout, new weights")
    steps: PositiveInt | None = Field(None, description="optimizer steps; give this or epochs")
    epochs: PositiveFloat | None = Field(None, description="passes over the training data; give this or steps")
    trackers: list[Literal["wandb", "mlflow"]] = Field([], description="experiment trackers that get all rows as well")
    log_every: PositiveInt = Field(10, description="steps between reports")
    eval_every: int = Field(0, ge=0, description="steps between evaluations; 0: at the end only")
    best_metric: str | None = Field(
        None,
        description="export the student of the evaluation that is best by this score: a metric of the dev set, "
        "label_loyalty, probability_loyalty, teacher_pearson or loss; default: the student of the last step",
    )
    patience: int = Field(
        0, ge=0, description="evaluations in a row without a better best_metric after which the training ends; 0: never"
    )
    replica_check_every: int = Field(
        100, ge=0, description="steps between comparisons of the weights that all processes hold copies of; 0: never"
    )
    max_skips: PositiveInt = Field(
        5,
        description="updates in a row that are skipped as loss or gradient is not finite; then the run goes back to "
        "the last checkpoint and skips these steps",
    )
    spike_sigma: float = Field(
        0.0,
        ge=0,
        description="also skip an update whose loss is so many standard deviations above the last 128; 0: never",
    )
    watchdog_timeout: float = Field(
        60.0,
        ge=0,
        description="seconds without progress on any process after which the run ends with exit code 75, or 10 median "
        "steps where that is more; 0: never",
    )
    save_every: int = Field(
        0, ge=0, description="steps between checkpoints; 0: only when the run is asked to stop, or for best_metric"
    )
    keep: int = Field(
        2, ge=2, description="newest checkpoints to keep: where one is damaged, the run resumes from the one before it"
    )
    keep_every: int = Field(0, ge=0, description="keep every n-th checkpoint for good; 0: none")

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        return self

    @model_validator(mode="after")
    def _evaluations_to_choose_from(self) -> Self:
        if self.best_metric is not None and not self.eval_every:
            raise ValueError("best_metric chooses among evaluations; set eval_every above 0")
        if self.patience and self.best_metric is None:
            raise ValueError("patience waits for a better best_metric; set best_metric")
        return self

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.dir) / self.name


class TeacherConfig(ConfigTable):
    """`[teacher]`: the model to learn from."""

    path: str = Field(description="model folder or hub name")
    dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="precision of the frozen teacher; default: the student's"
    )
    cache: str | None = Field(
        None,
        description="folder that stores the outputs on a task's training examples, shared by runs; default: in the run "
        "folder, removed when the run is complete",
    )
    cache_gb: float = Field(
        20.0, ge=0, description="GB; a larger cache is not stored, and the teacher runs at each step"
    )
    baseline_check: bool = Field(
        True,
        description="stop before the first step where the teacher scores no better on a task's dev set than one "
        "constant answer, or another order of unnamed outputs scores better",
    )


class StudentConfig(ConfigTable):
    """`[student]`: the model to train."""

    path: str | None = Field(
        None, description='model folder or hub name to start from; "teacher": the same as teacher.path'
    )
    architecture: dict[str, Any] | None = Field(
        None,
        description="instead of path: a new model, with the keys of a Hugging Face config (model_type, hidden_size, …)",
    )
    tokenizer: str | None = Field(
        None, description="tokenizer folder or hub name; default: the model's, or the corpus's"
    )
    layers: Literal["even", "first", "last"] | list[PositiveInt] = Field(
        "even", description="layers to keep: a rule for num_hidden_layers, or a list of layer numbers from 1"
    )
    num_hidden_layers: PositiveInt | None = Field(
        None, description="number of layers that the rule keeps; default: all"
    )
    dropout: float | None = Field(
        None, ge=0, lt=1, description="dropout of hidden states while training; default: the model's"
    )
    attention_dropout: float | None = Field(
        None, ge=0, lt=1, description="dropout of attention; 0 lets fast attention kernels run; default: the model's"
    )
    embeddings: Literal["copy", "random"] = Field(
        "copy", description="copy the embeddings, or initialise them randomly"
    )
    hidden_size: PositiveInt | None = Field(
        None, description="width of hidden states, at most that of the model at path; default: the same"
    )
    num_attention_heads: PositiveInt | None = Field(
        None, description="attention heads to keep, a divisor of hidden_size; default: all"
    )
    intermediate_size: PositiveInt | None = Field(
        None, description="units of feed-forward blocks to keep; default: in proportion to hidden_size"
    )
    width_basis: Literal["principal", "random"] = Field(
        "principal", description="directions of hidden states that a smaller hidden_size keeps"
    )

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.path is None) == (self.architecture is None):
            raise ValueError("give exactly one of path and architecture")
        if isinstance(self.layers, list) and self.num_hidden_layers not in (None, len(self.layers)):
            raise ValueError(
                f"num_hidden_layers = {self.num_hidden_layers} contradicts the {len(self.layers)} layers listed"
            )
        for key in ("hidden_size", "num_attention_heads", "intermediate_size"):
            if self.path is None and getattr(self, key) is not None:
                raise ValueError(f"{key} narrows the model at path; give the sizes of a new one in architecture")
        if self.is_narrowed and self.embeddings == "random":
            raise ValueError('embeddings = "random" throws away what a narrower model is fitted to; keep "copy"')
        return self

    @property
    def is_narrowed(self) -> bool:
        """Whether the student is narrower than the model at path."""
        return (self.hidden_size, self.num_attention_heads, self.intermediate_size) != (None, None, None)


class DataConfig(ConfigTable):
    """`[data]`, the keys of every training."""

    max_length: int = Field(128, ge=8, description="tokens of the longest sequence, special ones included")
    micro_batches_per_step: PositiveInt = Field(
        1,
        description="micro-batches of one step, shared out over the processes; losses are means over the whole step, "
        "but rkd and mgskd compare the sequences of one micro-batch",
    )
    num_workers: int = Field(
        1, ge=0, description="processes that load data ahead for each training process; 0: that process loads the data"
    )


class CorpusDataConfig(DataConfig):
    """`[data]` of a pre-training."""

    shards: str = Field(description="folder of token shards, written by lad-dist prepare")
    micro_batch_tokens: PositiveInt = Field(4096, description="tokens of one micro-batch, a multiple of max_length")
    mlm_probability: float = Field(0.15, gt=0, lt=1, description="share of the tokens that MLM masks")
    whole_word_mask: bool = Field(False, description="mask whole words, not single tokens")
    cross_documents: bool = Field(
        False, description="let a sequence go on into the next document, and attention with it"
    )
    source_weights: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {}, description="how often an epoch reads each source, by name; default: as prepared"
    )

    @model_validator(mode="after")
    def _whole_windows(self) -> Self:
        if self.micro_batch_tokens % self.max_length:
            near = max(1, round(self.micro_batch_tokens / self.max_length)) * self.max_length
            raise ValueError(
                f"micro_batch_tokens = {self.micro_batch_tokens} is no multiple of max_length = {self.max_length}; "
                f"{near} is"
            )
        return self


class TaskDataConfig(DataConfig):
    """`[data]` of a task."""

    requires_train: ClassVar[bool] = True  # beside dev, where the files are the user's own
    task: str | None = Field(None, description="a GLUE task by name; or give train and dev")
    path: str | None = Field(None, description="folder in GLUE's layout (RTE/train.tsv …); default: the hub's data set")
    train: str | None = Field(
        None,
        description="your own .csv, .tsv, .jsonl or .parquet; for tagging CoNLL or .jsonl, for question answering "
        "SQuAD's .json; with data.hub a split",
    )
    dev: str | None = Field(None, description="the same as train, for evaluations on the way and at the end")
    test: str | None = Field(None, description="the same as train, for one evaluation at the end; default: none")
    unlabelled: str | None = Field(
        None,
        description="texts without labels, learnt from the teacher alone: a file as for train, or .txt with a text a "
        "line; with data.hub a split",
    )
    unlabelled_weight: PositiveFloat = Field(
        1.0, description="how often an epoch reads each unlabelled text; it reads each labelled example once"
    )
    hub: str | None = Field(None, description="data set on the hub of which train, dev and test name the splits")
    hub_config: str | None = Field(None, description="configuration of the data set on the hub")
    text: str = Field("text", description="column of your own texts")
    text_pair: str | None = Field(
        None, description="column of the second texts of pairs; default: text_pair where your files have it"
    )
    label: str | list[str] = Field(
        "label",
        description="column of your own labels; for multilabel a column of lists, or of names with | between them, or "
        "a list of columns of 0 and 1, one for each label",
    )
    kind: Literal["classification", "multilabel", "regression", "tagging", "question_answering"] = Field(
        "classification", description="kind of your own task; multilabel gives a text any number of labels"
    )
    labels: Annotated[list[LabelName], Field(min_length=2)] | None = Field(
        None,
        description="the labels in the order of the outputs of heads; default: GLUE's order, those of train, sorted, "
        "or without train those of the model",
    )
    positive: LabelName | None = Field(
        None, description="label of your own classification whose F1 is the metric f1; default: none, and no f1"
    )
    class_weights: Literal["balanced"] | list[PositiveFloat] | None = Field(
        None,
        description="what an example counts in the loss against the labels, by label in the order of labels; balanced: "
        "all labels together count equally; for multilabel what each label counts where an example has it; default: 1",
    )
    doc_stride: PositiveInt | None = Field(
        None, description="tokens that neighbouring windows of a question's context share; default: max_length / 3"
    )
    max_answer_length: PositiveInt = Field(30, description="tokens of the longest answer to a question")
    null_score_diff_threshold: float = Field(
        0.0,
        description="where some questions have no answer: by how much the score of none must exceed the best answer's",
    )
    micro_batch_size: PositiveInt = Field(32, description="examples of one micro-batch")
    pad_to: int | None = Field(
        None,
        ge=8,
        description="pad every sequence to this many tokens, as LAD's reference code does; default: no padding",
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.task is None and (self.dev is None or (self.requires_train and self.train is None)):
            files = "both train and dev files" if self.requires_train else "a dev file"
            raise ValueError(f"give a GLUE task, or {files}")
        if self.task is not None and (self.train is not None or self.dev is not None):
            raise ValueError("give a GLUE task or train and dev files, not both; data.task=none unsets the task")
        columns = ("text", "text_pair") if self.unlabelled is None else ()
        for key in ("test", "hub", "hub_config", *columns, "label"):
            if self.task is not None and self._is_set(key):
                raise ValueError(f"{key} goes with train and dev, not with a GLUE task")
        if self.hub_config is not None and self.hub is None:
            raise ValueError("hub_config goes with hub alone")
        if self._is_set("unlabelled_weight") and self.unlabelled is None:
            raise ValueError("unlabelled_weight goes with unlabelled alone")
        if self.pad_to is not None and self.pad_to < self.max_length:
            raise ValueError(f"pad_to = {self.pad_to} is shorter than max_length = {self.max_length}")
        return self

    @model_validator(mode="after")
    def _keys_of_the_kind(self) -> Self:
        if self.task is not None and self.kind in ("multilabel", "tagging", "question_answering"):
            raise ValueError(f'kind = "{self.kind}" is for train and dev files; a GLUE task names a kind already')
        for key in ("doc_stride", "max_answer_length", "null_score_diff_threshold"):
            if self.kind != "question_answering" and self._is_set(key):
                raise ValueError(f'{key} goes with kind = "question_answering" alone')
        for key in ("hub", "text", "text_pair", "label", "unlabelled"):
            if self._is_set(key) and self.kind not in ("classification", "multilabel", "regression"):
                raise ValueError(f'{key} goes with kind = "classification", "multilabel" or "regression" alone')
        if self.doc_stride is not None and self.doc_stride >= self.max_length // 2:
            raise ValueError(f"doc_stride = {self.doc_stride} must be less than half of max_length = {self.max_length}")
        return self

    @model_validator(mode="after")
    def _labels_of_the_kind(self) -> Self:
        decisions = ("classification", "multilabel", "tagging")
        for key, kinds in (("labels", decisions), ("positive", ("classification",)), ("class_weights", decisions)):
            if self.kind not in kinds and getattr(self, key) is not None:
                raise ValueError(f'{key} does not go with kind = "{self.kind}", only with {", ".join(kinds)}')
        for key, names in (("labels", self.labels), ("label", self.label)):
            if isinstance(names, list) and len(set(names)) < len(names):
                repeated = next(name for name in names if names.count(name) > 1)
                raise ValueError(f'{key} has "{repeated}" twice')
        if isinstance(self.label, list) and self.kind != "multilabel":
            raise ValueError('label is a list of columns, which goes with kind = "multilabel" alone')
        if isinstance(self.label, list) and len(self.label) < 2:
            raise ValueError("label is a list of columns of 0 and 1: name at least two")
        if isinstance(self.label, list) and self.labels is not None and sorted(self.label) != sorted(self.labels):
            raise ValueError(f"labels: the columns of label are {', '.join(self.label)}")
        if self.task is not None and self.positive is not None:
            raise ValueError("positive is for train and dev files; GLUE says itself which label counts")
        return self

    def _is_set(self, key: str) -> bool:
        """Return whether a key has another value than its default."""
        return bool(getattr(self, key) != type(self).model_fields[key].default)

    @property
    def overlap(self) -> int:
        """`doc_stride`, or its default."""
        return self.max_length // 3 if self.doc_stride is None else self.doc_stride


class NamedOptions(ConfigTable):
    """A name and the keyword arguments that go with it."""

    model_config = ConfigDict(extra="allow")
    name: str = Field(description='name, or your own "my_package.module:Class"; the other keys are arguments of it')

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments."""
        return dict(self.model_extra or {})


class OptimConfig(ConfigTable):
    """`[optim]`: AdamW and the schedule of its learning rate."""

    lr: PositiveFloat = Field(description="peak learning rate of the student")
    objective_lr: PositiveFloat | None = Field(
        None, description="peak learning rate of the objective's own parameters; default: lr"
    )
    weight_decay: float = Field(0.01, ge=0, description="AdamW's weight decay; none on biases and norms")
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(
        [0.9, 0.999], min_length=2, max_length=2, description="AdamW's two decay rates"
    )
    eps: PositiveFloat = Field(1e-8, description="AdamW's epsilon")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="learning rate after the warm-up")


def default_label(objective: str, compressions: Iterable[str]) -> str:
    """Return the label of a run whose config has none, from the names of its objective and compressions."""
    return " + ".join([objective, *compressions])


class TrainConfig(ConfigTable):
    """A training: PretrainConfig or TaskConfig, by its data."""

    run: RunConfig
    student: StudentConfig
    teacher: TeacherConfig | None = None
    data: DataConfig
    objective: NamedOptions
    compression: list[NamedOptions] = Field(
        [], description="compressions of the student, in order: a name and the arguments that go with it"
    )
    optim: OptimConfig
    deepspeed: dict[str, Any] = Field({}, description="DeepSpeed's own config: zero_optimization, bf16, …")

    @property
    def label(self) -> str:
        """`run.label`, or its default."""
        return self.run.label or default_label(self.objective.name, [each.name for each in self.compression])

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's ZeRO stage."""
        return int(self.deepspeed.get("zero_optimization", {}).get("stage", 0))

    @model_validator(mode="before")
    @classmethod
    def _student_at_teacher_path(cls, tables: dict[str, Any]) -> dict[str, Any]:
        student, teacher = tables.get("student"), tables.get("teacher")
        if not isinstance(student, dict) or student.get("path") != TEACHER_PATH:
            return tables
        if isinstance(teacher, dict) and "path" in teacher:
            return {**tables, "student": {**student, "path": teacher["path"]}}
        if teacher is not None or not tables.keys() <= cls.model_fields.keys():
            return tables  # a key is misspelt or missing: validation reports it
        raise ValueError(f'student.path = "{TEACHER_PATH}", but the config has no teacher; set teacher.path')


class PretrainConfig(TrainConfig):
    """A pre-training on a corpus."""

    data: CorpusDataConfig

    @model_validator(mode="after")
    def _no_keys_of_tasks(self) -> Self:
        if self.teacher is not None and self.teacher.cache is not None:
            raise ValueError("teacher.cache is for tasks: a corpus is masked anew each time it is read")
        if self.teacher is not None and not self.teacher.baseline_check:
            raise ValueError("teacher.baseline_check is for tasks: a corpus has no constant answer")
        return self


class TaskConfig(TrainConfig):
    """A training on a task: distillation, or fine-tuning where it has no teacher."""

    data: TaskDataConfig


def train_schema(tables: Mapping[str, Any]) -> type[TrainConfig]:
    """Return the schema of a training: the keys of `[data]` tell a pre-training from a task."""
    data = tables.get("data")
    return PretrainConfig if isinstance(data, Mapping) and "shards" in data else TaskConfig
