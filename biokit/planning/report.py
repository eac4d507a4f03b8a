"""A plan in words: a table of layouts, why the best is best, and what was taken for granted."""

from __future__ import annotations

from collections.abc import Sequence

from biokit.config import config_to_dict
from biokit.planning.communication import sum_traffic
from biokit.planning.devices import HOP_S, LAUNCH_S, LINK_SHARE, MATMUL_SHARE, MEMORY_SHARE
from biokit.planning.parts import PARTS
from biokit.planning.plans import GIB, TOLERANCE, Plan, PlanTable, samples_per_step

MOST_ROWS = 12
TIMES = {
    "compute": "computing",
    "tensor": "sums over the tensor ranks",
    "pipeline": "tensors handed from stage to stage",
    "bubble": "the pipeline's bubble",
    "data": "gradients and weights over the data ranks",
    "update": "the update",
}


def write_report(table: PlanTable, num_rows: int = MOST_ROWS) -> str:
    """The whole plan as text; `num_rows`: layouts shown, 0: all."""
    blocks = [
        describe_job(table),
        _write_table(table.plans[: num_rows or None], table.unit),
        _count_hidden(table, num_rows),
        explain_best(table),
        _explain_repeats(table.best),
        _write_messages(table.plans[: num_rows or None]),
        _explain_too_large(table),
        "Taken for granted:\n" + "\n".join(f"  {line}" for line in list_assumptions(table)),
    ]
    return "\n\n".join(block for block in blocks if block)


