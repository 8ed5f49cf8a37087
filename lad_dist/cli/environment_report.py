"""What a bug report has to say about a machine: versions, devices, kernels, backend, Ray."""

import os
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from lad_dist.distributed.slurm import slurm_variable

PACKAGES = (
    "lad_dist", "torch", "transformers", "deepspeed", "ray", "datasets", "tokenizers", "sentencepiece", "numpy",
    "onnxruntime",
)  # fmt: skip
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # instructions that matrix products use
VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "OMP_NUM_THREADS", "RAY_ADDRESS", "RANK", "WORLD_SIZE", "HF_HUB_OFFLINE",
)  # fmt: skip


def environment_rows() -> list[tuple[str, str]]:
    """Return (name, value) for each fact."""
    return [
        ("python", f"{platform.python_version()} ({sys.executable})"),
        ("system", f"{platform.system()} {platform.release()}, {platform.machine()}"),
        *((name, _version(name)) for name in PACKAGES),
        *_cpu_rows(),
        *_device_rows(),
        ("SLURM job", slurm_variable("JOB_ID") or "none"),
        ("variables", " ".join(f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ) or "none set"),
    ]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpu_rows() -> Iterator[tuple[str, str]]:
    information = Path("/proc/cpuinfo")
    instructions = set(information.read_text().split()) if information.exists() else set()
    useful = " ".join(name for name in CPU_FLAGS if name in instructions)
    yield "CPU", f"{len(os.sched_getaffinity(0))} cores for this process; instructions: {useful or 'none of note'}"
    yield "memory", f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 1e9:.1f} GB"


def _device_rows() -> Iterator[tuple[str, str]]:
    import torch

    from lad_dist.distributed import processes
    from lad_dist.models.kernel import has_kernel

    device = processes.device()
    count = torch.cuda.device_count()
    for index in range(count):
        gpu = torch.cuda.get_device_properties(index)
        yield f"GPU {index}", f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB, compute capability {gpu.major}.{gpu.minor}"
    if not count:
        yield "GPU", "none that torch can use"
    yield "CUDA of torch", torch.version.cuda or "none: a build for CPUs"
    yield "training on", f"{processes.device_name()}, processes meet by {'nccl' if device.type == 'cuda' else 'gloo'}"
    kernel = (
        "variable-length kernel"
        if has_kernel(device, torch.bfloat16)
        else "scaled_dot_product_attention, padded inside"
    )
    yield "attention in bf16", kernel
    yield "threads", str(torch.get_num_threads())
