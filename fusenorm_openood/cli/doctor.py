"""`fusenorm doctor`: what is installed, what is missing, which feature needs it, and the fix.

Packages that may be broken are not imported in this process: trials run in a subprocess.
"""

import json
import os
import platform
import shlex
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path

from fusenorm_openood.cli import options
from fusenorm_openood.evaluation.runs import find_roots

# Distribution -> module; the native engine needs all of them.
REQUIRED = {
    "torch": "torch",
    "torchvision": "torchvision",
    "numpy": "numpy",
    "scikit-learn": "sklearn",
    "scipy": "scipy",
    "pandas": "pandas",
    "pillow": "PIL.Image",
    "pyyaml": "yaml",
    "tqdm": "tqdm",
    "safetensors": "safetensors",
}
# Module -> what it is for.
OPENOOD = {
    "openood.evaluation_api": "--engine openood",
    "openood.pipelines": "OpenOOD's YAML pipelines",
    "openood.trainers": "OpenOOD's trainers",
}
OPENOOD_COMMIT = "3c35632"  # the commit that this package is tested with
OPTIONAL = (
    "pyarrow",
    "fsspec",
    "numba",
    "triton",
    "ray",
    "jinja2",
    "matplotlib",
    "onnx",
    "onnxscript",
    "onnxruntime",
)
INSTALL_OPENOOD = "bash scripts/install_openood.sh"
TIMEOUT = 300  # seconds that a subprocess may take for its trials

_MARK = "fusenorm-trial:"  # marks the result of a trial in the output
_CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from fusenorm_openood.cli.doctor import answer; answer(sys.argv[2:])"
)


@dataclass(frozen=True)
class Finding:
    """One line of the report; `breaks` = it keeps the native engine from working."""

    state: str  # ok, missing, broken
    name: str
    detail: str
    fix: str = ""
    breaks: bool = False

    def __str__(self) -> str:
        fix = f"\n         fix: {self.fix}" if self.fix else ""
        return f"{self.state:<8} {self.name}: {self.detail}{fix}"


@dataclass(frozen=True)
class Trial:
    """Outcome of an import or another trial; `absent` = the package is not installed."""

    detail: str
    error: bool = False
    absent: bool = False


def add_arguments(parser: ArgumentParser) -> None:
    options.add_data_root(parser)
    parser.add_argument(
        "--root", default="results", help="folder to search for training runs (default: results)"
    )


def run(args: Namespace) -> int:
    """Print what works, what does not and how to fix it; 0 = the native engine works, else 1."""
    findings = []
    for finding in _findings(args.data_root, args.root):
        print(finding, flush=True)
        findings.append(finding)
    broken = [finding.name for finding in findings if finding.breaks]
    if broken:
        print(f"the native engine does not work: {', '.join(broken)}")
    else:
        print("the native engine works")
    return int(bool(broken))


def run_trials(names: Sequence[str]) -> dict[str, Trial]:
    """Run trials in a subprocess; a trial that kills its process does not affect the others.

    Args:
        names: modules to import, or `devices`, `kernels` or `engine`.
    """
    trials: dict[str, Trial] = {}
    while remaining := [name for name in names if name not in trials]:
        command = [sys.executable, "-W", "ignore", "-c", _CHILD, json.dumps(sys.path), *remaining]
        try:
            done = subprocess.run(
                command, capture_output=True, stdin=subprocess.DEVNULL, timeout=TIMEOUT, check=False
            )
            output, end = done.stdout, f"its process died with status {done.returncode}"
        except subprocess.TimeoutExpired as error:
            output, end = error.stdout or b"", f"no answer within {TIMEOUT} seconds"
        for line in output.decode(errors="replace").splitlines():
            if line.startswith(_MARK):
                name, *trial = json.loads(line.removeprefix(_MARK))
                trials[name] = Trial(*trial)
        silent = [name for name in remaining if name not in trials]
        if silent:
            trials[silent[0]] = Trial(end, error=True)
    return trials


def answer(names: Sequence[str]) -> None:
    """Run the trials and print one result per line; this is the body of the subprocess."""
    special = {"devices": _devices, "kernels": _kernels, "engine": _engine}
    for name in names:
        try:
            trial = Trial(special[name]() if name in special else import_module(name).__name__)
        except (Exception, SystemExit) as error:
            absent = isinstance(error, ModuleNotFoundError) and error.name == name.split(".")[0]
            reason = (str(error).splitlines() or [""])[0]
            trial = Trial(f"{type(error).__name__}: {reason}", True, absent)
        line = json.dumps([name, trial.detail, trial.error, trial.absent])
        print(f"\n{_MARK}{line}", flush=True)


def openood_commit() -> str | None:
    """The commit of the OpenOOD that would be imported, or None if unknown."""
    spec = find_spec("openood")
    places = list(spec.submodule_search_locations or []) if spec else []
    checkout = Path(places[0]).parent if places else None
    if checkout and (checkout / ".git").exists():
        command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout.strip() or None
    try:
        origin = json.loads(metadata.distribution("openood").read_text("direct_url.json") or "{}")
    except (metadata.PackageNotFoundError, ValueError):
        return None
    commit = origin.get("vcs_info", {}).get("commit_id")
    return str(commit) if commit else None


