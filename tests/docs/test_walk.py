"""The way through docs/deploy.md, each step in a process of its own, with the commands it shows."""

import csv
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, blocks
from tests.docs.test_pages import RUN
from tests.export.programs import CAN_EXPORT
from tests.report.test_browser import BROWSERS

PAGE = ROOT / "docs" / "deploy.md"
CODE = [(b.language, b.code) for b in blocks(PAGE.read_text(encoding="utf-8")) if not b.reason]


@pytest.fixture(scope="module")
def home(digits, tmp_path_factory) -> Path:
    """A folder as `fusenorm digits` leaves it, with a broken image among those to be judged."""
    home = tmp_path_factory.mktemp("walk")
    shutil.copytree(digits[1].parent, home / "results" / RUN / "s0")
    shutil.copytree(digits[0], home / "data")
    (home / "data" / "images_digits" / "test_noise" / "broken.png").write_text("no image")
    return home


def fusenorm(home: Path, command: str, *more: str) -> subprocess.CompletedProcess[str]:
    """Run the page's command of this name."""
    lines = [line for language, code in CODE if language == "bash" for line in code.splitlines()]
    (line,) = [line for line in lines if line.startswith(f"fusenorm {command} ")]
    words = [sys.executable, "-m", "fusenorm_openood.cli", *shlex.split(line)[1:], *more]
    return subprocess.run(words, cwd=home, capture_output=True, text=True, check=False)


def python(home: Path, code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=home, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not CAN_EXPORT, reason="needs the extra export and its torch")
def test_fit_score_report_export_and_onnx_runtime(home):
    fitted = fusenorm(home, "fit")
    assert fitted.returncode == 0, fitted.stderr
    assert "calibrated on 253 images" in fitted.stdout

    judged = fusenorm(home, "score")
    assert judged.returncode == 3, judged.stderr
    assert "1 unreadable" in judged.stderr
    with (home / "judged.csv").open(newline="", encoding="utf-8") as file:
        rows = {Path(row["path"]).name: row for row in csv.DictReader(file)}
    assert "cannot be read" in rows.pop("broken.png")["error"]

    loaded = python(
        home,
        "import json, sys\n"
        "from fusenorm_openood import FuseNorm, load_network\n"
        f"net = load_network('results/{RUN}/s0/best.ckpt')\n"
        "detector = FuseNorm.load('digits.safetensors', net)\n"
        "paths = [f'data/images_digits/test_noise/{i:04}.png' for i in range(20)]\n"
        "print(json.dumps([bool(detector.is_ood(path)) for path in paths]))\n",
    )
    verdicts = [rows[f"{number:04}.png"]["ood"] == "True" for number in range(20)]
    assert json.loads(loaded) == verdicts

    reported = fusenorm(home, "report")
    assert reported.returncode == 0, reported.stderr
    page = home / reported.stdout.split()[-1]
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is not None:
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", page.as_uri()]
        shown = subprocess.run([browser, *options], capture_output=True, text=True, check=True)
        assert shown.stdout.count("<svg") >= 5
        assert "broken.png" in shown.stdout

    exported = fusenorm(home, "export")
    assert exported.returncode == 0, exported.stderr
    (recipe,) = [code for language, code in CODE if language == "python" and "def pixels" in code]
    judge = (
        "import sys\n"
        "paths = [f'data/images_digits/test_noise/{i:04}.png' for i in range(20)]\n"
        "images = np.stack([pixels(path) for path in paths])\n"
        "assert 'torch' not in sys.modules\n"
        "(rank,) = session.run(['rank'], {'image': images})\n"
        "print(json.dumps((rank <= known['max_rank']).tolist()))\n"
    )
    carried = python(home, recipe + judge)
    assert json.loads(carried.splitlines()[-1]) == verdicts
