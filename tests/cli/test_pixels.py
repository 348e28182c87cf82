"""From `fusenorm fit` to the report and the program: images that are no 8-bit RGB."""

import json
import re

import numpy as np
import pytest
import torch
from torch import nn

from fusenorm_openood import FuseNorm
from fusenorm_openood.cli.main import main
from fusenorm_openood.deployment.rows import read_rows
from tests.data.test_pixels import write_dicom
from tests.nets import Net

SIZE, FIT, CALIBRATION, NEW = 16, 30, 24, 8
pytestmark = pytest.mark.filterwarnings("ignore:.*images:UserWarning")


class Channels(Net):
    channels = 1

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(self.channels, 8, 3, 1, 1)
        self.eval()


class Thirteen(Channels):
    channels = 13


SHOWN = ["--dtype", "float32", "--range", "0,4095", "--shown", "3,2,1"]
KINDS = {  # network, writes a file, options of fit, type of the program's input
    "DICOM": (Channels, 1, "dcm", ["--dtype", "float32", "--range=-1000,3095"], "float32"),
    "13 channels": (Thirteen, 13, "npy", ["--dtype", "uint16", "--bits", 12], "uint16"),
    "13 shown": (Thirteen, 13, "tif", SHOWN, "float32"),
}


def write(path, values, ending):
    """Values [C, H, W] of 12 bits as a file; what a program is given of it."""
    path = path.with_suffix(f".{ending}")
    if ending == "dcm":
        write_dicom(path, values[0], BitsStored=12, RescaleSlope=1, RescaleIntercept=-1000)
        return path, values - 1000.0
    if ending == "npy":
        np.save(path, values)
    else:
        tifffile = pytest.importorskip("tifffile")
        tifffile.imwrite(path, values, photometric="minisblack", planarconfig="separate")
    return path, values


FAST = "13 channels"  # an export takes seconds


@pytest.mark.parametrize(
    "name", [name if name == FAST else pytest.param(name, marks=pytest.mark.slow) for name in KINDS]
)
def test_verdicts_are_equal_from_the_file_to_the_program(tmp_path, name, monkeypatch):
    net, channels, ending, options, dtype = KINDS[name]
    random, inputs = np.random.default_rng(0), {}
    for folder, count in (("fit", FIT), ("calibration", CALIBRATION), ("new", NEW)):
        (tmp_path / folder).mkdir()
        for number in range(count):
            level = 4096 if number % 2 or folder != "new" else 60  # every second new one is dark
            shape = (channels, SIZE, SIZE)
            values = random.integers(0, level, shape).astype(np.uint16)
            values.flat[:2] = 0, 4095
            path, given = write(tmp_path / folder / f"{number:02}", values, ending)
            inputs[str(path)] = given.astype(dtype)
    monkeypatch.chdir(tmp_path)
    spec = f"{__name__}:{net.__name__}"
    quiet = ["--num-workers", 0, "--no-progress", "--device", "cpu"]
    norm = ",".join(["0.5"] * channels + ["0.3"] * channels)
    fit = ["fit", "--network", spec, "--id-dir", "fit", "--calibration-dir", "calibration"]
    fit += ["--image-size", SIZE, "--normalization", norm, "--output", "d", *options, *quiet]
    run = lambda *given: main(list(map(str, given)))  # noqa: E731
    assert run(*fit) == 0
    known = ["--detector", "d", "--network", spec]
    assert run("score", *known, tmp_path / "new", "--csv", "r.csv", *quiet) == 0
    rows = list(read_rows(tmp_path / "r.csv"))
    detector = FuseNorm.load("d", net())
    verdicts = [bool(detector.is_ood(row.path)) for row in rows]
    assert [row.ood for row in rows] == verdicts
    assert set(verdicts) == {True, False}

    pytest.importorskip("jinja2")
    assert run("report", *known, "--csv", "r.csv", "--output", "r.html", "--device", "cpu") == 0
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    says = "channel(s) 3, 2, 1" if "shown" in name else "the mean of 13 channels"
    assert (says in text) == (channels == 13)
    assert len(re.findall("data:image/png", text)) >= NEW

    onnxruntime = pytest.importorskip("onnxruntime")
    assert run("export", *known, "--output", "d.onnx") == 0
    again = ["--calibration-dir", "calibration", "--output", "again.onnx"]
    assert run("recalibrate", "--program", "d.onnx", *again) == 0
    for program in ("d.onnx", "again.onnx"):
        session = onnxruntime.InferenceSession(tmp_path / program)
        about = json.loads(session.get_modelmeta().custom_metadata_map["fusenorm.json"])
        assert about["dtype"] == dtype
        found = [session.run(None, {"image": inputs[row.path][None]})[2] for row in rows]
        assert [bool(rank <= about["max_rank"]) for (rank,) in found] == verdicts
    with torch.no_grad():
        first = detector.preprocessing.pixels(rows[0].path)
    np.testing.assert_allclose(first, inputs[rows[0].path], atol=1e-3)


def test_pages_are_rows(tmp_path, monkeypatch, capsys):
    tifffile = pytest.importorskip("tifffile")
    random = np.random.default_rng(0)
    for folder, pages in (("fit", FIT), ("calibration", CALIBRATION), ("new", 3)):
        (tmp_path / folder).mkdir()
        values = random.integers(0, 256, (pages, SIZE, SIZE)).astype(np.uint8)
        tifffile.imwrite(tmp_path / folder / "x.tif", values, photometric="minisblack")
    monkeypatch.chdir(tmp_path)
    spec, quiet = f"{__name__}:Channels", ["--num-workers", "0", "--no-progress"]
    fit = ["fit", "--network", spec, "--id-dir", "fit", "--calibration-dir", "calibration"]
    fit += ["--image-size", str(SIZE), "--normalization", "0.5,0.3", "--output", "d", *quiet]
    assert main([*fit, "--pages", "all"]) == 0
    assert f"fitted on {FIT} images" in capsys.readouterr().out
    score = ["score", "--detector", "d", "--network", spec, "new", "--csv", "r.csv", *quiet]
    assert main([*score, "--pages", "all"]) == 0
    rows = list(read_rows(tmp_path / "r.csv"))
    assert [row.path for row in rows] == [f"new/x.tif#page={n}" for n in (1, 2, 3)]
    assert len({row.confidence for row in rows}) == 3
    assert main([*score, "--pages", "all", "--resume"]) == 0
    assert list(read_rows(tmp_path / "r.csv")) == rows
    np.save(tmp_path / "new" / "y.npy", random.random((SIZE, SIZE)))
    assert main([*score, "--pages", "all", "--resume"]) == 3
    assert "--dtype float32 and --range" in (tmp_path / "r.csv").read_text()
