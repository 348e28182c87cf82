"""Train the network of the digits benchmark."""

from pathlib import Path

from fusenorm_openood.data.benchmarks import load_benchmark
from fusenorm_openood.data.digits import write_digits
from fusenorm_openood.training.loop import train
from fusenorm_openood.training.recipes import find_recipe


def train_digits(
    data_root: str | Path,
    root: str | Path,
    seed: int = 0,
    method: str = "base",
    progress: bool = True,
) -> Path:
    """Write the digits benchmark and train a network on it, unless they already exist.

    Args:
        data_root: folder for the images and lists.
        root: folder of the training runs; this run is saved in its subfolder `s<seed>`.
        seed, method: settings of the recipe.
        progress: whether to show a progress bar.

    Returns:
        The path of the checkpoint.
    """
    recipe = find_recipe("digits", seed=seed, method=method)
    write_digits(data_root)
    benchmark = load_benchmark("digits", data_root)
    return train(recipe, benchmark, Path(root) / f"s{seed}", progress=progress)
