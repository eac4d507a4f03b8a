"""Cuts of parameters: joining the pieces gives the same bits; plans that say two things and misfits are errors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from biokit.config import ModelConfig
from biokit.errors import ConfigError
from biokit.models.molbart import MOLBART
from biokit.parallel.cuts import PLAN_WORDS, WHOLE, Cut, cut_tensor, find_cut, find_word, join_tensors, padded_size

PLAN = {"embed.tokens": "vocab", "encoder.*.qkv": "column", "encoder.*.out": "row", "encoder.*.core": "local"}
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int64])


def random_tensor(shape, dtype):
    """Any bits, not-a-numbers among them."""
    size = torch.empty((), dtype=dtype).element_size()
    return torch.randint(0, 256, (*shape, size), dtype=torch.uint8).view(dtype).squeeze(-1)


def same_bits(first, second):
    return first.dtype == second.dtype and torch.equal(
        first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8)
    )


@given(st.integers(1, 6), st.integers(1, 5), st.lists(st.integers(1, 4), min_size=1, max_size=3), DTYPES, st.data())
def test_joining_undoes_cutting(num_parts, times, shape, dtype, data):
    dim = data.draw(st.sampled_from([None, *range(len(shape))]))
    if dim is not None:
        shape[dim] = num_parts * times
    whole, cut = random_tensor(shape, dtype), Cut(dim)
    pieces = [cut_tensor(whole, cut, num_parts, part) for part in range(num_parts)]
    assert len({piece.shape for piece in pieces}) == 1
    assert same_bits(join_tensors(pieces, cut, shape), whole)


@given(st.integers(1, 6), st.integers(1, 20), st.integers(1, 3), DTYPES)
def test_joining_undoes_padding(num_parts, vocab_size, hidden_size, dtype):
    whole, cut = random_tensor((vocab_size, hidden_size), dtype), Cut(0, padded=True)
    pieces = [cut_tensor(whole, cut, num_parts, part) for part in range(num_parts)]
    rows = padded_size(vocab_size, num_parts) // num_parts
    assert {tuple(piece.shape) for piece in pieces} == {(rows, hidden_size)}
    assert not torch.cat(pieces)[vocab_size:].any()
    assert same_bits(join_tensors(pieces, cut, whole.shape), whole)


@given(st.integers(0, 1000), st.integers(1, 50))
def test_padded_size(size, num_parts):
    padded = padded_size(size, num_parts)
    assert padded % num_parts == 0
    assert size <= padded < size + num_parts


def test_a_piece_is_a_view_where_nothing_is_padded():
    whole = torch.arange(12.0).view(6, 2)
    assert cut_tensor(whole, Cut(0), 3, 1).data_ptr() == whole[2:].data_ptr()
    assert cut_tensor(whole, Cut(0, padded=True), 3, 1).data_ptr() == whole[2:].data_ptr()


@pytest.mark.parametrize(
    ("name", "cut"),
    [
        ("encoder.0.qkv.weight", Cut(0)),
        ("encoder.0.qkv.bias", Cut(0)),
        ("encoder.11.out.weight", Cut(1)),
        ("encoder.11.out.bias", WHOLE),
        ("embed.tokens.weight", Cut(0, padded=True)),
        ("embed.tokens.bias", Cut(0, padded=True)),
        ("encoder.0.core.weight", WHOLE),
        ("encoder.0.norm.weight", WHOLE),
        ("encoder.0.deeper.qkv.weight", WHOLE),  # a star stands for one part of a name
        ("encoder.qkv.weight", WHOLE),
        ("decoder.0.qkv.weight", WHOLE),
    ],
)
def test_words_cut(name, cut):
    assert find_cut(PLAN, name) == cut


def test_a_plan_that_says_two_things_is_refused():
    plan = {**PLAN, "*.0.qkv": "row"}
    assert find_word(plan, "encoder.1.qkv") == "column"
    with pytest.raises(ConfigError, match=r"plan of encoder\.0\.qkv: patterns say column, row\. Keep one of them\."):
        find_word(plan, "encoder.0.qkv")
    assert find_word({**PLAN, "*.0.qkv": "column"}, "encoder.0.qkv") == "column"


def test_a_size_that_cannot_be_cut_is_refused():
    with pytest.raises(ConfigError, match="tp=4: it does not divide a dimension of 6"):
        cut_tensor(torch.zeros(3, 6), Cut(1), 4, 0)


@pytest.mark.parametrize(
    ("pieces", "cut", "shape"),
    [
        ([torch.zeros(2, 3)] * 2, Cut(0), (5, 3)),
        ([torch.zeros(2, 3)] * 2, Cut(1), (4, 3)),
        ([torch.zeros(2, 3)] * 2, Cut(0, padded=True), (5, 3)),  # fewer rows than the vocabulary
        ([torch.zeros(2, 3)] * 2, WHOLE, (4, 3)),
        ([torch.zeros(2, 3)], Cut(0), (4, 3)),
    ],
)
def test_pieces_that_do_not_fit_are_refused(pieces, cut, shape):
    with pytest.raises(ConfigError, match="its pieces make up"):
        join_tensors(pieces, cut, shape)


def test_molbarts_plan_fits_its_modules():
    config = ModelConfig(num_layers=2, hidden_size=16, num_attention_heads=2)
    model = MOLBART.build(config, 7, 10, 0)
    modules = dict(model.named_modules())
    plan = MOLBART.tensor_parallel_plan
    assert set(plan.values()) == set(PLAN_WORDS)
    for pattern in plan:
        assert any(find_word({pattern: "row"}, name) for name in modules), pattern
    linear = [name for name, module in modules.items() if hasattr(module, "weight") and module.weight.dim() == 2]
    assert all(find_word(plan, name) in ("column", "row", "vocab") for name in linear)
