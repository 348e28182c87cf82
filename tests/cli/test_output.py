"""A command finishes and saves its files whatever becomes of its standard output."""

import resource
import subprocess
import sys
from functools import partial

import pandas as pd
import pytest

from fusenorm_openood.cli.main import tolerant_output
from tests.conftest import shortened_digits, without_environment

ASCII = [
    {"PYTHONIOENCODING": "ascii"},
    {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
]


@pytest.fixture(scope="module")
def few(digits_images, tmp_path_factory):
    """The digits benchmark with 40 images in every list."""
    return shortened_digits(digits_images, tmp_path_factory.mktemp("few"), 40, 40)


@pytest.fixture(params=["eval", "compare"])
def command(request, digits, few, tmp_path):
    """A command and the CSV file that it saves."""
    root, csv = digits[1].parents[1], tmp_path / "ood" / "msp.csv"
    args = ["--id-data", "digits", "--data-root", str(few), "--num-workers", "0"]
    own = {
        "eval": ["--root", str(root), "--postprocessor", "msp", "--compare", "--save-csv",
                 "--output-dir", str(tmp_path)],
        "compare": ["--root", str(root), str(digits[1]), "--csv", str(csv)],
    }[request.param]  # fmt: skip
    return [sys.executable, "-m", "fusenorm_openood.cli", request.param, *args, *own], csv


@pytest.mark.parametrize("variables", ASCII)
def test_tables_are_printed_on_a_terminal_without_unicode(command, variables):
    args, csv = command
    env = without_environment(**variables)
    done = subprocess.run(args, env=env, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"mean ? std" in done.stdout
    assert len(pd.read_csv(csv)) > 5


@pytest.mark.parametrize("err", [subprocess.PIPE, subprocess.STDOUT])
def test_files_are_saved_although_the_pipe_is_closed(command, err):
    args, csv = command
    with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=err) as process:
        process.stdout.close()  # as `| head -1` does later
        said = process.stderr.read() if process.stderr else b""
    assert process.returncode == 0, said
    assert b"Error" not in said
    assert len(pd.read_csv(csv)) > 5


def on_a_full_disk(command, size, out=None):
    """What a command says if no file may be larger than so many bytes."""
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    pipe = subprocess.PIPE
    args = [*command, "--no-progress"]
    return subprocess.run(args, stdout=out, stderr=pipe, preexec_fn=limit, text=True, check=False)


def test_a_full_disk_under_standard_output_is_one_sentence(command):
    args, _ = command
    with open("/dev/full", "w") as full:
        done = subprocess.run(args, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "fusenorm: standard output cannot be written (No space left on device): free disk space, "
        "or write elsewhere"
    )
    assert "Traceback" not in done.stderr


def test_a_full_disk_under_a_table_is_one_sentence(command, tmp_path):
    args, csv = command
    done = on_a_full_disk([*args, "--store", "none"], 100, subprocess.DEVNULL)
    assert done.returncode == 1
    *too_few_images, last = done.stderr.splitlines()
    assert last == (
        f"fusenorm: {csv} cannot be written (File too large): free disk space, or write elsewhere"
    )
    assert len(too_few_images) <= 1
    assert list(tmp_path.rglob("*.csv*")) == []


def test_standard_output_is_as_before_afterwards(capsys):
    before = sys.stdout, sys.stderr
    with tolerant_output():
        print("±")
        print("±", file=sys.stderr)
    assert (sys.stdout, sys.stderr) == before
    assert capsys.readouterr() == ("±\n", "±\n")


WARNING = """if True:
    import sys, warnings
    warnings.simplefilter("ignore")
    from fusenorm_openood.cli.main import shown_warnings
    from fusenorm_openood.cli.score import Namespace, _given
    with shown_warnings():
        _given(Namespace(paths=sys.argv[1:], manifest=None))
        _given(Namespace(paths=sys.argv[1:], manifest=None))
        warnings.warn("of another package")
"""


@pytest.mark.parametrize(("options", "shown"), [([], 1), (["-W", "ignore"], 0)])
def test_own_warnings_are_one_sentence_unless_python_was_told_otherwise(tmp_path, options, shown):
    (tmp_path / "a.png").touch()
    (tmp_path / "b.dcm").touch()
    command = [sys.executable, *options, "-c", WARNING, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert len(done.stderr.splitlines()) == shown
    assert shown == 0 or done.stderr.startswith("fusenorm: left out: 1 .dcm")
