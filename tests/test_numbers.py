"""Numbers of NumPy and torch are numbers wherever a number is given; bools are none."""

import json
from dataclasses import asdict
from fractions import Fraction

import numpy as np
import pytest
import torch

from fusenorm_openood import FuseNorm, Settings, atf, fuse
from fusenorm_openood.data.preprocessing import Preprocessing
from fusenorm_openood.detectors.search import candidates
from fusenorm_openood.detectors.single import SingleScore
from fusenorm_openood.errors import ConfigError, number, numbers, whole
from fusenorm_openood.method.conformal import guarantee, needed_images, rejects, rejects_at_fdr
from fusenorm_openood.method.scores import make_score
from fusenorm_openood.method.statistics import compute_id_statistics
from fusenorm_openood.training.recipes import Recipe
from tests.nets import Net, some_images

KINDS = (
    np.float32,
    np.float64,
    np.longdouble,
    np.array,
    torch.tensor,
    lambda v: torch.tensor(v, dtype=torch.bfloat16, requires_grad=True),
    Fraction,
)
WHOLE = (np.int64, np.uint8, np.array, torch.tensor, lambda v: torch.tensor(v, dtype=torch.uint8))
FALSE = (True, np.True_, torch.tensor(True), np.array(False), "1", None, 1j, np.ones(1), [1.0])
BOUNDLESS = (10**400, np.float32("nan"), torch.tensor(float("inf")), -np.inf, np.array(np.nan))


@pytest.mark.parametrize("kind", KINDS)
def test_a_number_of_any_kind_is_pythons(kind):
    assert (number(kind(0.5)), type(number(kind(0.5)))) == (0.5, float)
    assert numbers([kind(0.5), 2]) == (0.5, 2)
    assert whole(kind(0.5)) is None


@pytest.mark.parametrize("kind", WHOLE)
def test_an_integer_of_any_kind_is_pythons(kind):
    assert (whole(kind(5)), type(whole(kind(5)))) == (5, int)
    assert Settings(neighbours=kind(5)) == Settings()
    name, arguments = json.loads(json.dumps(make_score("knn", {"K": kind(7)}).to_json()))
    assert (name, arguments["K"]) == ("knn", 7)
    assert repr(Settings(strong=(kind(1), "output"))) == repr(Settings(strong=(1, "output")))


@pytest.mark.parametrize("value", FALSE + BOUNDLESS)
def test_what_is_no_finite_number(value):
    assert number(value) is whole(value) is numbers([1, value]) is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["alpha", "k_min", "noise", "base", "react_percentile", "cap"])
def test_a_setting_is_kept_as_pythons_number(kind, name):
    given, plain = (Settings(base=1, k_max=1).replace(**{name: v}) for v in (kind(1), 1.0))
    assert given == plain
    assert json.loads(json.dumps(asdict(given)))[name] == 1


@pytest.mark.parametrize("given", [np.ones(4), torch.ones(4), [1.0] * 4, (np.float32(1),) * 4])
def test_weights_of_any_kind(given):
    assert repr(Settings(weights=given)) == repr(Settings(weights=(1.0,) * 4))


NUMBERS = ("k_min", "alpha", "temperature", "joint_margin", "neighbours", "percentile_low")


@pytest.mark.parametrize("value", [*FALSE[:4], *BOUNDLESS])
def test_settings_refuse_what_is_no_finite_number(value):
    for name in NUMBERS:
        with pytest.raises(ConfigError, match=name):
            Settings(**{name: value})
    for change in ({"weights": (value, 1, 1, 1)}, {"input_std": (value,)}, {"strong": (value,)}):
        with pytest.raises(ConfigError, match=next(iter(change))):
            Settings(**change)


@pytest.mark.parametrize("value", [*FALSE[:4], *BOUNDLESS])
def test_functions_refuse_what_is_no_finite_number(value):
    scores, x = np.arange(6.0).reshape(2, 3), torch.ones(1, 1, 2, 2)
    for call in (
        lambda: atf(x, alpha=value),
        lambda: atf(x, value, 1),
        lambda: fuse(scores, scores, cap=value),
        lambda: fuse(scores, scores, base=value),
        lambda: fuse(scores, scores, weights=(value, 1)),
        lambda: compute_id_statistics(scores, value),
        lambda: compute_id_statistics(scores, 0, value),
        lambda: rejects(scores, value),
        lambda: rejects_at_fdr(scores[0], value),
        lambda: needed_images(value),
        lambda: guarantee(100, 0.9, value),
        lambda: make_score("gen", {"gamma": value}),
        lambda: make_score("vim", {"dim": value}),
        lambda: SingleScore(torch.nn.Identity(), "ebo", temperature=value),
        lambda: Recipe(id_data="digits", lr=value),
        lambda: Recipe(id_data="digits", epochs=value),
        lambda: Preprocessing(value, (4, 4), "bilinear", (0, 0, 0), (1, 1, 1)),
        lambda: Preprocessing(4, (4, 4), "bilinear", (value, 0, 0), (1, 1, 1)),
        lambda: candidates(Settings(), {"alpha": [value]}),
    ):
        with pytest.raises(ConfigError):
            call()


@pytest.mark.parametrize("kind", KINDS)
def test_functions_compute_the_same_from_any_kind_of_number(kind):
    x = some_images(2)
    assert torch.equal(atf(x, kind(0.25), kind(0.5), kind(0.75)), atf(x, 0.25, 0.5, 0.75))
    p = np.array([0.01, 0.5, 0.25])
    assert (rejects(p, kind(0.75)) == rejects(p, 0.75)).all()
    assert (rejects_at_fdr(p, kind(0.25)) == rejects_at_fdr(p, 0.25)).all()
    assert repr(guarantee(50, kind(0.75), kind(0.5))) == repr(guarantee(50, 0.75, 0.5))
    args = {"temperature": kind(2.0), "noise": kind(0.5)}
    assert repr(make_score("odin", args)) == repr(
        make_score("odin", {"temperature": 2.0, "noise": 0.5})
    )
    pre = Preprocessing(
        np.int64(4), np.array([4, 4]), "box", (kind(0.5),) * 3, [kind(0.5)] * 3, bits=np.uint8(12)
    )
    assert json.loads(json.dumps(pre.to_json())) == json.loads(
        json.dumps(Preprocessing(4, (4, 4), "box", (0.5,) * 3, (0.5,) * 3, bits=12).to_json())
    )


def test_verdicts_at_an_acceptance_of_any_kind(tmp_path):
    images = some_images(60)
    detector = FuseNorm(Net(), neighbours=np.int64(3), alpha=np.float32(0.5), strong=(np.int8(1),))
    detector.fit([images[:30]], calibration=[images[30:]]).save(tmp_path / "it.safetensors")
    loaded = FuseNorm.load(tmp_path / "it.safetensors", Net())
    assert repr(loaded.settings) == repr(Settings(neighbours=3, alpha=0.5, strong=(1,)))
    plain = loaded.is_ood(images, float(np.float32(0.9)))
    for acceptance in (np.float32(0.9), torch.tensor(0.9), np.array(0.9, np.float32)):
        assert torch.equal(loaded.is_ood(images, acceptance), plain)
    with pytest.raises(ConfigError, match="acceptance"):
        loaded.is_ood(images, True)
