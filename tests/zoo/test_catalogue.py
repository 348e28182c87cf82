"""FuseNorm on the networks of the catalogue, with random weights."""

from itertools import groupby

import numpy as np
import pytest
import torch

from fusenorm_openood import FuseNorm
from fusenorm_openood.errors import TapError
from fusenorm_openood.network.understanding import understand
from tests.conftest import assert_undisturbed, state_of
from tests.oracle import assert_atf_close
from tests.zoo.catalogue import CATALOGUE
from tests.zoo.networks import build

for library in ("timm", "transformers"):
    pytest.importorskip(library, reason="the catalogue needs the extra zoo: pip install '.[zoo]'")

ORACLE = 2  # images that the oracle computes, which is slow


def network_and_images(entry):
    images = torch.randn(8, 3, *entry.image, generator=torch.Generator().manual_seed(1))
    return build(entry.network, images), images


@pytest.mark.parametrize("entry", [e for e in CATALOGUE if e.taps], ids=lambda e: e.network)
def test_a_network_is_understood_and_scored(entry):
    net, images = network_and_images(entry)
    before = state_of(net)

    structure = understand(net, images)
    assert structure.blocks == tuple(tap.name for tap in entry.taps)
    assert {t.name: structure.layouts[t.name] for t in entry.taps} == {
        t.name: t.layout for t in entry.taps
    }
    assert structure.stages(structure.blocks) == [
        [tap.name for tap in stage]
        for _, stage in groupby(entry.taps, key=lambda tap: tap.height * tap.width)
    ]
    assert sorted(structure.head.names) == sorted(entry.head)

    expert = "fdbd" if structure.head.is_affine else "mds++"  # SqueezeNet ends in a ReLU
    detector = FuseNorm(net, strong=("output", expert)).fit([images])
    scored = detector.infer([images])
    assert_undisturbed(net, before)
    assert detector.taps == structure.blocks
    assert np.isfinite(scored.conf).all()
    maps, logits = heard(net, images, entry.taps)
    assert np.array_equal(scored.pred, logits.argmax(1).numpy())
    for norms, tap in zip(scored.experts, entry.taps, strict=False):
        assert_atf_close(norms[:ORACLE], maps[tap.name][:ORACLE], rtol=1e-4)


@pytest.mark.parametrize("entry", [e for e in CATALOGUE if not e.taps], ids=lambda e: e.network)
def test_the_taps_of_parallel_trunks_have_to_be_named(entry):
    net, images = network_and_images(entry)
    assert sorted(understand(net, images).head.names) == sorted(entry.head)
    with pytest.raises(TapError, match="no blocks on one trunk: name the modules to tap"):
        FuseNorm(net).fit([images])


def heard(net, images, taps):
    """The taps' feature maps as `[B, C, N]`, turned by hand, and the logits."""
    outputs, maps = {}, {}
    hooks = [
        net.get_submodule(tap.name).register_forward_hook(
            lambda module, given, output, name=tap.name: outputs.update({name: first(output)})
        )
        for tap in taps
    ]
    with torch.no_grad():
        output = net(images)
    for hook in hooks:
        hook.remove()
    for tap in taps:
        x = outputs[tap.name]
        if tap.layout == "BNC":
            maps[tap.name] = x[:, tap.prefix :].mT
        else:
            maps[tap.name] = (x if tap.layout == "BCHW" else x.permute(0, 3, 1, 2)).flatten(2)
        assert maps[tap.name].shape[2] == tap.height * tap.width
    return maps, getattr(output, "logits", output)


def first(output):
    """The first tensor in what a module returns."""
    return output if isinstance(output, torch.Tensor) else first(output[0])
