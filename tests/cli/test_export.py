"""`fusenorm export` of a small detector."""

import pytest

from fusenorm_openood import FuseNorm
from fusenorm_openood.cli.main import main
from fusenorm_openood.data.preprocessing import Preprocessing
from fusenorm_openood.export import program
from tests.export.programs import needs_export
from tests.nets import Net, some_images

pytestmark = needs_export


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The file of a calibrated detector."""
    detector = FuseNorm(Net()).fit([some_images(40)], calibration=[some_images(40, seed=2)])
    detector.preprocessing = Preprocessing(12, (12, 12), "bilinear", (0.5,) * 3, (0.25,) * 3)
    folder = tmp_path_factory.mktemp("saved")
    detector.save(folder / "it.safetensors")
    return folder / "it.safetensors"


def make():
    return Net()


def export(saved, *arguments) -> int:
    argv = ["export", "--detector", saved, "--network", f"{__name__}:make", *arguments]
    return main([str(argument) for argument in argv])


@pytest.mark.parametrize(
    "formats", [["pt2"], pytest.param(["onnx", "pt2"], marks=pytest.mark.slow)]
)
def test_programs_are_written_and_compared(formats, saved, tmp_path, capsys):
    paths = [tmp_path / "new" / f"it.{suffix}" for suffix in formats]
    assert export(saved, *(x for path in paths for x in (f"--{path.suffix[1:]}", path))) == 0
    lines = capsys.readouterr().out.splitlines()
    for path, exported, compared in zip(paths, lines[::2], lines[1::2], strict=True):
        assert exported == f"exported {path}: logits, confidence, p_value, ood"
        name, _, difference = compared.rpartition(" ")
        assert name == "largest difference from PyTorch's confidences:"
        assert float(difference) < 1e-5
        assert sum(p.numel() for p in Net().parameters()) * 4 < path.stat().st_size  # all is inside
    assert sorted((tmp_path / "new").iterdir()) == paths


@pytest.mark.slow
def test_without_onnxruntime_it_says_so(saved, tmp_path, capsys, monkeypatch):
    real = program.find_spec
    monkeypatch.setattr(program, "find_spec", lambda n: None if n == "onnxruntime" else real(n))
    assert export(saved, "--onnx", tmp_path / "it.onnx", "--acceptance", "0.9") == 0
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
