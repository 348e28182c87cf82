# Sourced by the other scripts. Sets ROOT, the project root, and defines
#   environment [EXTRA]     chooses the Python environment and puts it first on PATH
#   run_training ARGUMENTS  'fusenorm train' in $NPROC processes that share each batch
#   run_evaluation ARGUMENTS  scripts/eval_ood.py in $NPROC processes that share the images
#
# The environment is
#   1. the folder $FUSENORM_VENV, where that is set,
#   2. else the active environment (virtualenv or conda), where it can import the package,
#   3. else ROOT/.venv.
# 1 and 3 are created on first use, and the package with the extra (default: fast, the CPU kernel)
# is installed into them whenever pyproject.toml has changed; 2 is used as it is.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() {
    echo "$(basename "$0"): $*" >&2
    exit 1
}

environment() {
    local extra=${1:-fast} active=${VIRTUAL_ENV:-${CONDA_PREFIX:-}} venv=${FUSENORM_VENV:-$ROOT/.venv}
    if [ -z "${FUSENORM_VENV:-}" ] && [ -n "$active" ] && ! [ "$active" -ef "$venv" ]; then
        if suffices "$active" "$extra"; then
            echo "using the active environment $active"
            use "$active"
            return
        fi
        echo "the active environment $active lacks what this script needs, so $venv is used; to use" \
            "yours: python -m pip install -e '$ROOT[$extra]'"
    fi
    install_into "$venv" "$extra"
    use "$venv"
}

# Whether an environment can import the package and what an extra is for.
suffices() { # suffices ENVIRONMENT EXTRA
    local modules="fusenorm_openood torch"
    case $2 in
    test) modules+=" pytest pytest_cov xdist hypothesis jinja2 matplotlib playwright" ;;
    zoo) modules+=" pytest xdist timm transformers" ;;
    dev) modules+=" ruff mypy importlinter" ;;
    esac
    (cd / && "$1/bin/python" -c '
import sys
from importlib.util import find_spec
sys.exit(not all(map(find_spec, sys.argv[1:])))' $modules 2>/dev/null)
}

use() { # use ENVIRONMENT
    PYTHON_ENVIRONMENT=$1
    PATH=$1/bin:$PATH
    export PATH
}

install_into() { # install_into FOLDER EXTRA
    local venv=$1 extra=$2 stamp=$1/.installed-$2 python
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        python=$(find_python) || exit 1
        echo "creating $venv with $("$python" --version)"
        rm -rf "$venv"
        if ! "$python" -m venv "$venv"; then
            rm -rf "$venv"
            fail "cannot create a virtual environment: is python3-venv installed?"
        fi
    fi
    if ! cmp -s "$ROOT/pyproject.toml" "$stamp"; then
        echo "installing fusenorm-openood[$extra] into $venv; the first time this takes minutes (torch)"
        if ! command -v nvidia-smi >/dev/null && ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
            echo "there is no NVIDIA GPU: to save some GB, stop, and install torch's CPU build into $venv first" \
                "(PyTorch's page of installation has the command, for $venv/bin/pip)"
        fi
        (set -o pipefail && "$venv/bin/python" -m pip install --disable-pip-version-check \
            --progress-bar off -e "$ROOT[$extra]" |
            awk '/^ *(Downloading|Using cached) / { print; fflush() }') ||
            fail "installation failed: see pip's message above"
        cp "$ROOT/pyproject.toml" "$stamp"
    fi
}

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3 python3.14 python3.13 python3.12 python3.11 python3.10; do
        [ -n "$candidate" ] || continue
        if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 15))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "found no Python 3.10 to 3.14: install one, or set PYTHON to it"
}

run_training() {
    local count
    count=$(processes) || exit 1
    case $count in
    1) fusenorm train "$@" ;;
    *) torchrun --standalone --nproc-per-node "$count" -m fusenorm_openood.cli train "$@" ;;
    esac
}

run_evaluation() {
    local count
    count=$(processes) || exit 1
    set -- "$ROOT/scripts/eval_ood.py" --store "$ROOT/results/store" "$@"
    case $count in
    1) python "$@" ;;
    *) torchrun --standalone --nproc-per-node "$count" "$@" ;;
    esac
}

processes() {
    case ${NPROC:-1} in
    *[!0-9]* | 0*) fail "NPROC must be the number of processes, got $NPROC" ;;
    *) echo "${NPROC:-1}" ;;
    esac
}
