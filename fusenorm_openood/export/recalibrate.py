"""Calibrate a program that was changed after it was exported, for example quantised."""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ImageOps

from fusenorm_openood.data.images import reading
from fusenorm_openood.data.pixels import read_bands
from fusenorm_openood.data.preprocessing import Preprocessing
from fusenorm_openood.errors import ConfigError, DataError, ExportError
from fusenorm_openood.export.judge import OUTPUTS, compared_with, facts_of
from fusenorm_openood.export.program import find_target, move
from fusenorm_openood.export.targets import METADATA
from fusenorm_openood.method.calibration import LEAST, Calibration
from fusenorm_openood.storage.configs import typed
from fusenorm_openood.storage.urls import Place

Constants = dict[str, NDArray[Any]]  # by name; see `compared_with`


def recalibrate(
    program: Path, images: Iterable[Place], output: Path, acceptance: float | None = None
) -> dict[str, Any]:
    """Write a program with the calibration scores that it gives to images itself, one by one.

    Images with the same logits and confidence count once. If its ranks are by predicted class,
    these are grouped and pooled anew; see `Calibration`. The output may be the same file. Returns
    the metadata, with `max_rank` for the acceptance; None = as before.

    Raises:
        ConfigError: a program that is no `.onnx` or `.xml` file, or another suffix.
        CalibrationError: too few images for the acceptance.
        DataError: an image that cannot be read, or of another size than the program resizes.
        ExportError: a program without ranks, or whose confidences are not finite or the same.
    """
    models: dict[str, type[_Onnx | _OpenVINO]] = {".onnx": _Onnx, ".xml": _OpenVINO}
    if program.suffix not in models or output.suffix != program.suffix:
        raise ConfigError(
            f"only .onnx and .xml programs can be recalibrated, each into its like, got {program} "
            f"and {output}: quantise one of these"
        )
    model = models[program.suffix](program)
    known: dict[str, Any] = json.loads(model.metadata or "{}")
    if OUTPUTS[-1] not in known.get("outputs", ()) or not known["preprocessing"]:
        raise ExportError(
            f"{program} was not exported from a calibrated detector with preprocessing by this "
            "version: export the detector again"
        )
    preprocessing: Preprocessing = typed(Preprocessing, known["preprocessing"], "preprocessing")
    if size := known.get("resize_from"):  # the program resizes and crops itself
        preprocessing = replace(preprocessing, resize=size, crop=size, crop_mode="squash")
    run, rows = find_target(program, None).load(program), []
    for path in images:
        if size and (given := _size(path, preprocessing)) != tuple(size):
            raise DataError(
                f"image {path} is {given[0]} x {given[1]}, and {program} takes images of "
                f"{size[0]} x {size[1]} only: leave it out, or export a program for its size"
            )
        found = run(preprocessing.pixels(path).numpy().astype(known["dtype"])[None])
        rows.append([*found["confidence"], *found["logits"].flatten()])
    distinct = np.unique(np.array(rows, np.float64), axis=0) if rows else np.empty((0, 2))
    conf, by = distinct[:, 0], known.get("calibration_by")
    if not np.isfinite(conf).all():
        raise ExportError(f"{program} gives confidences that are not finite: quantise it otherwise")
    group, classes = np.zeros(len(conf), np.int64), 1
    if by is not None:
        group, classes = distinct[:, 1:].argmax(axis=1), len(known["max_rank"])
        if "calibration_least" not in known:
            raise ExportError(f"{program} does not say how classes are pooled: export it again")
    names, least = tuple(map(str, range(classes))), known.get("calibration_least", LEAST)
    calibration = Calibration(conf, conf[None], (), by, names, group, least)
    known |= facts_of(calibration, known["acceptance"] if acceptance is None else acceptance)
    ties = (conf == conf[0]).sum()
    if ties > np.max(known["max_rank"]):  # the ranks of all images are larger
        raise ExportError(
            f"{program.name} gives {ties} of {len(conf)} images the same lowest confidence, and "
            "would reject none: quantise its convolutions alone"
        )
    with TemporaryDirectory() as folder:
        draft = Path(folder) / output.name
        model.write(compared_with(calibration, 0), json.dumps(known), draft)
        move(draft, output)
    return known


def _size(path: Place, preprocessing: Preprocessing) -> tuple[int, int]:
    """Height and width of an image, upright."""
    with reading(f"image {path}"):
        band = read_bands(path, preprocessing)[0]
        ImageOps.exif_transpose(band, in_place=True)
    return band.height, band.width


class _Onnx:
    def __init__(self, path: Path) -> None:
        import onnx

        self.model = onnx.load(path)
        entries = {entry.key: entry.value for entry in self.model.metadata_props}
        self.metadata = entries.get(METADATA)

    def write(self, constants: Constants, metadata: str, path: Path) -> None:
        import onnx

        for name, values in constants.items():
            found = _only([i for i in self.model.graph.initializer if i.name == name], name, path)
            found.CopyFrom(onnx.numpy_helper.from_array(values, name))
        del self.model.graph.value_info[:]  # sizes of what follows from other constants
        onnx.helper.set_model_props(self.model, {METADATA: metadata})
        onnx.save(self.model, path)


class _OpenVINO:
    def __init__(self, path: Path) -> None:
        import openvino

        self.model = openvino.Core().read_model(path)
        known = self.model.has_rt_info(METADATA)
        self.metadata = self.model.get_rt_info(METADATA).astype(str) if known else None

    def write(self, constants: Constants, metadata: str, path: Path) -> None:
        import openvino

        for name, values in constants.items():
            ops = [op for op in self.model.get_ops() if op.get_friendly_name() == name]
            constant = openvino.op.Constant(values)
            constant.set_friendly_name(name)
            for user in _only(ops, name, path).output(0).get_target_inputs():
                user.replace_source_output(constant.output(0))
        self.model.validate_nodes_and_infer_types()
        self.model.set_rt_info(metadata, METADATA)
        openvino.save_model(self.model, path, compress_to_fp16=False)


def _only(found: list[Any], name: str, path: Path) -> Any:
    if len(found) != 1:
        raise ExportError(
            f"{path.name} has {len(found)} constants named {name!r}, where an exported program "
            "has one: change it in a way that keeps names"
        )
    return found[0]
