"""A SLURM cluster of two nodes on this host, for tests.

The nodes `n1` and `n2` have four CPUs each. All are in the partition `main`, and in `warned` and `sudden`, whose jobs
those in `main` preempt: with a minute's grace, and without.

    with SlurmCluster() as cluster:                          starts munged, slurmctld and two slurmd, ends all of them
        state, code, output = cluster.run_job(["slurm/task.sbatch", "configs/task/lad.toml"], timeout=120)

    submit, wait, cancel, shown     the same in steps, for tests that signal a job while it runs
    wait_for_output                 waits until a running job has printed a text
    wait_for_step                   waits until its first step runs
    wait_for_quiet                  waits until no job is left
    run                             any command that talks to this cluster (squeue, scancel, bash slurm/pipeline.sh …)
    missing_programs                what to install, empty when all is there

Everything lives in one temporary folder with its own key, sockets and ports, so that it neither meets nor disturbs a
SLURM or a munged that the host already runs. It needs root (slurmd starts jobs as their owner) and Debian's packages:
that build allows several slurmd on a host.
"""

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, NamedTuple, Self

PACKAGES = {"slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "munged": "munge"}
NODES = ("n1", "n2")
FINAL = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL"}
LOOK_EVERY = 0.3  # seconds
RESTART_AFTER = 2  # seconds: slurmd refuses a job for the rest of the second in which it ended the last life of it

CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MinJobAge=3600
KillWait=5
InactiveLimit=0
Waittime=0
NodeName=n1 NodeAddr=127.0.0.1 NodeHostname={host} Port={ports[1]} CPUs=4 CoresPerSocket=4 RealMemory=8000
NodeName=n2 NodeAddr=127.0.0.1 NodeHostname={host} Port={ports[2]} CPUs=4 CoresPerSocket=4 RealMemory=8000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
PartitionName=warned Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=sudden Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=0
"""


class Finished(NamedTuple):
    """How a job ended: SLURM's word for it, the batch script's exit code, and all that it printed over its lives."""

    state: str
    code: int
    output: str


def missing_programs() -> list[str]:
    """The Debian packages to install before a cluster can be started."""
    return sorted({package for program, package in PACKAGES.items() if not shutil.which(program, path=_path())})


def _path() -> str:
    """This Python first, for the jobs; then where Debian keeps daemons."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath), "/usr/sbin"])


class SlurmCluster:
    """The cluster, running inside `with`. Raises RuntimeError when it cannot start here, saying what is missing."""

    def __enter__(self) -> Self:
        if os.geteuid() != 0:
            raise RuntimeError("the SLURM test cluster can be started by root only")
        if missing := missing_programs():
            raise RuntimeError(f"the SLURM test cluster needs: apt-get install -y {' '.join(missing)}")
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.folder.chmod(0o755)  # munged serves only from a folder that everyone may enter
        self.environment = {**_outside_slurm(), "PATH": _path(), "SLURM_CONF": str(self.folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._node_daemons: dict[str, subprocess.Popen[bytes]] = {}
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.run(["scancel", "--user=root"])
            self.wait_for_quiet(30)
        finally:
            self._stop()

    def _start(self) -> None:
        host = socket.gethostname().split(".")[0]
        config = CONFIG.format(host=host, folder=self.folder, ports=_free_ports(1 + len(NODES)))
        (self.folder / "slurm.conf").write_text(config)
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir()
        self._start_munged()
        self._daemon("slurmctld", "-D", "-c", "-f", str(self.folder / "slurm.conf"))
        for node in NODES:
            self._start_node(node)
        _until(self._all_idle, 30, self._logs)

    def _start_munged(self) -> None:
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        files = {"key-file": key.name, "socket": "munge.socket", "pid-file": "munged.pid", "seed-file": "munge.seed"}
        options = [f"--{option}={self.folder / name}" for option, name in files.items()]
        log = f"--log-file={self.folder / 'munged.log'}"
        self._daemon("munged", "--foreground", "--force", "--num-threads=2", log, *options)
        _until((self.folder / "munge.socket").exists, 10, self._logs)

    def _start_node(self, node: str) -> None:
        config = str(self.folder / "slurm.conf")
        self._node_daemons[node] = self._daemon("slurmd", "-D", "-c", "-N", node, "-f", config)

    def _daemon(self, *command: str) -> subprocess.Popen[bytes]:
        with open(self.folder / f"{len(self._daemons)}-{command[0]}.out", "wb") as out:
            self._daemons.append(_popen(command, self.environment, out))
        return self._daemons[-1]

    def _all_idle(self) -> bool:
        answer = subprocess.run(
            ["sinfo", "--noheader", "--format=%D %T"], env=self.environment, capture_output=True, text=True
        )
        return answer.stdout.strip() == f"{len(NODES)} idle"

    def _logs(self) -> str:
        files = sorted([*self.folder.glob("*.log"), *self.folder.glob("*.out")])
        return "\n".join(f"== {file.name}\n{file.read_text(errors='replace')[-2000:]}" for file in files)

    def _stop(self) -> None:
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self.folder)

    def run(self, command: Sequence[str], folder: Path | None = None, extra: Mapping[str, str] | None = None) -> str:
        """Return what a command prints that talks to this cluster, run in `folder` with `extra` in the environment."""
        environment = {**self.environment, **(extra or {})}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command} exits with {done.returncode}:\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    def lose(self, node: str) -> None:
        """Kill a node's daemon with all jobs on it, and bring the node back without them.

        It comes back once SLURM has taken the jobs off it: their next lives begin on whole nodes.
        """
        self._node_daemons[node].kill()
        self._node_daemons[node].wait()
        self.run(["scontrol", "update", f"nodename={node}", "state=down", "reason=test"])

        def is_empty() -> bool:
            processes = self._processes_on(node)  # a step may be about to start further ones
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            return not processes and not self.run(["squeue", "--noheader", f"--nodelist={node}"])

        _until(is_empty, 60, self._logs)
        self._start_node(node)
        _until(
            lambda: "DOWN" not in self.run(["sinfo", "--noheader", f"--nodes={node}", "--format=%T"]).upper(),
            30,
            self._logs,
        )

    def _processes_on(self, node: str) -> list[int]:
        """The processes of jobs on a node."""
        marks = {f"SLURMD_NODENAME={node}".encode(), f"SLURM_CONF={self.folder}/slurm.conf".encode()}
        processes = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if marks <= set((process / "environ").read_bytes().split(b"\0")):
                    processes.append(int(process.name))
        return processes

    def submit(self, args: Sequence[str], folder: Path | None = None, extra: Mapping[str, str] | None = None) -> str:
        """`sbatch ARGS` in `folder`; returns the job's id."""
        return self.run(["sbatch", "--parsable", *args], folder, extra)

    def run_job(
        self, args: Sequence[str], timeout: float, folder: Path | None = None, extra: Mapping[str, str] | None = None
    ) -> Finished:
        """`sbatch ARGS` in `folder`, and how the job ended; one that requeues itself is followed to its last life."""
        return self.wait(self.submit(args, folder, extra), timeout)

    def wait(self, job: str, timeout: float) -> Finished:
        """How a job ended, within `timeout` seconds. A requeued one starts again at once, not in two minutes."""

        def ended() -> bool:
            shown = self.shown(job)
            if shown["JobState"] == "PENDING" and shown["Reason"] == "BeginTime":
                time.sleep(RESTART_AFTER)
                self.run(["scontrol", "update", f"jobid={job}", "StartTime=now"])
            return shown["JobState"] in FINAL

        try:
            _until(ended, timeout, lambda: f"job {job}: {self.shown(job)}\n{self.output(job)}")
        except TimeoutError:
            self.cancel(job)
            raise
        shown = self.shown(job)
        code, signal = map(int, shown["ExitCode"].split(":"))
        return Finished(shown["JobState"], code or (128 + signal if signal else 0), self.output(job))

    def wait_for_step(self, job: str, timeout: float) -> None:
        """Waits until the first step of a job runs."""
        _until(lambda: f"{job}.0" in self.run(["squeue", "--steps", "--noheader"]), timeout, lambda: self.output(job))

    def wait_for_quiet(self, timeout: float) -> None:
        """Waits until no job is queued, running or ending."""
        _until(lambda: not self.run(["squeue", "--noheader"]), timeout, lambda: self.run(["squeue"]))

    def cancel(self, job: str) -> None:
        self.run(["scancel", job])

    def shown(self, job: str) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run(["scontrol", "--oneliner", "show", "job", job])))

    def output(self, job: str) -> str:
        """What a job has printed so far."""
        file = Path(self.shown(job)["StdOut"])
        return file.read_text() if file.exists() else ""

    def wait_for_output(self, job: str, text: str, timeout: float) -> None:
        """Waits until a running job has printed `text`."""
        _until(
            lambda: text in self.output(job), timeout, lambda: f"job {job} never printed {text!r}:\n{self.output(job)}"
        )


def _outside_slurm() -> dict[str, str]:
    """This environment without what a launcher put there: a test cluster's jobs must not take its ranks for theirs."""
    launchers = ("SLURM_", "SBATCH_", "SRUN_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_")
    return {name: value for name, value in os.environ.items() if not name.startswith(launchers)}


def _popen(command: Sequence[str], environment: Mapping[str, str], out: IO[bytes]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
    )


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _until(condition: Callable[[], bool], seconds: float, explain: Callable[[], str]) -> None:
    """Waits for a condition. Raises TimeoutError with the explanation when it has not come true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"after {seconds} s: {explain()}")
        time.sleep(LOOK_EVERY)
