"""MDS: Lee et al., "A simple unified framework for detecting OOD samples", NeurIPS 2018.

MDS++: Mueller and Hein, "Mahalanobis++", ICML 2025.
"""

from dataclasses import dataclass

from fusenorm_openood.method.scores.mahalanobis import Mahalanobis


@dataclass(frozen=True)
class MDS(Mahalanobis):
    """Negative squared Mahalanobis distance of the feature to the closest class mean.

    The published score, of the penultimate feature. Directions in which the ID features do not
    vary, and classes without images, are left out; OpenOOD gives NaN for these.

    >>> import torch
    >>> from fusenorm_openood.method.scores.base import Features
    >>> ids = Features(torch.tensor([[2.0, 0.0], [3.0, 1.0], [0.0, 1.0]]), torch.eye(3))
    >>> score, labels = MDS(), torch.tensor([0, 0, 1])
    >>> state = score.fit(score.sums(ids, labels), ids, None)
    >>> (score(Features(-ids.feature, ids.logits), state=state) < score(ids, state=state)).all()
    tensor(True)
    """

    name = "mds"
    title = "MDS"
    normalised = False


@dataclass(frozen=True)
class MDSPlusPlus(Mahalanobis):
    """Negative squared Mahalanobis distance of the L2-normalised feature to the closest class mean.

    >>> import torch
    >>> from fusenorm_openood.method.scores.base import Features
    >>> ids = Features(torch.tensor([[2.0, 0.0], [3.0, 1.0], [0.0, 1.0]]), torch.eye(3))
    >>> score, labels = MDSPlusPlus(), torch.tensor([0, 0, 1])
    >>> state = score.fit(score.sums(ids, labels), ids, None)
    >>> torch.equal(score(Features(9 * ids.feature, ids.logits), state=state),
    ...             score(ids, state=state))
    True
    """

    name = "mds++"
    title = "MDS++"
