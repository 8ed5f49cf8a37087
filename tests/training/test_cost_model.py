"""The costs of a run, compared with real checkpoints, tensors and PyTorch's counter, and by hand; `lad-dist plan`."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import toy
from conftest import World
from launching import ROOT, run_command
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from toy_runs import lad

from lad_dist.benchmarks.measured_speed import MeasuredSpeed
from lad_dist.cli.search_costs import Machine
from lad_dist.compression import footprint
from lad_dist.config.load import load_config
from lad_dist.config.schema import TaskConfig
from lad_dist.core.outputs import OutputSpec
from lad_dist.models import loading
from lad_dist.models.dims import count_parameters
from lad_dist.models.forward import compute_outputs
from lad_dist.objectives.registry import OBJECTIVES
from lad_dist.training import cost_model, run_spec
from lad_dist.training.train import train

WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}  # so that numbers outweigh their file


def wide(world: World, deepspeed: dict[str, Any]) -> dict[str, Any]:
    student = {"architecture": {**toy.SIZES, **WIDE}, "tokenizer": str(world.tokenizer)}
    return {"student": student, "teacher": None, "objective": {"name": "supervised"}, "deepspeed": deepspeed}


STAGES = [(stage, half) for stage in range(4) for half in (False, True) if stage or not half]


@pytest.mark.parametrize(("stage", "half"), STAGES)
def test_a_checkpoint_is_as_large_as_foreseen(world: World, tmp_path: Path, stage: int, half: bool) -> None:
    table = {"zero_optimization": {"stage": stage, "reduce_bucket_size": 10_000}, "bf16": {"enabled": half}}
    config = lad(world, tmp_path, {**wide(world, table), "run.steps": 2, "run.save_every": 1})
    foreseen = cost_model.estimate(run_spec.resolve_run(config), 1)
    result = train(config)
    (checkpoint, *_) = sorted((result.folder / "checkpoints").glob("step-*"))
    size = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
    assert size == pytest.approx(foreseen.checkpoint, rel=0.02)
    weights = result.folder / "export" / "model.safetensors"
    assert weights.stat().st_size == pytest.approx(foreseen.export, rel=0.02)


@pytest.mark.parametrize("name", sorted(name for name, kind in OBJECTIVES.items() if "task" in kind.supported_data))
def test_parameters_are_those_of_the_run(world: World, tmp_path: Path, name: str) -> None:
    changes = {} if OBJECTIVES[name].requires_teacher else {"teacher": None}
    spec = run_spec.resolve_run(lad(world, tmp_path, {"objective": {"name": name}, **changes}))
    real = spec.distiller(spec.dataset())
    costs = cost_model.estimate(spec, 1)
    assert costs.student == count_parameters(real.student)
    assert costs.objective == count_parameters(real.objective)
    assert costs.memory.optimizer == 8 * (costs.student + costs.objective)


@pytest.mark.parametrize(
    "changes",
    [
        {"compression": [{"name": "low_rank", "keep": 0.5}]},
        {"compression": [{"name": "theseus", "frozen": False}]},
        {"student.hidden_size": 16, "objective": {"name": "kd"}},
        {"student.layers": [1, 2, 4], "student.num_hidden_layers": None},
    ],
)
def test_parameters_are_those_of_the_export(world: World, tmp_path: Path, changes: dict[str, Any]) -> None:
    spec = run_spec.resolve_run(lad(world, tmp_path, changes))
    assert cost_model.estimate(spec, 1).student == count_parameters(spec.distiller(spec.dataset()).export())


@pytest.mark.parametrize("head", ["mlm", "none"])
def test_flops_are_those_that_pytorch_counts(world: World, head: str) -> None:
    model = loading.load_model(str(world.pretrained), head)  # type: ignore[arg-type]
    batch = toy.batch([16, 16, 16, 16])
    assert batch.computed_tokens == batch.num_tokens
    output_spec = OutputSpec(logits=head == "mlm", hidden=(4,))
    # The fused kernel of a CPU is not among those that it counts.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        outputs = compute_outputs(model, batch, output_spec)
        forward = counter.get_total_flops()
        (outputs.hidden[4] if outputs.logits is None else outputs.logits).sum().backward()
    assert sum(footprint.flops(model, batch).values()) == pytest.approx(forward, rel=0.02)
    assert 3 * forward == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_a_head_that_reads_all_tokens_costs_more(world: World, tmp_path: Path) -> None:
    """Of 32 tokens of a window 4 are masked."""
    costs = []
    for tokens in ("masked", "all"):
        objective = {"name": "distilbert", "soft_tokens": tokens}
        tables = toy.corpus_config(tmp_path, world.corpus, world.pretrained, world.pretrained, objective=objective)
        spec = run_spec.resolve_run(toy.parsed(tables, {}))
        costs.append(cost_model.estimate(spec, 1))
    head = 2 * (32 * 32 + 32 * spec.student_dims.num_outputs) * 28 / 32
    assert costs[1].student_flops - costs[0].student_flops == pytest.approx(3 * head, rel=0.02)
    assert costs[1].teacher_flops - costs[0].teacher_flops == pytest.approx(head, rel=0.02)


def test_zero_shares_the_optimizer_out(world: World, tmp_path: Path) -> None:
    def memory(stage: int, half: bool, processes: int) -> cost_model.Memory:
        table = {"zero_optimization": {"stage": stage, "reduce_bucket_size": 100}, "bf16": {"enabled": half}}
        return cost_model.estimate(
            run_spec.resolve_run(lad(world, tmp_path, wide(world, table)), processes), processes
        ).memory

    count = memory(0, False, 1).weights // 4
    kinds = ("weights", "gradients", "optimizer", "buckets")
    table = {
        (0, False, 4): (4, 4, 8), (1, True, 4): (2, 2, 3), (2, True, 4): (2, 0.5, 3), (3, True, 4): (0.5, 0.5, 3)
    }  # fmt: skip
    for case, expected in table.items():
        estimate = memory(*case)
        sizes = [count * factor for factor in expected] + [100 * 2 if case[0] else 0]
        assert [getattr(estimate, kind) for kind in kinds] == pytest.approx(sizes, abs=4)


def test_a_cache_saves_all_epochs_but_one(world: World, tmp_path: Path) -> None:
    def share(changes: dict[str, Any]) -> float:
        return cost_model.estimate(run_spec.resolve_run(lad(world, tmp_path, changes)), 1).teacher_share

    assert share({"run.steps": 40}) == pytest.approx(0.1)  # an epoch is 4 steps
    assert share({"run.steps": 40, "teacher.cache_gb": 0.0}) == 1
    assert share({"run.steps": 3}) == 1


GRAPHICS = {"l4": 121e12, "t4": 65e12, "a10": 125e12, "rtx-4090": 165.2e12}


def test_the_time_of_a_task_by_hand(world: World, tmp_path: Path) -> None:
    """64 examples in steps of 4 x 4 for 5 epochs: 20 steps, 4 of them with the teacher."""
    half = {"deepspeed": {"fp16": {"enabled": True}}}
    config = lad(world, tmp_path, {"run.steps": None, "run.epochs": 5.0, "data.micro_batch_size": 4, **half})
    assert config.data.micro_batches_per_step == 4
    costs = cost_model.estimate(run_spec.resolve_run(config), 1)
    assert (costs.steps, costs.epochs, costs.teacher_share) == (20, 5.0, 0.2)
    flops = 20 * costs.tokens * (costs.student_flops + 0.2 * costs.teacher_flops)
    for name, peak in GRAPHICS.items():
        run = Machine(name, 2, mfu=1e-6).estimate(config)
        assert run.seconds == pytest.approx(flops / (peak * 1e-6 * 2))
        assert run.gpu_hours == pytest.approx(2 * run.seconds / 3600)
        assert run.speed == f"{peak / 1e12:.3g}MFLOP/s in float16, an MFU of 1e-06, as set"


def test_a_task_that_is_not_here_has_examples_of_the_greatest_length(
    world: World, config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SST-2's 67,349 examples of 16 tokens, 32 of them in a step, on the hub alone."""
    monkeypatch.setattr("lad_dist.data.tasks.task.SAMPLE_WORD", toy.WORDS[0])
    teacher = shutil.copytree(world.teacher, config.parent / "teacher")
    names = (teacher / "config.json").read_text().replace('"no"', '"negative"').replace('"yes"', '"positive"')
    (teacher / "config.json").write_text(names)
    places = [f"teacher.path={teacher}", f"student.path={world.pretrained}", "student.num_hidden_layers=2"]
    changes = ["data.task=sst2", "data.max_length=16", "run.epochs=2.0", "deepspeed.bf16.enabled=false", *places]
    _, costs = cost_model.estimate_run(load_config(TaskConfig, config, changes), 1)
    assert (costs.steps, costs.tokens) == (round(2 * 67_349 / 32), 32 * 16)
    assert costs.epochs == pytest.approx(2.0, abs=1e-3)
    assert costs.teacher_cache % 67_349 == 0
    assert costs.teacher_cache > 67_349
    assert costs.teacher_share == pytest.approx(0.5, abs=1e-3)
    assert run_command("plan", str(config), "--gpu", "l4", *changes) == 0
    assert "67,349 training examples, counted as 16 tokens each: the data set is not here" in capsys.readouterr().out


