"""Adapters: they begin as nothing, are alone trained, and merge into the layer."""

import pytest
import torch
from torch import nn

from biokit.config import TrainConfig
from biokit.errors import ConfigError
from biokit.parallel.layer_loading import load_layers
from biokit.parallel.lora import LoraConfig, LoraLinear, add_adapters, merge_adapters
from biokit.parallel.single import Single
from tests.layer_folder import inputs, make_parts, same_state, split_model

CPU = torch.device("cpu")
LORA = LoraConfig(rank=4, dropout=0.0)


def test_adapters_begin_as_nothing_and_are_alone_trained(tmp_path):
    config, model, folder = split_model(tmp_path)
    parts = load_layers(make_parts(config), folder, "lora", LORA)
    adapted = parts.build().eval()
    assert torch.equal(adapted(*inputs()), model.eval()(*inputs()))
    adapters = [name for name, module in adapted.named_modules() if isinstance(module, LoraLinear)]
    assert len(adapters) == 2 + 2 * 3  # encoder: qkv; decoder: qkv, q, kv
    trained = {name for name, weight in adapted.named_parameters() if weight.requires_grad}
    assert trained == {f"{name}.{leaf}" for name in adapters for leaf in ("lora_a", "lora_b")}
    assert len({adapted.get_parameter(f"{name}.lora_a").sum().item() for name in adapters}) == len(adapters)
    assert all(same_state(build(), own) for (_, build), own in zip(parts.layers, adapted.layers(), strict=True))
    assert parts.template().keys() == dict(adapted.named_parameters()).keys()


def test_training_moves_adapters_only_and_merging_keeps_the_outputs(tmp_path):
    config, model, folder = split_model(tmp_path)
    parts = load_layers(make_parts(config), folder, "lora", LORA)
    strategy = Single(parts.build(), TrainConfig(weight_decay=0.1), 0, CPU)
    source, target = inputs()
    batch = {"encoder_ids": source, "decoder_ids": target, "labels": target}
    losses = [strategy.train_batch([batch], target.numel(), [step], 1e-2).sums.loss for step in range(5)]
    assert losses[-1] < losses[0]
    adapted, base = strategy.model.eval(), dict(model.named_parameters())
    assert all(torch.equal(adapted.get_parameter(name), base[name]) for name in base)
    expected = adapted(*inputs())
    assert (expected - model.eval()(*inputs())).abs().max().item() > 0.01
    assert merge_adapters(adapted) == 8 and merge_adapters(adapted) == 0
    torch.testing.assert_close(adapted(*inputs()), expected, rtol=0, atol=1e-5)  # fp32, logits of order 1
    assert list(dict(adapted.named_parameters())) == list(base)
    assert all(weight.requires_grad for name, weight in adapted.named_parameters() if name.endswith("qkv.weight"))


def test_adapters_scale_and_drop_as_configured():
    layer = nn.Sequential(nn.Linear(3, 2, bias=False))
    assert add_adapters(layer, LoraConfig(rank=2, alpha=6.0, dropout=0.5, targets=("0",))) == 1
    with torch.no_grad():
        layer[0].lora_b.fill_(1.0)
    x = torch.ones(2000, 3)
    low = (x @ layer[0].lora_a.T).sum(-1, keepdim=True) * 6.0 / 2
    assert torch.allclose(layer.eval()(x) - x @ layer[0].weight.T, low.expand(-1, 2), atol=1e-5)
    dropped = layer.train()(x) - x @ layer[0].weight.T
    assert dropped.std() > 0.01
    assert torch.allclose(dropped.mean(0), low[0], atol=5 * dropped.std().item() / 2000**0.5)


def test_freezing_and_impossible_adapters(tmp_path):
    config, _, folder = split_model(tmp_path)
    frozen = load_layers(make_parts(config), folder, "freeze").build()
    assert not any(weight.requires_grad for weight in frozen.parameters())
    with pytest.raises(ConfigError, match="no linear layer of the model is named query"):
        load_layers(make_parts(config), folder, "lora", LoraConfig(targets=("query",)))
    with pytest.raises(ConfigError, match="Valid: full, lora, freeze"):
        load_layers(make_parts(config), folder, "some")
    with pytest.raises(ConfigError, match="rank=0"):
        LoraConfig(rank=0)
