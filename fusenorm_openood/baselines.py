"""The old name of `fusenorm_openood.detectors.baselines`."""

from fusenorm_openood.detectors.baselines import Baseline as Baseline
