#!/usr/bin/env bash
# The long version of the chaos tests, as root on a machine prepared by tests/run.sh; prints one table at the end:
#
#   bash tests/robustness/chaos.sh [arguments of pytest, as -k killed_again]
#
# An hour on two idle cores. LAD_DIST_CHAOS_SIGNALS=N is for fewer signals under SLURM than 20.
# The cost of saving and of the health checks is measured apart, with a real model: python tests/robustness/overhead.py
set -euo pipefail
cd "$(dirname "$0")/../.."
export LAD_DIST_CHAOS=long OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
exec pytest -s -q --timeout=0 tests/robustness/test_chaos.py tests/robustness/chaos_long.py "$@"
