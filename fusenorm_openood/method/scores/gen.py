"""GEN: Liu et al., "GEN: pushing the limits of softmax-based OOD detection", CVPR 2023."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fusenorm_openood.kernels.devices import with_double
from fusenorm_openood.method.scores.base import Features, Head, Score, State
from fusenorm_openood.method.validation import COUNT, POSITIVE, checked


@dataclass(frozen=True)
class GEN(Score):
    """Negative generalised entropy of the `M` largest softmax probabilities.

    The sum of (p (1 - p))^gamma, computed from log p and log(1 - p): where the network is so sure
    that 1 - p rounds to 0 in float32, OpenOOD's scores jump and these do not. In float64, because
    scores of similar logits differ in few digits.

    >>> logits = torch.tensor([[4.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    >>> GEN()(Features(logits[:, :0], logits))
    tensor([-2.0467, -2.5811], dtype=torch.float64)
    """

    name = "gen"
    title = "GEN"
    needs_feature = False

    gamma: float = checked(0.1, POSITIVE)
    M: int = checked(100, COUNT)

    def score(self, batch: Features, head: Head, state: State) -> Tensor:
        logits = with_double(batch.logits).double()
        log_p, index = logits.log_softmax(dim=1).topk(min(self.M, logits.shape[1]), dim=1)
        rest = logits.scatter(1, index[:, :1], float("-inf")).logsumexp(dim=1)
        # log(1 - p) of the most likely class comes from the other classes; p <= 1/2 in those.
        top = rest - logits.logsumexp(dim=1)
        log_q = torch.cat([top.unsqueeze(1), torch.log1p(-log_p[:, 1:].exp())], dim=1)
        return -(self.gamma * (log_p + log_q)).exp().sum(dim=1)
