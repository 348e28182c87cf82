"""Detector files with a right checksum and nonsense inside, and files that name code."""

import copy
import sys
import types

import pytest
import torch

from fusenorm_openood import FuseNorm, Settings
from fusenorm_openood.cli.main import main
from fusenorm_openood.data.preprocessing import Preprocessing
from fusenorm_openood.errors import DetectorFileError
from fusenorm_openood.method.scores import POSTHOC
from fusenorm_openood.network.named import is_catalogued
from fusenorm_openood.storage.detector_file import Contents, read_contents, write_contents
from tests.nets import Net, some_images

IMAGES = some_images(40)
NEW = some_images(5, seed=3)
METHODS = {
    "default": Settings(),
    "joint": Settings(strong=("output", "a.1", "knn", "she", "vim", "nci"), react_percentile=90.0),
}


@pytest.fixture(scope="module", params=METHODS)
def kept(request, tmp_path_factory):
    """A network, its detector, and the contents of the detector's file."""
    net, path = Net(), tmp_path_factory.mktemp("kept") / "d"
    detector = FuseNorm(net, METHODS[request.param]).fit([IMAGES])
    by = "predicted" if request.param == "joint" else None
    detector.calibrate([some_images(30, seed=2)], by=by, least=1)
    detector.preprocessing = Preprocessing(12, (12, 12), "bilinear", (0.5,) * 3, (0.25,) * 3)
    detector.class_names, detector.network_source = tuple("abcde"), {"network": "timm:resnet18"}
    detector.save(path)
    contents = read_contents(path)
    del contents.record["format"], contents.record["checksum"]
    return net, detector.score(NEW), contents, path.with_name("changed")


def loaded(kept, change):
    """The detector of a file that is changed in one place, with a right checksum."""
    net, _, contents, path = kept
    record, tensors = copy.deepcopy(contents.record), dict(contents.tensors)
    change(record, tensors)
    write_contents(path, Contents(tensors, record))
    return FuseNorm.load(path, net)


def places(value, path=()):
    """The paths to a few parts of nested records: the first entries of each."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in list(inside)[: None if len(path) < 2 else 2]:
        if isinstance(item, dict | list | tuple):
            yield from places(item, (*path, key))
        else:
            yield (*path, key)


def put(record, path, value):
    *outer, last = path
    for key in outer:
        record = record[key]
    if value is Ellipsis:
        del record[last]
    else:
        record[last] = value


FEW = (..., "nonsense", -1)
VALUES = (*FEW, None, True, [], {"a": 1}, float("nan"), 10**400)
CASES = [("default", v) for v in VALUES] + [("joint", v) for v in FEW]


@pytest.mark.parametrize(("kept", "value"), CASES, indirect=["kept"], ids=lambda v: str(v)[:8])
def test_no_part_of_the_record_can_be_nonsense(kept, value):
    for path in filter(None, places(kept[2].record)):
        try:
            detector = loaded(kept, lambda record, _, path=path: put(record, path, value))
        except DetectorFileError:
            continue
        score = detector.score(NEW)  # it is a text for people, or another setting
        if path[0] in ("settings", "thresholds") or path[1:3] == ("head", "shares"):
            assert score.isfinite().all(), path
        else:
            torch.testing.assert_close(score, kept[1], msg=str(path))


TENSORS = {
    "missing": lambda t: None,
    "of another type": lambda t: t.half() if t.is_floating_point() else t.double(),
    "of another precision": lambda t: t.float() if t.dtype == torch.float64 else t.double(),
    "shorter": lambda t: t[1:] if t.ndim else t[None],
    "narrower": lambda t: t[..., :-1] if t.ndim else t[None, None],
    "with one more axis": lambda t: t[None],
    "NaN": lambda t: torch.full_like(t, float("nan")) if t.is_floating_point() else -t - 1,
    "infinite": lambda t: torch.full_like(t, float("inf")) if t.is_floating_point() else -t - 1,
    "too large to be squared": lambda t: t * 0 + 1e30 if t.is_floating_point() else -t - 1,
}


@pytest.mark.parametrize("change", TENSORS.values(), ids=TENSORS)
def test_no_tensor_can_be_nonsense(kept, change):
    for name in kept[2].tensors:

        def changed(_, tensors, name=name):
            tensors[name] = change(tensors[name])
            if tensors[name] is None:
                del tensors[name]

        known = name in ("reference", "reference.marks")
        if known and change is TENSORS["too large to be squared"]:
            continue
        free = name.endswith((".features", ".residual"))
        if free and change in (TENSORS["shorter"], TENSORS["narrower"]):
            continue  # fewer images or directions, or of another width: told below
        if (name, change) == ("id_scores", TENSORS["narrower"]):
            continue  # fewer images
        with pytest.raises(DetectorFileError) as caught:
            loaded(kept, changed)
        named = [
            name,
            *(n for n in kept[2].tensors if n.partition(".")[0] == name.partition(".")[0]),
        ]
        assert any(part in str(caught.value) for part in named), (name, caught.value)


EXAMPLES = {
    "strong": lambda r, t: r.update(strong=["output", "nobody"]),
    "id_scores: percentiles": lambda r, t: t.update(id_scores=torch.zeros_like(t["id_scores"])),
    "reference belongs": lambda r, t: r.update(calibration=None),
    "reference.group": lambda r, t: t.update({"reference.group": t["reference.group"] + 5}),
    "calibration.history": lambda r, t: r["calibration"]["history"][0].update(images=29),
    "calibration.history must be of times": lambda r, t: r["calibration"]["history"][0].update(
        when="in May"
    ),
    "state.9.mean": lambda r, t: t.update({"state.9.mean": torch.zeros(3)}),
    "class_names": lambda r, t: r.update(class_names=["a", "b"]),
    "structure.runs": lambda r, t: r["structure"]["runs"].update(nobody=1),
    "settings": lambda r, t: r["settings"].update(cap=-1.0),
    "structure.smallest_batch": lambda r, t: r["structure"].update(smallest_batch=2**40),
    "preprocessing": lambda r, t: r["preprocessing"].update(crop=[12, 0]),
}


@pytest.mark.parametrize("field", EXAMPLES)
def test_the_message_names_the_field_and_does_not_blame_the_network(kept, field):
    with pytest.raises(DetectorFileError, match=f"holds what no fit has given .*{field}") as caught:
        loaded(kept, EXAMPLES[field])
    assert "was made with" not in str(caught.value)


@pytest.mark.parametrize("kept", ["default", "joint"], indirect=True)
@pytest.mark.parametrize("width", [7, 16])
def test_states_of_another_width_are_told(kept, width):
    def change(record, tensors):
        for number, (expert, _) in enumerate(record["posthoc"]):
            for name, letters in POSTHOC[expert].state.items():
                for axis, letter in enumerate(letters.split()):
                    if letter == "D":
                        t = tensors[f"state.{number}.{name}"]
                        index = torch.arange(width) % t.shape[axis]
                        tensors[f"state.{number}.{name}"] = t.index_select(axis, index)

    with pytest.raises(DetectorFileError, match=r"state\.\d\.\w+ must be of width 8"):
        loaded(kept, change)


CODE = """
from pathlib import Path
Path({mark!r}).touch()
def make(num_classes=5):
    Path({mark!r}).touch()
