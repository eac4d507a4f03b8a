"""Kernels: every fast form against its reference, values and gradients; a mutated reference must be told apart.

Bounds: fp32 sums of n terms, done in another order, differ by at most about n * 2^-24 relative; the sizes here keep
that below 2e-5. A mutation is a change ten times as large as the bound.
"""

import pytest
import torch

from biokit.kernels import attention, cross_entropy, dispatch, dropout, layer_norm

BOUND = 2e-5


def gradients(function, *inputs):
    leaves = [x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    value = function(*leaves)
    weights = torch.linspace(-1, 1, value.numel()).view(value.shape)
    (value * weights).sum().backward()
    return [value.detach(), *(leaf.grad for leaf in leaves if leaf.is_floating_point())]


def largest_difference(first, second):
    return max(float((a - b).abs().max() / (1 + b.abs().max())) for a, b in zip(first, second, strict=True))


@pytest.fixture
def layer_norm_inputs():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*shape, generator=generator) for shape in ((4, 7, 33), (33,), (33,))]


def test_layer_norm(layer_norm_inputs):
    expected = gradients(layer_norm.layer_norm_reference, *layer_norm_inputs)
    assert largest_difference(gradients(layer_norm.layer_norm, *layer_norm_inputs), expected) < BOUND


def test_layer_norm_mutation_fails(layer_norm_inputs):
    expected = gradients(layer_norm.layer_norm_reference, *layer_norm_inputs)
    mutated = gradients(lambda x, w, b: layer_norm.layer_norm_reference(x, w, b, eps=1e-5 + 1e-3), *layer_norm_inputs)
    assert largest_difference(mutated, expected) > 10 * BOUND


@pytest.fixture
def cross_entropy_inputs():
    generator = torch.Generator().manual_seed(2)
    logits = 5 * torch.randn(50, 523, generator=generator)
    labels = torch.randint(0, 523, (50,), generator=generator)
    labels[::7] = 0
    return logits, labels


def test_cross_entropy(cross_entropy_inputs):
    logits, labels = cross_entropy_inputs
    expected = gradients(lambda x: cross_entropy.cross_entropy_reference(x, labels, 0).view(1) / 50, logits)
    found = gradients(lambda x: cross_entropy.cross_entropy_sum(x, labels, 0).view(1) / 50, logits)
    assert largest_difference(found, expected) < BOUND


def test_cross_entropy_mutation_fails(cross_entropy_inputs):
    logits, labels = cross_entropy_inputs
    expected = cross_entropy.cross_entropy_reference(logits, labels, 0)
    not_ignored = cross_entropy.cross_entropy_sum(logits, labels, -100)
    assert abs(float(not_ignored - expected)) / float(expected) > 10 * BOUND


def test_cross_entropy_of_no_valid_token_is_zero():
    for function in (cross_entropy.cross_entropy_reference, cross_entropy.cross_entropy_torch):
        assert float(function(torch.randn(3, 5), torch.zeros(3, dtype=torch.long), 0)) == 0.0


def test_cross_entropy_survives_large_logits():
    logits = torch.tensor([[1e4, 0.0, -1e4]])
    labels = torch.tensor([1])
    assert float(cross_entropy.cross_entropy_reference(logits, labels, 0)) == pytest.approx(1e4)


@pytest.fixture
def attention_inputs():
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2, 3, 9, 8, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("masked", [False, True])
def test_attention(attention_inputs, masked):
    mask = (torch.arange(9) < torch.tensor([[9], [4]])) if masked else None
    causal = not masked
    expected = gradients(lambda q, k, v: attention.attention_reference(q, k, v, mask, causal), *attention_inputs)
    found = gradients(lambda q, k, v: attention.attention(q, k, v, mask, causal), *attention_inputs)
    assert largest_difference(found, expected) < BOUND


def test_attention_mutation_fails(attention_inputs):
    q, k, v = attention_inputs
    expected = attention.attention_reference(q, k, v, None, True)
    assert largest_difference([attention.attention_sdpa(q * 1.01, k, v, None, True)], [expected]) > 10 * BOUND


def test_attention_of_the_next_token_sees_all_keys(attention_inputs):
    q, k, v = attention_inputs
    whole = attention.attention_reference(q, k, v, None, causal=True)
    last = attention.attention_reference(q[:, :, -1:], k, v, None, causal=True)
    assert torch.equal(last, whole[:, :, -1:]) or torch.allclose(last, whole[:, :, -1:], atol=BOUND)


def test_attention_dropout_keeps_the_mean():
    torch.manual_seed(0)
    q = k = torch.zeros(1, 1, 400, 4)
    v = torch.ones(1, 1, 400, 4)
    for function in (attention.attention_reference, attention.attention_sdpa):
        mean = function(q, k, v, None, False, 0.1).mean()
        # 160,000 weights kept with p = 0.9: standard error of the mean 0.33 / 400
        assert abs(float(mean) - 1.0) < 5 * 0.33 / 400


def dropout_zeros(function, p, seed=0):
    torch.manual_seed(seed)
    x = torch.ones(1000, 1000, requires_grad=True)
    y = function(x, p)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())  # the gradient meets the same mask
    kept = y.detach()[y.detach() != 0]
    assert float(kept.max() - kept.min()) == 0.0
    return float((y == 0).float().mean()), float(y.detach().mean())


@pytest.mark.parametrize("function", [dropout.dropout_reference, dropout.dropout])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_law(function, p):
    share, mean = dropout_zeros(function, p)
    sigma = (p * (1 - p) / 1e6) ** 0.5
    assert abs(share - p) < 5 * sigma + 0.5 / dropout.LEVELS
    assert abs(mean - 1.0) < 5 * sigma / (1 - p) + 1e-5


def test_dropout_mutation_fails():
    share, _ = dropout_zeros(lambda x, p: dropout.dropout_lanes(x, p + 0.01), 0.1)
    assert abs(share - 0.1) > 10 * 5 * (0.09 / 1e6) ** 0.5 / 2


def test_dropout_follows_torchs_seed():
    x = torch.ones(7, 11)
    masks = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        masks.append((dropout.dropout(x, 0.5), dropout.dropout(x, 0.5)))
    assert all(torch.equal(a, b) for a, b in zip(masks[0], masks[2], strict=True))
    assert not torch.equal(masks[0][0], masks[1][0])
    assert not torch.equal(masks[0][0], masks[0][1])


def test_dropout_of_nothing_is_the_input():
    x = torch.ones(3)
    assert dropout.dropout(x, 0.0) is x


def test_bf16_on_the_cpu_takes_the_plain_form():
    assert attention.implementation("cpu", torch.bfloat16) == "reference"
    assert attention.implementation("cpu", torch.float32) == "sdpa"
    assert attention.implementation("cpu", torch.float32, dropout_p=0.1) == "reference"


def test_references_can_be_forced(monkeypatch):
    monkeypatch.setenv("BIOKIT_KERNELS", "reference")
    assert dispatch.reference_forced()
    assert layer_norm.implementation() == cross_entropy.implementation() == "reference"
    assert attention.implementation("cpu", torch.float32) == "reference"
