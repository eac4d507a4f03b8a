"""A small model, a checkpoint of it, and its layer files, for the tests of layer-wise loading."""

from dataclasses import replace
from functools import partial

import torch
from safetensors.torch import save_file

from biokit.checkpoint import save_checkpoint
from biokit.config import RunConfig, config_to_dict
from biokit.exchange.layers import split_layers
from biokit.models.molbart import MOLBART
from biokit.parallel.strategy import ModelParts
from biokit.runs import RunFolder

VOCABULARY = ["<PAD>", "?", "^", "&", "<MASK>", "<SEP>", *"CNO()=1"]  # 13 tokens
CPU = torch.device("cpu")


def make_config(tied=False):
    config = RunConfig()
    keys = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "dropout": 0.0, "tie_word_embeddings": tied}
    config.model = replace(config.model, **keys)
    config.data = replace(config.data, max_length=20)
    return config


def make_parts(config, vocab_size=13, seed=9):
    sizes = (config.model, vocab_size, config.data.max_length, seed)
    tied = MOLBART.tied_parameters(config.model)
    plan = MOLBART.tensor_parallel_plan
    return ModelParts(MOLBART.layers(*sizes), partial(MOLBART.build, *sizes), plan, tied, MOLBART.batch_keys, 0)


def save(run_dir, config, seed=1):
    """A checkpoint of a model; returns (its folder, the model)."""
    model = make_parts(config, seed=seed).build()
    folder = RunFolder(run_dir)
    folder.create()
    about = {"config": config_to_dict(config), "vocab_hash": "v1"}
    weights = dict(model.named_parameters())
    return save_checkpoint(
        folder, 3, weights, {"step.x": torch.ones(())}, {}, about, "\n".join(VOCABULARY) + "\n"
    ), model


def split_model(folder, tied=False):
    """(configuration, trained model, folder of its layer files)."""
    config = make_config(tied)
    checkpoint, model = save(folder / "run", config)
    split_layers(checkpoint, folder / "layers")
    return config, model, folder / "layers"


def inputs():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(6, len(VOCABULARY), (3, 7), generator=generator) for _ in range(2)]


def same_state(found, expected):
    found, expected = dict(found.named_parameters()), dict(expected.named_parameters())
    return list(found) == list(expected) and all(torch.equal(found[name], expected[name]) for name in expected)


def write_file(path, content):
    if path.suffix == ".pt":
        torch.save(content, path)
    else:
        save_file(content, path)
