"""Untrained networks of torchvision and timm as exported programs: which verdicts differ.

Each run adds the cells of some targets to a JSON file, so that runtimes may be installed apart:

    python -m benchmarks.export_catalogue --json rows.json --only onnx pt2
    python -m benchmarks.export_catalogue --json rows.json --only openvino executorch --first 8
    python -m benchmarks.export_catalogue --json rows.json  # prints the table
"""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks.runtimes import compared
from fusenorm_openood import FuseNorm, Settings
from fusenorm_openood.errors import FuseNormError
from fusenorm_openood.export.program import run_all
from fusenorm_openood.export.targets import TARGETS
from tests.zoo.networks import build

SIZE = 64
NETWORKS = [
    "torchvision:resnet18",
    "torchvision:mobilenet_v3_small",
    "torchvision:efficientnet_b0",
    "torchvision:densenet121",
    "torchvision:shufflenet_v2_x0_5",
    "torchvision:convnext_tiny",
    "torchvision:swin_t",
    "timm:vit_tiny_patch16_224",
    "timm:deit_tiny_patch16_224",
    "torchvision:regnet_y_400mf",
    "torchvision:vgg11_bn",
    "torchvision:googlenet",
    "torchvision:mnasnet0_5",
    "torchvision:mobilenet_v2",
    "torchvision:squeezenet1_1",
    "timm:mobilenetv4_conv_small",
    "timm:convnextv2_atto",
    "timm:poolformer_s12",
    "timm:resnest14d",
    "timm:edgenext_xx_small",
]


def images_of() -> tuple[Tensor, Tensor]:
    """Noise of varying contrast, and images that are far off."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(160, 3, SIZE, SIZE, generator=generator)
    drawn *= 0.2 + torch.rand(160, 1, 1, 1, generator=generator)
    far = torch.stack([drawn[0] * 0, drawn[0] * 0 + 2, drawn[1] * 8, drawn[2].sign() * 3])
    return drawn, far


def fitted(network: str, drawn: Tensor) -> FuseNorm:
    net = build(network, drawn[:60])
    settings = Settings()
    if network == "torchvision:squeezenet1_1":  # it ends in a ReLU, which fDBD and head_mds refuse
        settings = Settings(strong=("energy", "logitgap", "mds++"))
    return FuseNorm(net, settings).fit([drawn[:60]]).calibrate([drawn[60:100]])


def cell(detector: FuseNorm, name: str, images: Tensor, folder: Path) -> dict[str, Any]:
    target = TARGETS[name]
    path = folder / f"it{target.suffix}"
    detector.export(path, shape=images.shape[1:], target=name)
    found = run_all(target, target.load(path), images.numpy())
    return compared(detector, detector.score(images).numpy(), found, (19, 39))


def shown(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    if "fails" in found:
        return str(found["fails"])
    outside = found["outside"] + found["wrong_ranks"]
    return f"{found['differ']} of {found['verdicts']}" + f" ({outside} outside)" * bool(outside)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=TARGETS, default=[])
    parser.add_argument("--first", type=int, default=len(NETWORKS), help="how many networks")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(args.json.read_text()) if args.json.is_file() else {}
    drawn, far = images_of()
    for network in NETWORKS[: args.first] if args.only else ():
        cells = rows.setdefault(network, {})
        try:
            detector = fitted(network, drawn)
        except FuseNormError as error:
            cells |= {name: {"fails": str(error)} for name in args.only}
            continue
        for name in args.only:
            with TemporaryDirectory() as folder:
                try:
                    cells[name] = cell(detector, name, torch.cat([drawn[60:], far]), Path(folder))
                except FuseNormError as error:
                    cells[name] = {"fails": str(error)}
            args.json.write_text(json.dumps(rows, indent=1) + "\n")
    names = [name for name in TARGETS if any(name in cells for cells in rows.values())]
    print(f"| network | {' | '.join(names)} |\n{'| --- ' * (len(names) + 1)}|")
    for network, cells in rows.items():
        print(f"| {network} | {' | '.join(shown(cells.get(name)) for name in names)} |")


if __name__ == "__main__":
    main()
