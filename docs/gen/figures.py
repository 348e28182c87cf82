"""The figures of the method, drawn from the package's own functions as small SVG files."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fusenorm_openood import atf
from fusenorm_openood.method.fusion import deviation, penalty
from fusenorm_openood.method.settings import Settings

INK, SOFT, GRID = "#212121", "#607d8b", "#cfd8dc"
LINES = ("#1565c0", "#ef6c00", "#2e7d32")


def penalty_figure() -> str:
    """Penalty against the normalised score of one weak expert, for three bases."""
    left, top, width, height = 60, 30, 480, 220
    z = torch.from_numpy(np.linspace(-1, 2, 301))

    def x(value: float) -> float:
        return left + (value + 1) / 3 * width

    def y(value: float) -> float:
        return top + (1 - value) * height

    parts = [
        f'<rect x="{x(0):.0f}" y="{top}" width="{x(1) - x(0):.0f}" height="{height}" '
        'fill="#e8f5e9"/>',
        text((x(0) + x(1)) / 2, y(0.5), "ID range: no penalty", SOFT, "middle"),
    ]
    for tick in (0, 0.5, 1):
        parts += [line(left, y(tick), left + width, y(tick), GRID)]
        parts += [text(left - 8, y(tick) + 4, f"{tick:g}", INK, "end")]
    for tick in (-1, -0.5, 0, 0.5, 1, 1.5, 2):
        parts += [text(x(tick), top + height + 18, f"{tick:g}", INK, "middle")]
    for base, colour in zip((20, 5, 2), LINES, strict=True):
        curve = zip(z.tolist(), penalty(deviation(z), base=base).tolist(), strict=True)
        parts += [polyline([(x(a), y(b)) for a, b in curve], colour)]
    for number, (base, colour) in enumerate(zip((20, 5, 2), LINES, strict=True)):
        at = top + 20 + 22 * number
        parts += [line(left + width + 16, at, left + width + 40, at, colour, 2)]
        parts += [text(left + width + 46, at + 4, f"base {base}", INK)]
    parts += [
        text(
            left + width / 2,
            top + height + 40,
            "normalised score z of a weak expert",
            INK,
            "middle",
        ),
        text(left, top - 12, "penalty", INK, "middle"),
    ]
    return svg(640, top + height + 52, parts)


def atf_figure() -> str:
    """Four channels of one feature map: entropy, weight, and the pixels that are averaged."""
    maps, side, cell = channels(), 8, 14
    settings = Settings()
    even, published = weights(maps, alpha=0.5), weights(maps, alpha=settings.alpha)
    h = 1 - published / published[0]  # the entropy of the first channel, one pixel, is 0
    ratio = settings.k_min + (settings.k_max - settings.k_min) * h.mean()
    k = int(ratio * side * side)
    parts = []
    for c, name in enumerate(("one pixel", "narrow", "wide", "even")):
        left, top = 30 + c * 150, 34
        parts += [text(left + side * cell / 2, top - 12, name, INK, "middle")]
        kept = {i for i in maps[c].flatten().topk(k).indices.tolist() if maps[c].flatten()[i] > 0}
        for pixel, value in enumerate(maps[c].flatten().tolist()):
            px, py = left + pixel % side * cell, top + pixel // side * cell
            edge = f' stroke="{LINES[1]}" stroke-width="1.5"' if pixel in kept else ""
            parts.append(
                f'<rect x="{px}" y="{py}" width="{cell - 1}" height="{cell - 1}" '
                f'fill="{grey(value)}"{edge}/>'
            )
        below = top + side * cell
        parts += [text(left, below + 20, f"h = {h[c]:.2f}", INK)]
        bars = (("alpha 0", published[c], LINES[0]), ("alpha 0.5", even[c], LINES[2]))
        for number, (label, weight, colour) in enumerate(bars):
            at = below + 32 + 34 * number
            parts += [text(left, at + 10, f"w = {weight:.2f} ({label})", colour)]
            parts += [
                f'<rect x="{left}" y="{at + 15}" width="{100 * weight:.1f}" height="6" '
                f'fill="{colour}"/>'
            ]
    parts += [
        text(30, 266, f"k = {k} of 64 pixels: k_min + (k_max - k_min) * mean h = {ratio:.2f}", INK)
    ]
    return svg(640, 282, parts)


# Where the strong experts of the default come from, how they are called, and what they are.
STRONG = {
    "head_mds": ("feature", "head_mds", "to class means"),
    "fdbd": ("feature", "fDBD", "to class boundaries"),
    "output": ("logits", "energy", "of all logits"),
    "logitgap": ("logits", "LogitGap", "to the next logits"),
}


def data_flow_figure() -> str:
    """From images to confidences with the default settings."""
    settings = Settings()
    parts = [*box(10, 155, 80, 60, "images", "", "#fff")]
    for number in range(4):
        x = 115 + 125 * number
        parts += [*box(x, 155, 105, 60, f"stage {number + 1}", "blocks", "#e3f2fd")]
        parts += [*box(x, 60, 105, 50, "ATF", "a norm per block", "#e8f5e9")]
        parts += [arrow((x - (25 if number == 0 else 20), 185), (x, 185))]
        parts += [arrow((x + 52, 155), (x + 52, 110))]
        parts += [arrow((x + 52, 60), (x + 52, 36), (835, 36), (835, 60))]
    parts += [*box(770, 60, 130, 50, "penalty", "joint distance", "#fff3e0")]
    parts += [*box(640, 155, 105, 60, "feature", "penultimate", "#e3f2fd")]
    parts += [*box(795, 155, 105, 60, "logits", "of the classes", "#e3f2fd")]
    parts += [arrow((595, 185), (640, 185)), arrow((745, 185), (795, 185))]
    left = {"feature": 692, "logits": 847}
    strong = sorted(map(name_of_strong, settings.strong), key=list(STRONG).index)
    for number, name in enumerate(strong):
        source, title, what = STRONG[name]
        x = 505 + 130 * number
        parts += [*box(x, 262, 120, 50, title, what, "#f3e5f5")]
        parts += [arrow((left[source], 215), (x + 60, 262)), arrow((x + 60, 312), (x + 60, 345))]
    bar = "standardised by ID statistics, weighted by trust, summed"
    parts += [*box(505, 345, 510, 40, bar, "", "#f3e5f5")]
    parts += [*box(1045, 155, 120, 60, "confidence", "strong - penalty", "#fff")]
    parts += [
        arrow((900, 85), (1105, 85), (1105, 155)),
        arrow((1015, 365), (1105, 365), (1105, 215)),
    ]
    parts += [text(100, 245, "blocks: weak experts, found in any network", SOFT)]
    parts += [text(1032, 338, "strong", SOFT), text(1000, 78, "weak", SOFT)]
    return svg(1180, 400, parts)


def name_of_strong(expert: object) -> str:
    """A default strong expert: one that the figure has no place for is an error."""
    if expert not in STRONG:
        raise KeyError(f"the data flow has no place for {expert!r}: add it to STRONG")
    return str(expert)


def box(
    x: float, y: float, width: float, height: float, title: str, what: str, colour: str
) -> list[str]:
    middle = y + height / 2
    edge = 'rx="8" stroke="#37474f" stroke-width="1.5"'
    return [
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{colour}" {edge}/>',
        text(x + width / 2, middle + (-3 if what else 5), title, INK, "middle"),
        *([text(x + width / 2, middle + 14, what, SOFT, "middle", 11)] if what else []),
    ]


def arrow(*points: tuple[float, float]) -> str:
    """A line through points, with a head at the last."""
    (x0, y0), (x1, y1) = points[-2:]
    length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
    u, v = 7 * (x1 - x0) / length, 7 * (y1 - y0) / length
    head = f"{x1:.0f},{y1:.0f} {x1 - u - v / 2:.1f},{y1 - v + u / 2:.1f} "
    head += f"{x1 - u + v / 2:.1f},{y1 - v - u / 2:.1f}"
    listed = " ".join(f"{x},{y}" for x, y in points)
    line = f'<polyline points="{listed}" fill="none" stroke="#37474f" stroke-width="1.5"/>'
    return f'{line}<polygon points="{head}" fill="#37474f"/>'


FIGURES: dict[str, Callable[[], str]] = {
    "data-flow": data_flow_figure,
    "penalty": penalty_figure,
    "atf": atf_figure,
}


def channels() -> Tensor:
    """Four channels `[4, 8, 8]` whose energy is more and more spread out."""
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    distance = (x - 3) ** 2 + (y - 4) ** 2
    spread = [torch.exp(-distance / (2 * sigma**2)) for sigma in (0.01, 1.1, 2.6)]
    return torch.stack([*spread, 0.9 + 0.1 * torch.cos(3 * x + 5 * y)])


def weights(maps: Tensor, alpha: float) -> Tensor:
    """The channel weights of ATF `[C]`, read off `atf` itself.

    Doubling a channel leaves all weights as they are, and adds its weighted norm once more.
    """

    def norm(x: Tensor) -> Tensor:
        return atf(x[None].double(), k_min=1, k_max=1, alpha=alpha)[0]

    found = []
    for c in range(len(maps)):
        doubled = maps.clone()
        doubled[c] *= 2
        found.append((norm(doubled) - norm(maps)) / maps[c].double().square().mean().sqrt())
    return torch.stack(found)


def grey(value: float) -> str:
    level = round(245 - 190 * min(value, 1))
    return f"#{level:02x}{level:02x}{level:02x}"


def text(
    x: float, y: float, content: str, colour: str, anchor: str = "start", size: int | None = None
) -> str:
    place = f'x="{x:.0f}" y="{y:.0f}" fill="{colour}" text-anchor="{anchor}"'
    place += f' font-size="{size}"' if size else ""
    return f"<text {place}>{content}</text>"


def line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1) -> str:
    return (
        f'<line x1="{x1:.0f}" y1="{y1:.0f}" x2="{x2:.0f}" y2="{y2:.0f}" stroke="{colour}" '
        f'stroke-width="{width}"/>'
    )


def polyline(points: Sequence[tuple[float, float]], colour: str) -> str:
    """A line through points, those on the way between two others left out."""
    kept = [points[0]]
    for before, here, after in zip(points, points[1:], points[2:], strict=False):
        if abs(before[1] - 2 * here[1] + after[1]) > 1e-6:
            kept.append(here)
    listed = " ".join(f"{x:.1f},{y:.1f}" for x, y in [*kept, points[-1]])
    return f'<polyline points="{listed}" fill="none" stroke="{colour}" stroke-width="2"/>'


def svg(width: float, height: float, parts: Sequence[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="13">'
    )
    return "\n".join(
        [head, f'<rect width="{width}" height="{height}" fill="#fff"/>', *parts, "</svg>\n"]
    )
