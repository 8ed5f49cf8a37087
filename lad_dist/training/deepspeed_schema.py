"""Read a config's [deepspeed] with DeepSpeed's own models.

DeepSpeed silently ignores a misspelt key of its top level, for which it has no model. Other mistakes it reports only
after the weights have been read. It reads "False" as false where it has a model, and as true where it has none: here
only true and false are either. Keys inside the tables of PLAIN_KEYS are not checked.
"""

from collections.abc import Mapping
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError, create_model

from lad_dist.config.errors import UserError
from lad_dist.config.load import first_mistake
from lad_dist.config.schema import ConfigTable
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
    "checkpoint": "[run]",
}
PLAIN_KEYS = {  # keys for which DeepSpeed has no model; a test compares them with what DeepSpeed reads
    bool: "disable_allgather dump_state memory_breakdown prescale_gradients wall_clock_breakdown "
    "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer",
    dict: "timers",
    float: "gradient_clipping gradient_predivide_factor",
    int: "steps_per_print",
    str: "communication_data_type gradient_allreduce_op",
}

Dtype = Literal["fp32", "fp16", "bf16"]
MONITORS = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}  # tables, and what they import


class DataTypes(ConfigTable):
    """The table `data_types`, for which DeepSpeed has no model."""

    grad_accum_dtype: Dtype | None = None
    param_dtype: Dtype | None = None
    buffer_dtype: Dtype | None = None
    keep_in_fp32_modules: list[str] | None = None


def check_version(version: str = metadata.version("deepspeed")) -> None:
    """Raise UserError for a version of DeepSpeed with which the patches were not checked.

    The patches (deepspeed_patches.py) replace private names. Where another version does not read them, results would
    silently depend on the number of processes: so this is no warning.
    """
    if not version.startswith(f"{CHECKED_SERIES}."):
        raise UserError(f'deepspeed {version}: lad_dist works with {CHECKED_SERIES}; pip install "deepspeed~=0.19.0"')


def validate_deepspeed_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the tables of [deepspeed] with each value in the type that DeepSpeed reads it in.

    An empty config costs no import of deepspeed.

    Args:
        config: The tables of [deepspeed], in DeepSpeed's own words.

    Raises:
        UserError: The first mistake.
    """
    if not config:
        return {}
    for key in config.keys() & MANAGED_KEYS.keys():
        raise UserError(f"deepspeed.{key}: {MANAGED_KEYS[key]} sets this; remove the key")
    zero = config.get("zero_optimization")
    stage = zero.get("stage", 0) if isinstance(zero, dict) else 0
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise UserError(f"deepspeed.zero_optimization.stage: must be 0, 1, 2 or 3, not {stage!r}")
    if auto := [key for key, value in flatten(config).items() if value == "auto"]:
        raise UserError(f'deepspeed.{auto[0]}: "auto" is for what fills it in, and nothing does here; give the value')
    schema = deepspeed_schema()
    if "strict" in config:  # an argument of DeepSpeed's models, which would take it
        raise UserError(f"deepspeed.strict: no such key; {did_you_mean('strict', schema.model_fields)}")
    try:
        parsed: Any = schema(**config | {"strict": True})  # else the top level ignores a value of "auto"
    except ValidationError as error:
        raise UserError(f"deepspeed.{first_mistake(error, schema)}") from None
    typed = _typed_values("deepspeed", config, parsed)
    _check_support(parsed)
    from deepspeed.runtime.config import DeepSpeedConfig  # noqa: PLC0415

    try:
        DeepSpeedConfig({**typed, "train_micro_batch_size_per_gpu": 1})
    except Exception as error:  # it raises each kind
        raise UserError(f"deepspeed: {one_line(error)}") from None
    return typed


def _typed_values(place: str, table: Mapping[str, Any], parsed: BaseModel) -> dict[str, Any]:
    """Return the keys of a table with the values of DeepSpeed's model of it.

    Raise UserError for a text in place of a number or of true and false. The model reads "False" as one of the two, a
    reader that knows no types as the other.
    """
    field_names = {field.alias: name for name, field in type(parsed).model_fields.items()}
    values = {}
    for key, value in table.items():
        typed = getattr(parsed, field_names.get(key, key), value)  # a deprecated key has given its value to another
        if isinstance(typed, BaseModel):
            values[key] = _typed_values(f"{place}.{key}", value, typed)
        elif (kind := _kind(typed)) != _kind(value):
            raise UserError(f"{place}.{key}: must be {kind}, not {value!r}")
        else:
            values[key] = typed if kind else value
    return values


def _kind(value: Any) -> str | None:
    """Return what a user calls values of this type, None for texts and collections."""
    if isinstance(value, bool):
        return "true or false"
    return "a number" if isinstance(value, int | float) else None


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
    precision = "bf16" if parsed.bf16.enabled else "fp16" if parsed.fp16.enabled else "fp32"
    if parsed.data_types.param_dtype not in (None, precision):
        raise UserError(f'deepspeed.data_types.param_dtype: bf16 and fp16 set this, to "{precision}"; remove the key')
    if parsed.zero_optimization.stage == 0 and parsed.data_types.grad_accum_dtype not in (None, precision):
        raise UserError(f'deepspeed.data_types.grad_accum_dtype: without ZeRO it is "{precision}"; remove the key')
    for name, package in MONITORS.items():
        if getattr(parsed, name).enabled and find_spec(package) is None:
            raise UserError(f"deepspeed.{name}: {package} is not installed; pip install {package}, or remove the table")
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
    from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig  # noqa: PLC0415
    from deepspeed.runtime.activation_checkpointing.config import (  # noqa: PLC0415
        DeepSpeedActivationCheckpointingConfig,
    )
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config  # noqa: PLC0415
    from deepspeed.runtime.swap_tensor.aio_config import get_aio_config  # noqa: PLC0415
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig  # noqa: PLC0415

    models = {
        "zero_optimization": DeepSpeedZeroConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        "comms_logger": CommsLoggerConfig,
        "compile": CompileConfig,
        "data_types": DataTypes,
        "activation_checkpointing": _model_of_defaults(vars(DeepSpeedActivationCheckpointingConfig({}))),
        "aio": _model_of_defaults(get_aio_config({})),
        "flops_profiler": _model_of_defaults(vars(DeepSpeedFlopsProfilerConfig({}))),
    }
    fields: dict[str, Any] = {key: (model, Field(default_factory=model)) for key, model in models.items()}
    for kind, keys in PLAIN_KEYS.items():
        fields |= {key: (kind, Field(default_factory=kind, strict=True)) for key in keys.split()}
    fields |= dict.fromkeys(MANAGED_KEYS, (Any, None))
    return create_model("deepspeed", __base__=DeepSpeedMonitorConfig, **fields)


def _model_of_defaults(defaults: Mapping[str, Any]) -> type[ConfigTable]:
    """Return a model of a table for which DeepSpeed has defaults alone: they say which keys and types it reads."""
    fields = {key: (Any if value is None else type(value), value) for key, value in defaults.items()}
    return create_model("defaults", __base__=ConfigTable, **fields)  # type: ignore[call-overload]
