"""Check a config's [deepspeed] with DeepSpeed's own models.

DeepSpeed silently ignores a misspelt key of its top level, for which it has no model. Other mistakes it reports only
after the weights have been read. Keys inside tables for which it has no model either (PLAIN_KEYS) are not checked.
"""

from functools import cache
from importlib import metadata
from typing import Any

from pydantic import BaseModel, Field, ValidationError, create_model

from lad_dist.config.errors import UserError
from lad_dist.config.load import first_mistake
from lad_dist.utils.suggest import did_you_mean
from lad_dist.utils.tables import flatten
from lad_dist.utils.text import one_line

CHECKED_SERIES = "0.19"
MANAGED_KEYS = {  # keys that other keys of the config set
    "train_batch_size": "data.micro_batches_per_step and data.micro_batch_tokens or micro_batch_size",
    "train_micro_batch_size_per_gpu": "data.micro_batch_tokens or micro_batch_size",
    "gradient_accumulation_steps": "data.micro_batches_per_step",
    "optimizer": "[optim]",
    "scheduler": "optim.schedule",
    "torch_autocast": "deepspeed.bf16 or fp16",
    "log_level": "lad_dist",
}
PLAIN_KEYS = {  # keys for which DeepSpeed has no model; a test compares them with what DeepSpeed reads
    bool: "disable_allgather dump_state memory_breakdown prescale_gradients wall_clock_breakdown "
    "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer",
    dict: "activation_checkpointing aio checkpoint data_types flops_profiler timers",
    float: "gradient_clipping gradient_predivide_factor",
    int: "steps_per_print",
    str: "communication_data_type gradient_allreduce_op",
}


def check_version(version: str = metadata.version("deepspeed")) -> None:
    """Raise UserError for a version of DeepSpeed with which the patches were not checked.

    The patches (deepspeed_patches.py) replace private names. Where another version does not read them, results would
    silently depend on the number of processes: so this is no warning.
    """
    if not version.startswith(f"{CHECKED_SERIES}."):
        raise UserError(f'deepspeed {version}: lad_dist works with {CHECKED_SERIES}; pip install "deepspeed~=0.19.0"')


def check_deepspeed_config(config: dict[str, Any]) -> None:
    """Raise UserError for the first mistake; an empty config costs no import of deepspeed.

    Args:
        config: The tables of [deepspeed], in DeepSpeed's own words.
    """
    if not config:
        return
    for key in config.keys() & MANAGED_KEYS.keys():
        raise UserError(f"deepspeed.{key}: {MANAGED_KEYS[key]} sets this; remove the key")
    zero = config.get("zero_optimization")
    stage = zero.get("stage", 0) if isinstance(zero, dict) else 0
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise UserError(f"deepspeed.zero_optimization.stage: must be 0, 1, 2 or 3, not {stage!r}")
    for name in ("bf16", "fp16"):
        enabled = config[name].get("enabled", False) if isinstance(config.get(name), dict) else False
        if not isinstance(enabled, bool):  # DeepSpeed reads texts too
            raise UserError(f"deepspeed.{name}.enabled: must be true or false, not {enabled!r}")
    if auto := [key for key, value in flatten(config).items() if value == "auto"]:
        raise UserError(f'deepspeed.{auto[0]}: "auto" is for what fills it in, and nothing does here; give the value')
    schema = deepspeed_schema()
    if "strict" in config:  # an argument of DeepSpeed's models, which would take it
        raise UserError(f"deepspeed.strict: no such key; {did_you_mean('strict', schema.model_fields)}")
    try:
        parsed: Any = schema(**config | {"strict": True})  # else the top level ignores a value of "auto"
    except ValidationError as error:
        raise UserError(f"deepspeed.{first_mistake(error, schema)}") from None
    _check_support(parsed)
    from deepspeed.runtime.config import DeepSpeedConfig  # noqa: PLC0415

    try:
        DeepSpeedConfig({**config, "train_micro_batch_size_per_gpu": 1})
    except Exception as error:  # it raises each kind
        raise UserError(f"deepspeed: {one_line(error)}") from None


def _check_support(parsed: Any) -> None:
    """Raise UserError for what DeepSpeed allows and lad_dist cannot train with."""
    if parsed.bf16.enabled and parsed.zero_optimization.stage == 0:
        raise UserError(
            "deepspeed.bf16: needs deepspeed.zero_optimization.stage = 1 or more, whose weights keep an fp32 copy"
        )
    offload = parsed.zero_optimization.offload_optimizer
    if offload is not None and offload.device == "nvme":
        raise UserError(
            'deepspeed.zero_optimization.offload_optimizer.device: no checkpoint holds what is on "nvme"; use "cpu"'
        )
    dtype = parsed.data_types.get("grad_accum_dtype")
    if dtype not in (None, "fp32", "fp16", "bf16"):
        raise UserError(f'deepspeed.data_types.grad_accum_dtype: must be "fp32", "fp16" or "bf16", not {dtype!r}')
    for name, key in (("bf16", "check_grad_overflow"), ("zero_optimization", "compute_grad_norm")):
        if not getattr(getattr(parsed, name), key):
            raise UserError(
                f"deepspeed.{name}.{key}: remove the key: without it, gradients that are not finite are used"
            )


@cache
def deepspeed_schema() -> type[BaseModel]:
    """Return a model of [deepspeed], with DeepSpeed's models of the tables inside."""
    from deepspeed.comm.config import CommsLoggerConfig  # noqa: PLC0415
    from deepspeed.compile.config import CompileConfig  # noqa: PLC0415
    from deepspeed.monitor.config import DeepSpeedMonitorConfig  # noqa: PLC0415
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config  # noqa: PLC0415
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig  # noqa: PLC0415

    models = {
        "zero_optimization": DeepSpeedZeroConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        "comms_logger": CommsLoggerConfig,
        "compile": CompileConfig,
    }
    fields: dict[str, Any] = {key: (model, Field(default_factory=model)) for key, model in models.items()}
    for kind, keys in PLAIN_KEYS.items():
        fields |= {key: (kind, Field(default_factory=kind, strict=True)) for key in keys.split()}
    fields |= dict.fromkeys(MANAGED_KEYS, (Any, None))
    return create_model("deepspeed", __base__=DeepSpeedMonitorConfig, **fields)
