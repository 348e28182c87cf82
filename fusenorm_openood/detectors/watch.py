"""An alarm for drift in a stream of confidences, whose state is one small file."""

import json
import math
from base64 import b64decode, b64encode
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from fusenorm_openood.errors import ConfigError, NonFiniteError, unknown
from fusenorm_openood.method import drift
from fusenorm_openood.method.calibration import LEAST, Calibration, group_names
from fusenorm_openood.method.conformal import guarantee
from fusenorm_openood.method.validation import SHARE
from fusenorm_openood.storage.configs import typed
from fusenorm_openood.storage.files import write_bytes_whole

ALL = ""  # the name of the only group
BY_GROUP = 100  # scores of a group that a new one is ranked among, if there are as many


class Watched(NamedTuple):
    """What is known of a stream after its rows so far.

    Attributes:
        rows: number of confidences.
        unreadable: number of rows without one.
        rejected: number of images that are OOD at the acceptance.
        rate: their share of the rows.
        rate_low, rate_high: bounds of the rejection rate, valid after every row at once with a
            probability of 1 - level / 2; see `rate_bounds`.
        promised_low, promised_high: between which the calibration images promise the rate of ID
            images to be, with that probability; see `Guarantee`.
        above_promise: rate_low > promised_high, on streams without drift ever true with a
            probability of at most `level`.
        log10_martingale: evidence against the stream being like the calibration images; see `bet`.
        log10_largest: the most that it has been.
        alarm: whether it has ever reached 1 / level, on streams without drift with a probability
            of at most `level`.
        alarm_row: the number of confidences after which it first had; None before.
        shift: what the best bet of an alarm is on: confidences that are `lower`, `higher`, `wider`
            or `narrower`; None before.
    """

    rows: int
    unreadable: int
    rejected: int
    rate: float
    rate_low: float
    rate_high: float
    promised_low: float
    promised_high: float
    above_promise: bool
    log10_martingale: float
    log10_largest: float
    alarm: bool
    alarm_row: int | None
    shift: str | None


class Position(NamedTuple):
    """How far a file has been read: its number of rows, and what the last one says."""

    rows: int
    last: str


class State(NamedTuple):
    """All that the file of a stream's state has."""

    calibration: str  # the SHA-256 of the calibration scores
    acceptance: float
    level: float
    scores: str | dict[str, str]  # base64 of those that are ranked among, float64; or by group
    log_capitals: tuple[float, ...]  # of the bets
    positions: dict[str, Position]  # how far each file has been read
    log_martingale: float = 0.0
    log_largest: float = 0.0
    rows: int = 0
    unreadable: int = 0
    rejected: int = 0
    alarm_row: int | None = None


