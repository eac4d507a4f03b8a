"""Bytes of live tensors a rank under each strategy, against the arithmetic of the layout.

A parameter in fp32 has 4 bytes of weight, 4 of gradient, 8 of AdamW's moments. ZeRO cuts over the data ranks the
moments (1), gradients too (2), weights too (3); tensor and pipeline ranks hold a share of the parameters. Looked at
twice in a step: when AdamW is called, with gradients, and after the step, when they could be gone. The sum is over
the storages of all tensors that the garbage collector knows, each once; it agrees with what torch's CPU allocator has
given out and not taken back.

What an engine keeps beyond that is known too, and a measurement must agree with both sums together:
- DDP keeps the gradients' bucket between steps.
- ZeRO trains a copy of its part of the weights, also of fp32 weights. Stages 1 and 2 let go of other ranks'
  gradients before the update, but flatten their own into a second copy.
- A pipeline keeps its last micro-batches' activations; they are left out of account, and small beside the model.
- ZeRO-3 keeps its gradients and a bucket of `reduce_bucket_size` elements for ever, and holds parameters of fewer than
  100,000 elements whole between steps; gradients are copied for the update, and with offload the copy stays.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from biokit.config import ModelConfig
from biokit.parallel.cuts import cut_tensor
from biokit.parallel.grid import ZERO_STAGE, Layout
from biokit.parallel.strategy import Strategy
from tests.bench.rigs import Arrays, Rig, read_batches, share, start
from tests.bench.timing import Row
from tests.distributed import Ranks

LAYOUTS = (
    Layout(),
    Layout("DDP", data=2),
    Layout("Zero1", data=2),
    Layout("Zero2", data=2),
    Layout("Zero3", data=2),
    Layout("ZeroInf", data=2),
    Layout("Pipeline", pipeline=2),
    Layout("ThreeD", tensor=2),
    Layout("ThreeD", tensor=2, pipeline=2),
)
MODEL = ModelConfig(preset="megatron", dropout=0.1)  # 7.6 million parameters: beside them all else is small
NUM_ROWS, NUM_STEPS = 8, 2
INSTANTS = ("in the update", "after the step")
TOLERANCE = 0.01
PERSISTENT = 100_000  # elements below which ZeRO-3 keeps a parameter whole: DeepSpeed's default


@dataclass(frozen=True)
class Sizes:
    """Bytes on a rank at one instant: measured, by the formula, and what is known to be there beyond it."""

    measured: int
    formula: int
    beyond: int


def measure(layout: Layout, model: ModelConfig = MODEL) -> list[Row]:
    """A row for each instant, of the rank that holds most."""
    rig = Rig(layout, model, NUM_ROWS // (2 * layout.data), NUM_ROWS)
    with Ranks(layout.world_size) as ranks:
        by_rank: list[list[Sizes]] = ranks.run(_weigh, rig, read_batches(NUM_ROWS, NUM_STEPS))
    fullest = (max(sizes, key=lambda s: s.measured) for sizes in zip(*by_rank, strict=True))
    return [_row(layout, number, sizes) for number, sizes in enumerate(fullest)]


def measure_all() -> list[Row]:
    return [row for layout in LAYOUTS for row in measure(layout)]


def formula(layout: Layout, num_parameters: int, in_update: bool) -> float:
    """Bytes of weights, gradients (in the update) and moments of a rank that holds so many parameters."""
    stage, data = ZERO_STAGE.get(layout.strategy, 0), layout.data
    weights, gradients, moments = (divisor if stage >= cut else 1 for cut, divisor in ((3, data), (2, data), (1, data)))
    return num_parameters * (4 / weights + (4 / gradients if in_update else 0) + 8 / moments)


def beyond_formula(layout: Layout, counts: Sequence[int], bucket_size: int, in_update: bool) -> float:
    """Bytes that the engine keeps beyond `formula` (see above), for parameters of so many elements each.

    Args:
        bucket_size: elements of ZeRO-3's bucket.
    """
    count, data = sum(counts), layout.data
    if layout.strategy in ("Single", "DDP"):
        return 4 * count if layout.strategy == "DDP" and not in_update else 0
    copy = 4 * count / data
    if ZERO_STAGE[layout.strategy] < 3:
        gradients = 8 * count / data - (4 * count if ZERO_STAGE[layout.strategy] == 1 else copy) if in_update else 0
        return copy + gradients
    kept = 4 * bucket_size + copy
    if not in_update:
        kept += 4 * sum(size for size in counts if size < PERSISTENT) + (copy if layout.strategy == "ZeroInf" else 0)
    return copy + kept


def _row(layout: Layout, instant: int, sizes: Sizes) -> Row:
    expected = sizes.formula + sizes.beyond
    return Row(
        what=f"live tensors of a rank, {layout}, {INSTANTS[instant]}",
        peer="weights, gradients, moments" if instant == 0 else "weights, moments",
        ours=f"{sizes.measured / 1e6:,.1f} MB",
        theirs=f"{sizes.formula / 1e6:,.1f} MB",
        ratio=f"{sizes.measured / sizes.formula:.2f}x",
        target=f"{expected / 1e6:,.1f} MB with the engine's own, within {TOLERANCE:.0%}",
        met=abs(sizes.measured / expected - 1) <= TOLERANCE,
    )


def _weigh(rig: Rig, batches: Sequence[Arrays]) -> list[Sizes]:
    """On every rank: sizes in the update (its fullest call of AdamW) and after the step, of the last batch."""
    before, in_update = _live_bytes(), [0]
    with start(rig) as strategy:
        shares = [share(batch, rig, strategy) for batch in batches]
        optimizer: torch.optim.Optimizer = strategy.optimizer  # type: ignore[attr-defined]
        optimizer.register_step_pre_hook(lambda *_: in_update.append(_live_bytes() - before))
        for batch in shares:
            in_update.clear()
            strategy.train_batch(batch.micros, batch.num_valid, batch.seeds, rig.config.train.lr)
        measured = max(in_update), _live_bytes() - before
        counts, bucket_size = _own_counts(strategy), _bucket_size(strategy)
        rest = sum(buffer.nbytes for buffer in strategy.model.buffers())
        rest += sum(ids.nbytes for batch in shares for micro in batch.micros for ids in micro.values())
    return [
        Sizes(
            measured=size,
            formula=round(formula(rig.layout, sum(counts), now)),
            beyond=rest + round(beyond_formula(rig.layout, counts, bucket_size, now)),
        )
        for size, now in zip(measured, (True, False), strict=True)
    ]


def _bucket_size(strategy: Strategy) -> int:
    engine = getattr(strategy, "engine", None)
    return engine.optimizer.reduce_bucket_size if engine else 0


def _own_counts(strategy: Strategy) -> list[int]:
    """Elements of each parameter that this rank's stage and tensor rank hold."""
    tensor, place = strategy.layout.tensor, strategy.place
    return [
        cut_tensor(torch.empty(whole.shape, device="meta"), strategy.cut(name, None), tensor, place.tensor).numel()
        for name, whole in strategy.template.items()
        if strategy.holds(name)
    ]


def _live_bytes() -> int:
    """Of the storages of all tensors, each once."""
    gc.collect()
    storages: dict[int, int] = {}
    for found in gc.get_objects():
        if issubclass(type(found), torch.Tensor) and not found.is_meta:
            for tensor in (found, found.grad if found.is_leaf else None):
                if tensor is not None:
                    storage = tensor.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
