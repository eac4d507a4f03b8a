"""Exceptions as plain data: kind, message with its notes, frames, and what came before them; secrets masked."""

from __future__ import annotations

import traceback
from dataclasses import asdict
from typing import Any

from biokit.frames import MAX_CODE, Frame, shorten
from biokit.safe_files import to_text
from biokit.secrets import mask

MAX_MESSAGE = 4000
MAX_LINKS = 8
CAUSE, CONTEXT, MEMBER = "the cause of the next", "while this was handled, the next came", "one of the group"


def walk_chain(error: BaseException) -> list[tuple[str, BaseException]]:
    """What came before an exception, oldest first, with how it led there."""
    links: list[tuple[str, BaseException]] = []
    if isinstance(error, BaseExceptionGroup):
        links += [(MEMBER, one) for one in error.exceptions[:MAX_LINKS]]
    seen = {id(error)}
    one: BaseException | None = error
    while one is not None and len(links) < MAX_LINKS:
        relation, one = find_origin(one)
        if one is None or id(one) in seen:
            break
        seen.add(id(one))
        links.append((relation, one))
    return links[::-1]


def find_origin(error: BaseException) -> tuple[str, BaseException | None]:
    """The exception that Python shows above this one, and how it led here."""
    if error.__cause__ is not None:
        return CAUSE, error.__cause__
    return CONTEXT, None if error.__suppress_context__ else error.__context__


def tell_error(error: BaseException) -> dict[str, Any]:
    """One exception as JSON; frames outermost first, without those that only started the program."""
    kind = type(error)
    name = kind.__qualname__
    if kind.__module__ not in ("builtins", "__main__") and not kind.__module__.startswith("biokit."):
        name = f"{kind.__module__}.{name}"
    notes = [note for note in getattr(error, "__notes__", ()) if isinstance(note, str)]
    message = "\n".join([words_of(error), *notes[:MAX_LINKS]])
    frames = [asdict(frame) for frame in _frames_of(error)]
    return {"kind": name, "message": _masked(message, MAX_MESSAGE), "frames": frames}


def words_of(error: BaseException) -> str:
    """Its message."""
    try:
        return str(error)
    except Exception:  # of a class of somebody else
        return "(its message cannot be made)"


def _frames_of(error: BaseException) -> tuple[Frame, ...]:
    frames = [
        Frame(line.filename, line.lineno or 0, line.name, _masked(line.line or "", MAX_CODE))
        for line in traceback.extract_tb(error.__traceback__)
    ]
    frames = [frame for frame in frames if not frame.is_starter] or frames
    if isinstance(error, SyntaxError) and error.filename:
        frames.append(Frame(error.filename, error.lineno or 0, "", _masked((error.text or "").strip(), MAX_CODE)))
    return shorten(tuple(frames))


def _masked(text: str, limit: int) -> str:
    return to_text(mask(text[: 4 * limit]), limit)  # masked first: half a secret would not be found
