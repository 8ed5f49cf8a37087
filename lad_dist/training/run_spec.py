"""Resolve a config: find its mistakes before any weight is read."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial

import torch

from lad_dist.compression.base import Compression, CompressionContext
from lad_dist.compression.layers import keep_layers, layer_numbers, random_embeddings, set_dropout
from lad_dist.compression.registry import apply_compressions, check_compressions, create_compression
from lad_dist.compression.width_pruning.narrow import Widths, check_widths, narrow_model, resized_config
from lad_dist.config.errors import UserError
from lad_dist.config.load import check_writable, find_class, own_code, validate_arguments
from lad_dist.config.schema import CorpusDataConfig, NamedOptions, TaskConfig, TaskDataConfig, TrainConfig
from lad_dist.core.batch import TEXT_HEADS, Batch, Head
from lad_dist.core.outputs import ModelDims, OutputSpec
from lad_dist.data.datasets import CorpusDataset, TaskDataset, check_shards
from lad_dist.data.shards.reader import Shards
from lad_dist.data.tasks.task import Task, load_task
from lad_dist.data.tokenization.loading import PreTrainedTokenizerFast, load_tokenizer, tokenizer_of_teacher
from lad_dist.data.tokenization.special_tokens import check_frame, role_ids, vocabulary_size
from lad_dist.distributed import processes, ranks
from lad_dist.distributed.logs import get_logger
from lad_dist.models import loading
from lad_dist.models.dims import check_length, check_padding, check_vocabulary, model_dims
from lad_dist.models.frozen import FrozenModel
from lad_dist.models.heads import label_names, label_order, replaces_head
from lad_dist.models.hf_config import PreTrainedConfig, architecture_config, load_hf_config
from lad_dist.models.loading import PreTrainedModel, check_weight_files, new_model
from lad_dist.objectives.base import Objective
from lad_dist.objectives.registry import OBJECTIVES
from lad_dist.runs.trackers import check_trackers
from lad_dist.training.best_model import check_best_metric
from lad_dist.training.deepspeed_schema import check_version, validate_deepspeed_config
from lad_dist.training.distiller import Distiller
from lad_dist.utils.text import one_line

TaskLoader = Callable[[TaskDataConfig], Task]
PRECISIONS = {"bf16": "bfloat16", "fp16": "float16"}
CALIBRATION_TOKENS, CALIBRATION_BATCHES = 16384, 256  # at most, of the data that compressions are fitted to

logger = get_logger(__name__)


@dataclass(frozen=True)
class RunSpec:
    """A resolved and checked config, with what was read to check it."""

    config: TrainConfig  # every argument of objective and compressions is written out
    head: Head
    teacher_head: Head
    task: Task | None
    tokenizer: PreTrainedTokenizerFast
    teacher_tokenizer: PreTrainedTokenizerFast  # the student's where the vocabularies are equal
    student_config: PreTrainedConfig  # of the model at student.path, or of a new one
    teacher_config: PreTrainedConfig | None
    student_dims: ModelDims
    teacher_dims: ModelDims | None
    layers: list[int] | None  # of the initial model that the student keeps
    widths: Widths | None  # of a student narrower than the initial model
    objective: Callable[[], Objective]
    compressions: list[Compression]

    @property
    def labels(self) -> tuple[str, ...]:
        """The outputs of the task's head."""
        return () if self.task is None else self.task.outputs

    @property
    def precision(self) -> str:
        """The data type that the student computes in."""
        deepspeed = self.config.deepspeed
        return next((name for key, name in PRECISIONS.items() if deepspeed.get(key, {}).get("enabled")), "float32")

    def dataset(self) -> CorpusDataset | TaskDataset:
        """Open the data."""
        if isinstance(self.config.data, CorpusDataConfig):
            return CorpusDataset(self.config.data, self.tokenizer, self.config.run.seed)
        return self._task_dataset(self.tokenizer)

    @property
    def shares_tokens(self) -> bool:
        """Whether the teacher reads the student's tokens."""
        return self.teacher_tokenizer is self.tokenizer

    def teacher_dataset(self, dataset: CorpusDataset | TaskDataset) -> CorpusDataset | TaskDataset:
        """Return what the teacher reads: `dataset`, or the same examples in the teacher's tokens."""
        return dataset if self.shares_tokens else self._task_dataset(self.teacher_tokenizer)

    def _task_dataset(self, tokenizer: PreTrainedTokenizerFast) -> TaskDataset:
        assert isinstance(self.config.data, TaskDataConfig)
        assert self.task is not None
        return TaskDataset(self.config.data, self.task, tokenizer, self.config.run.seed)

    def num_steps(self, dataset: CorpusDataset | TaskDataset) -> int:
        """Return the number of optimizer steps: run.steps, or those of run.epochs."""
        return self.config.run.steps or max(1, round((self.config.run.epochs or 0) * dataset.steps_per_epoch))

    def teacher(self, device: torch.device) -> FrozenModel | None:
        """Load the teacher."""
        if self.config.teacher is None:
            return None
        dtype = getattr(torch, self.config.teacher.dtype or self.precision)
        return FrozenModel(
            self.config.teacher.path,
            self.teacher_head,
            device=device,
            dtype=dtype,
            labels=self.labels,
            fixed_order=self.task is not None and self.task.fixed_order,
        )

    def distiller(self, dataset: CorpusDataset | TaskDataset) -> Distiller:
        """Build student and objective, with random weights by the run's seed.

        Compressions are fitted to the first batches of the dataset.
        """
        processes.seed_everything(self.config.run.seed)
        config = self.config.student
        student = self._initial_student()
        initial_values: dict[str, float] = {}
        if self.widths is not None:
            student.to(device=processes.device())  # type: ignore[call-arg]
            student, errors = narrow_model(student, calibration_batches(dataset), self.widths, config.width_basis)
            initial_values = {f"initial_error/{name}": value for name, value in errors.items()}
        if config.path is not None and config.embeddings == "random":
            student = random_embeddings(student)
        student = set_dropout(student, config.dropout, config.attention_dropout)
        if self.compressions:
            student.to(device=processes.device())  # type: ignore[call-arg]
            context = CompressionContext(partial(calibration_batches, dataset), initial_values.update)
            student = apply_compressions(student, self.compressions, context)
        return Distiller(student, self.objective(), initial_values)

    def meta_student(self) -> PreTrainedModel:
        """Return the student on the meta device: shapes without numbers.

        Raises UserError where a compression does not fit the student.
        """
        config = deepcopy(self.student_config)
        with torch.device("meta"):
            if self.widths is not None:
                config = resized_config(config, self.widths)
            student = new_model(config, self.head, self.labels)
            if self.layers is not None:
                student = keep_layers(student, self.layers)
            return apply_compressions(student, self.compressions)

    def meta_teacher(self) -> PreTrainedModel | None:
        """Return the teacher on the meta device, None without one."""
        if self.teacher_config is None:
            return None
        with torch.device("meta"):
            return new_model(deepcopy(self.teacher_config), self.teacher_head, self.labels)

    def _initial_student(self) -> PreTrainedModel:
        student = self.config.student
        if student.path is None:
            assert student.architecture is not None
            return loading.create_model(
                student.architecture,
                self.head,
                vocab_size=vocabulary_size(self.tokenizer),
                special_ids=role_ids(self.tokenizer),
                labels=self.labels,
            )
        assert self.layers is not None
        if replaces_head(self.student_config, self.head, self.labels):
            names = ", ".join(label_names(self.student_config)[:3])
            logger.warning("%s: a new head replaces the one for other labels (%s, …)", student.path, names)
        return keep_layers(loading.load_model(student.path, self.head, labels=self.labels), self.layers)


