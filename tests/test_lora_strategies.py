"""Frozen weights and adapters under every engine: trained as one process trains them, saved and loaded again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from biokit.config import ParallelConfig, RunConfig, TrainConfig
from biokit.parallel.grid import Layout
from biokit.parallel.layer_loading import load_layers
from biokit.parallel.lora import LoraConfig
from biokit.parallel.processes import join_processes
from biokit.parallel.strategy import Strategy, make_strategy
from tests.distributed import TIMEOUT_S, ranks
from tests.layer_folder import inputs, make_config, make_parts, split_model

LAYOUTS = [
    Layout("DDP", data=2),
    Layout("Zero1", data=2),
    Layout("Zero2", data=2),
    Layout("Zero3", data=2),
    Layout("Pipeline", pipeline=2),
]


def train_adapters(folder: str, layout: Layout) -> dict[str, Any]:
    """Two steps, a save, a load into a fresh strategy, two steps more."""
    config = RunConfig(
        strategy=layout.strategy,
        model=make_config().model,
        train=TrainConfig(micro_batch_size=3, global_batch_size=6, clip_grad=0.1, weight_decay=0.01),
        parallel=ParallelConfig(pipeline_model_parallel_size=layout.pipeline),
    )
    losses: list[float] = []
    with join_processes(torch.device("cpu"), TIMEOUT_S, layout.strategy != "Single") as processes:
        parts = load_layers(make_parts(make_config()), Path(folder), "lora", LoraConfig(rank=4, dropout=0.0))
        first = make_strategy(parts, config, layout, processes)
        losses += [run_step(first, step) for step in range(2)]
        states = first.model_state(), first.optimizer_state()
        first.close()
        states = [state if processes.is_main else {} for state in states]
        torch.distributed.broadcast_object_list(states) if processes.world_size > 1 else None
        second = make_strategy(parts, config, layout, processes)
        second.load(*states, {})
        losses += [run_step(second, step) for step in range(2, 4)]
        weights = second.model_state()
        second.close()
    return {"losses": losses, "weights": weights}


def run_step(strategy: Strategy, step: int) -> float:
    source, target = inputs()
    batch = {"encoder_ids": source, "decoder_ids": target, "labels": target.roll(step, dims=1)}
    micros = [batch, {**batch, "labels": target.roll(step + 3, dims=1)}]
    data = strategy.layout.data
    own = micros if data == 1 else micros[strategy.place.data : strategy.place.data + 1]
    seeds = list(range(strategy.place.data, 2, data))
    return strategy.train_batch(own, 2 * target.numel(), seeds, 1e-2).sums.loss / (2 * target.numel())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    _config, model, folder = split_model(tmp_path_factory.mktemp("lora"))
    return dict(model.named_parameters()), str(folder), train_adapters(str(folder), Layout())


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_adapters_train_as_in_one_process(alone, layout):
    base, folder, expected = alone
    found = ranks(2).run(train_adapters, folder, layout)[0]
    assert expected["losses"][3] < expected["losses"][0]
    # losses of order 3: 8 ulp of 2^-22 each for the order of the sums, as in the parity tests
    assert found["losses"] == pytest.approx(expected["losses"], abs=2e-6, rel=0)
    for name, weight in found["weights"].items():
        if "lora_" in name:
            assert not torch.equal(weight, torch.zeros_like(weight))
        else:
            assert torch.equal(weight, base[name]), name
