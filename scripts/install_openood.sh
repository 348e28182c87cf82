#!/usr/bin/env bash
# Installs OpenOOD, which is on no package index, into .venv: from the checkout $OPENOOD_SOURCE,
# else from ~/.cache/fusenorm/OpenOOD, else from its public address, at the commit that
# this project is tested with.
set -euo pipefail
. "$(dirname "$0")/env.sh"
environment
cd "$ROOT"
python -c 'import sys; sys.exit(sys.version_info >= (3, 13))' ||
    fail "OpenOOD needs numpy 1, which Python 3.13 cannot have: set PYTHON to an older one and remove .venv"
environment openood

commit=3c35632
source=${OPENOOD_SOURCE:-}
[ -n "$source" ] || { [ -d ~/.cache/fusenorm/OpenOOD ] && source=~/.cache/fusenorm/OpenOOD; } ||
    source=https://github.com/Jingkang50/OpenOOD
checkout=.venv/openood-$commit

if ! [ -d "$checkout" ]; then
    trap 'rm -rf "$checkout.part"' EXIT
    rm -rf "$checkout.part"
    git clone --quiet "$source" "$checkout.part" && git -C "$checkout.part" checkout --quiet "$commit" ||
        fail "OpenOOD at commit $commit cannot be had from $source: set OPENOOD_SOURCE to a checkout of it"
    mv "$checkout.part" "$checkout"
fi
# libmr builds against the numpy that is installed, so not in an environment of its own.
python -c 'import libmr' 2>/dev/null ||
    python -m pip install --quiet --disable-pip-version-check setuptools wheel cython
python -c 'import libmr' 2>/dev/null ||
    python -m pip install --quiet --disable-pip-version-check --no-build-isolation libmr
# Its packages are imported from the checkout: OpenOOD's own requirements name releases that are
# not to be had any more, and its configurations lie beside the package.
python - "$PWD/$checkout" <<'PY'
import pathlib, sys, sysconfig
pathlib.Path(sysconfig.get_path("purelib"), "openood-checkout.pth").write_text(sys.argv[1] + "\n")
PY
python -W ignore - <<'PY'
import importlib.metadata as metadata
import openood.evaluation_api, openood.pipelines, openood.trainers  # noqa: E401
names = ("torch", "torchvision", "numpy", "scikit-learn", "scipy", "pandas", "faiss-cpu", "libmr")
print("OpenOOD imports, with", ", ".join(f"{n} {metadata.version(n)}" for n in names))
PY
