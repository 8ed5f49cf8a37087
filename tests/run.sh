#!/usr/bin/env bash
# All checks, on a Debian machine with nothing prepared: bash tests/run.sh [arguments of pytest]
#
# Installs into the active virtual environment, or into .venv, which it makes. As root it also installs the Debian packages
# that are missing; otherwise it leaves out the tests that need root: those on a SLURM cluster, on a full disk, and under strace.
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(slurmctld slurmd slurm-client munge strace)
selection=()
if ((EUID != 0)); then
    selection=(-m "not slurm and not root")
    printf '%s\n' "" "NOT ROOT: the tests that need it (markers slurm and root) are LEFT OUT" "" >&2
elif ! dpkg --status "${packages[@]}" &>/dev/null; then
    apt-get -qq update
    DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends "${packages[@]}"
fi

source launch/environment.sh
install_lad_dist "[dev]"

export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 RAY_USAGE_STATS_ENABLED=0

ruff check
ruff format --check
mypy
lint-imports
pytest -q "${selection[@]}" "$@"
