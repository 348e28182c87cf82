import torch
from fusenorm_openood.method.posthoc import Seen
from hypothesis import given
from hypothesis import strategies as st

from fusenorm_openood.forward.samples import FeatureSample


@given(st.lists(st.integers(0, 9), max_size=30), st.integers(1, 40))
def test_an_even_sample_of_at_most_the_limit_in_the_order_of_the_images(sizes, limit):
    total, sample = sum(sizes), FeatureSample(limit)
    numbers = torch.arange(float(total))
    for part in numbers.split(sizes):
        sample.add(Seen(part[:, None], -part[:, None]))
    if not sizes:
        return
    indices = sample.indices
    assert len(indices) <= limit
    assert len(indices) > limit // 2 or len(indices) == total
    assert sample.seen.feature.flatten().tolist() == indices.tolist()
    assert sample.seen.logits.flatten().tolist() == [-float(i) for i in indices]
    if total <= limit:
        assert indices.tolist() == list(range(total))
    steps = set((indices[1:] - indices[:-1]).tolist())
    assert len(steps) <= 1


def test_half_precision_is_kept_in_full_and_views_are_not_kept():
    sample = FeatureSample()
    feature = torch.ones(4, 3, dtype=torch.bfloat16)
    sample.add(Seen(feature, feature))
    feature.zero_()
    assert sample.seen.feature.dtype == torch.float32
    assert sample.seen.feature.sum() == 12
