"""`fusenorm doctor`: what is installed, what is missing, which feature needs it, and the fix."""

import json
import os
import platform
import re
import subprocess
import sys
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fusenorm_openood.cli import options
from fusenorm_openood.openood import INSTALL

OPENOOD = {  # module -> what it is for
    "openood.evaluation_api": "--engine openood",
    "openood.pipelines": "OpenOOD's YAML pipelines",
    "openood.trainers": "OpenOOD's trainers",
}
EXTRAS = ("parquet", "remote", "fast", "ray", "report", "export")
OPENOOD_COMMIT = "3c35632"  # the commit that this package is tested with
TIMEOUT = 300  # seconds that a trial may take

Finding = tuple[str, str, str, str]  # ok, missing or broken; name, detail, fix


def add_doctor(parser: ArgumentParser) -> None:
    options.add(parser, "--data-root")
    root = "folder to search for training runs (default: results)"
    options.add(parser, "--root", required=False, default="results", help=root)


def run_doctor(args: Namespace) -> int:
    """Print what works, what does not and how to fix it; 0 = the native engine works, else 1."""
    works = False
    for state, name, detail, fix in _findings(args.data_root, args.root):
        print(f"{state:<8} {name}: {detail}", *([f"         fix: {fix}"] if fix else []), sep="\n")
        sys.stdout.flush()
        works |= (state, name) == ("ok", "native engine")
    print(f"the native engine {'works' if works else 'does not work'}")
    return int(not works)


def _findings(data_root: str, results: str) -> Iterator[Finding]:
    yield "ok", "python", f"{platform.python_version()}, {sys.executable}", ""
    for requirement in metadata.requires("fusenorm-openood") or ():
        package, *rest = re.findall(r"[\w.-]+", requirement)
        needed = "extra" not in rest
        try:
            if needed or rest[-1] in EXTRAS:
                yield "ok", package, metadata.version(package), ""
        except metadata.PackageNotFoundError:
            if needed:
                fix = f"python -m pip install {package}"
                yield "missing", package, "needed by the native engine", fix
    yield from run_trial("native engine")
    yield from run_trial("data", data_root, results)
    fix = "rm -rf .venv && PYTHON=python3.12 " * (sys.version_info >= (3, 13)) + INSTALL
    spec = find_spec("openood")
    if spec is None:
        yield "missing", "OpenOOD", f"needed for {', '.join(OPENOOD.values())}", fix
        return
    commit = openood_commit(next(iter(spec.submodule_search_locations or ()), ""))
    tested = "" if commit.startswith(OPENOOD_COMMIT) else f" (tested with {OPENOOD_COMMIT})"
    yield "ok", "OpenOOD", f"commit {commit[:7] or 'unknown'}{tested}", ""
    for module, use in OPENOOD.items():
        for state, name, detail, _ in run_trial(module):
            if state == "ok":
                yield state, name, use, ""
            else:
                yield state, name, f"cannot be imported ({detail}), needed for {use}", fix


def run_trial(name: str, *args: str) -> list[Finding]:
    """Try something in a process of its own, which may die; a name with a dot is a module."""
    code = f"from fusenorm_openood.cli import doctor; doctor.answer(*{(name, *args)!r})"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    how: Any = {"capture_output": True, "text": True, "errors": "replace", "env": environment}
    try:
        done = subprocess.run([sys.executable, "-c", code], timeout=TIMEOUT, **how)
        # Packages print what they like before and after it.
        (*_, found) = (line for line in done.stdout.splitlines() if line.startswith('[["'))
        return [(*finding,) for finding in json.loads(found)]
    except subprocess.TimeoutExpired:
        return [("broken", name, f"no answer within {TIMEOUT} seconds", "")]
    except ValueError:
        return [("broken", name, f"its process died with status {done.returncode}", "")]


