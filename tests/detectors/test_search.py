"""APS: every combination has the scores of a detector of its own, from one pass over images."""

import numpy as np
import pytest
import torch
from torch import nn

from fusenorm_openood import FuseNorm
from fusenorm_openood.data.pseudo import KINDS
from fusenorm_openood.detectors.bank import ScoreBank
from fusenorm_openood.detectors.search import candidates, search, swept
from fusenorm_openood.errors import ConfigError, DataError, ZeroRangeError
from fusenorm_openood.method.metrics import ood_metrics
from fusenorm_openood.method.settings import Settings
from fusenorm_openood.openood.postprocessor import FuseNormPostprocessor
from tests.conftest import assert_undisturbed, make_loader, make_net, state_of
from tests.without_openood.test_postprocessor import config

published = Settings.published
SWEEP = {
    "k_min": [0.1, 0.3],
    "alpha": [0.0, 0.5],
    "output": ["energy", "odin"],
    "react_percentile": [None, 85.0],
    "weights": [None, (0.3, 1.0)],
    "base": [2.0, 20.0],
    "cap": [0.5, 1.0],
    "percentile_low": [1.0, 2.0],
}
BASE = published(k_max=0.4, noise=0.02)


def passes(net: nn.Module) -> list[int]:
    """A list to which every forward pass from now on appends its number of images.

    Without the passes over at most two images by which the network is understood.
    """
    images: list[int] = []

    def note(module, args, output):
        if len(args[0]) > 2:
            images.append(len(args[0]))

    net.conv1.register_forward_hook(note)
    return images


def test_combinations_are_in_openoods_order():
    found = [c.values for c in candidates(Settings(), {"base": [2, 20], "cap": [0.5, 1, 2]})]
    assert [(v["base"], v["cap"]) for v in found] == [
        *((2, 0.5), (20, 0.5)),
        *((2, 1), (20, 1)),
        *((2, 2), (20, 2)),
    ]


def test_the_bank_gives_the_scores_of_a_detector_with_the_same_settings(net, loader):
    unknown = make_loader(seed=5, scale=2.0)
    before = state_of(net)
    bank = ScoreBank(net, swept(BASE, SWEEP)).fit(loader).add(unknown)
    assert_undisturbed(net, before)
    combined = candidates(BASE, SWEEP)
    for candidate in combined[::83]:
        detector = FuseNorm(net, candidate.settings).fit(loader)
        for images in (loader, unknown):
            expected, found = detector.infer(images), bank.scored(candidate.settings, images)
            np.testing.assert_allclose(found.conf, expected.conf, rtol=1e-9, atol=1e-9)
            np.testing.assert_array_equal(found.pred, expected.pred)
            np.testing.assert_array_equal(found.label, expected.label)
            np.testing.assert_allclose(found.experts, expected.experts, rtol=1e-6)


def test_a_search_selects_the_first_combination_with_the_highest_auroc(net, loader):
    unknown = make_loader(seed=5, scale=2.0)
    sweep = {"output": ["msp", "energy"], "weights": [None, (0.0, 1.0)]}
    found = search(net, published(react_percentile=None), sweep, loader, unknown)
    aurocs, combined = [], candidates(published(react_percentile=None), sweep)
    for candidate in combined:
        d = FuseNorm(net, candidate.settings).fit(loader)
        aurocs.append(ood_metrics(d.score_loader(loader), d.score_loader(unknown)).auroc)
    np.testing.assert_allclose(found.trials["AUROC"] / 100, aurocs)
    assert found.settings == combined[int(np.argmax(aurocs))].settings
    assert found.auroc == pytest.approx(max(aurocs))
    ready = FuseNorm(net, found.settings).with_statistics(found.statistics)
    fitted = FuseNorm(net, found.settings).fit(loader)
    torch.testing.assert_close(ready.score_loader(unknown), fitted.score_loader(unknown))


def test_of_equal_combinations_the_first_is_selected(net, loader):
    # Without a penalty the cap has no effect, so that all three combinations are equal.
    sweep = {"cap": [0.7, 0.5, 1.0], "base": [1.0]}
    found = search(net, published(output="energy"), sweep, loader, make_loader(seed=5))
    assert found.trials["AUROC"].nunique() == 1
    assert found.settings.cap == 0.7


