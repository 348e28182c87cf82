import pytest
import torch
from fusenorm_openood.method.posthoc import POSTHOC, Head, Posthoc, Seen
from hypothesis import given
from hypothesis import strategies as st

from fusenorm_openood.forward import samples as sums_module
from fusenorm_openood.forward.samples import BlockSums

HEAD = Head(torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(3))
EXPERTS = [Posthoc.of(name, {"dim": 4} if name == "vim" else {}) for name in POSTHOC]


def stream(n):
    feature = torch.randn(n, 8, generator=torch.Generator().manual_seed(1)).relu()
    logits = HEAD(feature)
    return Seen(feature, logits), logits.argmax(1)


def summed(seen, labels, sizes):
    sums = BlockSums(EXPERTS)
    for *part, y in zip(*(t.split(sizes) for t in (*seen, labels)), strict=True):
        sums.add(Seen(*part), y)
    return sums


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(sums_module, "BLOCK", 7)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(any))
def test_no_bit_depends_on_the_batches(sizes):
    seen, labels = stream(sum(sizes))
    one, other = summed(seen, labels, sizes), summed(seen, labels, [len(labels)])
    for expert in EXPERTS:
        state = one.of(expert)
        assert state.keys() == other.of(expert).keys()
        assert all(torch.equal(state[key], other.of(expert)[key]) for key in state)


@pytest.mark.parametrize("expert", EXPERTS, ids=lambda e: e.name)
def test_sums_are_those_of_all_images_in_one_block(expert):
    seen, labels = stream(50)
    got = summed(seen, labels, [11, 20, 19]).of(expert)
    expected = POSTHOC[expert.name].sums(seen, labels)
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-12, atol=1e-12)


def test_never_more_than_a_block_is_held_and_no_view_of_a_batch():
    sums, (seen, labels) = BlockSums(EXPERTS), stream(40)
    held = []
    for start in range(0, 40, 5):
        batch = Seen(*(t[start : start + 5].clone() for t in seen))
        sums.add(batch, labels[start : start + 5])
        batch.feature.fill_(float("nan"))
        held.append(sum(len(part[0]) for part in sums._block))
    assert max(held) < 7
    for expert in EXPERTS:
        assert all(value.isfinite().all() for value in sums.of(expert).values())
