"""The sbatch scripts on a real SLURM of two nodes.

What they launch is replaced by small scripts: every test submits from a folder with the repository's slurm/ and a
launch/ of its own. The last ones train the toy world with the real scripts.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import toy
from conftest import World
from launching import ROOT, curves
from slurm_cluster import SlurmCluster

from lad_dist.config.corpus_schema import PrepareConfig
from lad_dist.config.load import apply_overrides, parse_config
from lad_dist.data.shards.prepare import prepare
from lad_dist.models import loading
from lad_dist.models.frozen import model_digest

pytestmark = pytest.mark.slurm

TRAINING = ("pretrain", "finetune", "task")
SCRIPTS = {
    "prepare": "prepare_corpus",
    "pretrain": "pretrain_distill",
    "finetune": "finetune_teacher",
    "task": "task_distill",
    "evaluate": "evaluate",
    "tune": "tune",
}

# Each task writes down what it was given.
RECORD = """
import json, os, sys
rank = os.environ["SLURM_PROCID"]
seen = {"arguments": sys.argv[1:], **os.environ}
with open(f"seen-{rank}.json", "w") as file:
    json.dump(seen, file)
"""

# Its second life is the one that finds the checkpoint of the first.
STOPPABLE = """
import os, pathlib, signal, sys, time
rank = int(os.environ["SLURM_PROCID"])
checkpoint = pathlib.Path(f"checkpoint-{rank}")
if checkpoint.exists():
    print(f"rank {rank} resumes", flush=True)
    sys.exit(0)
asked = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, _: asked.append(number))
print(f"rank {rank} trains", flush=True)
while not asked:
    time.sleep(0.1)
checkpoint.touch()
if rank == 1:  # as an interpreter that takes long to shut down
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(1.5)
sys.exit(75)
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    with SlurmCluster() as running:
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A repository's root as the scripts see it, where every launch script ends well."""
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
    (tmp_path / "launch").mkdir()
    (tmp_path / "run.toml").touch()
    for name in SCRIPTS.values():
        launch(tmp_path, name, "print('done')")
    return tmp_path


def launch(folder: Path, name: str, script: str) -> None:
    (folder / "launch" / f"{name}.py").write_text(script)


def training(cluster: SlurmCluster, folder: Path, *words: str) -> str:
    """Submit a job to two nodes; return it when both ranks train."""
    job = cluster.submit(["--nodes=2", *words], folder)
    for rank in (0, 1):
        cluster.wait_for_output(job, f"rank {rank} trains", 30)
    return job


def seen(folder: Path, rank: int) -> dict[str, str]:
    loaded: dict[str, str] = json.loads((folder / f"seen-{rank}.json").read_text())
    return loaded


AWKWARD = [
    "run.name=two words",
    """data.train='it''s "quoted".tsv'""",
    "run.name=$(touch harmed)`touch harmed`$HOME",
    "a.b=[1, 2]; touch harmed & # |*",
    "run.dir=\\back\\\\slashes",
    "two\nlines",
    "",
]


@pytest.mark.parametrize("script", ["prepare", "evaluate", *TRAINING])
def test_every_argument_arrives_as_it_was_written(cluster: SlurmCluster, folder: Path, script: str) -> None:
    launch(folder, SCRIPTS[script], RECORD)
    ended = cluster.run_job([f"slurm/{script}.sbatch", "run.toml", *AWKWARD], 60, folder)
    assert (ended.state, ended.code) == ("COMPLETED", 0), ended.output
    added = ["num_workers=4"] if script == "prepare" else []
    assert seen(folder, 0)["arguments"] == ["run.toml", *added, *AWKWARD]
    assert not (folder / "harmed").exists()


