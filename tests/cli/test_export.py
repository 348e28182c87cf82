"""`fusenorm export` of a detector for digits."""

import pytest

from fusenorm_openood import FuseNorm, load_network
from fusenorm_openood.cli.main import main
from fusenorm_openood.data.benchmarks import image_loader, load_benchmark
from fusenorm_openood.data.preprocessing import Preprocessing
from fusenorm_openood.export import program
from tests.export.programs import needs_export

pytestmark = needs_export


@pytest.fixture(scope="module")
def saved(digits, tmp_path_factory):
    """The file of a calibrated detector."""
    data_root, checkpoint = digits
    benchmark = load_benchmark("digits", data_root)
    detector = FuseNorm(load_network(checkpoint)).fit(image_loader(benchmark.id["val"]))
    detector.calibrate(image_loader(benchmark.id["test"]))
    detector.preprocessing = Preprocessing(24, (24, 24), "bilinear", *benchmark.norm)
    detector.network_source = {"weights": str(checkpoint)}
    path = tmp_path_factory.mktemp("saved") / "digits.safetensors"
    detector.save(path)
    return path


def export(saved, *arguments) -> int:
    return main(["export", "--detector", str(saved), *map(str, arguments)])


def test_both_programs_are_written_and_compared(saved, tmp_path, capsys):
    onnx, pt2 = tmp_path / "digits.onnx", tmp_path / "new" / "digits.pt2"
    assert export(saved, "--onnx", onnx, "--pt2", pt2) == 0
    lines = capsys.readouterr().out.splitlines()
    for path, (exported, compared) in zip((onnx, pt2), (lines[:2], lines[2:]), strict=True):
        assert exported == f"exported {path}: logits, confidence, p_value, ood"
        name, _, difference = compared.rpartition(" ")
        assert name == "largest difference from PyTorch's confidences:"
        assert float(difference) < 1e-5
        assert path.stat().st_size > 1e6  # the network is inside
    assert sorted(p.name for p in tmp_path.iterdir()) == ["digits.onnx", "new"]


def test_without_onnxruntime_it_says_so(saved, tmp_path, capsys, monkeypatch):
    real = program.find_spec
    monkeypatch.setattr(program, "find_spec", lambda n: None if n == "onnxruntime" else real(n))
    assert export(saved, "--onnx", tmp_path / "digits.onnx", "--acceptance", "0.9") == 0
    assert "not compared with PyTorch: onnxruntime is not installed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --onnx FILE.onnx, --pt2 FILE.pt2, or both"),
        (["--onnx", "digits.pt2"], "--onnx must name a file that ends in .onnx, got digits.pt2"),
        (["--pt2", "digits"], "--pt2 must name a file that ends in .pt2, got digits"),
        (["--pt2", "a.pt2", "--acceptance", "0.999"], "needs at least 999 calibration images"),
        (["--pt2", "a.pt2", "--weights", "absent.ckpt"], "absent.ckpt not found"),
        (["--pt2", "/dev/full/a.pt2"], "/dev/full/a.pt2 cannot be written"),
    ],
)
def test_errors(saved, capsys, arguments, message):
    assert export(saved, *arguments) == 1
    assert message in capsys.readouterr().err
