#!/usr/bin/env bash
# All checks, on a Debian machine with nothing prepared: bash tests/run.sh [arguments of pytest]
#
# Installs into the active virtual environment, or into .venv, which it makes. As root it also installs the Debian packages for the tests
# on a SLURM cluster; otherwise it leaves these tests out.
set -euo pipefail
cd "$(dirname "$0")/.."

if [[ -z "${VIRTUAL_ENV:-}" ]]; then
    [[ -f .venv/bin/activate ]] || python3 -m venv .venv
    source .venv/bin/activate
fi
export PATH="$VIRTUAL_ENV/bin:$PATH" # ninja's version is part of what DeepSpeed's compiled parts are checked against

if ! command -v nvidia-smi >/dev/null && ! python -c "import torch" 2>/dev/null; then
    pip install --quiet "torch==2.13.0" # a machine without GPUs needs no CUDA libraries: take the version that it may have for CPUs
fi
pip install --quiet --editable ".[dev]"

selection=()
if ((EUID != 0)); then
    selection=(-m "not slurm")
    echo "NOT TESTED: the tests on a SLURM cluster need root" >&2
elif ! command -v slurmctld slurmd sbatch munged >/dev/null; then
    apt-get update --quiet
    DEBIAN_FRONTEND=noninteractive apt-get install --quiet --yes --no-install-recommends slurmctld slurmd slurm-client munge
fi

export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$VIRTUAL_ENV/torch_extensions}"
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 RAY_USAGE_STATS_ENABLED=0

ruff check
ruff format --check
mypy
pytest -q "${selection[@]}" "$@"
