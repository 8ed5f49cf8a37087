"""Estimate what a run takes in memory, arithmetic and disk, from the RunSpec, without reading a weight.

P weights that train, W processes, b bytes of a weight (4 in fp32, 2 in bf16 and fp16), ZeRO stage z; weights that do
not train are b bytes each, on each process and in a checkpoint:

    on each process      z = 0 in fp32     z = 0 in fp16     z = 1               z = 2                z = 3
    weights              4 P               2 P               b P                 b P                  b P / W
    gradients            4 P               2 P               b P                 b P / W              b P / W
    optimizer            8 P               12 P              12 P / W            12 P / W             12 P / W
    a checkpoint         12 P              14 P              (b + 12) P          (b + 12) P           12 P

AdamW's two moments are 8 P, the fp32 copy that DeepSpeed keeps from stage 1 on (in fp32 too) and in fp16 is 4 P
(Rajbhandari et al., 2020, section 3.1). From stage 1 on a bucket of gradients under way comes on top.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lad_dist.compression import footprint
from lad_dist.config.schema import CorpusDataConfig, RunConfig, TaskDataConfig, TrainConfig
from lad_dist.core.batch import Batch
from lad_dist.data.datasets import CorpusDataset, TaskDataset
from lad_dist.data.sources.hub import Unavailable
from lad_dist.data.tasks.glue import GLUE
from lad_dist.data.tasks.task import longest_examples
from lad_dist.models import families
from lad_dist.models.dims import count_parameters
from lad_dist.models.loading import PreTrainedModel
from lad_dist.training import optimization, run_spec
from lad_dist.training.distiller import Distiller
from lad_dist.training.teacher_cache import count_values, decide_cache
from lad_dist.utils.atomic_io import list_files

SAMPLE_MICRO_BATCHES = 8  # micro-batches that represent all
BYTES_PER_WEIGHT = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class DeviceSpec:
    """Speed and memory of a GPU or a CPU."""

    half_flops: float  # dense FLOP/s in bf16, or in fp16 where it has no bf16
    fp32_flops: float  # in fp32 as PyTorch runs it by default, without TF32
    memory: float  # bytes
    bandwidth: float  # bytes/s of the memory
    has_bf16: bool = True

    def peak(self, precision: str) -> float:
        """Return the peak FLOP/s in that precision."""
        return self.fp32_flops if precision == "float32" else self.half_flops


DEVICES = {  # by name, from the makers' data sheets
    "h200": DeviceSpec(989e12, 67e12, 141e9, 4.8e12),  # NVIDIA H200, SXM
    "h100": DeviceSpec(989e12, 67e12, 80e9, 3.35e12),  # NVIDIA H100, SXM
    "a100-80": DeviceSpec(312e12, 19.5e12, 80e9, 2.039e12),  # NVIDIA A100, SXM
    "a100-40": DeviceSpec(312e12, 19.5e12, 40e9, 1.555e12),  # the same
    "l40s": DeviceSpec(362e12, 91.6e12, 48e9, 864e9),  # NVIDIA L40S
    "l4": DeviceSpec(121e12, 30.3e12, 24e9, 300e9),  # NVIDIA L4; the sheet's 242 TFLOP/s are with sparsity
    "a10": DeviceSpec(125e12, 31.2e12, 24e9, 600e9),  # NVIDIA A10
    "rtx-4090": DeviceSpec(165.2e12, 82.6e12, 24e9, 1.008e12),  # NVIDIA Ada white paper, sums in fp32
    "t4": DeviceSpec(65e12, 8.1e12, 16e9, 320e9, has_bf16=False),  # NVIDIA T4
    "v100": DeviceSpec(125e12, 15.7e12, 32e9, 900e9, has_bf16=False),  # NVIDIA V100, SXM2
    # No data sheet: 8 cores at 3 GHz, times the FLOPs of a cycle; two memory channels, DDR4-3200 or DDR5-4800. With
    # AVX2 bf16 is multiplied number by number, with AVX-512 as fp32.
    "cpu-avx2": DeviceSpec(8 * 3e9 * 32 / 40, 8 * 3e9 * 32, 32e9, 51.2e9),
    "cpu-avx512": DeviceSpec(8 * 3e9 * 64, 8 * 3e9 * 64, 32e9, 51.2e9),
    "cpu-amx": DeviceSpec(8 * 3e9 * 1024, 8 * 3e9 * 64, 32e9, 76.8e9),
}


@dataclass(frozen=True)
class Memory:
    """Bytes on one process. `activations` is an estimate."""

    weights: int
    gradients: int
    optimizer: int
    buckets: int
    activations: int
    teacher: int

    @property
    def total(self) -> int:
        """Bytes on one process."""
        return sum(vars(self).values())

    @property
    def step_traffic(self) -> int:
        """Bytes that AdamW moves: it reads and writes weights, moments and fp32 copies, and reads gradients."""
        return 2 * (self.weights + self.optimizer) + self.gradients


@dataclass(frozen=True)
class CostEstimate:
    """The costs of a run. Sizes are in bytes, FLOPs are per token without padding."""

    student: int  # parameters of the export
    objective: int  # parameters
    teacher: int  # parameters
    memory: Memory
    steps: int
    epochs: float
    tokens: float  # of one step, without padding
    student_flops: float  # forward and backward, of what is exported: without the predecessor's blocks
    teacher_flops: float
    teacher_share: float  # fraction of the steps that run the teacher: a cache saves the others
    checkpoint: int
    export: int
    data: int
    teacher_cache: int
    dataset: str  # what there is to train on

    @property
    def flops(self) -> float:
        """FLOPs of the whole run."""
        return self.steps * self.tokens * (self.student_flops + self.teacher_share * self.teacher_flops)


def estimate_run(config: TrainConfig, world_size: int) -> tuple[run_spec.RunSpec, CostEstimate]:
    """Return the checked config, and what a run costs on `world_size` processes.

    A GLUE task that is neither here nor on a hub in reach counts with examples of max_length tokens.
    """
    try:
        spec = run_spec.resolve_run(config, world_size)
        return spec, estimate(spec, world_size)
    except Unavailable:
        data = config.data
        if not isinstance(data, TaskDataConfig) or data.task is None or data.unlabelled is not None:
            raise
        count = SAMPLE_MICRO_BATCHES * data.micro_batch_size
        spec = run_spec.resolve_run(config, world_size, partial(longest_examples, count=count))
        return spec, estimate(spec, world_size, GLUE[data.task].num_examples)


def estimate(spec: run_spec.RunSpec, world_size: int, num_examples: int | None = None) -> CostEstimate:
    """Return what a run costs on `world_size` processes; read the first micro-batches of the data.

    With `num_examples` the data is a sample of as many.
    """
    distiller, teacher = meta_distiller(spec), spec.meta_teacher()
    dataset = spec.dataset()
    teacher_dataset = spec.teacher_dataset(dataset)
    scale = 1.0
    if num_examples is not None:
        assert isinstance(dataset, TaskDataset)
        scale = num_examples / dataset.train.count
        for each in {id(each): each for each in (dataset, teacher_dataset)}.values():
            assert isinstance(each, TaskDataset)
            each.steps_per_epoch *= scale
            each.steps_per_pass *= scale
    indices = [divmod(number, dataset.micro_batches_per_step) for number in range(SAMPLE_MICRO_BATCHES)]
    all_tokens = distiller.objective.student_spec.all_tokens
    batches = [_head_reads(dataset.batch(*index), all_tokens) for index in indices]
    teacher_batches = [_head_reads(teacher_dataset.batch(*index), all_tokens) for index in indices]
    steps = spec.num_steps(dataset)
    tokens = sum(batch.num_tokens for batch in batches)
    use_cache, cache_size = decide_cache(spec, distiller.objective.teacher_spec, teacher_dataset, scale)
    teacher_share = 1.0
    if use_cache and isinstance(dataset, TaskDataset):
        teacher_share = min(1.0, dataset.steps_per_pass / steps)
    teacher_flops = 0 if teacher is None else _flops(teacher, teacher_batches)
    largest = max(batches, key=lambda batch: batch.computed_tokens)
    student = footprint.exported_weights(distiller.student)
    return CostEstimate(
        student=student,
        objective=count_parameters(distiller.objective),
        teacher=0 if teacher is None else count_parameters(teacher),
        memory=_memory(spec, distiller, teacher, largest, world_size),
        steps=steps,
        epochs=steps / dataset.steps_per_epoch,
        tokens=tokens / len(batches) * dataset.micro_batches_per_step,
        student_flops=3 * _flops(distiller.student, batches) / tokens,
        teacher_flops=teacher_flops / tokens,
        teacher_share=teacher_share,
        checkpoint=checkpoint_bytes(spec, distiller),
        export=4 * student,
        data=_corpus_bytes(spec),
        teacher_cache=cache_size if use_cache else 0,
        dataset=_describe(spec, dataset, num_examples),
    )


def _describe(spec: run_spec.RunSpec, dataset: CorpusDataset | TaskDataset, num_examples: int | None) -> str:
    """Return what there is to train on; of a task also how long its examples are."""
    if isinstance(dataset, CorpusDataset):
        return dataset.description
    if num_examples is not None:
        length = spec.config.data.max_length
        return f"{num_examples:,} training examples, counted as {length} tokens each: the data set is not here"
    mean = dataset.train.tokens / dataset.train.count
    return f"{dataset.description}; {mean:.3g} tokens of an example in the mean"


def _head_reads(batch: Batch, all_tokens: bool) -> Batch:
    """Return the batch, its head positions all tokens where the head reads them."""
    return batch._replace(head_positions=torch.arange(batch.num_tokens)) if all_tokens else batch


def _flops(model: PreTrainedModel, batches: Sequence[Batch]) -> int:
    return sum(footprint.flops(model, *batches).values())


def meta_distiller(spec: run_spec.RunSpec) -> Distiller:
    """Return what the engine will hold, on the meta device."""
    with torch.device("meta"):
        return Distiller(spec.meta_student(), spec.objective())


def num_checkpoints(config: RunConfig) -> int:
    """Return how many checkpoints stay: the newest and the best so far; every `keep_every`-th does not count."""
    return config.keep + (config.best_metric is not None)


def checkpoint_bytes(spec: run_spec.RunSpec, distiller: Distiller) -> int:
    """Return the size of one checkpoint, all processes' files together."""
    stage, (trained, frozen) = spec.config.zero_stage, _count_weights(distiller)
    size = BYTES_PER_WEIGHT[spec.precision]
    if stage == 3:
        return 12 * trained + size * frozen
    if stage == 0:
        return (12 if size == 4 else 14) * trained + size * frozen
    return (size + 12) * trained + size * frozen


