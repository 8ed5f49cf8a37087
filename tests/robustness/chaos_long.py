"""What takes too long for every day: real launchers, a real SLURM, two networks.

Run by `bash tests/robustness/chaos.sh`.
"""

import ctypes
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import chaos
import pytest
import tomli_w
import toy
from chaos import SAVE_EVERY, Life, Victim, run_to_end, same
from conftest import World
from launching import ROOT
from slurm_cluster import LOOK_EVERY, RESTART_AFTER, SlurmCluster

from lad_dist.config.load import apply_overrides

pytest_plugins = ["chaos_fixtures"]
Figures = list[tuple[str, str]]


@pytest.mark.parametrize("by", ["torchrun", "deepspeed"])
def test_kills_of_a_real_launcher_and_of_what_it_has_launched(
    by: str, world: World, straight: Victim, tmp_path: Path, figures: Figures
) -> None:
    """A killed launcher leaves ranks that live on: the same command waits for their end."""
    victim, dice = chaos.victim(tmp_path, world), random.Random(0)
    kills = []
    for how in ("rank 0", "job", "rank 1", "launcher"):
        before = victim.saved[-1:]
        life = chaos.launch(victim, by)
        assert life.until(lambda before=before: victim.saved[-1:] != before, 600), life.output[-3000:]
        time.sleep(dice.uniform(0.0, 0.5))
        if victim.done:
            break
        kill(life, how)
        life.end(30)
        kills.append(how)
        assert victim.damaged == []
        assert how == "launcher" or victim.reached - victim.saved_step <= SAVE_EVERY
    life = chaos.launch(victim, by)
    assert life.end(900) == [0], life.output[-3000:]
    assert same(victim, straight)
    figures.append((f"kills under {by}: {', '.join(kills)}; equal end", "yes"))


def kill(life: Life, how: str) -> None:
    ranks, others = chaos.processes_of(life)
    for pid in {"launcher": others, "job": [*others, *ranks.values()]}.get(how) or [ranks[int(how[-1])]]:
        os.kill(pid, signal.SIGKILL)


def test_three_lives_without_a_checkpoint_are_the_end(world: World, tmp_path: Path, figures: Figures) -> None:
    victim = chaos.victim(tmp_path, world, {"run.save_every": 0})
    for _ in range(3):
        life = chaos.begin(victim)
        assert life.until(lambda life=life: "step 1/" in life.output)
        life.signal(signal.SIGKILL)
        life.end()
    life = chaos.begin(victim)
    assert life.end() == [93, 93]
    assert "died 3 times in a row at the beginning" in life.output
    figures.append(("three lives killed before a checkpoint: 93", "yes"))


@pytest.fixture
def networks() -> Iterator[list[dict[str, str]]]:
    """Two networks with a cable between them: the variables of a rank in each."""
    names = [f"chaos{number}" for number in range(2)]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    for name in names:
        ip("netns", "add", name)
    ip("link", "add", "chaos-a", "netns", names[0], "type", "veth", "peer", "name", "chaos-b", "netns", names[1])
    for number, (name, end) in enumerate(zip(names, ("chaos-a", "chaos-b"), strict=True)):
        ip("-n", name, "addr", "add", f"10.99.0.{number + 1}/24", "dev", end)
        ip("-n", name, "link", "set", "lo", "up")
        ip("-n", name, "link", "set", end, "up")
    yield [
        {"CHAOS_NETWORK": name, "GLOO_SOCKET_IFNAME": end, "MASTER_ADDR": "10.99.0.1"}
        for name, end in zip(names, ("chaos-a", "chaos-b"), strict=True)
    ]
    for name in names:
        subprocess.run(["ip", "netns", "del", name], check=False)


def enter_network() -> None:
    new_network = 0x40000000
    handle = os.open(f"/run/netns/{os.environ['CHAOS_NETWORK']}", os.O_RDONLY)
    assert ctypes.CDLL(None).setns(handle, new_network) == 0


@pytest.mark.root
@pytest.mark.parametrize("lost", [0, 1])
def test_a_node_that_falls_silent_ends_the_run_which_then_goes_on(
    lost: int, world: World, straight: Victim, networks: Any, tmp_path: Path, figures: Figures
) -> None:
    """Its processes die with it and nothing says so: the cable is cut first."""
    victim = chaos.victim(tmp_path, world)
    life = chaos.begin(victim, prepare=enter_network, variables=networks)
    assert life.until(lambda: victim.reached >= 20)
    begin = time.monotonic()
    end = networks[lost]
    subprocess.run(["ip", "-n", end["CHAOS_NETWORK"], "link", "set", end["GLOO_SOCKET_IFNAME"], "down"], check=True)
    life.signal(signal.SIGKILL, [lost])
    codes = life.end()
    seconds = time.monotonic() - begin
    assert codes[lost] == -signal.SIGKILL
    assert codes[1 - lost] == 1
    assert victim.reached - victim.saved_step <= SAVE_EVERY
    run_to_end(victim)
    assert same(victim, straight)
    figures.append((f"the node of rank {lost} falls silent: seconds until the other has ended", f"{seconds:.1f}"))
    assert seconds <= 5.0


