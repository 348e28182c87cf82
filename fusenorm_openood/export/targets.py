"""The formats of exported programs: each is written by its own tools, and run by its runtime."""

import os
import zipfile
from collections.abc import Callable
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.export import Dim, ExportedProgram

from fusenorm_openood.errors import ConfigError, ExportError, first_sentence
from fusenorm_openood.export.judge import OUTPUTS, Judge

Outputs = dict[str, NDArray[Any]]  # logits `[N, K]`, confidences and ranks `[N]`, by name
Run = Callable[[NDArray[Any]], Outputs]  # of images `[N, C, H, W]`
METADATA = "fusenorm.json"  # the name of the metadata, which is JSON


class Target(NamedTuple):
    """A format of programs."""

    suffix: str  # of its files
    write: Callable[[Judge, Tensor, str, Path], None]  # given images to trace with, and metadata
    load: Callable[[Path], Run]  # the program in a file
    runtime: str  # package that runs it, empty = none does on this machine
    tools: tuple[str, ...] = ()  # packages that write it
    extra: str = ""  # of this package, which installs all of them, empty = none is needed
    batch: int | None = None  # how many images a program takes at most; None = any number


def traced(judge: Judge, images: Tensor, batch: int | None = None) -> ExportedProgram:
    """The judge as a program for batches of any size, or of at most `batch` images.

    ExportError if `torch.export` cannot trace the network.
    """
    shapes = (None,) if batch == 1 else ({0: Dim("batch", min=1, max=batch)},)
    try:
        with torch.no_grad(), redirect_stderr(StringIO()):  # where torch prints what it has traced
            return torch.export.export(judge, (images,), dynamic_shapes=shapes, strict=False)
    except Exception as error:
        raise ExportError(
            f"torch.export cannot trace {type(judge.net).__name__} ({first_sentence(error)}): its "
            "forward must not depend on the values in its tensors or on the number of images"
        ) from error


def to_pt2(judge: Judge, images: Tensor, metadata: str, path: Path) -> None:
    torch.export.save(traced(judge, images), path, extra_files={METADATA: metadata})


def to_aoti(judge: Judge, images: Tensor, metadata: str, path: Path) -> None:
    from torch._inductor import aoti_compile_and_package

    config = {"aot_inductor.metadata": {METADATA: metadata}}
    program = traced(judge, images)
    aoti_compile_and_package(program, package_path=str(path), inductor_configs=config)


def to_onnx(judge: Judge, images: Tensor, metadata: str, path: Path) -> None:
    import onnx

    # Without the optimiser: it takes small constants for 0, and runtimes have their own.
    options: dict[str, Any] = {
        "optimize": False,
        "input_names": ["image"],
        "output_names": list(judge.outputs),
    }
    converted: Any = torch.onnx.export(traced(judge, images), dynamo=True, verbose=False, **options)
    model = converted.model_proto
    numbered = model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:  # a size that is known has none
                dim.dim_param = dim.dim_param.replace(numbered, "batch")
    onnx.helper.set_model_props(model, {METADATA: metadata})
    path.write_bytes(model.SerializeToString())


def to_openvino(judge: Judge, images: Tensor, metadata: str, path: Path) -> None:
    import openvino

    between = path.with_suffix(".onnx")
    to_onnx(judge, images, metadata, between)
    model = openvino.convert_model(between)
    model.set_rt_info(metadata, METADATA)
    openvino.save_model(model, path, compress_to_fp16=False)
    between.unlink()


def to_executorch(judge: Judge, images: Tensor, metadata: str, path: Path) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    lowered = to_edge_transform_and_lower(
        traced(judge, images, TARGETS["executorch"].batch),
        partitioner=[XnnpackPartitioner()],
        constant_methods={"metadata": metadata},
    )
    path.write_bytes(lowered.to_executorch().buffer)


