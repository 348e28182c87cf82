"""What the documentation takes from code and measurements is up to date."""

import re

import fusenorm_openood
from docs.gen.generate import DOCS, generated
from fusenorm_openood.method.settings import SETTINGS
from tests.docs.pages import ROOT


def test_generated_parts_are_up_to_date():
    outdated = [p.name for p, text in generated().items() if p.read_text(encoding="utf-8") != text]
    assert outdated == [], "run: python -m docs.gen"


def test_every_setting_is_on_its_page():
    page = (DOCS / "settings.md").read_text(encoding="utf-8").partition("<!-- end -->")[0]
    assert tuple(re.findall(r"^\| `(\w+)` \| `", page, re.MULTILINE)) == SETTINGS


def test_every_public_name_has_a_task_and_a_place_on_the_page_of_the_api():
    tasks, _, places = (DOCS / "api.md").read_text(encoding="utf-8").partition("\n## ")
    for name in set(fusenorm_openood.__all__) - {"__version__"}:
        assert f"`{name}`" in tasks
        assert f"::: fusenorm_openood.{name}\n" in places + "\n"


def test_the_architecture_page_has_the_rooms_of_import_linter():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    layers = re.search(r"^layers = \[(.*?)^\]", project, re.MULTILINE | re.DOTALL)
    rooms = re.findall(r"\w+", layers[1])
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)/?` \|", page, re.MULTILINE) == rooms
    drawing = re.search(r"^```text\n(main.*?)```", page, re.MULTILINE | re.DOTALL)[1]
    assert re.findall(r"\w+", drawing) == rooms
