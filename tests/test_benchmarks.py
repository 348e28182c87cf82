"""The benchmarks run; their figures are only meaningful on an idle machine."""

import importlib
import json
import os
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


@pytest.mark.slow
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


@pytest.mark.parametrize("name", ["run", "alarm", "imagenet", "interruptions", "parts", "scale"])
def test_scripts_find_what_they_import(name, monkeypatch):
    monkeypatch.syspath_prepend(RUN.parent)
    importlib.import_module(name)


STORED = {"write_seconds_per_image": 1e-5, "read_seconds_per_image": 5e-5}
PARTS = {
    "loaded_per_second": 400,
    "list_seconds_per_image": 1e-5,
    "open_seconds_per_image": 4e-5,
    "fit_seconds_per_image": 2e-4,
    "driver_begin_seconds_per_image": 1e-5,
    "driver_seconds_per_image": 1e-4,
    "eval": STORED,
    "score": STORED,
}


@pytest.fixture
def costs(monkeypatch):
    monkeypatch.syspath_prepend(RUN.parent)
    return importlib.import_module("costs")


def test_eight_gpus_score_a_list_of_eighty_shards_in_an_eighth_of_the_time(costs):
    one, eight = (
        costs.evaluation("imagenet", [80_000], gpus, 0, PARTS, costs.Assumed()) for gpus in (1, 8)
    )
    assert one.scoring == pytest.approx(8 * eight.scoring)
    assert one.rest == pytest.approx(30 + 80_000 * (1e-5 + 4e-5 + 5e-5))
    assert eight.rest == one.rest


def test_what_limits_a_run_is_the_slowest_of_its_parts(costs):
    slow, fast = costs.Assumed(resnet50=1), costs.Assumed(resnet50=1e9)

    def limit(assumed, gpus=1, images=800_000, fitted=0):
        return costs.evaluation("imagenet", [images], gpus, fitted, PARTS, assumed).limit

    assert (limit(slow), limit(fast)) == ("GPU", "decoding")
    assert limit(slow, gpus=64, images=8000) == "few shards"
    assert limit(fast, gpus=64, images=1000) == "start"
    assert limit(fast, gpus=64, fitted=800_000) == "one core per process"
    assert costs.scoring(1, PARTS, slow).limit == "GPU"
    assert costs.scoring(64, PARTS, fast).limit == "driver"
    assert (
        costs.scoring(64, {**PARTS, "driver_begin_seconds_per_image": 1}, fast).limit == "listing"
    )


def test_tables_of_large_runs_have_as_many_cells_in_each_row(costs):
    extrapolate = importlib.import_module("extrapolate")
    made = extrapolate.tables(extrapolate.read_measured(), costs.Assumed())
    for name, table in made.items():
        assert len({row.count("|") for row in table.splitlines()}) == 1, name
    assert len(made["time"].splitlines()) == 2 + 2 * 3 * 3  # head, benchmarks, jobs, GPUs