def calibration_batches(dataset: CorpusDataset | TaskDataset) -> list[Batch]:
    """Return the first batches of the training data, an epoch at most: the same on every process."""
    limit = min(CALIBRATION_BATCHES, dataset.steps_per_epoch * dataset.micro_batches_per_step)
    batches: list[Batch] = []
    while sum(batch.num_tokens for batch in batches) < CALIBRATION_TOKENS and len(batches) < limit:
        batches.append(dataset.batch(*divmod(len(batches), dataset.micro_batches_per_step)))
    return batches


def resolve_run(config: TrainConfig, world_size: int | None = None, load: TaskLoader = load_task) -> RunSpec:
    """Check the config, for `world_size` processes instead of the current ones where it is set.

    `load` reads the task that the config names.

    Raises UserError that names the place and what to do.
    """
    check_version()
    config = config.model_copy(update={"deepspeed": validate_deepspeed_config(config.deepspeed)})
    check_writable("run.dir", config.run.folder)
    if config.teacher is not None and config.teacher.cache is not None:
        check_writable("teacher.cache", config.teacher.cache)
    check_trackers(config.run.trackers)
    _check_micro_batches(config, world_size or ranks.world_size())
    config, objective_class, compressions = resolve_options(config)
    task = load(config.data) if isinstance(config.data, TaskDataConfig) else None
    check_best_metric(config, task)
    head: Head = task.kind if task is not None else "mlm" if objective_class.uses_mlm_head else "none"
    tokenizer_path, tokenizer = _load_tokenizer(config)
    check_frame(tokenizer, head)
    paths = [config.student.path, config.teacher.path if config.teacher is not None else None]
    hf_configs = {path: load_hf_config(path) for path in dict.fromkeys(paths) if path is not None}
    student_config, layers, widths = _check_student(config, hf_configs, tokenizer)
    teacher_config, teacher_head = _check_teacher(config, hf_configs, head, task)
    span = config.data.pad_to if isinstance(config.data, TaskDataConfig) else None
    vocabulary = vocabulary_size(tokenizer) if task is None else None
    dims = partial(model_dims, labels=len(task.outputs) if task else 0, span=span, vocabulary=vocabulary)
    student_dims = dims(resized_config(student_config, widths) if widths else student_config, head)
    if layers is not None:
        student_dims = student_dims._replace(num_hidden_layers=len(layers))
    teacher_dims = None if teacher_config is None else dims(teacher_config, teacher_head)
    objective_options = config.objective.options
    create_objective = partial(objective_class, student_dims, teacher_dims, **objective_options)  # type: ignore[call-arg]
    with own_code("objective", config.objective.name):
        objective = create_objective()  # refuses dimensions that do not go together
        learns_nothing = objective.student_spec == OutputSpec()
    if learns_nothing:
        raise UserError("objective: all weights are 0, so the student learns nothing; set one of them")
    _check_labels(config, objective)
    teacher_tokenizer = tokenizer
    if config.teacher is not None and teacher_config is not None:
        if config.teacher.path != tokenizer_path:
            token_level = _token_level(config, objective, head)
            teacher_tokenizer = tokenizer_of_teacher(config.teacher.path, tokenizer, token_level)
        check_vocabulary(teacher_config, config.teacher.path, vocabulary_size(teacher_tokenizer))
        if teacher_tokenizer is not tokenizer:
            check_frame(teacher_tokenizer, head)
    spec = RunSpec(
        config=config,
        head=head,
        teacher_head=teacher_head,
        task=task,
        tokenizer=tokenizer,
        teacher_tokenizer=teacher_tokenizer,
        student_config=student_config,
        teacher_config=teacher_config,
        student_dims=student_dims,
        teacher_dims=teacher_dims,
        layers=layers,
        widths=widths,
        objective=create_objective,
        compressions=compressions,
    )
    check_compressions(compressions, spec)
    if compressions:
        spec.meta_student()  # refuses those that do not fit
    check_padding(student_config, config.student.path or "student.architecture", tokenizer.pad_token_id)
    if config.teacher is not None and teacher_config is not None:
        check_padding(teacher_config, config.teacher.path, teacher_tokenizer.pad_token_id)
    return spec


