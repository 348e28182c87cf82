"""Quantised programs, calibrated again: how many ID images they accept, over random splits.

    python -m benchmarks.quantised --detector D --quantise-dir DIR --id-dir DIR --ood-dir DIR \
        --json rows.json --only onnx-static  # adds rows, since runtimes may be installed apart
    python -m benchmarks.quantised --json rows.json  # prints the table

A quantised program judges each ID image by itself. In each split, some calibrate it and others are
accepted or not. In the first, `recalibrate` writes a file: its ranks are compared with the counts.
"""

import argparse
import json
import shutil
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from scipy.stats import betabinom
from torch.export import ExportedProgram

from benchmarks.runtimes import Columns, pixels, table
from fusenorm_openood.cli.inputs import load_detector
from fusenorm_openood.data.paths import image_paths
from fusenorm_openood.detectors.fusenorm import FuseNorm
from fusenorm_openood.errors import FuseNormError
from fusenorm_openood.export.judge import thresholds
from fusenorm_openood.export.program import find_target, run_all
from fusenorm_openood.export.recalibrate import recalibrate
from fusenorm_openood.export.targets import Outputs
from fusenorm_openood.method.conformal import max_rank
from fusenorm_openood.method.metrics import ood_metrics

SPLITS, CALIBRATION, TEST, ACCEPTANCE = 1000, 199, 400, 0.95
Images = np.ndarray  # `[N, C, H, W]`


def onnx(program: Path, images: Images, output: Path, static: bool) -> None:
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.rest = iter(images[:, None])

        def get_next(self) -> dict[str, Any] | None:
            image = next(self.rest, None)
            return None if image is None else {"image": image}

    kinds = ["Conv", "MatMul", "Gemm"]
    if static:
        quantization.quantize_static(program, output, Reader(), op_types_to_quantize=kinds)
    else:
        quantization.quantize_dynamic(program, output, op_types_to_quantize=kinds)


def openvino(program: Path, images: Images, output: Path, everything: bool) -> None:
    import nncf
    import openvino

    model = openvino.Core().read_model(program)
    others = {op.get_type_name() for op in model.get_ops()} - {"Convolution"}
    ignored = None if everything else nncf.IgnoredScope(types=sorted(others))
    data = nncf.Dataset(list(images[:, None]))
    quantised = nncf.quantize(model, data, subset_size=len(images), ignored_scope=ignored)
    openvino.save_model(quantised, output, compress_to_fp16=False)


