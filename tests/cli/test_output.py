"""A command finishes and saves its files whatever becomes of its standard output."""

import io
import logging
import os
import resource
import subprocess
import sys
from contextlib import contextmanager, redirect_stdout

import pandas as pd
import pytest

from fusenorm_openood.cli.main import main, tolerant_output

MSP = ("--postprocessor", "msp", "--compare", "--save-csv")


@contextmanager
def printing_to(kind):
    """A context in which standard output is a terminal of ASCII, a closed pipe, or a full disk."""
    if kind == "full disk":
        out = os.fdopen(os.open("/dev/full", os.O_WRONLY), "w", encoding="utf-8")
    elif kind == "closed pipe":
        read, write = os.pipe()
        os.close(read)
        out = os.fdopen(write, "w", encoding="utf-8")
    else:
        out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    with out, redirect_stdout(out):
        yield out


@pytest.mark.parametrize(("kind", "status"), [("ASCII", 0), ("closed pipe", 0), ("full disk", 1)])
def test_a_table_is_saved_although_it_cannot_be_printed(evaluate, runs, kind, status, capsys):
    with printing_to(kind) as out:
        assert evaluate(*MSP) == status
        assert kind != "ASCII" or b"mean ? std" in out.buffer.getvalue()
    err = capsys.readouterr().err
    if kind == "full disk":
        assert err.splitlines()[-1] == (
            "fusenorm: standard output cannot be written (No space left on device): free disk "
            "space, or write elsewhere"
        )
    else:
        assert len(pd.read_csv(runs / "ood" / "msp.csv")) > 5


def test_a_full_disk_under_a_table_is_one_sentence(evaluate, runs, capsys):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        assert evaluate(*MSP) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"fusenorm: {runs / 'ood' / 'msp.csv'} cannot be written (File too large): free disk "
        "space, or write elsewhere"
    )
    assert list(runs.rglob("*.csv*")) == []


def test_a_process_whose_pipe_is_closed_ends_without_a_word():
    command = [sys.executable, "-m", "fusenorm_openood.cli", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()  # as `| head -1` does later
        said = process.stderr.read()
    assert (process.returncode, said) == (0, b"")


@pytest.mark.parametrize("level", [logging.NOTSET, logging.ERROR])
def test_messages_are_shown_unless_logging_is_configured(tmp_path, level, monkeypatch, capsys):
    monkeypatch.setattr(logging.getLogger("fusenorm_openood"), "level", level)
    made = tmp_path / "new"
    assert main(["train", "--data-root", str(tmp_path / "none"), "--results-dir", str(made)]) == 1
    said = f"fusenorm: results go to {made}" in capsys.readouterr().err
    assert said == (level == logging.NOTSET)


def test_standard_output_is_as_before_afterwards(capsys):
    before = sys.stdout, sys.stderr
    with tolerant_output():
        print("±")
        print("±", file=sys.stderr)
    assert (sys.stdout, sys.stderr) == before
    assert capsys.readouterr() == ("±\n", "±\n")


WARNING = """
import warnings, fusenorm_openood
from fusenorm_openood.cli.main import own_warnings
warnings.simplefilter("ignore")
twice = "import warnings\\nfor _ in range(2): warnings.warn('left out: 1 .dcm')"
with own_warnings():
    exec(compile(twice, fusenorm_openood.__file__, "exec"), {"__name__": "fusenorm_openood.any"})
    warnings.warn("of another package")
"""


@pytest.mark.parametrize(
    ("options", "shown"), [([], "fusenorm: left out: 1 .dcm\n"), (["-W", "ignore"], "")]
)
def test_own_warnings_are_one_sentence_unless_python_was_told_otherwise(options, shown):
    command = [sys.executable, *options, "-c", WARNING]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == shown
