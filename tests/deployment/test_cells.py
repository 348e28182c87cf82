"""Cells of CSV files that a spreadsheet would run, written so that it does not."""

import csv

import pytest

from fusenorm_openood.deployment.files import Judged
from fusenorm_openood.deployment.rows import RowFile, read_rows

TEXTS = [
    "=1+1",
    "+1",
    "-2+3",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "'=1",
    "''=1",
    "'",
    "a=1",
    "",
    "=",
    "＝1",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet"])
def test_texts_come_back_and_begin_no_formula(tmp_path, text, name):
    path = tmp_path / name
    rows = [
        Judged(f"{text}a.png", text or None, -1.5, 0.25, False, text or None, None),
        Judged(text + "b", None, None, None, None, None, text or None),
    ]
    with RowFile(path) as file:
        file.write(rows)
        file.finish(lambda p: p < 0.1)
    assert list(read_rows(path)) == rows
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as opened:
            cells = [cell for row in csv.reader(opened) for cell in row]
        assert "-1.5" in cells  # numbers are numbers
        assert not [c for c in cells if c[:1] in tuple("=+-@\t\r＝") and c != "-1.5"]
    with RowFile(path, resume=True) as file:
        assert file.judged == {row.path for row in rows}
