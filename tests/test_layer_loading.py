"""Layer-wise loading: bitwise the checkpoint under every strategy, in memory of own layers plus one."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from biokit.errors import CheckpointError
from biokit.parallel.grid import plan_layout
from biokit.parallel.layer_files import layer_file_name
from biokit.parallel.layer_loading import load_layers
from biokit.parallel.processes import join_processes
from biokit.parallel.strategy import ModelParts, make_strategy
from tests.distributed import TIMEOUT_S, Ranks, ranks
from tests.layer_folder import inputs, make_config, make_parts, same_state, split_model, write_file

CPU = torch.device("cpu")
TIED = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


@TIED
def test_a_model_from_layer_files_is_the_checkpoint(tmp_path, tied):
    config, model, folder = split_model(tmp_path, tied)
    parts = load_layers(make_parts(config), folder, vocabulary_hash="v1")
    before = torch.get_rng_state()
    whole = parts.build()
    assert same_state(whole, model)
    assert (whole.head.tokens.weight is whole.embed.embedding.tokens.weight) == tied
    carry = tuple(inputs())
    for (_, build), own in zip(parts.layers, model.layers(), strict=True):
        layer = build()
        assert same_state(layer, own)
        carry = layer(carry)
    assert torch.equal(carry, model(*inputs()))  # positions are no parameters: they were made again
    assert torch.equal(whole(*inputs()), carry)
    assert torch.equal(torch.get_rng_state(), before)
    assert parts.template().keys() == make_parts(config).template().keys()


def test_weights_outlive_their_files(tmp_path):
    config, model, folder = split_model(tmp_path)
    whole = load_layers(make_parts(config), folder).build()
    for path in folder.glob("model.*"):
        path.write_bytes(b"\0" * path.stat().st_size)
    assert same_state(whole, model)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_files_without_an_index(tmp_path, suffix):
    config = make_config()
    model = make_parts(config, seed=1).build()
    for i, layer in enumerate(model.layers()):
        path, weights = tmp_path / layer_file_name(i, suffix), {k: v.detach() for k, v in layer.named_parameters()}
        torch.save(weights, path) if suffix == ".pt" else save_file(weights, path)
    assert same_state(load_layers(make_parts(config), tmp_path).build(), model)
    (tmp_path / layer_file_name(3, suffix)).rename(tmp_path / "away")
    with pytest.raises(CheckpointError, match=rf"missing model\.layers\.3\{suffix}"):
        load_layers(make_parts(config), tmp_path)


def test_a_grown_vocabulary_begins_at_the_mean(tmp_path):
    config, model, folder = split_model(tmp_path)
    grown = load_layers(make_parts(config, 16), folder, new_num_tokens=16, vocabulary_hash="v2").build()
    old, new = model.head.tokens.weight, grown.head.tokens.weight
    assert torch.equal(new[:13], old) and torch.equal(new[13:], old.double().mean(0).float().expand(3, -1))
    logits, expected = grown(*inputs()), model(*inputs())
    torch.testing.assert_close(logits[..., :13], expected, rtol=0, atol=1e-5)  # fp32, logits of order 1
    torch.testing.assert_close(logits[..., 15], expected.mean(-1), rtol=0, atol=1e-5)
    with pytest.raises(CheckpointError, match=r"\(13, 16\) float32 instead of \(16, 16\)"):
        load_layers(make_parts(config, 16), folder)


def start_strategy(folder, tied, name, tp, pp):
    """The state of a strategy that begins from layer files, on the main process."""
    config = make_config(tied)
    config.strategy = name
    config.train = replace(config.train, device="cpu", micro_batch_size=2, global_batch_size=8)
    config.parallel = replace(config.parallel, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    parts = load_layers(make_parts(config), folder)
    with join_processes(CPU, TIMEOUT_S, needs_group=True) as processes:
        layout = plan_layout(config, processes.world_size, {"num_attention_heads": 2}, len(parts.layers))
        strategy = make_strategy(parts, config, layout, processes)
        state = strategy.model_state()
        strategy.close()
    return state


@pytest.mark.parametrize(("name", "tp", "pp"), [("Zero3", 1, 0), ("Pipeline", 1, 2), ("ThreeD", 2, 1)])
@TIED
def test_strategies_begin_from_layer_files(tmp_path, tied, name, tp, pp):
    _, model, folder = split_model(tmp_path, tied)
    state, _ = ranks(2).run(start_strategy, folder, tied, name, tp, pp)
    expected = dict(model.named_parameters())
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)


WIDTH, MATRICES = 1024, 4
LAYER_BYTES = MATRICES * WIDTH * WIDTH * 4


def build_block():
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(MATRICES)))


def read_status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def measure_growth(folder, shares):
    """Bytes by which this process grows as it builds its layers, at the peak and in the end.

    `peak` is that of VmHWM: anonymous pages and those of mapped files together; `kept` that of anonymous pages.
    """
    parts = ModelParts([(f"block.{i}", build_block) for i in range(16)], nn.Module, {}, {}, (), 0)
    layers = load_layers(parts, folder).layers
    layers[0][1]()  # code pages, and what is cached once
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again
    resident, anonymous = read_status("VmRSS"), read_status("RssAnon")
    first, last = shares[int(os.environ["RANK"])]
    built = [build() for _, build in layers[first:last]]
    assert all(not weight.is_meta for layer in built for weight in layer.parameters())
    return {"peak": read_status("VmHWM") - resident, "kept": read_status("RssAnon") - anonymous}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_rank_holds_its_own_layers_and_one_more_at_most(tmp_path, suffix):
    """16 layers of 16 MiB on two stages, in fresh processes; to build all of them takes 256 MiB.

    The margin of half a layer is for what the allocator and the interpreter take meanwhile.
    """
    write_file(tmp_path / layer_file_name(0, suffix), dict(build_block().state_dict()))
    for i in range(1, 16):
        (tmp_path / layer_file_name(i, suffix)).hardlink_to(tmp_path / layer_file_name(0, suffix))
    own, one_more, margin = 8 * LAYER_BYTES, LAYER_BYTES, LAYER_BYTES // 2
    with Ranks(2) as stages:
        for grown in stages.run(measure_growth, tmp_path, [(0, 8), (8, 16)]):
            assert grown["kept"] <= own + margin
            assert own <= grown["peak"] <= own + one_more + margin
    with Ranks(1) as whole:  # the measurement finds a rank that builds all layers
        (grown,) = whole.run(measure_growth, tmp_path, [(0, 16)])
        assert grown["peak"] > own + one_more + margin
