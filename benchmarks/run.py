"""Measure the speed of FuseNorm on this machine, as ratios within one run.

    python benchmarks/run.py [--quick] [--only SECTION ...] [--json FILE]

Networks have random weights and images are noise, so that no data is needed. X_vs_Y is the time of
X divided by that of Y, the median over rounds that run both. Leave the machine otherwise idle.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from measure import Isolated, Prepared, copy_bandwidth, median, once, peak_mebibytes, ratio, seconds
from peers import make_peers
from PIL import Image
from published import atf_loop, forward, odin_react
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fusenorm_openood import FuseNormPostprocessor, atf, kernels
from fusenorm_openood.data.benchmarks import Benchmark, ImageSet, image_loader, load_benchmark
from fusenorm_openood.evaluation.comparison import compare
from fusenorm_openood.forward.batches import batches
from fusenorm_openood.forward.passes import parts
from fusenorm_openood.network import ResNet18_32x32, ResNet18_224x224, ResNet50
from fusenorm_openood.network.understanding import understand
from fusenorm_openood.storage.configs import config_root, read_config

CLASSES = 10
# Batch size, and for each shape of feature map: channels, height, number of blocks.
SHAPES: dict[str, tuple[int, list[tuple[int, int, int]]]] = {
    "resnet18-32x32": (64, [(64, 32, 2), (128, 16, 2), (256, 8, 2), (512, 4, 2)]),
    "resnet18-224x224": (16, [(64, 56, 2), (128, 28, 2), (256, 14, 2), (512, 7, 2)]),
    "resnet50-224x224": (16, [(256, 56, 3), (512, 28, 4), (1024, 14, 6), (2048, 7, 3)]),
}
NETWORKS: dict[str, tuple[Callable[[int], nn.Module], int]] = {
    "resnet18-32x32": (ResNet18_32x32, 32),
    "resnet18-224x224": (ResNet18_224x224, 224),
    "resnet50-224x224": (ResNet50, 224),
}
SECTIONS = ["atf", "postprocess", "peers", "compare", "growth", "startup"]
QUICK_PEERS = ("forward", "MSP", "Mahalanobis, all layers", "FuseNorm")
# FuseNorm's methods, with KNN among the strong experts, and the published fusion by output expert.
METHODS = ["fusenorm", "fusenorm_deviation", "fusenorm_knn"]
OUTPUTS = [f"{output}{react}" for react in ("", "_react") for output in ("energy", "odin")]
# pytorch-ood's detectors that need no more than one forward pass.
ONE_PASS = ("MSP", "Energy", "GEN", "ReAct", "SCALE", "KNN", "NCI", "fDBD", "ViM", "Mahalanobis")
NEIGHBOURS = 10_000  # stored for KNN


class Report:
    """The measurements: printed as they come, and kept for the JSON file."""

    def __init__(self) -> None:
        self.ratios: dict[str, float] = {}
        self.rows: list[dict[str, Any]] = []

    def ratio(self, name: str, value: float) -> None:
        self.ratios[name] = round(value, 4)

    def row(self, section: str, **cells: Any) -> None:
        self.rows.append({"section": section, **cells})
        print("  ".join(f"{key} {_text(value)}" for key, value in cells.items()), flush=True)


def benchmark_atf(report: Report, device: torch.device, rounds: int, quick: bool) -> None:
    """ATF of each shape with a loop over samples, with torch on the batch, and with the kernel."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    chosen = kernels.backend(device)
    bandwidth = copy_bandwidth(device)
    print(
        f"\nATF: kernel {chosen.name} ({chosen.reason}), "
        f"copy {bandwidth / 1e9:.1f} GB/s, {threads} threads"
    )
    for network, (batch, shapes) in list(SHAPES.items())[: 1 if quick else None]:
        totals: dict[str, list[float]] = {}
        for channels, size, blocks in shapes:
            x = torch.randn(batch, channels, size, size, device=device).relu_()
            tasks = {"loop": lambda x=x: atf_loop(x), "eager": lambda x=x: _eager(x)}
            if chosen.name != "torch":
                tasks["kernel"] = lambda x=x: atf(x)
                if device.type == "cpu" and threads > 1:
                    tasks["one_thread_loop"] = lambda x=x: _on_one_thread(lambda: atf_loop(x))
                    tasks["one_thread"] = lambda x=x: _on_one_thread(lambda: atf(x))
            # As in a network, where the map has just been written and the threads are awake.
            taken = seconds(tasks, rounds, device, settled=True)
            for name, values in taken.items():
                total = totals.setdefault(name, [0.0] * rounds)
                totals[name] = [t + blocks * v for t, v in zip(total, values, strict=True)]
            speed = x.numel() * x.element_size() / median(taken.get("kernel", taken["eager"]))
            against = _ratios(taken)
            for name, value in against.items():
                report.ratio(f"atf/{network}/{channels}x{size}x{size}/{name}", value)
            report.row(
                "atf", network=network, shape=f"{batch}x{channels}x{size}x{size}",
                **{f"{n}_ms": 1e3 * median(v) for n, v in taken.items()},
                **against, of_copy_bandwidth=speed / bandwidth,
            )  # fmt: skip
        for name, value in _ratios(totals).items():
            report.ratio(f"atf/{network}/{name}", value)
        report.row("atf", network=network, shape="all blocks", **_ratios(totals))


