"""OpenOOD's five metrics, and as other packages compute them."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn import metrics

from fusenorm_openood.errors import DataError, NonFiniteError
from fusenorm_openood.method.validation import among

Values = NDArray[Any]


class OODMetrics(NamedTuple):
    """Metrics as fractions in [0, 1]; tables show them in percent."""

    fpr95: float
    auroc: float
    aupr_in: float
    aupr_out: float


def ood_metrics(
    id_conf: ArrayLike, ood_conf: ArrayLike, convention: str = "openood", positive: str = "ood"
) -> OODMetrics:
    """How well a confidence separates ID from OOD images.

    FPR@95 is read off at the first threshold: with thresholds from the most to the least OOD
    score, the first at which at least 95 % of the OOD images are classified as OOD. The packages
    agree on that and differ in the thresholds that they try:

    - `openood`: ROC points inside a straight piece of the curve are dropped first (scikit-learn's
      `drop_intermediate`), so with few images or many ties the threshold is a later one, and
      FPR@95 larger. AUPR is the trapezoidal area.
    - `pytorch-ood`: every score; AUPR is the trapezoidal area.
    - `torch-uncertainty`: every score. AUROC and AUPR are torchmetrics': unless all OOD scores are
      in [0, 1], after a sigmoid in float32, which makes ties. AUPR is the average precision.
    - `scio`: every score. AUROC is the area under the steps, where ties count as errors.
    - `oodeel`: every fourth score, from the second smallest; FPR@95 at the first of these at which
      *less* than 95 % are classified as OOD. AUROC is the area between these points.

    No package interpolates. What a package does not compute is NaN.

    Args:
        id_conf: confidences of ID images `[N]`, larger = more in-distribution.
        ood_conf: confidences of OOD images `[M]`.
        convention: whose figures: one of the above.
        positive: which images FPR@95 keeps 95 % of: `ood`, as all packages above do, or `id`, as
            many papers do: the share of OOD images accepted where 95 % of the ID images are.

    Returns:
        FPR@95, AUROC, AUPR with ID as the positive class, AUPR with OOD as the positive class.

    Raises:
        ConfigError: an unknown convention or positive class.
        DataError: one of the two is empty or not one-dimensional.
        NonFiniteError: NaN or infinity among the confidences.

    Source: OpenOOD v1.5, pytorch-ood 0.4, torch-uncertainty 0.13 with torchmetrics 1.9, scio 1.1,
    oodeel 0.4.

    Examples:
        >>> known, unknown = range(1, 21), range(1, 21)  # equal scores
        >>> [ood_metrics(known, unknown, c).fpr95 for c in ("openood", "pytorch-ood", "oodeel")]
        [1.0, 0.95, 0.9]
    """
    among(*CONVENTIONS)("convention", convention)
    among("ood", "id")("positive", positive)
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
    figures = CONVENTIONS[convention](is_ood, -conf)
    if positive == "id":
        return figures._replace(fpr95=CONVENTIONS[convention](1 - is_ood, conf).fpr95)
    return figures


def _openood(is_ood: Values, score: Values, drop: bool = True) -> OODMetrics:
    fpr, tpr, _ = metrics.roc_curve(is_ood, score, drop_intermediate=drop)
    precision_in, recall_in, _ = metrics.precision_recall_curve(1 - is_ood, -score)
    precision_out, recall_out, _ = metrics.precision_recall_curve(is_ood, score)
    return OODMetrics(
        fpr95=float(fpr[np.argmax(tpr >= 0.95)]),
        auroc=float(metrics.auc(fpr, tpr)),
        aupr_in=float(metrics.auc(recall_in, precision_in)),
        aupr_out=float(metrics.auc(recall_out, precision_out)),
    )


def _torch_uncertainty(is_ood: Values, score: Values) -> OODMetrics:
    ranked = torch.from_numpy(score).float()
    if ranked.min() < 0 or ranked.max() > 1:
        ranked = ranked.sigmoid()
    return OODMetrics(
        fpr95=_openood(is_ood, score, drop=False).fpr95,
        auroc=float(metrics.roc_auc_score(is_ood, ranked)),
        aupr_in=np.nan,
        aupr_out=float(metrics.average_precision_score(is_ood, ranked)),
    )


def _scio(is_ood: Values, score: Values) -> OODMetrics:
    fpr, tpr, _ = metrics.roc_curve(is_ood, score, drop_intermediate=False)
    steps = float(np.diff(fpr) @ tpr[:-1])
    return OODMetrics(float(fpr[np.argmax(tpr >= 0.95)]), steps, np.nan, np.nan)


def _oodeel(is_ood: Values, score: Values) -> OODMetrics:
    thresholds = np.sort(score)[1::4]
    rates = [
        np.array([1.0, *(np.mean(score[is_ood == label] >= t) for t in thresholds), 0.0])
        for label in (0, 1)
    ]
    fpr, tpr = rates
    area = -np.sum(np.diff(tpr) * (2 - fpr[1:] - fpr[:-1])) / 2
    return OODMetrics(float(fpr[np.argmax(tpr < 0.95)]), float(area), np.nan, np.nan)


CONVENTIONS: dict[str, Callable[[Values, Values], OODMetrics]] = {
    "openood": _openood,
    "pytorch-ood": partial(_openood, drop=False),
    "torch-uncertainty": _torch_uncertainty,
    "scio": _scio,
    "oodeel": _oodeel,
}


def accuracy(pred: ArrayLike, label: ArrayLike) -> float:
    """Share of predictions that are equal to their labels."""
    pred, label = np.asarray(pred), np.asarray(label)
    if pred.shape != label.shape or pred.size == 0:
        raise DataError(
            f"accuracy needs one label per prediction, got {pred.size} predictions and "
            f"{label.size} labels"
        )
    return float(np.mean(pred == label))