def resolve_options(config: TrainConfig) -> tuple[TrainConfig, type[Objective], list[Compression]]:
    """Return the config with every argument of objective and compressions written out, and these; no file is read.

    Raises:
        UserError: A name is unknown, an argument does not fit, or the objective does not go with data or teacher.
    """
    name = config.objective.name
    kind: type[Objective] = find_class("objective.name", name, OBJECTIVES, Objective)
    with own_code("objective", name):
        options = validate_arguments("objective", kind, config.objective.options)
    data = "task" if isinstance(config, TaskConfig) else "corpus"
    if data not in kind.supported_data:
        fitting = [other for other, k in OBJECTIVES.items() if data in k.supported_data]
        raise UserError(f'objective.name "{name}" does not run on a {data}; choose from {", ".join(fitting)}')
    if kind.requires_teacher and config.teacher is None:
        raise UserError(f'objective.name "{name}" needs a teacher: set teacher.path')
    if config.teacher is not None and not kind.requires_teacher:
        raise UserError(f'objective.name "{name}" learns from no teacher: remove [teacher], or choose kd or lad')
    compressions = [create_compression(named) for named in config.compression]
    changes = {
        "objective": NamedOptions.model_validate({"name": name, **options}),
        "compression": [
            NamedOptions.model_validate({"name": named.name, **asdict(compression)})  # type: ignore[call-overload]
            for named, compression in zip(config.compression, compressions, strict=True)
        ],
    }
    return config.model_copy(update=changes), kind, compressions


