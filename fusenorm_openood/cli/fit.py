"""`fusenorm fit`: a detector from folders of images; `fusenorm calibrate`: another calibration."""

import logging
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from fusenorm_openood.cli import engines, inputs, options
from fusenorm_openood.data.lists import CpuLoader
from fusenorm_openood.data.paths import each_page, image_paths, is_hidden
from fusenorm_openood.data.preprocessing import INTERPOLATIONS, Normalization, Preprocessing
from fusenorm_openood.deployment.files import ReadableFiles, network_key
from fusenorm_openood.detectors.calibrating import check_apart
from fusenorm_openood.detectors.configuration import read_fusenorm
from fusenorm_openood.detectors.fusenorm import FuseNorm
from fusenorm_openood.errors import CalibrationError, ConfigError, os_errors
from fusenorm_openood.forward.recorded import RecordedLoader
from fusenorm_openood.kernels.devices import own_device
from fusenorm_openood.method.calibration import LEAST
from fusenorm_openood.method.conformal import check_enough
from fusenorm_openood.storage import torchrun, urls
from fusenorm_openood.storage.files import check_file, manifest

ACCEPTANCE = 0.95

log = logging.getLogger(__name__)


def add_fit(parser: ArgumentParser) -> None:
    add = parser.add_argument
    options.add(parser, "--network", "--weights-by-order")
    options.add(parser, "--weights", help="checkpoint (default: the network's random weights)")
    add("--id-dir", required=True, nargs="+", help="ID images: folders, patterns, lists, files")
    add("--calibration-dir", nargs="+", help="other ID images, for p-values and verdicts")
    add("--output", required=True, metavar="FILE", help="the detector's file")
    names = "text file with one class name per line, or `folders`: those in --id-dir, sorted"
    add("--class-names", metavar="FILE", help=names)
    add("--image-size", type=options.positive, help="sides of the centre crop (default: declared)")
    before = "size before the crop (default: declared, or --image-size)"
    add("--resize", type=options.positive, help=before)
    any_channels = partial(options.normalization, channels=None)
    how = "how pixels are interpolated (default: declared, or bilinear)"
    add("--interpolation", choices=INTERPOLATIONS, help=how)
    each = "mean and standard deviation of channels in [0, 1], M,...,S,..., or a name: "
    each += "cifar10, cifar100, imagenet, digits (default: declared)"
    options.add(parser, "--normalization", type=any_channels, help=each)
    options.add(parser, "--bits", "--pages")
    kept = "pixels are kept as: uint8 (default), uint16 (see --bits), float32 (see --range)"
    add("--dtype", choices=("uint8", "uint16", "float32"), default="uint8", help=kept)
    within = "pixels of float32 that are 0 and 1 to --normalization, and the window of DICOM"
    add("--range", type=options.numbers(), metavar="LOW,HIGH", help=within)
    pictured = "channels from 0 that reports show in red, green and blue (default: a grey mean)"
    add("--shown", type=options.numbers(int), metavar="R,G,B", help=pictured)
    options.add(parser, "--config", help="YAML file of FuseNorm, or one of this package by name")
    options.add(parser, "--set")
    options.add(parser, "--batch-size", default=64, help="images per batch (default: 64)")
    stored = "store the scores of images in this folder; torchrun needs it"
    options.add(parser, "--store", default=None, help=stored)
    options.add(parser, "--calibrate-by", "--least", *options.COMPUTING)


@torchrun.among_peers()
def run_fit(args: Namespace) -> int:
    """Fit on the ID images, calibrate on the others, save."""
    device, progress = own_device(args.device), not args.no_progress
    store = inputs.store_of(args.store)
    settings = read_fusenorm(engines.read_postprocessor(None, args.config, args.set)).settings
    given_paths = image_paths(args.id_dir), image_paths(args.calibration_dir or ())
    id_paths, other_paths = (each_page(paths, args.pages) for paths in given_paths)
    check_file(Path(args.output), "--output", ".safetensors")
    names = None if args.class_names is None else class_names(args.class_names, args.id_dir)
    if args.calibrate_by and not other_paths:
        raise ConfigError("--calibrate-by groups calibration images: give --calibration-dir")
    if other_paths:
        check_enough(len(other_paths), ACCEPTANCE)
        check_apart(id_paths, other_paths)
    net = inputs.load_or_build(args.network, args.weights, args.image_size, args.weights_by_order)
    if args.weights is None and torchrun.this_process().leads:
        log.warning(f"no --weights: those of {args.network} are random unless it loads some itself")
    given = {name: getattr(args, name) for name in ("bits", "dtype", "range", "shown")}
    given |= {"interpolation": args.interpolation} if args.interpolation else {}
    sizes = args.image_size, args.resize, args.normalization
    preprocessing = preprocessing_of(net, *sizes, **given)
    detector = FuseNorm(net.to(device), settings)
    detector.preprocessing, detector.class_names = preprocessing, names
    source = {name: getattr(args, name) for name in ("network", "weights", "image_size")}
    detector.network_source = {key: str(value) for key, value in source.items() if value}
    detector.fit(_loader(args, detector, id_paths, "fit", store), progress=progress)
    print(f"fitted on {len(id_paths)} images: {', '.join(detector.experts)}")
    if other_paths:
        _calibrate(args, detector, other_paths, store, by=args.calibrate_by)
    else:
        print("not calibrated, so it gives confidences without verdicts: see --calibration-dir")
    return _save(args, detector)


