"""Scores against float64 oracles, scipy and the inputs that break them."""

import pickle

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp, softmax
from sklearn.covariance import oas

from fusenorm_openood.errors import ConfigError, DataError
from fusenorm_openood.method.scores import POSTHOC, SCORES, make_score
from fusenorm_openood.method.scores import base as scores_base
from fusenorm_openood.method.scores.base import Features, Head, log_odds
from fusenorm_openood.method.scores.energy import Energy
from fusenorm_openood.method.scores.mds import RIDGE
from fusenorm_openood.method.scores.mls import MLS
from fusenorm_openood.method.scores.msp import MSP
from fusenorm_openood.method.scores.odin import ODIN, odin_direction, odin_step
from fusenorm_openood.storage.configs import config_root

D, K = 24, 5
FEW = {"knn": {"K": 7}, "vim": {"dim": 10}, "gen": {"M": 3, "gamma": 0.3}, "nci": {"alpha": 0.1}}
FEW |= {"logitgap": {"N": 3}, "mahavar": {"weight": 0.01}}
EACH = [make_score(name, FEW.get(name)) for name in POSTHOC]  # suited to few images
each_score = pytest.mark.parametrize("score", EACH, ids=lambda score: score.name)


def scores_named(*names):
    chosen = [score for score in EACH if score.name in names]
    return pytest.mark.parametrize("score", chosen, ids=lambda score: score.name)


