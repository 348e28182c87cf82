"""The way of one batch through the package: calls, functions, modules and frames of `score`.

Counts the package's own Python functions, as `sys.setprofile` sees them, while a fitted FuseNorm
scores one batch of 8 images with torchvision's ResNet-18.
"""

import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torchvision.models import resnet18

import fusenorm_openood
from fusenorm_openood import FuseNorm

PACKAGE = str(Path(fusenorm_openood.__file__).parent)


def journey(run: Any) -> tuple[dict[str, int], Counter[str]]:
    """Figures of the package's functions that a call runs through."""
    calls: list[tuple[str, str]] = []
    depth = deepest = 0

    def profile(frame: FrameType, event: str, arg: Any) -> None:
        nonlocal depth, deepest
        code = frame.f_code
        if not code.co_filename.startswith(PACKAGE):
            return
        if event == "call":
            calls.append((code.co_filename, code.co_qualname))
            depth += 1
            deepest = max(deepest, depth)
        elif event == "return":
            depth -= 1

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    files = [file for file, _ in calls]
    return {
        "calls": len(calls),
        "functions": len(set(calls)),
        "modules": len(set(files)),
        "moves between modules": sum(a != b for a, b in pairwise(files)),
        "frames": deepest,
    }, Counter(name for _, name in calls)


def main() -> None:
    torch.manual_seed(0)
    images = torch.rand(60, 3, 64, 64)
    detector = FuseNorm(resnet18(num_classes=10).eval()).fit([images[:52]])
    detector.score(images[52:])  # kernels are compiled and tried
    figures, by_function = journey(lambda: detector.score(images[52:]))
    for name, count in figures.items():
        print(f"{name:22}{count:5}")
    if "--functions" in sys.argv:
        for name, count in by_function.most_common():
            print(f"{count:5} {name}")


if __name__ == "__main__":
    main()
