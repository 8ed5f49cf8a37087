"""Costs: what a run takes in memory, arithmetic and disk, from its plan, without reading a weight.

    of(made, world)        all of it, for a plan on `world` processes -> Costs
    skeleton(made)         what trains, on the meta device: shapes without numbers
    checkpoint_bytes(…)    of one checkpoint, all processes' files together
    GPUS                   what GPUs of a name can do, from their makers' data sheets
    Gpu.hours              of the arithmetic, at a share of the peak (MFU)

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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lad_dist.compression import footprint
from lad_dist.config.schema import CorpusDataConfig
from lad_dist.core.batch import Batch
from lad_dist.data.datasets import CorpusDataset, TaskDataset
from lad_dist.data.shards.reader import SPLITS, read_manifest
from lad_dist.models.dims import count_parameters
from lad_dist.models.hf_config import load_hf_config
from lad_dist.models.loading import PreTrainedModel, new_model
from lad_dist.training import optimization, run_spec
from lad_dist.training.distiller import Distiller
from lad_dist.training.teacher_cache import cache_bytes, worth_caching

SAMPLE = 8  # micro-batches that stand for all
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class GpuSpec:
    """`flops`: dense matrix products per second in bf16, V100 in fp16; `single`: in fp32 as PyTorch runs it by default,
    without TF32; `memory`: bytes."""

    flops: float
    single: float
    memory: float

    def hours(self, flops: float, count: int, mfu: float, precision: str) -> float:
        """Of `flops` on `count` of them, at `mfu` of the peak in that precision."""
        peak = self.single if precision == "float32" else self.flops
        return flops / (count * peak * mfu) / 3600


GPUS = {
    "h200": GpuSpec(989e12, 67e12, 141e9),  # NVIDIA H200 data sheet, SXM
    "h100": GpuSpec(989e12, 67e12, 80e9),  # NVIDIA H100 data sheet, SXM
    "a100-80": GpuSpec(312e12, 19.5e12, 80e9),  # NVIDIA A100 data sheet
    "a100-40": GpuSpec(312e12, 19.5e12, 40e9),  # the same
    "l40s": GpuSpec(362e12, 91.6e12, 48e9),  # NVIDIA L40S data sheet
    "v100": GpuSpec(125e12, 15.7e12, 32e9),  # NVIDIA V100 data sheet, SXM2; it has no bf16, only fp16
    "cpu": GpuSpec(1e12, 0.1e12, 16e9),  # no data sheet: a core or two; launch/benchmark.py step measures it
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
        return sum(vars(self).values())


@dataclass(frozen=True)
class CostEstimate:
    """Of a run. FLOPs are per real token; `teacher_share` of the steps ask the teacher, where its answers are kept."""

    student: int  # weights of the export
    objective: int
    teacher: int
    memory: Memory
    steps: int
    epochs: float
    tokens: float  # of one step, real ones
    student_flops: float  # forward and backward, of what is exported: without a predecessor's blocks
    teacher_flops: float
    teacher_share: float
    checkpoint: int
    export: int
    data: int
    answers: int

    @property
    def flops(self) -> float:
        """Of the whole run."""
        return self.steps * self.tokens * (self.student_flops + self.teacher_share * self.teacher_flops)


def estimate(made: run_spec.RunSpec, world: int) -> CostEstimate:
    """What the run of this plan costs on `world` processes. Reads its data's first micro-batches."""
    method, teacher = meta_distiller(made), _teacher(made)
    feed = made.dataset()
    taught = made.teacher_dataset(feed)
    places = [divmod(number, feed.micro_batches_per_step) for number in range(SAMPLE)]
    batches = [feed.batch(*place) for place in places]
    steps = made.config.run.steps or max(1, round((made.config.run.epochs or 0) * feed.steps_per_epoch))
    tokens = sum(batch.num_tokens for batch in batches)
    answers = _answers(made, method, feed, taught, steps)
    its = 0 if teacher is None else _flops(teacher, [taught.batch(*place) for place in places])
    student = footprint.exported(method.student)
    return CostEstimate(
        student=student,
        objective=count_parameters(method.objective),
        teacher=0 if teacher is None else count_parameters(teacher),
        memory=_memory(made, method, teacher, max(batches, key=lambda batch: batch.computed_tokens), world),
        steps=steps,
        epochs=steps / feed.steps_per_epoch,
        tokens=tokens / len(batches) * feed.micro_batches_per_step,
        student_flops=3 * _flops(method.student, batches) / tokens,
        teacher_flops=its / tokens,
        teacher_share=min(1.0, feed.steps_per_epoch / steps) if answers else 1.0,
        checkpoint=checkpoint_bytes(made, method),
        export=4 * student,
        data=_corpus_bytes(made),
        answers=answers,
    )


def _flops(model: PreTrainedModel, batches: Sequence[Batch]) -> int:
    return sum(footprint.flops(model, *batches).values())