def test_every_image_is_passed_once_however_many_combinations_are_tried(net, loader):
    unknown, images = make_loader(seed=5), passes(net)
    fusion = {name: SWEEP[name] for name in SWEEP if name not in ("output", "react_percentile")}
    for sweep, react, passed in (
        (fusion, None, 2),
        (fusion | {"react_percentile": [85.0, 90.0]}, 90.0, 3),  # once more for the thresholds
        ({"noise": [0.01, 0.02, 0.0], "alpha": [0.0, 0.5]}, None, 6),  # noise 0 perturbs no image
    ):
        images.clear()
        output = "odin" if "noise" in sweep else "energy"
        base = published(k_max=0.4, output=output, react_percentile=react)
        search(net, base, sweep, loader, unknown)
        assert sum(images) == passed * 60


def test_a_loader_whose_scores_are_held_is_not_passed_again(net, loader):
    bank = ScoreBank(net, [published(output="energy", react_percentile=None)]).fit(loader)
    images = passes(net)
    bank.add(loader)
    assert not images
    bank.forget(loader)
    bank.add(loader)
    assert sum(images) == 60


def constant_expert(net: nn.Module) -> nn.Module:
    """A network whose first block gives all images the same feature norm from different maps."""

    def ranks(module, args, output):
        return output.flatten(2).argsort(-1).argsort(-1).view_as(output) / output[0, 0].numel()

    net.layer1[0].register_forward_hook(ranks)
    return net


def test_unusable_combinations_are_skipped_with_a_reason(net, loader):
    unknown = make_loader(seed=5)
    sweep = {"percentile_low": [1.0, 30.0], "percentile_high": [20.0, 99.9], "base": [2.0]}
    found = search(net, published(output="energy"), sweep, loader, unknown)
    assert found.trials["AUROC"].isna().tolist() == [False, True, False, False]
    assert "percentile_low must be < percentile_high" in found.trials["unusable"][1]
    assert found.trials["unusable"][0] == ""
    taps = [("layer1.0", "layer4.0"), ("layer2.0", "layer4.0")]
    net = constant_expert(net)
    found = search(net, published(output="energy"), {"taps": taps}, loader, unknown)
    assert found.trials["AUROC"].isna().tolist() == [True, False]
    assert "'layer1.0' are both" in found.trials["unusable"][0]
    assert found.settings.taps == taps[1]
    with pytest.raises(ConfigError, match="none of 1 combinations is usable"):
        search(net, published(output="energy"), {"taps": taps[:1]}, loader, unknown)


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({}, "postprocessor_sweep is empty"),
        ({"base": [20.0, 0.5]}, r"postprocessor_sweep\.base: base must be .*>= 1, got 0\.5"),
        ({"bsae": [2]}, "unknown setting 'bsae'"),
        ({"output": "msp"}, "output must be a non-empty list of values, got 'msp'"),
        ({"cap": 5}, "cap must be a non-empty list of values, got 5"),
        ({"output": {"msp": 1}}, "output must be a non-empty list of values, got {"),
        ({"cap": []}, r"cap must be a non-empty list of values, got \[\]"),
        ({"strong": [["layer9"]]}, "unknown strong expert 'layer9'"),
    ],
)
def test_invalid_sweeps_are_rejected(net, loader, sweep, message):
    with pytest.raises(ConfigError, match=message):
        search(net, published(output="energy"), sweep, loader, make_loader(seed=5))


def test_values_that_are_only_valid_together_are_accepted():
    sweep = {"strong": ["auto", ["output"]], "weights": [[0.3, 1.0], [1.0]]}
    outcomes = [isinstance(c.settings, Settings) for c in candidates(published(), sweep)]
    assert outcomes == [True, False, False, True]


def openoods_search(p: FuseNormPostprocessor, net, known, unknown) -> list[float]:
    """The search loop of OpenOOD's evaluators, written from its behaviour."""
    aurocs = []
    for candidate in candidates(p.settings, p.args_dict):
        p.set_hyperparam(list(candidate.values.values()))
        conf = [p.inference(net, loader, False)[1] for loader in (known, unknown)]
        aurocs.append(ood_metrics(*conf).auroc)
    best = int(np.argmax(aurocs))
    p.set_hyperparam(list(candidates(p.settings, p.args_dict)[best].values.values()))
    p.hyperparam_search_done = True
    return aurocs


def searching(sweep: dict) -> FuseNormPostprocessor:
    c = config(sweep, output="energy", temperature=None)
    c["postprocessor"]["APS_mode"] = True
    return FuseNormPostprocessor(c)


def test_the_postprocessor_is_searched_without_another_pass(net, loader):
    unknown = make_loader(seed=5, scale=2.0)
    sweep = {"alpha": [0.0, 0.5], "weights": [[0.3, 1.0], [1.0, 1.0]], "base": [2, 20]}
    p = searching(sweep)
    images = passes(net)
    p.setup(net, {"val": loader}, {"val": unknown})
    aurocs = openoods_search(p, net, loader, unknown)
    assert sum(images) == 3 * 60
    found = search(net, searching(sweep).settings, sweep, loader, unknown)
    np.testing.assert_allclose(found.trials["AUROC"] / 100, aurocs)
    assert p.settings == found.settings
    data = torch.randn(4, 3, 16, 16)
    fresh = FuseNorm(net, found.settings).fit(loader)
    torch.testing.assert_close(p.postprocess(net, data)[1], fresh.score(data))


