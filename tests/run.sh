#!/usr/bin/env bash
# All checks, on a Debian machine with nothing prepared: bash tests/run.sh [arguments of pytest]
#
# With --sweep whole products of cases (methods, ZeRO stages, numbers of processes, layouts, states) and many examples of
# each property; without it a part of them that covers every method, stage and number of processes, in half the time.
#
# Installs into the active virtual environment, or into .venv, which it makes. As root it also installs the Debian packages
# that are missing; otherwise it leaves out the tests that need root: those on a SLURM cluster, on a full disk, and under strace.
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(slurmctld slurmd slurm-client munge strace)
selection=()
debian=""
if ((EUID != 0)); then
    selection=(-m "not slurm and not root")
    printf '%s\n' "" "NOT ROOT: the tests that need it (markers slurm and root) are LEFT OUT" "" >&2
elif ! dpkg --status "${packages[@]}" &>/dev/null; then
    # Beside what pip does; its failure is that of the `wait` below.
    (apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends "${packages[@]}") &
    debian=$!
fi

if [[ -z "${VIRTUAL_ENV:-${CONDA_PREFIX:-}}" ]]; then
    if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "error: python3 is older than 3.11; activate an environment with a newer one" >&2
        exit 2
    fi
    [[ -f .venv/bin/activate ]] || python3 -m venv .venv
    source .venv/bin/activate
fi
# First on PATH, also if something came before it since: the launchers start the python that they find there.
export PATH="${VIRTUAL_ENV:-$CONDA_PREFIX}/bin:$PATH"
# Without GPUs a plain "torch" would bring gigabytes of CUDA; of this version the machine may have a file for CPUs.
if ! command -v nvidia-smi >/dev/null && ! python -c "import torch" 2>/dev/null; then
    pip install --quiet "torch==2.13.0"
fi
pip install --quiet --editable ".[dev]"
[[ -z "$debian" ]] || wait "$debian"

unset PYTHONDONTWRITEBYTECODE  # the tests start some two hundred processes, and each would compile all sources anew
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 RAY_USAGE_STATS_ENABLED=0

ruff check
ruff format --check
lint-imports
mypy &
types=$!
# Much of a test is waiting for processes: three at a time keep two cores busy. A file stays on one worker.
pytest -q -n "${LAD_DIST_TEST_WORKERS:-3}" --dist loadfile --no-loadscope-reorder "${selection[@]}" "$@"
wait "$types"