def make_head(d=D, k=K, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Head(torch.randn(k, d, generator=g), torch.randn(k, generator=g))


def make_features(n, head, seed=1):
    """Features that cluster around the weights of their class, with their logits, and labels."""
    g = torch.Generator().manual_seed(seed)
    k, d = head.weight.shape
    labels = torch.randint(0, k, (n,), generator=g)
    feature = (torch.randn(n, d, generator=g) + 0.7 * head.weight[labels]).relu()
    return Features(feature, head(feature)), labels


def fit(score, batch, labels, head):
    return score.fit(score.sums(batch, labels), batch, head)


def fitted(score, n=200):
    head = make_head()
    batch, labels = make_features(n, head)
    return head, batch, labels, fit(score, batch, labels, head)


def part(batch, rows):
    return Features(*(t[rows] for t in batch))


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def mahalanobis_of(x, fit, y, ridge=None, divisor=None, weight=0.0, top=None):
    """Squared distance of rows x to the closest class mean of (fit, y), less weight x variance.

    With `top`, to the mean of that class.
    """
    means = {c: fit[y == c].mean(0) for c in np.unique(y)}
    r = fit - np.stack([means[c] for c in y])
    s = r.T @ r / (divisor or len(fit))
    s += (np.trace(s) / len(s) * RIDGE if ridge is None else ridge) * np.eye(len(s))
    inverse = np.linalg.inv(s)
    each = [np.einsum("nd,de,ne->n", x - m, inverse, x - m) for m in means.values()]
    if top is not None:
        return -np.array(each)[top, np.arange(len(x))]
    return weight * np.var(each, axis=0) - np.min(each, axis=0)


def head_tied(x, fit, top, w, removed=None):
    """Closest squared distance to the means that the weights w of the predicted classes give."""
    of_fit = w[top] - w[top].mean(0)
    (slope,) = np.linalg.lstsq(of_fit.reshape(-1, 1), (fit - fit.mean(0)).ravel(), rcond=None)[0]
    means = fit.mean(0) + slope * (w - w[top].mean(0))
    r = fit - means[top]
    s, shrinkage = oas(r, assume_centered=True)
    if removed is not None:  # an image of the fit
        s -= (1 - shrinkage) * np.outer(r[removed], r[removed]) / len(fit)
    away = x[:, None] - means
    return -np.einsum("nkd,de,nke->nk", away, np.linalg.inv(s), away).min(1)


def oracle(score, x, fit, y, w, b):
    """Scores of features x in float64, one image or class at a time where that is simpler."""
    name, a = score.name, vars(score)
    logits, fit_logits = x @ w.T + b, fit @ w.T + b
    top, mean = logits.argmax(1), fit.mean(0)
    if name == "knn":
        squares = ((unit(x)[:, None] - unit(fit)[None]) ** 2).sum(2)
        kth = np.sort(squares, 1)[:, a["K"] - 1]
        return -np.sqrt(kth) if a["root"] else -kth
    if name == "nci":
        c = x - mean
        return (w[top] * c).sum(1) / np.linalg.norm(c, axis=1) + a["alpha"] * np.abs(x).sum(1)
    if name == "gen":
        p = np.sort(softmax(logits, axis=1), 1)[:, -a["M"] :]
        p = p.clip(a["clamp"] or 0, 1 - (a["clamp"] or 0))
        terms = (p * (1 - p)) ** a["gamma"]
        return -(terms.mean(1) if a["mean"] else terms.sum(1))
    if name == "fdbd":
        total = np.zeros(len(x))
        for i, c in enumerate(top):
            for k in set(range(len(w))) - {c}:
                total[i] += (logits[i, c] - logits[i, k]) / np.linalg.norm(w[c] - w[k])
        away = x - mean if a["distance_as_normalizer"] else x
        return total / np.linalg.norm(away, axis=1)
    if name in ("ash", "scale"):
        out = np.zeros_like(x)
        k = x.shape[1] - int(np.round(x.shape[1] * a["percentile"] / 100))
        for i, row in enumerate(x):
            kept = np.argsort(-row, kind="stable")[:k]
            factor = np.exp(row.sum() / row[kept].sum())
            if name == "scale":
                out[i] = row * factor
            else:
                of = {"b": row.sum() / k, "s": row[kept] * factor, "p": row[kept]}
                out[i, kept] = of[a["variant"]]
        return logsumexp(out @ w.T + b, axis=1)
    if name == "vim":
        u = mean if a["origin"] == "mean" else -np.linalg.pinv(w) @ b
        values, vectors = np.linalg.eigh((fit - u).T @ (fit - u))
        values, vectors = values[::-1], vectors[:, ::-1]
        dim = a["dim"]
        if a["share"]:
            dim = max(n for n in range(D) if values[:n].sum() <= a["share"] * values.sum())
        ns = vectors[:, dim:]
        alpha = fit_logits.max(1).mean() / np.linalg.norm((fit - u) @ ns, axis=1).mean()
        return logsumexp(logits, axis=1) - alpha * np.linalg.norm((x - u) @ ns, axis=1)
    if name in ("mds", "mds++", "rmds", "rmds++"):
        ridge = None if name.endswith("++") else 0
        x, fit = (unit(x), unit(fit)) if name.endswith("++") else (x, fit)
        nearest = top if a["class_mean"] == "predicted" else None
        overall = mahalanobis_of(x, fit, np.zeros(len(fit)), ridge) if "r" in name else 0
        return mahalanobis_of(x, fit, y, ridge, top=nearest) - overall
    if name == "mahavar":
        return mahalanobis_of(unit(x), unit(fit), y, weight=a["weight"])
    if name == "head_mds":
        return head_tied(unit(x), unit(fit), fit_logits.argmax(1), w)
    if name == "logitgap":
        ordered = -np.sort(-logits, axis=1)
        return ordered[:, 0] - ordered[:, 1 : a["N"] + 1].mean(1)
    if name == "ras":
        curve = np.sort(fit, 1).mean(0)[::-1]
        shaped = np.empty_like(x)
        for i, row in enumerate(x):
            shaped[i, np.argsort(-row, kind="stable")] = curve
        return logsumexp(shaped @ w.T + b, axis=1)
    right = fit_logits.argmax(1) == y
    m = np.stack([fit[right & (y == c)].mean(0) for c in range(len(w))])[top]
    if a["metric"] == "euclidean":
        return -np.linalg.norm(x - m, axis=1)
    return (unit(x) * unit(m)).sum(1) if a["metric"] == "cosine" else (x * m).sum(1)


VARIANTS = [
    *EACH,
    make_score("fdbd", {"distance_as_normalizer": False}),
    make_score("she", {"metric": "cosine"}),
    make_score("she", {"metric": "euclidean"}),
    make_score("gen", {"gamma": 2}),
    make_score("ash", {"percentile": 0}),
    make_score("scale", {"percentile": 62.5}),
    # The defaults of other packages.
    make_score("ash", {"variant": "s", "percentile": 65}),
    make_score("ash", {"variant": "p"}),
    make_score("gen", {"M": 1000, "mean": True, "clamp": 1e-3}),
    make_score("gen", {"M": 3, "gamma": 2, "clamp": 0}),
    make_score("knn", {"K": 7, "root": True}),
    make_score("vim", {"share": 0.9, "origin": "mean"}),
    make_score("vim", {"share": 0.5}),
    *(make_score(n, {"class_mean": "predicted"}) for n in ("mds", "mds++", "rmds", "rmds++")),
]


@pytest.mark.parametrize("score", VARIANTS, ids=str)
def test_scores_equal_a_float64_oracle(score):
    head, fit, labels, state = fitted(score, 300)
    test, _ = make_features(50, head, seed=2)
    arrays = [t.double().numpy() for t in (test.feature, fit.feature, labels, *head)]
    expected = oracle(score, arrays[0], arrays[1], labels.numpy(), *arrays[3:])
    found = score(test, head, state).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * expected.std())