"""


@pytest.mark.parametrize("kept", ["default"], indirect=True)
@pytest.mark.parametrize(
    ("command", "spec"),
    [
        ("score", "evilnet:make"),
        ("report", "evilnet:make"),
        ("export", "evilnet:make"),
        ("score", "os:system"),
        ("score", "timm:hf-hub:me/evil"),
        ("score", "evilnet.a:b"),
    ],
)
def test_no_command_runs_code_that_a_file_names(kept, command, spec, tmp_path, monkeypatch, capsys):
    _, _, contents, _ = kept
    mark, path = tmp_path / "ran", tmp_path / "d"
    (tmp_path / "evilnet.py").write_text(CODE.format(mark=str(mark)))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "timm", None)  # is not asked about such a name
    write_contents(
        path, Contents(contents.tensors, {**contents.record, "source": {"network": spec}})
    )
    more = {
        "score": [str(tmp_path)],
        "report": ["--csv", str(path), "--output", str(tmp_path / "r.html")],
        "export": ["--output", str(tmp_path / "a.onnx")],
    }
    assert main([command, "--detector", str(path), *more[command]]) == 1
    error = capsys.readouterr().err
    assert spec in error
    assert "--network" in error
    assert "evilnet" not in sys.modules
    assert not mark.exists()


@pytest.mark.parametrize("kept", ["default"], indirect=True)
@pytest.mark.parametrize(
    "weights", ["https://a.b/c.pt", "s3://a/b", r"\\host\share\a.pt", "//host/a.pt", "data:,a"]
)
def test_weights_that_a_file_names_are_not_fetched(kept, weights, tmp_path, capsys):
    _, _, contents, _ = kept
    source = {"weights": weights}
    write_contents(
        tmp_path / "d", Contents(contents.tensors, {**contents.record, "source": source})
    )
    assert main(["score", "--detector", str(tmp_path / "d"), str(tmp_path)]) == 1
    assert "--weights" in capsys.readouterr().err


def test_of_two_packages_only_what_they_list_is_followed(monkeypatch):
    names = {"resnet18", "resnet18.a1_in1k"}
    timm = types.SimpleNamespace(is_model=names.__contains__)
    monkeypatch.setitem(sys.modules, "timm", timm)
    followed = ["torchvision:resnet18", "torchvision:vit_b_16", "torchvision:quantized_resnet18"]
    followed += [f"timm:{name}" for name in names]
    assert all(map(is_catalogued, followed))
    refused = ["torchvision:fcn_resnet50", "torchvision:fasterrcnn_resnet50_fpn"]
    refused += ["torchvision:nobody", "torchvision:models.resnet18", "torchvision:", "timm:"]
    refused += ["timm:nobody", "timm:hf-hub:a/b", "timm:hf_hub:a/b", "timm:local-dir:/tmp/a"]
    refused += ["timm:../a", "timm:a/b", "timm.models:resnet18", "os:system", "builtins:eval"]
    refused += ["fusenorm_openood.cli.main:main", "TIMM:resnet18", "resnet18", "package:factory"]
    refused += ["timm:resnet18\n", " timm:resnet18", "timm:resnet18 ", "timm:résnet18", ""]
    assert not [spec for spec in refused if is_catalogued(spec)]
