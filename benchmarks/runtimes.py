"""Exported programs in their runtimes against the detector: verdicts, confidences, time, size.

Each run adds the rows of some runtimes to a JSON file, so that they may be installed apart:

    python -m benchmarks.runtimes --detector D --calibration-dir DIR --json rows.json --only onnx
    python -m benchmarks.runtimes --json rows.json  # prints the table
"""

import argparse
import json
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fusenorm_openood.cli.inputs import load_detector
from fusenorm_openood.data.paths import image_paths
from fusenorm_openood.detectors.fusenorm import FuseNorm
from fusenorm_openood.errors import FuseNormError
from fusenorm_openood.export.judge import Inputs, error_of, float32_copy, thresholds
from fusenorm_openood.export.program import run_all
from fusenorm_openood.export.targets import TARGETS, Outputs, Run
from fusenorm_openood.method.conformal import max_rank
from tests.export.files import write_files

FILES, STEPS = 1000, (19, 39, 49, 199, 999)  # files of 14 kinds; numbers of calibration images
PACKAGES = {
    "onnx": "onnxruntime", "onnxslim": "onnxslim", "onnxscript": "onnxscript", "pt2": "torch",
    "aoti": "torch", "openvino": "openvino", "executorch": "executorch",
    "litert": "ai-edge-litert", "onnxruntime-node": "", "onnxruntime-web": "",
}  # fmt: skip
NODE = """
const ort = require(process.argv[2]), fs = require('fs')
async function main() {
  const session = await ort.InferenceSession.create(process.argv[3], {intraOpNumThreads: 1})
  const all = new Uint8Array(fs.readFileSync(process.argv[4]))
  const [c, h, w] = JSON.parse(process.argv[5]), size = c * h * w, batch = +process.argv[6]
  const found = {}
  let seconds = 0
  for (let first = 0; first < all.length; first += size * batch) {
    const part = all.slice(first, first + size * batch)
    const image = new ort.Tensor('uint8', part, [part.length / size, c, h, w])
    const started = process.cpuUsage()
    const outputs = await session.run({image})
    const used = process.cpuUsage(started)
    seconds += (used.user + used.system) / 1e6
    for (const name in outputs) (found[name] ??= []).push(...outputs[name].data)
  }
  const text = (k, v) => Number.isNaN(v) ? 'NaN' : v
  console.log(JSON.stringify({found, seconds}, text))
}
main()
"""


class Plain(nn.Module):
    """The classifier alone, from pixels to logits."""

    def __init__(self, net: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.net, self.inputs, self.outputs = net, inputs, ("logits",)

    def forward(self, image: Tensor) -> tuple[Tensor]:
        return (self.net(self.inputs.normalised(image)),)


def pixels(detector: FuseNorm, paths: list[Any]) -> np.ndarray:
    """Image files as programs take them, `[N, 3, H, W]`."""
    how = detector.known_preprocessing()
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (how.mean, how.std))
    unit = torch.stack([how.read(path) for path in paths]) * std + mean
    return (255 * unit).round().to(torch.uint8).numpy()


def written(detector: FuseNorm, name: str, folder: Path) -> tuple[Path, Path, float]:
    """The programs of the detector and of its classifier, and the seconds that it took."""
    target = TARGETS["onnx" if "onnx" in name else name]
    paths = folder / f"it{target.suffix}", folder / f"plain{target.suffix}"
    started = time.perf_counter()
    detector.export(paths[0], target="onnx" if "onnx" in name else name)
    seconds = time.perf_counter() - started
    inputs = Inputs.of(detector.preprocessing, "uint8", None)
    plain: Any = Plain(float32_copy(detector.net), inputs)
    target.write(plain, inputs.examples()[:2], "{}", paths[1])
    for path in paths if name in ("onnxslim", "onnxscript") else ():
        import onnx

        model = onnx.load(path)
        if name == "onnxslim":
            import onnxslim

            onnx.save(onnxslim.slim(model), path)
        else:
            from onnxscript import optimizer

            onnx.save(optimizer.optimize(model), path)
    return *paths, seconds