def describe_job(table: PlanTable) -> str:
    """The run and the machine, in two lines."""
    job, config, device = table.job, table.job.config, table.machine.device
    model = f"{config.model.name} {config.model.preset}"
    nodes = -(-table.num_gpus // table.machine.gpus_per_node)
    return (
        f"{model}: {job.num_parameters:,} parameters, {samples_per_step(table):,} samples a step of "
        f"{job.rehearsal.length} tokens a side, {config.train.precision}\n"
        f"{table.num_gpus} x {device.name} in {nodes} node{'s' * (nodes > 1)}, {table.memory_gib:g} GiB each, "
        f"of which {table.limit / GIB:.1f} to plan with"
    )


def list_cells(plan: Plan, unit: tuple[str, int]) -> dict[str, str]:
    """A plan's row: head -> cell; `unit`: of sizes, its name and its bytes."""
    parts, seconds = plan.peak.parts(), plan.step.parts
    name, size = unit
    return {
        "layout": str(plan.case.layout),
        "micro": f"{plan.case.num_micros} x {plan.case.micro_batch_size}",
        "recompute": "yes" if plan.case.recompute else "no",
        f"{name} a rank": f"{plan.peak.total / size:.2f}",
        **{part: f"{parts[part] / size:.2f}" for part in PARTS},
        "ms a step": f"{1e3 * plan.step.total:.1f}",
        **{part: f"{1e3 * seconds[part]:.1f}" for part in TIMES},
    }


def explain_best(table: PlanTable) -> str:
    """Why the first is first, and what the next one loses."""
    best, seconds = table.best, table.best.step.parts
    dearest = max(seconds, key=lambda name: seconds[name])
    spare = (best.limit - best.peak.total) / GIB
    words = (
        f"Best: {best}, {1e3 * best.step.total:.1f} ms a step. {seconds[dearest] / best.step.total:.0%} of it is "
        f"{TIMES[dearest]}; its fullest rank (stage {best.worst_stage}, {best.peak.where}) leaves {spare:.1f} GiB free."
    )
    if len(table.plans) > 1:
        words += f" {_compare(best, table.plans[1])}"
    host = best.peak.host / GIB
    if host >= 1:
        words += (
            f" It keeps {host:.1f} GiB a rank, {host * table.machine.gpus_per_node:,.0f} a node, in the host's memory."
        )
    changed = list_settings(best)
    return words + (f"\nRun it with: {' '.join(changed)}" if changed else "\nThe configuration asks for it already.")


def list_settings(plan: Plan) -> list[str]:
    """Overrides that make the configuration run so; those that it has already are left out."""
    tree = config_to_dict(plan.job.config)

    def current(key: str) -> object:
        value = tree
        for name in key.split("."):
            value = value[name]
        return value

    return [f"{key}={value}" for key, value in plan.case.settings().items() if current(key) != value]


def explain_misfit(plan: Plan) -> str:
    """Which part is too large."""
    parts = plan.peak.parts()
    largest = max(parts, key=lambda part: parts[part])
    total, of_it = plan.peak.total / GIB, parts[largest] / GIB
    return f"{plan}: {total:.1f} GiB in the {plan.peak.where}, {of_it:.1f} of them {largest}"


def list_assumptions(table: PlanTable) -> list[str]:
    """What the figures rest on."""
    device, precision = table.machine.device, table.job.config.train.precision
    return [
        f"{device.describe(precision)}; reached: {MATMUL_SHARE:.0%} of the rate in matrix products, {MEMORY_SHARE:.0%} "
        f"of the memory's, {LINK_SHARE:.0%} of the links'",
        f"an operation takes {LAUNCH_S * 1e6:g} us to start; a hop {HOP_S[True] * 1e6:g} us in a node, "
        f"{HOP_S[False] * 1e6:g} us between nodes; rings over the adapters of all GPUs of a group",
        f"every sequence has {table.job.rehearsal.length} tokens: shorter ones need less (--sequence-length); "
        "micro-batches are the configured ones, smaller where those do not divide the batch or do not fit",
        f"{table.reserve_gib:g} GiB a GPU are left to the driver, NCCL and the allocator's gaps (not measured)",
        "activations and operations are those of the model's own layers, run without storage; DDP and DeepSpeed with "
        "overlap_comm hide messages behind the backward pass, nothing hides those of tensor ranks and stages",
        "ZeroInf's update, in the host's memory, runs at the rate of the link to the host",
        "reading data, metrics and checkpoints take no time; the times have not been measured on such a machine",
    ]


def _write_table(plans: Sequence[Plan], unit: tuple[str, int]) -> str:
    return _align([list_cells(plan, unit) for plan in plans])


def _align(rows: Sequence[dict[str, str]]) -> str:
    """Rows below their heads; the layout on the left, figures on the right."""
    heads = list(rows[0])
    widths = {head: max(len(head), *(len(row[head]) for row in rows)) for head in heads}
    lines = [{head: head for head in heads}, *rows]
    return "\n".join(
        "  ".join(line[h].ljust(widths[h]) if h == "layout" else line[h].rjust(widths[h]) for h in heads).rstrip()
        for line in lines
    )


def _count_hidden(table: PlanTable, num_rows: int) -> str:
    hidden = len(table.plans) - num_rows if num_rows else 0
    return f"{hidden} more layouts fit and are slower." if hidden > 0 else ""


def _compare(best: Plan, other: Plan) -> str:
    lost = {name: other.step.parts[name] - best.step.parts[name] for name in TIMES}
    dearest = max(lost, key=lambda name: lost[name])
    share = other.step.total / best.step.total - 1
    spends = (
        f"{1e3 * other.step.parts[dearest]:.1f} instead of {1e3 * best.step.parts[dearest]:.1f} ms for {TIMES[dearest]}"
    )
    if abs(share) <= TOLERANCE:
        return f"The next, {other}, is as fast within {TOLERANCE:.0%} ({share:+.1%}) and less simple: {spends}."
    return f"The next, {other}, takes {share:.1%} longer: {spends}."


def _write_messages(plans: Sequence[Plan]) -> str:
    """What the fullest rank of each layout sends and receives, by kind, and how long its stages wait."""
    sums = [sum_traffic(plan.traffic[plan.worst_stage]) for plan in plans]
    kinds = list(dict.fromkeys(kind for found in sums for kind in found))
    if not kinds:
        return ""
    rows = []
    for plan, found in zip(plans, sums, strict=True):
        row = {"layout": str(plan.case.layout), "recompute": "yes" if plan.case.recompute else "no"}
        row |= {kind: _write_amount(*found[kind]) if kind in found else "-" for kind in kinds}
        staged = plan.case.layout.pipeline > 1
        row["bubble"] = f"{plan.step.bubble_share:.1%}" if staged else "-"
        row["stages wait"] = f"{plan.step.idle:.1%}" if staged else "-"
        rows.append(row)
    about = "Messages of the fullest rank in a step (count: MB in all); bubble (1F1B): share of the pipeline's slots"
    return f"{about}:\n\n{_align(rows)}"


def _write_amount(number: int, nbytes: int) -> str:
    return f"{number:,}: {nbytes / 1e6:,.1f}"


def _explain_repeats(plan: Plan) -> str:
    repeated = sum(use.num_repeated for use in plan.job.stage_uses(plan.case))
    if not repeated:
        return ""
    return f"DeepSpeed goes back twice through {repeated} layers: their stage hands on two tensors made of them."


def _explain_too_large(table: PlanTable) -> str:
    if not table.too_large:
        return "Every possible layout fits."
    lines = [f"  {explain_misfit(plan)}" for plan in table.too_large[:MOST_ROWS]]
    more = len(table.too_large) - len(lines)
    return "\n".join([f"Too large ({len(table.too_large)}):", *lines, *([f"  and {more} more"] if more > 0 else [])])
