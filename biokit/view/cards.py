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
from html import escape, unescape
from typing import Any

from biokit.endings import Link, RankError
from biokit.failures import Failure
from biokit.frames import Frame
from biokit.stacks import WAITS, Hang, RankStack, name_ranks
from biokit.view.canvas import BLUE, VERMILLION, Rgb
from biokit.view.paths import show_near

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
    "font-size:13px;line-height:1.45;max-width:1000px;overflow-wrap:break-word"
)
_BADGE = "background:{colour};color:#ffffff;border-radius:3px;padding:2px 8px;margin-right:8px;font-weight:bold"
_PRE = (
    "white-space:pre-wrap;overflow-wrap:break-word;font-size:12px;line-height:1.4;margin:6px 0;padding:6px 10px;"
    "border-left:2px solid #9e9e9e;max-height:420px;overflow:auto"
)
_TABLE = "table-layout:fixed;width:100%;border-collapse:collapse;font-size:12px;margin:4px 0"
_LEFT = "padding:1px 14px 1px 0;vertical-align:top;text-align:left;width:90px"
_RIGHT = "padding:1px 0;vertical-align:top;text-align:left;white-space:pre-wrap;overflow-wrap:break-word"
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
    html, text = ([_quiet(quiet)], [_indent(quiet)]) if quiet else ([], [])
    for root in failure.causes[:1]:
        html += _show_root(root)
        if root.frames or not root.is_signal:
            text.append(_indent(_plain(_tell(root, short=True)), keep=True))
        text += [_indent(_say_link(link)) for link in root.chain]
    for words, cause in _group_causes(failure.causes):
        html.append(_fold(words, _pre(_tell(cause))) if cause is not failure.causes[0] else _quiet(words))
        text.append(_indent(words))
    if failure.hang is not None:
        html += _show_hang(failure.hang)
        text += _tell_hang(failure.hang)
    if failure.effects:
        effects = _say_effects(failure.effects)
        summary = f"{_count(len(failure.effects), 'other rank')} went with it"
        if len(effects) == 1:
            html.append(_quiet(f"{summary}: {effects[0]}"))
        else:
            html.append(_fold(summary, "".join(f"<div>{escape(line)}</div>" for line in effects)))
        text.append(_indent(f"{summary}: {'; '.join(effects)}"))
    if failure.tail:
        html.append(_fold("The end of its output", _pre(escape(failure.tail)), is_open=not _explains(failure)))
        text += [
            _indent("The end of its output:"),
            *(f"    {_cut(line)}" for line in failure.tail.split("\n")),
        ]
    if failure.logs:
        logs = show_near(failure.logs)
        html.append(_quiet(f"All of it: <code>{escape(logs)}</code>", raw=True))
        text.append(f"  All of it: {logs}")
    if failure.hang is not None and not failure.causes:
        return _card("HUNG", failure.hang.reason, AMBER, html, text)
    return _card("FAILED", failure.headline or "the run failed", VERMILLION, html, text)


def hang_card(hang: Hang) -> Card:
    """Where every rank stood when a run did not go on."""
    return _card("HUNG", hang.reason, AMBER, _show_hang(hang), _tell_hang(hang))


def run_card(facts: Mapping[str, Any]) -> Card:
    """What a run is, from what it was made, and where it stands: see `biokit.launch.facts.describe_run`."""
    rows = list(_rows(facts))
    cells = "".join(
        f'<tr><td style="{_LEFT}"><b>{escape(name)}</b></td><td style="{_RIGHT}">{_cell(name, value)}</td></tr>'
        for name, value in rows
    )
    width = max((len(name) for name, _ in rows), default=0)
    lines = [
        f"  {name:<{width}}  {value}" if name in _AS_CODE else _wrap(f"{name:<{width}}  {value}", 2, width + 4)
        for name, value in rows
    ]
    status, table = str(facts.get("status", "")), f'<table style="{_TABLE}">{cells}</table>'
    title = str(facts.get("run", "run"))
    return _card(status.upper() or "RUN", title, STATE_COLOURS.get(status, BLUE), [table], lines)


def _about_failure(failure: Failure) -> Iterable[str]:
    """Few words around the headline: when, where, how far it had come."""
    if failure.step:
        loss = f", loss {failure.loss:.4f}" if math.isfinite(failure.loss) else ""
        yield f"last step {failure.step}{loss}"
    root = failure.causes[0] if failure.causes else None
    if root is not None and root.host:
        yield f"{root.who} on {root.host}"
    if root is not None and root.time > 0:
        yield _say_time(root.time)
    if failure.life > 1:
        yield f"life {failure.life}"


