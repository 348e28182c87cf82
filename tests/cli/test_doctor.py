"""The report on an installation, in environments that really are broken."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fusenorm_openood.cli.doctor import run_trials
from fusenorm_openood.cli.main import main
from fusenorm_openood.data.benchmarks import list_paths

PROJECT = Path(__file__).parents[2]


def doctor(tmp_path, *args):
    """Run the command in a subprocess, with packages under tmp_path first on its path."""
    path = os.pathsep.join([str(tmp_path), str(PROJECT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "fusenorm_openood.cli", "doctor", *args],
        capture_output=True, text=True, check=False, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip


def package(tmp_path, name, text):
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text(text)


def test_a_complete_installation_is_reported_with_its_data(digits, tmp_path, capsys):
    data_root, checkpoint = digits
    results = tmp_path / "results"
    root = results / "digits_resnet18_32x32_base_e16_lr0.05_default"
    (root / "s0").mkdir(parents=True)
    (root / "s0" / "best.ckpt").write_bytes(checkpoint.read_bytes())
    assert main(["doctor", "--data-root", str(data_root), "--root", str(results)]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^ok +torch: \d", text, re.MULTILINE)
    assert "ok       native engine: a small network was fitted and scored" in text
    assert f"ok       digits: 10 of 10 image lists under {data_root}; training runs: {root}" in text
    assert f"missing  cifar10: 0 of 11 image lists under {data_root}; training runs: none" in text
    assert "missing  data: needed for --id-data cifar10, cifar100, imagenet, imagenet200" in text
    assert "scripts/download/download.py" in text
    assert text.splitlines()[-1] == "the native engine works"


def test_a_broken_package_is_reported_with_its_fix(tmp_path):
    package(tmp_path, "tqdm", "raise ImportError('half installed')")
    done = doctor(tmp_path)
    assert done.returncode == 1
    assert "cannot be imported (ImportError: half installed)" in done.stdout
    assert "fix: python -m pip install --force-reinstall tqdm==" in done.stdout
    assert re.search(r"^ok +torch: ", done.stdout, re.MULTILINE)
    assert done.stdout.splitlines()[-1] == "the native engine does not work: tqdm, native engine"
    assert "Traceback" not in done.stdout + done.stderr


def test_a_broken_torch_and_a_crashing_openood_do_not_stop_the_report(tmp_path):
    package(tmp_path, "torch", "raise ModuleNotFoundError('gone', name='torch')")
    package(tmp_path, "openood", "import os; print('hello'); os.abort()")
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    identity = ["-c", "user.name=x", "-c", "user.email=x@x"]
    commit = ["commit", "--quiet", "--allow-empty", "--message", "x"]
    subprocess.run(["git", *identity, *commit], cwd=tmp_path, check=True)
    head = subprocess.run(
        ["git", "rev-parse", "--short=7", "HEAD"], cwd=tmp_path, capture_output=True, text=True
    )
    done = doctor(tmp_path)
    assert done.returncode == 1
    assert "missing  torch: needed by the native engine" in done.stdout
    assert "fix: python -m pip install torch\n" in done.stdout
    assert re.search(r"^ok +numpy: ", done.stdout, re.MULTILINE)
    assert f"ok       OpenOOD: commit {head.stdout.strip()} (tested with 3c35632)" in done.stdout
    for module in ("evaluation_api", "pipelines", "trainers"):
        assert f"broken   openood.{module}: cannot be imported (its process died" in done.stdout
    assert "fix: bash scripts/install_openood.sh" in done.stdout.replace(
        "rm -rf .venv && PYTHON=python3.12 ", ""
    )
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "digits", "imagenet", "imagenet200"])
def test_the_expected_lists_are_those_of_the_benchmark(name):
    from fusenorm_openood.data.benchmarks import load_benchmark

    benchmark = load_benchmark(name, "elsewhere")
    assert set(list_paths(name, "elsewhere")) == {s.imagelist for s in benchmark.every()}


def test_a_trial_that_kills_its_process_does_not_stop_the_others(tmp_path, monkeypatch):
    package(tmp_path, "deadly", "import os; os._exit(3)")
    package(tmp_path, "leaving", "raise SystemExit('bye')")
    monkeypatch.syspath_prepend(tmp_path)
    trials = run_trials(["json", "deadly", "leaving", "no_such_package", "string"])
    assert not trials["json"].error
    assert trials["deadly"].detail == "its process died with status 3"
    assert trials["leaving"].detail == "SystemExit: bye"
    assert trials["no_such_package"].absent
    assert not trials["string"].error


def test_the_doctor_reports_missing_lists_and_imports_nothing_heavy(tmp_path):
    lists = list_paths("cifar10", tmp_path)
    for path in lists[:-2]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    code = (
        "import sys; from fusenorm_openood.cli.main import main\n"
        f"main(['doctor', '--data-root', {str(tmp_path)!r}])\n"
        "assert not {'torch', 'numpy', 'pandas', 'openood'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    named = f"cifar10: 9 of 11 image lists under {tmp_path}, missing {lists[-2].name}"
    assert named in done.stdout
    assert f"fix: fusenorm digits --data-root {tmp_path}" in done.stdout
