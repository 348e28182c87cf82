"""`fusenorm export` of a small detector."""

import sys

import pytest

from fusenorm_openood import FuseNorm
from fusenorm_openood.cli.main import main
from fusenorm_openood.data.preprocessing import Preprocessing
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


@pytest.mark.parametrize("name", [pytest.param("it.onnx", marks=pytest.mark.slow), "new/it.pt2"])
def test_a_program_is_written_and_compared(name, saved, tmp_path, capsys):
    path = tmp_path / name
    assert export(saved, "--output", path) == 0
    exported, verdict, compared = capsys.readouterr().out.splitlines()
    assert exported == f"exported {path}: logits, confidence, rank"
    assert verdict == "an image is OOD if rank <= 2 (acceptance 0.95), 40 calibration images"
    about, _, difference = compared.rpartition(" ")
    assert about == "largest difference from PyTorch's confidences:"
    assert float(difference) < 1e-3
    assert sum(p.numel() for p in Net().parameters()) * 4 < path.stat().st_size  # all is inside
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_by_class_the_rank_is_that_of_the_predicted_class(saved, tmp_path, capsys):
    path, detector = tmp_path / "by.safetensors", FuseNorm.load(saved, Net())
    detector.calibrate([some_images(40, seed=2)], by="predicted", least=30).save(path)
    assert export(path, "--output", tmp_path / "it.pt2") == 0
    verdict = capsys.readouterr().out.splitlines()[1]
    of = "max_rank of its predicted class, which is 2 (acceptance 0.95), 40 calibration images"
    assert verdict == f"an image is OOD if rank <= {of}"


@pytest.mark.slow
def test_without_onnxruntime_it_says_so(saved, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert export(saved, "--output", tmp_path / "it.onnx", "--acceptance", "0.9") == 0
    assert "not compared with PyTorch: its runtime is not installed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "a.pt2", "--acceptance", "0.999"], "needs at least 999 calibration images"),
        (["--output", "a.pt2", "--weights", "absent.ckpt"], "absent.ckpt not found"),
        (["--output", "/dev/full/a.pt2"], "/dev/full/a.pt2 cannot be written"),
    ],
)
def test_errors(saved, capsys, arguments, message):
    assert export(saved, *arguments) == 1
    assert message in capsys.readouterr().err
