"""ATF sample by sample and channel by channel in float64, written from its formula."""

import numpy as np


def atf_oracle(x, k_min=0.1, k_max=0.25, alpha=0.0, eps=1e-8):
    """Norms [B] and, for each sample, its mean entropy, channels and weights."""
    norms, parts = [], []
    x = np.asarray(x)
    for sample in x.astype(np.float64):
        channels = [channel.ravel() for channel in sample]
        n = channels[0].size
        entropies = []
        for channel in channels:
            e = channel**2
            p = e / (e.sum() + eps)
            entropies.append(-(p * np.log(p + eps)).sum() / np.log(n) if n > 1 else 0.0)
        h = np.array(entropies)
        w = (1 - h) / ((1 - h).sum() + eps)
        w = (1 - alpha) * w + alpha / len(channels)
        w = w / (w.sum() + eps)
        norms.append(norm_of(channels, w, k_oracle(x.dtype.type, h.mean(), k_min, k_max, n)))
        parts.append((h.mean(), channels, w))
    return np.array(norms), parts


def k_oracle(real, h, k_min, k_max, n):
    """k of n pixels in the precision of the maps: every operation rounds to `real`."""
    product = real(real(k_max - k_min) * real(h))
    k_ratio = real(real(k_min) + product)
    return min(max(int(real(k_ratio * real(n))), 1), n)


def norm_of(channels, weights, k):
    return sum(
        weight * np.sqrt(np.mean(np.sort(channel**2)[::-1][:k]))
        for channel, weight in zip(channels, weights, strict=True)
    )


def assert_atf_close(actual, x, rtol, k_min=0.1, k_max=0.25, **others):
    """Equal to the oracle, where h may differ by 1e-5 if that changes k."""
    x = np.asarray(x)
    expected, parts = atf_oracle(x, k_min, k_max, **others)
    n = x[0, 0].size
    for got, want, (h, channels, w) in zip(np.asarray(actual), expected, parts, strict=True):
        few, many = (k_oracle(x.dtype.type, h + d, k_min, k_max, n) for d in (-1e-5, 1e-5))
        allowed = [want] + [norm_of(channels, w, k) for k in range(few, many + 1) if few < many]
        errors = [abs(got - value) / max(abs(value), 1e-300) for value in allowed]
        assert min(errors) <= rtol or got == want, (x.shape, got, want, few, many)
