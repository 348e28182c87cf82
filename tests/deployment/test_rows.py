"""Files of rows: names of any bytes, one writer at a time, a row that was cut."""

import csv
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fusenorm_openood.deployment.files import ImageFiles, Judged
from fusenorm_openood.deployment.rows import RowFile, read_rows
from fusenorm_openood.errors import ConfigError, DataError
from fusenorm_openood.storage.files import manifest
from fusenorm_openood.storage.shards import decode, encode
from fusenorm_openood.storage.urls import Places

KINDS = ["o.csv", "o.parquet"]
NAMES = [
    b"caf\xe9.png",
    b"\xff\xfe\x80",
    "café \N{SNOWMAN}.png".encode(),
    rb"caf\xe9.png",
    rb"a\\xe9\\\xff\x41",
    b"a\\\xe9",
    b'two\nlines "quoted", \r\n.png',
    b"C:\\xab\\x.png",
]


def row(name: str, **said) -> Judged:
    return Judged(name, "1", 0.5, 0.25, False, "mds++")._replace(**said)


def none(p):
    return p < 0


def write(path: Path, names: list[str], resume: bool = False) -> None:
    with RowFile(path, resume) as file:
        file.write([row(name) for name in names if name not in file.judged])
        file.finish(none)


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_any_bytes_are_read_back_and_resumed(tmp_path, kind):
    names, path = [os.fsdecode(name) for name in NAMES], tmp_path / kind
    write(path, names[:5])
    assert [r.path for r in read_rows(path)] == names[:5]
    write(path, names, resume=True)
    assert [r.path for r in read_rows(path)] == names
    others = pd.read_parquet(path) if kind == "o.parquet" else pd.read_csv(path)  # in UTF-8
    assert others.path[0] == r"caf\xe9.png"
    assert others.path[2] == names[2]


@pytest.mark.parametrize("kind", KINDS)
def test_class_names_and_reasons_of_any_bytes(tmp_path, kind):
    said = [row("a", predicted=os.fsdecode(b"\xe9")), Judged("b", error="\ud83d is no image")]
    with RowFile(tmp_path / kind) as file:
        file.write(said)
        file.finish(none)
    found = list(read_rows(tmp_path / kind))
    assert found == [said[0], Judged("b", error=r"\ud83d is no image")]


def test_stores_keep_what_is_said_of_such_names(tmp_path):
    from tests.data.test_preprocessing import PREPROCESSING

    names = [os.fsdecode(NAMES[0]), "\ud83d.png", "\0.png"]
    files = ImageFiles(Places(tmp_path / name for name in names), PREPROCESSING)
    errors = np.array([files[number][1] for number in range(3)], dtype=object)
    assert list(decode(encode({"error": errors}, "", len(errors)))[1]["error"]) == list(errors)
    assert len({manifest(Places([name])) for name in names}) == 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("resume", [False, True])
def test_a_file_has_one_writer(tmp_path, kind, resume):
    path = tmp_path / kind
    with RowFile(path) as first:
        first.write([row("a"), row("b")])
        with pytest.raises(ConfigError, match=f"{kind} is being written by another run"):
            RowFile(path, resume)
        (tmp_path / "link.csv").symlink_to(first._rows)
        with pytest.raises(ConfigError, match="is being written by another run"):
            RowFile(tmp_path / "link.csv", resume)
        first.write([row("c")])
        first.finish(none)
    assert [r.path for r in read_rows(path)] == ["a", "b", "c"]
    write(path, ["d"])
    assert [r.path for r in read_rows(path)] == ["d"]


@pytest.mark.skipif(sys.platform == "win32", reason="no fork, no locks")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_a_writer_that_was_killed_blocks_nobody(tmp_path, kind):
    """Nor do its loader processes, which may live longer."""
    path, (read, written) = tmp_path / kind, os.pipe()
    if not (writer := os.fork()):
        RowFile(path).write([Judged("a", error="b")])
        if not (loader := os.fork()):
            time.sleep(600)
        os.write(written, str(loader).encode())
        os.kill(os.getpid(), signal.SIGKILL)
    loader = int(os.read(read, 20))
    os.waitpid(writer, 0)
    try:
        write(path, ["a", "c"], resume=True)
    finally:
        os.kill(loader, signal.SIGKILL)
    assert [r.path for r in read_rows(path)] == ["a", "c"]


def test_an_error_of_resuming_unlocks(tmp_path):
    path = tmp_path / "o.csv"
    path.write_text("other,columns\n1,2\n")
    for _ in range(2):
        with pytest.raises(DataError, match="was not written by"):
            RowFile(path, resume=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_was_cut_anywhere_is_written_again(tmp_path, kind):
    names = ["a.png", 'in "two\nlines",\r\n.png', "c.png"]
    whole, part = (
        tmp_path / "whole.csv",
        tmp_path / ("o.csv" if kind == "o.csv" else f"{kind}.part"),
    )
    write(whole, names)
    data = whole.read_bytes()
    for length in range(0, len(data), 1 if kind == "o.csv" else 9):
        part.write_bytes(data[:length])
        write(tmp_path / kind, names, resume=True)
        assert [r.path for r in read_rows(tmp_path / kind)] == names
        (tmp_path / kind).unlink()


@pytest.mark.parametrize(
    "content", [b"path\na.png\nb.png", b"\x89PNG\r\n\x1a\nbytes", b"x", b"path,predicted\n'a"]
)
def test_resuming_leaves_another_file_as_it_is(tmp_path, content):
    (tmp_path / "o.csv").write_bytes(content)
    with pytest.raises(DataError, match="its columns must be path, predicted"):
        RowFile(tmp_path / "o.csv", resume=True)
    assert (tmp_path / "o.csv").read_bytes() == content


TEXTS = ["=1+1", "+1", "-2+3", "@A(A1)", "\t=1", "\r=1", "'=1", "''=1", "'", "a=1", "", "=", "＝1"]


@pytest.mark.parametrize("kind", KINDS)
def test_texts_come_back_and_begin_no_formula(tmp_path, kind):
    """A spreadsheet would run them."""
    path, rows = tmp_path / kind, list[Judged]()
    for text in TEXTS:
        rows.append(Judged(f"{text}a.png", text or None, -1.5, 0.25, False, text or None, None))
        rows.append(Judged(text + "b", None, None, None, None, None, text or None))
    with RowFile(path) as file:
        file.write(rows)
        file.finish(none)
    assert list(read_rows(path)) == rows
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as opened:
            cells = [cell for row in csv.reader(opened) for cell in row]
        assert "-1.5" in cells  # numbers are numbers
        assert not [c for c in cells if c[:1] in tuple("=+-@\t\r＝") and c != "-1.5"]
    with RowFile(path, resume=True) as file:
        assert file.judged == {row.path for row in rows}


def test_without_pyarrow_a_parquet_file_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for use in (RowFile, lambda path: list(read_rows(path))):
        with pytest.raises(ConfigError, match=r"pyarrow.*fusenorm-openood\[parquet\]"):
            use(tmp_path / "o.parquet")
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "o.csv", ["a"])