def test_a_step_is_no_faster_than_the_memory_of_the_optimizer(world: World, tmp_path: Path) -> None:
    """In fp32: weights and two moments are read and written, gradients read: (2 * 3 + 1) * 4 bytes a weight."""
    config = lad(world, tmp_path, {"run.steps": 10, "objective": {"name": "kd"}})
    count = cost_model.estimate(run_spec.resolve_run(config), 1).student
    run = Machine("t4", 1, mfu=1.0).estimate(config)
    assert run.seconds == pytest.approx(10 * count * 28 / 320e9)


def test_the_speed_of_this_machine(
    world: World, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    speed = MeasuredSpeed(
        device="cpu",
        precision="float32",
        processes=2,
        flops_per_second=3e9,
        peak_flops_per_second=1e11,
        tokens_per_second=1e3,
        memory=8_000_000_000,
        command="lad-dist benchmark step x.toml",
    )
    speed.write(tmp_path / "runs" / "benchmark.json")
    command = ["plan", str(config), *overrides(world)]
    assert run_command(*command, "deepspeed.bf16.enabled=false") == 0
    output = capsys.readouterr().out
    assert "lad on 1 x cpu" in output
    assert "1.5GFLOP/s in float32, as measured by lad-dist benchmark step" in output
    assert " of 8 GB: " in output
    assert run_command(*command) == 2
    assert "the measured speed is of float32, the run computes in bfloat16" in capsys.readouterr().err
    (tmp_path / "runs" / "benchmark.json").write_text('{"device": "cpu"}')
    assert run_command(*command) == 2
    assert "runs/benchmark.json: damaged (precision: " in capsys.readouterr().err


def overrides(world: World) -> list[str]:
    """Return the overrides that make configs/task/lad.toml a toy."""
    files = [f"data.{key}={path}" for key, path in world.files.items()]
    places = [f"teacher.path={world.teacher}", f"student.path={world.pretrained}", "student.num_hidden_layers=2"]
    return [*files, *places, "data.max_length=32"]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "config.toml"
    file.write_text((ROOT / "configs/task/lad.toml").read_text().replace('task = "rte"\n', ""))
    return file


def test_the_command_prints_what_a_run_costs(world: World, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machines = ["--gpus", "4", "--nodes", "2", "--gpu", "h200", "--mfu", "0.2"]
    assert run_command("plan", str(config), *machines, *overrides(world)) == 0
    output = capsys.readouterr().out
    assert "4 micro-batches of 8 examples = 2 nodes x 2 GPUs x 1" in output
    assert "198TFLOP/s in bfloat16, an MFU of 0.2, as set" in output
    for row in ("data", "parameters", "FLOPs per token", "teacher", "memory per GPU", "disk", "time"):
        assert row in output
    assert not (config.parent / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "3", "--gpu", "h200"], "data.micro_batches_per_step = 4: cannot be shared out over 3 processes"),
        (["--gpus", "4", "--gpu", "h2000"], '--gpu "h2000" is unknown: did you mean "h200"?'),
        (["--gpus", "4", "--nodes", "3", "--gpu", "h200"], "cannot be spread evenly over 3 nodes"),
        (["--gpus", "4", "--gpu", "h200", "--mfu", "30"], "--mfu 30: a share of the peak"),
        (["--gpus", "four", "--gpu", "h200"], "plan: argument --gpus: invalid int value"),
        (["--gpus", "4", "--gpu", "h200", "objective.hiden=1"], "hiden"),
        (["--gpu", "a100-40", "deepspeed.zero_optimization.reduce_bucket_size=20_000_000_000"], "do not fit"),
        (["--gpu", "t4"], "--gpu t4: has no bf16; add deepspeed.bf16.enabled=false deepspeed.fp16.enabled=true"),
        (["--gpu", "rtx4090"], 'did you mean "rtx-4090"? Known are h200, h100, a100-80, a100-40, l40s, l4, a10, rtx-'),
        ([], "plan: name the GPU by --gpu (l4, cpu-avx2, …), or measure this machine: lad-dist benchmark step"),
        (["--measured", "absent.json"], "absent.json: no such file; `lad-dist benchmark step CONFIG` writes it"),
        (["--measured", "x.json", "--gpu", "l4"], "--measured: is the speed of this machine; leave --gpu out"),
        (["--mfu", "0.5"], "--mfu: goes with --gpu"),
    ],
)  # fmt: skip
def test_a_wrong_plan_is_refused_in_one_line(
    world: World, config: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run_command("plan", str(config), *overrides(world), *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
