"""Post-hoc experts against float64 oracles, pytorch-ood and the inputs that break them."""

import importlib
import pickle

import numpy as np
import pytest
import torch
import yaml
from fusenorm_openood.method.covariance import RIDGE
from fusenorm_openood.method.posthoc import POSTHOC, Head, Seen, check_arguments
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp, softmax

from fusenorm_openood.errors import ConfigError, DataError
from fusenorm_openood.method import seen as seen_module
from fusenorm_openood.storage.configs import config_root

ALL = list(POSTHOC)
D, K = 24, 5


def make_head(d=D, k=K, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Head(torch.randn(k, d, generator=g), torch.randn(k, generator=g))


def make_seen(n, head, seed=1, relu=True):
    """Features that cluster around the weights of their class, and their logits."""
    g = torch.Generator().manual_seed(seed)
    k, d = head.weight.shape
    labels = torch.randint(0, k, (n,), generator=g)
    feature = torch.randn(n, d, generator=g) + 0.7 * head.weight[labels]
    feature = feature.relu() if relu else feature
    return Seen(feature, head(feature)), labels


def changed(name):
    """Arguments other than the defaults, suited to few images."""
    few = {
        "knn": {"K": 7},
        "vim": {"dim": 10},
        "gen": {"M": 3, "gamma": 0.3},
        "nci": {"alpha": 0.1},
    }
    return check_arguments(name, few.get(name, {}))


def fitted(name, n=200, **options):
    head = make_head(**options)
    seen, labels = make_seen(n, head)
    return head, seen, labels, POSTHOC[name].fit(seen, labels, head, changed(name))


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def mahalanobis_of(x, fit, y, ridge=RIDGE, divisor=None):
    """Closest squared distance of rows x to the class means of (fit, y)."""
    classes = np.unique(y)
    means = {c: fit[y == c].mean(0) for c in classes}
    r = fit - np.stack([means[c] for c in y])
    s = r.T @ r / (divisor or len(fit))
    s += (np.trace(s) / len(s) * RIDGE if ridge is RIDGE else ridge) * np.eye(len(s))
    inverse = np.linalg.inv(s)
    return -np.min([np.einsum("nd,de,ne->n", x - m, inverse, x - m) for m in means.values()], 0)


def oracle(name, x, fit, y, w, b, a):
    """Scores of features x in float64, one image or class at a time where that is simpler."""
    logits, fit_logits = x @ w.T + b, fit @ w.T + b
    top, mean = logits.argmax(1), fit.mean(0)
    if name == "knn":
        squares = ((unit(x)[:, None] - unit(fit)[None]) ** 2).sum(2)
        return -np.sort(squares, 1)[:, a["K"] - 1]
    if name == "nci":
        c = x - mean
        return (w[top] * c).sum(1) / np.linalg.norm(c, axis=1) + a["alpha"] * np.abs(x).sum(1)
    if name == "gen":
        p = np.sort(softmax(logits, axis=1), 1)[:, -a["M"] :]
        return -((p * (1 - p)) ** a["gamma"]).sum(1)
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
            if name == "ash":
                out[i, kept] = row.sum() / k
            else:
                out[i] = row * np.exp(row.sum() / row[kept].sum())
        return logsumexp(out @ w.T + b, axis=1)
    if name == "vim":
        u = -np.linalg.pinv(w) @ b
        values, vectors = np.linalg.eigh((fit - u).T @ (fit - u))
        ns = vectors[:, np.argsort(-values)[a["dim"] :]]
        alpha = fit_logits.max(1).mean() / np.linalg.norm((fit - u) @ ns, axis=1).mean()
        return logsumexp(logits, axis=1) - alpha * np.linalg.norm((x - u) @ ns, axis=1)
    if name == "mds":
        return mahalanobis_of(unit(x), unit(fit), y)
    right = fit_logits.argmax(1) == y
    m = np.stack([fit[right & (y == c)].mean(0) for c in range(len(w))])[top]
    if a["metric"] == "euclidean":
        return -np.linalg.norm(x - m, axis=1)
    return (unit(x) * unit(m)).sum(1) if a["metric"] == "cosine" else (x * m).sum(1)


VARIANTS = [
    *((name, {}) for name in ALL),
    ("fdbd", {"distance_as_normalizer": False}),
    ("she", {"metric": "cosine"}),
    ("she", {"metric": "euclidean"}),
    ("gen", {"gamma": 2, "M": 100}),
    ("ash", {"percentile": 0}),
    ("scale", {"percentile": 62.5}),
]


@pytest.mark.parametrize(("name", "arguments"), VARIANTS, ids=lambda v: str(v))
def test_scores_equal_a_float64_oracle(name, arguments):
    arguments = {**changed(name), **arguments}
    head = make_head()
    (fit, labels), (test, _) = make_seen(300, head), make_seen(50, head, seed=2)
    state = POSTHOC[name].fit(fit, labels, head, arguments)
    got = POSTHOC[name].score(test, head, state, arguments).numpy()
    arrays = (t.double().numpy() for t in (test.feature, fit.feature))
    w, b = (t.double().numpy() for t in head)
    expected = oracle(name, next(arrays), next(arrays), labels.numpy(), w, b, arguments)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * expected.std())


