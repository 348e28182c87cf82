"""`fusenorm export`: a detector and its network as one program for ONNX or `torch.export`."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from fusenorm_openood.cli import options
from fusenorm_openood.cli.detector import load_detector
from fusenorm_openood.errors import ConfigError


def add_arguments(parser: ArgumentParser) -> None:
    options.add(parser, *options.DETECTOR)
    add = parser.add_argument
    add("--onnx", metavar="FILE", help="write an ONNX program, FILE.onnx")
    add("--pt2", metavar="FILE", help="write a program of torch.export, FILE.pt2")
    add("--dtype", default="uint8", choices=("uint8", "float32"), help="of images (uint8)")
    options.add(parser, "--acceptance", help="its default in the program (0.95)")


def run(args: Namespace) -> int:
    """Write each program, and say how much its confidences differ from PyTorch's."""
    given = {suffix: path for suffix, path in ((".onnx", args.onnx), (".pt2", args.pt2)) if path}
    if not given:
        raise ConfigError("an output is needed: give --onnx FILE.onnx, --pt2 FILE.pt2, or both")
    for suffix, path in given.items():
        if Path(path).suffix != suffix:
            raise ConfigError(f"--{suffix[1:]} must name a file that ends in {suffix}, got {path}")
    detector = load_detector(args.detector, args.network, args.weights, args.bits, "cpu")
    for path in given.values():
        exported = detector.export(Path(path), args.dtype, args.acceptance)
        print(f"exported {path}: {', '.join(exported.outputs)}")
        if exported.difference is None:
            print("not compared with PyTorch: onnxruntime is not installed")
        else:
            print(f"largest difference from PyTorch's confidences: {exported.difference:.1e}")
    return 0
