"""OpenOOD's five metrics, with OOD as the positive class."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from sklearn import metrics

from fusenorm_openood.errors import DataError, NonFiniteError


class OODMetrics(NamedTuple):
    """Metrics as fractions in [0, 1]; tables show them in percent."""

    fpr95: float
    auroc: float
    aupr_in: float
    aupr_out: float


def ood_metrics(id_conf: ArrayLike, ood_conf: ArrayLike) -> OODMetrics:
    """How well a confidence separates ID from OOD images.

    Args:
        id_conf: confidences of ID images `[N]`, larger = more in-distribution.
        ood_conf: confidences of OOD images `[M]`.

    Returns:
        FPR@95 (the share of ID images classified as OOD at the first threshold at which 95 % of
        the OOD images are), AUROC, AUPR with ID as the positive class, AUPR with OOD as the
        positive class.

    Raises:
        DataError: one of the two is empty or not one-dimensional.
        NonFiniteError: NaN or infinity among the confidences.

    Source: OpenOOD v1.5, whose AUPR is the trapezoidal area under the precision-recall curve.
    """
    id_conf = np.asarray(id_conf, dtype=np.float64)  # unsigned integers cannot be negated
    ood_conf = np.asarray(ood_conf, dtype=np.float64)
    if id_conf.ndim != 1 or ood_conf.ndim != 1:
        raise DataError(
            f"confidences must be one number per image, got arrays of shape {id_conf.shape} (ID) "
            f"and {ood_conf.shape} (OOD): give [N] and [M]"
        )
    if id_conf.size == 0 or ood_conf.size == 0:
        raise DataError(
            f"metrics need ID and OOD confidences, got {id_conf.size} ID and {ood_conf.size} OOD"
        )
    conf = np.concatenate([id_conf, ood_conf])
    if not np.isfinite(conf).all():
        raise NonFiniteError(
            "confidences must be finite, got NaN or infinity for "
            f"{np.count_nonzero(~np.isfinite(conf))} of {conf.size}: look for NaN in the images or "
            "the features"
        )
    is_ood = np.concatenate([np.zeros(len(id_conf), int), np.ones(len(ood_conf), int)])

    fpr, tpr, _ = metrics.roc_curve(is_ood, -conf)
    precision_in, recall_in, _ = metrics.precision_recall_curve(1 - is_ood, conf)
    precision_out, recall_out, _ = metrics.precision_recall_curve(is_ood, -conf)
    return OODMetrics(
        fpr95=float(fpr[np.argmax(tpr >= 0.95)]),
        auroc=float(metrics.auc(fpr, tpr)),
        aupr_in=float(metrics.auc(recall_in, precision_in)),
        aupr_out=float(metrics.auc(recall_out, precision_out)),
    )


def accuracy(pred: ArrayLike, label: ArrayLike) -> float:
    """Share of predictions that are equal to their labels."""
    pred, label = np.asarray(pred), np.asarray(label)
    if pred.shape != label.shape or pred.size == 0:
        raise DataError(
            f"accuracy needs one label per prediction, got {pred.size} predictions and "
            f"{label.size} labels"
        )
    return float(np.mean(pred == label))
