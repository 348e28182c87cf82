"""`fusenorm watch` on the rows of a file that grows, and of standard input."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fusenorm_openood.cli.main import main
from fusenorm_openood.deployment.files import Judged
from fusenorm_openood.deployment.rows import RowFile
from fusenorm_openood.detectors.watch import Watch
from fusenorm_openood.storage.detector_file import Contents, write_contents

DRAWN = np.random.default_rng(0)
CALIBRATION, STREAM = np.sort(DRAWN.normal(size=99)), DRAWN.normal(size=50)


def judged(conf) -> list[Judged]:
    """Rows, an unreadable image after every tenth."""
    rows = []
    for number, value in enumerate(conf):
        rows.append(Judged(f"image, {number}.png", "cat", float(value), 0.5, False))
        if number % 10 == 9:
            rows.append(Judged(f"broken{number}.png", error="no image,\nor a broken one"))
    return rows


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A working folder with a detector's file, of which only the calibration scores are read."""
    monkeypatch.chdir(tmp_path)
    write_contents(Path("detector"), Contents({"reference": torch.from_numpy(CALIBRATION)}, {}))
    return tmp_path


def write(conf, name="rows.csv", resume=False):
    with RowFile(Path(name), resume) as file:
        rows = judged(conf)
        file.write(rows[len(file.judged) :])
        file.finish(lambda p: p < 0)


def watch(*options, scores="rows.csv", detector="detector") -> int:
    return main(["watch", "--detector", detector, "--scores", scores, *map(str, options)])


def lines(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet"])
def test_only_new_rows_of_a_file_that_grows_are_read(name, home, capsys):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    options = "--state", "state.json", "--batch-size", 20, "--prometheus", "watch.prom"
    for end in (30, 30, 50):
        write(STREAM[:end], name, resume=end == 50)
        assert watch(*options, scores=name) == 0
    expected = Watch(CALIBRATION).update(STREAM, unreadable=5)
    found = lines(capsys)
    assert [line["rows"] for line in found] == [19, 30, 49, 50]  # 33 rows, then 22
    assert found[-1] == pytest.approx(expected._asdict())
    metrics = Path("watch.prom").read_text().splitlines()
    assert "# TYPE fusenorm_watch_rows_total counter" in metrics
    assert {"fusenorm_watch_rows_total 50", "fusenorm_watch_alarm 0"} <= set(metrics)
    assert {line.split()[0] for line in metrics if line[0] != "#"} <= {
        f"fusenorm_watch_{key}{'_total' * (key in ('rows', 'unreadable', 'rejected'))}"
        for key in expected._asdict()
    }


def test_rows_of_a_detector_by_class(home, capsys):
    record = {"calibration": {"by": "predicted", "names": (), "least": 19}}
    record["class_names"] = ["dog", "cat"]
    group = torch.arange(99) % 2
    tensors = {"reference": torch.from_numpy(CALIBRATION), "reference.group": group}
    write_contents(Path("detector"), Contents(tensors, record))
    write(STREAM)
    assert watch() == 0
    expected = Watch({"dog": CALIBRATION[::2], "cat": CALIBRATION[1::2]})
    expected = expected.update(STREAM, 5, groups=["cat"] * 50)
    assert lines(capsys) == [pytest.approx(expected._asdict())]
    Path("rows.jsonl").write_text('{"confidence": 1.0}\n')
    assert watch(scores="rows.jsonl") == 1
    assert "rows.jsonl, row 1 must have 'predicted'" in capsys.readouterr().err


def test_an_alarm_is_told_once(home, capsys):
    write([*STREAM, *STREAM - 3])
    assert watch("--batch-size", 10, "--state", "state.json") == 3
    told = capsys.readouterr()
    alarms = [json.loads(line)["alarm"] for line in told.out.splitlines()]
    assert alarms == sorted(alarms)
    assert alarms[-1]
    assert told.err.count("alarm after 5") == told.err.count("confidences: they are lower") == 1
    assert watch("--state", "state.json") == 3
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_rows_of_standard_input(kind, home, capsys, monkeypatch):
    write(STREAM)
    text = Path("rows.csv").read_text()
    if kind == "jsonl":
        text = "\n".join(json.dumps(row._asdict()) for row in judged(STREAM))
    for _ in range(2):  # no file, so all of its rows are new
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        assert watch("--state", "state.json", scores="-") == 0
    assert [(line["rows"], line["unreadable"]) for line in lines(capsys)] == [(50, 5), (100, 10)]


@pytest.mark.parametrize(
    ("cell", "why"),
    [
        ("nan", "must have a finite confidence, got nan"),
        ("", "must have a confidence or an error, got ''"),
    ],
)
def test_rows_before_one_that_is_wrong_are_kept(cell, why, home, capsys):
    write(STREAM)
    lines = Path("rows.csv").read_text().splitlines(keepends=True)
    row = next(n for n, line in enumerate(lines) if "image, 20" in line)
    broken = lines[row].replace(str(STREAM[20]), cell)
    Path("rows.csv").write_text("".join([*lines[:row], broken, *lines[row + 1 :]]))
    assert watch("--state", "state.json") == 1
    told = capsys.readouterr()
    assert json.loads(told.out)["rows"] == 20
    assert f"rows.csv, row 23 {why}" in told.err
    Path("rows.csv").write_text("".join(lines))
    assert watch("--state", "state.json") == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 50


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
def test_a_last_line_that_is_being_written_waits(name, home, capsys):
    write(STREAM)
    text = Path("rows.csv").read_text()
    if name == "rows.jsonl":
        text = "".join(json.dumps({"confidence": value}) + "\n" for value in STREAM.tolist())
    for end in (-7, None):
        Path(name).write_text(text[:end])
        assert watch("--state", "state.json", scores=name) == 0
    assert sum(line["rows"] for line in lines(capsys)[-1:]) == 50


def test_what_does_not_belong_is_one_sentence(home, capsys):
    write(STREAM)
    assert watch("--state", "state.json") == 0
    write(STREAM[:40] + 1)
    assert watch("--state", "state.json") == 1
    assert "rows.csv no longer has the 55 rows that state.json has read" in capsys.readouterr().err
    assert watch(scores="absent.csv") == 1
    assert "absent.csv cannot be read (No such file" in capsys.readouterr().err
    write_contents(Path("uncalibrated"), Contents({}, {}))
    assert watch(detector="uncalibrated") == 1
    assert "has no calibration images: run fusenorm calibrate" in capsys.readouterr().err
