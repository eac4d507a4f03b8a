"""The picture of a layout says what the ranks really hold; computed without starting anything."""

import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

from biokit.config import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from biokit.errors import ConfigError
from biokit.models.molbart import MOLBART
from biokit.parallel.grid import Layout
from biokit.parallel.processes import join_processes
from biokit.parallel.strategy import ModelParts, make_strategy
from biokit.planning.holdings import RankMemory, find_holdings, rank_memory
from biokit.view.parallel import MAX_RANKS, show_layout
from biokit.view.picture import PNG_SIGNATURE
from tests.distributed import TIMEOUT_S, ranks

VOCAB_SIZE = 61  # no tp divides it


def make_config(tied=False, **parallel):
    sizes = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 64}
    return RunConfig(
        strategy="ThreeD",
        model=ModelConfig(**sizes, tie_word_embeddings=tied),
        train=TrainConfig(device="cpu", micro_batch_size=2, global_batch_size=16),
        parallel=ParallelConfig(**parallel),
    )


def count_parameters(config, layout):
    """On a rank: parameters of its part of the model."""
    with join_processes(torch.device("cpu"), TIMEOUT_S, needs_group=True) as processes:
        args = (config.model, VOCAB_SIZE, config.data.max_length, config.seed)
        tied, build = MOLBART.tied_parameters(config.model), partial(MOLBART.build, *args)
        parts = ModelParts(MOLBART.layers(*args), build, MOLBART.tensor_parallel_plan, tied, MOLBART.batch_keys, 0)
        strategy = make_strategy(parts, config, layout, processes)
        named = list(strategy.model.named_parameters())
        strategy.close()
    return sum(parameter.numel() for name, parameter in named if not name.startswith("idle_"))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_each_rank_holds_what_the_picture_says(tied):
    config, layout = make_config(tied), Layout("ThreeD", tensor=2, pipeline=2)
    holdings = find_holdings(config, layout, VOCAB_SIZE)
    assert [sum(held) for held in holdings.held] == ranks(4).run(count_parameters, config, layout)


def test_stages_and_tensor_ranks_make_up_the_model():
    whole = find_holdings(make_config(), Layout(), VOCAB_SIZE)
    assert whole.layers == ["embed", "encoder.0", "encoder.1", "decoder.0", "decoder.1", "head"]
    assert whole.held == [whole.sizes]
    cut = find_holdings(make_config(), Layout("ThreeD", tensor=2, pipeline=2), VOCAB_SIZE)
    norms = 2 * 32 * torch.tensor([0, 2, 3, 3, 3, 1])  # weight and bias; the last encoder layer has the memory's too
    rows = 32 * torch.tensor([0, 2, 2, 3, 3, 0])  # biases of row layers
    padding = torch.tensor([32, 0, 0, 0, 0, 32 + 1])  # one token more
    held = torch.tensor(cut.held).sum(0)
    assert held.tolist() == (torch.tensor(whole.sizes) + norms + rows + padding).tolist()
    assert all(not (a and b) for a, b in zip(cut.held[0], cut.held[2], strict=True))


def test_zero_cuts_what_its_stage_says():
    expected = {"DDP": (40, 40, 80, 0), "Zero1": (40, 40, 40, 20), "Zero2": (40, 20, 40, 20), "Zero3": (20, 20, 40, 20)}
    for name, (weights, gradients, moments, copies) in expected.items():
        memory = rank_memory(Layout(name, data=2), 10)
        assert memory == RankMemory(10, weights, gradients, moments, copies)
        assert memory.total == weights + gradients + moments + copies
    holdings = find_holdings(replace(make_config(), strategy="Zero3"), Layout("Zero3", data=4), VOCAB_SIZE)
    assert holdings.kept(1) == [-(-size // 4) for size in holdings.sizes]


def test_the_words_say_what_the_picture_shows():
    picture = show_layout(make_config(tensor_model_parallel_size=2, pipeline_model_parallel_size=2), 8)
    assert picture.png.startswith(PNG_SIGNATURE)
    lines = picture.alt.splitlines()
    assert lines[0].startswith("molbart mini under ThreeD x tp2 x pp2 x dp2: 8 processes. Layers: embed, encoder.0")
    assert lines[1].startswith("rank 0 (stage 0, data 0, tensor 0) holds 50% of embed, ")
    assert "head" not in lines[1] and lines[-4].startswith("rank 7 (stage 1, data 1, tensor 1) holds")
    assert "DeepSpeed's copy" in lines[2] and lines[-2].startswith("ZeRO-1: each of the 2 data ranks")
    assert show_layout(make_config(), 1, title="Mine").alt.startswith("Mine. Layers")


@pytest.mark.parametrize("layout", [
    Layout(),
    Layout("DDP", data=3),
    Layout("ZeroInf", data=4),
    Layout("Pipeline", pipeline=6),
    Layout("ThreeD", tensor=4, data=8, pipeline=2),
    Layout("ThreeD", tensor=2, data=256, pipeline=4),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_every_layout_can_be_drawn(layout, tied):
    picture = show_layout(make_config(tied), layout)
    drawn = [line for line in picture.alt.splitlines() if line.startswith("rank ")]
    many = layout.world_size > MAX_RANKS
    assert len(drawn) == (layout.tensor * layout.pipeline if many else layout.world_size)
    assert (f"of {layout.world_size} processes are drawn" in picture.alt) == many
    assert picture.size[0] <= 1500


def test_a_table_tied_across_stages_stands_on_both():
    tied, apart = make_config(tied=True), Layout("Pipeline", pipeline=2)
    (first, last), (alone,) = (
        find_holdings(tied, apart, VOCAB_SIZE).held,
        find_holdings(tied, Layout(), VOCAB_SIZE).held,
    )
    assert first[0] == alone[0] == VOCAB_SIZE * 32 and last[-1] == alone[-1] + VOCAB_SIZE * 32
    assert "holds decoder.0, decoder.1, head" in show_layout(tied, apart, vocab_size=VOCAB_SIZE).alt


def test_impossible_layouts_are_refused_with_the_valid_ones():
    with pytest.raises(ConfigError, match=r"tp=3: it does not divide num_attention_heads=4\. Valid: 1, 2, 4\."):
        show_layout(make_config(tensor_model_parallel_size=3), 3)
    with pytest.raises(ConfigError, match=r"pp=7.*Valid: 1 to 6"):
        show_layout(make_config(), Layout("Pipeline", pipeline=7))


def test_no_engine_is_imported():
    code = (
        "import sys; from biokit.config import RunConfig; from biokit.view.parallel import show_layout; "
        "show_layout(RunConfig(), 1); "
        "print(*(name for name in ('megatron', 'deepspeed') if name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == []
