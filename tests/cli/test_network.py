"""`--network`: checkpoints of networks that are not this package's."""

import pytest
import torch

from fusenorm_openood.cli.main import main
from fusenorm_openood.network import ResNet18_32x32, build_network
from tests.conftest import shortened_digits


@pytest.fixture
def data_root(digits_images, tmp_path):
    return shortened_digits(digits_images, tmp_path / "data", 24, 24)


def saved(path, spec, classes=7, prefix="module."):
    """A checkpoint with running statistics that make its features differ between images."""
    torch.manual_seed(0)
    net = build_network(spec, classes, image_size=24).train()
    with torch.no_grad():
        for _ in range(2):
            net(torch.randn(16, 3, 24, 24))
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": {prefix + k: v for k, v in net.state_dict().items()}}, path)
    return path


def tiny(num_classes):
    return ResNet18_32x32(num_classes, width=4)


def command(name, data_root, root, *args):
    return [name, "--id-data", "digits", "--data-root", str(data_root), "--root", str(root),
            "--num-workers", "0", "--no-progress", "--device", "cpu", "--store", "none",
            *args]  # fmt: skip


@pytest.mark.parametrize(
    ("spec", "postprocessor"), [("torchvision:resnet18", "knn"), ("timm:resnet10t", "fusenorm")]
)
def test_eval_scores_a_network_that_is_named(spec, postprocessor, data_root, tmp_path, capsys):
    if spec.startswith("timm:"):
        pytest.importorskip("timm")
    for run in ("s0", "s1"):
        saved(tmp_path / "root" / run / "best.ckpt", spec)
    options = ["--network", spec, "--postprocessor", postprocessor]
    assert main(command("eval", data_root, tmp_path / "root", *options)) == 0
    out = capsys.readouterr().out
    assert f"{postprocessor}, digits, 2 run(s), mean" in out
    assert out.count("farood") == 1


def test_compare_scores_a_network_that_is_named(data_root, tmp_path, capsys):
    spec = f"{__name__}:tiny"
    path = saved(tmp_path / "net.pth", spec)
    assert main(command("compare", data_root, path, "--network", spec)) == 0
    assert "FuseNorm (deviation)" in capsys.readouterr().out


def test_weights_are_taken_by_order_on_request(data_root, tmp_path, capsys):
    path, spec = tmp_path / "net.pth", "torchvision:resnet18"
    saved(path, spec)
    options = ["--network", spec, "--postprocessor", "msp"]
    assert main(command("eval", data_root, path, *options)) == 0
    table = capsys.readouterr().out.split("in percent:")[1]
    state = torch.load(path)["state_dict"]
    torch.save({k.replace("bn1", "norm"): v for k, v in state.items()}, path)
    assert main(command("eval", data_root, path, *options)) == 1
    assert "load it with --weights-by-order" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="bn1.weight <- layer4.1.norm.weight"):
        assert main(command("eval", data_root, path, *options, "--weights-by-order")) == 0
    assert capsys.readouterr().out.split("in percent:")[1] == table


def test_a_recognised_checkpoint_gives_the_same_table_under_its_name(data_root, tmp_path, capsys):
    path, tables = saved(tmp_path / "net.pth", "torchvision:resnet18"), []
    for options in ([], ["--network", "torchvision:resnet18"]):
        assert main(command("eval", data_root, path, "--postprocessor", "msp", *options)) == 0
        tables.append(capsys.readouterr().out.split("in percent:")[1])
    assert tables[0] == tables[1]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet18", "network must be torchvision:NAME, timm:NAME or package.module:factory"),
        ("torchvision:resnet34", "does not fit the network torchvision:resnet34 (key 'layer1.2"),
        ("nowhere:net", "needs the module nowhere, which cannot be imported"),
    ],
)
def test_a_network_that_does_not_fit_is_one_sentence(spec, message, data_root, tmp_path, capsys):
    path = saved(tmp_path / "net.pth", "torchvision:resnet18")
    assert main(command("eval", data_root, path, "--network", spec)) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_no_network_is_trained_in_place_of_a_missing_checkpoint(data_root, tmp_path, capsys):
    options = ["--network", "torchvision:resnet18"]
    assert main(command("eval", data_root, tmp_path / "none", *options)) == 1
    assert "none does not exist" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
