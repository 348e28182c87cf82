"""OpenOOD's pipelines, on any device.

python -m fusenorm_openood.main --config A.yml B.yml ... [--device cpu] [--key value ...]
"""

import argparse
import ast
import inspect
import io
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fusenorm_openood.data.images import truncated_images
from fusenorm_openood.detectors.configuration import read_fusenorm
from fusenorm_openood.errors import CheckpointError, ConfigError, FuseNormError, unknown
from fusenorm_openood.kernels.devices import find_device, on_device
from fusenorm_openood.method.settings import METHODS
from fusenorm_openood.network.states import aligned, load_state
from fusenorm_openood.openood import adapter, postprocessor
from fusenorm_openood.openood.bridge import file_errors, openood_module, replaced
from fusenorm_openood.storage.configs import config_root, lookup

# Sections whose name OpenOOD looks up, by `get_SECTION` of its module `SECTIONs.utils`.
NAMED = ("pipeline", "network", "trainer", "evaluator", "postprocessor", "recorder")
TESTING = ("dataset", "ood_dataset", "network", "preprocessor", "postprocessor")
SECTIONS = {
    "train": ("dataset", "network", "preprocessor", "trainer", "optimizer"),
    "test_ood": TESTING,
    "test_ood_aps": TESTING,
}
NO_STATE_DICT = ("bit", "vit")  # OpenOOD networks with checkpoints of another kind
HEADS = ("fc.weight", "fc.bias", "backbone.fc.weight", "backbone.fc.bias")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of OpenOOD's pipelines; 0 = success, 1 = error, reported on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m fusenorm_openood.main",
        description="OpenOOD's main.py with FuseNorm. --KEY VALUE overrides the configuration.",
        allow_abbrev=False,
    )
    files = "YAML files, OpenOOD's or this package's; later files override earlier ones"
    parser.add_argument("--config", nargs="+", required=True, help=files)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    args, changes = parser.parse_known_args(argv)
    try:
        device = find_device(args.device)
        postprocessor.register()
        config = read_configs([find_config(path) for path in args.config], changes)
        check_config(config, device)
        machines = config.num_gpus, config.num_machines, config.machine_rank
        openood_module("utils").launch(run_pipeline, *machines, "auto", (config, str(device)))
    except FuseNormError as error:
        print(f"fusenorm_openood.main: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fusenorm_openood.main: interrupted", file=sys.stderr)
        return 130
    return 0


def find_config(path: str) -> str:
    """The given configuration file, or this package's file of that name under `configs/`."""
    found = Path(path)
    if found.parts[:1] == ("configs",) and not found.is_file():
        found = config_root().joinpath(*found.parts[1:])
    if not found.is_file():
        siblings = ", ".join(sorted(p.name for p in found.parent.glob("*.yml")))
        raise ConfigError(
            f"configuration {path} is not a file: {found.parent} contains {siblings or 'no YAML'}"
        )
    return str(found)


def read_configs(paths: Sequence[str], changes: Sequence[str] = ()) -> Any:
    """OpenOOD's configuration from these files, with `--key value` overrides, read by OpenOOD.

    ConfigError if OpenOOD cannot read them.
    """
    before = sys.argv
    try:
        sys.argv = [before[0], "--config", *paths, *changes]
        return openood_module("utils").setup_config()
    except KeyError as error:
        raise ConfigError(
            f"key {error} is missing from the configurations {', '.join(paths)}: "
            "add the file that defines it, or correct the key"
        ) from error
    except Exception as error:  # OpenOOD validates nothing, and evaluates what follows a colon
        raise ConfigError(
            f"the configuration cannot be read ({type(error).__name__}: {error}): "
            "use YAML files that contain mappings, and overrides of the form --key value"
        ) from error
    finally:
        sys.argv = before


