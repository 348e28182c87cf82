"""The benchmarks run; their figures are only meaningful on an idle machine."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from fusenorm_openood import Settings

RUN = Path(__file__).parent.parent / "benchmarks" / "run.py"


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_protocol_compares_candidates_on_validation_images(digits, monkeypatch):
    monkeypatch.syspath_prepend(RUN.parent)
    protocol = importlib.import_module("protocol")
    two = {"default": Settings(), "deviation": Settings.deviation()}
    monkeypatch.setattr(protocol, "candidates", lambda: two)
    table = protocol.tables(f"digits:digits:{digits[0]}:{digits[1]}", [], [])
    assert {*two, *protocol.PEERS} == set(table.index.get_level_values("candidate"))
    assert table[["near", "far-off"]].notna().all(axis=None)


@pytest.mark.parametrize("name", ["run", "alarm", "imagenet", "interruptions", "parts", "scale"])
def test_scripts_find_what_they_import(name, monkeypatch):
    monkeypatch.syspath_prepend(RUN.parent)
    importlib.import_module(name)


@pytest.fixture
def costs(monkeypatch):
    monkeypatch.syspath_prepend(RUN.parent)
    return importlib.import_module("costs")


def test_tables_of_large_runs_have_as_many_cells_in_each_row(costs):
    extrapolate = importlib.import_module("extrapolate")
    made = extrapolate.tables(extrapolate.read_measured(), costs.Assumed())
    for name, table in made.items():
        assert len({row.count("|") for row in table.splitlines()}) == 1, name
    assert len(made["time"].splitlines()) == 2 + 2 * 3 * 3  # head, benchmarks, jobs, GPUs
