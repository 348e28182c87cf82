"""The benchmarks run; their figures are only meaningful on an idle machine."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

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
