"""With OpenOOD absent or broken."""

import subprocess
import sys

from fusenorm_openood.openood.bridge import MinimalBasePostprocessor, base_postprocessor


def test_without_openood_the_base_is_minimal(monkeypatch):
    monkeypatch.setitem(sys.modules, "openood", None)
    assert base_postprocessor() is MinimalBasePostprocessor


def test_a_broken_openood_is_reported_and_the_rest_still_works(tmp_path):
    (tmp_path / "openood").mkdir()
    (tmp_path / "openood" / "__init__.py").write_text("raise AttributeError('np.sctypes is gone')")
    code = (
        "import warnings; warnings.simplefilter('always')\n"
        "from fusenorm_openood import FuseNormPostprocessor as P\n"
        "assert P.__base__.__name__ == 'MinimalBasePostprocessor'\n"
        "from fusenorm_openood import register\n"
        "register()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env={"PYTHONPATH": f"{tmp_path}:{':'.join(p for p in sys.path if p)}", "PATH": ""},
    )  # fmt: skip
    assert "RuntimeWarning: FuseNormPostprocessor is not a subclass of OpenOOD" in done.stderr
    assert "OpenOODError: OpenOOD is installed but cannot be imported" in done.stderr
