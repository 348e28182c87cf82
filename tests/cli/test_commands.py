"""`taps` and `digits`, and what the help says."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from torch import nn

from fusenorm_openood.cli.compare import fitting, formatted, labels
from fusenorm_openood.cli.main import COMMANDS, main
from tests.nets import Foo


def many(num_classes=3):
    """A network of more blocks than a summary has lines."""
    blocks = [Foo(4) for _ in range(45)]
    return nn.Sequential(nn.Conv2d(3, 4, 3), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(4, num_classes))  # fmt: skip


class OfSize(nn.Sequential):
    """A network that takes images of one size, and may declare it."""

    def __init__(self, side, declares=False):
        layers = [nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]
        super().__init__(*layers)
        self.side, self.default_cfg = side, {"input_size": (3, side, side)} if declares else {}

    def forward(self, x):
        assert x.shape[-1] == self.side, f"takes {self.side} pixels"
        return super().forward(x)


def small(num_classes=3):
    return OfSize(28)


def large(num_classes=3):
    return OfSize(224)


def declared(num_classes=3):
    return OfSize(50, declares=True)


def odd(num_classes=3):
    return OfSize(77)


def test_digits_and_taps(digits, capsys):
    data_root, checkpoint = digits
    root = str(checkpoint.parent.parent)
    assert main(["digits", "--data-root", str(data_root), "--root", root]) == 0
    assert str(checkpoint) in capsys.readouterr().out
    assert main(["taps", str(checkpoint), "--image-size", "24"]) == 0
    assert "* layer4.0, BasicBlock, BCHW, [128, 3, 3]" in capsys.readouterr().out


def test_taps_prints_a_summary_and_all_with_all(capsys):
    many_blocks = ["taps", "--network", f"{__name__}:many", "--image-size", "12"]
    assert main(many_blocks) == 0
    summary = capsys.readouterr().out.splitlines()
    assert len(summary) == 40
    assert main([*many_blocks, "--all"]) == 0
    listed = [line for line in capsys.readouterr().out.splitlines() if line.count(", ") > 3]
    shown = [line for line in summary if line.startswith("  * ")]
    assert set(shown) <= set(listed)
    assert len(shown) + int(summary[-1].split()[1]) == len(listed)


@pytest.mark.parametrize(("name", "size"), [("small", 28), ("large", 224), ("declared", 50)])
def test_taps_at_the_size_that_a_network_takes(name, size, capsys):
    assert main(["taps", "--network", f"{__name__}:{name}"]) == 0
    assert f"images [3, {size}, {size}]" in capsys.readouterr().out


def test_taps_of_a_network_that_takes_no_usual_size(capsys):
    assert main(["taps", "--network", f"{__name__}:odd"]) == 1
    assert "takes 77 pixels" in capsys.readouterr().err
    assert main(["taps"]) == 1
    assert "give a checkpoint, --network, or both" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_described_in_its_own_letters(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    summary = COMMANDS[command].summary
    assert f"{summary[0].upper()}{summary[1:]}." in capsys.readouterr().out
    for word in ("HTML", "ID", "OOD", "OpenOOD", "ONNX", "T2FNorm"):
        assert (word.lower() in summary.lower().split()) == (word in summary.split()), summary


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["scroe"], "did you mean 'score'"),
        (["taps", "--network", "timm:x", "--image-sise", "9"], "did you mean --image-size"),
        (["taps", "--network", "torchvision:resnet81"], "did you mean resnet18"),
        (["eval", "--root", "x", "--id-data", "cifar01"], "did you mean 'cifar10'"),
        (["report", "--detector", "x", "--csv", "x.csv", "--output", "x.pdf"], "a .html file"),
    ],
)
def test_what_is_nearly_right_is_named(arguments, named, capsys):
    status = 1
    try:
        status = main(arguments)
    except SystemExit as error:
        status = error.code
    assert status in (1, 2)
    assert named in capsys.readouterr().err


def test_tables_fit_the_terminal(monkeypatch):
    columns = ["near AUROC", "far AUROC", *(f"a long name of a data set {n}" for n in range(6))]
    table = pd.DataFrame(np.arange(16.0).reshape(2, 8), ["one", "two"], columns)
    monkeypatch.setenv("COLUMNS", "300")
    assert "a data set 5" in fitting(table)
    monkeypatch.setenv("COLUMNS", "80")
    lines = fitting(table).splitlines()
    assert max(map(len, lines)) <= 80
    assert "near AUROC  far AUROC" in lines[0]
    assert "a data set" not in lines[0]
    assert formatted(table, "markdown").splitlines()[2].startswith("| one | 0.00 | 1.00 | 2.00")
    assert r"one & 0.00 & 1.00 & 2.00" in formatted(table, "latex")


def test_a_run_has_its_whole_name():
    roots = ["results/cifar10_e8_lr0.05_default", "results/cifar10_e8_lr0.1_default"]
    assert labels(roots) == [Path(root).name for root in roots]
