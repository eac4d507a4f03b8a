"""A plan as a picture: the fastest layouts, what each rank of the best one holds, and where a step's time goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from textwrap import wrap

from biokit.parallel.grid import Layout
from biokit.planning.holdings import Holdings, find_holdings
from biokit.planning.parts import PARTS
from biokit.planning.plans import GIB, Plan, PlanTable
from biokit.planning.report import TIMES, describe_job, explain_best, write_report
from biokit.planning.schedule import ACTIVATION, BACKWARD, FORWARD, GRADIENT, Span
from biokit.planning.timing import SEND, UPDATE
from biokit.view.canvas import FRAME, GREY, INK, PALE, VERMILLION, Canvas, Rgb
from biokit.view.parallel import PART, WHOLE, choose_ranks, find_part, list_places
from biokit.view.picture import Picture

# Okabe and Ito's colours, which colour-blind readers tell apart
SKY, BLUE, GREEN = (0.34, 0.71, 0.91), (0.0, 0.45, 0.70), (0.0, 0.62, 0.45)
ORANGE, PURPLE, YELLOW = (0.90, 0.62, 0.0), (0.80, 0.47, 0.65), (0.94, 0.89, 0.26)
PART_COLOURS: dict[str, Rgb] = dict(zip(PARTS, (BLUE, SKY, GREEN, ORANGE, PURPLE), strict=True))
TIME_COLOURS: dict[str, Rgb] = dict(zip(TIMES, (BLUE, ORANGE, YELLOW, PALE, PURPLE, GREEN), strict=True))
SPAN_COLOURS: dict[str, Rgb] = {
    FORWARD: SKY,
    BACKWARD: BLUE,
    ACTIVATION: YELLOW,
    GRADIENT: ORANGE,
    SEND: PURPLE,
    UPDATE: GREEN,
}
SPAN_WORDS = {
    FORWARD: "forward",
    BACKWARD: "backward",
    ACTIVATION: "activations handed on",
    GRADIENT: "gradients handed back",
    SEND: "gradients and weights",
    UPDATE: "update",
}
MOST_PLANS, MOST_STAGES, MOST_EQUAL = 8, 16, 6  # rows that are drawn, and columns of ranks that hold as much
LINE_LENGTH = 138  # characters
WIDTH, MARGIN, LABEL, ROW = 1000, 14, 232, 22  # pixels
GRID_HEIGHT, BAR_HEIGHT, LEAST_ROW = 360, 130, 6


def show_plan(table: PlanTable, title: str = "") -> Picture:
    """Draw a plan; the picture's words are the whole report."""
    job, best = table.job, table.best
    holdings = find_holdings(job.configure(best.case), best.case.layout, job.blueprint.vocab_size)
    heading = describe_job(table).splitlines()
    shown, ranks = table.plans[:MOST_PLANS], _choose_columns(best.case.layout)
    why = _wrap(explain_best(table))
    row = max(LEAST_ROW, min(ROW, GRID_HEIGHT // len(holdings.layers)))
    stages = range(min(MOST_STAGES, best.case.layout.pipeline))
    heights = (
        34 + 18 * len(heading),
        62 + ROW * len(shown),
        30 + 17 * len(why),
        66 + row * len(holdings.layers) + BAR_HEIGHT + 60,
        82 + ROW * len(stages),
    )
    tops = list(accumulate(heights))
    canvas = Canvas(WIDTH, tops[-1] + 8)
    canvas.text(
        MARGIN, 18, title or f"Plan: {heading[0].partition(':')[0]} on {table.num_gpus} GPUs", size=16, bold=True
    )
    for line, words in enumerate(heading):
        canvas.text(MARGIN, 42 + 18 * line, words, size=12, colour=GREY)
    _draw_layouts(canvas, tops[0], shown, table.unit)
    for line, words in enumerate(why):
        canvas.text(MARGIN, tops[1] + 14 + 17 * line, words, size=12)
    _draw_ranks(canvas, tops[2], table, holdings, ranks, row)
    _draw_timeline(canvas, tops[3], best, stages)
    return canvas.picture(f"{write_report(table)}\n\n{_describe_ranks(table)}")


def _choose_columns(layout: Layout) -> list[int]:
    """Ranks that are drawn: where all hold as much, the first few, whose parts of a ZeRO-3 layer differ."""
    if layout.tensor * layout.pipeline == 1:
        return list(range(min(MOST_EQUAL, layout.data)))
    return choose_ranks(layout)


def _draw_layouts(canvas: Canvas, top: float, plans: Sequence[Plan], unit: tuple[str, int]) -> None:
    """A row a layout: its need and its step, the time by part."""
    canvas.text(MARGIN, top + 10, "Layouts that fit, fastest first", size=13, bold=True)
    name, size = unit
    canvas.text(LABEL + 116, top + 10, f"{name} a rank", size=12, align="right", colour=GREY)
    left, width = LABEL + 140, WIDTH - LABEL - 140 - 100
    canvas.text(left, top + 10, "a step's time", size=12, colour=GREY)
    longest = max(plan.step.total for plan in plans)
    for number, plan in enumerate(plans):
        y = top + 30 + ROW * number
        canvas.text(MARGIN, y + 8, str(plan), size=12, bold=not number)
        canvas.text(LABEL + 116, y + 8, f"{plan.peak.total / size:.1f}", size=12, align="right")
        x = float(left)
        for name, seconds in plan.step.parts.items():
            across = width * seconds / longest
            canvas.bar(x, y, across, 15, TIME_COLOURS[name])
            x += across
        canvas.text(x + 6, y + 8, f"{1e3 * plan.step.total:,.1f} ms", size=12)
    used = {name: TIME_COLOURS[name] for name in TIMES if any(plan.step.parts[name] > 0 for plan in plans)}
    _draw_key(canvas, (MARGIN, top + 42 + ROW * len(plans)), {TIMES[name]: colour for name, colour in used.items()})


def _draw_ranks(
    canvas: Canvas, top: float, table: PlanTable, holdings: Holdings, ranks: Sequence[int], row: float
) -> None:
    """A column a rank of the best layout: its part of every layer, and its memory at its fullest."""
    best, layout = table.best, table.best.case.layout
    others = f", {len(ranks)} of its {layout.world_size} ranks" if len(ranks) < layout.world_size else ""
    canvas.text(MARGIN, top + 12, f"The best: {best}{others}", size=13, bold=True)
    _draw_key(canvas, (WIDTH - 320, top + 12), {"a whole layer": WHOLE, "a part of one": PART, "none": PALE})
    width = min(112.0, (WIDTH - LABEL - MARGIN) / len(ranks))
    head = top + 58
    step = max(1, round(12 / row))
    for number, layer in enumerate(holdings.layers):
        if number % step == 0:
            canvas.text(MARGIN, head + row * (number + 0.5), layer, size=min(12, max(9, row * step - 1)), mono=True)
    foot = head + row * len(holdings.layers) + 12
    for line, words in enumerate(
        ("memory of the fullest", "instant of each rank", f"(limit {table.limit / GIB:.1f} GiB)")
    ):
        canvas.text(MARGIN, foot + 12 + 17 * line, words, size=12)
    for column, rank in enumerate(ranks):
        x = LABEL + width * column
        for line, words in enumerate([f"rank {rank}", ", ".join(list_places(layout, rank))]):
            size = 12 if line == 0 else min(11.0, 1.7 * width / max(1, len(words)))
            canvas.text(x + width / 2 - 3, top + 32 + 15 * line, words, size=size, bold=not line, align="center")
        _draw_layers(canvas, holdings, rank, (x, head, width - 6, row))
        _draw_memory(canvas, (x, foot, width - 6), table, layout.place(rank).pipeline)
    parts = best.peak.parts()
    unit, size = table.unit
    key = {f"{part} {parts[part] / size:.2f} {unit}": PART_COLOURS[part] for part in PARTS}
    canvas.text(MARGIN, foot + BAR_HEIGHT + 22, "fullest rank:", size=12)
    _draw_key(canvas, (MARGIN + 96, foot + BAR_HEIGHT + 22), key)


def _draw_layers(canvas: Canvas, holdings: Holdings, rank: int, box: tuple[float, float, float, float]) -> None:
    """A rank's part of every layer; `box` is (left, top, width, height of a row)."""
    x, head, width, row = box
    for number, count in enumerate(holdings.kept(rank)):
        y = head + row * number
        canvas.bar(x, y, width, row - 1.5, PALE)
        if count:
            left, top, across, down = find_part(holdings, rank, number)
            fill = PART if (across, down) != (1, 1) else WHOLE
            # a sliver of one of many data ranks is still to be seen
            shown = max(across, 3 / width), max(down, 2 / row)
            y_in = min(top, 1 - shown[1])
            canvas.bar(
                x + min(left, 1 - shown[0]) * width, y + y_in * row, shown[0] * width, shown[1] * (row - 1.5), fill
            )


def _draw_memory(canvas: Canvas, box: tuple[float, float, float], table: PlanTable, stage: int) -> None:
    """The memory of a stage's rank as a column of parts, up to the device's; `box` is (left, top, width)."""
    x, top, width = box
    peak, most = table.best.peaks[stage], table.memory_gib * GIB
    bottom = top + BAR_HEIGHT
    canvas.bar(x, top, width, BAR_HEIGHT, PALE)
    y = float(bottom)
    for part, nbytes in peak.parts().items():
        down = BAR_HEIGHT * nbytes / most
        y -= down
        canvas.bar(x, y, width, down, PART_COLOURS[part])
    limit = bottom - BAR_HEIGHT * table.limit / most
    canvas.line((x - 2, limit), (x + width + 2, limit), VERMILLION, dashed=True)
    above = y - 9 if y - 18 > limit or y > bottom - 20 else y + 10  # never on the limit's line
    canvas.text(x + width / 2, above, f"{peak.total / table.unit[1]:.1f}", size=12, align="center", bold=True)


def _draw_timeline(canvas: Canvas, top: float, plan: Plan, stages: range) -> None:
    """What each stage does when, in one step."""
    step, layout = plan.step, plan.case.layout
    bubble = f"; bubble {step.bubble_share:.0%} of the slots, stages wait {step.idle:.0%} of their time"
    bubble *= layout.pipeline > 1
    several = f"{plan.case.num_micros} micro-batch{'es' * (plan.case.num_micros > 1)} of {plan.case.micro_batch_size}"
    words = f"A step of {several}: {1e3 * step.total:,.1f} ms{bubble}"
    canvas.text(MARGIN, top + 12, words, size=13, bold=True)
    left, width = LABEL - 120, WIDTH - LABEL + 120 - MARGIN
    scale = width / max(span.end for span in step.spans)
    for stage in stages:
        y = top + 28 + ROW * stage
        canvas.text(MARGIN, y + 8, f"stage {stage}" if layout.pipeline > 1 else "each rank", size=12)
        canvas.bar(left, y, width, 16, PALE)
        _draw_spans(canvas, (left, y, scale), [span for span in step.spans if span.stage == stage])
    foot = top + 34 + ROW * len(stages)
    canvas.text(left, foot + 4, "0", size=11, colour=GREY)
    canvas.text(left + width, foot + 4, f"{1e3 * step.total:,.1f} ms", size=11, align="right", colour=GREY)
    used = {span.what for span in step.spans if span.end > span.start}
    key = {SPAN_WORDS[what]: colour for what, colour in SPAN_COLOURS.items() if what in used}
    _draw_key(canvas, (MARGIN, foot + 28), {**key, **({"waiting": PALE} if layout.pipeline > 1 else {})})


def _draw_spans(canvas: Canvas, place: tuple[float, float, float], spans: Sequence[Span]) -> None:
    """`place` is (left, top, pixels a second)."""
    left, y, scale = place
    for span in spans:
        width = (span.end - span.start) * scale
        if width > 0:
            gap = 0.6 if width > 4 else 0.0  # so that equal neighbours can be told apart
            canvas.bar(left + span.start * scale, y, width - gap, 16, SPAN_COLOURS[span.what])


def _draw_key(canvas: Canvas, place: tuple[float, float], entries: Mapping[str, Rgb]) -> None:
    x, y = place
    for words, colour in entries.items():
        if x + 24 + 7 * len(words) > WIDTH:
            x, y = place[0], y + 17
        canvas.box(x, y - 6, 18, 12, fill=colour, edge=FRAME, line_width=0.6)
        canvas.text(x + 24, y, words, size=12, colour=INK)
        x += 42 + 6.4 * len(words)


def _wrap(words: str) -> list[str]:
    return [line for paragraph in words.splitlines() for line in wrap(paragraph, LINE_LENGTH)]


def _describe_ranks(table: PlanTable) -> str:
    """The best layout's memory by stage, in words."""
    unit, size = table.unit
    lines = [f"Memory of {table.best} at the fullest instant of each stage's ranks, in {unit}:"]
    for stage, peak in enumerate(table.best.peaks):
        lines.append(f"  stage {stage}, {peak.where}: {peak.total / size:.2f}")
        lines += [
            f"    {item.nbytes / size:9.3f} {'on the host' if item.on_host else item.part}: {item.what}"
            for item in peak.items
        ]
    return "\n".join(lines)
