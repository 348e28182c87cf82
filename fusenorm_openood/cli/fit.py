"""`fusenorm fit`: fit and calibrate a detector on folders of images."""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from fusenorm_openood.cli import options
from fusenorm_openood.cli.engines import read_postprocessor
from fusenorm_openood.cli.inputs import load_or_build, store_of
from fusenorm_openood.data.lists import CpuLoader
from fusenorm_openood.data.paths import image_paths, is_hidden
from fusenorm_openood.data.preprocessing import Normalization, Preprocessing
from fusenorm_openood.deployment.files import ReadableFiles, network_key
from fusenorm_openood.detectors.configuration import read_fusenorm
from fusenorm_openood.detectors.fusenorm import FuseNorm
from fusenorm_openood.detectors.repeats import check_apart
from fusenorm_openood.errors import CalibrationError, ConfigError
from fusenorm_openood.forward.recorded import RecordedLoader
from fusenorm_openood.kernels.devices import own_device
from fusenorm_openood.method.conformal import check_enough
from fusenorm_openood.storage.files import check_writable, manifest
from fusenorm_openood.storage.torchrun import among_peers, this_process
from fusenorm_openood.storage.urls import Place

ACCEPTANCE = 0.95


def add_fit(parser: ArgumentParser) -> None:
    add = parser.add_argument
    options.add(parser, "--network")
    options.add(parser, "--weights", help="checkpoint (default: the network's random weights)")
    add("--id-dir", required=True, nargs="+", help="ID images: folders, patterns, lists, files")
    add("--calibration-dir", nargs="+", help="other ID images, for p-values and verdicts")
    add("--output", required=True, metavar="FILE", help="the detector's file")
    names = "text file with one class name per line, or `folders`: those in --id-dir, sorted"
    add("--class-names", metavar="FILE", help=names)
    add("--image-size", type=options.positive, help="sides of the centre crop (default: declared)")
    add("--resize", type=options.positive, help="size before the crop (default: declared)")
    options.add(parser, "--normalization", "--bits")
    options.add(parser, "--config", help="YAML file of FuseNorm, or this package's name")
    options.add(parser, "--set")
    options.add(parser, "--batch-size", default=64, help="images per batch (default: 64)")
    stored = "store the scores of images in this folder; torchrun needs it"
    options.add(parser, "--store", default=None, help=stored)
    options.add(parser, *options.COMPUTING)


@among_peers()
def run_fit(args: Namespace) -> int:
    """Fit on the ID images, calibrate on the others, save."""
    device, process, progress = own_device(args.device), this_process(), not args.no_progress
    store = store_of(args.store)
    settings = read_fusenorm(read_postprocessor(None, args.config, args.set)).settings
    check_writable(Path(args.output).resolve().parent, "--output")
    if not args.output or Path(args.output).is_dir():
        raise ConfigError(f"--output must be a file, got {args.output!r}: add its name")
    id_paths, other_paths = image_paths(args.id_dir), image_paths(args.calibration_dir or ())
    names = None if args.class_names is None else class_names(args.class_names, args.id_dir)
    if other_paths:
        check_enough(len(other_paths), ACCEPTANCE)
        check_apart(id_paths, other_paths)
    net = load_or_build(args.network, args.weights, args.image_size)
    given = args.image_size, args.resize, args.normalization, args.bits
    preprocessing = preprocessing_of(net, *given)
    detector = FuseNorm(net.to(device), settings)
    detector.preprocessing, detector.class_names = preprocessing, names
    source = {name: getattr(args, name) for name in ("network", "weights", "image_size")}
    detector.network_source = {key: str(value) for key, value in source.items() if value}
    key: dict[str, Any] = {"preprocessing": preprocessing.to_json()}
    if store:
        key |= network_key(net, preprocessing, store)

    def loader(paths: Sequence[Place], name: str) -> Iterable[Any]:
        files, how = ReadableFiles(paths, preprocessing), (args.batch_size, args.num_workers)
        if not store:
            return CpuLoader(files, how[0], num_workers=how[1])
        return RecordedLoader(files, store, {**key, "images": manifest(paths)}, name, *how)

    detector.fit(loader(id_paths, "fit"), progress=progress)
    print(f"fitted on {len(id_paths)} images: {', '.join(detector.experts)}")
    if other_paths:
        detector.calibrate(loader(other_paths, "calibration"), progress=progress)
        try:
            promise = str(detector.guarantee(ACCEPTANCE))
        except CalibrationError as error:  # too few of them are distinct
            promise = str(error)
        print(f"calibrated on {len(other_paths)} images: {promise}")
    else:
        print("not calibrated, so it gives confidences without verdicts: see --calibration-dir")
    if process.leads:
        detector.save(args.output)
    print(f"saved {args.output}")
    return 0


def class_names(file: str, id_dirs: Sequence[str]) -> tuple[str, ...]:
    """The lines of a text file; for `folders`, names of folders in the order of ImageFolder.

    Raises:
        ConfigError: the file cannot be read, or there are no folders.
    """
    if file == "folders":
        inside = (folder for given in id_dirs for folder in Path(given).glob("*/"))
        names = {f.name for f in inside if f.is_dir() and not is_hidden(f.name)}
        if not names:
            raise ConfigError(
                f"--class-names folders needs one folder per class in --id-dir, but "
                f"{', '.join(id_dirs)} has none: give a text file"
            )
        return tuple(sorted(names))
    try:
        return tuple(Path(file).read_text(encoding="utf-8-sig").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not in UTF-8"
        raise ConfigError(f"class names {file} cannot be read ({reason})") from None


def preprocessing_of(
    net: nn.Module,
    size: int | None = None,
    resize: int | None = None,
    normalization: Normalization | None = None,
    bits: int | None = None,
) -> Preprocessing:
    """What a network declares, with what is given in its place; all of it if none is declared.

    Raises:
        ConfigError: a size or a normalization that is neither declared nor given.
    """
    declared = Preprocessing.of(net, size)
    if declared is None:
        if size is None or normalization is None:
            raise ConfigError(
                f"{type(net).__name__} declares no preprocessing: give --image-size and "
                "--normalization as they were in its training"
            )
        return Preprocessing(resize or size, (size, size), "bilinear", *normalization, bits=bits)
    mean, std = normalization or (declared.mean, declared.std)
    return replace(declared, resize=resize or declared.resize, mean=mean, std=std, bits=bits)
