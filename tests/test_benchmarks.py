"""The benchmarks run; their figures are only meaningful on an idle machine."""

import json
import subprocess
import sys
from pathlib import Path

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
