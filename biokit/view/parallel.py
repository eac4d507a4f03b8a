"""Who holds which part of which layer in a run of many processes: computed from the configuration, nothing started."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from biokit.layouts import find_layout
from biokit.parallel.grid import ZERO_STAGE, Layout
from biokit.planning.holdings import Holdings, RankMemory, find_holdings, rank_memory
from biokit.view.canvas import FRAME, GREY, Canvas, Rgb
from biokit.view.picture import Picture

if TYPE_CHECKING:
    from biokit.config import RunConfig

MAX_RANKS = 16  # drawn
WHOLE: Rgb = (0.55, 0.79, 0.94)  # Okabe-Ito's sky blue and orange, light enough for dark figures on them
PART: Rgb = (0.96, 0.70, 0.25)
WHITE: Rgb = (1.0, 1.0, 1.0)
IN_ALL = "in all"
_MARGIN, _LABEL, _CELL, _BAR, _LINE = 12, 164, 28, 23, 17  # pixels


def show_layout(config: RunConfig, layout: Layout | int, *, vocab_size: int = 0, title: str = "") -> Picture:
    """Draw who holds which part of which layer: a column a process, a row a layer, and the memory of each beneath.

    Args:
        layout: or a number of processes, for the layout that the configuration gives them.
        vocab_size: 0: of `data.vocab_file`, or of the packaged vocabulary.

    Raises:
        ConfigError: an impossible layout; names the valid choices.
    """
    if isinstance(layout, int):
        layout = find_layout(config, layout)
    holdings = find_holdings(config, layout, vocab_size)
    title = title or f"{config.model.name} {config.model.preset} under {layout}: {_count(layout.world_size)}"
    ranks = choose_ranks(layout)
    memory = {rank: rank_memory(layout, sum(holdings.held[rank])) for rank in ranks}
    notes = _write_notes(layout, ranks)
    width = 104 if len(ranks) <= 8 else 80
    head = 38 + _LINE * (1 + len(list_places(layout, 0)))
    foot = head + _CELL * len(holdings.layers) + 12
    key = foot + _LINE * (len(_memory_rows(memory[0])) + 1)
    canvas = Canvas(
        max(640, _LABEL + width * len(ranks) + 8, 24 + 7 * max(map(len, notes))), key + _LINE * len(notes) + 24
    )
    canvas.text(_MARGIN, 19, title, size=15, bold=True)
    for row, (layer, size) in enumerate(zip(holdings.layers, holdings.sizes, strict=True)):
        y = head + _CELL * row + _BAR / 2
        canvas.text(_MARGIN, y, layer, size=12, mono=True)
        canvas.text(_LABEL - 14, y, _short(size), size=11, align="right", colour=GREY)
    for line, (name, _) in enumerate(_memory_rows(memory[0])):
        canvas.text(_MARGIN, foot + _LINE * line + 8, name, size=12, bold=name == IN_ALL)
    for column, rank in enumerate(ranks):
        _draw_rank(canvas, holdings, rank, memory[rank], (_LABEL + width * column, width - 6, head, foot))
    draw_key(canvas, key)
    for line, words in enumerate(notes):
        canvas.text(_MARGIN, key + _LINE * line + 26, words, size=12, colour=GREY)
    return canvas.picture(_describe(title, holdings, memory, notes))


def _draw_rank(
    canvas: Canvas, holdings: Holdings, rank: int, memory: RankMemory, box: tuple[float, float, float, float]
) -> None:
    """One column: who it is, its part of every layer, its memory; `box` is (left, width, top, foot) in pixels."""
    x, width, head, foot = box
    for line, words in enumerate([f"rank {rank}", *list_places(holdings.layout, rank)]):
        size = 12 if line else 13
        canvas.text(x + width / 2, 46 + _LINE * line, words, size=size, bold=not line, align="center")
    for row, count in enumerate(holdings.kept(rank)):
        y = head + _CELL * row
        canvas.box(x, y, width, _BAR, fill=WHITE, edge=FRAME, line_width=0.8, dashed=not count)
        if count:
            left, top, across, down = find_part(holdings, rank, row)
            fill = PART if (across, down) != (1, 1) else WHOLE
            part = (x + 1 + left * (width - 2), y + 1 + top * (_BAR - 2), across * (width - 2), down * (_BAR - 2))
            canvas.box(*part, fill=fill, edge=fill, line_width=0.0)
            canvas.text(x + width / 2, y + _BAR / 2, _short(count), size=12, align="center")
    for line, (name, value) in enumerate(_memory_rows(memory)):
        canvas.text(x + width / 2, foot + _LINE * line + 8, value, size=12, align="center", bold=name == IN_ALL)


def find_part(holdings: Holdings, rank: int, row: int) -> tuple[float, float, float, float]:
    """(left, top, width, height) of a rank's part of a layer, as shares: across for tensor ranks, down for ZeRO-3."""
    layout = holdings.layout
    place, held, kept = layout.place(rank), holdings.held[rank][row], holdings.kept(rank)[row]
    num_across = layout.tensor if held < holdings.sizes[row] else 1
    num_down = layout.data if kept < held else 1
    return place.tensor % num_across / num_across, place.data % num_down / num_down, 1 / num_across, 1 / num_down


