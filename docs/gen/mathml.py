"""mkdocs hook: formulas become MathML, so that pages need no script."""

import html
import re
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(
    r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL
)  # what pymdownx.arithmatex makes of $...$ and $$...$$


def on_page_content(content: str, **kwargs: Any) -> str:
    return FORMULA.sub(
        lambda m: convert(html.unescape(m[2]), display="block" if m[1] == "div" else "inline"),
        content,
    )
