"""Counter-based randomness, and the two masking schemes of MolBART, vectorised over a batch.

Every draw is a hash of (seed, epoch, sample index, stream, position). So a sample's mask is the same in any batch,
on any rank, in any worker and after any resume; nothing carries state.

Sequences come ragged: `flat` holds the ids of all rows, row i is `flat[offsets[i]:offsets[i + 1]]`.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from biokit.errors import ConfigError

Ints = NDArray[np.integer]
Keys = NDArray[np.uint64]

# one stream a purpose: draws of different streams are independent
SHUFFLE, BATCH_ORDER, AUGMENT, MASK_START, MASK_SPAN, MASK_REPLACE, PICK_ENCODER, PICK_DECODER = range(8)

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_WORD = (1 << 64) - 1
_HALF = 1 << 32


def mix_bits(words: Keys) -> Keys:
    """The finaliser of splitmix64 (Steele et al., OOPSLA 2014), in place on `words`, which is returned."""
    tmp = words >> np.uint64(30)
    words ^= tmp
    words *= np.uint64(_MIX_1)
    np.right_shift(words, np.uint64(27), out=tmp)
    words ^= tmp
    words *= np.uint64(_MIX_2)
    np.right_shift(words, np.uint64(31), out=tmp)
    words ^= tmp
    return words


def _mix_int(word: int) -> int:
    word = ((word ^ (word >> 30)) * _MIX_1) & _WORD
    word = ((word ^ (word >> 27)) * _MIX_2) & _WORD
    return word ^ (word >> 31)


@lru_cache(maxsize=256)
def stream_key(seed: int, epoch: int, stream: int) -> int:
    """One 64-bit key for a stream of an epoch of a seed."""
    key = _mix_int((seed + _GOLDEN) & _WORD)
    key = _mix_int((key ^ _mix_int((epoch + 2 * _GOLDEN) & _WORD)) & _WORD)
    return _mix_int((key + (stream + 1) * _GOLDEN) & _WORD)


def sample_keys(seed: int, epoch: int, indices: Ints, stream: int) -> Keys:
    """A 64-bit key for each sample index (N,), from which draws at positions come."""
    words = np.asarray(indices).astype(np.uint64) + np.uint64(1)
    words *= np.uint64(_GOLDEN)
    words += np.uint64(stream_key(seed, epoch, stream))
    return mix_bits(words)


def draw_bits(keys: Keys, positions: Ints | int) -> Keys:
    """64 random bits for each key at its position (broadcast)."""
    steps = (np.atleast_1d(positions).astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)
    return mix_bits(keys + steps)


def shuffled_indices(num_samples: int, seed: int, epoch: int, stream: int = SHUFFLE) -> NDArray[np.int64]:
    """A random order of `range(num_samples)`, a pure function of (seed, epoch)."""
    keys = sample_keys(seed, epoch, np.arange(num_samples, dtype=np.uint64), stream)
    return np.argsort(keys, kind="stable")


@lru_cache(maxsize=16)
def poisson_table(lam: float) -> NDArray[np.uint64]:
    """Cumulative probabilities of Poisson(lam) in units of 2**-32: `table[k] = P(X <= k)`, the last entry 2**32.

    Raises:
        ConfigError: lam is not above 0: a span that is always empty would never end.
    """
    if not 0.0 < lam <= 500.0:
        raise ConfigError("data.span_lambda", f"it is {lam}", "Give a mean span length above 0, at most 500")
    ks = np.arange(int(lam + 12 * np.sqrt(lam) + 24))
    log_pmf = ks * np.log(lam) - lam - np.concatenate([[0.0], np.cumsum(np.log(ks[1:]))])
    table = np.minimum(np.cumsum(np.exp(log_pmf)), 1.0) * _HALF
    table[-1] = _HALF
    return np.rint(table).astype(np.uint64)


def draw_poisson(bits: Keys, lam: float) -> NDArray[np.int64]:
    """Poisson(lam) by inversion of the upper 32 of each 64 random bits."""
    return np.searchsorted(poisson_table(lam), bits >> np.uint64(32), side="right").astype(np.int64)


class _Spans:
    """The spans of a batch: flat start, tokens consumed, zero-length draws before, row; none overlap."""

    __slots__ = ("ends", "new_lengths", "rows", "starts", "zeros")

    def __init__(self, starts: Ints, ends: Ints, zeros: Ints, rows: Ints, lengths: Ints) -> None:
        self.starts, self.ends, self.zeros, self.rows = starts, ends, zeros, rows
        change = np.bincount(rows, weights=zeros + 1 + starts - ends, minlength=len(lengths))
        self.new_lengths = lengths + change.astype(np.int64)


def mask_spans(
    flat: Ints,
    offsets: Ints,
    keys: tuple[Keys, Keys],
    *,
    mask_id: int,
    prob: float = 0.10,
    lam: float = 3.0,
    chem_start: int = 0,
    max_length: int | Ints = 0,
) -> tuple[Ints, NDArray[np.int64]]:
    """Replace spans by one mask each, under the law of MolBART's `span` scheme.

    Each token starts a span with probability `prob` unless an earlier span covers it. The span's length is
    Poisson(lam), cut at the end of the row. A draw of zero emits a mask, consumes nothing, and is drawn again on the
    same token. Ids below `chem_start` (begin, end, separator, unknown, properties) are never masked and end a span.

    Args:
        flat: (L,) ids. offsets: (N + 1,).
        keys: two streams of sample keys (N,), for starts and for lengths: see `mask_keys`.
        max_length: for all rows, or for each (N,): rows that grow beyond it lose their zero-length masks (never
            longer than the input then); 0: no limit.

    Returns:
        (flat, offsets) of the masked rows, of flat's dtype and int64.
    """
    spans = _draw_spans(flat if chem_start else None, offsets, keys, prob, lam, chem_start, max_length)
    out_offsets = np.zeros(len(spans.new_lengths) + 1, dtype=np.int64)
    np.cumsum(spans.new_lengths, out=out_offsets[1:])
    begin = int(offsets[0])
    tokens = np.array(flat[begin : int(offsets[-1])])
    starts = spans.starts - begin
    tokens[starts] = mask_id
    copies = np.ones(len(tokens), dtype=np.int64)
    edges = np.zeros(len(tokens) + 1, dtype=np.int8)
    edges[starts] = 1
    edges[spans.ends - begin] -= 1
    copies -= np.cumsum(edges[:-1], dtype=np.int8)
    copies[starts] = spans.zeros + 1
    return np.repeat(tokens, copies), out_offsets


def masked_lengths(
    offsets: Ints,
    keys: tuple[Keys, Keys],
    *,
    prob: float = 0.10,
    lam: float = 3.0,
    max_length: int = 0,
    flat: Ints | None = None,
    chem_start: int = 0,
) -> Ints:
    """The lengths (N,) that `mask_spans` gives, without the ids (needed only where ids below chem_start occur)."""
    return _draw_spans(flat, offsets, keys, prob, lam, chem_start, max_length).new_lengths


def mask_keys(seed: int, epoch: int, indices: Ints) -> tuple[Keys, Keys]:
    """The two streams of sample keys that the masking functions take."""
    return sample_keys(seed, epoch, indices, MASK_START), sample_keys(seed, epoch, indices, MASK_SPAN)


def mask_replace(
    flat: Ints,
    offsets: Ints,
    keys: tuple[Keys, Keys],
    *,
    mask_id: int,
    chem_start: int,
    vocab_size: int,
    prob: float = 0.10,
    show_mask_token_prob: float = 1.0,
) -> tuple[Ints, NDArray[np.int64]]:
    """MolBART's `replace` scheme: each token is chosen with probability `prob`, lengths stay.

    A chosen token becomes the mask with probability `show_mask_token_prob`; of the rest, half become a random
    chemistry token (ids chem_start to vocab_size), half stay. Ids below `chem_start` are never chosen.
    """
    chosen, rows, positions = _chosen_tokens(offsets, keys[0], prob)
    begin = int(offsets[0])
    tokens = np.array(flat[begin : int(offsets[-1])])
    chosen -= begin
    allowed = tokens[chosen] >= chem_start
    chosen, rows, positions = chosen[allowed], rows[allowed], positions[allowed]
    bits = draw_bits(keys[1][rows], positions)
    fate = bits >> np.uint64(32)
    show = round(show_mask_token_prob * _HALF)
    swap = round((show_mask_token_prob + (1.0 - show_mask_token_prob) / 2) * _HALF)
    num_chem = np.uint64(vocab_size - chem_start)
    random_chem = (((bits & np.uint64(_HALF - 1)) * num_chem) >> np.uint64(32)).astype(np.int64) + chem_start
    fresh = np.where(fate < show, mask_id, np.where(fate < swap, random_chem, tokens[chosen]))
    tokens[chosen] = fresh.astype(tokens.dtype)
    return tokens, np.asarray(offsets, dtype=np.int64) - begin


@lru_cache(maxsize=1)
def _steps(size: int) -> Keys:
    return np.arange(1, size + 1, dtype=np.uint64) * np.uint64(_GOLDEN)


def _chosen_tokens(offsets: Ints, keys: Keys, prob: float) -> tuple[Ints, Ints, Ints]:
    """Flat index, row and position of each token that a Bernoulli(prob) draw chooses; 32 bits a token."""
    lengths = np.diff(offsets)
    pairs = (lengths + 1) >> 1  # one 64-bit hash serves two tokens
    pair_ends = np.cumsum(pairs)
    pair_starts = pair_ends - pairs
    total = int(pair_ends[-1]) if len(pair_ends) else 0
    steps = _steps(1 << max(12, (total - 1).bit_length()))[:total]
    bits = np.repeat(keys - pair_starts.astype(np.uint64) * np.uint64(_GOLDEN), pairs)
    bits += steps
    halves = mix_bits(bits).view(np.uint32)
    threshold = round(prob * _HALF)
    hits = np.arange(2 * total) if threshold >= _HALF else np.flatnonzero(halves < np.uint32(threshold))
    rows = np.repeat(np.arange(len(pairs)), pairs)[hits >> 1]
    positions = hits - 2 * pair_starts[rows]
    inside = positions < lengths[rows]
    rows, positions = rows[inside], positions[inside]
    return positions + np.asarray(offsets)[rows], rows, positions


def _draw_spans(
    flat: Ints | None,
    offsets: Ints,
    keys: tuple[Keys, Keys],
    prob: float,
    lam: float,
    chem_start: int,
    max_length: int | Ints,
) -> _Spans:
    lengths = np.diff(offsets)
    starts, rows, positions = _chosen_tokens(offsets, keys[0], prob)
    limits = np.asarray(offsets)[rows + 1]
    if flat is not None and chem_start:
        protected = np.flatnonzero(flat < chem_start)
        if len(protected):
            maskable = flat[starts] >= chem_start
            starts, rows, positions, limits = (x[maskable] for x in (starts, rows, positions, limits))
            nexts = np.append(protected, len(flat))[np.searchsorted(protected, starts)]
            limits = np.minimum(limits, nexts)
    zeros, consumed = _draw_lengths(draw_bits(keys[1][rows], positions), lam)
    ends = np.minimum(starts + consumed, limits)
    kept = _first_come(starts, ends)
    spans = _Spans(starts[kept], ends[kept], zeros[kept], rows[kept], lengths)
    grown = spans.new_lengths > np.where(np.asarray(max_length) > 0, max_length, np.iinfo(np.int64).max)
    if grown.any():
        spans.zeros[grown[spans.rows]] = 0
        spans = _Spans(spans.starts, spans.ends, spans.zeros, spans.rows, lengths)
    return spans


def _draw_lengths(bits: Keys, lam: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draws of Poisson(lam) until one is not zero: how many zeros came first, and the length that followed.

    The two are independent: geometric, and Poisson given that it is not zero; so one hash's halves serve both.
    """
    table = poisson_table(lam)
    low = (bits & np.uint64(_HALF - 1)).astype(np.float64)
    zeros = (np.log((low + 0.5) / _HALF) / -lam).astype(np.int64)
    upper = (bits >> np.uint64(32)).astype(np.float64)
    upper = float(table[0]) + upper * ((_HALF - float(table[0])) / _HALF)
    return zeros, np.searchsorted(table, upper.astype(np.uint64), side="right").astype(np.int64)


def _first_come(starts: Ints, ends: Ints) -> NDArray[np.bool_]:
    """Which candidate spans begin outside every kept span before them (starts ascending).

    The rule looks only backwards, so its one fixed point is reached after at most as many rounds as the longest
    chain of overlapping candidates, a handful.
    """
    kept = np.ones(len(starts), dtype=bool)
    while len(starts) > 1:
        covered_to = np.maximum.accumulate(np.where(kept, ends, 0))
        fresh = np.ones_like(kept)
        np.greater_equal(starts[1:], covered_to[:-1], out=fresh[1:])
        if np.array_equal(fresh, kept):
            break
        kept = fresh
    return kept
