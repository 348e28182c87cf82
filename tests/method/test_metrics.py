import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import auc, average_precision_score, precision_recall_curve, roc_auc_score

from fusenorm_openood import ood_metrics
from fusenorm_openood.errors import DataError, NonFiniteError
from fusenorm_openood.method.metrics import accuracy

SCORES = st.lists(st.integers(-5, 5).map(float), min_size=2, max_size=60)


def fpr95_by_hand(id_conf, ood_conf):
    """Lower the threshold until 95 % of the OOD images lie at or below it."""
    for threshold in np.unique(np.concatenate([id_conf, ood_conf])):
        if np.mean(ood_conf <= threshold) >= 0.95:
            return np.mean(id_conf <= threshold)
    raise AssertionError


@given(SCORES, SCORES)
def test_auroc_and_aupr_equal_scikit_learns(id_conf, ood_conf):
    m = ood_metrics(id_conf, ood_conf)
    is_ood = [0] * len(id_conf) + [1] * len(ood_conf)
    conf = np.array(id_conf + ood_conf)
    assert m.auroc == pytest.approx(roc_auc_score(is_ood, -conf))
    precision, recall, _ = precision_recall_curve(is_ood, -conf)
    assert m.aupr_out == pytest.approx(auc(recall, precision))


def test_fpr95_is_the_share_of_id_rejected_at_95_percent_of_ood():
    rng = np.random.default_rng(0)
    id_conf, ood_conf = rng.normal(1, 1, 3000), rng.normal(-1, 1, 2000)
    m = ood_metrics(id_conf, ood_conf)
    assert m.fpr95 == pytest.approx(fpr95_by_hand(id_conf, ood_conf), abs=1 / 3000)
    labels = [1] * 3000 + [0] * 2000
    both = np.concatenate([id_conf, ood_conf])
    assert m.aupr_in == pytest.approx(average_precision_score(labels, both), abs=1e-3)


def test_perfect_and_reversed_rankings():
    assert ood_metrics([2, 3], [0, 1]) == (0, 1, 1, 1)
    assert ood_metrics([0, 1], [2, 3]).auroc == 0
    assert ood_metrics([0, 1], [2, 3]).fpr95 == 1
    assert ood_metrics([1], [0]) == (0, 1, 1, 1)


def test_input_is_unmodified():
    id_conf = np.array([3.0, 1.0, 2.0])
    ood_metrics(id_conf, np.array([0.0, 1.0]))
    np.testing.assert_array_equal(id_conf, [3, 1, 2])


def test_empty_and_non_finite_confidences_are_rejected():
    with pytest.raises(DataError, match="got 0 ID and 2 OOD"):
        ood_metrics([], [1, 2])
    with pytest.raises(NonFiniteError, match="NaN or infinity for 1 of 4"):
        ood_metrics([1, np.nan], [1, 2])
    with pytest.raises(DataError, match="got 3 predictions and 2 labels"):
        accuracy([1, 2, 3], [1, 2])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint64, np.int8, np.float16, bool])
def test_confidences_of_any_type_rank_as_numbers(dtype):
    id_conf, ood_conf = np.array([200, 100, 50, 3]), np.array([3, 60, 10, 0])
    if dtype is not np.uint8:
        id_conf, ood_conf = id_conf // 2, ood_conf // 2
    given = ood_metrics(id_conf.astype(dtype), ood_conf.astype(dtype))
    as_float = ood_metrics(
        id_conf.astype(dtype).astype(float), ood_conf.astype(dtype).astype(float)
    )
    assert given == as_float


@pytest.mark.parametrize("shape", [(2, 3), (1, 3), ()])
def test_confidences_of_another_shape_are_rejected(shape):
    with pytest.raises(DataError, match=r"one number per image, got arrays of shape"):
        ood_metrics(np.ones(shape), np.ones(3))


def test_accuracy():
    assert accuracy([1, 2, 3, 4], [1, 2, 3, 0]) == 0.75
    assert accuracy([1], [1]) == 1
