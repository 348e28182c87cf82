"""File in, verdict out: three runtimes judge hundreds of files alike."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest

from fusenorm_openood import FuseNorm, load_network
from fusenorm_openood.cli.main import main
from fusenorm_openood.data.benchmarks import image_loader, load_benchmark
from fusenorm_openood.data.preprocessing import Preprocessing
from fusenorm_openood.deployment.files import judge_files
from tests.docs.pages import ROOT, blocks
from tests.export.files import KINDS, write_files
from tests.export.programs import needs_export

pytestmark = needs_export
COUNT = 300
NEAR = 1e-4  # of confidences, within which a verdict may differ

# Appended to the recipe of the documentation, which has defined `session` and `pixels`.
JUDGE = """
names = ["logits", "confidence", "rank"]
paths = json.loads(sys.stdin.read())
rows = []
for first in range(0, len(paths), 64):
    images = np.stack([pixels(path) for path in paths[first : first + 64]])
    outputs = session.run(names, {"image": images})
    rows += zip(outputs[0].argmax(1).tolist(), *(o.tolist() for o in outputs[1:]))
rows = [(pred, conf, rank / (n + 1), rank <= max_rank(0.95, n)) for pred, conf, rank in rows]
assert not [name for name in sys.modules if name.startswith(("torch", "fusenorm"))]
print(json.dumps(rows))
"""


@pytest.fixture(scope="module")
def detector(digits, tmp_path_factory):
    """A detector of digits, and the folder of its files."""
    data_root, checkpoint = digits
    benchmark, net = load_benchmark("digits", data_root), load_network(checkpoint)
    detector = FuseNorm(net).fit(image_loader(benchmark.id["val"]))
    detector.calibrate(image_loader(benchmark.id["test"]))
    detector.preprocessing = Preprocessing(26, (24, 22), "bicubic", *benchmark.norm)
    detector.network_source = {"weights": str(checkpoint)}
    home = tmp_path_factory.mktemp("detector")
    detector.save(home / "digits.safetensors")
    arguments = ["export", "--detector", str(home / "digits.safetensors")]
    assert main([*arguments, "--output", str(home / "digits.onnx")]) == 0
    return detector, home


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Eight files of each kind."""
    return write_files(tmp_path_factory.mktemp("files") / "all", 8 * len(KINDS))


def recipe() -> str:
    """The documentation's recipe up to where it is used."""
    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    (code,) = (block.code for block in blocks(page) if "def pixels" in block.code)
    return code[: code.index("image = pixels(")]


def by_onnx(home, paths) -> list[list]:
    """Classes, confidences, p-values and verdicts of ONNX Runtime, in a process without torch."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{recipe()}{JUDGE}"],
        input=json.dumps([str(path) for path in paths]),
        capture_output=True, text=True, check=False, cwd=home,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def by_command(home, paths) -> list[list]:
    """The same of the saved detector, in a new process."""
    command = [sys.executable, "-m", "fusenorm_openood.cli", "score", "--num-workers", "0"]
    command += ["--detector", "digits.safetensors", str(paths[0].parent), "--csv", "out.csv"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=home)
    assert done.returncode == 0, done.stderr
    with (home / "out.csv").open(newline="", encoding="utf-8") as file:
        rows = {row["path"]: row for row in csv.DictReader(file)}
    given = [rows[str(path)] for path in paths]
    return [
        [int(r["predicted"]), float(r["confidence"]), float(r["p_value"]), r["ood"] == "True"]
        for r in given
    ]


@pytest.mark.slow
def test_hundreds_of_files_in_three_runtimes(detector, tmp_path):
    (detector, home), paths = detector, write_files(tmp_path / "all", COUNT)
    judged = [one for batch in judge_files(detector, paths) for one in batch]
    assert len(judged) == COUNT
    assert [one.error for one in judged if one.error] == []
    ours = [[int(one.predicted), one.confidence, one.p_value, one.ood] for one in judged]
    pred, conf, p, ood = map(np.array, zip(*ours, strict=True))
    k = int(0.05 * (len(detector.calibration_scores_) + 1) + 1e-9)
    threshold = detector.calibration_scores_[k - 1]  # an image below it is OOD at 0.95
    assert ood.tolist() == (conf < threshold).tolist()
    assert 0.2 < ood.mean() < 1
    near = np.abs(conf - threshold) <= NEAR
    for name, found in (
        ("the saved detector", by_command(home, paths)),
        ("ONNX Runtime", by_onnx(home, paths)),
    ):
        pred_, conf_, p_, ood_ = map(np.array, zip(*found, strict=True))
        differing = ood_ != ood
        difference = (np.abs(conf_ - conf) / np.maximum(np.abs(conf), 1)).max()  # as `export` does
        print(
            f"{name}: {differing.sum()} of {COUNT} verdicts differ, {near.sum()} files are within "
            f"{NEAR:g} of the threshold; largest difference of confidences {difference:.1e}"
        )
        # Beyond the limit of ID images, the last digit of a float32 norm counts 10^4 times.
        assert difference < 2 * NEAR
        assert not (differing & ~near).any()
        assert differing.sum() <= 2
        assert pred_.tolist() == pred.tolist()
        assert np.abs(p_ - p).max() <= 2 / (len(detector.calibration_scores_) + 1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_recipe_gives_the_pixels_of_the_preprocessing(kind, paths):
    """Bit for bit, for every kind of file."""
    code = recipe()
    head, tail = code[: code.index("session = ")], code[code.index("def pixels") :]
    preprocessing = Preprocessing(26, (24, 22), "bicubic", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    names = {"how": preprocessing.to_json()}
    exec(head.replace("import onnxruntime\n", "") + tail, names)
    for path in paths[list(KINDS).index(kind) :: len(KINDS)]:
        expected = preprocessing.read(path)
        pixels = names["pixels"](path)
        assert pixels.dtype == np.uint8
        np.testing.assert_array_equal(pixels.astype(np.float32) / 255, expected)
