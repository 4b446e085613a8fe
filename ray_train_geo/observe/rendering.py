"""From a matplotlib figure to SVG that fits any page, or to PNG (level 0).

Colours that stand for ink and paper come from four constants.  :func:`to_svg` turns these into CSS
variables, so that one picture reads well on a light page, on a dark one, and in print.
"""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib
from matplotlib.figure import Figure

__all__ = ["BLUE", "GRID", "INK", "MUTED", "ORANGE", "PAPER", "RED", "to_png", "to_svg"]

INK, MUTED, GRID, PAPER = "#1f2328", "#68707c", "#d9dde3", "#ffffff"
BLUE, ORANGE, RED = "#3b78c2", "#d9822b", "#c8443f"
_CSS = {
    INK: "currentColor",
    MUTED: f"var(--muted, {MUTED})",
    GRID: f"var(--line, {GRID})",
    PAPER: f"var(--paper, {PAPER})",
}


def to_svg(figure: Figure) -> str:
    """``figure`` as an ``<svg>`` element, to put inside an HTML page or to keep as a file.

    Text stays text; ink follows the page's text colour, and ``--muted``, ``--line`` and
    ``--paper`` its other colours.  Ids depend on the content, so that several pictures can stand
    in one page.  The same figure gives the same text.
    """
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with _rendering():
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->\n?|<metadata>.*?</metadata>\n?", "", svg, flags=re.S)
    wanted = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    prefix = "g" + hashlib.sha256(svg.encode()).hexdigest()[:8]
    # Inside tags only: what users wrote (names of devices, say) is text, and stays as it is.
    svg = re.sub(r"<[^>]*>", lambda m: _page_tag(m[0], prefix, wanted), svg)
    svg = re.sub(r"(?<=>)\n\s*(?=<)", "\n", svg)
    return re.sub(r"<g>\n*</g>\n?", "", svg).strip()


def to_png(figure: Figure, dots_per_inch: int = 144) -> bytes:
    """``figure`` as a PNG image on white."""
    buffer = io.BytesIO()
    with _rendering():
        figure.savefig(buffer, format="png", dpi=dots_per_inch, facecolor=PAPER)
    return buffer.getvalue()


@contextmanager
def _rendering() -> Iterator[None]:
    with (
        matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "g", "savefig.bbox": None}),
        warnings.catch_warnings(),
    ):
        # A region's name may be in any script; browsers have the glyphs that matplotlib lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def _page_tag(tag: str, prefix: str, wanted: set[str]) -> str:
    """One tag of matplotlib's SVG, with page colours and ids; ids nobody points to are dropped."""

    def keep_wanted(match: re.Match[str]) -> str:
        return f' id="{prefix}{match[1]}"' if match[1] in wanted else ""

    def page_colour(match: re.Match[str]) -> str:
        return match[1] + _CSS.get(match[2], match[2])

    tag = re.sub(r' id="([^"]*)"', keep_wanted, tag)
    tag = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}", tag)
    tag = re.sub(r"((?:fill|stroke): ?)(#[0-9a-f]{6})", page_colour, tag)
    return re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, 'DejaVu Sans', sans-serif", tag)
