"""The plan of an epoch: every sample once, sizes and budgets kept, padding low; cuts into ranks and micro-batches."""

import csv
import gzip
import re
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from biokit.data.batching import micro_slices, padding_ratio, plan_epoch, rank_rows
from biokit.data.masking import mask_keys, masked_lengths
from biokit.datasets import locate
from biokit.errors import ConfigError

LENGTHS = st.lists(st.integers(1, 60), max_size=200).map(np.array)


@settings(max_examples=80, deadline=None)
@given(LENGTHS, st.integers(0, 5), st.integers(0, 3), st.integers(1, 40), st.booleans())
def test_every_sample_once_in_batches_of_the_size(lengths, seed, epoch, size, buckets):
    plan = plan_epoch(lengths, seed, epoch, batch_size=size, length_buckets=buckets)
    assert sorted(np.concatenate([*plan, np.empty(0, int)]).tolist()) == list(range(len(lengths)))
    sizes = [len(batch) for batch in plan]
    rest = len(lengths) % size
    assert sizes == [size] * (len(lengths) // size) + ([rest] if rest else [])


@settings(max_examples=80, deadline=None)
@given(LENGTHS, st.integers(0, 5), st.integers(60, 500), st.booleans())
def test_token_budget_is_kept_and_filled(lengths, seed, budget, buckets):
    encoder = np.random.default_rng(seed).permutation(lengths)
    plan = plan_epoch(lengths, seed, 0, max_tokens=budget, length_buckets=buckets, encoder_lengths=encoder)
    assert sorted(np.concatenate([*plan, np.empty(0, int)]).tolist()) == list(range(len(lengths)))
    for batch in plan:
        assert len(batch) * max(lengths[batch].max(), encoder[batch].max()) <= budget


def test_budget_batches_are_full():
    lengths = np.random.default_rng(0).integers(5, 60, 1000)
    for buckets in (False, True):
        plan = plan_epoch(lengths, 0, 0, max_tokens=600, length_buckets=buckets)
        # one more row of the longest kind would not fit, or would widen the batch by less than 60 a row
        assert np.median([(len(b) + 1) * 60 for b in plan]) > 600 or buckets
        assert np.mean([len(b) * lengths[b].max() for b in plan]) > 600 - 2 * 60


def test_plans_are_pure_and_differ_by_seed_and_epoch():
    lengths = np.random.default_rng(0).integers(5, 60, 500)

    def flat(seed, epoch):
        return np.concatenate(plan_epoch(lengths, seed, epoch, batch_size=32)).tolist()

    assert flat(1, 0) == flat(1, 0)
    assert flat(1, 0) != flat(1, 1) and flat(1, 0) != flat(2, 0)

    def groups(seed, epoch, buckets):
        plan = plan_epoch(lengths, seed, epoch, batch_size=32, length_buckets=buckets)
        return {tuple(sorted(batch.tolist())) for batch in plan}

    for buckets in (True, False):  # other company, not only another order of the same batches
        assert groups(1, 0, buckets) == groups(1, 0, buckets)
        assert not groups(1, 0, buckets) & groups(1, 1, buckets)
        assert not groups(1, 0, buckets) & groups(2, 0, buckets)


def test_lengths_beyond_16_bits_are_planned_alike():
    decoder = np.random.default_rng(0).integers(5, 60, 2000)
    encoder = decoder - np.random.default_rng(1).integers(0, 5, 2000)
    small = plan_epoch(decoder, 0, 0, batch_size=16, encoder_lengths=encoder)
    large = plan_epoch(decoder * 4096, 0, 0, batch_size=16, encoder_lengths=encoder * 4096)
    assert [batch.tolist() for batch in small] == [batch.tolist() for batch in large]


def test_batches_come_in_random_order_and_anyone_may_be_in_the_small_one():
    lengths = np.arange(1, 102)
    last, firsts = [], []
    for epoch in range(400):
        plan = plan_epoch(lengths, 0, epoch, batch_size=20)
        last.append(int(plan[-1][0]))
        firsts.append(float(lengths[plan[0]].mean()))
    assert min(last) < 25 and max(last) > 75  # 1 of 101, in six places
    assert np.ptp(firsts) > 60


def test_wrong_sizes_are_refused():
    for sizes in ({}, {"batch_size": 2, "max_tokens": 9}, {"batch_size": -1}):
        with pytest.raises(ConfigError, match="exactly one of the two"):
            plan_epoch(np.array([3]), 0, 0, **sizes)
    with pytest.raises(ConfigError, match="has 30 tokens"):
        plan_epoch(np.array([3, 4]), 0, 0, max_tokens=29, encoder_lengths=np.array([30, 2]))


@given(st.integers(0, 300), st.integers(1, 17), st.integers(1, 40))
def test_slices_concatenate_back(num, ranks, micro):
    rows = list(range(num))
    parts = [rows[rank_rows(num, micro, rank, ranks)] for rank in range(ranks)]
    assert list(chain(*parts)) == rows
    whole = [rows[s] for s in micro_slices(num, micro)]
    dealt = [[part[s] for s in micro_slices(len(part), micro)] for part in parts]
    assert list(chain(*dealt)) == whole  # the very micro-batches of one process
    assert all(len(micros) <= -(-len(whole) // ranks) for micros in dealt)


def test_no_such_rank():
    for rank in (-1, 2):
        with pytest.raises(ConfigError, match="there is no such rank"):
            rank_rows(10, 5, rank, 2)


def assert_low_padding(lengths, at_most=1.05):
    """`lengths` without begin and end. Both sides, and the plain plan for contrast."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    encoder = masked_lengths(offsets, mask_keys(0, 0, np.arange(len(lengths)))) + 2
    decoder = lengths + 2
    plan = plan_epoch(decoder, 0, 0, batch_size=128, encoder_lengths=encoder)
    assert padding_ratio(plan, decoder) <= at_most and padding_ratio(plan, encoder) <= at_most
    plain = plan_epoch(decoder, 0, 0, batch_size=128, length_buckets=False)
    assert padding_ratio(plain, decoder) > 1.2


def token_counts(path, column):
    token = re.compile(r"\[[^\]]+]|Br|Cl|%\d\d|.")
    raw = path.read_bytes()
    lines = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode().splitlines()
    counts = np.array([len(token.findall(row[column])) for row in csv.reader(lines)])
    return counts[counts <= 510]


def test_padding_is_low_on_wehi():
    assert_low_padding(token_counts(locate("wehi_mols"), 0))


@pytest.mark.real_data
@pytest.mark.parametrize(
    "name",
    ["smiles_chembl/chembl_deepchem.csv.gz", "smiles_moses_zinc/train.csv.gz"],
    ids=["chembl", "moses"],
)
def test_padding_is_low_on_real_data(name, real_data):
    lengths = token_counts(real_data / name, 0)
    assert_low_padding(lengths[: 200_000 if "moses" in name else None])
