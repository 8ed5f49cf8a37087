"""The sbatch scripts without SLURM: what users write arrives as it was written, whatever it is, and how a job ends.

`srun`, `scontrol`, `squeue`, `sbatch` and `python` are small scripts that come first on PATH.
"""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from launching import ROOT

SCRIPTS = ("pretrain", "finetune", "task", "evaluate", "prepare")
FAKES = {
    "python": 'printf "%s\\0" "$@" >seen; exit "${FAKE_CODE:-0}"',
    "srun": 'while [[ "$1" == -* ]]; do shift; done; exec "$@"',
    "scontrol": 'if [[ "$1" == requeue ]]; then echo "$2" >requeued; else echo "NodeName=n NodeAddr=127.0.0.1 P=1"; fi',
    "squeue": 'echo "${FAKE_STATE:-RUNNING}"',
    "sbatch": 'printf "%s\\0" "$@" >>"seen"; printf "\\1" >>seen; echo 7',
    "sleep": "exit 0",
}
HOSTILE = st.one_of(
    st.sampled_from(
        [
            "two words", "it's", 'a "quoted" one', "$(touch harmed)", "`touch harmed`", "$HOME", "a;touch harmed",
            "a & touch harmed", "a|touch harmed", "two\nlines", "\n#SBATCH --output=harmed", "#SBATCH --job-name=x",
            "../../harmed", "/tmp/harmed", "-x", "--", "*", "?", "[a]", "~", "\\", "a\\nb", "", " ", "\t", "ä€", "{x}",
            "{data.task}", "%j", "%s%n", "!!", "&", "a=b=c", "ask", "e", "task ",
            ">harmed", "<(touch harmed)", "${IFS}", "$'x'", "\x7f\x1b[2J",
        ]
    ),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12),
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository's root as the scripts see it, and the programs that they call."""
    root = tmp_path_factory.mktemp("words") / "repository"
    shutil.copytree(ROOT / "slurm", root / "slurm")
    (root / "bin").mkdir()
    for name, script in FAKES.items():
        (root / "bin" / name).write_text(f"#!/bin/bash\n{script}\n")
        (root / "bin" / name).chmod(0o755)
    (root / "run.toml").touch()
    return root