def _count_weights(distiller: Distiller) -> tuple[int, int]:
    """Return how many weights train, and how many do not."""
    trained = sum(weight.numel() for weight in distiller.parameters() if weight.requires_grad)
    return trained, count_parameters(distiller) - trained


def _memory(
    spec: run_spec.RunSpec, distiller: Distiller, teacher: nn.Module | None, batch: Batch, world_size: int
) -> Memory:
    size, (trained, frozen) = BYTES_PER_WEIGHT[spec.precision], _count_weights(distiller)
    stage, zero = spec.config.zero_stage, spec.config.deepspeed.get("zero_optimization", {})
    optimizer = 12 * trained // world_size if stage else (8 if size == 4 else 12) * trained
    bucket = optimization.bucket_size(zero, trained) * size if stage else 0
    return Memory(
        weights=size * (trained + frozen) // (world_size if stage == 3 else 1),
        gradients=size * trained // (world_size if stage >= 2 else 1),
        optimizer=optimizer,
        buckets=bucket * (2 if zero.get("overlap_comm") and stage < 3 else 1),
        activations=_activations(spec, distiller.student.config, batch, size),
        teacher=_teacher_bytes(spec, distiller, teacher, batch),
    )


def _activations(spec: run_spec.RunSpec, config: Any, batch: Batch, size: int) -> int:
    """Return the bytes that a micro-batch's forward stores for the backward, for tokens without padding.

    By Korthikanti et al., 2022, section 4.1. Fused attention stores no scores. With attention dropout they count, as
    with explicit matrix products.
    """
    hidden_size, heads = config.hidden_size, config.num_attention_heads
    student = spec.config.student
    token_bytes = size * (8 * hidden_size + 2 * families.intermediate_size(config))
    token_bytes += 0 if student.dropout == 0 else 2 * hidden_size
    layer = batch.computed_tokens * token_bytes
    if student.attention_dropout != 0:
        layer += int(batch.sequence_ids.numel()) * batch.span_length * heads * (2 * size + 1)
    # The loss is in fp32.
    logits = len(batch.head_positions) * spec.student_dims.num_outputs * (size + 2 * 4)
    return config.num_hidden_layers * layer + batch.computed_tokens * 4 * hidden_size * size + logits


def _teacher_bytes(spec: run_spec.RunSpec, distiller: Distiller, teacher: nn.Module | None, batch: Batch) -> int:
    """Return the bytes of the teacher's weights and of the outputs for a micro-batch."""
    if teacher is None:
        return 0
    assert spec.teacher_dims is not None
    assert spec.config.teacher is not None
    size = BYTES_PER_WEIGHT[spec.config.teacher.dtype or spec.precision]
    output_spec, head_rows = distiller.objective.teacher_spec, len(batch.head_positions)
    outputs = count_values(output_spec, spec.teacher_dims, batch.computed_tokens, head_rows)
    return size * (count_parameters(teacher) + outputs)


def _corpus_bytes(spec: run_spec.RunSpec) -> int:
    if not isinstance(spec.config.data, CorpusDataConfig):
        return 0
    return sum(file.stat().st_size for file in list_files(Path(spec.config.data.shards)))
