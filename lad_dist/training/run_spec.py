"""Plan: a config whose mistakes are found before any weight is read.

make(config)   checks names, arguments, sizes, labels and vocabularies; raises UserError in one line
Plan           what was learnt by checking, and the method built from it
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from lad_dist.compression import width_pruning
from lad_dist.compression.layers import keep_layers, layer_numbers, random_embeddings, set_dropout
from lad_dist.compression.registry import COMPRESSION_CHECKS, COMPRESSIONS, apply_compressions
from lad_dist.config.errors import UserError
from lad_dist.config.load import check_writable, lookup, validate_arguments
from lad_dist.config.schema import CorpusDataConfig, NamedOptions, TaskConfig, TaskDataConfig, TrainConfig
from lad_dist.core.batch import Batch, Head
from lad_dist.core.outputs import ModelDims, OutputSpec
from lad_dist.data.datasets import CorpusDataset, TaskDataset, open_shards
from lad_dist.data.shards.reader import Shards
from lad_dist.data.tasks.task import Task, check_task, load_task
from lad_dist.data.tokenization.loading import PreTrainedTokenizerFast, load_tokenizer, tokenizer_of_teacher
from lad_dist.data.tokenization.special_tokens import role_ids
from lad_dist.distributed import processes
from lad_dist.models import loading
from lad_dist.models.dims import check_length, check_vocabulary, model_dims
from lad_dist.models.frozen import FrozenModel
from lad_dist.models.heads import has_mlm_head, label_order
from lad_dist.models.hf_config import PreTrainedConfig, architecture_config, load_hf_config
from lad_dist.models.loading import PreTrainedModel, check_weight_files, new_model
from lad_dist.objectives import OBJECTIVES
from lad_dist.objectives.base import Objective
from lad_dist.training import deepspeed_schema
from lad_dist.training.distiller import Distiller

PRECISIONS = {"bf16": "bfloat16", "fp16": "float16"}
CALIBRATION_TOKENS, CALIBRATION_BATCHES = 16384, 256  # that a narrower student is fitted to


@dataclass(frozen=True)
class RunSpec:
    config: TrainConfig
    head: Head
    teacher_head: Head
    task: Task | None
    tokenizer: PreTrainedTokenizerFast
    teacher_tokenizer: PreTrainedTokenizerFast  # the same, where the vocabularies are
    student_dims: ModelDims
    teacher_dims: ModelDims | None
    layers: list[int] | None  # of the model that the student starts from
    widths: width_pruning.Widths | None  # where it is to be smaller than that model
    objective: Callable[[], Objective]
    compressions: Sequence["partial[PreTrainedModel]"]

    @property
    def labels(self) -> tuple[str, ...]:
        return () if self.task is None else self.task.outputs

    @property
    def precision(self) -> str:
        """What the student computes in."""
        table = self.config.deepspeed
        return next((name for key, name in PRECISIONS.items() if table.get(key, {}).get("enabled")), "float32")

    def dataset(self) -> CorpusDataset | TaskDataset:
        """The data, opened."""
        if isinstance(self.config.data, CorpusDataConfig):
            return CorpusDataset(self.config.data, self.tokenizer, self.config.run.seed)
        return self._task_dataset(self.tokenizer)

    def teacher_dataset(self, feed: CorpusDataset | TaskDataset) -> CorpusDataset | TaskDataset:
        """What the teacher reads: `feed`, or the same examples in its own tokens."""
        return feed if self.teacher_tokenizer is self.tokenizer else self._task_dataset(self.teacher_tokenizer)

    def _task_dataset(self, tokenizer: PreTrainedTokenizerFast) -> TaskDataset:
        assert isinstance(self.config.data, TaskDataConfig)
        assert self.task is not None
        return TaskDataset(self.config.data, self.task, tokenizer, self.config.run.seed)

    def teacher(self, device: torch.device) -> FrozenModel | None:
        if self.config.teacher is None:
            return None
        dtype = getattr(torch, self.config.teacher.dtype or self.precision)
        return FrozenModel(self.config.teacher.path, self.teacher_head, device=device, dtype=dtype, labels=self.labels)

    def distiller(self, feed: CorpusDataset | TaskDataset) -> Distiller:
        """Student and objective, weights drawn from the run's seed; what of them is fitted to data is fitted to the
        first batches of the feed."""
        processes.seed_everything(self.config.run.seed)
        words = self.config.student
        student = self._initial_student()
        found: dict[str, float] = {}
        if self.widths is not None:
            student.to(device=processes.device())  # type: ignore[call-arg]
            student, lost = width_pruning.narrow_model(
                student, calibration_batches(feed), self.widths, words.width_basis
            )
            found = {f"initial_error/{name}": value for name, value in lost.items()}
        if words.path is not None and words.embeddings == "random":
            student = random_embeddings(student)
        student = set_dropout(student, words.dropout, words.attention_dropout)
        if self.compressions:
            student.to(device=processes.device())  # type: ignore[call-arg]
            student = apply_compressions(student, self.compressions, partial(calibration_batches, feed), found.update)
        return Distiller(student, self.objective(), found)

    def meta_student(self) -> PreTrainedModel:
        """The student on the meta device: shapes without numbers. Raises UserError where a surgery does not fit it."""
        words = self.config.student
        with torch.device("meta"):
            if words.path is None:
                assert words.architecture is not None
                origin = architecture_config(words.architecture, len(self.tokenizer), role_ids(self.tokenizer))
            else:
                origin = load_hf_config(words.path)
            if self.widths is not None:
                origin = width_pruning.resized_config(origin, self.widths)
            student = new_model(origin, self.head, self.labels)
            if self.layers is not None:
                student = keep_layers(student, self.layers)
            return apply_compressions(student, self.compressions)

    def _initial_student(self) -> PreTrainedModel:
        words = self.config.student
        if words.path is None:
            assert words.architecture is not None
            special = role_ids(self.tokenizer)
            return loading.create_model(
                words.architecture, self.head, vocabulary=len(self.tokenizer), special=special, labels=self.labels
            )
        model = loading.load_model(words.path, self.head, labels=self.labels)
        assert self.layers is not None
        return keep_layers(model, self.layers)


def calibration_batches(feed: CorpusDataset | TaskDataset) -> list[Batch]:
    """The first batches of the training data: the same on every process."""
    batches: list[Batch] = []
    while sum(batch.num_tokens for batch in batches) < CALIBRATION_TOKENS and len(batches) < CALIBRATION_BATCHES:
        batches.append(feed.batch(*divmod(len(batches), feed.micro_batches_per_step)))
    return batches


def resolve_options(config: TrainConfig) -> TrainConfig:
    """The config with every argument of its objective and surgeries written out."""
    _, options = _objective(config)
    objective = NamedOptions.model_validate({"name": config.objective.name, **options})
    surgeries = [
        NamedOptions.model_validate({"name": named.name, **_compression(named).keywords})
        for named in config.compression
    ]
    return config.model_copy(update={"objective": objective, "compression": surgeries})


def resolve_run(config: TrainConfig, world: int | None = None) -> RunSpec:
    """Checks the config, for `world` processes where they are not those that are here. Raises UserError naming the
    place and what to do."""
    deepspeed_schema.check_keys(config.deepspeed)
    check_writable("run.dir", config.run.folder)
    if config.teacher is not None and config.teacher.cache is not None:
        check_writable("teacher.cache", config.teacher.cache)
    _check_micro_batches(config, world or processes.world_size())
    kind, options = _objective(config)
    surgeries = [_compression(named) for named in config.compression]
    if isinstance(config.data, TaskDataConfig):
        check_task(config.data)
    task = load_task(config.data) if isinstance(config.data, TaskDataConfig) else None
    corpus = Shards(config.data.shards) if isinstance(config.data, CorpusDataConfig) else None
    head: Head = task.kind if task is not None else "none" if kind.trains_no_head else "mlm"
    tokenizer = load_tokenizer(_tokenizer_path(config, corpus))
    if isinstance(config.data, CorpusDataConfig):
        open_shards(config.data, tokenizer)
    student, layers, thin = _student_dims(config, head, task, tokenizer)
    teacher_head, teacher = _teacher_dims(config, head, task)
    build: Callable[[], Objective] = partial(kind, student, teacher, **options)  # type: ignore[call-arg]
    objective = build()  # refuses shapes that do not go together
    if objective.student_outputs == OutputSpec():
        raise UserError("objective: all its weights are 0, so there is nothing to learn")
    its = _teacher_tokenizer(config, objective, head, tokenizer)
    if config.teacher is not None:
        check_vocabulary(load_hf_config(config.teacher.path), config.teacher.path, len(its))
    made = RunSpec(config, head, teacher_head, task, tokenizer, its, student, teacher, layers, thin, build, surgeries)
    for named, operate in zip(config.compression, surgeries, strict=True):
        if named.name in COMPRESSION_CHECKS:
            COMPRESSION_CHECKS[named.name](config, head, made.labels, **operate.keywords)
    if surgeries:
        made.meta_student()  # refuses those that do not fit
    return made


def _check_micro_batches(config: TrainConfig, world: int) -> None:
    count = config.data.micro_batches_per_step
    if count % world:
        nearest = max(world, round(count / world) * world)
        raise UserError(
            f"data.micro_batches_per_step = {count}: cannot be shared out over {world} processes; {nearest} can"
        )


def _objective(config: TrainConfig) -> tuple[type[Objective], dict[str, Any]]:
    name = config.objective.name
    kind: type[Objective] = lookup("objective.name", name, OBJECTIVES)
    options = validate_arguments("objective", kind, config.objective.options)
    where = "task" if isinstance(config, TaskConfig) else "corpus"
    if where not in kind.supported_data:
        fitting = [other for other, k in OBJECTIVES.items() if where in k.supported_data]
        raise UserError(f'objective.name "{name}" does not run on a {where}; choose from {", ".join(fitting)}')
    if kind.requires_teacher and config.teacher is None:
        raise UserError(f'objective.name "{name}" needs a teacher: set teacher.path')
    if config.teacher is not None and not kind.requires_teacher:
        raise UserError(f'objective.name "{name}" learns from no teacher: take [teacher] away, or choose kd or lad')
    return kind, options


def _compression(named: NamedOptions) -> "partial[PreTrainedModel]":
    function: Callable[..., PreTrainedModel] = lookup("surgery.name", named.name, COMPRESSIONS)
    return partial(function, **validate_arguments(f"surgery {named.name}", function, named.options))


def _tokenizer_path(config: TrainConfig, corpus: Shards | None) -> str:
    words = config.student
    return words.tokenizer or words.path or _corpus_tokenizer(corpus)


def _corpus_tokenizer(corpus: Shards | None) -> str:
    if corpus is None:
        raise UserError("student.tokenizer: a new model for a task needs one")
    return str(corpus.tokenizer_folder)


def _student_dims(
    config: TrainConfig, head: Head, task: Task | None, tokenizer: PreTrainedTokenizerFast
) -> tuple[ModelDims, list[int] | None, width_pruning.Widths | None]:
    words = config.student
    span = config.data.pad_to if isinstance(config.data, TaskDataConfig) else None
    size = partial(model_dims, head=head, labels=len(task.outputs) if task else 0, span=span)
    if words.path is None:
        assert words.architecture is not None
        origin = architecture_config(words.architecture, len(tokenizer), role_ids(tokenizer))
        _check_length(config, origin, "student.architecture")
        return size(origin), None, None
    origin = load_hf_config(words.path)
    check_weight_files(words.path)
    _check_length(config, origin, words.path)
    numbers = layer_numbers(words.layers, words.num_hidden_layers, origin.num_hidden_layers)
    if origin.vocab_size < len(tokenizer):
        raise UserError(
            f"student.tokenizer: has {len(tokenizer)} tokens, the model at {words.path} only {origin.vocab_size}"
        )
    thin = None
    if words.is_narrowed:
        thin = width_pruning.check_widths(
            origin, words.hidden_size, words.num_attention_heads, words.intermediate_size, words.path
        )
        origin = width_pruning.resized_config(origin, thin)
    return size(origin)._replace(num_hidden_layers=len(numbers)), numbers, thin


def _check_length(config: TrainConfig, model: PreTrainedConfig, name: str) -> None:
    pad_to = config.data.pad_to if isinstance(config.data, TaskDataConfig) else None
    check_length(model, name, max(config.data.max_length, pad_to or 0))


def _teacher_tokenizer(
    config: TrainConfig, objective: Objective, head: Head, tokenizer: PreTrainedTokenizerFast
) -> PreTrainedTokenizerFast:
    """The student's, or its own where no more is asked of it than one answer to each example."""
    if config.teacher is None:
        return tokenizer
    compared: str | None = config.objective.name
    if head in ("tagging", "question_answering"):
        compared = f'data.kind = "{head}"'
    elif head in ("classification", "regression") and objective.teacher_outputs in (
        OutputSpec(),
        OutputSpec(logits=True),
    ):
        compared = None
    return tokenizer_of_teacher(config.teacher.path, tokenizer, compared)


def _teacher_dims(config: TrainConfig, head: Head, task: Task | None) -> tuple[Head, ModelDims | None]:
    if config.teacher is None:
        return "none", None
    path = config.teacher.path
    model = load_hf_config(path)
    check_weight_files(path)
    _check_length(config, model, path)
    if task is not None:
        label_order(path, task.kind, task.outputs)
    elif head == "mlm" and not has_mlm_head(model):
        head = "none"
    span = config.data.pad_to if isinstance(config.data, TaskDataConfig) else None
    return head, model_dims(model, head, labels=len(task.outputs) if task else 0, span=span)