def to_litert(judge: Judge, images: Tensor, metadata: str, path: Path) -> None:
    import litert_torch

    with mock.patch.dict(os.environ, LITERT_TORCH_FULL_TFL_DECOMPS="1"):  # else no topk
        litert_torch.convert(judge, (images[:1],)).export(str(path))
    with zipfile.ZipFile(path, "a") as archive:  # LiteRT's way to add files to a program
        archive.writestr(METADATA, metadata)


def to_coreml(judge: Judge, images: Tensor, metadata: str, path: Path) -> None:
    import coremltools

    if images.dtype != torch.float32:
        kind = str(images.dtype).removeprefix("torch.")
        raise ConfigError(f"Core ML has no arrays of {kind}: export with dtype float32")
    where = {  # which Core ML has for tensors only
        torch.ops.aten.where.ScalarOther: lambda c, a, b: torch.where(c, a, torch.full_like(a, b)),
        torch.ops.aten.where.ScalarSelf: lambda c, a, b: torch.where(c, torch.full_like(b, a), b),
    }
    program = traced(judge, images[:1], 1).run_decompositions(where)
    model = coremltools.convert(
        program,
        outputs=[coremltools.TensorType(name=name) for name in judge.outputs],
        minimum_deployment_target=coremltools.target.iOS17,
        compute_precision=coremltools.precision.FLOAT32,
    )
    model.user_defined_metadata[METADATA] = metadata
    model.save(str(path))


def load_pt2(path: Path) -> Run:
    return _of_torch(torch.export.load(path).module())


def load_aoti(path: Path) -> Run:
    from torch._inductor import aoti_load_package

    return _of_torch(aoti_load_package(str(path)))


def load_onnx(path: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda images: dict(zip(names, session.run(None, {"image": images}), strict=True))


def load_openvino(path: Path) -> Run:
    import openvino

    # Some processors would compute in half precision by default.
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(path, "CPU", options)
    return lambda images: {o.any_name: v.copy() for o, v in compiled(images).items()}


def load_executorch(path: Path) -> Run:
    from executorch.runtime import Runtime

    method: Any = Runtime.get().load_program(path).load_method("forward")
    return _of_torch(lambda images: [output.clone() for output in method.execute([images])])


def load_litert(path: Path) -> Run:
    from ai_edge_litert.interpreter import Interpreter

    runner = Interpreter(str(path)).get_signature_runner()
    (name,) = runner.get_input_details()

    def run(images: NDArray[Any]) -> Outputs:
        found = runner(**{name: images})
        return {output: found[f"output_{i}"] for i, output in enumerate(OUTPUTS[: len(found)])}

    return run


def load_coreml(path: Path) -> Run:
    raise ConfigError(f"{path} runs on Apple's devices only")


def _of_torch(program: Callable[..., Any]) -> Run:
    def run(images: NDArray[Any]) -> Outputs:
        with torch.no_grad():
            found = program(torch.from_numpy(images))
        return {n: o.detach().numpy() for n, o in zip(OUTPUTS, found, strict=False)}

    return run


ONNX = ("onnx", "onnxscript")
TARGETS = {
    "onnx": Target(".onnx", to_onnx, load_onnx, "onnxruntime", ONNX, "export"),
    "pt2": Target(".pt2", to_pt2, load_pt2, "torch"),
    "aoti": Target(".pt2", to_aoti, load_aoti, "torch"),
    "openvino": Target(
        ".xml", to_openvino, load_openvino, "openvino", ("openvino", *ONNX), "openvino"
    ),
    "executorch": Target(
        ".pte", to_executorch, load_executorch, "executorch", ("executorch",), "executorch", 8
    ),
    "litert": Target(
        ".tflite", to_litert, load_litert, "ai_edge_litert", ("litert_torch",), "litert", 1
    ),
    "coreml": Target(".mlpackage", to_coreml, load_coreml, "", ("coremltools",), "coreml", 1),
}