def executorch(program: Path, images: Images, output: Path) -> None:
    """Quantises a `.pt2` program, which is kept, and lowers it."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = XNNPACKQuantizer()
    quantizer.set_module_type(torch.nn.Conv2d, get_symmetric_quantization_config())
    prepared = prepare_pt2e(torch.export.load(program).module(), quantizer)
    given = torch.from_numpy(images)
    with torch.no_grad():
        prepared(given)
        quantised = convert_pt2e(prepared)
    kept = torch.export.export(quantised, (given[:1],), strict=False)
    torch.export.save(kept, output.with_suffix(".pt2"))
    lower(kept, output)


def lower(program: ExportedProgram, output: Path) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    output.write_bytes(lowered.to_executorch().buffer)


def rebuilt(program: Path, scores: np.ndarray, image: Images, output: Path) -> None:
    """A `.pte` program again, with calibration scores that it gave itself."""
    module = torch.export.load(program.with_suffix(".pt2")).module()
    module.thresholds = torch.from_numpy(thresholds(scores, 0).reshape(1, -1))
    lower(torch.export.export(module, (torch.from_numpy(image),), strict=False), output)


Quantise = Callable[[Path, Images, Path], None]
KINDS: dict[str, tuple[str, str, Quantise | None]] = {  # name, suffix, what quantises it
    "onnx": ("ONNX Runtime, float32", ".onnx", None),
    "onnx-static": ("ONNX Runtime, static", ".onnx", partial(onnx, static=True)),
    "onnx-dynamic": ("ONNX Runtime, dynamic", ".onnx", partial(onnx, static=False)),
    "openvino": ("OpenVINO, NNCF, convolutions", ".xml", partial(openvino, everything=False)),
    "openvino-all": ("OpenVINO, NNCF by default", ".xml", partial(openvino, everything=True)),
    "executorch": ("ExecuTorch, XNNPACK, convolutions", ".pte", executorch),
}


def measured(
    detector: FuseNorm, kind: str, given: Images, paths: list[Path], ood: list[Path], folder: Path
) -> dict[str, float]:
    """One row of the table."""
    _, suffix, quantise = KINDS[kind]
    plain = folder / f"plain{'.pt2' if suffix == '.pte' else suffix}"
    program = folder / f"quantised{suffix}"
    exported = detector.export(plain, acceptance=ACCEPTANCE)
    (shutil.copy(plain, program) if quantise is None else quantise(plain, given, program))
    target = find_target(program, None)._replace(batch=1)  # an image by itself

    def judged(path: Path, which: list[Path]) -> Outputs:
        return run_all(target, target.load(path), pixels(detector, which))

    known = judged(program, paths)
    conf = known["confidence"]
    rng = np.random.default_rng(0)
    k, shares = max_rank(ACCEPTANCE, CALIBRATION), []
    for split in range(SPLITS):
        some, rest = np.split(rng.permutation(len(paths))[: CALIBRATION + TEST], [CALIBRATION])
        rank = 1 + (conf[some] <= conf[rest, None]).sum(1)
        shares.append((rank > k).mean())
        if split == 0:
            again = folder / f"again{suffix}"
            if suffix == ".pte":
                rebuilt(program, conf[some], given[:1], again)
            else:
                recalibrate(program, [paths[i] for i in some], again)
            wrong = int((judged(again, [paths[i] for i in rest])["rank"] != rank).sum())
    low, high = np.array(betabinom(TEST, CALIBRATION + 1 - k, k).interval(0.95)) / TEST
    metrics = ood_metrics(conf, judged(program, ood)["confidence"])
    shares = np.array(shares)
    return {
        "before": float((known["rank"] > exported.max_rank).mean()),
        "accepted": float(shares.mean()),
        "outside": float(((shares < low) | (shares > high)).mean()),
        "wrong": wrong,
        "auroc": metrics.auroc,
    }


COLUMNS: Columns = {
    "accepted before": lambda r: f"{r['before']:.1%}",
    "calibrated again": lambda r: f"{r['accepted']:.1%}",
    "splits outside the 95 % limits": lambda r: f"{r['outside']:.1%}",
    "wrong ranks": lambda r: f"{r['wrong']} of {TEST}",
    "AUROC": lambda r: f"{100 * r['auroc']:.2f}",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--detector", metavar="FILE", help="what `fusenorm fit` has saved, calibrated")
    add("--weights", metavar="FILE", help="checkpoint of its network")
    add("--quantise-dir", nargs="+", metavar="DIR", help="ID images that set the ranges of INT8")
    add("--id-dir", nargs="+", metavar="DIR", help="other ID images")
    add("--ood-dir", nargs="+", metavar="DIR")
    add("--only", nargs="+", choices=KINDS, default=["onnx"])
    add("--json", type=Path, required=True, metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(args.json.read_text()) if args.json.is_file() else {}
    if args.detector:
        detector = load_detector(args.detector, weights=args.weights, device="cpu")
        given, paths, ood = (
            list(map(Path, map(str, islice(image_paths(place), most))))
            for place, most in ((args.quantise_dir, 300), (args.id_dir, 1500), (args.ood_dir, 500))
        )
        for kind in args.only:
            with TemporaryDirectory() as folder:
                try:
                    rows[kind] = measured(
                        detector, kind, pixels(detector, given), paths, ood, Path(folder)
                    )
                except FuseNormError as error:
                    rows[kind] = {"fails": str(error)}
            args.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(table({KINDS[kind][0]: row for kind, row in rows.items()}, COLUMNS, "program"))


if __name__ == "__main__":
    main()