@pytest.mark.parametrize("name", ALL)
def test_id_images_score_higher_than_noise(name):
    head, _, _, state = fitted(name, 400)
    test, _ = make_seen(200, head, seed=3)
    g = torch.Generator().manual_seed(4)
    noise = torch.randn(200, D, generator=g).relu()
    inside, outside = (
        POSTHOC[name].score(s, head, state, changed(name)) for s in (test, Seen(noise, head(noise)))
    )
    assert (inside.unsqueeze(1) > outside).float().mean() > 0.6


@pytest.mark.parametrize("name", ALL)
def test_scores_do_not_depend_on_the_batch(name):
    head, _, _, state = fitted(name)
    test, _ = make_seen(40, head, seed=2)
    score = POSTHOC[name].score
    whole = score(test, head, state, changed(name))
    single = [
        score(Seen(*(t[i : i + 1] for t in test)), head, state, changed(name)) for i in range(40)
    ]
    torch.testing.assert_close(torch.cat(single), whole, rtol=1e-4, atol=1e-5)
    empty = score(Seen(*(t[:0] for t in test)), head, state, changed(name))
    assert empty.shape == (0,)


@pytest.mark.parametrize("name", ALL)
def test_inputs_are_unchanged_and_states_can_be_pickled(name):
    head, fit, labels, state = fitted(name)
    before = [t.clone() for t in (*fit, *head, labels)]
    scores = POSTHOC[name].score(fit, head, state, changed(name))
    again = pickle.loads(pickle.dumps((POSTHOC[name], state)))
    assert torch.equal(again[0].score(fit, head, again[1], changed(name)), scores)
    assert all(map(torch.equal, (*fit, *head, labels), before))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(name, dtype):
    head, _, _, state = fitted(name)
    test, _ = make_seen(30, head, seed=2)
    half = Seen(*(t.to(dtype) for t in test))
    with torch.autocast("cpu", dtype):
        got = POSTHOC[name].score(half, head, state, changed(name))
    expected = POSTHOC[name].score(Seen(*(t.float() for t in half)), head, state, changed(name))
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)


@pytest.mark.parametrize("name", ALL)
def test_scores_carry_no_gradient(name):
    head, fit, labels, _ = fitted(name)
    head = Head(*(torch.nn.Parameter(t) for t in head))
    fit = Seen(fit.feature.clone().requires_grad_(), head(fit.feature))
    state = POSTHOC[name].fit(fit, labels, head, changed(name))
    assert not any(t.requires_grad for t in state.values())
    assert not POSTHOC[name].score(fit, head, state, changed(name)).requires_grad


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


