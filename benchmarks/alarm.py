"""False alarms and detection delays of the alarm for drift, beside tests of fixed windows.

    python benchmarks/alarm.py [--streams 10000] [--shifted 500] [--csv FILE]

A stream is 1,000 quiet rows, then 1,000 rows: quiet again, for false alarms, or shifted. Scores are
normal, with 200 calibration scores; a shift moves their mean by standard deviations. Per method:
false alarms in % of the streams that stay quiet, and the median number of shifted rows until the
alarm, in brackets the % of streams without one. All see the same streams, at a level of 1 %.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from fusenorm_openood.detectors.watch import Position, Watch
from fusenorm_openood.method import drift
from fusenorm_openood.method.conformal import conformal_p_values

N, QUIET, AFTER, LEVEL, WINDOW = 200, 1000, 1000, 0.01, 200
SHIFTS = {"-0.25": -0.25, "-0.5": -0.5, "-1": -1.0, "+0.5": 0.5}
Scores = NDArray[np.float64]


def online(conf: Scores, calibration: Scores, random: Scores) -> Scores:
    """Rows at which `fusenorm watch` is above its threshold."""
    p, _ = drift.online_p_values(conf, calibration.tolist(), random)
    return np.flatnonzero(drift.bet(p, drift.start(), 0)[0] >= -np.log(LEVEL))


def fixed(conf: Scores, calibration: Scores, random: Scores) -> Scores:
    """The same bets on p-values that are all compared with the same calibration scores."""
    p = conformal_p_values(conf, calibration) - random[:, 0] / (len(calibration) + 1)
    return np.flatnonzero(drift.bet(p, drift.start(), 0)[0] >= -np.log(LEVEL))


def windows(conf: Scores, calibration: Scores, random: Scores, tests: int) -> Scores:
    """Last rows of windows that a Kolmogorov-Smirnov test rejects, at the level / `tests`."""
    parts = conf.reshape(-1, WINDOW)
    p = [stats.ks_2samp(part, calibration, method="asymp").pvalue for part in parts]
    return WINDOW * (np.flatnonzero(np.array(p) <= LEVEL / tests) + 1) - 1


METHODS: dict[str, Callable[[Scores, Scores, Scores], Scores]] = {
    "`fusenorm watch`": online,
    "the same bets, fixed calibration scores": fixed,
    f"KS test of each {WINDOW} rows": partial(windows, tests=1),
    "KS tests, Bonferroni over the stream": partial(windows, tests=(QUIET + AFTER) // WINDOW),
}


def stream(seed: int, shift: float) -> tuple[Scores, Scores, Scores]:
    generator = np.random.default_rng(seed)
    calibration, conf = np.sort(generator.normal(size=N)), generator.normal(size=QUIET + AFTER)
    conf[QUIET:] += shift
    return conf, calibration, generator.random((len(conf), 2))


def simulated(streams: int, shifted: int) -> pd.DataFrame:
    """The table, one row per method."""
    rows: dict[str, dict[str, str]] = {name: {} for name in METHODS}
    for name, method in METHODS.items():
        false = sum(len(method(*stream(seed, 0.0))) > 0 for seed in range(streams))
        rows[name]["false alarms, %"] = f"{100 * false / streams:.2f}"
        for title, shift in SHIFTS.items():
            found = [method(*stream(seed, shift)) for seed in range(streams, streams + shifted)]
            delays = [rows[rows >= QUIET][:1] - QUIET + 1 for rows in found]
            missed = 100 * sum(len(d) == 0 for d in delays) / shifted
            delay = np.median([d[0] if len(d) else np.inf for d in delays])
            shown = f"{delay:.0f}" if np.isfinite(delay) else "none"
            rows[name][title] = f"{shown} ({missed:.0f})"
    return pd.DataFrame(rows).T.rename_axis("method")


def seconds(rows: int = 100_000, batch: int = 1000) -> float:
    """Processor time that a stream with its state in a file takes."""
    conf = np.random.default_rng(0).normal(size=rows)
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        watch = Watch(stream(0, 0.0)[1], path=Path(folder, "state.json"))
        for number, part in enumerate(conf.reshape(-1, batch), 1):
            json.dumps(watch.update(part, 0, {"rows": Position(number, "")})._asdict())
        return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--streams", type=int, default=10_000, help="quiet ones")
    parser.add_argument("--shifted", type=int, default=500, help="streams per shift")
    parser.add_argument("--csv", help="also write the table to this file")
    args = parser.parse_args()
    table = simulated(args.streams, args.shifted)
    print(table.to_string())
    print(f"100,000 rows in 100 batches take {seconds():.2f} s of processor time")
    if args.csv:
        table.to_csv(args.csv)


if __name__ == "__main__":
    main()
