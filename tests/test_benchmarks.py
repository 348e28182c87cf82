"""The benchmarks run; their figures are only meaningful on an idle machine."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fusenorm_openood import Settings
from tests.conftest import shortened_digits

RUN = Path(__file__).parent.parent / "benchmarks" / "run.py"


def test_ratios_are_written_after_each_section(tmp_path):
    command = [sys.executable, str(RUN), "--quick", "--rounds", "1", "--only", "atf", "growth",
               "--json", "found.json"]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["machine"]["kernel"]["name"] in ("torch", "numba")
    assert {row["section"] for row in found["rows"]} == {"atf", "growth"}
    ratios = found["ratios"]
    assert all(value > 0 for value in ratios.values())
    assert {"atf/resnet18-32x32/eager_vs_loop", "growth/images/exponent"} <= set(ratios)


def test_the_protocol_compares_candidates_on_validation_images(digits, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(RUN.parent)
    protocol = importlib.import_module("protocol")
    data = shortened_digits(digits[0], tmp_path / "data", 64, 60)
    two = {"default": Settings(), "joint": Settings.joint()}
    monkeypatch.setattr(protocol, "candidates", lambda: two)
    table = protocol.tables(f"digits:digits:{data}:{digits[1]}")
    assert list(table.index) == list(two)
    assert table.notna().all(axis=None)


def test_imagenet_is_the_same_in_one_process_and_in_two(tmp_path):
    command = [sys.executable, str(RUN.with_name("imagenet.py")), "--benchmarks", "imagenet200"]
    command += ["--kinds", "base", "--share", "0.0001", "--fitted", "--skip-ray"]
    command += ["--json", str(tmp_path)]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "All tables, rows and shards are equal" in done.stdout
    rows = json.loads((tmp_path / "imagenet200.json").read_text())["rows"]
    found = {(row["job"], row["processes"]): (row["images"], row["equal"]) for row in rows}
    assert found == {
        ("OOD", "one"): (10 + 1 + 5 + 1 + 1 + 1 + 2, ""),  # val, test, SSB-hard, NINCO, ...
        ("FS-OOD", "one"): (1 + 1 + 3, ""),
        ("FS-OOD again", "one"): (0, ""),
        ("OOD", "two"): (21, True),
        ("FS-OOD", "two"): (5, True),
        ("score", "one"): (26, ""),
    }


@pytest.fixture
def extrapolate(monkeypatch):
    monkeypatch.syspath_prepend(RUN.parent)
    return importlib.import_module("extrapolate")


def test_eight_gpus_take_an_eighth_of_one_for_lists_that_can_be_shared(extrapolate):
    parts = extrapolate.read_measured()["imagenet"]["parts"]["base"]
    one, eight = (
        extrapolate.evaluation("imagenet", [80_000], gpus, 0, parts, extrapolate.Assumed())
        for gpus in (1, 8)
    )
    assert one.scoring == pytest.approx(8 * eight.scoring)
    assert one.rest == eight.rest


def test_what_limits_a_run_is_the_slowest_of_its_parts(extrapolate):
    parts = extrapolate.read_measured()["imagenet"]["parts"]["base"]
    slow, fast = extrapolate.Assumed(resnet50=1, archive=1e6), extrapolate.Assumed(resnet50=1e9)

    def limit(assumed, gpus=1, images=800_000):
        return extrapolate.evaluation("imagenet", [images], gpus, 0, parts, assumed).limit

    assert (limit(slow), limit(fast)) == ("GPU", "decoding")
    assert limit(slow, 64, 8000) == "lists of few shards"
    assert limit(fast, 64, 1000) == "start"
    assert extrapolate.scoring(1, parts, slow).limit == "GPU"
    assert extrapolate.scoring(1000, parts, fast).limit == "driver"