def _ratios(taken: dict[str, list[float]]) -> dict[str, float]:
    pairs = {
        "eager_vs_loop": ("eager", "loop"),
        "kernel_vs_loop": ("kernel", "loop"),
        "kernel_vs_loop_one_thread": ("one_thread", "one_thread_loop"),
        "one_thread_vs_all": ("one_thread", "kernel"),
    }
    return {n: ratio(taken, a, b) for n, (a, b) in pairs.items() if a in taken and b in taken}


def _eager(x: torch.Tensor) -> torch.Tensor:
    forced = os.environ.get(kernels.VARIABLE)
    os.environ[kernels.VARIABLE] = "torch"
    try:
        return atf(x)
    finally:
        del os.environ[kernels.VARIABLE]
        if forced:
            os.environ[kernels.VARIABLE] = forced


def _on_one_thread(task: Callable[[], Any]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        task()
    finally:
        torch.set_num_threads(threads)


def benchmark_postprocess(
    report: Report, device: torch.device, rounds: int, quick: bool, networks: list[str]
) -> None:
    """Complete postprocessing relative to the plain forward pass of the same batch."""
    print("\npostprocess relative to the plain forward pass of the same batch")
    cases = [("resnet18-32x32", 64), ("resnet18-32x32", 200), ("resnet50-224x224", 16)]
    for network, batch in cases[:1] if quick else cases:
        if network not in networks:
            continue
        for amp in (False,) if quick else (False, True):
            if amp and (slower := _bfloat16_over_float32(device)) > 3:
                print(f"bfloat16 takes {slower:.0f} times as long as float32 here: skipped")
                break
            names = ["fusenorm", "odin_react"] if quick else [*METHODS, *OUTPUTS]
            _benchmark_case(report, (network, batch, device, amp), names, rounds, quick)


def _bfloat16_over_float32(device: torch.device) -> float:
    """Time of a forward pass in bfloat16, which some processors only emulate, over float32."""
    net, images = _setting("resnet18-32x32", 1, device)

    def half() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            forward(net, images)()

    taken = seconds({"float32": forward(net, images), "bfloat16": half}, 3, device)
    return ratio(taken, "bfloat16", "float32")


def _benchmark_case(
    report: Report,
    case_of: tuple[str, int, torch.device, bool],
    names: list[str],
    rounds: int,
    quick: bool,
) -> None:
    network, batch, device, amp = case_of
    case = f"{network}-b{batch}" + "-bf16" * amp
    tasks = ["forward", "forward_in_parts", *names, "published"]
    makers = {name: partial(make_task, name, *case_of) for name in tasks}
    with Isolated(makers, device) as isolated:
        taken = isolated.seconds(rounds)
        memory = {n: None if quick else isolated.peak_mebibytes(n) for n in tasks}
    for name in tasks:
        over = ratio(taken, name, "forward")
        report.row(
            "postprocess", case=case, output=name, ms=1e3 * median(taken[name]),
            vs_forward=over, peak_mebibytes=memory[name],
        )  # fmt: skip
        if name != "forward":
            report.ratio(f"postprocess/{case}/{name}_vs_forward", over)
            in_parts = ratio(taken, name, "forward_in_parts")
            report.ratio(f"postprocess/{case}/{name}_vs_forward_in_parts", in_parts)
            if (most := memory[name]) and (plain := memory["forward"]):
                more = most / plain
                report.ratio(f"postprocess/{case}/{name}_memory_vs_forward", more)
    value = ratio(taken, "odin_react", "published")
    report.ratio(f"postprocess/{case}/odin_react_vs_published", value)
    print(f"odin_react relative to the published implementation: {value:.2f}", flush=True)


def make_task(name: str, network: str, batch: int, device: torch.device, amp: bool) -> Prepared:
    """The named task on a batch: a forward pass, or postprocessing by a method."""
    net, images = _setting(network, batch, device)
    blocks = understand(net, images).blocks
    precision = partial(torch.autocast, device.type, torch.bfloat16, enabled=amp)
    postprocessor = None
    if name not in ("forward", "forward_in_parts", "published"):
        postprocessor = _postprocessor(name)
        generator = torch.Generator().manual_seed(2)
        id_images = torch.randn(32, *images.shape[1:], generator=generator)
        with precision():
            postprocessor.setup(net, {"val": DataLoader(TensorDataset(id_images), 16)}, None)
        _store_neighbours(postprocessor)

    def task() -> None:
        with precision():
            if postprocessor is not None:
                postprocessor.postprocess(net, images)
            elif name == "published":
                odin_react(net, images, blocks, threshold=1.0)
            else:
                for part in [images] if name == "forward" else parts(images):
                    forward(net, part)()

    return Prepared(task)


def benchmark_peers(report: Report, device: torch.device, rounds: int, quick: bool) -> None:
    """The same network and images scored by FuseNorm and by pytorch-ood's detectors."""
    network, batch, fitted_on = "resnet18-32x32", 16 if quick else 64, 64 if quick else 500
    print(f"\npeers: {network}, batches of {batch}, fitted on {fitted_on} images")
    peers = make_peers(_setting(network, 1, device)[0], CLASSES)
    if all(name.startswith("FuseNorm") for name in peers):
        print("pytorch-ood is not installed (pip install pytorch-ood): only FuseNorm is measured")
    layers = {"forward": "last"} | {name: make().layers for name, make in peers.items()}
    if quick:
        layers = {name: layers[name] for name in QUICK_PEERS if name in layers}
    makers = {n: partial(make_peer_task, n, network, batch, fitted_on, device) for n in layers}
    with Isolated(makers, device) as isolated:
        taken = isolated.seconds(rounds)
        memory = {n: None if quick else isolated.peak_mebibytes(n) for n in makers}
        fits = isolated.prepared_s
    for name in makers:
        report.row(
            "peers", method=name, layers=layers[name], fit_s=fits[name],
            ms_per_image=1e3 * median(taken[name]) / batch,
            vs_forward=ratio(taken, name, "forward"), peak_mebibytes=memory[name],
        )  # fmt: skip
        if name.startswith("FuseNorm") or name == "forward":
            continue
        key = name.lower().replace(", ", "-").replace(" ", "-")
        report.ratio(f"peers/{network}-b{batch}/fusenorm_vs_{key}", ratio(taken, "FuseNorm", name))


def make_peer_task(
    name: str, network: str, batch: int, fitted_on: int, device: torch.device
) -> Prepared:
    """The named task on a batch: scoring with a fitted detector, or the plain forward pass."""
    net, images = _setting(network, batch, device)
    if name == "forward":
        return Prepared(forward(net, images))
    labels = torch.arange(fitted_on) % CLASSES
    fitting = TensorDataset(_images(network, fitted_on).to(device), labels.to(device))
    peer = make_peers(net, CLASSES)[name]()
    fit = peer.fit
    fit_s = once(lambda: fit(DataLoader(fitting, batch)), device) if fit else 0.0
    return Prepared(lambda: peer.score(images), fit_s)


def benchmark_compare(report: Report, device: torch.device, rounds: int, quick: bool) -> None:
    """`compare` over a benchmark, one plain pass over its images, and pytorch-ood's detectors."""
    images = 50 if quick else 200
    net, _ = _setting("resnet18-32x32", 1, device)
    made = make_peers(net, CLASSES)
    peers = {name: made[name] for name in ONE_PASS if name in made}
    print(f"\ncompare: resnet18-32x32, {images} images of each of eight data sets")
    with TemporaryDirectory() as folder:
        benchmark = _of_noise(Path(folder), images)
        fitting, *tested = map(_Pairs, benchmark.tested())
        methods: list[Any] = []

        def plain() -> None:
            for loader in (fitting, *tested):
                for batch, _ in loader:
                    forward(net, batch.to(device))()

        def ours() -> None:
            found = compare(net, benchmark, progress=False, gradients=False)
            methods[:] = found.auroc.index

        def each() -> None:
            for make in peers.values():
                peer = make()
                if peer.fit:
                    peer.fit(fitting)
                for loader in tested:
                    for batch, _ in loader:
                        peer.score(batch.to(device))

        taken = seconds({"plain": plain, "compare": ours, "each": each}, rounds, device)
    for name, count in {"plain": 0, "compare": len(methods), "each": len(peers)}.items():
        over = ratio(taken, name, "plain")
        report.row("compare", of=name, methods=count, seconds=median(taken[name]), vs_plain=over)
        report.ratio(f"compare/{name}_vs_plain", over)
    report.ratio("compare/each_vs_compare", ratio(taken, "each", "compare"))


class _Pairs:
    """Images and labels of an image set in batches, read anew each time."""

    def __init__(self, image_set: ImageSet) -> None:
        self.loader = image_loader(image_set)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return ((images, torch.as_tensor(labels)) for images, labels in batches(self.loader))


def _of_noise(folder: Path, images: int) -> Benchmark:
    """The CIFAR-10 benchmark, with images of noise in place of each list's."""
    benchmark, generator = load_benchmark("cifar10", folder), np.random.default_rng(0)
    for image_set in benchmark.tested():
        image_set.imagelist.parent.mkdir(parents=True, exist_ok=True)
        lines = [f"{image_set.imagelist.stem}{i}.png {i % CLASSES}" for i in range(images)]
        image_set.imagelist.write_text("\n".join(lines))
        image_set.data_dir.mkdir(parents=True, exist_ok=True)
        for line in lines:
            pixels = generator.integers(0, 256, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(image_set.data_dir / line.split()[0])
    return benchmark


def benchmark_growth(report: Report, device: torch.device, rounds: int, quick: bool) -> None:
    """Growth of time with the number of images and with their resolution; 1 = linear in pixels."""
    print("\ngrowth")
    net, _ = _setting("resnet18-32x32", 1, device)
    base = 16 if quick else 64
    detector = _postprocessor("fusenorm")
    detector.setup(net, {"val": DataLoader(TensorDataset(torch.randn(32, 3, 32, 32)), 16)}, None)

    def infer(count: int, size: int) -> Callable[[], Any]:
        loader = DataLoader(TensorDataset(torch.randn(count, 3, size, size)), base)
        return lambda: detector.inference(net, loader, progress=False)

    cases = {
        "images": [(base * n, 32, n) for n in ((1, 4) if quick else (1, 4, 16))],
        "pixels": [(base // 2, 32 * n, n * n) for n in ((1, 2) if quick else (1, 2, 4))],
    }
    for name, sizes in cases.items():
        tasks = {str(factor): infer(count, size) for count, size, factor in sizes}
        taken = seconds(tasks, rounds, device)
        memory = [None if quick else peak_mebibytes(task, device) for task in tasks.values()]
        factors = [factor for *_, factor in sizes]
        times = [median(taken[str(factor)]) for factor in factors]
        exponent = np.polyfit(np.log(factors), np.log(times), 1)[0]
        report.ratio(f"growth/{name}/exponent", exponent)
        report.row("growth", of=name, factors=factors, seconds=times, peak_mebibytes=memory,
                   exponent=exponent)  # fmt: skip
        if name == "images" and memory[0] and memory[-1]:
            report.ratio(f"growth/{name}/memory_last_vs_first", memory[-1] / memory[0])


def benchmark_startup(report: Report, rounds: int, quick: bool) -> None:
    """Start-up times, each in its own process."""
    print("\nstart-up")
    python = [sys.executable, "-c"]
    commands = {
        "torch": [*python, "import torch"],
        "package": [*python, "import torch, fusenorm_openood"],
        "detector": [*python, "import torch; from fusenorm_openood import FuseNorm"],
        "help": [sys.executable, "-m", "fusenorm_openood.cli", "--help"],
    }
    tasks = {
        name: lambda c=command: subprocess.run(c, check=True, stdout=subprocess.DEVNULL)
        for name, command in commands.items()
    }
    taken = seconds(tasks, rounds, torch.device("cpu"), warm=not quick)
    for name in tasks:
        over = ratio(taken, name, "torch")
        report.row("startup", of=name, seconds=median(taken[name]), vs_import_torch=over)
        report.ratio(f"startup/{name}_vs_import_torch", over)


def _setting(network: str, batch: int, device: torch.device) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    net = NETWORKS[network][0](CLASSES).eval().requires_grad_(True).to(device)
    return net, _images(network, batch).to(device)


def _images(network: str, count: int) -> torch.Tensor:
    size = NETWORKS[network][1]
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def _postprocessor(name: str) -> FuseNormPostprocessor:
    """A method, with KNN for `fusenorm_knn`, or the published fusion with an output expert."""
    output, _, react = name.partition("_")
    method = name if name in ("fusenorm", "fusenorm_deviation") else "fusenorm_published"
    changes: dict[str, Any] = {"output": output, "react_percentile": 90.0 if react else None}
    if output == "fusenorm":
        changes = {"strong": ["output", "knn", "fdbd"]} if react == "knn" else {}
        method = "fusenorm" if react == "knn" else method
    config = read_config(config_root() / "postprocessors" / f"{method}.yml")
    config["postprocessor"]["postprocessor_args"].update(changes)
    return FuseNormPostprocessor(config)


def _store_neighbours(postprocessor: FuseNormPostprocessor) -> None:
    """Store as many features for KNN as from a large data set, without passing that many images."""
    assert postprocessor.statistics is not None  # after setup
    for expert, state in postprocessor.statistics.fitted.states.items():
        if expert.name == "knn":
            size = state["features"].shape[1]
            features = torch.randn(NEIGHBOURS, size, generator=torch.Generator().manual_seed(3))
            state["features"] = torch.nn.functional.normalize(features)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_text, value)) + "]"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _machine(device: torch.device) -> dict[str, Any]:
    names = {"cuda": lambda: torch.cuda.get_device_name(device)}
    versions = {}
    for package in ("fusenorm-openood", "torch", "numba", "triton", "pytorch-ood", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "device": names.get(device.type, _processor)(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
        "kernel": kernels.backend(device)._asdict(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    found = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (found or [platform.processor()])[0] + f", {os.cpu_count()} cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS)
    parser.add_argument(
        "--networks",
        nargs="+",
        choices=NETWORKS,
        default=[*NETWORKS],
        help="networks of the section postprocess",
    )
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--rounds", type=int, help="rounds per measurement (default: 9, with --quick 1)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="about a minute, with less precise results"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rounds = args.rounds or (1 if args.quick else 9)
    report, machine = Report(), _machine(args.device)
    print(json.dumps(machine))
    sections: dict[str, Callable[[], None]] = {
        "atf": lambda: benchmark_atf(report, args.device, rounds, args.quick),
        "postprocess": lambda: benchmark_postprocess(
            report, args.device, rounds, args.quick, args.networks
        ),
        "peers": lambda: benchmark_peers(report, args.device, rounds, args.quick),
        "compare": lambda: benchmark_compare(report, args.device, min(rounds, 3), args.quick),
        "growth": lambda: benchmark_growth(report, args.device, min(rounds, 3), args.quick),
        "startup": lambda: benchmark_startup(report, rounds, args.quick),
    }
    for name in args.only or sections:
        sections[name]()
        if args.json:  # after each section, so that no measurement is lost
            found = {"machine": machine, "ratios": report.ratios, "rows": report.rows}
            args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
