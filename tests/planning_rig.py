"""Real training steps on ranks of this machine, watched from outside: what is alive at most, and what is sent.

Independent of `biokit.planning`: storages are found by the garbage collector before the step, and by torch's dispatcher
in it; messages by their c10d operations.
"""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from biokit.config import DataConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from biokit.layouts import model_parts
from biokit.parallel.grid import Layout
from biokit.parallel.processes import join_processes
from biokit.parallel.strategy import make_strategy
from tests.distributed import TIMEOUT_S

VOCAB_SIZE, FIRST_TOKEN, LENGTH = 523, 5, 64
WARM_UP = 3  # steps; DDP settles its buckets in the first, ZeRO-3 knows the order of layers from the second on
KINDS = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "broadcast_": "broadcast",
    "send": "send",
    "recv_": "recv",
}


def make_config(
    layout: Layout,
    *,
    num_micros: int = 2,
    micro_batch_size: int = 4,
    precision: str = "fp32",
    recompute: bool = False,
    device: str = "cpu",
    deepspeed_config: str = "",
    partition: bool = False,
    **sizes: Any,
) -> RunConfig:
    """A small MolBART in whose steps activations and states weigh about the same."""
    model = {"num_layers": 2, "hidden_size": 128, "num_attention_heads": 4, "ffn_hidden_size": 512} | sizes
    train = TrainConfig(
        device=device,
        micro_batch_size=micro_batch_size,
        global_batch_size=micro_batch_size * num_micros * layout.data,
        precision=precision,
        checkpoint_activations=recompute,
    )
    parallel = ParallelConfig(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        deepspeed_config=deepspeed_config,
        partition_activations=partition,
    )
    data = DataConfig(max_length=LENGTH)
    return RunConfig(strategy=layout.strategy, data=data, model=ModelConfig(**model), train=train, parallel=parallel)


@dataclass
class Step:
    """What a rank showed in one step.

    Attributes:
        peak: most bytes of live tensors; `in_update`: when AdamW began; `at_rest`: before the step.
        messages: (kind, bytes) -> how many, those of groups of one rank left out.
    """

    peak: int = 0
    in_update: int = 0
    at_rest: int = 0
    messages: Counter[tuple[str, int]] = field(default_factory=Counter)


def watch_step(config: RunConfig, layout: Layout) -> Step:
    """On every rank: train, and watch a step once all is settled."""
    before = Watcher()
    before.find_all()
    with join_processes(torch.device("cpu"), TIMEOUT_S, needs_group=layout.world_size > 1) as processes:
        strategy = make_strategy(model_parts(config, VOCAB_SIZE, 0), config, layout, processes)
        micros = make_micro_batches(config, layout, strategy.place.data)
        num_valid = config.train.global_batch_size * LENGTH
        for _ in range(WARM_UP):
            strategy.train_batch(micros, num_valid, range(len(micros)), 1e-4)
        watcher, step = Watcher(), Step()
        watcher.find_all()
        step.at_rest = watcher.live
        strategy.optimizer.register_step_pre_hook(
            lambda *_: setattr(step, "in_update", max(step.in_update, watcher.live))
        )
        with watcher:
            strategy.train_batch(micros, num_valid, range(len(micros)), 1e-4)
        strategy.close()
    step.peak, step.messages = watcher.peak, watcher.messages
    for name in ("peak", "in_update", "at_rest"):
        setattr(step, name, getattr(step, name) - before.live)
    return step


def make_micro_batches(config: RunConfig, layout: Layout, seed: int) -> list[dict[str, torch.Tensor]]:
    """Of full length; as many on every data rank."""
    generator = torch.Generator().manual_seed(seed)
    shape = config.train.micro_batch_size, LENGTH
    return [
        {
            key: torch.randint(FIRST_TOKEN, VOCAB_SIZE, shape, generator=generator)
            for key in ("encoder_ids", "decoder_ids", "labels")
        }
        for _ in range(config.train.global_batch_size // (config.train.micro_batch_size * layout.data))
    ]


class Watcher(TorchDispatchMode):
    """Live storages by address, and messages."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.live = self.peak = 0
        self.messages: Counter[tuple[str, int]] = Counter()

    def find_all(self) -> None:
        """Every tensor that the garbage collector knows."""
        gc.collect()
        for found in gc.get_objects():
            if issubclass(type(found), torch.Tensor) and not found.is_meta:
                for tensor in (found, found.grad if found.is_leaf else None):
                    if tensor is not None:
                        self._add(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._count(func, args)
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors([out]):
            self._add(tensor)
        return out

    def _count(self, func: Any, args: Any) -> None:
        sizes = []
        for value in args:
            if isinstance(value, torch.ScriptObject):
                try:
                    sizes.append(dist.ProcessGroup.unbox(value).size())
                except (RuntimeError, TypeError):
                    continue  # the operation of a reduction
        if sizes[0] > 1:
            name = func._schema.name.removeprefix("c10d::")
            kind, tensors = KINDS.get(name, "all_gather"), list(_tensors(args))
            parts = tensors[:-1] if name == "allgather_" else [max(tensors, key=lambda tensor: tensor.nbytes)]
            self.messages[kind, sum(tensor.nbytes for tensor in parts)] += 1

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address not in self.sizes:
            self.sizes[address] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._drop, address).atexit = False

    def _drop(self, address: int) -> None:
        self.live -= self.sizes.pop(address)


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