@pytest.mark.parametrize("script", TRAINING)
def test_processes_know_where_to_meet_and_how_many_threads_to_take(
    cluster: SlurmCluster, folder: Path, script: str
) -> None:
    launch(folder, SCRIPTS[script], RECORD)
    options = ["--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=2"]
    ended = cluster.run_job([*options, f"slurm/{script}.sbatch", "run.toml"], 60, folder)
    assert ended.code == 0, ended.output
    ranks = [seen(folder, rank) for rank in range(4)]
    assert [rank["SLURMD_NODENAME"] for rank in ranks] == ["n1", "n1", "n2", "n2"]
    assert {rank["SLURM_STEP_NUM_TASKS"] for rank in ranks} == {"4"}
    assert {(rank["OMP_NUM_THREADS"], rank["SLURM_CPUS_PER_TASK"]) for rank in ranks} == {("2", "2")}
    assert {rank["MASTER_ADDR"] for rank in ranks} == {"127.0.0.1"}
    (port,) = {rank["MASTER_PORT"] for rank in ranks}
    assert 1024 < int(port) < 32768


def test_a_stopped_job_is_requeued_and_resumes(cluster: SlurmCluster, folder: Path) -> None:
    launch(folder, "task_distill", STOPPABLE)
    job = training(cluster, folder, "slurm/task.sbatch", "run.toml")
    cluster.run(["scancel", "--batch", "--signal=USR1", job])
    ended = cluster.wait(job, 60)
    assert (ended.state, ended.code) == ("COMPLETED", 0), ended.output
    for rank in (0, 1):
        assert f"rank {rank} resumes" in ended.output
    assert cluster.shown(job)["Restarts"] == "1"


def test_ranks_that_stop_by_themselves_are_requeued_too(cluster: SlurmCluster, folder: Path) -> None:
    launch(folder, "pretrain_distill", STOPPABLE)
    job = training(cluster, folder, "slurm/pretrain.sbatch", "run.toml")
    cluster.run(["scancel", "--signal=USR1", job])
    ended = cluster.wait(job, 60)
    assert (ended.state, ended.code, cluster.shown(job)["Restarts"]) == ("COMPLETED", 0, "1"), ended.output


def test_a_cancelled_job_stays_cancelled(cluster: SlurmCluster, folder: Path) -> None:
    launch(folder, "task_distill", STOPPABLE)
    job = training(cluster, folder, "slurm/task.sbatch", "run.toml")
    cluster.cancel(job)
    ended = cluster.wait(job, 60)
    cluster.wait_for_quiet(30)
    assert (ended.state, cluster.shown(job)["Restarts"]) == ("CANCELLED", "0"), ended.output


URGENT = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=4", "--output=/dev/null", "--wrap=sleep 1"]


@pytest.mark.parametrize(
    ("partition", "reason"), [("warned", "goes back to the queue"), ("sudden", "DUE TO PREEMPTION")]
)
def test_a_preempted_job_saves_and_resumes(cluster: SlurmCluster, folder: Path, partition: str, reason: str) -> None:
    launch(folder, "task_distill", STOPPABLE)
    job = training(cluster, folder, f"--partition={partition}", "slurm/task.sbatch", "run.toml")
    urgent = cluster.submit(URGENT, folder)
    assert cluster.wait(urgent, 60).state == "COMPLETED"
    for rank in (0, 1):
        assert (folder / f"checkpoint-{rank}").exists()
    ended = cluster.wait(job, 60)
    assert (ended.state, ended.code, cluster.shown(job)["Restarts"]) == ("COMPLETED", 0, "1"), ended.output
    assert reason in ended.output
    for rank in (0, 1):
        assert f"rank {rank} resumes" in ended.output


# Killed in its first life, after a while; done in its second.
MORTAL = """
import os, signal, sys, time
if os.environ.get("SLURM_RESTART_COUNT"):
    print("lives again", flush=True)
    sys.exit(0)
if os.environ["SLURM_PROCID"] == "1":
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(100)
"""


