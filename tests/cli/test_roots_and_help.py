"""Which roots `fusenorm eval` trains a network under, and what the help says."""

from pathlib import Path

import pytest

from fusenorm_openood.cli import inputs
from fusenorm_openood.cli.main import COMMANDS, main

REST = ["--no-progress", "--num-workers", "0", "--device", "cpu", "--store", "none"]
BASE = "digits_resnet18_32x32_base_e16_lr0.05_default"
T2FNORM = "digits_t2fnorm_net_t2fnorm_e16_lr0.05_alpha0.1_default"


class TrainingError(Exception):
    pass


@pytest.fixture
def evaluated(tmp_path, monkeypatch):
    def train(data_root, root, method, progress):
        raise TrainingError(method)

    monkeypatch.setattr(inputs, "train_digits", train)
    monkeypatch.chdir(tmp_path)
    return lambda root: main(["eval", "--id-data", "digits", "--root", str(root), *REST])


@pytest.mark.parametrize(
    "root", ["results/nonsense", "x", f"{BASE}/s0/best.ckpt", f"{BASE}x", "digits", BASE.upper()]
)
@pytest.mark.parametrize("exists", [False, True])
def test_no_network_is_trained_under_another_root(evaluated, capsys, root, exists):
    if exists:
        Path(root).mkdir(parents=True)
    assert evaluated(root) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"fusenorm: no checkpoint {root}/s0/best.ckpt")
    assert (f"{root} is empty" if exists else f"{root} does not exist") in err
    assert f"--root results/{BASE} or results/{T2FNORM}" in err
    assert err.count("\n") == 1
    assert not Path("data", "images_digits").exists()


@pytest.mark.parametrize(("root", "method"), [(BASE, "base"), (T2FNORM, "t2fnorm")])
@pytest.mark.parametrize("folder", ["results", "elsewhere/deep", "."])
def test_a_network_is_trained_under_the_root_of_its_recipe(evaluated, folder, root, method):
    with pytest.raises(TrainingError, match=f"^{method}$"):
        evaluated(Path(folder, root))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_described_in_its_own_letters(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    summary = COMMANDS[command]
    wanted = f"{summary[0].upper()}{summary[1:]}."
    assert wanted in capsys.readouterr().out
    for word in ("HTML", "ID", "OOD", "OpenOOD", "ONNX", "T2FNorm"):
        assert (word.lower() in summary.lower().split()) == (word in summary.split()), summary
