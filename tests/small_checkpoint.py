"""A biokit checkpoint of a tiny model with random weights and moments, made in no time; shared by tests of exchange."""

from __future__ import annotations

from pathlib import Path

import torch

from biokit.checkpoint import load_checkpoint, save_checkpoint
from biokit.config import RunConfig, config_from_dict, config_hash, config_to_dict
from biokit.exchange.source import Blueprint
from biokit.parallel.strategy import MOMENTS
from biokit.runs import RunFolder
from biokit.tokenizers import SmilesTokenizer

STATE = {"step": 5, "position": {"epoch": 0, "sample": 40}, "best_val_loss": 1.25, "evaluations_since_best": 1}


def small_config(**model) -> RunConfig:
    """Two layers a side, 6 in the list; 523 tokens, which neither 2 nor 4 divides."""
    sizes = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, **model}
    return config_from_dict({"model": sizes, "data": {"max_length": 60}})


def random_tensors(blueprint: Blueprint, seed: int = 0) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(weights, moments) with no value twice, but that one is NaN."""
    generator = torch.Generator().manual_seed(seed)
    model = {name: torch.randn(form.shape, generator=generator) for name, form in blueprint.template.items()}
    model["encoder.0.ffn.up.bias"][3] = torch.nan
    optimizer = {
        f"{moment}.{name}": torch.tensor(5.0) if moment == "step" else torch.rand(form.shape, generator=generator)
        for name, form in blueprint.template.items()
        for moment in MOMENTS
    }
    return model, optimizer


def small_checkpoint(run: Path, with_optimizer: bool = True, **model) -> Path:
    """The checkpoint of step 5 of a run folder."""
    config, tokenizer = small_config(**model), SmilesTokenizer.packaged()
    weights, moments = random_tensors(Blueprint(config, tokenizer.vocab_size))
    about = {
        "config": config_to_dict(config),
        "config_hash": config_hash(config),
        "vocab_hash": tokenizer.hash,
        "data_hash": "d",
        "layout": {"strategy": "Single"},
    }
    folder = RunFolder(run)
    folder.create()
    text = "\n".join(tokenizer.vocabulary) + "\n"
    state = {**STATE, "scaler": {}}
    return save_checkpoint(folder, 5, weights, moments if with_optimizer else {}, state, about, text)


def assert_same(first: Path, second: Path) -> None:
    """Two checkpoints hold the same names and bytes, state and manifest (less the hashes of files)."""
    one, two = load_checkpoint(first), load_checkpoint(second)
    for found, expected in ((two.model, one.model), (two.optimizer, one.optimizer)):
        assert set(found) == set(expected)
        for name in expected:
            assert same_bits(found[name], expected[name]), name
    assert one.state == two.state
    assert {**one.manifest, "files": 0} == {**two.manifest, "files": 0}
    assert (first / "vocab.txt").read_bytes() == (second / "vocab.txt").read_bytes()


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Equality of bytes, which holds for NaN too."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return first.contiguous().reshape(-1).view(torch.uint8).equal(second.contiguous().reshape(-1).view(torch.uint8))