def meta_distiller(made: run_spec.RunSpec) -> Distiller:
    """What the engine will hold, on the meta device."""
    with torch.device("meta"):
        return Distiller(made.meta_student(), made.objective())


def _teacher(made: run_spec.RunSpec) -> PreTrainedModel | None:
    if made.config.teacher is None:
        return None
    with torch.device("meta"):
        return new_model(load_hf_config(made.config.teacher.path), made.teacher_head, made.labels)


def checkpoint_bytes(made: run_spec.RunSpec, method: Distiller) -> int:
    """Of one checkpoint, all processes' files together."""
    stage, size, (trained, frozen) = made.config.zero_stage, BYTES[made.precision], _weights(method)
    if stage == 3:
        return 12 * trained + size * frozen
    if stage == 0:
        return (12 if size == 4 else 14) * trained + size * frozen
    return (size + 12) * trained + size * frozen


def _weights(method: Distiller) -> tuple[int, int]:
    """How many train, and how many do not."""
    trained = sum(weight.numel() for weight in method.parameters() if weight.requires_grad)
    return trained, count_parameters(method) - trained


def _memory(made: run_spec.RunSpec, method: Distiller, teacher: nn.Module | None, batch: Batch, world: int) -> Memory:
    size, (trained, frozen) = BYTES[made.precision], _weights(method)
    stage, zero = made.config.zero_stage, made.config.deepspeed.get("zero_optimization", {})
    optimizer = 12 * trained // world if stage else (8 if size == 4 else 12) * trained
    bucket = optimization.bucket_size(zero, trained) * size if stage else 0
    return Memory(
        weights=size * (trained + frozen) // (world if stage == 3 else 1),
        gradients=size * trained // (world if stage >= 2 else 1),
        optimizer=optimizer,
        buckets=bucket * (2 if zero.get("overlap_comm") and stage < 3 else 1),
        activations=_activations(made, method.student.config, batch, size),
        teacher=_teacher_bytes(made, method, teacher, batch),
    )


def _activations(made: run_spec.RunSpec, config: Any, batch: Batch, size: int) -> int:
    """What a micro-batch's forward keeps for its backward: Korthikanti et al., 2022, section 4.1, for tokens without
    padding. Fused attention keeps no scores; with attention dropout they count, as where its products are explicit."""
    width, heads = config.hidden_size, config.num_attention_heads
    inner = getattr(config, "intermediate_size", None) or config.hidden_dim
    words = made.config.student
    kept = size * (8 * width + 2 * inner) + (0 if words.dropout == 0 else 2 * width)
    layer = batch.computed_tokens * kept
    if words.attention_dropout != 0:
        layer += int(batch.sequence_ids.numel()) * batch.span_length * heads * (2 * size + 1)
    logits = (
        len(batch.head_positions) * made.student_dims.num_outputs * (size + 2 * 4)
    )  # and the loss, which is in fp32
    return config.num_hidden_layers * layer + batch.computed_tokens * 4 * width * size + logits


def _teacher_bytes(made: run_spec.RunSpec, method: Distiller, teacher: nn.Module | None, batch: Batch) -> int:
    """Its weights, and what it says of a micro-batch."""
    if teacher is None:
        return 0
    assert made.teacher_dims is not None
    assert made.config.teacher is not None
    size, needs = BYTES[made.config.teacher.dtype or made.precision], method.objective.teacher_outputs
    states = batch.computed_tokens * made.teacher_dims.hidden_size * (len(needs.hidden) + 3 * len(needs.qkv))
    said = states + len(batch.head_positions) * made.teacher_dims.num_outputs * needs.logits
    return size * (count_parameters(teacher) + said)


def _answers(
    made: run_spec.RunSpec,
    method: Distiller,
    feed: CorpusDataset | TaskDataset,
    taught: CorpusDataset | TaskDataset,
    steps: int,
) -> int:
    """Bytes of the teacher's answers on disk, 0 where it is asked at each step."""
    words = made.config.teacher
    if words is None or not isinstance(taught, TaskDataset) or not worth_caching(words, steps, feed.steps_per_epoch):
        return 0
    assert made.teacher_dims is not None
    dtype = getattr(torch, words.dtype or made.precision)
    size = cache_bytes(method.objective.teacher_outputs, made.teacher_dims, taught.train, dtype)
    return size if size <= words.cache_gb * 1e9 else 0


def _corpus_bytes(made: run_spec.RunSpec) -> int:
    if not isinstance(made.config.data, CorpusDataConfig):
        return 0
    manifest = read_manifest(Path(made.config.data.shards))
    width = np.dtype(manifest["dtype"]).itemsize
    found = [shard for source in manifest["sources"] for split in SPLITS for shard in source["splits"][split]["shards"]]
    return sum(shard["length"] * width + shard["offsets_bytes"] for shard in found)