@each_score
def test_id_images_score_higher_than_noise_whatever_the_batch(score):
    head, _, _, state = fitted(score, 400)
    test, _ = make_features(200, head, seed=3)
    noise = torch.randn(200, D, generator=torch.Generator().manual_seed(4)).relu()
    inside, outside = score(test, head, state), score(Features(noise, head(noise)), head, state)
    floor = 0.45 if score.name in ("mds", "rmds") else 0.6  # the norm is what MDS mistakes
    assert (inside.unsqueeze(1) > outside).float().mean() > floor
    single = [score(part(test, slice(i, i + 1)), head, state) for i in range(10)]
    torch.testing.assert_close(torch.cat(single), inside[:10], rtol=1e-4, atol=1e-5)
    assert score(part(test, slice(0)), head, state).shape == (0,)


@each_score
def test_inputs_are_unchanged_and_scores_can_be_pickled(score):
    head, batch, labels, state = fitted(score)
    before = [t.clone() for t in (*batch, *head, labels)]
    scores = score(batch, head, state)
    again, its_state = pickle.loads(pickle.dumps((score, state)))
    assert torch.equal(again(batch, head, its_state), scores)
    assert all(map(torch.equal, (*batch, *head, labels), before))


@each_score
def test_half_precision_is_computed_in_float32_and_without_gradient(score):
    head, _, labels, state = fitted(score)
    weights = Head(*(torch.nn.Parameter(t) for t in head))
    test, labels = make_features(30, head, seed=2)
    for dtype in (torch.float16, torch.bfloat16):
        half = Features(*(t.to(dtype).requires_grad_() for t in test))
        with torch.autocast("cpu", dtype):
            found = score(half, weights, state)
        precise = torch.float64 if score.name == "gen" else torch.float32
        assert (found.dtype, found.requires_grad) == (precise, False)
        assert torch.equal(found, score(Features(*(t.float() for t in half)), head, state))
        assert not any(t.requires_grad for t in fit(score, half, labels, weights).values())


