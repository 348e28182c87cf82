#!/usr/bin/env bash
# Installs OpenOOD, which is on no package index, into .venv: from the checkout $OPENOOD_SOURCE,
# else from ~/.cache/fusenorm/OpenOOD, else from its public address, at the commit that
# this project is tested with. What is there already is left as it is.
set -euo pipefail
. "$(dirname "$0")/env.sh"
environment
source=${OPENOOD_SOURCE:-}
[ -d "$source" ] && source=$(cd "$source" && pwd)
cd "$ROOT"
python -c 'import sys; sys.exit(sys.version_info >= (3, 13))' ||
    fail "OpenOOD needs numpy 1, which Python 3.13 cannot have: set PYTHON to an older one and remove .venv"
command -v git >/dev/null || fail "OpenOOD comes by git, which is not installed: install git"

commit=3c35632
[ -n "$source" ] || { [ -d ~/.cache/fusenorm/OpenOOD ] && source=~/.cache/fusenorm/OpenOOD; } ||
    source=https://github.com/Jingkang50/OpenOOD
checkout=.venv/openood-$commit

# Before anything is installed: without a source the environment stays as it is.
if ! [ -d "$checkout" ]; then
    trap 'rm -rf "$checkout.part"' EXIT
    rm -rf "$checkout.part"
    export GIT_TERMINAL_PROMPT=0
    { git clone --quiet "$source" "$checkout.part" && git -C "$checkout.part" checkout --quiet "$commit"; } 2>/dev/null ||
        fail "OpenOOD at commit $commit cannot be had from $source: set OPENOOD_SOURCE to a checkout of it"
fi
environment openood
install() { python -m pip install --quiet --disable-pip-version-check "$@"; }
# libmr builds against the numpy that is installed, so not in an environment of its own.
python -c 'import libmr' 2>/dev/null ||
    { install setuptools wheel cython && install --no-build-isolation libmr; } ||
    fail "libmr, which OpenOOD imports, could not be built: see pip's message above, it needs a C++ compiler"
[ -d "$checkout" ] || mv "$checkout.part" "$checkout"
# Its packages are imported from the checkout: OpenOOD's own requirements name releases that are
# not to be had any more, and its configurations lie beside the package.
python - "$PWD/$checkout" <<'PY'
import pathlib, sys, sysconfig
pathlib.Path(sysconfig.get_path("purelib"), "openood-checkout.pth").write_text(sys.argv[1] + "\n")
PY
python -W ignore - <<'PY' || fail "OpenOOD is installed and cannot be imported: see Python's message above, or remove .venv and start anew"
import importlib.metadata as metadata
import openood.evaluation_api, openood.pipelines, openood.trainers  # noqa: E401
names = ("torch", "torchvision", "numpy", "scikit-learn", "scipy", "pandas", "faiss-cpu", "libmr")
print("OpenOOD imports, with", ", ".join(f"{n} {metadata.version(n)}" for n in names))
PY
