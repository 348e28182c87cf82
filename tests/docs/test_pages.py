"""Every code block of README and docs runs, or says why not, and links lead somewhere."""

import re
import shutil
from pathlib import Path

import pytest

from tests.conftest import shortened_digits
from tests.docs.pages import LANGUAGES, PAGES, ROOT, blocks, run
from tests.export.programs import CAN_EXPORT

RUN = "digits_resnet18_32x32_base_e16_lr0.05_default"
EXPORTS = (
    "fusenorm export",
    "fusenorm recalibrate",
    "import onnxruntime",
)  # in deploy.md; they take long


def runs(page: Path) -> bool:
    found = blocks(page.read_text(encoding="utf-8"))
    return any(block.language in ("python", "bash") and block.reason is None for block in found)


@pytest.fixture
def workplace(digits, tmp_path, monkeypatch):
    """A folder as `fusenorm digits` leaves it, with few images on the lists."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(digits[1].parent, Path("results", RUN, "s0"))
    shortened_digits(digits[0], Path("data").absolute(), train=32, others=40)


@pytest.mark.parametrize("page", [*filter(runs, PAGES)], ids=lambda page: page.stem)
def test_blocks_run_and_print_what_the_page_shows(page, workplace):
    run(page, without=EXPORTS)


@pytest.mark.slow
@pytest.mark.skipif(not CAN_EXPORT, reason="needs the extra export and its torch")
def test_export_blocks_run_and_print_what_the_page_shows(workplace):
    run(ROOT / "docs" / "deploy.md")


def test_blocks_name_a_language():
    found = {block.language for p in PAGES for block in blocks(p.read_text(encoding="utf-8"))}
    assert found <= LANGUAGES


def test_relative_links_lead_to_files_and_headings():
    broken = []
    for page in PAGES:
        links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
        for link in (link for link in links if not re.match(r"[a-z]+:", link)):
            path, _, anchor = link.partition("#")
            target = (page.parent / path) if path else page
            if not target.exists() or (anchor and anchor not in anchors(target)):
                broken.append(f"{page.name}: {link}")
    assert broken == []


def anchors(page: Path) -> set[str]:
    """The headings of a page, as links name them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_readme_is_short_and_shows_python_at_once():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 140
    assert lines.index("```python") < 40


def test_output_that_differs_and_commands_that_fail_are_noticed(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    monkeypatch.setattr("tests.docs.pages.ROOT", tmp_path)
    page.write_text("```python\nprint(1.04, 'a')\n```\n\n```text\n1.0 a\n```\n")
    run(page)
    page.write_text("```python\nprint(1.04, 'b')\n```\n\n```text\n1.0 a\n```\n")
    with pytest.raises(AssertionError, match=r"page.md, line 6 shows\n1.0 a"):
        run(page)
    for command in ("fusenorm taps missing.ckpt", "rm -r nothing"):
        page.write_text(f"```bash\n{command}\n```\n")
        with pytest.raises(AssertionError, match="line 2"):
            run(page)