def check_config(config: Any, device: torch.device) -> None:
    """Raise ConfigError, before any work, for values on which OpenOOD would fail."""
    pipeline = lookup(config, "pipeline", "name")
    for section in SECTIONS.get(pipeline, ()):
        lookup(config, section)
    for section in NAMED:
        # Test pipelines use no recorder; their section has no name.
        if section in config and (section != "recorder" or "name" in config.recorder):
            name = lookup(config, section, "name")
            names = names_in(getattr(openood_module(f"{section}s.utils"), f"get_{section}"))
            if name not in names:
                raise ConfigError(unknown(section, name, names))
    if "postprocessor" in config:
        if config.postprocessor.name in METHODS:
            read_fusenorm(config)
        fsood = "evaluator" in config and config.evaluator.name == "fsood"
        if fsood and config.postprocessor.get("APS_mode"):
            raise ConfigError(
                "OpenOOD's evaluator 'fsood' cannot search parameters: use the pipeline "
                "test_ood.yml with --evaluator.ood_scheme fsood, or set APS_mode to False"
            )
    gpus, machines, _ = (lookup(config, k) for k in ("num_gpus", "num_machines", "machine_rank"))
    if gpus * machines > 1 and (device.type != "cuda" or not pipeline.startswith("train")):
        raise ConfigError(
            f"num_gpus and num_machines must be 1, since pipeline {pipeline!r} on {device} runs "
            f"in one process, got num_gpus={gpus}, num_machines={machines}"
        )
    prompts = config.save_output and config.merge_option == "default"
    if prompts and Path(config.output_dir).is_dir() and not (sys.stdin and sys.stdin.isatty()):
        raise ConfigError(
            f"output directory {config.output_dir} already exists: write into it with "
            "--merge_option merge, or choose another with --mark NAME"
        )


def names_in(function: Callable[..., Any]) -> list[str]:
    """The names that one of OpenOOD's `get_...` functions takes, read from its source code.

    Such a function looks the name up in a dict literal, or compares it with one name after another.
    """
    nodes: list[Any] = []
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        if isinstance(node, ast.Dict):
            nodes += node.keys
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Eq):
            nodes += node.comparators
    names = {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return sorted(names | set(METHODS) if hasattr(function, "has_fusenorm") else names)


def run_pipeline(config: Any, device: str) -> None:
    """Run the pipeline of a configuration, and restore the state of the process afterwards."""
    postprocessor.register()  # again, since this may be a spawned process
    pipelines = openood_module("pipelines")
    get_postprocessor = openood_module("postprocessors.utils").get_postprocessor
    get_network = openood_module("networks.utils").get_network

    def get_adapted(config: Any) -> Any:
        return adapter.adapted(get_postprocessor(config), config.postprocessor.name)

    def get_loaded(network: Any) -> Any:
        return load_checkpoint(get_network, network, not config.pipeline.name.startswith("test"))

    with (
        on_device(device),
        truncated_images(read=True),
        file_errors(),
        process_restored(),
        replaced(get_postprocessor, get_adapted),
        replaced(get_network, get_loaded),
    ):
        pipelines.get_pipeline(config).run()


def load_checkpoint(
    get_network: Callable[[Any], Any], config: Any, head_may_differ: bool = False
) -> Any:
    """OpenOOD's network for a configuration, with its complete checkpoint loaded on any device.

    OpenOOD itself silently skips tensors that do not fit, even all of them, and can load a
    checkpoint that was saved on CUDA only on CUDA. If the `head_may_differ`, it keeps its initial
    weights where the number of classes differs. CheckpointError if the file cannot be read, or
    lacks parts of the network.
    """
    path = config.checkpoint
    if not config.pretrained or not isinstance(path, str) or config.name in NO_STATE_DICT:
        return get_network(config)
    built = get_network(type(config)(config, pretrained=False))
    if not isinstance(built, nn.Module):  # a dict of networks, which OpenOOD loads differently
        return get_network(config)
    net = built.module if isinstance(built, nn.parallel.DistributedDataParallel) else built
    own = net.state_dict()
    state = aligned(load_state(path), own)
    wrong = [k for k, v in own.items() if k not in state or state[k].shape != v.shape]
    lacking = [k for k in wrong if not (head_may_differ and k in HEADS)]
    if lacking:
        trained = "a T2FNorm network" if "tau" in state else "a plain network"
        raise CheckpointError(
            f"checkpoint {path} of {trained} does not fit the network {config.name!r}: "
            f"{len(lacking)} of its {len(own)} tensors are missing or have another shape, for "
            f"example {lacking[0]}; use the configs/networks/*.yml that it was trained with"
        )
    net.load_state_dict({k: state[k] for k in own if k not in wrong}, strict=False)
    return built


@contextmanager
def process_restored() -> Iterator[None]:
    """Restore what OpenOOD changes in the process: standard output and cuDNN's benchmark mode."""
    stdout, benchmark = sys.stdout, torch.backends.cudnn.benchmark
    try:
        yield
    finally:
        logger, sys.stdout = sys.stdout, stdout
        torch.backends.cudnn.benchmark = benchmark
        if logger is not stdout and hasattr(logger, "console"):
            logger.console = io.StringIO()  # closing the logger closes its console too
            logger.close()
