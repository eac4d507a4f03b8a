"""What the benchmarks of strategies share: MolBART under a layout, on real batches, on ranks of this machine."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from biokit.config import DataConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from biokit.data.batching import rank_rows
from biokit.data.micro_batches import own_micro_batches
from biokit.data.molecules import MoleculeLoader
from biokit.models.molbart import MOLBART
from biokit.parallel.grid import Layout, deal_micro_batches
from biokit.parallel.processes import join_processes
from biokit.parallel.strategy import ModelParts, Strategy, make_strategy
from biokit.tokenizers import SmilesTokenizer
from tests.bench import corpora

VOCAB, POSITIONS, PAD, SEED = 523, 512, 0, 1
CPU = torch.device("cpu")
TIMEOUT_S = 300.0

Arrays = dict[str, np.ndarray]
Micros = list[dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Rig:
    """A model under a layout, and the sizes of its batches."""

    layout: Layout
    model: ModelConfig
    micro_batch_size: int
    global_batch_size: int

    @property
    def config(self) -> RunConfig:
        """The run's configuration: fp32, clipping at 1, on the CPU."""
        tensor, pipeline = self.layout.tensor, self.layout.pipeline
        train = TrainConfig(
            device="cpu",
            micro_batch_size=self.micro_batch_size,
            global_batch_size=self.global_batch_size,
            clip_grad=1.0,
            lr=1e-4,
        )
        return RunConfig(
            strategy=self.layout.strategy,
            model=self.model,
            train=train,
            parallel=ParallelConfig(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline),
        )

    @property
    def parts(self) -> ModelParts:
        """MolBART as strategies take it."""
        args = (self.model, VOCAB, POSITIONS, SEED)
        build, plan = partial(MOLBART.build, *args), MOLBART.tensor_parallel_plan
        return ModelParts(MOLBART.layers(*args), build, plan, {}, MOLBART.batch_keys, PAD)


@dataclass(frozen=True)
class Batch:
    """A data rank's share of a global batch."""

    micros: Micros
    seeds: Sequence[int]
    num_valid: int


@contextmanager
def start(rig: Rig) -> Iterator[Strategy]:
    """The strategy of a rig on this rank, closed at the end."""
    with join_processes(CPU, TIMEOUT_S, rig.layout.world_size > 1) as processes:
        strategy = make_strategy(rig.parts, rig.config, rig.layout, processes)
        try:
            yield strategy
        finally:
            strategy.close()


def read_batches(num_rows: int, num_batches: int, limit: int = 2_000) -> list[Arrays]:
    """Masked, padded batches of WEHI molecules from length buckets, as a training on them begins."""
    tokenizer, smiles = SmilesTokenizer.packaged(), corpora.load_smiles("WEHI", limit)
    assert smiles is not None
    with tempfile.TemporaryDirectory() as folder:
        store = corpora.write_store(Path(folder) / "train", tokenizer, smiles)
        loader = MoleculeLoader(store, None, tokenizer, DataConfig(max_length=POSITIONS), SEED, num_rows)
        return [{key: batch[key] for key in MOLBART.batch_keys} for batch in islice(loader.epoch(0), num_batches)]


def share(batch: Mapping[str, np.ndarray], rig: Rig, strategy: Strategy) -> Batch:
    """What a rank takes of a global batch, as training deals it."""
    size, data_rank, num_ranks = rig.micro_batch_size, strategy.place.data, rig.layout.data
    own = deal_micro_batches(rig.global_batch_size // size, data_rank, num_ranks)
    rows = rank_rows(rig.global_batch_size, size, data_rank, num_ranks)
    arrays = {key: ids[rows] for key, ids in batch.items()}
    micros = own_micro_batches(arrays, size, PAD, MOLBART.batch_keys, rig.global_batch_size, own)
    return Batch(micros, list(own), int((batch[MOLBART.batch_keys[-1]] != PAD).sum()))