@pytest.mark.parametrize("case", HARD)
@pytest.mark.parametrize("name", ALL)
def test_scores_stay_finite(name, case):
    head = make_head()
    feature = HARD[case](make_seen(100, head)[0].feature)
    fit = Seen(feature, head(feature))
    test = make_seen(20, head, seed=2)[0].feature
    test = torch.cat([test, torch.zeros(1, D), 1e6 * test[:1], -1e6 * test[:1], feature[:1]])
    arguments, expert = check_arguments(name, {}), POSTHOC[name]
    state = expert.fit(fit, fit.logits.argmax(1), head, arguments)
    assert torch.isfinite(expert.score(Seen(test, head(test)), head, state, arguments)).all()
    in_sample = expert.score_fit(fit, head, state, arguments, fit.logits.argmax(1))
    assert in_sample.shape == (len(feature),)
    assert torch.isfinite(in_sample).all()


@pytest.mark.parametrize("name", ALL)
def test_a_thousand_classes_with_five_images_each(name):
    head = make_head(16, 1000)
    labels = torch.arange(5000) % 1000
    g = torch.Generator().manual_seed(0)
    feature = (torch.randn(5000, 16, generator=g) * 0.3 + head.weight[labels]).relu()
    fit, arguments = Seen(feature, head(feature)), check_arguments(name, {})
    state = POSTHOC[name].fit(fit, labels, head, arguments)
    of_fit = POSTHOC[name].score_fit(fit, head, state, arguments, labels)
    for scores in (POSTHOC[name].score(fit, head, state, arguments), of_fit):
        assert torch.isfinite(scores).all()
        assert len(scores.unique()) > 1000


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_the_order_of_the_fit_images_changes_nothing(name, seed):
    head, fit, labels, state = fitted(name, 60)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
    other = Seen(*(t[order] for t in fit))
    permuted = POSTHOC[name].fit(other, labels[order], head, changed(name))
    test, _ = make_seen(20, head, seed=2)
    scores = [POSTHOC[name].score(test, head, s, changed(name)) for s in (state, permuted)]
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-4)
    in_sample = POSTHOC[name].score_fit(fit, head, state, changed(name), labels)[order]
    again = POSTHOC[name].score_fit(other, head, permuted, changed(name), labels[order])
    torch.testing.assert_close(again, in_sample, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["knn", "mds"])
@settings(max_examples=20, deadline=None)
@given(scale=st.floats(1e-3, 1e3))
def test_scaling_a_feature_does_not_change_experts_that_normalise_it(name, scale):
    head, _, _, state = fitted(name)
    test, _ = make_seen(10, head, seed=2)
    scores = [
        POSTHOC[name].score(Seen(f, test.logits), head, state, changed(name))
        for f in (test.feature, test.feature * scale)
    ]
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-5)


def brute_force(name, fit, labels, head):
    """Scores of every image by an expert fitted on all the others."""
    scores = []
    for i in range(len(labels)):
        keep = torch.arange(len(labels)) != i
        state = POSTHOC[name].fit(Seen(*(t[keep] for t in fit)), labels[keep], head, changed(name))
        one = Seen(*(t[i : i + 1] for t in fit))
        scores.append(POSTHOC[name].score(one, head, state, changed(name)))
    return torch.cat(scores)


@pytest.mark.parametrize("name", ["knn", "she"])
def test_a_fit_image_is_scored_without_itself(name):
    head, fit, labels, state = fitted(name, 60)
    labels[-1], labels[:-1][labels[:-1] == 0] = 0, 1  # a class of one image
    state = POSTHOC[name].fit(fit, labels, head, changed(name))
    got = POSTHOC[name].score_fit(fit, head, state, changed(name), labels)
    expected = brute_force(name, fit, labels, head)
    close = torch.isclose(got, expected, rtol=1e-4, atol=1e-5)
    # The mean of all images, SHE's substitute, keeps the image itself.
    alone = labels == 0 if name == "she" else torch.zeros(60, dtype=torch.bool)
    assert close[~alone].all()
    in_sample = POSTHOC[name].score(fit, head, state, changed(name))
    assert (in_sample > got + 1e-4).float().mean() > 0.3


