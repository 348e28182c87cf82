"""Images that leave the batch before the network has finished."""

import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models import densenet121, mobilenet_v3_small, resnet18

from fusenorm_openood import FuseNorm, Settings
from fusenorm_openood.detectors.early import exits_of, judge_early, stage_ends
from fusenorm_openood.errors import CalibrationError, ConfigError, DataError, TapError
from fusenorm_openood.method.conformal import max_rank
from fusenorm_openood.network.understanding import understand
from tests.conftest import assert_undisturbed, make_net, state_of
from tests.nets import Net, some_images

SIZE = (16, 16)
SETTINGS = {
    "default": Settings(),
    "deviation": Settings.deviation(),
    "steep": Settings(cap=50, joint_margin=1),
}


def far_off() -> Tensor:
    """Images of many kinds, of which some are rejected early."""
    ordinary = some_images(40, SIZE, seed=3)
    return torch.cat([ordinary * scale for scale in (1, 0.3, 2, 4, 20)] + [0 * ordinary[:5] + 3])


@pytest.fixture(scope="module", params=SETTINGS)
def detector(request: pytest.FixtureRequest) -> FuseNorm:
    found = FuseNorm(make_net(), SETTINGS[request.param])
    return found.fit([some_images(200, SIZE)]).calibrate([some_images(199, SIZE, seed=2)])


@pytest.mark.parametrize("acceptance", [0.5, 0.9, 0.95])
def test_certain_verdicts_are_those_of_the_whole_pass(
    detector: FuseNorm, acceptance: float
) -> None:
    images = far_off()
    before, kept = state_of(detector.net), images.clone()
    found = judge_early(detector, images, acceptance)
    assert_undisturbed(detector.net, before)
    assert torch.equal(images, kept)
    wanted = detector.is_ood(images, acceptance)
    assert found.ood.tolist() == wanted.tolist()
    assert detector.is_ood(images, acceptance, early=True).tolist() == wanted.tolist()
    left = [layer is not None for layer in found.exits]
    assert 0 < sum(left) < len(images)  # else this shows nothing
    conf = detector.score(images).numpy()
    assert (conf[left] <= found.bounds[left] + 1e-6).all()
    assert np.isnan(found.bounds[np.logical_not(left)]).all()
    assert found.kept.tolist() == np.flatnonzero(np.logical_not(left)).tolist()
    assert np.allclose(detector.confidence(found.experts), conf[found.kept], atol=1e-5)


def test_batches_of_which_all_or_none_leave(detector: FuseNorm) -> None:
    flat = 0 * some_images(3, SIZE) + 3
    assert detector.is_ood(flat, early=True).tolist() == [True] * 3
    assert len(judge_early(detector, flat).kept) == 0
    assert bool(detector.is_ood(flat[0], early="spending"))
    ordinary = some_images(5, SIZE, seed=2)  # of the calibration
    assert detector.is_ood(ordinary, early=True).tolist() == detector.is_ood(ordinary).tolist()


@limits(max_examples=40, deadline=None)
@given(data=st.data())
def test_bounds_of_some_layers_hold_for_all(detector: FuseNorm, data: st.DataObject) -> None:
    statistics = detector.id_statistics_
    assert statistics is not None
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    scores = statistics.id_scores[:, generator.integers(200, size=64)]
    size = data.draw(st.sampled_from([0.01, 0.3, 3, 30]))
    scores = np.abs(scores) * np.exp(size * generator.normal(size=scores.shape))
    conf, fusion = statistics.confidence(scores), statistics.fusion
    chosen = data.draw(st.permutations(range(len(statistics.layers))))
    for number in range(1, len(chosen) + 1):
        bound = fusion.upper_bound(chosen[:number])(torch.from_numpy(scores[chosen[:number]]))
        assert (bound.numpy() >= conf - 1e-9 * np.maximum(1, abs(conf))).all()


