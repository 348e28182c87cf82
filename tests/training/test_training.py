import csv
import itertools
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from fusenorm_openood import load_network
from fusenorm_openood.cli.main import main
from fusenorm_openood.data.benchmarks import load_benchmark
from fusenorm_openood.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    NonFiniteError,
    UnwritableError,
)
from fusenorm_openood.network.checkpoints import load_backbone
from fusenorm_openood.training.loop import (
    processes,
    save_progress,
    threads,
    train,
    train_digits,
    train_epoch,
)
from fusenorm_openood.training.recipes import Recipe, find_recipe
from tests.conftest import shortened_digits


@pytest.fixture(scope="module")
def few(digits_images, tmp_path_factory):
    """The digits benchmark with 96 training and 20 validation images."""
    home = tmp_path_factory.mktemp("few")
    return load_benchmark("digits", shortened_digits(digits_images, home, 96, 20))


RECIPE = Recipe(id_data="digits", width=4, epochs=3, batch_size=16, lr=0.05)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("method", ["base", "t2fnorm"])
def test_the_first_20_steps_equal_plain_torch(method):
    recipe = Recipe(id_data="digits", width=4, epochs=2, lr=0.1, method=method, tau=0.1)
    torch.manual_seed(0)
    net, twin = recipe.build(3), recipe.build(3)
    twin.load_state_dict(net.state_dict())
    images, labels = torch.randn(80, 3, 8, 8), torch.randint(0, 3, (80,))
    loader = DataLoader(TensorDataset(images, labels), 4)

    optimiser = torch.optim.SGD(
        net.parameters(), recipe.lr, recipe.momentum, weight_decay=5e-4, nesterov=True
    )
    loss = train_epoch(net, optimiser, loader, recipe)

    plain = torch.optim.SGD(twin.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)
    twin.train()
    losses = []
    for step, (x, y) in enumerate(loader):
        plain.param_groups[0]["lr"] = 1e-6 + (0.1 - 1e-6) * (1 + math.cos(math.pi * step / 40)) / 2
        if method == "t2fnorm":
            _, feature = twin.backbone(x, return_feature=True)
            logits = twin.backbone.fc(torch.nn.functional.normalize(feature, dim=1) / twin.tau)
        else:
            logits = twin(x)
        losses.append(torch.nn.functional.cross_entropy(logits, y))
        plain.zero_grad()
        losses[-1].backward()
        plain.step()
    assert len(losses) == 20
    assert loss == pytest.approx(torch.stack(losses).mean().item(), abs=1e-5)
    for trained, expected in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(trained, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def whole(few, tmp_path_factory):
    """The folder of an uninterrupted run."""
    random_state = torch.get_rng_state()
    folder = train(RECIPE, few, tmp_path_factory.mktemp("whole"), progress=False).parent
    assert torch.equal(torch.get_rng_state(), random_state)
    return folder


def test_a_run_writes_files_that_openood_and_load_network_read(few, whole):
    best = whole / "best.ckpt"
    assert sorted(p.name for p in whole.iterdir()) == ["best.ckpt", "log.csv", "recipe.yml"]
    rows = list(csv.DictReader((whole / "log.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert all(value.dtype != torch.float16 for value in weights(best).values())
    assert load_network(best).fc.out_features == 7
    written = best.stat().st_mtime_ns
    assert train(RECIPE, few, whole, progress=False) == best
    assert best.stat().st_mtime_ns == written


def test_a_resumed_run_ends_with_bitwise_identical_weights(few, tmp_path, monkeypatch):
    recipe = replace(RECIPE, method="t2fnorm")
    through = train(recipe, few, tmp_path / "through", progress=False)

    interrupted = after(1, KeyboardInterrupt, train_epoch)
    monkeypatch.setattr("fusenorm_openood.training.loop.train_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, few, tmp_path / "cut", progress=False)
    assert (tmp_path / "cut" / "unfinished.ckpt").is_file()
    monkeypatch.undo()
    torch.rand(100)  # what happens in between does not matter
    cut = train(recipe, few, tmp_path / "cut", progress=False)
    expected, found = weights(through), weights(cut)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    logs = [(tmp_path / run / "log.csv").read_text() for run in ("through", "cut")]
    assert logs[0] == logs[1]


def test_a_run_interrupted_between_two_files_is_not_finished(few, whole, tmp_path, monkeypatch):
    folder = tmp_path / "cut"
    (folder / "log.csv").mkdir(parents=True)  # which is written after best.ckpt of an epoch
    with pytest.raises(UnwritableError):
        train(RECIPE, few, folder, progress=False)
    assert (folder / "best.ckpt").is_file()
    (folder / "log.csv").rmdir()
    monkeypatch.setattr(
        "fusenorm_openood.training.loop.save_progress", after(2, KeyboardInterrupt, save_progress)
    )
    with pytest.raises(KeyboardInterrupt):  # the log has an epoch that was not saved
        train(RECIPE, few, folder, progress=False)
    assert len((folder / "log.csv").read_text().splitlines()) == 4
    monkeypatch.undo()
    cut_short = train(RECIPE, few, folder, progress=False)
    torch.testing.assert_close(weights(cut_short), weights(whole / "best.ckpt"), rtol=0, atol=0)
    assert (folder / "log.csv").read_text() == (whole / "log.csv").read_text()


def test_a_deleted_best_checkpoint_is_written_again(few, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "fusenorm_openood.training.loop.save_progress", after(2, KeyboardInterrupt, save_progress)
    )
    with pytest.raises(KeyboardInterrupt):
        train(RECIPE, few, tmp_path, progress=False)
    monkeypatch.undo()
    (tmp_path / "best.ckpt").unlink()
    monkeypatch.setattr("fusenorm_openood.training.loop.validation_accuracy", lambda *_: 0.0)
    best = train(RECIPE, few, tmp_path, progress=False)
    assert load_network(best).fc.out_features == 7


def after(calls, error, function):
    """A function that raises an error at its call number `calls`, counted from 0."""
    count = itertools.count()

    def failing(*args):
        if next(count) == calls:
            raise error
        return function(*args)

    return failing


@pytest.mark.slow
def test_several_processes_train_together(few, tmp_path):
    data_root = few.id["train"].imagelist.parents[2]
    subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            "-m", "fusenorm_openood.cli", "train", "--id-data", "digits", "--data-root",
            str(data_root), "--results-dir", str(tmp_path), "--epochs", "2", "--no-progress",
            "--num-workers", "0", "--device", "cpu",
        ],
        check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    folder = tmp_path / find_recipe("digits", epochs=2, method="t2fnorm").run_name
    assert sorted(p.name for p in folder.iterdir()) == ["best.ckpt", "log.csv", "recipe.yml"]
    assert not any(key.startswith("module.") for key in weights(folder / "best.ckpt"))
    assert load_network(folder / "best.ckpt").tau == pytest.approx(0.1)


@pytest.mark.parametrize(("amp", "channels_last"), [(False, True), (True, True)])
def test_memory_format_and_precision_train_the_same_kind_of_weights(
    few, tmp_path, amp, channels_last
):
    recipe = replace(RECIPE, width=8, amp=amp, epochs=1, lr=1e-4)
    best = train(recipe, few, tmp_path, channels_last=channels_last, progress=False)
    state = weights(best)
    assert all(v.dtype in (torch.float32, torch.int64) for v in state.values())
    assert all(v.is_contiguous() for v in state.values())
    assert all(v.isfinite().all() for v in state.values())
    if not amp:
        torch.manual_seed(recipe.seed)
        start = recipe.build(7).state_dict()
        plain = weights(train(recipe, few, tmp_path / "plain", progress=False))
        # Rounding turns some ReLUs on or off, which changes updates by up to 15 %; a wrong
        # gradient changes them by all of their length.
        for name, value in plain.items():
            update = (value - start[name]).float().norm()
            assert (state[name] - value).float().norm() < 0.5 * update, name


def test_a_network_too_narrow_for_channels_last_is_rejected(few, tmp_path):
    with pytest.raises(
        ConfigError, match=r"width must be >= 8 for channels_last on a CPU, .* got 4"
    ):
        train(RECIPE, few, tmp_path, channels_last=True, progress=False)
    assert not any(tmp_path.iterdir())


def test_training_can_start_from_either_kind_of_checkpoint(few, tmp_path, digits):
    net = load_network(digits[1])
    plain = find_recipe("digits").build(7)
    wrapped = find_recipe("digits", method="t2fnorm").build(7)
    load_backbone(wrapped, digits[1])
    torch.save(wrapped.state_dict(), tmp_path / "t2fnorm.ckpt")
    load_backbone(plain, tmp_path / "t2fnorm.ckpt")
    for target in (wrapped.backbone, plain):
        for key, value in net.state_dict().items():
            assert torch.equal(target.state_dict()[key], value)
    assert wrapped.tau == pytest.approx(0.1)
    with pytest.raises(CheckpointError, match="does not fit ResNet18_32x32"):
        train(replace(RECIPE, init=str(digits[1])), few, tmp_path / "run", progress=False)


def test_after_a_non_finite_loss_the_last_good_checkpoint_stays(few, tmp_path, monkeypatch):
    rates = iter([0.01] * 6 + [1e30] * 100)
    monkeypatch.setattr(Recipe, "learning_rate", lambda *_: next(rates))
    with pytest.raises(NonFiniteError, match=r"the loss is (nan|inf) at step (\d+): the last good"):
        train(RECIPE, few, tmp_path, progress=False)
    assert all(v.isfinite().all() for v in weights(tmp_path / "best.ckpt").values())
    unfinished = weights(tmp_path / "unfinished.ckpt")
    assert unfinished["progress"][0] == 1
    assert all(v.isfinite().all() for v in unfinished["net"].values())


def test_labels_outside_the_networks_classes_are_rejected(few, tmp_path):
    imagelist = few.id["train"].imagelist
    text = imagelist.read_text()
    try:
        imagelist.write_text(re.sub(r" \d+\n", " 7\n", text, count=1))
        with pytest.raises(DataError, match=r"line 1: the label of .* classes 0 to 6, got 7"):
            train(RECIPE, few, tmp_path, progress=False)
    finally:
        imagelist.write_text(text)


def test_a_run_of_another_recipe_is_not_resumed(few, tmp_path):
    begun = replace(RECIPE, epochs=1)
    train(begun, few, tmp_path, progress=False)
    for change in ({"lr": 0.01}, {"batch_size": 8}, {"init": "other.ckpt"}):
        with pytest.raises(
            CheckpointError, match=f"{next(iter(change))} must be .*, as in the run in"
        ):
            train(replace(begun, **change), few, tmp_path, progress=False)
    (tmp_path / "unfinished.ckpt").write_bytes(b"nothing")
    with pytest.raises(
        CheckpointError, match=r"cannot be read: .* or remove it to start the run again"
    ):
        train(begun, few, tmp_path, progress=False)


def test_runs_have_openoods_names():
    names = {
        ("cifar10", "t2fnorm"): "cifar10_t2fnorm_net_t2fnorm_e100_lr0.1_alpha0.1_default/s0",
        ("imagenet200", "t2fnorm"): "imagenet200_t2fnorm_net_t2fnorm_e90_lr0.1_alpha0.1_default/s0",
        ("imagenet", "t2fnorm"): "imagenet_t2fnorm_net_t2fnorm_e30_lr0.001_alpha0.05_default/s0",
        ("cifar100", "base"): "cifar100_resnet18_32x32_base_e100_lr0.1_default/s0",
    }
    for (id_data, method), name in names.items():
        init = "weights.pth" if id_data == "imagenet" else None
        assert find_recipe(id_data, method=method, init=init).run_name == name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.0}, "lr must be a number > 0, got 0.0"),
        ({"tau": math.inf}, "tau must be a number > 0, got inf"),
        ({"epochs": -1}, "epochs must be a whole number >= 1, got -1"),
    ],
)
def test_invalid_recipes_are_rejected(change, message):
    with pytest.raises(ConfigError, match=message):
        find_recipe("cifar10", **change)
    with pytest.raises(ConfigError, match="unknown ID data set 'mnist': choose from cifar10"):
        find_recipe("mnist")


def test_zero_is_not_treated_as_a_missing_option(capsys):
    assert main(["train", "--id-data", "digits", "--lr", "0"]) == 1
    assert "lr must be a number > 0, got 0.0" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["mps", "cuda:1"])
def test_several_processes_need_a_device_each(device, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    rejected = pytest.raises(ConfigError, match=f"device of 2 processes .* got '{device}'")
    with rejected, processes(torch.device(device)):
        pass


def test_the_command_reports_missing_images(tmp_path, capsys):
    args = ["train", "--id-data", "cifar10", "--data-root", str(tmp_path)]
    assert main([*args, "--results-dir", str(tmp_path / "results")]) == 1
    assert "train_cifar10.txt cannot be read" in capsys.readouterr().err


def test_digits_are_trained_once_and_reach_97_percent(digits):
    data_root, checkpoint = digits
    written = checkpoint.stat().st_mtime_ns
    assert train_digits(data_root, checkpoint.parent.parent, progress=False) == checkpoint
    assert checkpoint.stat().st_mtime_ns == written
    rows = list(csv.DictReader((checkpoint.parent / "log.csv").open()))
    assert max(float(row["val_acc"]) for row in rows) >= 97


def test_the_number_of_threads_is_restored():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), threads(1):
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == before