def draw_key(canvas: Canvas, y: float) -> None:
    x = float(_MARGIN)
    for share, fill, words in ((1.0, WHOLE, "the whole layer"), (0.5, PART, "a part of it"), (0.0, WHITE, "nothing")):
        canvas.box(x, y - 7, 36, 14, fill=WHITE, edge=FRAME, line_width=0.8, dashed=not share)
        if share:
            canvas.box(x + 1, y - 6, 34 * share, 12, fill=fill, edge=fill, line_width=0.0)
        canvas.text(x + 44, y, words, size=12)
        x += 68 + 7 * len(words)
    canvas.text(x, y, "figures: parameters", size=12, colour=GREY)


def choose_ranks(layout: Layout) -> list[int]:
    """All ranks; where they are too many the first data rank's, then the first tensor rank's."""
    places = {rank: layout.place(rank) for rank in range(layout.world_size)}
    for rest in (lambda place: False, lambda place: place.data, lambda place: place.data or place.tensor):
        ranks = [rank for rank, place in places.items() if not rest(place)]
        if len(ranks) <= MAX_RANKS:
            break
    return ranks[:MAX_RANKS]


def _write_notes(layout: Layout, ranks: Sequence[int]) -> list[str]:
    stage, notes = ZERO_STAGE.get(layout.strategy, 0), []
    if layout.world_size > len(ranks):
        notes.append(
            f"{len(ranks)} of {layout.world_size} processes are drawn; the other data and tensor ranks hold as much."
        )
    if stage and layout.data > 1:
        cut = ("", "moments", "gradients and moments", "weights, gradients and moments")[stage]
        notes.append(f"ZeRO-{stage}: each of the {layout.data} data ranks keeps its own part of the {cut}.")
    if layout.strategy == "ZeroInf":
        notes.append("ZeroInf keeps what is cut in CPU memory or on a disk, not on the device.")
    return [*notes, "Activations and the engine's buffers come on top."]


def list_places(layout: Layout, rank: int) -> list[str]:
    """Where a rank stands, along every direction that has more than one place."""
    place = layout.place(rank)
    directions = (
        ("stage", place.pipeline, layout.pipeline),
        ("data", place.data, layout.data),
        ("tensor", place.tensor, layout.tensor),
    )
    return [f"{name} {number}" for name, number, size in directions if size > 1]


def _memory_rows(memory: RankMemory) -> list[tuple[str, str]]:
    rows = [("parameters", f"{memory.num_parameters:,}")]
    values = {"weights": memory.weights, "gradients": memory.gradients, "AdamW's moments": memory.moments}
    values |= {"DeepSpeed's copy": memory.copies} if memory.copies else {}
    return rows + [
        (name, f"{value / 1e6:.2f} MB" if value < 1e9 else f"{value / 1e9:,.2f} GB")
        for name, value in {**values, IN_ALL: memory.total}.items()
    ]


def _describe(title: str, holdings: Holdings, memory: Mapping[int, RankMemory], notes: Sequence[str]) -> str:
    lines = [f"{title}. Layers: {', '.join(holdings.layers)}"]
    for rank, found in memory.items():
        where = ", ".join(list_places(holdings.layout, rank))
        held = [
            layer if count >= size else f"{count / size:.0%} of {layer}"
            for layer, count, size in zip(holdings.layers, holdings.kept(rank), holdings.sizes, strict=True)
            if count
        ]
        lines.append(f"rank {rank}{f' ({where})' if where else ''} holds {', '.join(held)}")
        lines.append("  " + ", ".join(f"{name} {value}" for name, value in _memory_rows(found)))
    return "\n".join([*lines, *notes])


def _short(number: int) -> str:
    if number >= 1_000_000:
        return f"{number / 1e6:.3g} M" if number < 1e9 else f"{number / 1e9:.3g} G"
    return f"{number / 1e3:.3g} k" if number >= 1000 else str(number)


def _count(world_size: int) -> str:
    return f"{world_size} process{'es' if world_size > 1 else ''}"
