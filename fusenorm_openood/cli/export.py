"""`fusenorm export`: detector and network as one program; `fusenorm recalibrate` such programs."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from fusenorm_openood.cli import inputs, options
from fusenorm_openood.data.paths import each_page, image_paths
from fusenorm_openood.export.recalibrate import recalibrate


def add_export(parser: ArgumentParser) -> None:
    options.add(parser, *options.DETECTOR)
    add = parser.add_argument
    add("--output", required=True, metavar="FILE", help="the program")
    target = "onnx, pt2, aoti, openvino, executorch, litert, coreml (default: by FILE's suffix)"
    add("--target", metavar="NAME", help=target)
    kinds = ("uint8", "uint16", "float32")
    add("--dtype", choices=kinds, help="of images (default: that of the detector)")
    resizes = "height and width of images that the program resizes and crops itself"
    add("--resize-from", nargs=2, type=options.positive, metavar=("H", "W"), help=resizes)
    options.add(parser, "--acceptance", help="share of ID images to accept with max_rank (0.95)")


def run_export(args: Namespace) -> int:
    """Write the program, and say how much its confidences differ from PyTorch's."""
    detector = inputs.load_detector(*inputs.of_detector(args))
    size = args.resize_from and tuple(args.resize_from)
    exported = detector.export(
        args.output, args.dtype, args.acceptance, target=args.target, resize_from=size
    )
    print(f"exported {args.output}: {', '.join(exported.outputs)}")
    if exported.max_rank is not None:
        n = len(detector.check_calibrated())
        print(f"{_verdict(exported.max_rank, args.acceptance)}, {n} calibration images")
    if exported.difference is None:
        print("not compared with PyTorch: its runtime is not installed")
    else:
        print(f"largest difference from PyTorch's confidences: {exported.difference:.1e}")
    return 0


def add_recalibrate(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--program", required=True, metavar="FILE", help=".onnx or .xml file, perhaps quantised")
    new = "ID images that neither trained, fitted nor quantised it"
    add("--calibration-dir", required=True, nargs="+", metavar="DIR", help=new)
    add("--output", metavar="FILE", help="where to write it (default: --program)")
    same = "share of ID images to accept with max_rank (default: as before)"
    options.add(parser, "--acceptance", default=None, help=same)
    options.add(parser, "--pages")


def run_recalibrate(args: Namespace) -> int:
    """Write the program with its own calibration scores."""
    program, output = Path(args.program), Path(args.output or args.program)
    paths = each_page(image_paths(args.calibration_dir), args.pages)
    known = recalibrate(program, paths, output, args.acceptance)
    images = known["calibration_images"]
    on = f"images of {len(images)} classes" if isinstance(images, list) else f"{images} images"
    print(f"calibrated {output} on {on}")
    print(_verdict(known["max_rank"], known["acceptance"]))
    return 0


def _verdict(most: int | list[int], acceptance: float) -> str:
    if isinstance(most, list):
        low, high = min(most), max(most)
        ends = f"from {low} to {high}" if low < high else str(low)
        limit = f"max_rank of its predicted class, which is {ends}"
    else:
        limit = str(most)
    return f"an image is OOD if rank <= {limit} (acceptance {acceptance:g})"
