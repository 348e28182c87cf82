"""Samples of and sums over streams of ID images."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusenorm_openood.detectors import fitting
from fusenorm_openood.detectors.fitting import BlockSums, Sample
from fusenorm_openood.method.scores import POSTHOC, make_score
from fusenorm_openood.method.scores.base import Features, Head

HEAD = Head(torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(3))
SCORES = [make_score(name, {"dim": 4} if name == "vim" else None) for name in POSTHOC]


@given(st.lists(st.integers(0, 9), max_size=30), st.integers(1, 40), st.booleans())
def test_an_even_sample_of_at_most_the_limit_in_the_order_of_the_images(sizes, limit, by_memory):
    total, row = sum(sizes), 8  # bytes of two float32
    sample = Sample(memory=limit * row) if by_memory else Sample(limit)
    numbers = torch.arange(float(total))
    for part in numbers.split(sizes):
        sample.add(Features(part[:, None], -part[:, None]))
    if not sizes:
        return
    indices = sample.indices
    assert len(indices) <= limit
    assert len(indices) > limit // 2 or len(indices) == total
    assert sample.features.feature.flatten().tolist() == indices.tolist()
    assert sample.features.logits.flatten().tolist() == [-float(i) for i in indices]
    if total <= limit:
        assert indices.tolist() == list(range(total))
    assert len(set(np.diff(indices).tolist())) <= 1


def test_a_sample_is_in_full_precision_keeps_no_views_and_at_least_an_image():
    sample = Sample(memory=2)
    feature = torch.ones(4, 3, dtype=torch.bfloat16)
    sample.add(Features(feature, feature))
    feature.zero_()
    assert sample.features.feature.dtype == torch.float32
    assert sample.features.feature.tolist() == [[1, 1, 1]]


def stream(n):
    feature = torch.randn(n, 8, generator=torch.Generator().manual_seed(1)).relu()
    logits = HEAD(feature)
    return Features(feature, logits), logits.argmax(1)


def states_of(batch, labels, sizes):
    """What all scores fit on a stream in batches, which are overwritten afterwards."""
    sums, sample = BlockSums(SCORES), Sample()
    sample.add(batch)
    for *part, y in zip(*(t.split(sizes) for t in (*batch, labels)), strict=True):
        part = Features(*(t.clone() for t in part))
        sums.add(part, y)
        part.feature.fill_(float("nan"))
    return [sums.fit(score, sample, HEAD) for score in SCORES]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(fitting, "BLOCK", 7)


@settings(max_examples=10)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(any))
def test_no_bit_depends_on_the_batches(sizes):
    batch, labels = stream(sum(sizes))
    one, other = states_of(batch, labels, sizes), states_of(batch, labels, [len(labels)])
    for state, again in zip(one, other, strict=True):
        assert state.keys() == again.keys()
        assert all(torch.equal(state[key], again[key]) for key in state)


def test_fits_are_those_of_all_images_in_one_block():
    batch, labels = stream(50)
    for score, state in zip(SCORES, states_of(batch, labels, [11, 20, 19]), strict=True):
        expected = score.fit(score.sums(batch, labels), batch, HEAD)
        assert state.keys() == expected.keys() == score.state.keys()
        for found in (state, expected):  # scores, for the signs of directions are any
            assert score(batch, HEAD, found).isfinite().all()
        a, b = (score(batch, HEAD, found) for found in (state, expected))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
