"""Which samples stand together: the plan of an epoch, and its cuts into ranks and micro-batches.

A plan is a pure function of (lengths, seed, epoch, sizes). The global batch is formed first and cut afterwards, so
that the number of ranks never changes a batch. Lengths count every token of a side, begin and end included.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from biokit.data.masking import BATCH_ORDER, shuffled_indices
from biokit.errors import ConfigError

Ints = NDArray[np.integer]
Indices = NDArray[np.int64]

_STRIP_SHARES = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # batches a strip, over the root of all batches: those tried


def plan_epoch(
    lengths: Ints,
    seed: int,
    epoch: int,
    *,
    batch_size: int = 0,
    max_tokens: int = 0,
    length_buckets: bool = True,
    encoder_lengths: Ints | None = None,
) -> list[Indices]:
    """Cut a random order of all samples into batches; every sample stands in exactly one.

    With `length_buckets` samples of like length stand together, on both sides: the epoch is sorted by `lengths`, cut
    into strips, each strip sorted by `encoder_lengths`, and cut into batches, which are then shuffled. Samples of
    equal lengths meet at random, and masks change the encoder lengths every epoch, so batches do too.

    Args:
        lengths: (N,) tokens of the decoder side (or of the only side).
        batch_size: samples a batch; one batch, the last, may be smaller.
        max_tokens: instead of batch_size, the most padded tokens of either side: rows x longest row.
        encoder_lengths: (N,) tokens of the encoder side; None: as `lengths`.

    Raises:
        ConfigError: neither or both of batch_size and max_tokens, or a sample longer than max_tokens.
    """
    if (batch_size > 0) == (max_tokens > 0):
        found = f"batch_size={batch_size}, max_tokens={max_tokens}"
        raise ConfigError("plan of an epoch", found, "Give exactly one of the two, above 0")
    lengths = np.asarray(lengths)
    encoder_lengths = lengths if encoder_lengths is None else np.asarray(encoder_lengths)
    widths = np.maximum(lengths, encoder_lengths)
    if max_tokens and len(widths) and widths.max() > max_tokens:
        found = f"a molecule has {widths.max()} tokens"
        raise ConfigError(f"data.max_tokens={max_tokens}", found, "Raise data.max_tokens to hold the longest")
    order = shuffled_indices(len(lengths), seed, epoch)
    cuts, short = _cut_by_size(len(order), batch_size, seed, epoch) if batch_size else (None, -1)
    if length_buckets and len(order):
        order = _bucketed_order(order, lengths, encoder_lengths, cuts, max_tokens)
    if cuts is None:
        cuts = _cut_by_tokens(widths[order], max_tokens)
    assert np.array_equal(np.bincount(order, minlength=len(lengths)), np.ones(len(lengths))), "not a permutation"
    turns = shuffled_indices(len(cuts) - 1, seed, epoch, BATCH_ORDER)
    if short >= 0:
        turns = np.append(turns[turns != short], short)
    return [order[cuts[turn] : cuts[turn + 1]] for turn in turns.tolist()]


def rank_rows(num_samples: int, micro_batch_size: int, rank: int, num_ranks: int) -> slice:
    """The rows of a global batch that data rank `rank` computes: whole micro-batches, contiguous, possibly none.

    The batch is cut into micro-batches first, so that every number of ranks computes the same ones.

    Raises:
        ConfigError: rank is not in 0 .. num_ranks - 1.
    """
    if not 0 <= rank < num_ranks:
        raise ConfigError(f"rank {rank} of {num_ranks}", "there is no such rank", "Give 0 <= rank < num_ranks")
    num_micros = -(-num_samples // micro_batch_size)
    share = -(-num_micros // num_ranks) * micro_batch_size
    return slice(min(rank * share, num_samples), min((rank + 1) * share, num_samples))


def micro_slices(num_samples: int, micro_batch_size: int) -> list[slice]:
    """Cut `num_samples` rows into micro-batches; the last may be smaller."""
    return [slice(i, min(i + micro_batch_size, num_samples)) for i in range(0, num_samples, micro_batch_size)]


def padding_ratio(plan: list[Indices], lengths: Ints) -> float:
    """Padded over real tokens of one side when each batch is padded to its longest row."""
    lengths = np.asarray(lengths)
    padded = sum(len(batch) * int(lengths[batch].max()) for batch in plan)
    return padded / int(lengths.sum())


def _bucketed_order(
    order: Indices, lengths: Ints, encoder_lengths: Ints, cuts: Indices | None, max_tokens: int
) -> Indices:
    """Sort by both lengths; of a few strip widths take the one whose worse side pads least."""
    decoder, encoder = _narrow(lengths[order]), _narrow(encoder_lengths[order])
    by_decoder = np.argsort(decoder, kind="stable")
    order, decoder, encoder = order[by_decoder], decoder[by_decoder], encoder[by_decoder]
    if cuts is None:  # as if every batch were filled to the brim
        batch_of = (np.cumsum(np.maximum(decoder, encoder), dtype=np.int64) - 1) // max_tokens
        starts = np.flatnonzero(np.diff(batch_of, prepend=-1))
    else:
        starts = cuts[:-1]
        batch_of = np.repeat(np.arange(len(starts)), np.diff(cuts))
    rows = np.diff(np.append(starts, len(order)))
    root = math.sqrt(len(starts))
    best, best_cost = order, math.inf
    for batches_a_strip in sorted({max(1, round(root * share)) for share in _STRIP_SHARES}):
        strip = _narrow(batch_of // batches_a_strip)
        # every other strip runs backwards, so that a batch across two strips stays narrow
        ranked = np.argsort(np.where(strip & 1, ~encoder, encoder), kind="stable")
        ranked = ranked[np.argsort(strip[ranked], kind="stable")]
        cost = max(
            float((np.maximum.reduceat(side[ranked], starts) * rows).sum() / side.sum(dtype=np.int64))
            for side in (decoder, encoder)
        )
        if cost < best_cost:
            best, best_cost = order[ranked], cost
    return best


def _narrow(numbers: Ints) -> Ints:
    """As 16-bit numbers where they fit: numpy sorts those by radix, some 15 times as fast, and as stably."""
    return numbers.astype(np.uint16 if numbers.max() < 1 << 16 else np.int64)


def _cut_by_size(num_samples: int, batch_size: int, seed: int, epoch: int) -> tuple[Indices, int]:
    """Boundaries of the batches, and which batch is the smaller one (-1: none), placed at random in the order.

    So no molecule is likelier than another, by its length, to stand in the smaller batch.
    """
    num_full, rest = divmod(num_samples, batch_size)
    if not rest:
        return np.arange(num_full + 1) * batch_size, -1
    short = int(shuffled_indices(num_full + 1, seed, epoch, BATCH_ORDER)[0])
    sizes = np.full(num_full + 1, batch_size)
    sizes[short] = rest
    return np.concatenate([[0], np.cumsum(sizes)]), short


def _cut_by_tokens(widths: Ints, max_tokens: int) -> Indices:
    """Boundaries such that rows x widest row of each batch is at most max_tokens, each batch as large as fits."""
    cuts, start = [0], 0
    while start < len(widths):
        ahead = widths[start : start + max_tokens // max(1, int(widths[start]))]
        padded = np.maximum.accumulate(ahead).astype(np.int64) * np.arange(1, len(ahead) + 1)
        start += int(np.searchsorted(padded, max_tokens, side="right"))
        cuts.append(start)
    return np.array(cuts)