def test_the_postprocessor_scores_before_the_search_and_outside_the_sweep(net, loader):
    p = searching({"base": [2]})
    p.setup(net, {"val": loader}, {"val": make_loader(seed=5)})
    fresh = FuseNorm(net, p.settings).fit(loader)
    assert p.settings.base == 20
    np.testing.assert_allclose(p.inference(net, loader)[1], fresh.score_loader(loader))
    with pytest.raises(ConfigError, match="with other weights"):
        p.inference(make_net(seed=2), loader)


def test_unusable_values_get_the_lowest_auroc_and_score_no_other_images(net, loader):
    unknown = make_loader(seed=5)
    p = searching({"taps": [["layer1.0", "layer4.0"], ["layer2.0", "layer4.0"]]})
    net = constant_expert(net)
    p.setup(net, {"val": loader}, {"val": unknown})
    with pytest.warns(RuntimeWarning, match="settings skipped: .*'layer1.0' are both"):
        aurocs = openoods_search(p, net, loader, unknown)
    assert aurocs[0] == 0 < aurocs[1]
    assert p.settings.taps == ("layer2.0", "layer4.0")
    p.set_hyperparam([("layer1.0", "layer4.0")])
    with pytest.raises(ZeroRangeError):
        p.postprocess(net, torch.randn(2, 3, 16, 16))
    with pytest.raises(ZeroRangeError):
        p.inference(net, make_loader(seed=6))
    p = searching({"taps": [["layer1.0", "layer4.0"]]})
    with pytest.raises(ConfigError, match="none of 1 combinations is usable"):
        p.setup(net, {"val": loader}, {"val": unknown})
    assert not p.setup_flag


def test_values_with_non_finite_ood_scores_get_the_lowest_auroc(net, loader):
    unknown = make_loader(seed=5, scale=2.0)

    def overflow(module, args, output):
        return output * torch.where(args[0].std() > 1.5, torch.inf, 1.0)

    # A branch that does not affect the logits, and is not tapped by the second combination.
    net.side = nn.Identity()
    net.side.register_forward_hook(overflow)
    net.conv1.register_forward_hook(lambda module, args, output: (net.side(args[0]), output)[1])
    p = searching({"taps": [["layer4.0", "side"], ["layer2.0", "layer4.0"]]})
    p.setup(net, {"val": loader}, {"val": unknown})
    with pytest.warns(
        RuntimeWarning, match="settings skipped: expert 'side' gives non-finite scores"
    ):
        aurocs = openoods_search(p, net, loader, unknown)
    assert aurocs[0] == 0 < aurocs[1]
    found = search(net, p.settings, p.args_dict, loader, unknown)
    assert found.trials["AUROC"].isna().tolist() == [True, False]


def test_a_search_needs_ood_validation_images(net, loader):
    p = searching({"base": [2]})
    with pytest.raises(DataError, match=r"ood_loader_dict must contain 'val'.* got no loader"):
        p.setup(net, {"val": loader})
    assert not p.setup_flag


def test_without_ood_images_the_mean_auroc_over_kinds_of_pseudo_ood_images_counts(net, loader):
    sweep = {"strong": [["output"], ["output", "fdbd"], ["knn"]]}
    images = passes(net)
    found, again = (search(net, Settings(), sweep, loader) for _ in range(2))
    assert sum(images) == 2 * (1 + len(KINDS)) * 60
    assert found.trials.equals(again.trials)
    assert found.settings == again.settings
    means = []
    for candidate in candidates(Settings(), sweep):
        detector = FuseNorm(net, candidate.settings).fit(loader)
        # The ID images count with the scores of the fit, each without itself.
        known = detector.confidence(detector.id_statistics_.id_scores)
        aurocs = []
        for kind in KINDS.values():
            generator = torch.Generator().manual_seed(0)
            unknown = [kind(batch, generator) for batch, _ in loader]
            aurocs.append(ood_metrics(known, detector.score_loader(unknown)).auroc)
        means.append(sum(aurocs) / len(KINDS))
    assert len(set(means)) > 1
    np.testing.assert_allclose(found.trials["AUROC"] / 100, means)
    assert found.auroc == pytest.approx(max(means))
    assert found.settings == candidates(Settings(), sweep)[int(np.argmax(means))].settings
