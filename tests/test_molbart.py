"""MolBART: shapes, counts, and that the halves used by generation are the whole."""

import copy
import fnmatch

import pytest
import torch
from torch import nn

from biokit.config import ModelConfig
from biokit.errors import ConfigError
from biokit.models import find_model
from biokit.models.molbart import MOLBART, DecodingState
from biokit.parallel.cuts import PLAN_WORDS

TINY = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4)
FACTS_MILLIONS = {"xsmall": 3.96, "megatron": 7.64, "small": 44.7, "base": 50.4, "large": 236.0}


def tiny(seed=1, **keys):
    return MOLBART.build(ModelConfig(**{**vars(TINY), **keys}), 60, 40, seed).eval()


@pytest.fixture
def ids():
    generator = torch.Generator().manual_seed(0)
    src, tgt = (torch.randint(6, 60, (3, length), generator=generator) for length in (9, 7))
    src[1, 6:], tgt[2, 5:] = 0, 0
    return src, tgt


@pytest.mark.parametrize("preset", list(MOLBART.presets))
def test_parameter_counts(preset):
    with torch.device("meta"):
        model = MOLBART.build(ModelConfig(preset=preset), 523, 512)
    count = sum(p.numel() for p in model.parameters())
    assert count == MOLBART.num_parameters[preset]
    if preset in FACTS_MILLIONS:
        assert count / 1e6 == pytest.approx(FACTS_MILLIONS[preset], rel=2e-3)  # the facts give three digits


def test_same_seed_same_weights_and_layers_build_alone():
    whole = dict(tiny().named_parameters())
    for name, build in MOLBART.layers(TINY, 60, 40, 1):
        for key, parameter in build().named_parameters():
            assert torch.equal(parameter, whole[f"{name}.{key}"])
    assert not torch.equal(whole["head.tokens.weight"], tiny(seed=2).head.tokens.weight)


def test_building_leaves_the_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    tiny()
    assert torch.equal(torch.rand(1), expected)


def test_halves_equal_the_whole(ids):
    model, (src, tgt) = tiny(), ids
    assert torch.equal(model.decode(tgt, model.encode(src), src), model(src, tgt))


def test_cache_equals_the_whole(ids):
    model, (src, tgt) = tiny(), ids
    state = DecodingState(model, model.encode(src), src != 0)
    steps = torch.cat([state.advance(tgt[:, i : i + 1]) for i in range(tgt.shape[1])], dim=1)
    # fp32 sums of at most 128 terms in another order, logits of order 1
    assert float((steps - model(src, tgt)).detach().abs().max()) < 1e-5


def test_selected_rows_go_on_alone(ids):
    model, (src, tgt) = tiny(), ids
    state = DecodingState(model, model.encode(src), src != 0)
    state.advance(tgt[:, :1])
    state.select(torch.tensor([2, 0]))
    step = state.advance(tgt[[2, 0], 1:2])
    assert float((step[:, 0] - model(src, tgt)[[2, 0], 1]).detach().abs().max()) < 1e-5


def test_padding_changes_nothing(ids):
    model, (src, tgt) = tiny(), ids
    wide = torch.nn.functional.pad(src, (0, 4)), torch.nn.functional.pad(tgt, (0, 3))
    assert float((model(*wide)[:, :7] - model(src, tgt)).detach().abs().max()) < 1e-5


def test_the_future_is_hidden(ids):
    model, (src, tgt) = tiny(), ids
    other = tgt.clone()
    other[:, 4:] = 7
    assert torch.equal(model(src, tgt)[:, :4], model(src, other)[:, :4])
    assert not torch.allclose(model(src, tgt)[:, 4:], model(src, other)[:, 4:])


def test_carry_is_floats_then_ids_and_every_float_gets_a_gradient(ids):
    carry = ids
    layers = tiny().layers()
    for layer in layers[:-1]:
        carry = layer(carry)
        kinds = [tensor.is_floating_point() for tensor in carry]
        assert kinds == sorted(kinds, reverse=True)
        carry = tuple(t.detach().requires_grad_() if t.is_floating_point() else t for t in carry)
        rest = carry
        for later in layers[layers.index(layer) + 1 :]:
            rest = later(rest)
        floats = [t for t in carry if t.is_floating_point()]
        assert all(g is not None for g in torch.autograd.grad(rest.sum(), floats))


def test_the_plan_covers_every_matrix_and_matches_something():
    modules = dict(tiny().named_modules())
    planned = {
        name: word
        for pattern, word in MOLBART.tensor_parallel_plan.items()
        for name in modules
        if fnmatch.fnmatchcase(name, pattern)
    }
    for pattern, word in MOLBART.tensor_parallel_plan.items():
        assert word in PLAN_WORDS
        assert any(fnmatch.fnmatchcase(name, pattern) for name in modules), pattern
    matrices = {name for name, module in modules.items() if isinstance(module, nn.Linear | nn.Embedding)}
    assert matrices == {name for name, word in planned.items() if word != "local"}


def half(linear, rows=slice(None), columns=slice(None), bias=True):
    """A tensor rank's part of a linear layer."""
    part = nn.Linear(*reversed(linear.weight[rows, columns].shape))
    part.weight.data = linear.weight[rows, columns].detach()
    part.bias.data = linear.bias[rows].detach() if bias else torch.zeros_like(part.bias)
    return part


@pytest.mark.parametrize("cross", [False, True])
def test_fused_rows_are_ordered_by_head(cross):
    """Cut as two tensor ranks cut it (rows of QKV, columns of the output), the halves' outputs add up to the whole."""
    generator = torch.Generator().manual_seed(3)
    x, memory = torch.randn(1, 5, 32, generator=generator), torch.randn(1, 6, 32, generator=generator)
    layer = tiny().decoder[0]
    whole = layer.cross_attention if cross else layer.self_attention
    for parameter in whole.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)

    def run(attention):
        return attention(x, attention.project_memory(memory), None) if cross else attention(x, None, causal=True)

    total = torch.zeros(1, 5, 32)
    for rank in (0, 1):
        part = copy.deepcopy(whole)
        for name, size in (("q", 16), ("kv", 32)) if cross else (("qkv", 48),):
            setattr(part, name, half(getattr(whole, name), rows=slice(rank * size, (rank + 1) * size)))
        part.out = half(whole.out, columns=slice(rank * 16, rank * 16 + 16), bias=rank == 0)
        total = total + run(part)
    assert float((total - run(whole)).detach().abs().max()) < 1e-5  # fp32, outputs of order 1


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"preset": "huge"}, "mini, xsmall"),
        ({"hidden_size": 100, "num_attention_heads": 3}, "1, 2, 4, 5, 10"),
        ({"hidden_size": 33, "num_attention_heads": 3}, "even"),
    ],
)
def test_impossible_shapes(keys, words):
    with pytest.raises(ConfigError, match=words):
        MOLBART.resolve(ModelConfig(**keys))


def test_unknown_model():
    with pytest.raises(ConfigError, match="molbart"):
        find_model("molbert")


def test_too_long_a_sequence_is_refused(ids):
    with pytest.raises(ValueError, match="41 tokens exceeds the model's 40"):
        tiny()(torch.ones(1, 41, dtype=torch.long), ids[1][:1])
