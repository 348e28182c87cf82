import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import auc, average_precision_score, precision_recall_curve, roc_auc_score

from fusenorm_openood import ood_metrics
from fusenorm_openood.errors import ConfigError, DataError, NonFiniteError
from fusenorm_openood.method.metrics import CONVENTIONS, accuracy

SCORES = st.lists(st.integers(-5, 5).map(float), min_size=2, max_size=60)


@given(SCORES, SCORES)
def test_metrics_are_those_of_their_definitions(id_conf, ood_conf):
    m = ood_metrics(id_conf, ood_conf)
    is_ood = [0] * len(id_conf) + [1] * len(ood_conf)
    conf = np.array(id_conf + ood_conf)
    assert m.auroc == pytest.approx(roc_auc_score(is_ood, -conf))
    precision, recall, _ = precision_recall_curve(is_ood, -conf)
    assert m.aupr_out == pytest.approx(auc(recall, precision))
    # The first threshold at or below which 95 % of the OOD images lie.
    below = (t for t in np.unique(conf) if np.mean(np.array(ood_conf) <= t) >= 0.95)
    assert m.fpr95 == pytest.approx(np.mean(np.array(id_conf) <= next(below)))


def test_aupr_in_is_that_of_id_images_and_inputs_are_unmodified():
    rng = np.random.default_rng(0)
    id_conf, ood_conf = rng.normal(1, 1, 3000), rng.normal(-1, 1, 2000)
    copies = id_conf.copy(), ood_conf.copy()
    m = ood_metrics(id_conf, ood_conf)
    labels, both = [1] * 3000 + [0] * 2000, np.concatenate([id_conf, ood_conf])
    assert m.aupr_in == pytest.approx(average_precision_score(labels, both), abs=1e-3)
    np.testing.assert_array_equal(copies[0], id_conf)
    np.testing.assert_array_equal(copies[1], ood_conf)


TWICE, SAME = np.arange(1, 21), np.ones(20)
LARGE = -np.arange(20, 40), -np.arange(100, 120)  # all OOD above all ID images


@pytest.mark.parametrize(
    ("convention", "id_conf", "ood_conf", "fpr95", "auroc", "aupr_out"),
    [
        ("openood", TWICE, TWICE, 1.0, 0.5, None),
        ("pytorch-ood", TWICE, TWICE, 0.95, 0.5, None),
        ("torch-uncertainty", TWICE, TWICE, 0.95, None, None),
        ("scio", TWICE, TWICE, 0.95, 0.475, None),  # 20 steps of 1/20, from 0 to 19/20
        ("oodeel", TWICE, TWICE, 0.9, 0.5, None),
        ("openood", SAME, SAME, 1.0, 0.5, 0.75),  # the trapezoid from (0, 1) to (1, 0.5)
        ("pytorch-ood", SAME, SAME, 1.0, 0.5, 0.75),
        ("torch-uncertainty", SAME, SAME, 1.0, 0.5, 0.5),
        ("scio", SAME, SAME, 1.0, 0.0, None),
        ("oodeel", SAME, SAME, 0.0, 0.5, None),
        ("openood", *LARGE, 0.0, 1.0, 1.0),
        ("torch-uncertainty", *LARGE, 0.0, 0.5, 0.5),  # in float32, the sigmoid of each is 1
    ],
)
def test_each_convention_by_hand(convention, id_conf, ood_conf, fpr95, auroc, aupr_out):
    m = ood_metrics(id_conf, ood_conf, convention)
    assert m.fpr95 == pytest.approx(fpr95)
    assert auroc is None or m.auroc == pytest.approx(auroc)
    assert aupr_out is None or m.aupr_out == pytest.approx(aupr_out)


@given(SCORES, SCORES)
def test_conventions_differ_as_said(id_conf, ood_conf):
    of = {c: ood_metrics(id_conf, ood_conf, c) for c in CONVENTIONS}
    assert of["pytorch-ood"].fpr95 <= of["openood"].fpr95
    assert of["pytorch-ood"]._replace(fpr95=0) == pytest.approx(of["openood"]._replace(fpr95=0))
    ties = np.mean(np.equal.outer(id_conf, ood_conf))
    assert of["scio"].auroc == pytest.approx(of["openood"].auroc - ties / 2)
    is_ood, score = [0] * len(id_conf) + [1] * len(ood_conf), -np.array(id_conf + ood_conf)
    expected = average_precision_score(is_ood, score)
    assert of["torch-uncertainty"].aupr_out == pytest.approx(expected)  # 0 to 5 keep their ranks
    # ID as the positive class: the roles exchanged, with scores turned round.
    swapped = ood_metrics(np.negative(ood_conf), np.negative(id_conf), "pytorch-ood")
    found = ood_metrics(id_conf, ood_conf, "pytorch-ood", positive="id")
    assert found == of["pytorch-ood"]._replace(fpr95=swapped.fpr95)


def test_unknown_conventions_are_refused():
    with pytest.raises(ConfigError, match="convention must be one of openood, pytorch-ood"):
        ood_metrics([1], [0], "sklearn")
    with pytest.raises(ConfigError, match="positive must be one of ood, id, got 'ID'"):
        ood_metrics([1], [0], positive="ID")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint64, np.int8, np.float16, bool])
def test_confidences_of_any_type_rank_as_numbers(dtype):
    id_conf, ood_conf = np.array([120, 100, 50, 3]), np.array([3, 60, 10, 0])
    if dtype is np.uint8:
        id_conf[0] = 200
    given = [conf.astype(dtype) for conf in (id_conf, ood_conf)]
    assert ood_metrics(*given) == ood_metrics(*(conf.astype(float) for conf in given))


def test_empty_misshapen_and_non_finite_confidences_are_refused():
    with pytest.raises(DataError, match="got 0 ID and 2 OOD"):
        ood_metrics([], [1, 2])
    with pytest.raises(NonFiniteError, match="NaN or infinity for 1 of 4"):
        ood_metrics([1, np.nan], [1, 2])
    for shape in ((2, 3), (1, 3), ()):
        with pytest.raises(DataError, match="one number per image, got arrays of shape"):
            ood_metrics(np.ones(shape), np.ones(3))


def test_accuracy():
    assert accuracy([1, 2, 3, 4], [1, 2, 3, 0]) == 0.75
    assert accuracy([1], [1]) == 1
    with pytest.raises(DataError, match="got 3 predictions and 2 labels"):
        accuracy([1, 2, 3], [1, 2])