def test_spending_accepts_as_many_as_asked() -> None:
    """Over 400 splits, of ID images that are exchangeable, by the union bound."""
    detector = FuseNorm(make_net()).fit([some_images(200, SIZE)])
    detector.calibrate([some_images(600, SIZE, seed=2)])
    known = detector.calibration_
    assert known is not None
    conf, marks, generator = known.scores, known.marks, np.random.default_rng(0)
    rejected, early = [], []
    for _ in range(400):
        order = generator.permutation(600)
        detector.calibration_ = known.keep(np.sort(order[:199]))
        exits, end = exits_of(detector, some_images(2, SIZE), 0.9, "spending")
        rest, left = order[199:], np.zeros(401, bool)
        for layers, statistic, limit in exits:
            norms = torch.from_numpy(marks[: len(layers), rest])
            left |= (statistic(norms) < limit).numpy()
        early.append(left.mean())
        rejected.append((left | (conf[rest] < detector.calibration_.thresholds(end)[0])).mean())
    assert 0.02 < np.mean(early) < np.mean(rejected)
    assert np.mean(rejected) < 0.1 + 3 * np.std(rejected) / 20
    assert np.mean(rejected) > 0.05  # and they are not spent in vain


def test_more_is_spent_where_more_is_saved() -> None:
    detector = FuseNorm(make_net()).fit([some_images(100, SIZE)])
    detector.calibrate([some_images(400, SIZE, seed=2)])
    known, images = detector.calibration_, some_images(2, SIZE)
    assert known is not None
    exits, end = exits_of(detector, images, 0.9, "spending")
    spent = [
        int((statistic(torch.from_numpy(known.marks[: len(layers)])) < limit).sum())
        for layers, statistic, limit in exits
    ]
    count = len(exits) + 1
    errors = [2 * skipped * 0.1 / count**2 for skipped in range(len(exits), 0, -1)]
    assert spent == [max_rank(1 - error, 400) - 1 for error in errors]
    assert sum(errors) + 1 - end == pytest.approx(0.1)
    detector.calibration_ = known.keep(np.arange(count * 10 - 1))  # enough for the end alone
    few, _ = exits_of(detector, images, 0.9, "spending")
    assert 0 < len(few) < len(exits)


class Bridge(Net):
    """The stem's means are added to those of the last stage."""

    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem(x)
        return self.fc(self.b(self.a(stem)).mean((2, 3)) + stem.mean((2, 3)))


class Centred(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0, keepdim=True))


class OneStage(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.a(self.stem(x)).mean((2, 3)))


class Reshaped(Net):
    """It reads the size of the batch before images leave it."""

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.b(self.a(self.stem(x))).mean((2, 3))
        return self.fc(pooled.view(len(x), -1))


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (Bridge(), "fails on fewer images"),
        (Centred(), ""),
        (OneStage(), ""),
        (Reshaped(), r"shape '\[\d+, -1\]'"),
    ],
    ids=lambda n: type(n).__name__,
)
def test_networks_in_which_images_cannot_leave(net: nn.Module, reason: str) -> None:
    detector = FuseNorm(net).fit([some_images(60, SIZE)]).calibrate([some_images(60, SIZE, seed=2)])
    with pytest.raises(TapError, match=f"{type(net).__name__}.*{reason}"):
        detector.is_ood(far_off(), early=True)


