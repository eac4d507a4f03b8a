"""A sheet on which pictures, boxes and text are placed by pixel, with matplotlib's own fonts and no global state."""

from __future__ import annotations

import functools
import io

from biokit.view.picture import Picture, picture_of

Rgb = tuple[float, float, float]

# Okabe-Ito colours, which colour-blind readers tell apart, some lightened or darkened for text
INK: Rgb = (0.13, 0.13, 0.13)
GREY: Rgb = (0.38, 0.38, 0.38)
FRAME: Rgb = (0.62, 0.62, 0.62)
PALE: Rgb = (0.955, 0.955, 0.955)
ORANGE: Rgb = (1.0, 0.80, 0.40)
BLUE: Rgb = (0.0, 0.32, 0.55)
VERMILLION: Rgb = (0.72, 0.25, 0.0)
_DPI = 100
_POINTS = 72 / _DPI


class Canvas:
    """A white sheet of `width` x `height` pixels; x runs right and y down."""

    def __init__(self, width: float, height: float) -> None:
        from matplotlib.figure import Figure

        self.width, self.height = int(width), int(height)
        self._figure = Figure(figsize=(self.width / _DPI, self.height / _DPI), dpi=_DPI, facecolor="white")
        self._axes = self._figure.add_axes((0.0, 0.0, 1.0, 1.0))
        self._axes.set_axis_off()
        self._axes.set_xlim(0, self.width)
        self._axes.set_ylim(self.height, 0)

    def image(self, png: bytes, x: float, y: float, *, behind: bool = False) -> None:
        """Place a PNG with its upper left corner at (x, y), pixel for pixel, above or behind all the rest."""
        from matplotlib.image import imread

        pixels = imread(io.BytesIO(png), format="png")
        self._figure.figimage(pixels, xo=round(x), yo=self.height - round(y) - pixels.shape[0], zorder=-behind)

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        *,
        fill: Rgb,
        edge: Rgb,
        line_width: float = 1.0,
        dashed: bool = False,
    ) -> None:
        from matplotlib.patches import FancyBboxPatch

        style = "round,pad=0,rounding_size=4"
        line_style = (0, (3, 2)) if dashed else "solid"
        self._axes.add_patch(
            FancyBboxPatch(
                (x, y), width, height, boxstyle=style, facecolor=fill, edgecolor=edge, lw=line_width, ls=line_style
            )
        )

    def bar(self, x: float, y: float, width: float, height: float, fill: Rgb) -> None:
        """A plain rectangle without an edge, for stretches that may be thinner than a rounded corner."""
        from matplotlib.patches import Rectangle

        self._axes.add_patch(Rectangle((x, y), width, height, facecolor=fill, edgecolor="none"))

    def line(self, start: tuple[float, float], end: tuple[float, float], colour: Rgb, dashed: bool = False) -> None:
        """A thin line from (x, y) to (x, y)."""
        style = (0, (4, 3)) if dashed else "solid"
        (x, y), (x_end, y_end) = start, end
        self._axes.plot([x, x_end], [y, y_end], color=colour, lw=1.2, ls=style, scalex=False, scaley=False)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float,
        align: str = "left",
        bold: bool = False,
        mono: bool = False,
        colour: Rgb = INK,
    ) -> None:
        """Write one line, its middle at height y; `size` in pixels. Signs without a glyph are written as \\u codes."""
        self._axes.text(
            x,
            y,
            printable(text),
            fontsize=size * _POINTS,
            ha=align,
            va="center",
            weight="bold" if bold else "normal",
            family="DejaVu Sans Mono" if mono else "DejaVu Sans",
            color=colour,
            parse_math=False,
        )

    def picture(self, alt: str) -> Picture:
        return picture_of(self._figure, alt)


def printable(text: str) -> str:
    """The text with every sign that the font has no glyph for (and every control sign) written as its code."""
    glyphs = _glyphs()
    return "".join(sign if ord(sign) in glyphs and sign.isprintable() else ascii(sign)[1:-1] for sign in text)


@functools.cache
def _glyphs() -> frozenset[int]:
    from matplotlib.font_manager import findfont, get_font

    fonts = (get_font(findfont(name)) for name in ("DejaVu Sans", "DejaVu Sans Mono"))
    return frozenset.intersection(*(frozenset(font.get_charmap()) for font in fonts))
