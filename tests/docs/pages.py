"""The code blocks of a Markdown page: run as written, or marked with the reason why not.

    <!-- not run: REASON -->         above a Python or bash block
    <!-- not compared: REASON -->    above the output of a block that ran

A `text` block that follows a block that ran is its output. Decimals may differ by two units of
the last digit shown: small networks differ that much between machines.
"""

import io
import re
import shlex
import textwrap
from collections.abc import Collection, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

from fusenorm_openood.cli.main import main

ROOT = Path(__file__).parent.parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs" / "measured").glob("*.md")),
]
LANGUAGES = {"python", "bash", "text", "yaml", "toml", "markdown", "javascript"}

_FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1``` *$", re.MULTILINE | re.DOTALL)
_MARKER = re.compile(r"<!-- not (?:run|compared): (.+?) -->\s*\Z", re.DOTALL)
_DECIMAL = re.compile(r"-?\d+\.\d+")


class Block(NamedTuple):
    """A fenced block, the line that its code starts on, and the reason why it is left alone."""

    language: str
    code: str
    line: int
    reason: str | None


def blocks(text: str) -> Iterator[Block]:
    """The fenced blocks of a page."""
    for fence in _FENCE.finditer(text):
        marker = _MARKER.search(text[: fence.start()])
        line = text.count("\n", 0, fence.start()) + 2
        yield Block(fence[2], textwrap.dedent(fence[3]), line, marker and marker[1])


def run(page: Path, without: Collection[str] = ()) -> None:
    """Run the blocks of a page in their order, and compare what they print with what it shows.

    Blocks that contain one of the texts in `without` do not run.
    """
    namespace: dict[str, Any] = {"__name__": page.stem}
    printed: str | None = None
    for block in blocks(page.read_text(encoding="utf-8")):
        place = f"{page.relative_to(ROOT)}, line {block.line}"
        if block.reason is not None or any(text in block.code for text in without):
            printed = None
        elif block.language == "python":
            code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
            with redirect_stdout(io.StringIO()) as output:
                exec(code, namespace)
            printed = output.getvalue()
        elif block.language == "bash":
            printed = run_commands(block.code, place)
        elif block.language == "text" and printed is not None:
            assert agree(block.code, printed), f"{place} shows\n{block.code}\nfound\n{printed}"
            printed = None


def run_commands(code: str, place: str) -> str:
    """What `fusenorm` commands print, run in this process, without loader processes of theirs."""
    with redirect_stdout(io.StringIO()) as output:
        for line in code.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                assert words[0] == "fusenorm", f"{place}: {words[0]} needs a reason not to run"
                alone = ["--num-workers", "0"] if words[1] in ("eval", "train") else []
                status = int(line.partition("# exit status ")[2] or 0)
                assert main([*words[1:], *alone]) == status, f"{place}: {line} failed"
    return output.getvalue()


def agree(shown: str, printed: str) -> bool:
    """Whether two outputs are the same, white space and the last digits of decimals aside.

    >>> agree("AUROC 0.9", "AUROC  1.1"), agree("AUROC 0.9", "AUROC 1.2")
    (True, False)
    """
    ours, theirs = (" ".join(_DECIMAL.sub("#", text).split()) for text in (shown, printed))
    pairs = zip(_DECIMAL.findall(shown), _DECIMAL.findall(printed), strict=False)
    return ours == theirs and all(
        abs(float(a) - float(b)) < 2.5 * 10.0 ** -len(a.partition(".")[2]) for a, b in pairs
    )