def run(
    folder: Path, script: str, words: Sequence[str], **variables: str
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """How the script ended, and the arguments that its program got."""
    for left in ("seen", "requeued"):
        (folder / left).unlink(missing_ok=True)
    environment = {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "2", "SLURMD_NODENAME": "n1", "LC_ALL": "C.UTF-8", **variables,
    }  # fmt: skip
    command = ["bash", f"slurm/{script}", *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    file = folder / "seen"
    return done, file.read_bytes().decode().split("\0")[:-1] if file.exists() else []


def untouched(folder: Path) -> bool:
    """Nothing was made beside what the fakes make."""
    here = {path.name for path in folder.iterdir()} - {"seen", "requeued"}
    logs = {path.name for path in (folder / "slurm" / "logs").iterdir()} - {".gitignore"}
    return (
        here == {"slurm", "bin", "run.toml"} and not logs and {p.name for p in folder.parent.iterdir()} == {folder.name}
    )


FEW = settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("script", SCRIPTS)
@settings(parent=FEW, max_examples=12)
@given(words=st.lists(HOSTILE.filter(lambda word: not word.startswith("--each")), min_size=1, max_size=6))
def test_every_word_arrives_as_one_argument(folder: Path, script: str, words: list[str]) -> None:
    done, seen = run(folder, f"{script}.sbatch", ["run.toml", *words])
    assert done.returncode == 0, done.stderr
    assert seen[1:] == ["run.toml", *(["num_workers=2"] if script == "prepare" else []), *words]
    assert untouched(folder)


@FEW
@given(words=st.lists(HOSTILE, max_size=4), names=st.lists(HOSTILE, max_size=2))
def test_every_word_of_a_chain_arrives_as_one_argument(folder: Path, words: list[str], names: list[str]) -> None:
    options = [f"--job-name={name}" for name in names]
    done, seen = run(folder, "pipeline.sh", ["task", *options, "run.toml", *words])
    assert done.returncode == 0, done.stderr
    assert seen == ["--parsable", *options, "slurm/task.sbatch", "run.toml", *words]
    assert untouched(folder)


VALUE = HOSTILE.filter(lambda value: value and "," not in value and "{" not in value)


@FEW
@given(
    tasks=st.lists(VALUE, min_size=1, max_size=3),
    seeds=st.lists(VALUE, min_size=1, max_size=3),
    other=HOSTILE,
    pick=st.data(),
)
def test_each_task_of_an_array_gets_one_combination(
    folder: Path, tasks: list[str], seeds: list[str], other: str, pick: st.DataObject
) -> None:
    index = pick.draw(st.integers(0, len(tasks) * len(seeds) - 1))
    task, seed = tasks[index // len(seeds)], seeds[index % len(seeds)]
    axes = [f"--each=data.task={','.join(tasks)}", f"--each=run.seed={','.join(seeds)}"]
    words = ["run.toml", *axes, "run.name=a-{data.task}-{run.seed}", f"b={other}"]
    done, seen = run(folder, "task.sbatch", words, SLURM_ARRAY_TASK_ID=str(index))
    assert done.returncode == 0, done.stderr
    last = f"b={other}".replace("{data.task}", task)
    assert seen[1:] == ["run.toml", f"data.task={task}", f"run.seed={seed}", f"run.name=a-{task}-{seed}", last]
    assert untouched(folder)


AXIS = "--each=run.seed=0,1"


@pytest.mark.parametrize(
    ("words", "index", "message"),
    [
        ([AXIS, "run.name=a-{run.seed}"], "2", "there are 2 combinations, so --array=0-1"),
        ([AXIS, "run.name=a-{run.seed}"], None, "--each is for an array: add --array=0-N"),
        ([AXIS, "run.name=a"], "0", "would write to one place; give run.name=…{run.seed}…"),
        ([AXIS, "--each=data.task=a,b", "run.name=a-{run.seed}"], "0", "give run.name=…{data.task}…"),
        ([AXIS], "0", "give run.name=…{run.seed}…"),
        ([], "0", "the tasks of an array would all do the same"),
        (["--each", "run.seed=0,1"], "0", "is written --each=KEY=VALUE,VALUE,…"),
        (["--each=run.seed="], "0", "is written --each=KEY=VALUE,VALUE,…"),
    ],
)
def test_a_mistake_in_an_array_is_refused(folder: Path, words: list[str], index: str | None, message: str) -> None:
    done, seen = run(folder, "task.sbatch", ["run.toml", *words], **({"SLURM_ARRAY_TASK_ID": index} if index else {}))
    assert (done.returncode, seen) == (2, [])
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


AGAIN, NOT_AGAIN = True, False
ENDINGS = [
    ("task", 0, NOT_AGAIN, "is done"),
    ("task", 2, NOT_AGAIN, "a mistake to mend"),
    ("task", 3, NOT_AGAIN, "no checkpoint is whole"),
    ("task", 75, AGAIN, "stopped early and saved: it goes back to the queue"),
    ("task", 93, NOT_AGAIN, "three times without progress"),
    ("task", 127, NOT_AGAIN, "Python could not be started"),
    ("task", 1, AGAIN, "died with exit code 1 "),
    ("pretrain", 137, AGAIN, "died with exit code 137 "),
    ("finetune", 139, AGAIN, "its last checkpoint: it goes back to the queue"),
    ("prepare", 75, AGAIN, "stopped early and saved"),
    ("prepare", 1, NOT_AGAIN, "ended with exit code 1 and is not run again"),
    ("evaluate", 137, NOT_AGAIN, "ended with exit code 137 and is not run again"),
]


@pytest.mark.parametrize(("script", "code", "again", "reason"), ENDINGS)
def test_how_a_job_ends(folder: Path, script: str, code: int, again: bool, reason: str) -> None:
    (folder / "slurm" / "logs" / "7.early").unlink(missing_ok=True)
    done, _ = run(folder, f"{script}.sbatch", ["run.toml"], FAKE_CODE=str(code))
    assert (done.returncode, (folder / "requeued").exists()) == (code, again)
    assert [line for line in done.stdout.splitlines() if reason in line], done.stdout
    (folder / "slurm" / "logs" / "7.early").unlink(missing_ok=True)


def test_what_slurm_ends_itself_is_left_to_slurm(folder: Path) -> None:
    done, _ = run(folder, "task.sbatch", ["run.toml"], FAKE_CODE="75", FAKE_STATE="COMPLETING")
    assert (done.returncode, (folder / "requeued").exists()) == (75, False)
    assert "not if it was cancelled" in done.stdout


def test_what_dies_at_once_three_times_in_a_row_stays_dead(folder: Path) -> None:
    def dies(code: int) -> bool:
        run(folder, "task.sbatch", ["run.toml"], FAKE_CODE=str(code))
        return not (folder / "requeued").exists()

    assert [dies(1), dies(75), dies(1), dies(137), dies(1)] == [False, False, False, False, True]
    assert untouched(folder)


def test_no_user_text_is_in_the_path_of_a_log() -> None:
    for script in (ROOT / "slurm").glob("*.sbatch"):
        assert f"#SBATCH --output=slurm/logs/{script.stem}-%j.out\n" in script.read_text()