def add_calibrate(parser: ArgumentParser) -> None:
    options.add(parser, *options.DETECTOR)
    add = parser.add_argument
    new = "ID images that neither trained nor fitted it: folders, patterns, lists, files"
    add("--calibration-dir", nargs="+", help=f"{new} (default: only --class-names change)")
    names = "text file with one class name per line, or `folders`: those in --calibration-dir"
    add("--class-names", metavar="FILE", help=names)
    add("--output", required=True, metavar="FILE", help="the new file, which may be the same")
    add("--merge", action="store_true", help="keep the calibration images that it has")
    add("--newest", type=options.positive, metavar="N", help="keep at most the newest N images")
    by = "by predicted class, or all = not by groups (default: as before)"
    options.add(parser, "--calibrate-by", choices=("predicted", "all"), help=by)
    own = "images with which a class has scores of its own (default: as before)"
    options.add(parser, "--least", default=None, help=own)
    options.add(parser, "--batch-size", default=64, help="images per batch (default: 64)")
    options.add(parser, "--store", default=None, help="store the scores of images in this folder")
    options.add(parser, "--pages", *options.COMPUTING)


@torchrun.among_peers()
def run_calibrate(args: Namespace) -> int:
    """Calibrate the detector of a file on other images, or name its classes, and save it."""
    store = inputs.store_of(args.store)
    paths = each_page(image_paths(args.calibration_dir or ()), args.pages)
    how = args.merge, args.newest, args.calibrate_by, args.least
    if not paths and (args.class_names is None or any(how)):
        raise ConfigError("there are no images to calibrate on: give --calibration-dir")
    check_file(Path(args.output), "--output", ".safetensors")
    detector = inputs.load_detector(*inputs.of_detector(args))
    if args.class_names is not None:
        dirs = args.calibration_dir or ()
        detector.class_names = class_names(args.class_names, dirs, "--calibration-dir")
    if not paths:
        return _save(args, detector)
    known, by = detector.calibration_, args.calibrate_by
    if known is not None:
        by, args.least = by or known.by, args.least or known.least
    if by not in (None, "predicted", "all"):
        raise ConfigError(
            f"{args.detector} is calibrated by {by}, which image files do not tell: choose "
            "--calibrate-by predicted or all, or calibrate in Python"
        )
    by, merge = None if by == "all" else by, {"merge": args.merge, "newest": args.newest}
    _calibrate(args, detector, paths, store, by=by, **merge)
    return _save(args, detector)


def _loader(
    args: Namespace, detector: FuseNorm, paths: Sequence[urls.Place], name: str, store: Path | None
) -> Iterable[Any]:
    """The images of files, without labels."""
    preprocessing, how = detector.known_preprocessing(), (args.batch_size, args.num_workers)
    files = ReadableFiles(paths, preprocessing)
    if not store:
        return CpuLoader(files, how[0], num_workers=how[1])
    key = {"preprocessing": preprocessing.to_json(), "images": manifest(paths)}
    key |= network_key(detector.net, preprocessing, store)
    return RecordedLoader(files, store, key, name, *how)


def _calibrate(
    args: Namespace, detector: FuseNorm, paths: Sequence[urls.Place], store: Path | None, **how: Any
) -> None:
    """Calibrate a detector, and print what that promises."""
    loader = _loader(args, detector, paths, "calibration", store)
    how |= {"least": args.least or LEAST, "source": " ".join(args.calibration_dir)}
    calibration = detector.calibrate(loader, not args.no_progress, **how).check_calibrated()
    try:
        calibration.check_enough(ACCEPTANCE)
        own = len(calibration.names) - len(calibration.pooled)
        promise = f"{own} of {len(calibration.names)} classes have scores of their own"
        promise = promise if calibration.by else str(detector.guarantee(ACCEPTANCE))
    except CalibrationError as error:  # too few of them are distinct
        promise = str(error)
    print(f"calibrated on {len(calibration)} images: {promise}")


def _save(args: Namespace, detector: FuseNorm) -> int:
    if torchrun.this_process().leads:
        detector.save(args.output)
    print(f"saved {args.output}")
    return 0


def class_names(file: str, dirs: Sequence[str], option: str = "--id-dir") -> tuple[str, ...]:
    """The lines of a text file; for `folders`, names of folders in the order of ImageFolder.

    ConfigError if the file cannot be read, or there are no folders.
    """
    if file == "folders":
        inside = (folder for given in dirs for folder in Path(given).glob("*/"))
        names = {f.name for f in inside if f.is_dir() and not is_hidden(f.name)}
        if not names:
            raise ConfigError(
                f"--class-names folders needs one folder per class in {option}, found none"
                f"{' in ' * bool(dirs)}{', '.join(dirs)}: give a text file"
            )
        return tuple(sorted(names))
    what, way_out = f"class names {file} cannot be read", "give a text file in UTF-8"
    with os_errors(ConfigError, what, way_out, UnicodeDecodeError):
        return tuple(Path(file).read_text(encoding="utf-8-sig").splitlines())


def preprocessing_of(
    net: nn.Module,
    size: int | None = None,
    resize: int | None = None,
    normalization: Normalization | None = None,
    **pixels: Any,
) -> Preprocessing:
    """What a network declares, with what is given in its place; all of it if none is declared.

    `pixels` are further fields of `Preprocessing`. ConfigError for a size or a normalization that
    is neither declared nor given.
    """
    declared = Preprocessing.of(net, size)
    if declared is None:
        if size is None or normalization is None:
            raise ConfigError(
                f"{type(net).__name__} declares no preprocessing: give --image-size and "
                "--normalization as they were in its training"
            )
        mean, std = normalization
        fields = {"interpolation": "bilinear", "mean": mean, "std": std, **pixels}
        return Preprocessing(resize or size, (size, size), **fields)
    mean, std = normalization or (declared.mean, declared.std)
    return replace(declared, resize=resize or declared.resize, mean=mean, std=std, **pixels)
