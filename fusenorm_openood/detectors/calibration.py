"""What a detector learns from ID images, and how it is kept: as tensors and as JSON."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusenorm_openood.forward.panel import Fitted
from fusenorm_openood.method.joint import JointStatistics, standardised_logs
from fusenorm_openood.method.posthoc import Posthoc
from fusenorm_openood.method.settings import Settings
from fusenorm_openood.method.shares import far_off_shares, joint_shares, strong_shares, weak_shares
from fusenorm_openood.method.statistics import IDStatistics, normalise, standardise
from fusenorm_openood.network.fingerprint import Fingerprint


@dataclass(frozen=True)
class Calibration:
    """What `FuseNorm.fit` learns; it can be pickled without the network.

    Attributes:
        experts: names of the experts.
        fitted: what the experts themselves have fitted.
        id_scores: their scores on ID images `[L, N]`.
        statistics: ID statistics of the experts, or with the joint penalty of the strong ones.
        joint: statistics of the joint distance, with the joint penalty or the clip.
        settings: all settings of the fit.
        strong: names of the strong experts.
        network: what the network of the fit is recognised by, if that is known.
    """

    experts: tuple[str, ...]
    fitted: Fitted
    id_scores: NDArray[np.float64]
    statistics: IDStatistics
    joint: JointStatistics | None
    settings: Settings
    strong: tuple[str, ...]
    network: Fingerprint | None = None

    @cached_property
    def mean_shares(self) -> NDArray[np.float64]:
        """Mean shares `[L, 1]` of the experts over the ID images."""
        mean: NDArray[np.float64] = self.normalised_and_shares(self.id_scores)[1].mean(1)[:, None]
        return mean

    def normalised_and_shares(
        self, scores: NDArray[Any]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Normalised scores and shares `[L, N]` of the experts from their scores `[L, N]`."""
        s = self.settings
        strong = [self.experts.index(name) for name in self.strong]
        shares = np.zeros(scores.shape)
        if s.penalty == "joint":
            assert self.joint is not None
            taps = len(self.joint.mean)
            z = np.zeros(scores.shape)
            z[:taps] = standardised_logs(scores[:taps], self.joint)
            z[strong] = standardise(scores[strong], self.statistics, s.clip)
            shares[:taps] = joint_shares(scores[:taps], self.joint, s.joint_weight)
            shares[strong] += strong_shares(z[strong], s.weights)
            return z, shares
        z = normalise(scores, self.statistics)
        weak = [row for row in range(len(self.experts)) if row not in strong]
        clipped = np.minimum(z[strong], 1) if s.clip else z[strong]
        shares[strong] = strong_shares(clipped, s.weights)
        shares[weak] = weak_shares(z[weak], s.base, s.cap)
        if self.joint is not None:
            taps = len(self.joint.mean)
            shares[:taps] += far_off_shares(scores[:taps], self.joint, s.cap)
        return z, shares


def packed(calibration: Calibration) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a calibration, and the rest of it for JSON."""
    c = calibration
    arrays = {"id_scores": c.id_scores}
    arrays |= {f"statistics.{name}": value for name, value in vars(c.statistics).items()}
    if c.joint is not None:
        arrays |= {f"joint.{n}": np.asarray(v) for n, v in c.joint._asdict().items()}
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    for number, state in enumerate(c.fitted.states.values()):
        tensors |= {f"state.{number}.{name}": value.cpu() for name, value in state.items()}
    return tensors, {
        "settings": c.settings.to_json(),
        "experts": c.experts,
        "strong": c.strong,
        "joint": c.joint is not None,
        "thresholds": list(c.fitted.thresholds.items()),
        "posthoc": [[expert.name, dict(expert.arguments)] for expert in c.fitted.states],
    }


def unpacked(tensors: dict[str, Tensor], record: dict[str, Any]) -> Calibration:
    """The calibration that was `packed`, from parts that are known to be right."""

    def named(group: str) -> dict[str, Tensor]:
        prefix = f"{group}."
        return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

    def arrays(group: str) -> dict[str, Any]:
        return {name: tensor.numpy() for name, tensor in named(group).items()}

    states = {
        Posthoc.of(name, arguments): named(f"state.{number}")
        for number, (name, arguments) in enumerate(record["posthoc"])
    }
    joint = None
    if record["joint"]:
        found = arrays("joint")  # files from before `limit` was kept are read as they were
        scalars = {n: float(v) for n, v in found.items() if v.ndim == 0}
        joint = JointStatistics(**{**found, **scalars})
    return Calibration(
        experts=tuple(record["experts"]),
        fitted=Fitted(dict(map(tuple, record["thresholds"])), states),
        id_scores=tensors["id_scores"].numpy(),
        statistics=IDStatistics(**arrays("statistics")),
        joint=joint,
        settings=Settings.from_mapping(record["settings"]),
        strong=tuple(record["strong"]),
        network=record["network"],
    )