class Watch:
    """Watches a stream of confidences for drift; see `Watched` for what it says, and how sure.

    Assumes that images are drawn independently: frames of a video, or images that repeat, are an
    alarm. A shift is compared with at most the 10,000 scores before, so that one much slower than
    that is only seen by the bounds of the rejection rate.

    By group, confidences are compared with those of their own group, so that groups that become
    more or less frequent are no alarm; they are rejected by the threshold of their group, and the
    rejection rate is that of all groups together. If no group has a threshold of its own, all are
    compared with all.

    Args:
        calibration: calibration scores `[n]`; or those of each group by its name, perhaps none.
        acceptance: share of ID images that is accepted, for the rejection rate.
        level: probability of a false alarm, in all rows of a stream together.
        path: a JSON file to go on from if it exists, written whole after each update.
        seed: of the ties and of which scores are kept.
        least: the number of scores with which a group has a threshold of its own; see
            `Calibration`.

    Raises:
        CalibrationError: too few calibration scores for the acceptance.
        ConfigError: an acceptance or a level outside (0, 1); a file of another calibration, with
            another acceptance or level, or that no `Watch` has written.

    Examples:
        >>> import numpy as np
        >>> draw = np.random.default_rng(0).normal
        >>> watch = Watch(calibration=draw(size=500))
        >>> watch.update(draw(size=1000)).alarm, watch.update(draw(-1, size=100)).alarm
        (False, True)
        >>> watch.now.alarm_row, watch.now.shift
        (1025, 'lower')
    """

    def __init__(
        self,
        calibration: ArrayLike | Mapping[str, ArrayLike],
        acceptance: float = 0.95,
        level: float = 0.01,
        path: str | Path | None = None,
        seed: int = 0,
        least: int = LEAST,
    ) -> None:
        groups = calibration if isinstance(calibration, Mapping) else {ALL: calibration}
        parts = {name: np.sort(np.asarray(part, np.float64)) for name, part in groups.items()}
        scores, names = np.concatenate([np.empty(0), *parts.values()]), tuple(parts)
        if not np.isfinite(scores).all():
            raise NonFiniteError("calibration must be finite, got NaN or infinity")
        acceptance, level = SHARE("acceptance", acceptance), SHARE("level", level)
        group = np.repeat(range(len(parts)), [*map(len, parts.values())])
        by = None if names == (ALL,) else "name"
        known = Calibration(scores, scores[None], (), by, names or (ALL,), group, least)
        self._thresholds = dict(zip(names, known.thresholds(acceptance), strict=True))
        cells = known.cells  # each has its promise; together, they have that of the level
        each = [guarantee(len(c), acceptance, 1 - level / 2 / len(cells)) for c in cells]
        low, high = min(g.low for g in each), max(g.high for g in each)
        self._promised = float(1 - high), float(1 - low)
        self._path, self._seed = path and Path(path), seed
        digest, draw = sha256(), np.random.default_rng([seed, 1])
        if by is not None:
            digest.update(str(least).encode())
        for name, part in parts.items():
            digest.update(name.encode() + part.astype("<f8").tobytes())
        self._are_pooled = by is not None and len(known.pooled) == len(names)
        parts = {ALL: np.sort(scores)} if self._are_pooled else parts
        self._most, self._names = max(drift.KEPT // len(parts), BY_GROUP), names
        for name, part in parts.items():
            if len(part) > self._most:
                parts[name] = np.sort(draw.choice(part, self._most, replace=False))
        bets = tuple(drift.start().tolist())
        self._state = State(digest.hexdigest(), acceptance, level, _packed(parts), bets, {})
        if self._path and self._path.exists():
            self._state = self._read(self._path)

    @property
    def now(self) -> Watched:
        """What is known after the last update."""
        s, ln10 = self._state, math.log(10)
        low, high = map(float, drift.rate_bounds(s.rejected, s.rows, s.level / 2))
        return Watched(
            s.rows,
            s.unreadable,
            s.rejected,
            s.rejected / max(s.rows, 1),
            low,
            high,
            *self._promised,
            low > self._promised[1],
            s.log_martingale / ln10,
            s.log_largest / ln10,
            s.alarm_row is not None,
            s.alarm_row,
            None if s.alarm_row is None else drift.SHIFTS[int(np.argmax(s.log_capitals))],
        )

    @property
    def positions(self) -> dict[str, Position]:
        """How far each file has been read, by its path."""
        return self._state.positions

    def update(
        self,
        conf: ArrayLike,
        unreadable: int = 0,
        positions: Mapping[str, Position] | None = None,
        groups: Any = None,
    ) -> Watched:
        """Go on with confidences `[N]` in their order, and write the state.

        Args:
            conf: confidences.
            unreadable: number of images among them that have none.
            positions: of files that they come from, to be kept with the state.
            groups: the group of each confidence, where calibration scores are by group.

        Raises:
            ConfigError: groups that are missing, unknown, or not asked for.
            NonFiniteError: a confidence that is not finite; nothing has changed.
            UnwritableError: the state cannot be written; nothing has changed.
        """
        conf, s = np.asarray(conf, np.float64).reshape(-1), self._state
        for row in np.flatnonzero(~np.isfinite(conf))[:1]:
            raise NonFiniteError(
                f"row {s.rows + row + 1} of the stream must be a finite confidence, got "
                f"{conf[row]}: check the image, or count it as unreadable"
            )
        given = [] if groups is None else group_names(groups)
        if groups is None and self._names == (ALL,):
            given = [ALL] * len(conf)
        if len(given) != len(conf):
            raise ConfigError(f"groups must be those of {len(conf)} confidences, got {len(given)}")
        if groups is not None and self._names == (ALL,):
            raise ConfigError("the calibration scores are not by groups: leave out groups")
        for name in set(given) - {*self._names}:
            raise ConfigError(unknown("group", name, self._names))
        # Two numbers per row, so that the size of the batches changes nothing.
        random = np.random.Generator(np.random.PCG64(self._seed).advance(2 * s.rows))
        drawn, scores, p = random.random((len(conf), 2)), _scores(s), np.empty(len(conf))
        rejected = conf < [self._thresholds[name] for name in given]
        ranked = [ALL] * len(conf) if self._are_pooled else given
        for name in dict.fromkeys(ranked):
            of = np.array(ranked) == name
            found = drift.online_p_values(conf[of], scores[name], drawn[of], self._most)
            p[of], scores[name] = found
        path, capitals = drift.bet(p, np.array(s.log_capitals), s.rows)
        path = np.insert(path, 0, s.log_martingale)
        row, over = s.alarm_row, np.flatnonzero(path >= -np.log(s.level))
        self._write(
            s._replace(
                scores=_packed(scores),
                log_capitals=tuple(capitals.tolist()),
                positions={**s.positions, **(positions or {})},
                log_martingale=float(path[-1]),
                log_largest=max(s.log_largest, float(path.max())),
                rows=s.rows + len(conf),
                unreadable=s.unreadable + unreadable,
                rejected=s.rejected + int(np.count_nonzero(rejected)),
                alarm_row=s.rows + int(over[0]) if row is None and len(over) else row,
            )
        )
        return self.now

    def _write(self, state: State) -> None:
        if self._path:
            positions = {name: p._asdict() for name, p in state.positions.items()}
            text = json.dumps({**state._asdict(), "positions": positions})
            write_bytes_whole(self._path, text.encode())
        self._state = state

    def _read(self, path: Path) -> State:
        way_out = "give another file for the state, or delete it to begin anew"
        try:
            state: State = typed(State, json.loads(path.read_bytes()), "the state")
            scores = _scores(state)
            others = scores.keys() != _scores(self._state).keys()
            if len(state.log_capitals) != len(drift.SHIFTS) or others or not any(scores.values()):
                raise ValueError("its bets or scores are missing")
        except (OSError, ValueError) as error:  # ConfigError is a ValueError
            raise ConfigError(f"{path} is no state of a stream ({error}): {way_out}") from None
        for name in ("calibration", "acceptance", "level"):
            was, given = getattr(state, name), getattr(self._state, name)
            if was != given:
                raise ConfigError(f"{path} was begun with {name} {was}, got {given}: {way_out}")
        return state


def _packed(scores: Mapping[str, ArrayLike]) -> str | dict[str, str]:
    texts = {n: b64encode(np.asarray(s, "<f8").tobytes()).decode() for n, s in scores.items()}
    return texts[ALL] if texts.keys() == {ALL} else texts


def _scores(state: State) -> dict[str, list[float]]:
    texts = {ALL: state.scores} if isinstance(state.scores, str) else state.scores
    return {name: np.frombuffer(b64decode(text), "<f8").tolist() for name, text in texts.items()}
