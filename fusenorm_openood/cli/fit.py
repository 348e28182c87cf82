"""`fusenorm fit`: fit and calibrate a detector on folders of images, and keep it in a file."""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from fusenorm_openood.cli import options
from fusenorm_openood.cli.detector import source_network
from fusenorm_openood.cli.engines import read_postprocessor
from fusenorm_openood.data.lists import CpuLoader
from fusenorm_openood.data.paths import image_paths, is_hidden
from fusenorm_openood.data.preprocessing import Preprocessing
from fusenorm_openood.deployment.files import ReadableFiles, network_record
from fusenorm_openood.detectors.configuration import read_fusenorm
from fusenorm_openood.detectors.decisions import check_apart
from fusenorm_openood.detectors.fusenorm import FuseNorm
from fusenorm_openood.errors import CalibrationError, ConfigError
from fusenorm_openood.forward.recorded import RecordedLoader
from fusenorm_openood.kernels.devices import own_device
from fusenorm_openood.method.conformal import check_enough
from fusenorm_openood.storage.files import check_writable, manifest
from fusenorm_openood.storage.torchrun import among_peers, this_process
from fusenorm_openood.storage.urls import Place

ACCEPTANCE = 0.95


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    options.add_network(parser)
    add("--weights", metavar="FILE", help="checkpoint (default: the network's random weights)")
    add("--id-dir", required=True, nargs="+", help="ID images: folders, patterns, lists, files")
    add("--calibration-dir", nargs="+", help="other ID images, for p-values and verdicts")
    add("--output", required=True, metavar="FILE", help="the detector's file")
    names = "text file with one class name per line, or `folders`: those in --id-dir, sorted"
    add("--class-names", metavar="FILE", help=names)
    add("--image-size", type=options.positive, help="sides of the centre crop (default: declared)")
    add("--resize", type=options.positive, help="size before the crop (default: declared)")
    options.add_normalization(parser)
    options.add_bits(parser)
    add("--config", metavar="NAME", help="YAML file of FuseNorm, or this package's name")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="set one of its arguments")
    add("--batch-size", type=options.positive, default=64, help="images per batch (default: 64)")
    add("--store", metavar="DIR", help="keep what the network says of images; torchrun needs it")
    options.add_computing(parser)


@among_peers()
def run(args: Namespace) -> int:
    """Fit on the ID images, calibrate on the others, save."""
    device, process = own_device(args.device), this_process()
    if process.world > 1 and not args.store:
        raise ConfigError(
            f"{process.world} processes meet in a store: give --store DIR, which all can write to"
        )
    settings = read_fusenorm(read_postprocessor(None, args.config, args.set)).settings
    check_writable(Path(args.output).resolve().parent, "--output")
    if not args.output or Path(args.output).is_dir():
        raise ConfigError(f"--output must be a file, got {args.output!r}: add its name")
    id_paths = image_paths(args.id_dir)
    other_paths = image_paths(args.calibration_dir or ())
    class_names = _class_names(args.class_names, args.id_dir)
    if other_paths:
        check_enough(len(other_paths), ACCEPTANCE)
        check_apart(id_paths, other_paths)
    source = {"network": args.network, "weights": args.weights}
    net = source_network(args.network, args.weights, args.image_size)
    preprocessing = _preprocessing(net, args)
    detector = FuseNorm(net.to(device), settings)
    detector.preprocessing = preprocessing
    detector.network_source = {key: str(value) for key, value in source.items() if value}
    if args.image_size:
        detector.network_source["image_size"] = str(args.image_size)
    detector.class_names = class_names

    known: dict[str, Any] = {"preprocessing": preprocessing.to_json()}
    if args.store:
        known |= network_record(net, preprocessing, Path(args.store))

    def loader(paths: Sequence[Place], name: str) -> Iterable[Any]:
        files, how = ReadableFiles(paths, preprocessing), (args.batch_size, args.num_workers)
        if not args.store:
            return CpuLoader(files, how[0], num_workers=how[1])
        record = {**known, "images": manifest(paths)}
        return RecordedLoader(files, Path(args.store), record, name, *how)

    detector.fit(loader(id_paths, "fit"), progress=not args.no_progress)
    print(f"fitted on {len(id_paths)} images: {', '.join(detector.experts)}")
    if other_paths:
        detector.calibrate(loader(other_paths, "calibration"), progress=not args.no_progress)
        print(f"calibrated on {len(other_paths)} images: {_promise(detector)}")
    else:
        print("not calibrated, so it gives confidences without verdicts: see --calibration-dir")
    if process.leads:
        detector.save(args.output)
    print(f"saved {args.output}")
    return 0


def _promise(detector: FuseNorm) -> str:
    """The guarantee, or why the distinct calibration images are too few for one."""
    try:
        return str(detector.guarantee(ACCEPTANCE))
    except CalibrationError as error:
        return str(error)


def _class_names(path: str | None, id_dirs: list[str]) -> tuple[str, ...] | None:
    """The lines of a text file, or the names of folders in the order of torchvision's ImageFolder.

    Raises:
        ConfigError: the file cannot be read, or there are no folders.
    """
    if path is None:
        return None
    if path == "folders":
        inside = (folder for given in id_dirs for folder in Path(given).glob("*/"))
        names = sorted({f.name for f in inside if f.is_dir() and not is_hidden(f.name)})
        if not names:
            raise ConfigError(
                f"--class-names folders needs one folder per class in --id-dir, but "
                f"{', '.join(id_dirs)} has none: give a text file"
            )
        return tuple(names)
    try:
        return tuple(Path(path).read_text(encoding="utf-8-sig").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not in UTF-8"
        raise ConfigError(f"class names {path} cannot be read ({reason})") from None


def _preprocessing(net: nn.Module, args: Namespace) -> Preprocessing:
    size, normalization = args.image_size, args.normalization
    declared = Preprocessing.of(net, size)
    if declared is None:
        if size is None or normalization is None:
            raise ConfigError(
                f"{type(net).__name__} declares no preprocessing: give --image-size and "
                "--normalization as they were in its training"
            )
        mean, std = normalization
        resize = args.resize or size
        return Preprocessing(resize, (size, size), "bilinear", mean, std, bits=args.bits)
    mean, std = normalization or (declared.mean, declared.std)
    resize = args.resize or declared.resize
    return replace(declared, resize=resize, mean=mean, std=std, bits=args.bits)
