"""mkdocs hooks: formulas become MathML, and the tables of benchmarks/results pages of the site."""

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

RESULTS = Path(__file__).parent.parent.parent / "benchmarks" / "results"
FORMULA = re.compile(
    r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL
)  # what pymdownx.arithmatex makes of $...$ and $$...$$


def on_files(files: Files, config: Any) -> Files:
    for path in sorted(RESULTS.glob("*.md")):
        files.append(File.generated(config, f"measured/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **kwargs: Any) -> str:
    """The links of the repository, as the site has them."""
    if page.file.src_uri.startswith("measured/"):
        return markdown.replace("](../../docs/", "](../")
    return markdown.replace("](../benchmarks/results/", "](measured/")


def on_page_content(content: str, **kwargs: Any) -> str:
    return FORMULA.sub(
        lambda m: convert(html.unescape(m[2]), display="block" if m[1] == "div" else "inline"),
        content,
    )
