"""The scripts: which Python environment they choose, and which arguments they pass on."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fusenorm_openood.training.recipes import find_recipe
from tests.conftest import without_environment

PROJECT = Path(__file__).parent.parent


def environment(folder: Path, works: bool = True) -> Path:
    """An environment whose Python can import everything, or nothing."""
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\nexit {0 if works else 1}\n")
    python.chmod(0o755)
    return folder


@pytest.fixture
def project(tmp_path):
    """A project with its scripts and an environment that is already installed."""
    project = tmp_path / "project"
    shutil.copytree(PROJECT / "scripts", project / "scripts")
    shutil.copy(PROJECT / "pyproject.toml", project)
    venv = environment(project / ".venv")
    shutil.copy(PROJECT / "pyproject.toml", venv / ".installed-fast")
    return project


def chosen(project: Path, **variables: Path) -> list[str]:
    """The lines that a script prints when it chooses its environment, which comes last."""
    paths = {name: str(path) for name, path in variables.items()}
    shown = 'command -v python && echo "$PYTHON_ENVIRONMENT"'
    code = f". {project}/scripts/env.sh && environment && {shown}"
    done = subprocess.run(
        ["bash", "-c", code], capture_output=True, text=True, check=False, cwd=project,
        env=without_environment(PYTHONPATH=str(PROJECT), **paths),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *said, python, folder = done.stdout.splitlines()
    assert Path(python) == Path(folder) / "bin" / "python"
    return [*said, folder]


@pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "CONDA_PREFIX"])
def test_the_active_environment_is_used_where_it_can_import_the_package(
    project, tmp_path, variable
):
    active = environment(tmp_path / "active")
    assert chosen(project, **{variable: active}) == [
        f"using the active environment {active}",
        str(active),
    ]


def test_an_active_environment_without_the_package_is_not_used(project, tmp_path):
    active = environment(tmp_path / "active", works=False)
    said, folder = chosen(project, VIRTUAL_ENV=active)
    assert said.startswith(f"the active environment {active} lacks what this script needs")
    assert "python -m pip install -e" in said
    assert folder == str(project / ".venv")


def test_without_an_active_environment_the_projects_own_is_used(project):
    assert chosen(project) == [str(project / ".venv")]
    assert chosen(project, VIRTUAL_ENV=project / ".venv") == [str(project / ".venv")]


def test_a_variable_names_another_folder(project, tmp_path):
    active, named = environment(tmp_path / "active"), environment(tmp_path / "named")
    shutil.copy(PROJECT / "pyproject.toml", named / ".installed-fast")
    assert chosen(project, VIRTUAL_ENV=active, FUSENORM_VENV=named) == [str(named)]


def test_the_tests_need_more_of_an_environment_than_the_package(project, tmp_path):
    """An environment with the package alone cannot run pytest."""
    active = tmp_path / "active"
    python = environment(active) / "bin" / "python"
    only = "fusenorm_openood torch"
    python.write_text(f'#!/bin/sh\nshift 2\n[ "$*" = "{only}" ]\n')
    code = f". {project}/scripts/env.sh; suffices {active} fast && ! suffices {active} test"
    subprocess.run(["bash", "-c", code], check=True)


@pytest.mark.parametrize(("processes", "way"), [("1", "fusenorm"), ("4", "torchrun")])
def test_work_is_started_in_the_requested_number_of_processes(project, tmp_path, processes, way):
    for name in ("fusenorm", "torchrun", "python"):
        stub = tmp_path / "bin" / name
        stub.parent.mkdir(exist_ok=True)
        stub.write_text(f'#!/bin/sh\necho {name} "$@"\n')
        stub.chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    code = f"set -e; . {project}/scripts/env.sh; run_training --seed 1; run_evaluation --fsood"
    done = subprocess.run(
        ["bash", "-c", code], capture_output=True, text=True, check=True,
        env={**os.environ, "PATH": path, "NPROC": processes},
    )  # fmt: skip
    torchrun = "torchrun --standalone --nproc-per-node 4"
    script = "ROOT/scripts/eval_ood.py --store ROOT/results/store --fsood"
    expected = {
        "fusenorm": ["fusenorm train --seed 1", f"python {script}"],
        "torchrun": [
            f"{torchrun} -m fusenorm_openood.cli train --seed 1", f"{torchrun} {script}"
        ],
    }  # fmt: skip
    assert done.stdout.replace(str(project), "ROOT").splitlines() == expected[way]


@pytest.mark.parametrize("work", ["run_training", "run_evaluation"])
def test_an_invalid_number_of_processes_is_rejected(project, work):
    code = f"set -e; . {project}/scripts/env.sh; NPROC=two {work}"
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "NPROC must be the number of processes, got two" in done.stderr


def called(project: Path, script: str) -> list[str]:
    """The command that a script runs, without running it."""
    for name in ("python", "fusenorm"):
        stub = project / ".venv" / "bin" / name
        stub.write_text(f'#!/bin/sh\nprintf "%s\\n" {name} "$@"\n')
        stub.chmod(0o755)
    hidden = ("VIRTUAL_ENV", "CONDA_PREFIX", "FUSENORM_VENV", "NPROC", "INIT")
    done = subprocess.run(
        ["bash", str(project / "scripts" / "ood" / script), "--seed", "1"],
        capture_output=True, text=True, check=True,
        env={k: v for k, v in os.environ.items() if k not in hidden},
    )  # fmt: skip
    return done.stdout.replace(str(project), "ROOT").splitlines()


ID_DATA = ["cifar10", "cifar100", "imagenet200", "imagenet", "digits"]


def test_a_script_reports_missing_files(project, tmp_path):
    """The script itself, in an environment that already exists."""
    python = project / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    script = project / "scripts/ood/fusenorm/cifar10_test_fusenorm.sh"
    done = subprocess.run(
        ["bash", str(script), "--data-root", "elsewhere"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
        env=without_environment(PYTHONPATH=str(PROJECT)),
    )  # fmt: skip
    assert done.returncode == 1
    assert "elsewhere/benchmark_imglist/cifar10/val_cifar10.txt" in done.stderr
    assert "checkpoint" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("method", ["fusenorm", "t2fnorm"])
@pytest.mark.parametrize("id_data", ID_DATA)
def test_scripts_evaluate_the_run_that_training_writes(project, id_data, method):
    training = "base" if method == "fusenorm" else method
    run = find_recipe(id_data, method=training, init="weights.pth").run_name.removesuffix("/s0")
    if (id_data, method) == ("imagenet", "fusenorm"):
        run = "imagenet_resnet50_tvsv1_base_default"  # OpenOOD's name for torchvision's weights
    compare = ["--compare"] if (id_data, method) == ("digits", "fusenorm") else []
    assert called(project, f"{method}/{id_data}_test_{method}.sh") == [
        "python", "ROOT/scripts/eval_ood.py",
        "--store", "ROOT/results/store",
        "--id-data", id_data,
        "--root", f"ROOT/results/{run}",
        "--data-root", "ROOT/data",
        "--postprocessor", method,
        *compare, "--save-score", "--save-csv", "--seed", "1",
    ]  # fmt: skip


@pytest.mark.parametrize("id_data", ID_DATA)
def test_scripts_train_with_t2fnorm(project, id_data):
    weights = "ROOT/results/pretrained_weights/resnet50_imagenet1k_v1.pth"
    init = ["--init", weights] if id_data == "imagenet" else []
    assert called(project, f"t2fnorm/{id_data}_train_t2fnorm.sh") == [
        "fusenorm", "train",
        "--id-data", id_data,
        "--method", "t2fnorm",
        "--data-root", "ROOT/data",
        "--results-dir", "ROOT/results",
        *init, "--seed", "1",
    ]  # fmt: skip
