#!/usr/bin/env bash
# All checks, on a Debian machine with nothing prepared: bash tests/run.sh [arguments of pytest]
#
# Installs into the active virtual environment, or into .venv, which it makes. As root it also installs the Debian packages
# that are missing; otherwise it leaves out the tests on a SLURM cluster, which need root.
set -euo pipefail
cd "$(dirname "$0")/.."

selection=()
if ((EUID != 0)); then
    selection=(-m "not slurm")
    printf '%s\n' "" "NOT ROOT: the tests on a SLURM cluster (marker slurm) are LEFT OUT" "" >&2
elif ! dpkg --status slurmctld slurmd slurm-client munge &>/dev/null; then
    apt-get -qq update
    DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends slurmctld slurmd slurm-client munge
fi

if [[ -z "${VIRTUAL_ENV:-}" ]]; then
    [[ -f .venv/bin/activate ]] || python3 -m venv .venv
    source .venv/bin/activate
fi
# First on PATH also if the environment was activated long ago: DeepSpeed compiles anew when it meets another ninja.
export PATH="$VIRTUAL_ENV/bin:$PATH"

# Without GPUs a plain "torch" would bring gigabytes of CUDA; of this version the machine may have a file for CPUs.
if ! command -v nvidia-smi >/dev/null && ! python -c "import torch" 2>/dev/null; then
    pip install --quiet "torch==2.13.0"
fi
pip install --quiet --editable ".[dev]"

export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$VIRTUAL_ENV/torch_extensions}"
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 RAY_USAGE_STATS_ENABLED=0

ruff check
ruff format --check
mypy
pytest -q "${selection[@]}" "$@"
