"""What the documentation takes from code and measurements is up to date."""

import re

import pytest

from docs.gen.generate import DOCS, documented, generated
from fusenorm_openood.method.atf import atf
from fusenorm_openood.method.settings import SETTINGS
from tests.docs.pages import ROOT

GENERATED = generated()


@pytest.mark.parametrize("path", GENERATED, ids=lambda path: path.name)
def test_generated_parts_are_up_to_date(path):
    assert path.read_text(encoding="utf-8") == GENERATED[path], "run: python -m docs.gen"


def test_every_setting_is_on_its_page():
    page = (DOCS / "settings.md").read_text(encoding="utf-8").partition("<!-- end -->")[0]
    assert tuple(re.findall(r"^\| `(\w+)` \| `", page, re.MULTILINE)) == SETTINGS


def test_a_docstrings_arguments_are_found():
    assert documented(atf, "Args")["k_min"].startswith("smallest fraction of pixels")


def test_the_architecture_page_has_the_rooms_that_import_linter_holds():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    layers = re.search(r"^layers = \[(.*?)^\]", project, re.MULTILINE | re.DOTALL)
    rooms = re.findall(r"\w+", layers[1])
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)/?` \|", page, re.MULTILINE) == rooms
