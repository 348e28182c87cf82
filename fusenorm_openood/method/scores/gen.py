"""GEN: Liu et al., "GEN: pushing the limits of softmax-based OOD detection", CVPR 2023."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fusenorm_openood.errors import number
from fusenorm_openood.kernels.devices import with_double
from fusenorm_openood.method.scores.base import Features, Head, Score, State
from fusenorm_openood.method.validation import COUNT, POSITIVE, SWITCH, Rule, checked

CLAMP = Rule("a number >= 0 and < 0.5", number, lambda v: 0 <= v < 0.5)


@dataclass(frozen=True)
class GEN(Score):
    """Negative generalised entropy of the `M` largest softmax probabilities.

    The sum of (p (1 - p))^gamma, computed from log p and log(1 - p): where the network is so sure
    that 1 - p rounds to 0 in float32, OpenOOD's scores jump and these do not. In float64, because
    scores of similar logits differ in few digits.

    Attributes:
        gamma: the exponent.
        M: how many probabilities count; all, if there are fewer classes.
        mean: whether to take the mean in place of the sum, which ranks the same.
        clamp: None = from the logarithms, exact; a number = from the softmax in float32, limited
            to [clamp, 1 - clamp]: the scores of OpenOOD (0) and pytorch-ood (1e-7).

    >>> logits = torch.tensor([[4.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    >>> GEN()(Features(logits[:, :0], logits))
    tensor([-2.0467, -2.5811], dtype=torch.float64)
    """

    name = "gen"
    title = "GEN"
    needs_feature = False

    gamma: float = checked(0.1, POSITIVE)
    M: int = checked(100, COUNT)
    mean: bool = checked(False, SWITCH)
    clamp: float | None = checked(None, CLAMP.or_none())

    def score(self, batch: Features, head: Head, state: State) -> Tensor:
        if self.clamp is not None:
            p = batch.logits.float().softmax(dim=1).clamp(self.clamp, 1 - self.clamp)
            p = p.topk(self.M, dim=1).values if p.shape[1] > self.M else p
            return self._summed(p**self.gamma * (1 - p) ** self.gamma)
        logits = with_double(batch.logits).double()
        log_p, index = logits.log_softmax(dim=1).topk(min(self.M, logits.shape[1]), dim=1)
        rest = logits.scatter(1, index[:, :1], float("-inf")).logsumexp(dim=1)
        # log(1 - p) of the most likely class comes from the other classes; p <= 1/2 in those.
        top = rest - logits.logsumexp(dim=1)
        log_q = torch.cat([top.unsqueeze(1), torch.log1p(-log_p[:, 1:].exp())], dim=1)
        return self._summed((self.gamma * (log_p + log_q)).exp())

    def _summed(self, terms: Tensor) -> Tensor:
        return -(terms.mean(dim=1) if self.mean else terms.sum(dim=1))