def _show_root(cause: RankError) -> Iterable[str]:
    if not cause.frames and cause.is_signal:  # the headline says all that is known
        return
    short, whole = _tell(cause, short=True), _tell(cause)
    yield _pre(short)
    if short != whole:
        yield _fold("The whole traceback", _pre(whole))
    for link in cause.chain:
        yield _fold(_say_link(link), _pre(_stack(link.frames, f"{link.kind}: {link.message}")))


def _group_causes(causes: Sequence[RankError]) -> Iterable[tuple[str, RankError]]:
    """(words, one of them) for the causes beside the root, those that are alike together."""
    groups: dict[tuple[str, str, str], list[RankError]] = {}
    for one in causes:
        groups.setdefault((one.kind, one.message, one.place), []).append(one)
    for number, alike in enumerate(groups.values()):
        others = alike if number else alike[1:]
        if others:
            names, words = name_ranks(sorted(one.rank for one in others)), alike[0].words
            alone = "themselves" if len(others) > 1 else "itself"
            yield f"By {alone} too: {names} {words}" if number else f"{names} failed in the same way", alike[0]


def _say_link(link: Link) -> str:
    first = link.message.split("\n", 1)[0]
    return f"Before it ({link.relation}): {link.kind}{f': {first}' if first else ''}"


def _tell(error: RankError, short: bool = False) -> str:
    """A traceback as HTML."""
    what = f"{error.kind}{f': {error.message}' if error.message else ''}"
    return _stack(_without_library(error.frames) if short else error.frames, what)


def _stack(frames: Sequence[Frame], what: str) -> str:
    lines = [_line(frame) for frame in frames]
    return "\n".join([*lines, f"<b>{escape(what)}</b>"])


def _line(frame: Frame) -> str:
    """One frame, with its source line below it; the user's own in bold."""
    name = f", in {frame.function}" if frame.function and frame.function != "<module>" else ""
    head = f"{escape(frame.place)}{escape(name)}"
    code = f"\n    {escape(frame.code)}" if frame.code else ""
    return f"<b>{head}</b>{code}" if frame.is_own else f"{head}{code}"


def _without_library(frames: Sequence[Frame]) -> list[Frame]:
    """The user's own frames and the last one; a word stands for each run of others between them."""
    kept: list[Frame] = []
    hidden = 0
    for index, frame in enumerate(frames):
        if frame.is_own or not frame.line or index + 1 == len(frames):
            if hidden:
                kept.append(Frame(f"    ... {_count(hidden, 'line')} of libraries ...", 0, ""))
            kept.append(frame)
            hidden = 0
        else:
            hidden += 1
    return kept


def _say_effects(effects: Sequence[RankError]) -> list[str]:
    """A line for each kind of effect."""
    groups: dict[str, list[int]] = {}
    for one in effects:
        groups.setdefault(one.words, []).append(one.rank)
    lines = [f"{name_ranks(sorted(ranks))} {words}" for words, ranks in groups.items()]
    left_out = len(lines) - MAX_EFFECTS
    return lines[:MAX_EFFECTS] + ([f"... and {left_out} more"] if left_out > 0 else [])


def _explains(failure: Failure) -> bool:
    """Whether the root cause tells where it happened; else its output is looked at first."""
    return bool(failure.causes and failure.causes[0].frames) or failure.hang is not None


def _show_hang(hang: Hang) -> list[str]:
    parts = [f'<p style="{_FOLD}"><b>{escape(hang.verdict)}</b></p>']
    for words, stack in _group_stacks(hang):
        if stack.frames:
            inner = _pre("\n".join(_line(frame) for frame in reversed(stack.frames)))
            parts.append(_fold(words, inner, is_open=stack.state != WAITS))
        else:
            parts.append(f'<div style="{_FOLD}">{escape(words)}</div>')
    return parts


def _tell_hang(hang: Hang) -> list[str]:
    lines = [_indent(hang.verdict)]
    for words, stack in _group_stacks(hang):
        lines.append(_indent(words))
        lines += [_indent(_plain(_line(frame)), 4, keep=True) for frame in _without_library(stack.frames[::-1])]
    return lines