def test_a_process_that_is_killed_ends_the_others_and_the_job_runs_again(cluster: SlurmCluster, folder: Path) -> None:
    launch(folder, "task_distill", MORTAL)
    ended = cluster.run_job(["--nodes=2", "slurm/task.sbatch", "run.toml"], 60, folder)
    assert (ended.state, ended.code) == ("COMPLETED", 0), ended.output
    assert "task 1: Exited with exit code 137" in ended.output
    assert "training goes on from its last checkpoint: it goes back to the queue" in ended.output
    assert ended.output.count("lives again") == 2


def test_a_job_whose_node_is_lost_runs_again(cluster: SlurmCluster, folder: Path) -> None:
    launch(folder, "task_distill", MORTAL.replace('== "1"', '== "-1"'))
    job = cluster.submit(["--nodes=2", "slurm/task.sbatch", "run.toml"], folder)
    cluster.wait_for_step(job, 30)
    cluster.lose("n2")
    ended = cluster.wait(job, 60)
    assert (ended.state, ended.code, cluster.shown(job)["Restarts"]) == ("COMPLETED", 0, "1"), ended.output


@pytest.mark.parametrize("code", [2, 3, 93])
def test_what_no_other_life_would_mend_is_not_run_again(cluster: SlurmCluster, folder: Path, code: int) -> None:
    launch(folder, "finetune_teacher", f"raise SystemExit({code})")
    ended = cluster.run_job(["--nodes=2", "slurm/finetune.sbatch", "run.toml"], 60, folder)
    assert (ended.state, ended.code) == ("FAILED", code), ended.output
    assert f"ended with exit code {code}" in ended.output


# The task that has the array's own id stops early once, while the other one is there.
STOPPED_ONCE = """
import os, pathlib, sys, time
stopped, resumed = pathlib.Path("stopped"), pathlib.Path("resumed")
if os.environ["SLURM_JOB_ID"] == os.environ["SLURM_ARRAY_JOB_ID"]:
    if not stopped.exists():
        stopped.touch()
        sys.exit(75)
    resumed.touch()
for _ in range(600):
    if resumed.exists():
        sys.exit(0)
    time.sleep(0.1)
sys.exit("the other task did not go back to the queue")
"""


def test_a_task_of_an_array_goes_back_to_the_queue_alone(cluster: SlurmCluster, folder: Path) -> None:
    launch(folder, "task_distill", STOPPED_ONCE)
    axes = ["--each=run.seed=0,1", "run.name=a-{run.seed}"]
    job = cluster.submit(["--array=0-1", "slurm/task.sbatch", "run.toml", *axes], folder)
    last, other = f"{job}_1", f"{job}_0"
    for task in (last, other):
        ended = cluster.wait(task, 60)
        assert (ended.state, ended.code) == ("COMPLETED", 0), ended.output
    assert cluster.shown(last)["JobId"] == job
    assert [cluster.shown(task)["Restarts"] for task in (last, other)] == ["1", "0"]


def test_an_array_is_a_run_for_each_task_and_seed(cluster: SlurmCluster, folder: Path) -> None:
    launch(folder, "task_distill", "import sys; open('order', 'a').write(f'{sys.argv[1:]}\\n')")
    axes = ["--each=data.task=rte,cola", "--each=run.seed=0,1", "run.name=kd-{data.task}-{run.seed}"]
    ended = cluster.run_job(["--array=0-3", "--cpus-per-task=2", "slurm/task.sbatch", "run.toml", *axes], 60, folder)
    cluster.wait_for_quiet(60)
    assert (ended.state, ended.code) == ("COMPLETED", 0), ended.output
    combinations = [(task, seed) for task in ("rte", "cola") for seed in (0, 1)]
    whole = [f"['run.toml', 'data.task={t}', 'run.seed={s}', 'run.name=kd-{t}-{s}']" for t, s in combinations]
    assert sorted((folder / "order").read_text().splitlines()) == sorted(whole)


