"""Recipes, read from the YAML files of OpenOOD's pipelines, and batches shared by processes."""

import pytest

from fusenorm_openood.cli.main import main
from fusenorm_openood.data.benchmarks import load_benchmark
from fusenorm_openood.errors import ConfigError
from fusenorm_openood.storage.configs import config_root, lookup, read_config
from fusenorm_openood.storage.torchrun import Process
from fusenorm_openood.training.loop import make_loader
from fusenorm_openood.training.recipes import Recipe, find_recipe


@pytest.mark.parametrize(
    ("id_data", "network", "epochs", "lr", "batch_size", "tau"),
    [
        ("cifar10", "resnet18_32x32", 100, 0.1, 128, 0.1),
        ("cifar100", "resnet18_32x32", 100, 0.1, 128, 0.1),
        ("imagenet200", "resnet18_224x224", 90, 0.1, 256, 0.1),
        ("imagenet", "resnet50", 30, 0.001, 256, 0.05),
        ("digits", "resnet18_32x32", 16, 0.05, 64, 0.1),
    ],
)
def test_recipes_equal_the_published_ones(id_data, network, epochs, lr, batch_size, tau):
    recipe = find_recipe(id_data, method="t2fnorm", init="weights.pth")
    assert (recipe.network, recipe.epochs, recipe.lr) == (network, epochs, lr)
    assert (recipe.batch_size, recipe.tau) == (batch_size, tau)
    assert (recipe.momentum, recipe.weight_decay) == (0.9, 5e-4)
    dataset = read_config(config_root() / "datasets" / id_data / f"{id_data}.yml")
    assert recipe.batch_size == lookup(dataset, "dataset", "train", "batch_size")


def test_a_recipe_that_fine_tunes_needs_a_checkpoint(capsys):
    for method in ("base", "t2fnorm"):
        with pytest.raises(ConfigError, match=r"fine-tunes a trained resnet50 .* init is missing"):
            find_recipe("imagenet", method=method)
        assert main(["train", "--id-data", "imagenet", "--method", method]) == 1
        assert "give the checkpoint to start from (--init)" in capsys.readouterr().err


def test_processes_share_the_batch(digits_images):
    recipe = Recipe(id_data="digits", batch_size=48)
    assert [recipe.batch_per_process(n) for n in (1, 2, 3, 16)] == [48, 24, 16, 3]
    with pytest.raises(ConfigError, match="multiple of the number of processes, got batch_size=48"):
        recipe.batch_per_process(5)

    benchmark = load_benchmark("digits", digits_images)
    for world in (1, 2):
        share = recipe.batch_per_process(world)
        loaders = [
            make_loader(benchmark, share, 0, Process(rank, rank, world)) for rank in range(world)
        ]
        assert [loader.batch_size * world for loader in loaders] == [48] * world
        steps = {len(loader) for loader in loaders}
        assert steps == {-(-len(benchmark.id["train"].images()) // 48)}


def test_an_unknown_method_is_refused_however_a_recipe_is_made():
    for make in (Recipe, find_recipe):
        with pytest.raises(
            ConfigError, match=r"unknown training method 't2fn'.*: choose from base"
        ):
            make(id_data="digits", method="t2fn")
