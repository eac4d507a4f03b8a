"""A picture that comes alive where scripts run: one mime bundle of a small web page, a PNG and words.

The page holds everything it needs (script, data, images) and asks no server and no kernel for anything, so it works in
JupyterLab, in a papermill output, and in a page of `nbconvert --to html` opened offline. Until its script runs, and
where none may, it shows the PNG.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from biokit.view.picture import Picture


@dataclass(frozen=True, repr=False)
class InteractiveView(Picture):
    """A picture with a script that takes its place.

    Attributes:
        script: the file in `biokit/view/scripts` whose function draws the view.
        data: what the function gets, as JSON.
    """

    script: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)

    def page(self) -> str:
        """The view as a piece of HTML."""
        data = script_json(self.data)
        name = "biokit-" + hashlib.sha256(f"{self.script}{data}".encode()).hexdigest()[:16]
        picture = f'<img src="{data_address(self.png)}" alt="{html.escape(self.alt)}" style="max-width:100%">'
        start = f'biokitView(document.getElementsByClassName("{name}"), {data});'
        script = f"<script>(function(){{{self.code()}{start}}})();</script>"
        return f'<div class="biokit-view {name}">{picture}</div>{script}'

    def code(self) -> str:
        """The functions of the script: the shared ones and the view's own."""
        return read_script("base.js") + read_script(self.script)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/html": self.page(), **super()._repr_mimebundle_(include, exclude)}


def data_address(png: bytes) -> str:
    """A PNG as an address that holds the picture itself."""
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def script_json(value: Any) -> str:
    """JSON that may stand inside a script element: no text in it ends the element or opens a comment."""
    return script_code(json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":")))


def script_code(text: str) -> str:
    """The same for JavaScript that has these signs in its texts only."""
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@functools.cache
def read_script(name: str) -> str:
    """A script of `biokit/view/scripts`."""
    return (files("biokit.view") / "scripts" / name).read_text(encoding="utf-8")
