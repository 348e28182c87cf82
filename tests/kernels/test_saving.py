"""Compiled kernels that cannot be saved: they are compiled in each process, and work."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fusenorm_openood
from tests.conftest import without_environment

pytest.importorskip("numba")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="simulated with POSIX means")

CODE = """
import resource, sys, warnings, torch
from fusenorm_openood import atf, kernels
x = torch.randn(2, 3, 6, 6)
if "full" in sys.argv:
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    norms = atf(x), atf(x)
(warning,) = caught
print(warning.message)
assert kernels.backend().name == "numba"
for norm in norms:
    torch.testing.assert_close(norm, atf(x.double()).float())
"""


@pytest.mark.parametrize("disk", ["read-only", "full"])
def test_one_warning_says_so(disk, tmp_path):
    """A regular file at each cache path simulates a read-only folder, even for root."""
    package = tmp_path / "package" / "fusenorm_openood"
    source = Path(fusenorm_openood.__file__).parent
    shutil.copytree(source, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "kernels" / "__pycache__").touch()
    home = str(package / "kernels" / "__pycache__")
    places = {"HOME": home, "XDG_CACHE_HOME": home, "PYTHONPATH": str(package.parent)}
    if disk == "full":
        places["NUMBA_CACHE_DIR"] = str(tmp_path / "cache")
    env = without_environment(**places)
    if disk == "read-only":
        env.pop("NUMBA_CACHE_DIR", None)
    done = subprocess.run(
        [sys.executable, "-c", CODE, disk],
        env=env, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the compiled CPU kernels cannot be saved (")
    assert ("File too large" in done.stdout) == (disk == "full")
    assert "\n" not in done.stdout.strip()
    assert "so each process compiles them anew: set NUMBA_CACHE_DIR" in done.stdout