NO_WAITING = {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive"}  # the nodes share this host's cores
TWO_NODES = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1"]
SIGNALS = int(os.environ.get("LAD_DIST_CHAOS_SIGNALS", "20"))
SLURM_STEPS = 200 + 100 * SIGNALS


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    with SlurmCluster() as running:
        yield running


@pytest.fixture(scope="module")
def folder(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository as the scripts see it."""
    repository = tmp_path_factory.mktemp("repository")
    shutil.copytree(ROOT / "slurm", repository / "slurm")
    (repository / "launch").symlink_to(ROOT / "launch")
    tables = toy.task_config(Path("runs"), world.files, world.teacher, world.pretrained)
    changes = {"run.steps": SLURM_STEPS, "run.save_every": 50, "data.micro_batches_per_step": 2, "data.num_workers": 0}
    (repository / "toy.toml").write_text(tomli_w.dumps(apply_overrides(tables, changes.items())))
    return repository


def submitted(cluster: SlurmCluster, folder: Path, name: str) -> tuple[str, Victim]:
    job = cluster.submit([*TWO_NODES, "slurm/task.sbatch", "toy.toml", f"run.name={name}"], folder, NO_WAITING)
    return job, Victim(folder / "runs" / name, folder / "toy.toml")


@pytest.fixture(scope="module")
def undisturbed(cluster: SlurmCluster, folder: Path) -> Victim:
    job, victim = submitted(cluster, folder, "undisturbed")
    assert cluster.wait(job, 1800).code == 0
    return victim


def until_it_trains(cluster: SlurmCluster, job: str, victim: Victim) -> None:
    """Wait until the run is past the steps that it had reported; a requeued job starts at once, not in two minutes."""
    reached, deadline = victim.reached, time.monotonic() + 600
    while victim.reached <= reached:
        assert time.monotonic() < deadline, cluster.output(job)[-3000:]
        shown = cluster.shown(job)
        assert shown["JobState"] in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"), cluster.output(job)[-3000:]
        if shown["JobState"] == "PENDING" and shown["Reason"] == "BeginTime":
            time.sleep(RESTART_AFTER)
            cluster.run(["scontrol", "update", f"jobid={job}", "StartTime=now"])
        time.sleep(LOOK_EVERY)


@pytest.mark.slurm
def test_signals_at_random_moments_cost_no_step(
    cluster: SlurmCluster, folder: Path, undisturbed: Victim, figures: Figures
) -> None:
    job, victim = submitted(cluster, folder, "disturbed")
    dice, lost = random.Random(0), []
    for number in range(1, SIGNALS + 1):
        until_it_trains(cluster, job, victim)
        time.sleep(dice.uniform(0.0, 1.5))
        cluster.run(["scancel", "--batch", "--signal=USR1", job])
        deadline = time.monotonic() + 120
        while cluster.output(job).count("stopped early and saved; run the same command again") < number:
            assert time.monotonic() < deadline, cluster.output(job)[-3000:]
            time.sleep(LOOK_EVERY)
        lost.append(victim.reached - victim.saved_step)
        print(f"signal {number}: at step {victim.reached}, lost {lost[-1]}", flush=True)
    finished = cluster.wait(job, 1800)
    assert (finished.state, finished.code) == ("COMPLETED", 0), finished.output[-3000:]
    assert cluster.shown(job)["Restarts"] == str(SIGNALS)
    assert lost == [0] * SIGNALS
    assert same(victim, undisturbed)
    figures.append(("signals under SLURM, 2 nodes: saved and requeued; steps lost; equal end", f"{SIGNALS}; 0; yes"))


@pytest.mark.slurm
def test_a_node_of_slurm_that_is_killed_ends_the_rest_and_the_job_runs_again(
    cluster: SlurmCluster, folder: Path, undisturbed: Victim, figures: Figures
) -> None:
    job, victim = submitted(cluster, folder, "node")
    until_it_trains(cluster, job, victim)
    (here,) = (process.pid for process in on_node("n1") if process.is_python)
    on_n2 = on_node("n2")
    begin = time.monotonic()
    for pid in {cluster._daemons[-1].pid, *(p.parent for p in on_n2), *(p.pid for p in on_n2)}:
        os.kill(pid, signal.SIGKILL)
    while Path(f"/proc/{here}").exists():
        assert time.monotonic() < begin + 60
        time.sleep(0.01)
    seconds = time.monotonic() - begin
    cluster._daemons[-1].wait()
    cluster._daemon("slurmd", "-D", "-N", "n2", "-f", str(cluster.folder / "slurm.conf"))
    finished = cluster.wait(job, 1800)
    assert (finished.state, finished.code) == ("COMPLETED", 0), finished.output[-3000:]
    assert same(victim, undisturbed)
    figures.append(("a node of SLURM killed: seconds until the rest has ended; equal end", f"{seconds:.1f}; yes"))
    assert seconds <= 5.0


class Process(NamedTuple):
    pid: int
    parent: int
    is_python: bool


def on_node(node: str) -> list[Process]:
    """Return the processes of the training on a node."""
    processes = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            variables = (folder / "environ").read_bytes().split(b"\0")
            here = f"SLURMD_NODENAME={node}".encode() in variables
            if here and b"launch/task_distill.py" in words and b"srun" not in words[0]:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                processes.append(Process(int(folder.name), parent, b"python" in words[0]))
    return processes
