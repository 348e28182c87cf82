"""`fusenorm train`: train a network, or resume an interrupted run."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from fusenorm_openood.cli import options
from fusenorm_openood.cli.inputs import check_files, check_readable
from fusenorm_openood.data.benchmarks import load_benchmark
from fusenorm_openood.data.digits import write_digits
from fusenorm_openood.kernels.devices import find_device
from fusenorm_openood.storage.files import check_writable
from fusenorm_openood.training.epoch import processes, wait
from fusenorm_openood.training.loop import train
from fusenorm_openood.training.recipes import find_recipe


def add_arguments(parser: ArgumentParser) -> None:
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


def run(args: Namespace) -> int:
    """Train, in as many processes as `torchrun` started, and print the checkpoint."""
    given = {name: getattr(args, name) for name in ("epochs", "lr", "tau", "batch_size")}
    changes = {name: value for name, value in given.items() if value is not None}
    changes |= {"method": args.method, "seed": args.seed, "amp": bool(args.amp), "init": args.init}
    recipe = find_recipe(args.id_data, **changes)
    benchmark = load_benchmark(args.id_data, args.data_root)
    folder, device = Path(args.results_dir) / recipe.run_name, find_device(args.device)
    check_writable(folder, "--results-dir")
    with processes(device) as process:
        if args.id_data == "digits":
            if process.leads:
                write_digits(args.data_root)
            wait(process)
        image_sets = [benchmark.id["train"], benchmark.id["val"]]
        check_files(benchmark, image_sets)
        if process.leads:
            check_readable(image_sets)
            print(f"training {folder} on {device}", flush=True)
        how = device, args.num_workers, args.channels_last, not args.no_progress, process
        best = train(recipe, benchmark, folder, *how)
        if process.leads:
            print(f"network: {best}")
    return 0