@pytest.mark.parametrize("n", [20, 60, 300])
def test_mds_scores_a_fit_image_without_itself(n):
    head, fit, labels, _ = fitted("mds", n)
    labels[-1], labels[:-1][labels[:-1] == 0] = 0, 1  # a class of one image
    state = POSTHOC["mds"].fit(fit, labels, head, {})
    got = POSTHOC["mds"].score_fit(fit, head, state, {}, labels).numpy()
    z, y = unit(fit.feature.double().numpy()), labels.numpy()
    r = z - np.stack([z[y == c].mean(0) for c in y])
    ridge = RIDGE * (r**2).sum() / n / D
    expected = [
        mahalanobis_of(z[i : i + 1], np.delete(z, i, 0), np.delete(y, i), ridge, divisor=n)[0]
        for i in range(n)
    ]
    np.testing.assert_allclose(got, expected, rtol=2e-3)


def test_mds_scores_of_fit_images_are_like_those_of_others_where_n_is_about_d():
    head = make_head(64, 5)
    (fit, labels), (test, _) = make_seen(70, head), make_seen(500, head, seed=2)
    state = POSTHOC["mds"].fit(fit, labels, head, {})
    held_out = POSTHOC["mds"].score(test, head, state, {}).median()
    in_sample = POSTHOC["mds"].score(fit, head, state, {}).median()
    left_out = POSTHOC["mds"].score_fit(fit, head, state, {}, labels).median()
    assert in_sample / held_out < 0.3
    assert 0.7 < left_out / held_out < 1.4


@pytest.mark.parametrize("name", ALL)
def test_part_of_the_fit_images_has_the_scores_that_it_has_among_all(name):
    head, fit, labels, state = fitted(name)
    score_fit = POSTHOC[name].score_fit
    whole = score_fit(fit, head, state, changed(name), labels)
    part = score_fit(Seen(*(t[::4] for t in fit)), head, state, changed(name), labels[::4])
    torch.testing.assert_close(part, whole[::4], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("blocks", [[200], [1, 199], [70, 0, 130], [50] * 4])
def test_sums_over_blocks_add_up_to_the_fit_of_all_images(name, blocks):
    head, fit, labels, whole = fitted(name)
    parts = zip(*(t.split(blocks) for t in (*fit, labels)), strict=True)
    sums = [POSTHOC[name].sums(Seen(f, z), y) for f, z, y in parts if len(y)]
    total = {key: sum(s[key] for s in sums) for key in sums[0]}
    assert all(t.dtype in (torch.float64, torch.int64) for t in total.values())
    state = POSTHOC[name].finish(total, fit, head, changed(name))
    test, _ = make_seen(30, head, seed=2)
    scores = [POSTHOC[name].score(test, head, s, changed(name)) for s in (state, whole)]
    torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-5)


def test_knn_has_the_same_scores_in_parts(monkeypatch):
    head, _, _, state = fitted("knn")
    test, _ = make_seen(40, head, seed=2)
    whole = POSTHOC["knn"].score(test, head, state, {"K": 7})
    monkeypatch.setattr(seen_module, "PART_BYTES", 4 * 200 * 3)
    sizes = []
    addmm = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *a, **k: sizes.append(len(a[1])) or addmm(*a, **k))
    parts = POSTHOC["knn"].score(test, head, state, {"K": 7})
    assert max(sizes) == 3
    torch.testing.assert_close(parts, whole)


def test_knn_takes_the_farthest_of_fewer_than_k_images():
    head, _, _, state = fitted("knn", 5)
    test, _ = make_seen(9, head, seed=2)
    assert torch.equal(*(POSTHOC["knn"].score(test, head, state, {"K": k}) for k in (5, 50)))


