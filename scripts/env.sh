# Sourced by the other scripts: sets ROOT, the project root, and puts the project's virtual
# environment ROOT/.venv first on PATH. On first use, and whenever pyproject.toml has changed, it
# installs what the caller asks for: environment [EXTRA], with the CPU's kernel if it names none.
# run_training trains a network.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() {
    echo "$(basename "$0"): $*" >&2
    exit 1
}

python_for_venv() {
    local candidate
    for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 python3.10; do
        [ -n "$candidate" ] || continue
        if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.10 to 3.13 found: install one, or set PYTHON to it"
}

environment() {
    local extra=${1:-fast} venv=$ROOT/.venv stamp python
    stamp=$venv/.installed-$extra
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        python=$(python_for_venv) || exit 1
        echo "creating .venv with $("$python" --version)"
        rm -rf "$venv"
        if ! "$python" -m venv "$venv"; then
            rm -rf "$venv"
            fail "no virtual environment could be made: is python3-venv installed?"
        fi
    fi
    if ! cmp -s "$ROOT/pyproject.toml" "$stamp"; then
        echo "installing fusenorm-openood[$extra] into .venv; the first time this takes some minutes (torch)"
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e "$ROOT[$extra]" ||
            fail "installation failed: see pip's message above"
        cp "$ROOT/pyproject.toml" "$stamp"
    fi
    PATH=$venv/bin:$PATH
    export PATH
}

# 'fusenorm train' in $NPROC processes that share the work: run_training ARGUMENTS.
run_training() {
    case ${NPROC:-1} in
    1) fusenorm train "$@" ;;
    *[!0-9]* | 0*) fail "NPROC=$NPROC found: give the number of processes" ;;
    *) torchrun --standalone --nproc-per-node "$NPROC" -m fusenorm_openood.cli train "$@" ;;
    esac
}