def _check_micro_batches(config: TrainConfig, world_size: int) -> None:
    count = config.data.micro_batches_per_step
    if count % world_size:
        nearest = max(world_size, round(count / world_size) * world_size)
        raise UserError(
            f"data.micro_batches_per_step = {count}: cannot be shared out over {world_size} processes; {nearest} can"
        )


def _check_labels(config: TrainConfig, objective: Objective) -> None:
    """Raise UserError where the objective learns nothing from the labels that are weighed, or from texts without."""
    if not isinstance(config.data, TaskDataConfig):
        return
    if config.data.class_weights and not objective.learns_from_labels:
        raise UserError("data.class_weights: the objective does not learn from labels; set objective.hard")
    if config.data.unlabelled and objective.teacher_spec == OutputSpec():
        name = f'objective.name "{config.objective.name}"'
        raise UserError(f"data.unlabelled: {name} reads nothing of a teacher here; take kd or lad with objective.soft")


def _load_tokenizer(config: TrainConfig) -> tuple[str, PreTrainedTokenizerFast]:
    """Return the student's tokenizer and where it is from; on a corpus, check the shards against it."""
    path = config.student.tokenizer or config.student.path
    if isinstance(config.data, CorpusDataConfig):
        shards = Shards(config.data.shards)
        path = path or str(shards.tokenizer_folder)
        tokenizer = load_tokenizer(path)
        check_shards(shards, config.data, tokenizer)
        return path, tokenizer
    if path is None:
        raise UserError("student.tokenizer: a new model for a task needs a tokenizer; set it")
    return path, load_tokenizer(path)


def _check_student(
    config: TrainConfig, hf_configs: Mapping[str, PreTrainedConfig], tokenizer: PreTrainedTokenizerFast
) -> tuple[PreTrainedConfig, list[int] | None, Widths | None]:
    """Return the config of the initial model, the layers that the student keeps of it, and its widths."""
    student = config.student
    if student.path is None:
        assert student.architecture is not None
        hf_config = architecture_config(student.architecture, vocabulary_size(tokenizer), role_ids(tokenizer))
        _check_length(config, hf_config, "student.architecture")
        check_vocabulary(hf_config, "student.architecture", vocabulary_size(tokenizer))
        try:
            with torch.device("meta"):
                new_model(deepcopy(hf_config), "none")
        except Exception as error:  # of the family's own code
            raise UserError(f"student.architecture: no such model can be built ({one_line(error)})") from None
        return hf_config, None, None
    hf_config = hf_configs[student.path]
    check_weight_files(student.path)
    _check_length(config, hf_config, student.path)
    layers = layer_numbers(student.layers, student.num_hidden_layers, hf_config.num_hidden_layers)
    check_vocabulary(hf_config, student.path, vocabulary_size(tokenizer))
    if not student.is_narrowed:
        return hf_config, layers, None
    widths = check_widths(
        hf_config, student.hidden_size, student.num_attention_heads, student.intermediate_size, student.path
    )
    return hf_config, layers, widths


def _check_length(config: TrainConfig, model: PreTrainedConfig, name: str) -> None:
    pad_to = config.data.pad_to if isinstance(config.data, TaskDataConfig) else None
    check_length(model, name, max(config.data.max_length, pad_to or 0))


def _check_teacher(
    config: TrainConfig, hf_configs: Mapping[str, PreTrainedConfig], head: Head, task: Task | None
) -> tuple[PreTrainedConfig | None, Head]:
    """Return the teacher's config, None without one, and its head."""
    if config.teacher is None:
        return None, "none"
    path = config.teacher.path
    hf_config = hf_configs[path]
    check_weight_files(path)
    _check_length(config, hf_config, path)
    if task is not None:
        label_order(hf_config, path, task.kind, task.outputs, fixed_order=task.fixed_order)
    elif head == "mlm" and not loading.holds_head(path, hf_config, head):
        head = "none"
    return hf_config, head


def _token_level(config: TrainConfig, objective: Objective, head: Head) -> str | None:
    """Return what compares the two models token by token, None where only the logits of each example are compared."""
    if head in ("tagging", "question_answering"):
        return f'data.kind = "{head}"'
    is_example_level = objective.teacher_spec in (OutputSpec(), OutputSpec(logits=True))
    return None if head in TEXT_HEADS and is_example_level else config.objective.name
