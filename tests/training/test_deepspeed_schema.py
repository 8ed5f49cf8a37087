"""[deepspeed] is read by DeepSpeed's own models: a wrong key or value ends in one line."""

from typing import Any

import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from launching import ROOT

from lad_dist.config.errors import UserError
from lad_dist.config.load import read_toml
from lad_dist.training.deepspeed_schema import deepspeed_schema, validate_deepspeed_config

ZERO = "deepspeed.zero_optimization"


class RecordingDict(dict[str, Any]):
    """A dict that knows which of its keys were asked for."""

    def __init__(self, **values: Any) -> None:
        super().__init__(values)
        self.asked: set[object] = set()

    def __contains__(self, key: object) -> bool:
        self.asked.add(key)
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return self  # DeepSpeed looks for a key in keys()


def test_deepspeed_reads_these_keys() -> None:
    table = RecordingDict(train_micro_batch_size_per_gpu=1)
    DeepSpeedConfig(table)
    assert deepspeed_schema().model_fields.keys() <= table.asked


def test_shipped_configs_are_accepted() -> None:
    tables = [read_toml(file).get("deepspeed", {}) for file in (ROOT / "configs").rglob("*.toml")]
    assert any(tables)
    for table in tables:
        validate_deepspeed_config(table)


def test_every_table_is_accepted() -> None:
    validate_deepspeed_config(
        {
            "zero_optimization": {
                "stage": 3,
                "stage3_prefetch_bucket_size": 10,
                "offload_param": {"device": "cpu"},
                "leaf_module": {"classes": ["torch.nn.Linear"]},
            },
            "bf16": {"enabled": True, "check_grad_overflow": True},
            "csv_monitor": {"enabled": True},
            "aio": {"block_size": 1},
            "timers": {"throughput": {"enabled": False}},
            "gradient_clipping": 1,
            "steps_per_print": 10,
            "communication_data_type": "fp32",
            "prescale_gradients": True,
        }
    )


def test_values_are_of_the_types_that_deepspeed_reads() -> None:
    zero = {"stage": 1.0, "reduce_bucket_size": 5e8, "stage3_prefetch_bucket_size": 10.0, "overlap_comm": False}
    typed = validate_deepspeed_config({"zero_optimization": zero, "gradient_clipping": 1, "steps_per_print": 10})
    assert repr(typed) == (
        "{'zero_optimization': {'stage': 1, 'reduce_bucket_size': 500000000, 'stage3_prefetch_bucket_size': 10, "
        "'overlap_comm': False}, 'gradient_clipping': 1.0, 'steps_per_print': 10}"
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"optimiser": {}}, 'deepspeed.optimiser: no such table; did you mean "optimizer"?'),
        ({"bfloat16": {"enabled": True}}, 'deepspeed.bfloat16: no such table; did you mean "bf16"?'),
        ({"gradient_cliping": 1.0}, 'deepspeed.gradient_cliping: no such key; did you mean "gradient_clipping"?'),
        ({"gradient_clipping": "auto"}, 'deepspeed.gradient_clipping: "auto" is for what fills it in'),
        (
            {"zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"}},
            f'{ZERO}.reduce_bucket_size: "auto" is for',
        ),
        ({"strict": True}, "deepspeed.strict: no such key"),
        ({"log_level": "x"}, "deepspeed.log_level: lad_dist sets this; remove the key"),
        (
            {"data_types": {"grad_accum_dtype": "fp7"}},
            "deepspeed.data_types.grad_accum_dtype: input should be 'fp32', 'fp16' or 'bf16', not 'fp7'",
        ),
        ({"bf16": {"enabled": "false"}}, "deepspeed.bf16.enabled: must be true or false, not 'false'"),
        (
            {"zero_optimization": {"stage": 1, "overlap_comm": "False"}},
            f"{ZERO}.overlap_comm: must be true or false, not",
        ),
        (
            {"zero_optimization": {"reduce_bucket_size": "500"}},
            f"{ZERO}.reduce_bucket_size: must be a number, not '500'",
        ),
        ({"fp16": {"loss_scale": "1"}}, "deepspeed.fp16.loss_scale: must be a number, not '1'"),
        ({"flops_profiler": {"enabled": "no"}}, "deepspeed.flops_profiler.enabled: input should be a valid boolean"),
        ({"flops_profiler": {"enable": True}}, 'deepspeed.flops_profiler.enable: no such key; did you mean "enabled"?'),
        ({"data_types": {"grad_accum_dtyp": "fp32"}}, "deepspeed.data_types.grad_accum_dtyp: no such key; did you"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "deepspeed.data_types.grad_accum_dtype: without ZeRO it is"),
        (
            {"data_types": {"param_dtype": "bf16"}},
            'deepspeed.data_types.param_dtype: bf16 and fp16 set this, to "fp32"',
        ),
        ({"comet": {"enabled": True}}, "deepspeed.comet: comet_ml is not installed; pip install comet_ml, or remove"),
        ({"gradient_clipping": True}, "deepspeed.gradient_clipping: input should be a valid number, not True"),
        ({"prescale_gradients": "no"}, "deepspeed.prescale_gradients: input should be a valid boolean, not 'no'"),
        ({"wandb": {"enable": True}}, 'deepspeed.wandb.enable: no such key; did you mean "enabled"?'),
        (
            {"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}},
            f'{ZERO}.offload_optimizer.devise: no such key; did you mean "device"?',
        ),
        (
            {"zero_optimization": {"stage3_prefetch_buckets_size": 1}},
            f'{ZERO}.stage3_prefetch_buckets_size: no such key; did you mean "stage3_prefetch_bucket_size"?',
        ),
        ({"zero_optimization": True}, f"{ZERO}: input should be a valid dictionary"),
        ({"zero_optimization": {"stage": "auto"}}, f"{ZERO}.stage: must be 0, 1, 2 or 3, not 'auto'"),
        ({"zero_optimization": {"reduce_bucket_size": -1}}, f"{ZERO}.reduce_bucket_size: input should be greater"),
        ({"zero_optimization": {"stage": 1, "compute_grad_norm": False}}, f"{ZERO}.compute_grad_norm: remove the key"),
        ({"bf16": {"check_grad_overflow": False}}, "deepspeed.bf16.check_grad_overflow: remove the key"),
        (
            {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}, "fp16": {"enabled": True}},
            "deepspeed: bfloat16 and fp16 modes cannot be simultaneously enabled",
        ),
        ({"communication_data_type": "fp23"}, "deepspeed: Invalid communication_data_type"),
        ({"timers": {"throughput": {"enable": True}}}, "deepspeed: 1 validation error for DeepSpeedThroughputTimer"),
    ],
)
def test_a_mistake_ends_in_one_line(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        validate_deepspeed_config(config)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
