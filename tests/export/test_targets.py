"""Programs for every runtime that is installed, and programs that are calibrated again."""

import json
import shutil
import subprocess
from functools import partial
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from fusenorm_openood import Settings
from fusenorm_openood.cli.main import main
from fusenorm_openood.errors import CalibrationError, ConfigError, ExportError
from fusenorm_openood.export.program import run_all
from fusenorm_openood.export.recalibrate import recalibrate
from fusenorm_openood.export.targets import METADATA, TARGETS
from tests.docs.pages import ROOT, blocks
from tests.export.files import noise_images
from tests.export.programs import (
    assert_agrees,
    drawn_pixels,
    error,
    fitted,
    loaded,
    needs_export,
    write_images,
)
from tests.nets import Net

pytestmark = needs_export


def needs(name: str):
    """Skip unless everything that writes and runs a target is installed."""
    target = TARGETS[name]
    for package in filter(None, (*target.tools, target.runtime)):
        if find_spec(package) is None:
            pytest.skip(f"{name} needs {package}: pip install '.[{target.extra}]'")
    if name == "aoti" and shutil.which("g++") is None:
        pytest.skip("aoti needs a C++ compiler: install g++")
    return target


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n, t in TARGETS.items() if t.runtime and n != "pt2"])
def test_a_program_of_every_target_agrees(name, tmp_path):
    target, detector = needs(name), fitted(Net(), Settings(strong=("output",)))
    path = tmp_path / f"it{target.suffix}"
    exported = detector.export(path, dtype="float32", target=name)
    assert exported.difference < error(detector)
    run = partial(run_all, target, target.load(path))
    ties, far = drawn_pixels(39, 2), drawn_pixels(9, 3)
    far[0], far[1, :, ::2] = 0, 255
    assert_agrees(detector, lambda x: run(x.float().numpy()), torch.cat([ties, far]))
    images = far.float().numpy()
    images[1, 0, 3, 3], images[2, 1, 4, 4], images[3] = np.nan, np.inf, -np.inf
    assert run(images)["rank"][1:4].tolist() == [1, 1, 1]


@pytest.mark.slow
def test_core_ml_has_every_operation(tmp_path):
    needs("coreml")
    detector, path = fitted(Net()), tmp_path / "it.mlpackage"
    with pytest.raises(ConfigError, match="Core ML has no arrays of uint8: export with dtype"):
        detector.export(path)
    assert detector.export(path, dtype="float32").difference is None
    import coremltools

    specification = coremltools.models.MLModel(str(path), skip_model_load=True).get_spec()
    assert json.loads(specification.description.metadata.userDefined[METADATA])["max_rank"] == 2


@pytest.mark.parametrize("name", ["openvino", "executorch", "litert", "coreml"])
def test_a_tool_that_is_missing_is_one_sentence(name, tmp_path, monkeypatch):
    from fusenorm_openood.export import program

    monkeypatch.setattr(program, "find_spec", lambda package: None)
    path = tmp_path / f"it{TARGETS[name].suffix}"
    with pytest.raises(ExportError, match=rf"needs {TARGETS[name].tools[0]}, .*\[{name}\]'$"):
        fitted(Net()).export(path)


@pytest.mark.slow
def test_the_page_judges_an_image_in_node(tmp_path):
    node, module = shutil.which("node"), "require.resolve('onnxruntime-node')"
    if node is None or subprocess.run([node, "-e", module], capture_output=True).returncode:
        pytest.skip("needs Node.js and onnxruntime-node: npm install onnxruntime-node, NODE_PATH")
    detector, images = fitted(Net()), noise_images(6, 40, 50)
    detector.export(tmp_path / "it.onnx", resize_from=(40, 50))
    page = (ROOT / "docs" / "runtimes.md").read_text(encoding="utf-8")
    (code,) = [block.code for block in blocks(page) if block.language == "javascript"]
    (tmp_path / "judge.cjs").write_text(code, encoding="utf-8")
    verdicts = []
    for image in images:
        (tmp_path / "image.rgb").write_bytes(image.tobytes())
        command = [node, "judge.cjs", "it.onnx", "image.rgb", "39", "0.5"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        verdicts.append(json.loads(done.stdout)["ood"])
    assert verdicts == detector.is_ood(images, 0.5).tolist()


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """A program, and copies with static and dynamic quantisation."""
    from onnxruntime import quantization as q

    home = tmp_path_factory.mktemp("quantised")
    plain, static, dynamic = (home / f"{n}.onnx" for n in ("plain", "static", "dynamic"))
    detector = fitted(Net())
    detector.export(plain)

    class Reader(q.CalibrationDataReader):
        batches = iter(drawn_pixels(32, 5).numpy()[:, None])

        def get_next(self):
            image = next(self.batches, None)
            return None if image is None else {"image": image}

    convolutions = {"op_types_to_quantize": ["Conv", "MatMul", "Gemm"]}
    q.quantize_static(plain, static, Reader(), **convolutions)
    q.quantize_dynamic(plain, dynamic, **convolutions)
    return detector, home


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "static", "dynamic"])
def test_ranks_of_a_quantised_program_are_its_own(kind, quantised, tmp_path, capsys):
    import onnx

    _, home = quantised
    program, new = home / f"{kind}.onnx", tmp_path / "new.onnx"
    folder = write_images(tmp_path / "images", 99, 7)
    command = ["recalibrate", "--program", program, "--calibration-dir", folder, "--output", new]
    assert main([str(word) for word in [*command, "--acceptance", "0.9"]]) == 0
    assert "an image is OOD if rank <= 10 (acceptance 0.9)" in capsys.readouterr().out
    onnx.checker.check_model(new, full_check=kind == "plain")  # its sizes agree
    run = loaded(new)
    again = np.array([run(image[None])["rank"][0] for image in drawn_pixels(99, 7)])
    assert sorted(again) == list(range(2, 101))  # each is as large as itself: ties are exact
    fresh = np.array([run(image[None])["rank"][0] for image in drawn_pixels(300, 8)])
    assert 0.82 < (fresh > 10).mean() < 0.97  # Beta-binomial(300, 90, 10), 99.8 %


@pytest.mark.slow
def test_what_cannot_be_recalibrated(quantised, tmp_path):
    import onnx

    _, home = quantised
    folder = write_images(tmp_path / "images", 5, 7)
    program, images = home / "plain.onnx", sorted(folder.iterdir())
    with pytest.raises(ConfigError, match=r"only \.onnx and \.xml .* each into its like, got "):
        recalibrate(program, images, tmp_path / "a.xml")
    with pytest.raises(CalibrationError, match="needs at least 19 calibration images, got 5"):
        recalibrate(program, images, tmp_path / "a.onnx")
    model = onnx.load(program)
    (last,) = [node for node in model.graph.node if "confidence" in node.output]
    last.output[:] = ["exact"]  # what the quantisation of sums does
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(9), "lowest"))
    model.graph.node.append(onnx.helper.make_node("Max", ["exact", "lowest"], ["confidence"]))
    onnx.save(model, tmp_path / "clipped.onnx")
    more = sorted(write_images(tmp_path / "more", 30, 7).iterdir())
    with pytest.raises(ExportError, match="gives 30 of 30 images the same lowest confidence, and"):
        recalibrate(tmp_path / "clipped.onnx", more, tmp_path / "a.onnx")
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "old.onnx")
    with pytest.raises(ExportError, match=r"old\.onnx was not exported .*export the detector ag"):
        recalibrate(tmp_path / "old.onnx", images, tmp_path / "a.onnx")
    assert not (tmp_path / "a.onnx").exists()
