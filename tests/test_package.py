import json
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import fusenorm_openood

ROOT = Path(__file__).parent.parent


def test_every_public_name_is_importable():
    for name in fusenorm_openood.__all__:
        assert getattr(fusenorm_openood, name) is not None
        assert name in dir(fusenorm_openood)


@pytest.mark.parametrize("name", fusenorm_openood.__all__[1:])
def test_every_public_name_has_an_example_that_doctest_runs(name):
    value = getattr(fusenorm_openood, name)
    assert ">>> " in value.__doc__ or name in ("IDStatistics", "register")  # with what they are of


def test_import_loads_neither_torch_nor_openood():
    code = (
        "import sys, fusenorm_openood; assert not {'torch', 'openood', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_public_name_is_also_a_module():
    modules = {module.name for module in pkgutil.iter_modules(fusenorm_openood.__path__)}
    assert not modules & set(fusenorm_openood.__all__)


def test_unknown_names_are_attribute_errors():
    assert not hasattr(fusenorm_openood, "nothing")


def test_workflows_test_what_there_is_on_three_systems():
    found = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())["jobs"]
    assert {job["runs-on"].partition("-")[0] for job in found.values()} == {
        *("ubuntu", "macos", "windows")
    }
    commands = [step["run"] for job in found.values() for step in job["steps"] if "run" in step]
    tested = {word for line in commands for word in line.split() if word.startswith("tests/")}
    assert tested
    assert [path for path in tested if not list(ROOT.glob(path))] == []


def test_the_image_has_all_that_the_wheel_is_built_from():
    lines = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and line[0] not in "# "]
    known = {"FROM", "COPY", "ARG", "RUN", "WORKDIR", "ENV", "ENTRYPOINT", "CMD"}
    assert {word for word, _ in steps} == known
    assert json.loads(dict(steps)["ENTRYPOINT"]) == ["fusenorm"]
    kept = re.findall(r"^!(\S+)", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    assert sorted(kept) == ["LICENSE", "README.md", "configs", "fusenorm_openood", "pyproject.toml"]
    assert all((ROOT / name).exists() for name in kept)


def test_without_fcntl_files_are_written_without_locks(tmp_path):
    """As on Windows, where neither locks nor forks are those of POSIX."""
    code = (
        "import os, pathlib, subprocess, sys, uuid, fusenorm_openood.storage.urls\n"
        "sys.platform, sys.modules['fcntl'] = 'win32', None\n"
        "del os.register_at_fork\n"
        "from fusenorm_openood.storage.files import alone_in, lock, unlock, write_bytes_whole\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "with alone_in(folder):\n"
        "    write_bytes_whole(folder / 'new' / 'rows', b'1')\n"
        "unlock(lock(folder / 'new' / 'rows'))\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert (tmp_path / "new" / "rows").read_bytes() == b"1"


@pytest.mark.parametrize(("line", "word"), [("sco", "score"), ("doctor --he", "--help")])
def test_the_shell_completes_commands_and_options(line, word, tmp_path):
    pytest.importorskip("argcomplete")
    line = f"fusenorm {line}"
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line))}
    asked["_ARGCOMPLETE_STDOUT_FILENAME"] = str(tmp_path / "words")
    command = [sys.executable, "-m", "fusenorm_openood.cli"]
    subprocess.run(command, env={**os.environ, **asked}, check=True)
    assert (tmp_path / "words").read_text().strip() == word