@pytest.mark.parametrize("make", [resnet18, mobilenet_v3_small, densenet121])
def test_stages_of_real_networks(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    net, images = make(num_classes=4).eval(), some_images(2, (64, 64))
    structure = understand(net, images)
    ends = stage_ends(net, images, structure, structure.blocks)
    assert len(ends) >= 3
    assert all(len(a) < len(b) and b[: len(a)] == a for a, b in pairwise(ends))


@pytest.mark.parametrize(
    ("changes", "arguments", "error", "named"),
    [
        ({}, {"early": "soon"}, ConfigError, "soon"),
        ({"cap": 0.0}, {"early": True}, ConfigError, "cap"),
        ({"clip": False}, {"early": True}, ConfigError, "clip"),
        ({"strong": ["output"], "output": "odin"}, {"early": True}, ConfigError, "odin"),
        ({}, {"early": "spending", "acceptance": 0.98}, CalibrationError, "199"),
    ],
)
def test_errors(changes: dict, arguments: dict, error: type[Exception], named: str) -> None:
    detector = FuseNorm(make_net(), **changes).fit([some_images(100, SIZE)])
    detector.calibrate([some_images(80, SIZE, seed=2)])
    with pytest.raises(error, match=named):
        detector.is_ood(some_images(4, SIZE), **arguments)


def test_by_class_and_groups(detector: FuseNorm) -> None:
    class ByHalf:
        def __iter__(self):
            images = some_images(199, SIZE, seed=2)
            yield {"data": images[:120], "label": torch.zeros(120), "camera": ["a"] * 120}
            yield {"data": images[120:], "label": torch.zeros(79), "camera": ["b"] * 79}

    images, kept = far_off(), detector.calibration_
    groups = ["a", "b", *["a"] * (len(images) - 2)]
    try:
        for by, given in (("predicted", None), ("camera", groups)):
            detector.calibrate(ByHalf(), by=by)
            wanted = detector.is_ood(images, 0.9, groups=given)
            assert detector.is_ood(images, 0.9, given, early=True).tolist() == wanted.tolist()
            with pytest.raises(ConfigError, match="groups"):
                detector.is_ood(images, 0.9, given, early="spending")
    finally:
        detector.calibration_ = kept


def test_groups_are_checked_before_the_pass(detector: FuseNorm) -> None:
    images, kept = far_off()[-5:], detector.calibration_  # all of them leave early
    batch = {"data": some_images(199, SIZE, seed=2), "camera": ["a"] * 199}
    try:
        detector.calibrate([batch], by="camera")
        for groups in (None, ["a"] * 4, ["a"] * 6, ["c"] * 5):
            for early in (False, True):
                with pytest.raises(ConfigError, match="group"):
                    detector.is_ood(images, groups=groups, early=early)
        assert detector.is_ood(images, groups=["a"] * 5, early=True).all()
    finally:
        detector.calibration_ = kept
    with pytest.warns(UserWarning, match=r"\[3, 20, 20\]"):
        detector.is_ood(some_images(2, (20, 20)), early=True)
    with pytest.raises(DataError, match="none"):
        detector.is_ood(images[:0], early=True)


def test_exits_follow_the_calibration(detector: FuseNorm) -> None:
    images = far_off()
    first = judge_early(detector, images, 0.9)
    detector = pickle.loads(pickle.dumps(detector))
    detector.calibrate([1.2 * some_images(199, SIZE, seed=2)])  # which accepts more
    second = judge_early(detector, images, 0.9)
    assert second.ood.tolist() == detector.is_ood(images, 0.9).tolist()
    assert second.ood.tolist() != first.ood.tolist()


@pytest.mark.parametrize("default", [torch.float64, torch.device("meta")], ids=str)
def test_defaults_of_torch_change_nothing(default: torch.dtype | torch.device) -> None:
    detector = FuseNorm(make_net()).fit([some_images(200, SIZE)])
    detector.calibrate([some_images(199, SIZE, seed=2)])
    images, wanted = far_off(), detector.is_ood(far_off())
    old = torch.get_default_dtype()
    try:
        is_dtype = isinstance(default, torch.dtype)
        (torch.set_default_dtype if is_dtype else torch.set_default_device)(default)
        found = judge_early(detector, images)
    finally:
        torch.set_default_dtype(old)
        torch.set_default_device(None)
    assert found.ood.tolist() == wanted.tolist()
    assert any(found.exits)
