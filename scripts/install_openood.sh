#!/usr/bin/env bash
# Installs OpenOOD, which is on no package index, into the environment that the scripts use (see
# env.sh): from the checkout $OPENOOD_SOURCE, else from ~/.cache/fusenorm/OpenOOD, else from its
# public address, at the commit that this project is tested with.
set -euo pipefail
. "$(dirname "$0")/env.sh"
environment
source=${OPENOOD_SOURCE:-}
[ -d "$source" ] && source=$(cd "$source" && pwd)
cd "$ROOT"
python -c 'import sys; sys.exit(sys.version_info >= (3, 13))' ||
    fail "OpenOOD needs numpy 1, which Python 3.13 does not support: use Python 3.10 to 3.12 (set PYTHON)"
command -v git >/dev/null || fail "OpenOOD is installed with git, which is missing: install git"

commit=3c35632
[ -n "$source" ] || { [ -d ~/.cache/fusenorm/OpenOOD ] && source=~/.cache/fusenorm/OpenOOD; } ||
    source=https://github.com/Jingkang50/OpenOOD
checkout=$PYTHON_ENVIRONMENT/openood-$commit

# Before anything is installed: without a source the environment stays as it is.
if ! [ -d "$checkout" ]; then
    trap 'rm -rf "$checkout.part"' EXIT
    rm -rf "$checkout.part"
    export GIT_TERMINAL_PROMPT=0
    { git clone --quiet "$source" "$checkout.part" && git -C "$checkout.part" checkout --quiet "$commit"; } 2>/dev/null ||
        fail "cannot get OpenOOD at commit $commit from $source: set OPENOOD_SOURCE to a checkout of it"
fi
install() { python -m pip install --quiet --disable-pip-version-check "$@"; }
install -e "$ROOT[openood]" || fail "installation failed: see pip's message above"
# libmr builds against the installed numpy, not in an isolated build environment.
python -c 'import libmr' 2>/dev/null ||
    { install setuptools wheel cython && install --no-build-isolation libmr; } ||
    fail "cannot build libmr, which OpenOOD imports: see pip's message above; it needs a C++ compiler"
[ -d "$checkout" ] || mv "$checkout.part" "$checkout"
# Its packages are imported from the checkout: its own requirements name releases that no longer
# exist, and its configurations lie beside the package.
python - "$checkout" <<'PY'
import pathlib, sys, sysconfig
pathlib.Path(sysconfig.get_path("purelib"), "openood-checkout.pth").write_text(sys.argv[1] + "\n")
PY
python -W ignore - <<'PY' || fail "OpenOOD is installed but cannot be imported: see Python's message above"
import importlib.metadata as metadata
import openood.evaluation_api, openood.pipelines, openood.trainers  # noqa: E401
names = ("torch", "torchvision", "numpy", "scikit-learn", "scipy", "pandas", "faiss-cpu", "libmr")
print("OpenOOD imports, with", ", ".join(f"{n} {metadata.version(n)}" for n in names))
PY
