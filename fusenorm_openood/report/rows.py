"""The rows of `fusenorm score`, read back from its file."""

import csv
from collections.abc import Iterator
from pathlib import Path

from fusenorm_openood.detectors.folder import Judged
from fusenorm_openood.errors import DataError

NUMBERS = ("confidence", "p_value")


def read_judged(path: str | Path) -> Iterator[Judged]:
    """The rows of a CSV file that `fusenorm score` wrote, one after another.

    Raises:
        DataError: the file cannot be read, has other columns, or has a row that is none.
    """
    try:
        with Path(path).open(encoding="utf-8", newline="") as file:
            lines = csv.reader(file)
            if tuple(next(lines, ())) != Judged._fields:
                raise DataError(
                    f"{path} was not written by this version of fusenorm score: its first line "
                    f"must be {','.join(Judged._fields)}"
                )
            for row in lines:
                yield _judged(row, f"{path}, line {lines.line_num}")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{path} cannot be read ({reason}): give a CSV of fusenorm score") from None


def _judged(row: list[str], where: str) -> Judged:
    try:
        values = dict(zip(Judged._fields, (text or None for text in row), strict=True))
        numbers = {n: None if values[n] is None else float(values[n] or "") for n in NUMBERS}
        ood = {"True": True, "False": False, None: None}[values.pop("ood")]
    except (KeyError, ValueError):
        raise DataError(
            f"{where} is not a row of fusenorm score: {','.join(row)[:80]!r}; score again, or "
            "remove the line"
        ) from None
    predicted, objected, error = (values[n] for n in ("predicted", "objected", "error"))
    conf, p_value = (numbers[n] for n in NUMBERS)
    return Judged(values["path"] or "", predicted, conf, p_value, ood, objected, error)