def in_node(package: str, path: Path, images: np.ndarray, batch: int) -> tuple[Outputs, float]:
    """Outputs and CPU seconds per image of a program in Node.js."""
    script, data = path.with_name("run.cjs"), path.with_name("images.bin")
    script.write_text(NODE)
    data.write_bytes(images.tobytes())
    shape = json.dumps(images.shape[1:])
    command = ["node", str(script), package, str(path), str(data), shape, str(batch)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    answer = json.loads(done.stdout)
    found = {name: np.array(values, np.float32) for name, values in answer["found"].items()}
    return found, answer["seconds"] / len(images)


def relative_time(runs: tuple[Run, Run], images: np.ndarray, rounds: int) -> float:
    """CPU time of the first program over that of the second, paired: median over rounds."""
    ratios = []
    for _ in range(rounds + 1):
        seconds = []
        for run in runs:
            started = time.process_time()
            run(images)
            seconds.append(time.process_time() - started)
        ratios.append(seconds[0] / seconds[1])
    return median(ratios[1:])


def size(path: Path) -> int:
    return sum(part.stat().st_size for part in path.parent.glob(f"{path.stem}.*"))


def measured(
    detector: FuseNorm,
    name: str,
    images: np.ndarray,
    conf: np.ndarray,
    folder: Path,
    rounds: int,
    modules: str,
) -> dict[str, Any]:
    """One row of the table."""
    target = TARGETS["onnx" if "onnx" in name else name]
    path, plain, seconds = written(detector, name, folder)
    row: dict[str, Any] = {"export_s": seconds, "size": size(path) / size(plain)}
    if PACKAGES[name]:
        row["version"] = version(PACKAGES[name])
        started = time.perf_counter()
        run = target.load(path)
        row["load_s"] = time.perf_counter() - started
        found, pair = run_all(target, run, images), (run, target.load(plain))
        for batch in ((1, 16) if target.batch is None else (1,)) if rounds else ():
            row[f"time_{batch}"] = relative_time(pair, images[:batch], rounds)
    else:
        package = f"{modules}/{name}"
        row["version"] = json.loads(Path(package, "package.json").read_text())["version"]
        found, taken = in_node(package, path, images, 16)
        row["time_16"] = taken / in_node(package, plain, images, 16)[1]
    return row | compared(detector, conf, found)


def compared(
    detector: FuseNorm, conf: np.ndarray, found: Outputs, steps: tuple[int, ...] = STEPS
) -> dict[str, Any]:
    """Verdicts at acceptances that are steps of p, of several numbers of calibration scores."""
    scores, near = detector.calibration_scores_, found["confidence"]
    statistics = detector.check_fitted()
    error = error_of(statistics.fusion, statistics.id_scores)
    assert scores is not None
    difference = abs(near - conf) / np.maximum(1, abs(conf))
    is_id, rank = conf >= scores.min(), 1 + (thresholds(scores, error) <= near[:, None]).sum(1)
    row: dict[str, Any] = {
        "bound": error,
        "error": float(difference.max()),
        "error_id": float(difference[is_id].max()),
        "wrong_ranks": int((found["rank"] != rank).sum()),
        "verdicts": 0, "differ": 0, "outside": 0, "p": 0.0,
    }  # fmt: skip
    for n in steps:
        some = scores[:: len(scores) // n][:n]
        exact = 1 + (some <= conf[:, None]).sum(1)
        rank = 1 + (thresholds(some, error) <= near[:, None]).sum(1)
        gaps = some - conf[:, None]
        close = ((gaps > 0) & (gaps <= 2 * error * np.maximum(1, abs(some)))).any(1)
        for k in sorted({1, 2, n // 20, n // 10, n // 2} - {0}):
            assert max_rank(1 - k / (n + 1), n) == k
            differs = (exact <= k) != (rank <= k)
            row["verdicts"] += len(conf)
            row["differ"] += int(differs.sum())
            row["outside"] += int((differs & ~close).sum())
        row["p"] = max(row["p"], float(abs(exact - rank).max()) / (n + 1))
    return row


Columns = dict[str, Callable[[dict[str, Any]], str]]
COLUMNS: Columns = {
    "version": lambda r: r["version"],
    "verdicts that differ": lambda r: f"{r['differ']} of {r['verdicts']:,}",
    "outside the bound": lambda r: str(r["outside"] + r["wrong_ranks"]),
    "bound": lambda r: f"{r['bound']:.0e}",
    "conf., ID": lambda r: f"{r['error_id']:.0e}",
    "conf., all": lambda r: f"{r['error']:.0e}",
    "p": lambda r: f"{r['p']:.3f}",
    "time, 1": lambda r: f"{r['time_1']:.2f}" if "time_1" in r else "",
    "time, 16": lambda r: f"{r['time_16']:.2f}" if "time_16" in r else "",
    "size": lambda r: f"{r['size']:.2f}",
    "load": lambda r: f"{r['load_s']:.1f} s" if "load_s" in r else "",
}


def table(rows: dict[str, dict[str, Any]], columns: Columns = COLUMNS, of: str = "runtime") -> str:
    lines = [f"| {of} | {' | '.join(columns)} |", "| --- " * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        cells = [row["fails"]] if "fails" in row else [cell(row) for cell in columns.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--detector", metavar="FILE", help="what `fusenorm fit` has saved")
    add("--weights", metavar="FILE", help="checkpoint of its network")
    add(
        "--calibration-dir", metavar="DIR", help="its calibration images, which tie with themselves"
    )
    add("--only", nargs="+", choices=PACKAGES, default=["onnx"])
    add("--node-modules", default="node_modules", metavar="DIR", help="of onnxruntime-node, -web")
    add("--rounds", type=int, default=9, help="of times; 0 = none")
    add("--json", type=Path, required=True, metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(args.json.read_text()) if args.json.is_file() else {}
    if args.detector:
        detector = load_detector(args.detector, weights=args.weights, device="cpu")
        with TemporaryDirectory() as folder:
            files = list(map(str, write_files(Path(folder) / "files", FILES)))
            ties = list(islice(map(str, image_paths([args.calibration_dir])), 200))
            images = pixels(detector, [*files, *ties])
            inputs = Inputs.of(detector.preprocessing, "uint8", None)
            conf = detector.score(inputs.normalised(torch.from_numpy(images))).numpy()
            for name in args.only:
                place = Path(folder) / name
                place.mkdir()
                try:
                    row = measured(
                        detector, name, images, conf, place, args.rounds, args.node_modules
                    )
                except FuseNormError as error:
                    row = {"fails": str(error)}
                rows[name] = row
                args.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
