"""`fusenorm train` and `fusenorm digits`: train a network, or resume an interrupted run."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from fusenorm_openood.cli import inputs, options
from fusenorm_openood.data import benchmarks, digits
from fusenorm_openood.errors import CheckpointError
from fusenorm_openood.evaluation.runs import find_checkpoints
from fusenorm_openood.kernels.devices import find_device
from fusenorm_openood.storage.files import alone_in, check_writable
from fusenorm_openood.training import loop, recipes


def add_train(parser: ArgumentParser) -> None:
    options.add(parser, "--id-data", "--data-root")
    add, recipe = parser.add_argument, "(default: the data set's published recipe)"
    add("--method", default="t2fnorm", help="t2fnorm, or base for plain cross-entropy")
    add("--epochs", type=options.positive, help=f"passes over the training images {recipe}")
    add("--lr", type=float, help=f"initial learning rate {recipe}")
    add("--tau", type=float, help=f"T2FNorm's temperature {recipe}")
    add("--batch-size", type=options.positive, help=f"images per step, over all processes {recipe}")
    options.add(parser, "--seed")
    add("--init", metavar="CKPT", help="start from this checkpoint, plain or T2FNorm's")
    add("--results-dir", default="results", help="parent folder of the run (default: results)")
    options.add(parser, "--amp", help="compute in bfloat16 where that is safe")
    options.add(parser, "--channels-last", *options.COMPUTING)


def run_train(args: Namespace) -> int:
    """Train, in as many processes as `torchrun` started, and print the checkpoint."""
    given = {name: getattr(args, name) for name in ("epochs", "lr", "tau", "batch_size")}
    changes = {name: value for name, value in given.items() if value is not None}
    changes |= {"method": args.method, "seed": args.seed, "amp": bool(args.amp), "init": args.init}
    recipe = recipes.find_recipe(args.id_data, **changes)
    benchmark = benchmarks.load_benchmark(args.id_data, args.data_root)
    folder, device = Path(args.results_dir) / recipe.run_name, find_device(args.device)
    check_writable(folder, "--results-dir")
    with loop.processes(device) as process:
        if args.id_data == "digits":
            if process.leads:
                digits.write_digits(args.data_root)
            loop.wait(process)
        image_sets = [benchmark.id["train"], benchmark.id["val"]]
        inputs.check_files(benchmark, image_sets)
        if process.leads:
            inputs.check_readable(image_sets)
            print(f"training {folder} on {device}", flush=True)
        how = device, args.num_workers, args.channels_last, not args.no_progress, process
        best = loop.train(recipe, benchmark, folder, *how)
        if process.leads:
            print(f"network: {best}")
    return 0


def add_digits(parser: ArgumentParser) -> None:
    root = "folder of training runs (default: one under results/)"
    options.add(parser, "--data-root")
    options.add(parser, "--root", required=False, help=root)
    options.add(parser, "--seed", "--no-progress")


def run_digits(args: Namespace) -> int:
    """Write the images and train the network where they are missing; print the checkpoint."""
    root = Path(args.root or Path("results", _root_of("base")))
    check_writable(root, "--root")
    best = loop.train_digits(args.data_root, root, args.seed, progress=not args.no_progress)
    print(f"network: {best}")
    return 0


def ensure_digits(data_root: str, root: str | None, progress: bool = False) -> None:
    """Create what the digits benchmark is missing: its images, and a network under `root`.

    A network is only trained under a root that has the name of a recipe of the digits.
    CheckpointError for a root of another name without a checkpoint.
    """
    with alone_in(Path(data_root)):
        if root is not None:
            try:
                find_checkpoints(root)
            except CheckpointError as error:
                methods, name = {_root_of(m): m for m in recipes.METHODS}, Path(root).resolve().name
                if name not in methods:
                    raise CheckpointError(
                        f"{error}; a network for the digits is trained for --root "
                        f"{' or '.join(f'results/{name}' for name in methods)}"
                    ) from None
                check_writable(Path(root), "--root")
                loop.train_digits(data_root, root, method=methods[name], progress=progress)
        digits.write_digits(data_root)


def _root_of(method: str) -> str:
    return recipes.find_recipe("digits", method=method).run_name.partition("/")[0]