HARD = {
    "one image": lambda f: f[:1],
    "fewer images than K and classes": lambda f: f[:3],
    "fewer images than dimensions": lambda f: f[: D // 2],
    "as many images as dimensions": lambda f: f[:D],
    "constant features": lambda f: f[:1].expand(60, -1),
    "zero features": lambda f: torch.zeros_like(f),
    "one zero feature": lambda f: torch.cat([torch.zeros(1, f.shape[1]), f]),
    "a feature far off": lambda f: torch.cat([f[:1] * 1e6, f]),
    "dead units": lambda f: f * (torch.arange(f.shape[1]) < 6),
}


@pytest.mark.parametrize("name", POSTHOC)
def test_scores_stay_finite(name):
    head, score = make_head(), make_score(name)
    for case, feature_of in HARD.items():
        feature = feature_of(make_features(100, head)[0].feature)
        batch = Features(feature, head(feature))
        labels = batch.logits.argmax(1)
        test = make_features(20, head, seed=2)[0].feature
        test = torch.cat([test, torch.zeros(1, D), 1e6 * test[:1], -1e6 * test[:1], feature[:1]])
        state = fit(score, batch, labels, head)
        assert torch.isfinite(score(Features(test, head(test)), head, state)).all(), case
        of_fit = score(batch, head, state, labels)
        assert of_fit.shape == (len(feature),)
        assert torch.isfinite(of_fit).all(), case


@each_score
@settings(max_examples=3)
@given(seed=st.integers(0, 2**31))
def test_the_order_of_the_fit_images_changes_nothing(score, seed):
    head, batch, labels, state = fitted(score, 60)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
    other = part(batch, order)
    permuted = fit(score, other, labels[order], head)
    test, _ = make_features(20, head, seed=2)
    close = torch.testing.assert_close
    close(score(test, head, permuted), score(test, head, state), rtol=1e-4, atol=1e-4)
    of_fit = score(batch, head, state, labels)[order]
    close(score(other, head, permuted, labels[order]), of_fit, rtol=1e-3, atol=1e-4)


@scores_named("knn", "she")
def test_a_fit_image_is_scored_without_itself(score):
    head, batch, labels, _ = fitted(score, 60)
    labels[-1], labels[:-1][labels[:-1] == 0] = 0, 1  # a class of one image
    state = fit(score, batch, labels, head)
    found, expected = score(batch, head, state, labels), []
    for i in range(60):  # fitted on all the others
        others = torch.arange(60) != i
        of_others = fit(score, part(batch, others), labels[others], head)
        expected.append(score(part(batch, slice(i, i + 1)), head, of_others))
    close = torch.isclose(found, torch.cat(expected), rtol=1e-4, atol=1e-5)
    # The mean of all images, SHE's substitute, keeps the image itself.
    alone = labels == 0 if score.name == "she" else torch.zeros(60, dtype=torch.bool)
    assert close[~alone].all()
    assert (score(batch, head, state) > found + 1e-4).float().mean() > 0.3


@scores_named("mds++")
@pytest.mark.parametrize("n", [20, 60, 300])
def test_mds_scores_a_fit_image_without_itself(score, n):
    head, batch, labels, _ = fitted(score, n)
    labels[-1], labels[:-1][labels[:-1] == 0] = 0, 1  # a class of one image
    found = score(batch, head, fit(score, batch, labels, head), labels).numpy()
    z, y = unit(batch.feature.double().numpy()), labels.numpy()
    r = z - np.stack([z[y == c].mean(0) for c in y])
    ridge = RIDGE * (r**2).sum() / n / D
    expected = [
        mahalanobis_of(z[i : i + 1], np.delete(z, i, 0), np.delete(y, i), ridge, divisor=n)[0]
        for i in range(n)
    ]
    np.testing.assert_allclose(found, expected, rtol=2e-3)


@scores_named("head_mds")
@pytest.mark.parametrize("n", [20, 300])
def test_head_mds_scores_a_fit_image_without_its_part_of_the_covariance(score, n):
    head, batch, labels, state = fitted(score, n)
    z, top = unit(batch.feature.double().numpy()), batch.logits.argmax(1).numpy()
    w = head.weight.double().numpy()
    expected = [head_tied(z[i : i + 1], z, top, w, removed=i)[0] for i in range(n)]
    np.testing.assert_allclose(score(batch, head, state, labels), expected, rtol=2e-3)


@each_score
def test_parts_of_the_fit_images_have_the_scores_and_sums_that_they_have_among_all(score):
    head, batch, labels, state = fitted(score)
    whole = score(batch, head, state, labels)
    some = score(part(batch, slice(None, None, 4)), head, state, labels[::4])
    torch.testing.assert_close(some, whole[::4], rtol=1e-4, atol=1e-5)
    for blocks in ([1, 199], [70, 130]):
        parts = zip(*(t.split(blocks) for t in (*batch, labels)), strict=True)
        sums = [score.sums(Features(f, z), y) for f, z, y in parts]
        total = {key: sum(s[key] for s in sums) for key in sums[0]}
        assert all(t.dtype in (torch.float64, torch.int64) for t in total.values())
        again = score(batch, head, score.fit(total, batch, head))
        torch.testing.assert_close(again, score(batch, head, state), rtol=1e-5, atol=1e-5)


@scores_named("knn", "mds++", "rmds", "mahavar", "head_mds")
def test_scores_in_parts_are_the_same(score, monkeypatch):
    head, batch, labels, state = fitted(score)
    whole = [score(batch, head, state), score(batch, head, state, labels)]
    monkeypatch.setattr(scores_base, "PART_BYTES", 4 * 200 * 3)  # three rows of KNN's distances
    parts = [score(batch, head, state), score(batch, head, state, labels)]
    torch.testing.assert_close(parts, whole)
    rows = scores_base.row_parts(batch.feature, 200)
    assert max(map(len, rows)) == 3


@scores_named("knn")
def test_knn_takes_the_farthest_of_fewer_than_k_images(score):
    head, _, _, state = fitted(score, 5)
    test, _ = make_features(9, head, seed=2)
    assert torch.equal(*(make_score("knn", {"K": k})(test, head, state) for k in (5, 50)))


@scores_named("vim")
def test_vim_halves_a_dim_that_leaves_no_residual(score):
    head, batch, labels, _ = fitted(score)
    for dim, n, left in ((10, 200, D - 10), (D, 200, D // 2), (999, 200, D // 2), (10, 8, D - 4)):
        state = fit(make_score("vim", {"dim": dim}), part(batch, slice(n)), labels[:n], head)
        assert state["residual"].shape == (D, left)


@scores_named("she")
def test_she_compares_with_the_mean_of_all_images_where_a_class_has_none(score):
    head, batch, labels, _ = fitted(score)
    predicted = batch.logits.argmax(1)
    others = (labels != 2) & (predicted != 2)
    some = part(batch, others)
    state = fit(score, some, labels[others], head)
    of_class = part(batch, predicted == 2)
    expected = (of_class.feature * some.feature.mean(0)).sum(1)
    torch.testing.assert_close(score(of_class, head, state), expected)


def test_an_image_of_a_class_without_images_is_compared_with_the_closest_mean():
    head, batch, labels, _ = fitted(make_score("mds"))
    some, y = part(batch, labels != 2), labels[labels != 2]
    closest, predicted = (
        score(batch, head, fit(score, some, y, head))
        for score in (make_score("mds"), make_score("mds", {"class_mean": "predicted"}))
    )
    absent = batch.logits.argmax(1) == 2
    assert torch.equal(closest[absent], predicted[absent])
    assert (closest[~absent] > predicted[~absent]).any()


@scores_named("mds++")
def test_mds_leaves_out_classes_without_images(score):
    head, batch, labels, _ = fitted(score)
    some = part(batch, labels != 2)
    state = fit(score, some, labels[labels != 2], head)
    assert len(state["means"]) == K - 1
    x, of_fit = (unit(b.feature.double().numpy()) for b in (batch, some))
    expected = mahalanobis_of(x, of_fit, labels[labels != 2].numpy())
    np.testing.assert_allclose(score(batch, head, state), expected, rtol=1e-3)


@pytest.mark.parametrize("name", ["ash", "scale"])
@pytest.mark.parametrize("percentile", [0, 85, 99.99])
def test_activation_shaping_is_finite_where_activations_cancel(name, percentile):
    arguments = {"percentile": percentile, **({"variant": "s"} if name == "ash" else {})}
    head = make_head()
    rows = [
        [1.0, -1.0] * (D // 2),
        [-1.0] * D,
        [1e-30] + [-1.0] * (D - 1),
        [1.0] + [-1.0] + [0.0] * (D - 2),
        [0.0, 0.0, 0.0, 0.0] + [-5.0] * (D - 4),
        [-1e-8] * 4 + [-1e6] * (D - 4),
    ]
    feature = torch.tensor(rows)
    scores = make_score(name, arguments)(Features(feature, head(feature)), head)
    assert torch.isfinite(scores).all()


def test_gen_does_not_saturate_where_the_softmax_does():
    logits = torch.tensor([[20.0, 0, 0], [30.0, 0, 0], [40.0, 0, 0]])
    assert (make_score("gen")(Features(logits, logits)).diff() > 0.05).all()


@scores_named("fdbd")
def test_fdbd_ignores_a_class_with_the_same_weights(score):
    head, batch, labels, state = fitted(score)
    twin = Head(torch.cat([head.weight, head.weight[:1]]), torch.cat([head.bias, head.bias[:1]]))
    doubled = Features(batch.feature, twin(batch.feature))
    first = batch.logits.argmax(1) == 0
    found = score(doubled, twin, fit(score, doubled, labels, twin))[first]
    torch.testing.assert_close(found, score(batch, head, state)[first])


@scores_named("knn", "nci", "fdbd", "vim", "mds", "mds++", "head_mds", "ras", "she")
def test_a_fit_without_images_is_refused(score):
    head, batch, labels, _ = fitted(score)
    with pytest.raises(DataError, match="at least one ID image"):
        fit(score, part(batch, slice(0)), labels[:0], head)


@scores_named("mds", "mds++", "rmds", "she")
def test_labels_outside_the_classes_are_refused(score):
    head, batch, labels, _ = fitted(score)
    for label in (-1, K):
        with pytest.raises(DataError, match=f"from 0 to 4, got {label}"):
            fit(score, batch, labels.index_fill(0, torch.tensor(3), label), head)
    with pytest.raises(DataError, match=r"got shape \(7,\) for 200 images"):
        fit(score, batch, labels[:7], head)


@pytest.mark.parametrize(
    ("name", "arguments", "named"),
    [
        ("knm", {}, "'knm' .did you mean 'knn'.*: choose from .*knn, logitgap"),
        ("gen", {"k": 1}, "'k' of gen: choose from gamma, M"),
        ("mds++", {"K": 1}, "'K' of mds.*: choose from class_mean"),
        ("mls", {"K": 1}, "'K' of mls.*: none exists"),
        ("ash", {"variant": "x"}, "variant must be one of b, s, p, got 'x'"),
        ("vim", {"share": 1}, "share must be .* or None, got 1"),
        ("gen", {"clamp": 0.5}, "clamp must be .* got 0.5"),
        ("knn", {"K": 0}, "knn: K must be .* >= 1, got 0"),
        ("knn", {"K": 2.5}, "K must be .* got 2.5"),
        ("gen", {"gamma": 0}, "gamma must be .* > 0, got 0"),
        ("nci", {"alpha": -1}, "alpha must be .* >= 0, got -1"),
        ("ash", {"percentile": 100}, "percentile must be .* < 100, got 100"),
        ("fdbd", {"distance_as_normalizer": 1}, "distance_as_normalizer must be .* got 1"),
        ("she", {"metric": "l2"}, "must be one of inner_product, cosine, euclidean, got 'l2'"),
        ("ebo", {"temperature": 0}, "temperature must be .* > 0, got 0"),
        ("odin", {"noise": -1}, "noise must be .* >= 0, got -1"),
        ("react", {"percentile": 0}, "percentile must be .* got 0"),
    ],
)
def test_invalid_arguments_are_refused(name, arguments, named):
    with pytest.raises(ConfigError, match=named):
        make_score(name, arguments)


@pytest.mark.parametrize("name", SCORES)
def test_the_configuration_holds_the_defaults(name):
    path = config_root() / "postprocessors" / f"{name}.yml"
    section = yaml.safe_load(path.read_text())["postprocessor"]
    assert section["name"] == name
    assert section["APS_mode"] is False
    arguments = section.get("postprocessor_args", {})
    assert arguments.keys() == SCORES[name].arguments().keys()
    if name in POSTHOC:
        assert arguments == SCORES[name].arguments()
    make_score(name, arguments)
    for key, values in section.get("postprocessor_sweep", {}).items():
        for value in values:
            make_score(name, {key.removesuffix("_list"): value})


LOGITS = torch.randn(40, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 4


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1000.0])
def test_scores_of_logits_equal_scipys(temperature):
    x, batch = LOGITS.numpy() / temperature, Features(LOGITS[:, :0], LOGITS)
    p = softmax(x, axis=1).max(axis=1)
    for cls in (MSP, ODIN):
        np.testing.assert_allclose(cls(temperature)(batch), p, rtol=1e-12)
        fused = cls(temperature, fused=True)(batch)
        np.testing.assert_allclose(fused, np.log(p / (1 - p)), rtol=1e-6)
    energy = temperature * logsumexp(x, axis=1)
    np.testing.assert_allclose(Energy(temperature)(batch), energy)
    np.testing.assert_array_equal(MLS()(batch), LOGITS.numpy().max(axis=1))


@given(st.floats(-50, 50))
def test_log_odds_rank_without_saturation(margin):
    a, b = torch.tensor([[margin, 0.0]]), torch.tensor([[abs(margin) + 1, 0.0]])
    assert log_odds(a) < log_odds(b)
    saturated = torch.tensor([[100.0, 0, 0], [200.0, 0, 0], [300.0, 0, 0]])
    assert (MSP().of_logits(saturated) == 1).all()
    assert (log_odds(saturated).diff() > 0).all()
    assert torch.isfinite(log_odds(saturated)).all()


def test_scores_inside_the_fusion_are_float64():
    for cls in (MSP, MLS, Energy, ODIN):
        half = Features(LOGITS[:, :0], LOGITS.half())
        assert cls(fused=True)(half).dtype == torch.float64
    # At T = 1000, float32 probabilities of close logits tie; these scores do not.
    close = torch.tensor([[1.0, 0.0], [1.00001, 0.0], [1.00002, 0.0]])
    batch = Features(close, close)
    assert len(ODIN()(batch).unique()) < 3
    assert len(ODIN(fused=True)(batch).unique()) == 3


def linear_net(pixels, dtype=torch.float32):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(pixels, 4)).to(dtype)


def odin_images(net, images, noise=0.01, input_std=None):
    return odin_step(images, odin_direction(images, net(images), 1000.0), noise, input_std)


def test_odins_gradient_survives_half_precision():
    images, steps = torch.randn(6, 3, 3, 3), []
    for dtype in (torch.float32, torch.float16):
        leaf = images.to(dtype).requires_grad_()
        moved = odin_images(linear_net(27, dtype), leaf)
        assert moved.dtype == dtype
        steps.append((moved - leaf).sign().float())
    assert (steps[0] == steps[1]).float().mean() > 0.99


def test_odin_divides_its_step_by_the_channels_standard_deviation():
    net, images = linear_net(12), torch.randn(2, 3, 2, 2, requires_grad=True)
    steps = (odin_images(net, images, 0.01, (0.1, 0.2, 0.5)) - images).abs()[0, :, 0, 0].tolist()
    assert steps == pytest.approx([0.1, 0.05, 0.02], rel=1e-4)
    with pytest.raises(ConfigError, match="2 entries for images with 3 channels"):
        odin_images(net, images, input_std=(1.0, 1.0))


def test_a_gradient_of_zero_counts_as_positive():
    images = torch.ones(1, 1, 1, 3, requires_grad=True)
    score = (images * torch.tensor([-1.0, 0.0, 2.0])).sum((1, 2, 3))  # 1, so class 0
    direction = odin_direction(images, torch.stack([score, -score], dim=1), 1000)
    assert odin_step(images, direction, 0.5).flatten().tolist() == [0.5, 0.5, 1.5]
