"""Cards: what happened to a run, as HTML for a notebook and as plain text for everything else.

The HTML needs no script, no style sheet and no network; without its inline styles (a code host's preview) it still
reads from top to bottom. It has no colours of its own for text and ground, so that light and dark themes show it alike.
"""

from __future__ import annotations

import math
import textwrap
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from biokit.failures import Failure, Link, RankError
from biokit.frames import Frame
from biokit.stacks import STATES, Hang, RankStack, name_ranks
from biokit.view.canvas import BLUE, GREY, VERMILLION, Rgb

GREEN: Rgb = (0.0, 0.42, 0.31)  # Okabe-Ito's bluish green and orange, darkened for white text
AMBER: Rgb = (0.60, 0.38, 0.0)
WIDTH = 110  # of plain text, in signs
MAX_EFFECTS = 40
STATE_COLOURS = {
    "finished": GREEN, "preprocessed": GREEN, "stopped": AMBER, "timed out": VERMILLION, "failed": VERMILLION,
    "interrupted": VERMILLION, "lost": VERMILLION,
}  # fmt: skip
_BOX = (
    "border:1px solid #9e9e9e;border-left:5px solid {colour};border-radius:4px;padding:10px 14px;margin:4px 0;"
    "font-size:13px;line-height:1.45;max-width:1000px"
)
_BADGE = "background:{colour};color:#ffffff;border-radius:3px;padding:2px 8px;margin-right:8px;font-weight:bold"
_PRE = (
    "white-space:pre-wrap;overflow-wrap:break-word;font-size:12px;line-height:1.4;margin:6px 0;padding:6px 10px;"
    "border-left:2px solid #9e9e9e;max-height:420px;overflow:auto"
)
_QUIET, _HEAD, _FOLD = "opacity:0.75;margin:2px 0", "margin:2px 0 6px 0;font-size:14px", "margin:4px 0"


@dataclass(frozen=True)
class Card:
    """The same content twice: HTML for a notebook, text for a terminal, a log and papermill."""

    html: str
    text: str

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/html": self.html, "text/plain": self.text}

    def __repr__(self) -> str:
        return self.text


def failure_card(failure: Failure) -> Card:
    """Why a run failed: the root cause first, with its traceback; effects a line each."""
    quiet = " · ".join(_about_failure(failure))
    html, text = [_quiet(quiet)], [_indent(quiet)]
    for number, cause in enumerate(failure.causes):
        if number:
            html.append(_fold(f"It failed by itself too: {cause}", _pre(_tell(cause))))
            text.append(_indent(f"It failed by itself too: {cause}"))
        else:
            html += _show_root(cause)
            text.append(_indent(_plain(_tell(cause, short=True)), keep=True))
            text += [_indent(_say_link(link)) for link in cause.chain]
    if failure.hang is not None:
        html += _show_hang(failure.hang)
        text += _tell_hang(failure.hang)
    if failure.effects:
        effects = _say_effects(failure.effects)
        summary = f"{_count(len(failure.effects), 'other rank')} went with it"
        html.append(_fold(summary, "".join(f"<div>{escape(line)}</div>" for line in effects)))
        text += [_indent(f"{summary}:"), *(_indent(line, 4) for line in effects)]
    if failure.tail:
        who = failure.causes[0].who if failure.causes else "the log"
        html.append(_fold(f"The end of what {who} printed", _pre(escape(failure.tail)), is_open=not _explains(failure)))
        text += [_indent(f"The end of what {who} printed:"), _indent(failure.tail, 4, keep=True)]
    if failure.logs:
        html.append(_quiet(f"All of it: <code>{escape(failure.logs)}</code>", raw=True))
        text.append(_indent(f"All of it: {failure.logs}"))
    colour, headline = VERMILLION, failure.headline or "the run failed"
    return Card(_box("FAILED", headline, colour, html), "\n".join([_wrap(f"FAILED: {headline}"), *text]))


def hang_card(hang: Hang) -> Card:
    """Where every rank stood when a run did not go on."""
    head = f"HUNG: {hang.reason}"
    return Card(_box("HUNG", hang.reason, AMBER, _show_hang(hang)), "\n".join([_wrap(head), *_tell_hang(hang)]))


def run_card(facts: Mapping[str, Any]) -> Card:
    """What a run is, from what it was made, and where it stands: see `biokit.launch.facts.describe_run`."""
    rows = list(_rows(facts))
    status = str(facts.get("status", ""))
    cells = "".join(
        f'<tr><td style="padding:1px 14px 1px 0;vertical-align:top;text-align:left;white-space:nowrap">'
        f'<b>{escape(name)}</b></td><td style="padding:1px 0;text-align:left;overflow-wrap:break-word">'
        f"{f'<code>{escape(value)}</code>' if name in _AS_CODE else escape(value)}</td></tr>"
        for name, value in rows
    )
    table = f'<table style="border-collapse:collapse;font-size:12px;margin:4px 0">{cells}</table>'
    width = max((len(name) for name, _ in rows), default=0)
    lines = [_wrap(f"{name:<{width}}  {value}", 2, width + 4) for name, value in rows]
    title = str(facts.get("run", "run"))
    html = _box(status.upper() or "RUN", title, STATE_COLOURS.get(status, BLUE), [table])
    return Card(html, "\n".join([f"{status.upper() or 'RUN'}: {title}", *lines]))
