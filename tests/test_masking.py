"""Masking: the law of MolBART's schemes, exactly on forced draws and statistically; purity of every draw."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from biokit.data import masking
from biokit.errors import ConfigError

MASK, CHEM, VOCAB = 4, 272, 523


def ragged(lengths, rng):
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return rng.integers(CHEM, VOCAB, offsets[-1]).astype(np.uint16), offsets


def rows_of(flat, offsets):
    return [flat[a:b].tolist() for a, b in itertools.pairwise(offsets)]


def span_law(tokens, starts, draw_length):
    """The plain form: one token after another."""
    out, position = [], 0
    while position < len(tokens):
        if starts[position]:
            out.append(MASK)
            position += draw_length(position)
        else:
            out.append(tokens[position])
            position += 1
    return out


def same_distribution(first, second, sigmas=5.0):
    """Two samples of counts: means and every pooled bin within `sigmas` standard errors of each other."""
    first, second = np.asarray(first), np.asarray(second)
    error = math.sqrt(first.var() / len(first) + second.var() / len(second))
    assert abs(first.mean() - second.mean()) <= sigmas * error
    top = max(first.max(), second.max()) + 1
    p = np.bincount(first, minlength=top) / len(first)
    q = np.bincount(second, minlength=top) / len(second)
    pooled = (p + q) / 2
    error = np.sqrt(pooled * (1 - pooled) * (1 / len(first) + 1 / len(second)))
    common = pooled * min(len(first), len(second)) > 20
    assert (np.abs(p - q)[common] <= sigmas * error[common]).all()


@pytest.mark.parametrize(("prob", "lam"), [(0.10, 3.0), (0.4, 1.0), (1.0, 0.7)])
def test_span_law_statistically(prob, lam):
    rng, num, length = np.random.default_rng(1), 20_000, 25
    flat, offsets = ragged(np.full(num, length), rng)
    masked, bounds = masking.mask_spans(
        flat, offsets, masking.mask_keys(7, 3, np.arange(num)), mask_id=MASK, prob=prob, lam=lam
    )
    ours = rows_of(masked, bounds)
    plain = [span_law(row, rng.random(length) < prob, lambda _: rng.poisson(lam)) for row in rows_of(flat, offsets)]
    same_distribution([len(r) for r in ours], [len(r) for r in plain])
    same_distribution([r.count(MASK) for r in ours], [r.count(MASK) for r in plain])
    for place in (0, 1, 5, 24):  # the end of a row has its own law: spans are cut there
        same_distribution(
            [int(len(r) > place and r[place] == MASK) for r in ours],
            [int(len(r) > place and r[place] == MASK) for r in plain],
        )
    same_distribution([int(r[-1] == MASK) for r in ours], [int(r[-1] == MASK) for r in plain])


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=8),
    seed=st.integers(0, 99),
    prob=st.floats(0, 1),
)
def test_spans_are_exactly_the_law_on_the_same_draws(lengths, seed, prob):
    """Feed the plain form with the draws that the fast form makes at each (row, position)."""
    flat, offsets = ragged(lengths, np.random.default_rng(seed))
    keys = masking.mask_keys(seed, 0, np.arange(len(lengths)))
    masked, bounds = masking.mask_spans(flat, offsets, keys, mask_id=MASK, prob=prob, lam=1.5)
    assert np.array_equal(np.diff(bounds), masking.masked_lengths(offsets, keys, prob=prob, lam=1.5))
    for row, (tokens, out) in enumerate(zip(rows_of(flat, offsets), rows_of(masked, bounds), strict=True)):
        words = masking.draw_bits(keys[0][row : row + 1], np.arange(len(tokens)) // 2)
        halves = (words >> (np.uint64(32) * (np.arange(len(tokens)) % 2).astype(np.uint64))) & np.uint64(2**32 - 1)
        starts = halves < np.uint64(round(prob * 2**32))
        queue = {}

        def length_at(position, row=row, queue=queue):
            if position not in queue:
                bits = masking.draw_bits(keys[1][row : row + 1], position)
                zeros, length = masking._draw_lengths(bits, 1.5)
                queue[position] = [0] * int(zeros[0]) + [int(length[0])]
            return queue[position].pop(0)

        assert out == span_law(tokens, starts, length_at)


def forced(monkeypatch, starts, zeros, lengths):
    """Make every draw of one row what the test says."""
    positions = np.flatnonzero(starts)
    monkeypatch.setattr(masking, "_chosen_tokens", lambda *_: (positions, np.zeros_like(positions), positions))
    monkeypatch.setattr(masking, "_draw_lengths", lambda *_: (np.array(zeros)[positions], np.array(lengths)[positions]))


def test_forced_draws(monkeypatch):
    flat, offsets = np.arange(300, 308, dtype=np.uint16), np.array([0, 8])
    keys = masking.mask_keys(0, 0, np.arange(1))

    def mask(starts, zeros, lengths, **more):
        with monkeypatch.context() as patch:
            forced(patch, starts, zeros, lengths)
            return masking.mask_spans(flat, offsets, keys, mask_id=MASK, **more)[0].tolist()

    no = [0] * 8
    assert mask([0, 1, 0, 0, 0, 0, 0, 0], no, [0, 3, 0, 0, 0, 0, 0, 0]) == [300, 4, 304, 305, 306, 307]
    # a covered start does nothing; the next one that is free does
    assert mask([0, 1, 1, 0, 1, 0, 0, 0], no, [0, 3, 6, 0, 2, 0, 0, 0]) == [300, 4, 4, 306, 307]
    # zero-length draws insert masks and consume nothing
    assert mask([0, 0, 0, 1, 0, 0, 0, 0], [0, 0, 0, 2, 0, 0, 0, 0], [1] * 8) == [
        300,
        301,
        302,
        4,
        4,
        4,
        *range(304, 308),
    ]
    # cut at the end of the row; the last token alone
    assert mask([0, 0, 0, 0, 0, 1, 1, 0], no, [9] * 8) == [300, 301, 302, 303, 304, 4]
    assert mask([0, 0, 0, 0, 0, 0, 0, 1], no, [1] * 8) == [*range(300, 307), 4]
    assert mask([1] * 8, no, [8] * 8) == [4]
    # growth beyond max_length drops the inserted masks only
    assert mask([1, 0, 0, 0, 0, 0, 0, 0], [1] * 8, [1] * 8, max_length=8) == [4, *range(301, 308)]
    assert len(mask([1, 0, 0, 0, 0, 0, 0, 0], [1] * 8, [1] * 8, max_length=9)) == 9
    # specials are not started on, and end a span
    flat[3] = 2
    assert mask([0, 1, 0, 0, 0, 0, 0, 0], no, [5] * 8, chem_start=CHEM) == [300, 4, 2, 304, 305, 306, 307]


def test_specials_are_never_touched():
    rng = np.random.default_rng(5)
    flat, offsets = ragged(rng.integers(0, 40, 300), rng)
    flat[rng.random(len(flat)) < 0.3] = rng.choice([0, 1, 2, 3, 5, 6, 71, 271])
    keys = masking.mask_keys(1, 1, np.arange(300))
    specials = [[t for t in row if t < CHEM] for row in rows_of(flat, offsets)]
    masked = masking.mask_spans(flat, offsets, keys, mask_id=MASK, prob=0.5, chem_start=CHEM)
    assert [[t for t in row if t < CHEM and t != MASK] for row in rows_of(*masked)] == specials
    lengths = masking.masked_lengths(offsets, keys, prob=0.5, flat=flat, chem_start=CHEM)
    assert np.array_equal(np.diff(masked[1]), lengths)
    replaced, bounds = masking.mask_replace(
        flat,
        offsets,
        keys,
        mask_id=MASK,
        chem_start=CHEM,
        vocab_size=VOCAB,
        prob=0.5,
        show_mask_token_prob=0.5,
    )
    assert np.array_equal(bounds, offsets) and np.array_equal(replaced[flat < CHEM], flat[flat < CHEM])


@pytest.mark.parametrize("show", [1.0, 0.8, 0.0])
def test_replace_law(show):
    num, prob = 400_000, 0.15
    flat, offsets = np.full(num, 300, np.uint16), np.arange(0, num + 1, 40)
    out, bounds = masking.mask_replace(
        flat, offsets, masking.mask_keys(3, 0, np.arange(num // 40)), mask_id=MASK, chem_start=CHEM,
        vocab_size=VOCAB, prob=prob, show_mask_token_prob=show,
    )  # fmt: skip
    assert np.array_equal(bounds, offsets) and out.dtype == np.uint16
    random_share = prob * (1 - show) / 2
    kinds = (VOCAB - CHEM - 1) / (VOCAB - CHEM)  # a random token may be the same one
    for found, expected in (
        ((out == MASK).mean(), prob * show),
        (((out != MASK) & (out != 300)).mean(), random_share * kinds),
    ):
        assert abs(found - expected) <= 5 * math.sqrt(expected * (1 - expected) / num)
    others = out[(out != MASK) & (out != 300)]
    assert len(others) == 0 or (others.min() == CHEM and others.max() == VOCAB - 1)


def test_a_sample_has_the_same_mask_in_any_batch():
    rng = np.random.default_rng(3)
    flat, offsets = ragged(rng.integers(1, 60, 200), rng)
    rows = rows_of(flat, offsets)

    def masked(samples, scheme):
        part = np.concatenate([rows[i] for i in samples]).astype(np.uint16)
        bounds = np.concatenate([[0], np.cumsum([len(rows[i]) for i in samples])])
        keys = masking.mask_keys(11, 2, np.array(samples))
        if scheme == "span":
            return rows_of(*masking.mask_spans(part, bounds, keys, mask_id=MASK, chem_start=CHEM))
        return rows_of(
            *masking.mask_replace(part, bounds, keys, mask_id=MASK, chem_start=CHEM, vocab_size=VOCAB, prob=0.3,
                                  show_mask_token_prob=0.5)
        )  # fmt: skip

    for scheme in ("span", "replace"):
        whole = masked(list(range(200)), scheme)
        for size in (1, 7, 64):
            order = rng.permutation(200).tolist()
            for start in range(0, 200, size):
                samples = order[start : start + size]
                assert masked(samples, scheme) == [whole[i] for i in samples]


def test_offsets_may_begin_anywhere():
    rng = np.random.default_rng(4)
    flat, offsets = ragged([9, 30, 30], rng)
    keys = masking.mask_keys(1, 0, np.arange(3))
    whole = rows_of(*masking.mask_spans(flat, offsets, keys, mask_id=MASK))
    part = masking.mask_spans(flat, offsets[1:], (keys[0][1:], keys[1][1:]), mask_id=MASK)
    assert rows_of(*part) == whole[1:]


def test_draws_differ_by_seed_epoch_sample_and_stream():
    base = masking.sample_keys(1, 2, np.arange(1000), 3)
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4), (3, 2, 1), (2, 1, 3)):
        assert not np.isin(masking.sample_keys(other[0], other[1], np.arange(1000), other[2]), base).any()
    assert len(np.unique(base)) == 1000
    bits = masking.draw_bits(base[:, None], np.arange(64))
    assert len(np.unique(bits)) == bits.size
    ones = np.unpackbits(bits.view(np.uint8)).mean()
    assert abs(ones - 0.5) < 5 * 0.5 / math.sqrt(bits.size * 64)
    neighbours = np.unpackbits((bits[1:] ^ bits[:-1]).view(np.uint8)).mean()  # avalanche between samples
    assert abs(neighbours - 0.5) < 5 * 0.5 / math.sqrt(bits[1:].size * 64)


def test_known_values():
    """splitmix64 from state 0: the published first output of the reference generator."""
    assert int(masking.draw_bits(np.zeros(1, np.uint64), 0)[0]) == 0xE220A8397B1DCDAF
    assert masking.sample_keys(1234, 5, np.array([6]), 3).tolist() == [KNOWN_KEY]


KNOWN_KEY = 0x758415A0D31AFD20  # a run's data order must not change under the same seed


def test_shuffle_is_a_permutation_and_changes():
    orders = [masking.shuffled_indices(500, 1, epoch) for epoch in range(3)]
    for order in orders:
        assert np.array_equal(np.sort(order), np.arange(500))
    assert not np.array_equal(orders[0], orders[1]) and not np.array_equal(orders[1], orders[2])
    first = [int(masking.shuffled_indices(10, seed, 0)[0]) for seed in range(5000)]
    assert np.abs(np.bincount(first, minlength=10) - 500).max() < 5 * math.sqrt(5000 * 0.1 * 0.9)


@pytest.mark.parametrize("lam", [0.2, 3.0, 60.0])
def test_poisson(lam):
    num = 200_000
    bits = masking.sample_keys(0, 0, np.arange(num), 1)
    draws = masking.draw_poisson(bits, lam)
    ks = np.arange(draws.max() + 1)
    expected = np.exp(ks * math.log(lam) - lam - np.array([math.lgamma(k + 1) for k in ks]))
    found = np.bincount(draws) / num
    assert (np.abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected) / num) + 1e-9).all()
    zeros, lengths = masking._draw_lengths(bits, lam)
    assert lengths.min() >= 1
    none = math.exp(-lam)
    mean = none / (1 - none)
    assert abs(zeros.mean() - mean) < 5 * math.sqrt(none) / (1 - none) / math.sqrt(num) + 1e-12
    assert abs(lengths.mean() - lam / (1 - none)) < 5 * math.sqrt(lam + 1) / (1 - none) / math.sqrt(num)


@pytest.mark.parametrize("lam", [0.0, -1.0, math.nan, 501.0])
def test_an_endless_span_is_refused(lam):
    with pytest.raises(ConfigError, match="span_lambda"):
        masking.poisson_table(lam)


def test_empty_batches():
    none = np.empty(0, np.uint16), np.array([0])
    for offsets in (np.array([0]), np.array([0, 0, 0])):
        keys = masking.mask_keys(0, 0, np.arange(len(offsets) - 1))
        assert np.array_equal(masking.mask_spans(none[0], offsets, keys, mask_id=MASK, prob=1.0)[1], offsets)
        replaced = masking.mask_replace(none[0], offsets, keys, mask_id=MASK, chem_start=CHEM, vocab_size=VOCAB)
        assert np.array_equal(replaced[1], offsets)
