"""Postprocessors like OpenOOD's on T2FNorm networks; OpenOOD's own are in tests/openood."""

import pickle

import pytest
import torch

from fusenorm_openood.errors import CheckpointError
from fusenorm_openood.openood.adapter import AdaptedPostprocessor, ScoringView
from fusenorm_openood.openood.pipelines import names_in
from tests.conftest import assert_undisturbed, make_t2fnorm, state_of

IMAGES = torch.randn(9, 3, 16, 16, generator=torch.Generator().manual_seed(3))


class MaxLogit:
    """A minimal postprocessor with OpenOOD's interface and a parameter to search."""

    config = None

    def __init__(self):
        self.args_dict, self.shown = {"scale": [1, 2]}, None

    def setup(self, net, id_loader_dict, ood_loader_dict):
        self.shown = type(net).__name__

    def postprocess(self, net, data):
        data.requires_grad = True
        logits = net(data)
        logits.sum().backward()
        return torch.zeros(len(data), dtype=torch.int64), logits.detach().amax(1)


@pytest.fixture
def t2fnorm():
    return make_t2fnorm()


def test_the_view_returns_scoring_logits_and_the_input_of_fc(t2fnorm):
    view = ScoringView(t2fnorm)
    with torch.no_grad():
        logits, feature = view(IMAGES, return_feature=True)
        assert torch.equal(view(IMAGES), t2fnorm.forward_ood_inference(IMAGES))
        torch.testing.assert_close(view.get_fc_layer()(feature), logits)
    weight, bias = view.get_fc()
    torch.testing.assert_close(
        feature @ torch.from_numpy(weight).T + torch.from_numpy(bias), logits
    )


def test_scores_come_from_the_view_and_classes_from_the_network(t2fnorm):
    before = state_of(t2fnorm)
    adapted = AdaptedPostprocessor(MaxLogit(), "odin")
    adapted.setup(t2fnorm, {}, {})
    assert adapted.shown == "ScoringView"
    pred, conf = adapted.postprocess(t2fnorm, IMAGES.clone())
    assert_undisturbed(t2fnorm, before)
    with torch.no_grad():
        torch.testing.assert_close(conf, t2fnorm.forward_ood_inference(IMAGES).amax(1))
        assert torch.equal(pred, t2fnorm(IMAGES).argmax(1))


def test_a_plain_network_is_passed_on_unchanged(net):
    adapted = AdaptedPostprocessor(MaxLogit(), "mls")
    adapted.setup(net, {}, {})
    assert adapted.shown == "ResNet18_32x32"
    pred, conf = adapted.postprocess(net, IMAGES.clone())
    assert not pred.any()
    torch.testing.assert_close(conf, net(IMAGES).detach().amax(1))


def test_other_attributes_are_the_inner_postprocessors_after_pickling_too():
    adapted = AdaptedPostprocessor(MaxLogit(), "mls")
    again = pickle.loads(pickle.dumps(adapted))
    assert again.args_dict == {"scale": [1, 2]}
    assert not hasattr(again, "setup_flag")


def test_the_postprocessor_t2fnorm_needs_a_t2fnorm_network(net):
    with pytest.raises(CheckpointError, match="got a ResNet18_32x32: use such a checkpoint"):
        AdaptedPostprocessor(MaxLogit(), "t2fnorm").setup(net, {}, {})


def test_names_are_read_from_the_source():
    def get_thing(name):
        if name == "last":
            return 3
        return {"first": 1, "second": 2}[name]

    assert names_in(get_thing) == ["first", "last", "second"]
