"""The report on an installation, with packages that really are broken."""

import re
import subprocess
import sys

import pytest

from fusenorm_openood.cli.doctor import run_trial
from fusenorm_openood.cli.main import main
from fusenorm_openood.data.benchmarks import list_paths, load_benchmark


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A function that makes a package which is imported in place of the installed one."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(name, text):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(text)

    return make


def test_a_complete_installation_is_reported_with_its_data(digits, tmp_path):
    images, checkpoint = digits
    data_root, lists = tmp_path / "data", list_paths("cifar10", tmp_path / "data")
    (data_root / "benchmark_imglist" / "cifar10").mkdir(parents=True)
    for path in lists[:-2]:
        path.touch()
    for name in ("benchmark_imglist/digits", "images_digits"):
        (data_root / name).symlink_to(images / name)
    root = tmp_path / "digits_resnet18_32x32_base_e16_lr0.05_default"
    (root / "s0").mkdir(parents=True)
    (root / "s0" / "best.ckpt").write_bytes(checkpoint.read_bytes())
    command = ["doctor", "--data-root", str(data_root), "--root", str(tmp_path)]
    code = (
        "import sys; from fusenorm_openood.cli.main import main\n"
        f"status = main({command})\n"
        "assert not {'torch', 'numpy', 'pandas', 'openood'} & set(sys.modules)\n"
        "sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    text = done.stdout
    assert done.returncode == 0, done.stderr
    assert re.search(r"^ok +torch: \d", text, re.MULTILINE)
    assert "ok       native engine: a small network was fitted and scored" in text
    assert f"ok       digits: 10 of 10 image lists under {data_root}; training runs: {root}" in text
    assert f"cifar10: 9 of 11 image lists under {data_root}, missing {lists[-2].name}" in text
    assert "missing  data: needed for --id-data cifar10, cifar100, imagenet, imagenet200" in text
    assert "scripts/download/download.py" in text
    assert text.splitlines()[-1] == "the native engine works"


def test_a_broken_package_is_reported_with_its_fix(package, tmp_path, capsys):
    package("tqdm", "raise ImportError('half installed')")
    assert main(["doctor", "--data-root", str(tmp_path), "--root", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "broken   native engine: ImportError: half installed" in out
    assert "fix: python -m pip install --force-reinstall tqdm==" in out
    assert out.splitlines()[-1] == "the native engine does not work"


def test_a_broken_torch_and_a_crashing_openood_do_not_stop_the_report(
    package, tmp_path, monkeypatch, capsys
):
    monkeypatch.delitem(sys.modules, "openood", raising=False)  # another test may have imported it
    package("torch", "raise ModuleNotFoundError('gone', name='torch')")
    package("openood", "import os; print('hello'); os.abort()")
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    identity = ["-c", "user.name=x", "-c", "user.email=x@x"]
    commit = ["commit", "--quiet", "--allow-empty", "--message", "x"]
    subprocess.run(["git", *identity, *commit], cwd=tmp_path, check=True)
    head = subprocess.run(
        ["git", "rev-parse", "--short=7", "HEAD"], cwd=tmp_path, capture_output=True, text=True
    )
    assert main(["doctor"]) == 1
    out, err = capsys.readouterr()
    assert "broken   native engine: ModuleNotFoundError: gone" in out
    assert "fix: python -m pip install --force-reinstall torch==" in out
    assert re.search(r"^ok +numpy: ", out, re.MULTILINE)
    assert f"ok       OpenOOD: commit {head.stdout.strip()} (tested with 3c35632)" in out
    for module in ("evaluation_api", "pipelines", "trainers"):
        assert f"broken   openood.{module}: cannot be imported (its process died" in out
    assert "bash scripts/install_openood.sh" in out
    assert "Traceback" not in out + err


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "digits", "imagenet", "imagenet200"])
def test_the_expected_lists_are_those_of_the_benchmark(name):
    benchmark = load_benchmark(name, "elsewhere")
    assert set(list_paths(name, "elsewhere")) == {s.imagelist for s in benchmark.every()}


def test_a_trial_may_kill_its_process(package):
    package("deadly", "import os; os._exit(3)")
    package("leaving", "raise SystemExit('bye')")
    states = {name: run_trial(name)[0] for name in ("json", "deadly", "leaving")}
    assert states["json"][0] == "ok"
    assert states["deadly"] == ("broken", "deadly", "its process died with status 3", "")
    assert states["leaving"][:3] == ("broken", "leaving", "SystemExit: bye")
