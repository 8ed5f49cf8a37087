"""Searches on a real SLURM of two nodes: Ray on all of them, and chains that have a search and a report."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import BIN, ROOT, wait_until
from slurm_cluster import SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.ray]

# As a search does: joins the job's cluster, and runs a trial on each node.
DRIVER = """
import os, pathlib, sys, time, ray
from lad_dist.cluster.connect import check_storage, ray_cluster

with ray_cluster():
    check_storage(pathlib.Path("runs"))
    assert len(ray.nodes()) == int(os.environ["SLURM_NNODES"])

    @ray.remote(num_cpus=3)
    def trial():
        time.sleep(1)
        return [os.environ.get(name) for name in ("SLURMD_NODENAME", "SLURM_STEP_NUM_TASKS", "MASTER_PORT", "HF_HOME")]

    print("trials", sorted(ray.get([trial.remote(), trial.remote()])), sys.argv[1:], flush=True)
sys.exit(int(sys.argv[2]))
"""

# A node whose Ray fails for as long as there is a file.
RAY = """#!/bin/bash
if [[ "$SLURMD_NODENAME" == n2 && -e broken ]]; then
    echo "no Ray here"
    exit 1
fi
exec {ray} "$@"
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    with SlurmCluster() as running:
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A repository's root as the scripts see it."""
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
    for name in ("launch", "runs", "bin"):
        (tmp_path / name).mkdir()
    (tmp_path / "run.toml").touch()
    (tmp_path / "launch" / "tune.py").write_text(DRIVER)
    (tmp_path / "bin" / "ray").write_text(RAY.format(ray=BIN / "ray"))
    (tmp_path / "bin" / "ray").chmod(0o755)
    return tmp_path


def variables(cluster: SlurmCluster, folder: Path) -> dict[str, str]:
    path = f"{folder / 'bin'}:{cluster.environment['PATH']}"
    return {"PATH": path, "PYTHONPATH": str(ROOT), "HF_HOME": "/a place", "HOME": str(folder)}


def test_a_search_leaves_nothing_behind(cluster: SlurmCluster, folder: Path) -> None:
    job = cluster.submit(["slurm/tune.sbatch", "run.toml", "3", "a b"], folder, variables(cluster, folder))
    ended = cluster.wait(job, 120)
    assert ended.output.splitlines() == [
        f"trials {[['n1', None, None, '/a place']] * 2} ['run.toml', '3', 'a b']",
        f"slurm: job {job} ended with exit code 3 and is not run again: see above",
    ]
    assert (ended.code, cluster.shown(job)["Restarts"]) == (3, "0")
    assert nothing_of(job)
    assert not (folder / ".ray").exists()


def nothing_of(job: str) -> bool:
    """Whether neither Ray's folder nor its processes are left."""
    return not Path(f"/tmp/ray-{job}").exists() and not running_with(rf"/tmp/ray-{job}\b")


def running_with(pattern: str) -> list[str]:
    """Command lines of this host's processes in which the pattern occurs."""
    lines = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(process.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return [line for line in lines if re.search(pattern, line)]


def test_a_search_without_ray_on_a_node_names_it_and_runs_on_both_when_it_has(
    cluster: SlurmCluster, folder: Path
) -> None:
    (folder / "broken").touch()
    job = cluster.submit(["--nodes=2", "slurm/tune.sbatch", "run.toml", "0"], folder, variables(cluster, folder))
    log = f"slurm/logs/tune-{job}-ray.out"
    line = (
        f"job {job} could not start: Ray did not come up on n2 (the start failed), see {log}: it goes back to the queue"
    )
    cluster.wait_for_output(job, line, 90)
    (folder / "broken").unlink()
    assert "no Ray here" in (folder / log).read_text()
    ended = cluster.wait(job, 120)
    assert (ended.state, ended.code, cluster.shown(job)["Restarts"]) == ("COMPLETED", 0, "1"), ended.output
    trials = [[node, None, None, "/a place"] for node in ("n1", "n2")]
    assert ended.output.splitlines()[-2:] == [f"trials {trials} ['run.toml', '0']", f"slurm: job {job} is done"]
    assert "srun" not in ended.output
    assert nothing_of(job)
    assert not list((folder / "slurm" / "logs").glob("*.early"))


def test_a_search_without_ray_three_times_in_a_row_is_not_run_again(cluster: SlurmCluster, folder: Path) -> None:
    (folder / "bin" / "ray").write_text("#!/bin/bash\nexit 1\n")
    job = cluster.submit(["--nodes=2", "slurm/tune.sbatch", "run.toml", "0"], folder, variables(cluster, folder))
    ended = cluster.wait(job, 90)
    assert (ended.state, ended.code, cluster.shown(job)["Restarts"]) == ("FAILED", 1, "2"), ended.output
    assert ended.output.count("could not start: Ray did not start on n1") == 3
    assert "for the third time in a row at its start, and is not run again" in ended.output.splitlines()[-1]


def chain(cluster: SlurmCluster, folder: Path, *words: str) -> dict[str, set[str]]:
    """Submit a chain that does not start; return what each stage waits for."""
    lines = cluster.run(["bash", "slurm/pipeline.sh", "--begin=now+1hour", *words], folder).splitlines()
    jobs = dict(line.split() for line in lines)
    stages = {job: stage for stage, job in jobs.items()}
    waiting = {stage: cluster.shown(job)["Dependency"] for stage, job in jobs.items()}
    cluster.run(["scancel", *jobs.values()])
    return {stage: {stages[job] for job in re.findall(r"afterok:(\d+)", text)} for stage, text in waiting.items()}


def test_a_chain_has_a_search_and_a_report(cluster: SlurmCluster, folder: Path) -> None:
    stages = "prepare run.toml pretrain run.toml finetune run.toml tune --nodes=2 run.toml a.b=1".split()
    report = ["report", "runs/a", "--out", "runs/a/report"]
    assert chain(cluster, folder, *stages, *report) == {
        "prepare": set(),
        "pretrain": {"prepare"},
        "finetune": set(),
        "tune": {"pretrain", "finetune"},
        "report": {"finetune", "tune"},
    }
    task = ["task", "runs/a/best.toml", "evaluate", "run.toml"]
    whole = chain(cluster, folder, *stages, *task, *report)
    assert (whole["task"], whole["evaluate"]) == ({"pretrain", "finetune", "tune"}, {"tune", "task"})
    assert whole["report"] == {"finetune", "tune", "task", "evaluate"}
    with pytest.raises(AssertionError, match=r'task: there is no config "runs/a/best.toml"'):
        chain(cluster, folder, *task)
    wait_until(lambda: not cluster.run(["squeue", "--noheader"]), 30)


def test_a_report_runs_with_the_words_of_the_command(cluster: SlurmCluster, folder: Path) -> None:
    ended = cluster.run_job(["slurm/report.sbatch", "no folder", "--out", "x"], 60, folder, variables(cluster, folder))
    assert (ended.state, ended.code) == ("FAILED", 2), ended.output
    assert "error: no folder:" in ended.output