def _findings(data_root: str, results: str) -> Iterator[Finding]:
    yield Finding("ok", "python", f"{platform.python_version()}, {sys.executable}")
    trials = run_trials([*REQUIRED.values(), "devices", "kernels", "engine"])
    for package, module in REQUIRED.items():
        yield _package(package, trials[module])
    yield _simple("devices", trials["devices"])
    yield _simple("kernels", trials["kernels"])
    engine = trials["engine"]
    fix = "python -m pip install --upgrade torch torchvision" if engine.error else ""
    if any(trials[module].error for module in REQUIRED.values()):
        fix = ""  # the fix is that of the package reported above
    yield _simple("native engine", engine, fix, breaks=engine.error)
    yield from _openood()
    for package in OPTIONAL:
        if version := _version(package):
            yield Finding("ok", package, f"{version}, optional")
    if not trials["yaml"].error:
        yield from _files(data_root, results)


def _package(package: str, trial: Trial) -> Finding:
    version = _version(package)
    if not trial.error:
        return Finding("ok", package, version or "version unknown")
    if trial.absent:
        fix = f"python -m pip install {package}"
        return Finding("missing", package, "needed by the native engine", fix, breaks=True)
    release = f"{package}=={version}" if version else package
    fix = f"python -m pip install --force-reinstall {release}"
    found = f"{version} cannot be imported" if version else "it cannot be imported"
    return Finding("broken", package, f"{found} ({trial.detail})", fix, breaks=True)


def _simple(name: str, trial: Trial, fix: str = "", breaks: bool = False) -> Finding:
    return Finding("broken" if trial.error else "ok", name, trial.detail, fix, breaks)


def _openood() -> Iterator[Finding]:
    fix = INSTALL_OPENOOD
    if sys.version_info >= (3, 13):  # OpenOOD needs numpy 1
        fix = f"rm -rf .venv && PYTHON=python3.12 {INSTALL_OPENOOD}"
    if find_spec("openood") is None:
        yield Finding("missing", "OpenOOD", f"needed for {', '.join(OPENOOD.values())}", fix)
        return
    trials = run_trials(list(OPENOOD))
    commit = openood_commit()
    at = f"commit {commit[:7]}" if commit else "commit unknown"
    if commit is None or not commit.startswith(OPENOOD_COMMIT):
        at += f" (tested with {OPENOOD_COMMIT})"
    yield Finding("ok", "OpenOOD", at)
    for module, feature in OPENOOD.items():
        if trials[module].error:
            detail = f"cannot be imported ({trials[module].detail}), needed for {feature}"
            yield Finding("broken", module, detail, fix)
        else:
            yield Finding("ok", module, feature)


def _files(data_root: str, results: str) -> Iterator[Finding]:
    """Image lists and training runs of each benchmark; there are too many images to check."""
    from fusenorm_openood.data.benchmarks import DOWNLOAD, benchmark_names, list_paths

    roots = find_roots(results)
    incomplete = []
    for name in benchmark_names():
        lists = list_paths(name, data_root)
        missing = [path.name for path in lists if not path.is_file()]
        detail = f"{len(lists) - len(missing)} of {len(lists)} image lists under {data_root}"
        if 0 < len(missing) < len(lists):
            rest = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            detail += f", missing {', '.join(missing[:3])}{rest}"
        found = [
            f"{root} ({', '.join(runs)})"
            for root, runs in roots.items()
            if root.resolve().name.startswith(f"{name}_")
        ]
        detail += f"; training runs: {', '.join(found) or f'none under {results}'}"
        complete = bool(found) and not missing
        fix = ""
        if not complete and name == "digits":
            fix = shlex.join(["fusenorm", "digits", "--data-root", data_root])
        elif not complete:
            incomplete.append(name)
        yield Finding("ok" if complete else "missing", name, detail, fix)
    if incomplete:
        yield Finding("missing", "data", f"needed for --id-data {', '.join(incomplete)}", DOWNLOAD)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> str:
    import torch

    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    mps = torch.backends.mps.is_available()
    return f"cpu ({os.cpu_count()} cores), CUDA: {', '.join(cuda) or 'none'}, MPS: {mps}"


def _kernels() -> str:
    """The backend that computes feature norms on each device, after computing one."""
    import torch

    from fusenorm_openood import atf
    from fusenorm_openood.errors import ConfigError
    from fusenorm_openood.kernels import backend

    used = []
    for device in ("cpu", *["cuda"] * torch.cuda.is_available()):
        try:
            atf(torch.ones(1, 2, 4, 4, dtype=torch.float32, device=device))
            used.append(f"{device}: {backend(device).name}, {backend(device).reason}")
        except ConfigError as error:
            used.append(f"{device}: {error}")
    return "; ".join(used)


def _engine() -> str:
    """Fit and score a small network, using every package that the native engine needs."""
    import torch

    import fusenorm_openood.cli.eval  # noqa: F401  evaluation, tables, lists
    from fusenorm_openood import FuseNorm
    from fusenorm_openood.network import ResNet18_32x32

    torch.manual_seed(0)
    net, images = ResNet18_32x32(4, width=4), torch.randn(32, 3, 16, 16)
    net(images)  # updates the running statistics, so that features differ between images
    conf = FuseNorm(net.eval()).fit([images]).score(images)
    if not torch.isfinite(conf).all():
        raise ArithmeticError("confidences of a small network are not finite")
    return "a small network was fitted and scored on the CPU"
