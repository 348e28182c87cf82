"""`--network`: checkpoints of networks that are not this package's."""

import pytest
import torch

from fusenorm_openood.network import ResNet18_32x32, build_network


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


@pytest.mark.parametrize(
    ("spec", "postprocessor"), [("torchvision:resnet18", "knn"), ("timm:resnet10t", "fusenorm")]
)
def test_eval_scores_a_network_that_is_named(spec, postprocessor, evaluate, tmp_path, capsys):
    if spec.startswith("timm:"):
        pytest.importorskip("timm")
    for run in ("s0", "s1"):
        saved(tmp_path / "root" / run / "best.ckpt", spec)
    options = ["--network", spec, "--postprocessor", postprocessor]
    assert evaluate(*options, root=tmp_path / "root") == 0
    out = capsys.readouterr().out
    assert f"{postprocessor}, digits, 2 run(s), mean" in out
    assert out.count("farood") == 1


def test_compare_scores_a_network_that_is_named(evaluate, tmp_path, capsys):
    spec = f"{__name__}:tiny"
    path = saved(tmp_path / "net.pth", spec)
    assert evaluate("--network", spec, command="compare", root=path) == 0
    assert "FuseNorm (deviation)" in capsys.readouterr().out


def test_weights_are_taken_by_order_on_request(evaluate, tmp_path, capsys):
    path, spec = tmp_path / "net.pth", "torchvision:resnet18"
    saved(path, spec)
    options = ["--network", spec, "--postprocessor", "msp"]
    assert evaluate(*options, root=path) == 0
    table = capsys.readouterr().out.split("in percent:")[1]
    state = torch.load(path)["state_dict"]
    torch.save({k.replace("bn1", "norm"): v for k, v in state.items()}, path)
    assert evaluate(*options, root=path) == 1
    assert "load it with --weights-by-order" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="bn1.weight <- layer4.1.norm.weight"):
        assert evaluate(*options, "--weights-by-order", root=path) == 0
    assert capsys.readouterr().out.split("in percent:")[1] == table


def test_a_network_that_does_not_fit_is_one_sentence(evaluate, tmp_path, capsys):
    path = saved(tmp_path / "net.pth", "torchvision:resnet18")
    assert evaluate("--network", "torchvision:resnet34", root=path) == 1
    captured = capsys.readouterr()
    assert "does not fit the network torchvision:resnet34 (key 'layer1.2" in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_no_network_is_trained_in_place_of_a_missing_checkpoint(evaluate, tmp_path, capsys):
    options = ["--network", "torchvision:resnet18"]
    assert evaluate(*options, root=tmp_path / "none") == 1
    assert "none does not exist" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
