"""The network of the digits benchmark."""

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
    """Write the digits benchmark and train a network on it, each unless it is there already.

    Args:
        data_root: where the images and lists go.
        root: folder of the training runs; this one goes into its subfolder ``s<seed>``.
        seed, method: of the recipe.
        progress: show a bar.

    Returns:
        The checkpoint's path.
    """
    recipe = find_recipe("digits", seed=seed, method=method)
    write_digits(data_root)
    benchmark = load_benchmark("digits", data_root)
    return train(recipe, benchmark, Path(root) / f"s{seed}", progress=progress)
