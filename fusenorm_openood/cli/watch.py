"""`fusenorm watch`: an alarm for drift in the rows of `fusenorm score`."""

import csv
import json
import logging
import math
import sys
from argparse import ArgumentParser, Namespace
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from fusenorm_openood import errors
from fusenorm_openood.cli import options
from fusenorm_openood.detectors.watch import Position, Watch, Watched
from fusenorm_openood.method.calibration import LEAST, PREDICTED, by_group
from fusenorm_openood.storage.files import write_bytes_whole

log = logging.getLogger(__name__)

ALARM = 3  # exit status


class Row(NamedTuple):
    """One row: its confidence, None if unreadable, a text to recognise it by, and its group."""

    confidence: float | None
    mark: str
    group: str | None = None


def add_watch(parser: ArgumentParser) -> None:
    parser.epilog = "Exit status: 0 = no alarm, 1 = error, 3 = alarm, also of an earlier --state."
    options.add(parser, "--detector")
    add = parser.add_argument
    rows = "rows of `fusenorm score`, or JSON Lines with `confidence`, by class also `predicted`"
    add("--scores", required=True, metavar="FILE", help=f"{rows}; - = standard input")
    state = "JSON file to go on from and to write, so that only new rows of --scores are read"
    add("--state", metavar="FILE", help=state)
    alarm = "probability of a false alarm in the whole stream (default: 0.01)"
    add("--level", type=options.fraction, default=0.01, help=alarm)
    options.add(parser, "--acceptance")
    options.add(parser, "--batch-size", default=1000, help="rows per line (default: 1000)")
    add("--prometheus", metavar="FILE", help="also write metrics for a textfile collector")


def run_watch(args: Namespace) -> int:
    """Print one JSON line per batch, after its state is on disk; 0 = no alarm, 3 = alarm."""
    state = Path(args.state) if args.state else None
    file = None if args.scores == "-" else str(Path(args.scores).resolve())
    calibration, column, least = _calibration(args.detector)
    watch = Watch(calibration, args.acceptance, args.level, state, least=least)
    rows, known = _rows(args.scores, column), watch.positions.get(file or "", Position(0, ""))
    skipped = deque(enumerate(islice(rows, known.rows), 1), maxlen=1)
    if known.rows and [(count, row.mark) for count, row in skipped] != [known]:
        raise errors.ConfigError(
            f"{args.scores} no longer has the {known.rows} rows that {state} has read: give the "
            "file that goes on, or another --state"
        )
    read, before = known.rows, watch.now.alarm
    for batch in _batches(rows, args.batch_size):
        scored, read = [(c, group) for c, _, group in batch if c is not None], read + len(batch)
        position = {file: Position(read, batch[-1].mark)} if file else None
        conf, groups = [c for c, _ in scored], [group for _, group in scored] if column else None
        try:
            now = watch.update(conf, len(batch) - len(conf), position, groups)
        except errors.ConfigError as error:
            first = read - len(batch) + 1
            raise errors.ConfigError(f"{args.scores}, rows {first} to {read}: {error}") from None
        if args.prometheus:
            write_bytes_whole(Path(args.prometheus), metrics(now).encode())
        print(json.dumps(now._asdict()), flush=True)
        if now.alarm and not before:
            told = f"alarm after {now.alarm_row} confidences: they are {now.shift}"
            log.warning(f"{told} than at calibration")
        before = now.alarm
    return ALARM if watch.now.alarm else 0


def metrics(now: Watched) -> str:
    """What is known of a stream, in Prometheus' text format."""
    lines = []
    for name, value in now._asdict().items():
        if isinstance(value, int | float):
            counts = name in ("rows", "unreadable", "rejected")
            full = f"fusenorm_watch_{name}{'_total' * counts}"
            lines += [f"# TYPE {full} {'counter' if counts else 'gauge'}", f"{full} {+value}"]
    return "\n".join([*lines, ""])


def _calibration(detector: str) -> tuple[Any, str | None, int]:
    """The calibration scores of a detector, the column of rows that tells their group, and `least`.

    The column is None, and they are in one array, without groups.
    """
    from fusenorm_openood.storage.detector_file import read_contents  # imports torch

    tensors, record = read_contents(Path(detector))
    if "reference" not in tensors:
        raise errors.CalibrationError(
            f"detector file {detector} has no calibration images: run fusenorm calibrate"
        )
    scores, known = tensors["reference"].numpy(), record.get("calibration") or {}
    if (by := known.get("by")) is None:
        return scores, None, LEAST
    names, column = known["names"], by
    if by == PREDICTED:
        names = record["class_names"] or list(map(str, range(record["structure"]["classes"])))
        column = "predicted"
    return by_group(scores, tensors["reference.group"].numpy(), names), column, known["least"]


def _batches(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    """Batches of rows; what comes before a row that is an error is a batch, too."""
    batch: list[Row] = []
    try:
        for row in rows:
            batch.append(row)
            if len(batch) == size:
                yield batch
                batch = []
    except errors.FuseNormError:
        if batch:
            yield batch
        raise
    if batch:
        yield batch


def _rows(name: str, column: str | None) -> Iterator[Row]:
    """The rows of a file, or of standard input, with their groups in a column.

    DataError if the file cannot be read, or a row has no confidence and no error, or no group;
    NonFiniteError for a confidence that is not finite.
    """
    for number, row in enumerate(_named(name), 1):
        text = row.get("confidence")
        if text in (None, "") and row.get("error"):
            yield Row(None, str(row.get("path")))
            continue
        try:
            conf = float("no number" if isinstance(text, bool) else text)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            raise errors.DataError(
                f"{name}, row {number} must have a confidence or an error, got "
                f"{repr(text) if 'confidence' in row else 'no such column'}: give the rows of "
                "fusenorm score, without --early"
            ) from None
        if not math.isfinite(conf):
            raise errors.NonFiniteError(
                f"{name}, row {number} must have a finite confidence, got {conf}: check the image "
                f"{row.get('path')}, or remove the row"
            )
        group = None if column is None else row.get(column)
        if column is not None and group in (None, ""):
            raise errors.DataError(
                f"{name}, row {number} must have {column!r}, by which the calibration images are "
                "grouped: add this column, or calibrate without groups"
            )
        yield Row(conf, f"{row.get('path')}: {conf}", None if group is None else str(group))


def _named(name: str) -> Iterator[dict[str, Any]]:
    """Rows by column."""
    path, what, way_out = Path(name), f"{name} cannot be read", "give the rows of fusenorm score"
    with errors.os_errors(errors.DataError, what, way_out, UnicodeDecodeError, csv.Error):
        if name == "-":
            yield from _parsed(sys.stdin)
        elif path.suffix.lower() in (".parquet", ".pq"):
            from fusenorm_openood.deployment.rows import read_rows  # imports torch

            yield from (row._asdict() for row in read_rows(path))
        else:
            with path.open(encoding="utf-8-sig", newline="") as file:
                yield from _parsed(file, growing=True)


def _parsed(lines: Iterable[str], growing: bool = False) -> Iterator[dict[str, Any]]:
    """Rows of CSV or JSON Lines; `growing`: without a last line that has no end yet."""
    lines = (line for line in lines if line.endswith("\n") or not growing)
    first = next(lines, "")
    lines = chain([first], lines)
    if not first.startswith("{"):
        yield from csv.DictReader(lines)
        return
    for line in filter(str.strip, lines):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        yield row if isinstance(row, dict) else {}
