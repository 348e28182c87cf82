"""Trace a judge, turn it into the bytes of a file, run these, and write them."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from copy import copy
from importlib.util import find_spec
from io import BytesIO, StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from fusenorm_openood.errors import ConfigError, ExportError
from fusenorm_openood.export.judge import Dtype, Inputs, Judge, float32_copy
from fusenorm_openood.kernels.devices import on_cpu
from fusenorm_openood.method.conformal import check_enough
from fusenorm_openood.method.scores.base import Score
from fusenorm_openood.storage.files import write_whole
from fusenorm_openood.version import __version__

if TYPE_CHECKING:
    from fusenorm_openood.detectors.fusenorm import FuseNorm

TOLERANCE = 1e-4  # between confidences of PyTorch and of an exported program
INSTALL = "pip install 'fusenorm-openood[export]'"
OLDEST_TORCH = (2, 9)
Run = Callable[[Tensor], Any]  # from images to confidences `[N]`


class Exported(NamedTuple):
    """What was exported.

    Attributes:
        path: the file.
        outputs: names of the program's outputs.
        difference: largest difference of its confidences from PyTorch's on a few drawn images,
            relative to those above 1; None if ONNX Runtime is not installed.
    """

    path: Path
    outputs: tuple[str, ...]
    difference: float | None


def export_detector(
    detector: "FuseNorm",
    path: Path,
    dtype: Dtype,
    acceptance: float,
    shape: Sequence[int] | None,
) -> Exported:
    """Write a detector and its network as one program; see `FuseNorm.export`."""
    statistics, calibration = detector._check_fitted(), detector.calibration_scores_
    if calibration is not None:
        check_enough(len(calibration), acceptance)
    rows = detector.rows()[: len(detector.experts)]
    if any(isinstance(expert, Score) and expert.needs_gradient for expert in rows):
        raise ConfigError(
            f"output='odin' with noise={detector.settings.noise:g} needs a gradient, which an "
            "exported program cannot compute: fit with noise=0, or with output='energy', 'msp' or "
            "'mls'"
        )
    inputs = Inputs.of(detector.preprocessing, dtype, shape)
    images = inputs.examples()
    twin = copy(detector)
    twin.net, twin.companions = float32_copy(detector.net), ()
    expected = twin.score(inputs.normalised(images))
    judge = Judge(twin.scoring(), rows, statistics.fusion, inputs, calibration)
    preprocessing = detector.preprocessing
    metadata = {
        "version": __version__,
        "class_names": detector.class_names,
        "experts": detector.experts,
        "strong": detector.strong,
        "preprocessing": preprocessing and preprocessing.to_json(),
        "calibration_images": 0 if calibration is None else len(calibration),
    }
    return _export(judge, path, images, expected, acceptance, metadata)


def _export(
    judge: Judge,
    path: Path,
    images: Tensor,
    expected: Tensor,
    acceptance: float,
    metadata: Mapping[str, Any],
) -> Exported:
    """Trace a judge with a few images, run the program on them, and write it if it agrees."""
    if path.suffix not in _FORMATS:
        raise ConfigError(
            f"{path} must end in {' or '.join(_FORMATS)}, which says what the program is for"
        )
    serialise, needed = _FORMATS[path.suffix]
    if not is_new_enough():
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise ExportError(
            f"exporting needs torch {oldest}, this is {torch.__version__}: pip install -U torch"
        )
    for package in needed:
        if find_spec(package) is None:
            raise ExportError(f"exporting {path} needs {package}, which is missing: {INSTALL}")
    texts = {name: json.dumps(value) for name, value in metadata.items()}
    default = None
    if judge.calibration is not None:
        default = torch.tensor(acceptance, dtype=torch.float64, device="cpu")
    with on_cpu():  # where torch loads programs
        data, run = serialise(judge, traced(judge, images[:2], default), default, texts)
        conf = None if run is None else np.concatenate([run(images[:1]), run(images[1:])])
    difference = None
    if conf is not None:
        scale = expected.abs().clamp(min=1).numpy()
        difference = float((np.abs(conf - expected.numpy()) / scale).max())
        if not difference <= TOLERANCE:
            raise ExportError(
                f"the exported program's confidences differ from PyTorch's by {difference:.2g}, "
                f"more than {TOLERANCE:g}, so {path} was not written: report this with the "
                "network's name"
            )
    try:
        write_whole(path, lambda file: file.write_bytes(data))
    except OSError as error:
        raise ExportError(
            f"{path} cannot be written ({error.strerror}): choose another folder"
        ) from None
    return Exported(path, judge.outputs, difference)


def is_new_enough() -> bool:
    """Whether this torch is one that exports are tested with, or a newer one."""
    return tuple(map(int, torch.__version__.split(".")[:2])) >= OLDEST_TORCH


def traced(judge: Judge, images: Tensor, acceptance: Tensor | None) -> ExportedProgram:
    """The judge as a program for batches of any size.

    Raises:
        ExportError: `torch.export` cannot trace the network.
    """
    given = (images,) if acceptance is None else (images, acceptance)
    shapes = ({0: Dim("batch")}, None)[: len(given)]
    try:
        with torch.no_grad(), redirect_stderr(StringIO()):  # where torch prints what it has traced
            return torch.export.export(judge, given, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        raise ExportError(
            f"torch.export cannot trace {type(judge.net).__name__} ({_reason(error)}): its forward "
            "must not depend on the values in its tensors or on the number of images"
        ) from error


def _pt2(
    judge: Judge, program: ExportedProgram, acceptance: Tensor | None, metadata: dict[str, str]
) -> tuple[bytes, Run]:
    buffer = BytesIO()
    torch.export.save(program, buffer, extra_files=metadata)
    data = buffer.getvalue()
    loaded = torch.export.load(BytesIO(data)).module()

    def run(images: Tensor) -> Any:
        given = (images,) if acceptance is None else (images, acceptance)
        return loaded(*given)[1].detach().numpy()

    return data, run


def _onnx(
    judge: Judge, program: ExportedProgram, acceptance: Tensor | None, metadata: dict[str, str]
) -> tuple[bytes, Run | None]:
    import onnx

    inputs = ["image"] if acceptance is None else ["image", "acceptance"]
    try:
        # The optimiser takes constants below 1e-8, such as eps, for 0; runtimes have their own.
        converted = torch.onnx.export(
            program,
            dynamo=True,
            optimize=False,
            input_names=inputs,
            output_names=list(judge.outputs),
            verbose=False,
        )
        model = converted.model_proto  # type: ignore[union-attr]
        if acceptance is not None:  # an initializer is what an input is if it is not given
            default = onnx.numpy_helper.from_array(acceptance.numpy(), "acceptance")
            model.graph.initializer.append(default)
        _name_batch(model.graph)
        onnx.helper.set_model_props(model, metadata)
        data = model.SerializeToString()
    except Exception as error:
        raise ExportError(
            f"{type(judge.net).__name__} cannot be written as one ONNX file, which holds at most "
            f"2 GB ({_reason(error)}): export it to a file that ends in .pt2"
        ) from error
    if find_spec("onnxruntime") is None:
        return data, None
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # not that an input with a default is no constant
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return data, lambda images: session.run(["confidence"], {"image": images.numpy()})[0]


def _name_batch(graph: Any) -> None:
    """Name the dimension of the batch, which torch has numbered."""
    numbered = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:  # a size that is known has none
                dim.dim_param = dim.dim_param.replace(numbered, "batch")


def _reason(error: Exception) -> str:
    """The first sentence of an error, or of its cause, which torch wraps in a report."""
    cause = error.__cause__ or error
    sentence = re.split(r"[.!]\s|\n", str(cause).strip(), maxsplit=1)[0]
    return f"{type(cause).__name__}: {sentence}"


# What writes a format, and the packages that it needs.
_FORMATS = {".onnx": (_onnx, ("onnx", "onnxscript")), ".pt2": (_pt2, ())}