def test_the_virtual_environment_of_the_folder_is_activated(cluster: SlurmCluster, folder: Path) -> None:
    launch(folder, "task_distill", "import os\nprint('environment', os.environ['FOUND'])")
    for name in (".venv", "other place"):
        (folder / name / "bin").mkdir(parents=True)
        (folder / name / "bin" / "activate").write_text(f"export FOUND='{name}'")
    job = ["slurm/task.sbatch", "run.toml"]
    assert "environment .venv\n" in cluster.run_job(job, 60, folder).output
    assert "environment other place\n" in cluster.run_job(job, 60, folder, {"LAD_DIST_ENV": "other place"}).output


def pipeline(
    cluster: SlurmCluster, folder: Path, *words: str, extra: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Submits a chain; the jobs by stage."""
    output = cluster.run(["bash", "slurm/pipeline.sh", *words], folder, extra)
    return dict(line.split() for line in output.splitlines())


WHOLE_CHAIN = [
    "prepare", "run.toml", "pretrain", "run.toml", "a.b=x y", "finetune", "run.toml", "task", "run.toml", "c=1",
    "evaluate", "run.toml",
]  # fmt: skip


def test_a_chain_runs_in_order_with_the_overrides_of_each_stage(cluster: SlurmCluster, folder: Path) -> None:
    for name in SCRIPTS.values():
        line = f"'{name}' + repr(sys.argv[1:]) + '\\n'"
        launch(folder, name, f"import sys, time; time.sleep(.3); open('order', 'a').write({line})")
    jobs = pipeline(cluster, folder, "--cpus-per-task=1", *WHOLE_CHAIN)
    assert list(jobs) == ["prepare", "pretrain", "finetune", "task", "evaluate"]
    for job in jobs.values():
        assert cluster.wait(job, 60).state == "COMPLETED"
        assert cluster.shown(job)["NumCPUs"] == "1"
    order = (folder / "order").read_text().splitlines()
    steps = [
        "prepare_corpus['run.toml', 'num_workers=1']",
        "pretrain_distill['run.toml', 'a.b=x y']",
        "task_distill['run.toml', 'c=1']",
        "evaluate['run.toml']",
    ]
    assert [line for line in order if not line.startswith("finetune")] == steps
    assert order.index("finetune_teacher['run.toml']") < order.index(steps[2])


def test_a_failing_stage_cancels_what_waits_for_it_and_nothing_else(cluster: SlurmCluster, folder: Path) -> None:
    launch(folder, "prepare_corpus", "raise SystemExit(1)")
    jobs = pipeline(cluster, folder, *WHOLE_CHAIN)
    states = {stage: cluster.wait(job, 60).state for stage, job in jobs.items()}
    cancelled = dict.fromkeys(("pretrain", "task", "evaluate"), "CANCELLED")
    assert states == {"prepare": "FAILED", "finetune": "COMPLETED", **cancelled}


def test_a_requeued_stage_keeps_the_next_one_waiting(cluster: SlurmCluster, folder: Path) -> None:
    launch(folder, "pretrain_distill", STOPPABLE)
    launch(folder, "task_distill", "import os; print('checkpoint', os.path.exists('checkpoint-0'))")
    jobs = pipeline(cluster, folder, "pretrain", "run.toml", "task", "--cpus-per-task=2", "run.toml")
    cluster.wait_for_output(jobs["pretrain"], "rank 0 trains", 30)
    cluster.run(["scancel", "--batch", "--signal=USR1", jobs["pretrain"]])
    assert cluster.wait(jobs["pretrain"], 60).state == "COMPLETED"
    ended = cluster.wait(jobs["task"], 60)
    assert (ended.state, cluster.shown(jobs["task"])["NumCPUs"]) == ("COMPLETED", "2"), ended.output
    assert "checkpoint True" in ended.output


def test_tasks_of_an_array_do_a_share_each_and_the_merge_waits_for_them(cluster: SlurmCluster, folder: Path) -> None:
    launch(folder, "prepare_corpus", "import sys, time; time.sleep(.5); open('order', 'a').write(f'{sys.argv[1:]}\\n')")
    launch(folder, "pretrain_distill", "open('order', 'a').write('pretrain\\n')")
    chain = ["prepare", "--array=3-7:2", "--cpus-per-task=2", "run.toml", "a.b=x y", "pretrain", "run.toml"]
    jobs = pipeline(cluster, folder, *chain)
    assert list(jobs) == ["parts", "prepare", "pretrain"]
    for job in ("prepare", "pretrain"):
        assert cluster.wait(jobs[job], 90).state == "COMPLETED"
    *parts, merge, last = (folder / "order").read_text().splitlines()
    whole = ["run.toml", "num_workers=2", "a.b=x y"]
    assert sorted(parts) == [str([*whole[:2], f"part={part}", "parts=3", whole[2]]) for part in range(3)]
    assert (merge, last) == (str(whole), "pretrain")


def test_an_array_that_fails_cancels_the_merge(cluster: SlurmCluster, folder: Path) -> None:
    launch(folder, "prepare_corpus", "import sys; sys.exit('part=1' in sys.argv)")
    jobs = pipeline(cluster, folder, "prepare", "--array=0-1", "run.toml", "pretrain", "run.toml")
    assert [cluster.wait(jobs[job], 60).state for job in ("prepare", "pretrain")] == ["CANCELLED", "CANCELLED"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name at least one stage"),
        (["tsak", "run.toml"], '"tsak" is no stage'),
        (["task", "run.toml", "pretrain", "run.toml"], '"pretrain" is no stage, or is out of order'),
        (["finetune", "run.toml", "task", "missing.toml"], 'task: there is no config "missing.toml"'),
        (["finetune", "run.toml", "task", "--nodes=many", "run.toml"], "cancelling the jobs submitted so far"),
    ],
)
def test_a_mistake_in_a_chain_leaves_no_jobs_behind(
    cluster: SlurmCluster, folder: Path, words: list[str], message: str
) -> None:
    with pytest.raises(AssertionError, match=message):
        pipeline(cluster, folder, "--begin=now+1hour", *words)
    cluster.wait_for_quiet(30)


NO_WAITING = {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive"}  # the nodes share this host's cores
TWO_NODES = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1"]


@pytest.fixture(scope="module")
def repository(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository as the scripts see it."""
    folder = tmp_path_factory.mktemp("repository")
    shutil.copytree(ROOT / "slurm", folder / "slurm")
    (folder / "launch").symlink_to(ROOT / "launch")
    return folder


def toy_tables(world: World) -> dict[str, Any]:
    tables = toy.task_config(Path("runs"), world.files, world.teacher, world.pretrained)
    return apply_overrides(tables, {"run.steps": 40, "data.num_workers": 1}.items())


def results(run: Path) -> dict[str, Any]:
    tables: dict[str, Any] = json.loads((run / "results.json").read_text())
    return tables


def losses(run: Path) -> list[float]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def exported(run: Path) -> str:
    return model_digest(loading.load_model(str(run / "export"), "classification", labels=toy.LABELS))


def test_a_training_on_two_nodes_is_preempted_and_ends_as_that_of_two_ranks_on_one(
    cluster: SlurmCluster, repository: Path, world: World
) -> None:
    """Bit for bit; that two ranks train as one does is in tests/training/test_world_sizes.py."""
    (repository / "toy.toml").write_text(tomli_w.dumps(toy_tables(world)))
    job = cluster.submit([*TWO_NODES, "slurm/task.sbatch", "toy.toml", "run.name=preempted"], repository, NO_WAITING)
    cluster.wait_for_output(job, "preempted step 2/40", 120)
    cluster.run(["scancel", "--batch", "--signal=USR1", job])
    ended = cluster.wait(job, 200)
    assert (ended.state, ended.code, cluster.shown(job)["Restarts"]) == ("COMPLETED", 0, "1"), ended.output
    assert "stopped early and saved" in ended.output
    changes = {"run.dir": str(repository / "runs"), "run.name": "ranks"}
    curves(repository / "ranks", {"toy": apply_overrides(toy_tables(world), changes.items())}, processes=2)
    preempted, ranks = (repository / "runs" / name for name in ("preempted", "ranks"))
    assert results(preempted)["processes"] == 2
    assert len(losses(preempted)) == 40
    assert losses(preempted) == losses(ranks)
    assert exported(preempted) == exported(ranks)


def test_a_corpus_from_an_array_is_the_corpus_from_one_process(
    cluster: SlurmCluster, repository: Path, world: World
) -> None:
    rows = [json.dumps({"text": f"{toy.sentence(n % 300, most=60)} {n % 9000}"}) for n in range(16_000)]
    (repository / "rows.jsonl").write_text("\n".join(rows))
    source = {"kind": "jsonl", "path": str(repository / "rows.jsonl")}
    tables = {"out": "array", "tokenizer": str(world.tokenizer), "source": [source]}
    (repository / "array.toml").write_text(tomli_w.dumps(tables))
    jobs = pipeline(cluster, repository, "prepare", "--array=0-1", "--cpus-per-task=1", "array.toml", extra=NO_WAITING)
    ended = cluster.wait(jobs["prepare"], 200)
    assert (ended.state, ended.code) == ("COMPLETED", 0), ended.output
    assert "array: 3 chunks are tokenized; merging them" in ended.output
    prepare(parse_config(PrepareConfig, {**tables, "out": str(repository / "alone"), "num_workers": 1}, "toy"))
    array, alone = (files_in(repository / name) for name in ("array", "alone"))
    assert len(array) >= 7
    assert array == alone


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def without_teacher(tables: dict[str, Any]) -> dict[str, Any]:
    """The run's student whole, and from the labels alone."""
    others = {name: table for name, table in tables.items() if name != "teacher"}
    return others | {
        "student": {"path": tables["student"]["path"]},
        "objective": {"name": "supervised"},
        "optim": {"lr": tables["optim"]["lr"]},
    }


def test_a_chain_distils_from_text_to_a_student(cluster: SlurmCluster, repository: Path, world: World) -> None:
    books = {"kind": "text", "path": str(world.books)}
    runs, parent = Path("runs"), world.pretrained
    configs = {
        "prepare": {"out": "corpus", "tokenizer": str(world.tokenizer), "held_out": 0.1, "source": [books]},
        "pretrain": toy.corpus_config(runs, Path("corpus"), parent, parent),
        "finetune": without_teacher(toy.task_config(runs, world.files, parent, parent)),
        "task": toy.task_config(runs, world.files, runs / "finetune" / "export", runs / "pretrain" / "export"),
    }
    words = ["--cpus-per-task=1"]
    for stage, tables in configs.items():
        (repository / f"{stage}.toml").write_text(tomli_w.dumps(tables))
        words += [stage, f"{stage}.toml", *([] if stage == "prepare" else [f"run.name={stage}"])]
    jobs = pipeline(cluster, repository, *words, extra=NO_WAITING)
    for job in jobs.values():
        ended = cluster.wait(job, 200)
        assert (ended.state, ended.code) == ("COMPLETED", 0), ended.output
    task = results(repository / "runs" / "task")
    assert task["config"]["student"]["path"] == "runs/pretrain/export"
    assert task["config"]["teacher"]["path"] == "runs/finetune/export"
    assert task["teacher"]["accuracy"] == results(repository / "runs" / "finetune")["metrics"]["accuracy"]
    assert task["student"]["parameters"] < task["teacher"]["parameters"]
    assert (repository / "runs" / "task" / "export" / "model.safetensors").exists()


def test_scripts_name_no_site(folder: Path) -> None:
    for script in (path for path in (folder / "slurm").iterdir() if path.is_file()):
        for option in ("--partition=", "--account=", "--qos=", "--constraint="):
            assert option not in script.read_text()
