import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import auc, average_precision_score, precision_recall_curve, roc_auc_score

from fusenorm_openood import ood_metrics
from fusenorm_openood.errors import DataError, NonFiniteError
from fusenorm_openood.method.metrics import accuracy

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


def test_perfect_and_reversed_rankings():
    assert ood_metrics([2, 3], [0, 1]) == (0, 1, 1, 1)
    assert ood_metrics([0, 1], [2, 3])[:2] == (1, 0)
    assert ood_metrics([1], [0]) == (0, 1, 1, 1)


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
