#!/usr/bin/env bash
# The whole journey in a few minutes, without a hub and without a GPU: bash launch/quickstart.sh [stage.key=value …]
#
# Installs into the active environment, or into .venv, which it makes. What it then does: python launch/quickstart.py --help
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh

if ! pip show --quiet lad_dist 2>/dev/null; then
    echo "Installing lad_dist and what it needs: a few minutes, once."
    install_lad_dist
fi
# Threads that spin while they wait slow a busy machine down many times; sleeping ones cost an idle one little.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
exec python launch/quickstart.py "$@"
