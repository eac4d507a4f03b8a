"""A finished view: a PNG with the same content in words. One mime bundle shows it everywhere, offline."""

from __future__ import annotations

import base64
import io
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from biokit.errors import RunError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Picture:
    """A PNG and its alternative text; a notebook shows the first, a screen reader and a terminal read the second."""

    png: bytes
    alt: str

    def __post_init__(self) -> None:
        if not self.png.startswith(PNG_SIGNATURE):
            raise RunError("a picture", f"its bytes are not a PNG ({self.png[:8]!r}...)", "Give PNG bytes")

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, from the PNG's header."""
        width, height = struct.unpack(">II", self.png[16:24])
        return width, height

    def save(self, path: str | Path) -> Path:
        """Write the PNG; folders on the way are made.

        Raises:
            RunError: the name does not end in .png, or the file cannot be written.
        """
        target = Path(path)
        if target.suffix.lower() != ".png":
            raise RunError(f"save {target}", f'the ending is "{target.suffix}"', "Give a name that ends in .png")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(self.png)
        except OSError as error:
            raise RunError(f"save {target}", f"it cannot be written ({error})", "Give another path") from error
        return target

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"image/png": base64.b64encode(self.png).decode("ascii"), "text/plain": self.alt}

    def __repr__(self) -> str:
        return self.alt


def picture_of(figure: Figure, alt: str) -> Picture:
    """Render a matplotlib figure to a PNG that carries its alternative text (`Description`) in itself."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    alt = alt.encode("utf-8", "backslashreplace").decode("utf-8")  # half a surrogate pair fits in no file
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", metadata={"Description": alt.replace("\n", " "), "Software": None})
    return Picture(buffer.getvalue(), alt)


def frame_axes(axes: Axes) -> None:
    """The frame that all diagrams share: a pale grid, no line above or on the right."""
    axes.grid(True, color="#e4e4e4", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
