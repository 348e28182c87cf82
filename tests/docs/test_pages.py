"""Every code block of README and docs runs, or says why not."""

import re
import shutil
from pathlib import Path

import pytest

from tests.conftest import shortened_digits
from tests.docs.pages import LANGUAGES, PAGES, ROOT, Block, agree, blocks, run
from tests.export.programs import CAN_EXPORT

RUN = "digits_resnet18_32x32_base_e16_lr0.05_default"
WITH_ALL_IMAGES = ("README", "tutorial", "deploy")  # their figures are compared
EXECUTED = ("python", "bash")


def runs(page: Path) -> bool:
    found = blocks(page.read_text(encoding="utf-8"))
    return any(block.language in EXECUTED and block.reason is None for block in found)


RUNNING_PAGES = [page for page in PAGES if runs(page)]


@pytest.fixture
def workplace(digits, tmp_path, monkeypatch):
    """A folder as `fusenorm digits` leaves it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(digits[1].parent, Path("results", RUN, "s0"))
    return digits[0]


@pytest.mark.parametrize("page", RUNNING_PAGES, ids=lambda page: page.stem)
def test_blocks_run_and_print_what_the_page_shows(page, workplace):
    if page.stem == "deploy" and not CAN_EXPORT:
        pytest.skip("needs the extra export and its torch")
    if page.stem in WITH_ALL_IMAGES:
        Path("data").symlink_to(workplace)
    else:
        shortened_digits(workplace, Path("data").absolute(), train=64, others=40)
    run(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_name_a_language_that_is_known(page):
    assert {block.language for block in blocks(page.read_text(encoding="utf-8"))} <= LANGUAGES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_relative_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    targets = [link.partition("#")[0] for link in links if not re.match(r"[a-z]+:", link)]
    assert [target for target in targets if target and not (page.parent / target).exists()] == []


def test_readme_is_short_and_shows_python_at_once():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 140
    assert lines.index("```python") < 40


def test_a_block_carries_the_reason_that_stands_right_above_it():
    text = "<!-- not run: slow -->\n\n```bash\nsleep 9\n```\n\n```python\nprint(1)\n```\n"
    assert list(blocks(text)) == [
        Block("bash", "sleep 9\n", 4, "slow"),
        Block("python", "print(1)\n", 8, None),
    ]


def test_output_that_differs_is_noticed(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    monkeypatch.setattr("tests.docs.pages.ROOT", tmp_path)
    page.write_text("```python\nprint(1.04, 'a')\n```\n\n```text\n1.0 a\n```\n")
    run(page)
    page.write_text("```python\nprint(1.04, 'b')\n```\n\n```text\n1.0 a\n```\n")
    with pytest.raises(AssertionError, match=r"page.md, line 6 shows\n1.0 a"):
        run(page)


def test_commands_that_fail_are_noticed(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    monkeypatch.setattr("tests.docs.pages.ROOT", tmp_path)
    for command in ("fusenorm taps missing.ckpt", "rm -r nothing"):
        page.write_text(f"```bash\n{command}\n```\n")
        with pytest.raises(AssertionError, match="line 2"):
            run(page)


def test_numbers_agree_to_the_digits_shown():
    assert agree("a 0.60\nb", "a  0.59 b")
    assert not agree("a 0.60", "a 0.55")
    assert not agree("a 60", "a 61")
    assert not agree("0.5 0.5", "0.5")