def _group_stacks(hang: Hang) -> Iterable[tuple[str, RankStack]]:
    """(words, one of them) for the ranks that stand alike; those that do not wait for others first."""
    groups: dict[Any, list[RankStack]] = {}
    for stack in hang.ranks:
        groups.setdefault((stack.state, stack.collective, stack.busy, stack.frames), []).append(stack)
    for alike in sorted(groups.values(), key=lambda alike: (alike[0].state == WAITS, alike[0].rank)):
        stack, ranks = alike[0], name_ranks(sorted(one.rank for one in alike))
        hosts = sorted({one.host for one in alike if one.host})
        where = f" on {hosts[0]}" if len(hosts) == 1 else f" on {len(hosts)} hosts" if hosts else ""
        what = f"in {stack.collective}" if stack.collective else stack.state
        yield f"{ranks}{where}: {what}{f', {stack.place}' if stack.place else ''}", stack


_AS_CODE = ("command", "config", "data", "git")
_NAMES = {"config_hash": "config", "data_hash": "data", "line": "command", "num_parameters": "parameters"}


def _rows(facts: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """(name, value) as texts; what belongs together in one row."""
    rest = dict(facts)
    for name in ("run", "status"):
        rest.pop(name, None)
    if "step" in rest:
        step, of = rest.pop("step"), rest.pop("num_steps", 0)
        yield "step", f"{step} of {of}" if of else str(step)
    if "life" in rest:
        life, last = rest.pop("life"), rest.pop("last_life", 0)
        yield "life", f"{life}, of at most {last}" if last else str(life)
    for name, value in rest.items():
        yield _NAMES.get(name, name), _say_value(name, value)


def _say_value(name: str, value: Any) -> str:
    if name == "line":
        return show_near(str(value))
    if name in ("started", "ended") and isinstance(value, (int, float)):
        return _say_time(value)
    if name == "git" and isinstance(value, Mapping):
        commit = str(value.get("commit", ""))[:12]
        changes = value.get("changes")
        return f"{commit}{f' with changes ({changes})' if changes else ' with changes' if value.get('dirty') else ''}"
    if name == "settings" and isinstance(value, Mapping):
        return " ".join(f"{key}={entry}" for key, entry in value.items())
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_say_value('', entry)}" for key, entry in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_say_value("", entry) for entry in value)
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 1e4 else f"{value:,.0f}"
    if name.endswith("_hash"):
        return str(value)[:16]
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _say_time(unix_time: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_time))
    except (OverflowError, ValueError, OSError):  # of no year
        return str(unix_time)


def _cell(name: str, value: str) -> str:
    return f"<code>{escape(value)}</code>" if name in _AS_CODE else escape(value)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


def _card(badge: str, head: str, colour: Rgb, html: Iterable[str], text: Iterable[str]) -> Card:
    hexed = "#" + "".join(f"{round(255 * part):02x}" for part in colour)
    title = f'<span style="{_BADGE.format(colour=hexed)}">{escape(badge)}</span><b>{escape(head)}</b>'
    box = f'<div style="{_BOX.format(colour=hexed)}"><div style="{_HEAD}">{title}</div>{"".join(html)}</div>'
    return Card(box, "\n".join([_wrap(f"{badge}: {head}"), *text]))


def _fold(summary: str, inner: str, is_open: bool = False) -> str:
    state = " open" if is_open else ""
    return (
        f'<details{state} style="{_FOLD}"><summary style="cursor:pointer">{escape(summary)}</summary>{inner}</details>'
    )


def _pre(html: str) -> str:
    return f'<pre style="{_PRE}">{html}</pre>'


def _quiet(words: str, raw: bool = False) -> str:
    return f'<div style="{_QUIET}">{words if raw else escape(words)}</div>'


def _cut(line: str) -> str:
    return line if len(line) <= WIDTH else f"{line[:WIDTH]} ..."


def _plain(html: str) -> str:
    """What `_stack` made, as text."""
    return unescape(html.replace("<b>", "").replace("</b>", ""))


def _wrap(text: str, indent: int = 0, hanging: int | None = None) -> str:
    more = " " * (indent + 2 if hanging is None else hanging)
    lines = textwrap.wrap(text, WIDTH, initial_indent=" " * indent, subsequent_indent=more, break_on_hyphens=False)
    return "\n".join(lines)


def _indent(text: str, indent: int = 2, keep: bool = False) -> str:
    """Text moved in; one paragraph, or with its lines kept."""
    if not keep:
        return _wrap(text, indent)
    lines = textwrap.indent(text, " " * indent).split("\n")
    return "\n".join(_wrap(line, 0, 2 * indent) if len(line) > WIDTH else line for line in lines)
