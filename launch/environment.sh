# Sourced in the repository's root. Makes .venv and activates it, unless an environment is active already.
#
#   install_lad_dist [extras]   installs the package into that environment, editable: install_lad_dist '[dev]'
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

install_lad_dist() {
    # Without GPUs a plain "torch" would bring gigabytes of CUDA; of this version the machine may have a file for CPUs.
    if ! command -v nvidia-smi >/dev/null && ! python -c "import torch" 2>/dev/null; then
        pip install --quiet "torch==2.13.0"
    fi
    pip install --quiet --editable ".${1:-}"
}