def test_vim_halves_a_dim_that_leaves_no_residual():
    head, fit, labels, _ = fitted("vim")
    for dim, n, residual in (
        (10, 200, D - 10),
        (D, 200, D // 2),
        (999, 200, D // 2),
        (10, 8, D - 4),
    ):
        part = Seen(*(t[:n] for t in fit))
        state = POSTHOC["vim"].fit(part, labels[:n], head, {"dim": dim})
        assert state["residual"].shape == (D, residual)


def test_she_compares_with_the_mean_of_all_images_where_a_class_has_none():
    head, fit, labels, _ = fitted("she")
    wrong = (labels == 2) | (fit.logits.argmax(1) == 2)
    some = Seen(*(t[~wrong] for t in fit))
    state = POSTHOC["she"].fit(some, labels[~wrong], head, changed("she"))
    one = Seen(
        fit.feature[fit.logits.argmax(1) == 2][:1], fit.logits[fit.logits.argmax(1) == 2][:1]
    )
    got = POSTHOC["she"].score(one, head, state, changed("she"))
    torch.testing.assert_close(got, (one.feature * some.feature.mean(0)).sum(1))


def test_mds_leaves_out_classes_without_images():
    head, fit, labels, _ = fitted("mds")
    some = Seen(*(t[labels != 2] for t in fit))
    state = POSTHOC["mds"].fit(some, labels[labels != 2], head, {})
    assert len(state["means"]) == K - 1
    expected = mahalanobis_of(
        *(unit(s.feature.double().numpy()) for s in (fit, some)), labels[labels != 2].numpy()
    )
    np.testing.assert_allclose(POSTHOC["mds"].score(fit, head, state, {}), expected, rtol=1e-3)


@pytest.mark.parametrize("name", ["ash", "scale"])
@pytest.mark.parametrize("percentile", [0, 85, 99.99])
def test_activation_shaping_is_finite_where_activations_cancel(name, percentile):
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
    scores = POSTHOC[name].score(Seen(feature, head(feature)), head, {}, {"percentile": percentile})
    assert torch.isfinite(scores).all()


def test_gen_does_not_saturate_where_the_softmax_does():
    logits = torch.tensor([[20.0, 0, 0], [30.0, 0, 0], [40.0, 0, 0]])
    scores = POSTHOC["gen"].score(Seen(logits, logits), make_head(), {}, {"gamma": 0.1, "M": 100})
    assert (scores.diff() > 0.05).all()


def test_fdbd_ignores_a_class_with_the_same_weights():
    head, fit, labels, _ = fitted("fdbd")
    twin = Head(torch.cat([head.weight, head.weight[:1]]), torch.cat([head.bias, head.bias[:1]]))
    doubled = Seen(fit.feature, twin(fit.feature))
    state = POSTHOC["fdbd"].fit(doubled, labels, twin, changed("fdbd"))
    first = fit.logits.argmax(1) == 0
    got = POSTHOC["fdbd"].score(doubled, twin, state, changed("fdbd"))[first]
    state = POSTHOC["fdbd"].fit(fit, labels, head, changed("fdbd"))
    expected = POSTHOC["fdbd"].score(fit, head, state, changed("fdbd"))[first]
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", ["knn", "nci", "fdbd", "vim", "mds", "she"])
def test_a_fit_without_images_is_refused(name):
    head, fit, labels, _ = fitted(name)
    with pytest.raises(DataError, match="at least one ID image"):
        POSTHOC[name].fit(Seen(*(t[:0] for t in fit)), labels[:0], head, changed(name))


@pytest.mark.parametrize("name", ["mds", "she"])
def test_labels_outside_the_classes_are_refused(name):
    head, fit, labels, _ = fitted(name)
    for label in (-1, K):
        with pytest.raises(DataError, match=f"from 0 to 4, got {label}"):
            POSTHOC[name].fit(
                fit, labels.index_fill(0, torch.tensor(3), label), head, changed(name)
            )
    with pytest.raises(DataError, match=r"got shape \(7,\) for 200 images"):
        POSTHOC[name].fit(fit, labels[:7], head, changed(name))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("knm", {}, "'knm': choose from knn, nci"),
        ("gen", {"k": 1}, "'k' of gen: choose from gamma, M"),
        ("mds", {"K": 1}, "'K' of mds: it has none"),
        ("knn", {"K": 0}, "K of knn must be an integer >= 1, got 0"),
        ("knn", {"K": 2.5}, "got 2.5"),
        ("knn", {"K": True}, "got True"),
        ("gen", {"gamma": 0}, "gamma of gen must be a finite number > 0, got 0"),
        ("gen", {"M": "10"}, "M of gen must be an integer >= 1, got '10'"),
        ("nci", {"alpha": -1}, "alpha of nci must be a finite number >= 0, got -1"),
        ("nci", {"alpha": float("nan")}, "got nan"),
        ("ash", {"percentile": 100}, "percentile of ash must be a number >= 0 and < 100, got 100"),
        ("scale", {"percentile": -1}, "got -1"),
        ("fdbd", {"distance_as_normalizer": 1}, "must be true or false, got 1"),
        ("vim", {"dim": 0}, "dim of vim must be an integer >= 1, got 0"),
        ("she", {"metric": "l2"}, "must be one of inner_product, cosine, euclidean, got 'l2'"),
    ],
)
def test_invalid_arguments_are_refused(name, arguments, message):
    with pytest.raises(ConfigError, match=message):
        check_arguments(name, arguments)