def answer(name: str, *args: str) -> None:
    """Print what a trial finds, or why it fails, as JSON."""
    trials: dict[str, Callable[..., list[Finding]]] = {"native engine": _engine, "data": _data}
    try:
        found = [("ok", name, "", "")]
        if name in trials:
            found = trials[name](*args)
        else:
            import_module(name)
    except (Exception, SystemExit) as error:
        why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        found = [("broken", name, why, _reinstall(error))]
    print(f"\n{json.dumps(found)}")


def _reinstall(error: BaseException) -> str:
    """The command that reinstalls the package in whose code a trial failed."""
    packages = metadata.packages_distributions()
    frames = traceback.walk_tb(error.__traceback__)
    modules = [frame.f_globals.get("__name__", "") for frame, _ in frames]
    for module in reversed(modules):
        package = packages.get(module.partition(".")[0], [""])[0]
        if package not in ("", "fusenorm-openood"):
            return f"python -m pip install --force-reinstall {package}=={metadata.version(package)}"
    return "python -m pip check"


def _engine() -> list[Finding]:
    """The devices and their kernels, after a small network was fitted and scored."""
    import torch

    import fusenorm_openood.cli.eval  # noqa: F401  evaluation, tables, lists
    from fusenorm_openood import FuseNorm, atf
    from fusenorm_openood.kernels import backend
    from fusenorm_openood.network import ResNet18_32x32

    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    mps, kernels = torch.backends.mps.is_available(), []
    for device in ("cpu", *["cuda"] * torch.cuda.is_available()):
        atf(torch.ones(1, 2, 4, 4, device=device))
        kernels.append(f"{device}: {backend(device).name}, {backend(device).reason}")
    torch.manual_seed(0)
    net, images = ResNet18_32x32(4, width=4), torch.randn(32, 3, 16, 16)
    net(images)  # updates the running statistics, so that features differ between images
    if not FuseNorm(net.eval()).fit([images]).score(images).isfinite().all():
        raise ArithmeticError("confidences of a small network are not finite")
    devices = f"cpu ({os.cpu_count()} cores), CUDA: {', '.join(cuda) or 'none'}, MPS: {mps}"
    return [
        ("ok", "devices", devices, ""),
        ("ok", "kernels", "; ".join(kernels), ""),
        ("ok", "native engine", "a small network was fitted and scored on the CPU", ""),
    ]


def _data(data_root: str, results: str) -> list[Finding]:
    """Image lists and training runs of each benchmark; there are too many images to check."""
    from fusenorm_openood.data.benchmarks import DOWNLOAD, benchmark_names, list_paths
    from fusenorm_openood.evaluation.runs import find_roots

    found, incomplete, roots = [], list[str](), find_roots(results)
    for name in benchmark_names():
        lists = list_paths(name, data_root)
        missing = [path.name for path in lists if not path.is_file()]
        named = f", missing {missing[0]}" if 0 < len(missing) < len(lists) else ""
        runs = [
            f"{root} ({', '.join(names)})"
            for root, names in roots.items()
            if root.resolve().name.startswith(f"{name}_")
        ]
        detail = (
            f"{len(lists) - len(missing)} of {len(lists)} image lists under {data_root}{named}; "
            f"training runs: {', '.join(runs) or f'none under {results}'}"
        )
        state, fix = ("ok" if runs and not missing else "missing"), ""
        if state == "missing" and name == "digits":
            fix = f"fusenorm digits --data-root {data_root}"
        elif state == "missing":
            incomplete.append(name)
        found.append((state, name, detail, fix))
    if incomplete:
        found.append(("missing", "data", f"needed for --id-data {', '.join(incomplete)}", DOWNLOAD))
    return found


def openood_commit(package: str) -> str:
    """The commit of OpenOOD: its checkout's, or the one that pip installed; empty if unknown."""
    checkout = Path(package).parent
    with suppress(OSError, metadata.PackageNotFoundError, ValueError, KeyError):
        if (checkout / ".git").exists():
            command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
            return subprocess.run(command, capture_output=True, text=True).stdout.strip()
        origin = metadata.distribution("openood").read_text("direct_url.json") or "{}"
        return str(json.loads(origin)["vcs_info"]["commit_id"])
    return ""
