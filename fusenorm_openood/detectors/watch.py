"""An alarm for drift in a stream of confidences, whose state is one small file."""

import json
from base64 import b64decode, b64encode
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fusenorm_openood.errors import ConfigError, NonFiniteError
from fusenorm_openood.method import drift
from fusenorm_openood.method.conformal import guarantee, threshold
from fusenorm_openood.method.validation import SHARE
from fusenorm_openood.storage.configs import typed
from fusenorm_openood.storage.files import write_bytes_whole


class Watched(NamedTuple):
    """What is known of a stream after its rows so far.

    Attributes:
        rows: number of confidences.
        unreadable: number of rows without one.
        rejected: number of images that are OOD at the acceptance, without groups.
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
    scores: str  # base64 of those that the next one is ranked among, float64
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

    Args:
        calibration: calibration scores `[n]`.
        acceptance: share of ID images that is accepted, for the rejection rate.
        level: probability of a false alarm, in all rows of a stream together.
        path: a JSON file to go on from if it exists, written whole after each update.
        seed: of the ties and of which scores are kept.

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
        calibration: ArrayLike,
        acceptance: float = 0.95,
        level: float = 0.01,
        path: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        scores = np.sort(np.asarray(calibration, np.float64))
        if not np.isfinite(scores).all():
            raise NonFiniteError("calibration must be finite, got NaN or infinity")
        acceptance, level = SHARE("acceptance", acceptance), SHARE("level", level)
        self._threshold = threshold(scores, acceptance)
        promise = guarantee(len(scores), acceptance, 1 - level / 2)
        self._promised = 1 - promise.high, 1 - promise.low
        self._path, self._seed = path and Path(path), seed
        digest = sha256(scores.astype("<f8").tobytes()).hexdigest()
        if len(scores) > drift.KEPT:
            scores = np.random.default_rng([seed, 1]).choice(scores, drift.KEPT, replace=False)
            scores.sort()
        bets = tuple(drift.start().tolist())
        self._state = State(digest, acceptance, level, _packed(scores), bets, {})
        if self._path and self._path.exists():
            self._state = self._read(self._path)

    @property
    def now(self) -> Watched:
        """What is known after the last update."""
        s, ln10 = self._state, np.log(10)
        low, high = drift.rate_bounds(s.rejected, s.rows, s.level / 2)
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
        self, conf: ArrayLike, unreadable: int = 0, positions: Mapping[str, Position] | None = None
    ) -> Watched:
        """Go on with confidences `[N]` in their order, and write the state.

        Args:
            conf: confidences.
            unreadable: number of images among them that have none.
            positions: of files that they come from, to be kept with the state.

        Raises:
            NonFiniteError: a confidence that is not finite; nothing has changed.
            UnwritableError: the state cannot be written; nothing has changed.
        """
        conf, s = np.asarray(conf, np.float64).reshape(-1), self._state
        for row in np.flatnonzero(~np.isfinite(conf))[:1]:
            raise NonFiniteError(
                f"row {s.rows + row + 1} of the stream must be a finite confidence, got "
                f"{conf[row]}: check the image, or count it as unreadable"
            )
        # Two numbers per row, so that the size of the batches changes nothing.
        random = np.random.Generator(np.random.PCG64(self._seed).advance(2 * s.rows))
        p, scores = drift.online_p_values(conf, _scores(s), random.random((len(conf), 2)))
        path, capitals = drift.bet(p, np.array(s.log_capitals), s.rows)
        path = np.insert(path, 0, s.log_martingale)
        row, over = s.alarm_row, np.flatnonzero(path >= -np.log(s.level))
        self._write(
            s._replace(
                scores=_packed(np.array(scores)),
                log_capitals=tuple(capitals.tolist()),
                positions={**s.positions, **(positions or {})},
                log_martingale=float(path[-1]),
                log_largest=max(s.log_largest, float(path.max())),
                rows=s.rows + len(conf),
                unreadable=s.unreadable + unreadable,
                rejected=s.rejected + int(np.count_nonzero(conf < self._threshold)),
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
            if len(state.log_capitals) != len(drift.SHIFTS) or not _scores(state):
                raise ValueError("its bets or scores are missing")
        except (OSError, ValueError) as error:  # ConfigError is a ValueError
            raise ConfigError(f"{path} is no state of a stream ({error}): {way_out}") from None
        for name in ("calibration", "acceptance", "level"):
            was, given = getattr(state, name), getattr(self._state, name)
            if was != given:
                raise ConfigError(f"{path} was begun with {name} {was}, got {given}: {way_out}")
        return state


def _packed(scores: NDArray[np.float64]) -> str:
    return b64encode(scores.astype("<f8").tobytes()).decode()


def _scores(state: State) -> list[float]:
    scores: list[float] = np.frombuffer(b64decode(state.scores), "<f8").tolist()
    return scores