@pytest.mark.parametrize("name", ALL)
def test_the_configuration_holds_the_defaults(name):
    path = config_root() / "postprocessors" / f"{name}.yml"
    section = yaml.safe_load(path.read_text())["postprocessor"]
    assert section["name"] == name
    assert section["APS_mode"] is False
    assert section.get("postprocessor_args", {}) == check_arguments(name, {})
    for key, values in section.get("postprocessor_sweep", {}).items():
        for value in values:
            check_arguments(name, {key.removesuffix("_list"): value})


def pytorch_ood_score(name, fit, labels, test, head, arguments):
    """Outlier scores of pytorch-ood's detector for the same features, with the sign turned."""
    detectors = pytest.importorskip("pytorch_ood.detector")
    identity = torch.nn.Identity()
    if name == "knn":
        detector = detectors.KNN(identity, k=arguments["K"])
        detector.fit_features(*(torch.nn.functional.normalize(fit.feature), labels))
        return -detector.predict_features(torch.nn.functional.normalize(test.feature))
    if name == "she":
        detector = detectors.SHE(identity, torch.nn.Linear(D, K))
        with torch.no_grad():
            detector.head.weight.copy_(head.weight)
            detector.head.bias.copy_(head.bias)
        right = fit.logits.argmax(1) == labels
        detector.fit_features(fit.feature[right], labels[right])
        return -detector.predict_features(test.feature)
    if name == "vim":
        detector = detectors.ViM(identity, d=arguments["dim"], w=head.weight, b=head.bias)
        detector.fit_features(fit.feature, labels)
        return -detector.predict_features(test.feature)
    if name == "gen":  # theirs is the mean
        detector = detectors.GEN(None, gamma=arguments["gamma"], M=arguments["M"])
        return -detector.predict_logits(test.logits) * arguments["M"]
    linear = torch.nn.Linear(D, K)
    linear.load_state_dict({"weight": head.weight, "bias": head.bias})
    if name == "nci":
        detector = detectors.NCI(identity, linear, alpha=arguments["alpha"])
        return -detector.fit_features(fit.feature).predict_features(test.feature)
    shape = {
        "ash": importlib.import_module("pytorch_ood.detector.ash").ash_b,
        "scale": importlib.import_module("pytorch_ood.detector.scale").scale,
    }[name]
    maps = test.feature.clone()[:, :, None, None]
    shaped = shape(maps, arguments["percentile"] / 100).flatten(1)
    return linear(shaped).detach().logsumexp(1)


@pytest.mark.parametrize("name", ["knn", "she", "vim", "gen", "nci", "ash", "scale"])
def test_scores_equal_pytorch_oods(name):
    head = make_head()
    if name == "gen":  # theirs clamps probabilities at 1e-7
        head = Head(*(t / 5 for t in head))
    (fit, labels), (test, _) = make_seen(300, head), make_seen(60, head, seed=2)
    arguments = changed(name)
    theirs = pytorch_ood_score(name, fit, labels, test, head, arguments).double()
    state = POSTHOC[name].fit(fit, labels, head, arguments)
    ours = POSTHOC[name].score(test, head, state, arguments).double()
    if name == "knn":  # their distance is not squared
        ours = -(-ours).sqrt()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4 * float(theirs.std()))
