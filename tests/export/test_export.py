"""Exported programs against the detector that they were made from."""

import json
import pickle

import numpy as np
import pytest
import torch

from fusenorm_openood import FuseNorm, Settings
from fusenorm_openood.errors import (
    CalibrationError,
    ConfigError,
    ExportError,
    FuseNormError,
    NotFittedError,
)
from fusenorm_openood.export import program, targets
from fusenorm_openood.export.judge import ERROR, Judge, thresholds
from fusenorm_openood.export.recalibrate import recalibrate
from fusenorm_openood.export.targets import METADATA
from fusenorm_openood.method.conformal import max_rank, rejects
from tests.conftest import assert_undisturbed, make_t2fnorm, state_of
from tests.export.programs import (
    PREPROCESSING,
    SIZE,
    assert_agrees,
    drawn_pixels,
    error,
    fitted,
    loaded,
    needs_export,
    normalised,
    write_images,
)
from tests.nets import CLASSES, Custom, Net

pytestmark = needs_export
FORMATS = (".onnx", ".pt2")
METHODS = {
    "fusenorm": Settings(),
    "deviation": Settings.deviation(),
    "published without a step": Settings.published(noise=0.0),
    "stages, MSP and ReAct": Settings(taps="stages", output="msp", react_percentile=80.0),
    "post-hoc experts": Settings(
        strong=("knn", "nci", "gen", "vim", "she"), weights=(1.0, 2.0, 0.0, 1.0, 1.0), clip=False
    ),
    "shaping": Settings(output="mls", strong=(1, "mls", "scale", "ash"), alpha=0.5, base=20.0),
    "cold energy": Settings(strong=("energy",), temperature=0.5, k_min=1.0, k_max=1.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stages, MSP and ReAct", "post-hoc experts"])
def test_settings_for_onnx(name, tmp_path):
    detector = fitted(Net(), METHODS[name])
    exported = detector.export(tmp_path / "detector.onnx")
    assert exported.difference < error(detector)
    run = loaded(exported.path)
    for count in (1, 3, 8):
        assert_agrees(detector, run, drawn_pixels(count, count))


class Stopped(FuseNormError):  # noqa: N818
    pass


DETECTORS = {name: lambda s=s: fitted(Net(), s) for name, s in METHODS.items()}
DETECTORS["T2FNorm"] = lambda: fitted(make_t2fnorm())  # whose logits are those of its classes


@pytest.mark.parametrize("name", DETECTORS)
def test_every_setting_before_it_is_traced(name, monkeypatch, tmp_path):
    """The arithmetic of all programs, in a module that is not made a program of."""

    def stop(judge, *given):
        raise Stopped(judge)

    monkeypatch.setattr(targets, "traced", stop)
    detector = DETECTORS[name]()
    with pytest.raises(Stopped) as stopped:
        detector.export(tmp_path / "detector.pt2")
    (judge,) = stopped.value.args

    def run(image):
        with torch.no_grad():
            return {n: o.numpy() for n, o in zip(judge.outputs, judge(image), strict=True)}

    for count in (1, 8):
        pixels = drawn_pixels(count, count)
        assert_agrees(detector, run, pixels)
        with torch.no_grad():
            logits = detector.net(normalised(pixels))
        np.testing.assert_allclose(run(pixels)["logits"], logits, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module", params=FORMATS)
def exported(request, tmp_path_factory):
    """A detector, its file, and the program in it."""
    detector = fitted(Net())
    detector.class_names = ("ant", "bee", "cat", "dog", "eel")
    path = tmp_path_factory.mktemp("exported") / f"detector{request.param}"
    assert detector.export(path, acceptance=0.9).difference < error(detector)
    return detector, path, loaded(path)


def test_images_that_are_constant(exported):
    detector, _, run = exported
    pixels = drawn_pixels(8, 3)
    pixels[0], pixels[1], pixels[2] = 0, 255, 128
    for part in (pixels, pixels[:1], pixels[:3]):
        assert_agrees(detector, run, part)


@pytest.mark.parametrize("n", [19, 39, 49, 199, 999])
def test_verdicts_with_ties_at_exact_acceptances(n):
    """Calibration images, which tie with themselves, and acceptances that are steps of p."""
    detector, pixels = fitted(Net(), calibrated=False), drawn_pixels(n, 2)
    detector.calibrate([normalised(pixels)])
    conf = detector.score(normalised(pixels)).numpy()
    images = len(detector.calibration_scores_)
    rank = 1 + (thresholds(detector.calibration_scores_) <= conf.astype(np.float32)[:, None]).sum(1)
    p = detector.p_values(normalised(pixels)).numpy()
    for k in range(1, images + 1, max(1, images // 40)):
        acceptance = 1 - k / (images + 1)
        assert max_rank(acceptance, images) == k
        differs = (rank <= k) != rejects(p, acceptance)
        gaps = np.abs(conf[differs, None] - detector.calibration_scores_)
        assert ((gaps > 0) & (gaps < 2 * ERROR)).any(1).all()  # none but near another score


def test_ranks_are_those_of_float64_or_larger():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=500) * 10.0 ** rng.integers(-3, 4, 500)
    exact = np.concatenate([scores, scores + 3 * ERROR * np.maximum(1, abs(scores))])
    rank = 1 + (scores <= exact[:, None]).sum(1)
    error = rng.uniform(-1, 1, len(exact)) * 0.99 * ERROR * np.maximum(1, abs(exact))
    conf = (exact + error).astype(np.float32)
    found = 1 + (thresholds(scores) <= conf[:, None]).sum(1)
    assert (found >= rank).all()
    gaps = scores - exact[:, None]
    near = ((gaps > 0) & (gaps < 2.01 * ERROR * np.maximum(1, abs(scores)))).sum(1)
    assert (found <= rank + near).all()


@pytest.fixture(scope="module")
def by_class():
    """A detector with scores for each predicted class, of which some are pooled."""
    net, images = Net(), normalised(drawn_pixels(60, 1))
    with torch.no_grad():
        net.fc.bias -= net(images).mean(0)
    detector = fitted(net)
    with pytest.warns(UserWarning, match="groups by predicted"):
        detector.calibrate([normalised(drawn_pixels(80, 2))], by="predicted", least=19)
    assert len(detector.calibration_.cells) > 2
    return detector


@pytest.mark.parametrize(
    "suffix", [".pt2", *(pytest.param(s, marks=pytest.mark.slow) for s in (".onnx", ".xml"))]
)
def test_ranks_by_predicted_class(suffix, by_class, tmp_path):
    if suffix == ".xml":
        pytest.importorskip("openvino")
    exported = by_class.export(tmp_path / f"detector{suffix}", acceptance=0.9)
    run, pixels = loaded(exported.path), torch.cat([drawn_pixels(80, 2), drawn_pixels(9, 3)])
    assert_agrees(by_class, run, pixels)
    found = run(pixels)
    most = np.array(exported.max_rank)[found["logits"].argmax(1)]
    assert (found["rank"] <= most).tolist() == by_class.is_ood(normalised(pixels), 0.9).tolist()
    assert len(exported.max_rank) == CLASSES
    if suffix != ".pt2":
        files = write_images(tmp_path / "images", 90, 5)
        again = tmp_path / f"again{suffix}"
        known = recalibrate(exported.path, sorted(files.iterdir()), again, 0.8)
        by_class = pickle.loads(pickle.dumps(by_class))
        by_class.calibrate([normalised(drawn_pixels(90, 5))], by="predicted")
        assert_agrees(by_class, loaded(again), pixels)
        assert known["max_rank"] == by_class.calibration_.max_ranks(0.8)


def test_groups_that_a_program_cannot_know(tmp_path):
    detector, images = fitted(Net()), normalised(drawn_pixels(40, 2))
    detector.calibrate([{"image": images, "camera": ["left"] * 40}], by="camera")
    with pytest.raises(ConfigError, match="a program cannot know the camera of an image"):
        detector.export(tmp_path / "detector.pt2")


def test_the_file_says_what_is_in_it(exported):
    detector, path, _ = exported
    if path.suffix == ".onnx":
        import onnx

        model = onnx.load(path)
        onnx.checker.check_model(model, full_check=True)
        (text,) = [entry.value for entry in model.metadata_props if entry.key == METADATA]
        assert [value.name for value in model.graph.input] == ["image"]
        sizes = model.graph.input[0].type.tensor_type.shape.dim
        assert [size.dim_param or size.dim_value for size in sizes] == ["batch", 3, SIZE, SIZE]
    else:
        files = {METADATA: ""}
        torch.export.load(path, extra_files=files)
        text = files[METADATA]
    known = json.loads(text)
    assert known["max_rank"] == max_rank(0.9, 39) == 4
    assert known["outputs"] == ["logits", "confidence", "rank"]
    assert known["class_names"] == list(detector.class_names)
    assert known["experts"] == list(detector.experts)
    assert known["preprocessing"] == json.loads(json.dumps(PREPROCESSING.to_json()))


def test_without_calibration_images_there_are_confidences_alone(tmp_path):
    detector = fitted(Net(), calibrated=False)
    exported = detector.export(tmp_path / "detector.pt2")
    assert exported.outputs == ("logits", "confidence")
    run = loaded(exported.path)
    found = run(drawn_pixels(3, 4))
    assert list(found) == ["logits", "confidence"]
    conf = detector.score(normalised(drawn_pixels(3, 4)))
    np.testing.assert_allclose(found["confidence"], conf, atol=error(detector))


def test_without_preprocessing_it_takes_what_the_network_takes(tmp_path):
    detector = fitted(Net())
    detector.preprocessing = None
    with pytest.raises(ConfigError, match=r"or give shape=\(C, H, W\)"):
        detector.export(tmp_path / "detector.pt2")
    run = loaded(detector.export(tmp_path / "detector.pt2", shape=(3, SIZE, SIZE)).path)
    images = normalised(drawn_pixels(4, 4))
    conf = detector.score(images)
    np.testing.assert_allclose(run(images)["confidence"], conf, atol=error(detector))
    images[1], images[2] = torch.nan, torch.inf
    found = run(images)
    assert np.isnan(found["confidence"]).tolist() == [False, True, True, False]
    assert found["rank"][1:3].tolist() == [1, 1]


def test_a_network_in_half_precision_is_exported_in_float32(tmp_path):
    net = Net().bfloat16()
    pixels = normalised(drawn_pixels(60, 1)).bfloat16()
    detector = FuseNorm(net, strong=("output",)).fit([pixels])
    detector.preprocessing = PREPROCESSING
    exported = detector.export(tmp_path / "detector.pt2")
    assert exported.difference < 1e-3
    conf = loaded(exported.path)(drawn_pixels(60, 1))["confidence"]
    np.testing.assert_allclose(conf, detector.score(pixels).numpy(), atol=0.5)
    assert next(net.parameters()).dtype == torch.bfloat16


class Branching(Net):
    """Its forward depends on values."""

    def forward(self, x):
        feature = self.feature(x)
        return self.fc(feature if feature.sum() > -1e9 else -feature)


def test_a_network_is_left_as_it_came(tmp_path):
    for net in (Net().train(), Branching().train()):  # exported, and not
        net.fc.weight.grad = torch.ones_like(net.fc.weight)
        net.stem.requires_grad_(False)
        net.fc.register_forward_hook(lambda *given: None)
        detector, before = fitted(net), state_of(net)
        if isinstance(net, Branching):
            with pytest.raises(ExportError, match=r"^torch.export cannot trace Branching \(.+\): "):
                detector.export(tmp_path / "detector.pt2")
        else:
            detector.export(tmp_path / "detector.pt2")
        assert_undisturbed(net, before)
        assert detector.net is net


def test_errors_leave_no_file(tmp_path, monkeypatch):
    net, path = Net(), tmp_path / "folder" / "detector.pt2"
    with pytest.raises(NotFittedError):
        FuseNorm(net).export(path)
    stepping = fitted(net, Settings.published())
    with pytest.raises(ConfigError, match=r"noise=0\.01 needs a gradient.*fit with noise=0, or"):
        stepping.export(path)
    detector = fitted(net)
    with pytest.raises(CalibrationError, match="needs at least 99 calibration images, got 39"):
        detector.export(path, acceptance=0.99)
    with pytest.raises(ConfigError, match=r"must end in .*\.onnx, which says what"):
        detector.export(path.with_suffix(".pb"))
    with pytest.raises(ConfigError, match=r"a program for onnx must end in \.onnx, got .*\.pt2"):
        detector.export(path, target="onnx")
    with pytest.raises(ConfigError, match="unknown target 'ncnn': choose from onnx, pt2"):
        detector.export(path, target="ncnn")
    with pytest.raises(ConfigError, match="dtype must be uint8 or float32, got 'int8'"):
        detector.export(path, dtype="int8")
    with pytest.raises(ConfigError, match=r"\(3, 16, 16\), got \(3, 8, 8\)"):
        detector.export(path, shape=(3, 8, 8))
    small, forward = fitted(net, Settings(strong=("output",))), Judge.forward
    monkeypatch.setattr(program, "TOLERANCE", -1.0)
    with pytest.raises(ExportError, match=r"differ from PyTorch's by .* was not written"):
        small.export(path)
    monkeypatch.setattr(program, "TOLERANCE", 10)
    monkeypatch.setattr(Judge, "forward", lambda self, x: (*forward(self, x)[:2], x[:, 0, 0, 0]))
    with pytest.raises(ExportError, match=r"gives ranks \[.*\] in place of \["):
        small.export(path)
    assert not path.parent.exists()


def test_an_old_torch_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.4.0+cpu")
    with pytest.raises(ExportError, match=r"^exporting needs torch 2\.9, this is 2\.4\.0\+cpu: "):
        fitted(Net()).export(tmp_path / "detector.pt2")


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package_is_one_sentence(package, tmp_path, monkeypatch):
    monkeypatch.setattr(program, "find_spec", lambda name: None if name == package else object())
    with pytest.raises(
        ExportError, match=rf"{package}, .*pip install 'fusenorm-openood\[export\]'"
    ):
        fitted(Net()).export(tmp_path / "detector.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_operation_that_onnx_lacks_is_a_typed_error(tmp_path):
    net = Custom(lambda net, x: Net.forward(net, x) + torch.special.bessel_j0(x).mean())
    with pytest.raises(ExportError, match=r"Custom cannot be .*bessel_j0.*: export it to .*\.pt2$"):
        fitted(net).export(tmp_path / "detector.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_cannot_be_copied_is_a_typed_error(tmp_path):
    net = Net()
    detector = fitted(net)
    net.kept = net.fc.weight * 2  # no leaf
    with pytest.raises(ExportError, match="Net cannot be copied"):
        detector.export(tmp_path / "detector.onnx")


@pytest.mark.slow
def test_a_program_takes_one_image_where_the_network_does_not(tmp_path):
    squeezing = Custom(lambda net, x: net.fc(net.feature(x)[..., None].squeeze()))
    detector = fitted(squeezing, Settings(strong=("output",)))
    run = loaded(detector.export(tmp_path / "detector.onnx").path)
    for count in (1, 2, 3):
        assert_agrees(detector, run, drawn_pixels(count, count))
