"""Who does what in a run of many processes: pure arithmetic, checked before any process group exists.

Ranks are laid out as in Megatron and DeepSpeed: tensor ranks are neighbours, then data ranks, then pipeline stages.
Sample counts: B global batch, b micro-batch; B = b x micro-batches a rank x data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from biokit.config import RunConfig
from biokit.errors import ConfigError
from biokit.schema import list_divisors

DATA_PARALLEL = ("DDP", "Zero1", "Zero2", "Zero3", "ZeroInf")
STAGED = ("Pipeline", "ThreeD")
ZERO_STAGE = {"Zero1": 1, "Zero2": 2, "Zero3": 3, "ZeroInf": 3, "Pipeline": 1, "ThreeD": 1}
REPLACED = {
    "Zero0": (
        "DDP",
        "DeepSpeed without ZeRO clips by the first stage's norm only, and in bf16 takes a step on zero gradients while "
        "it starts; torch's DDP does the same work rightly",
    )
}
REFUSED = {"NNScaler": "it compiles a plan of its own for each model and machine, and biokit's models carry their plan"}
STRATEGY_NAMES = ("Single", *DATA_PARALLEL, *STAGED)


@dataclass(frozen=True)
class Place:
    """One process: its pipeline stage, data rank and tensor rank, each from 0."""

    pipeline: int
    data: int
    tensor: int


@dataclass(frozen=True)
class Layout:
    """A strategy and its sizes: tensor ranks x data ranks x pipeline stages = processes."""

    strategy: str = "Single"
    tensor: int = 1
    data: int = 1
    pipeline: int = 1

    @property
    def world_size(self) -> int:
        """Processes in all."""
        return self.tensor * self.data * self.pipeline

    def place(self, rank: int) -> Place:
        """Where a rank stands.

        Raises:
            ConfigError: there is no such rank.
        """
        if not 0 <= rank < self.world_size:
            raise ConfigError(f"rank {rank}", f"the layout has {self.world_size} processes", "Check RANK")
        rest, tensor = divmod(rank, self.tensor)
        pipeline, data = divmod(rest, self.data)
        return Place(pipeline, data, tensor)

    def rank(self, place: Place) -> int:
        """The rank that stands there."""
        return (place.pipeline * self.data + place.data) * self.tensor + place.tensor

    def as_dict(self) -> dict[str, str | int]:
        """Plain values, for manifests."""
        sizes = {"tensor": self.tensor, "data": self.data, "pipeline": self.pipeline}
        return {"strategy": self.strategy, "world_size": self.world_size, **sizes}

    def __str__(self) -> str:
        sizes = {"tp": self.tensor, "pp": self.pipeline, "dp": self.data}
        return " x ".join([self.strategy, *(f"{name}{size}" for name, size in sizes.items() if size > 1)])


def resolve_strategy(name: str) -> tuple[str, str]:
    """The strategy that runs for a name, and a line that says why where it is another one.

    Raises:
        ConfigError: there is no such strategy, or it is refused; says why and names those there are.
    """
    valid = f"Valid: {', '.join(STRATEGY_NAMES)}"
    if name in REFUSED:
        raise ConfigError(f"strategy={name}", REFUSED[name], valid)
    if name in REPLACED:
        other, reason = REPLACED[name]
        return other, f"strategy={name} runs {other}: {reason}."
    if name not in STRATEGY_NAMES:
        raise ConfigError(f"strategy={name}", "there is no such strategy", valid)
    return name, ""


def plan_layout(config: RunConfig, world_size: int, divided: Mapping[str, int], num_layers: int) -> Layout:
    """The layout of a run over `world_size` processes.

    Args:
        divided: sizes that tensor parallelism must divide, by name (`num_attention_heads`, `ffn_hidden_size`).
        num_layers: layers in the model's list, embedding and head included; a stage holds one at least.

    Raises:
        ConfigError: an impossible layout; names the valid choices.
    """
    name, _ = resolve_strategy(config.strategy)
    parallel = config.parallel
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    if name == "Pipeline" and not pipeline:
        pipeline = world_size
    pipeline = pipeline or 1
    _check_combination(name, tensor, pipeline, world_size)
    for what, size in divided.items():
        if size % tensor:
            common = [n for n in list_divisors(size) if not any(other % n for other in divided.values())]
            found = f"it does not divide {what}={size}"
            raise ConfigError(f"tp={tensor}", found, f"Valid: {', '.join(map(str, common))}")
    if pipeline > num_layers:
        found = f"the model has {num_layers} layers, embedding and head included"
        raise ConfigError(f"pp={pipeline}", found, f"Valid: 1 to {num_layers}")
    if world_size % (tensor * pipeline):
        valid = f"Start a multiple of {tensor * pipeline} processes, or give sizes whose product divides {world_size}"
        raise ConfigError(f"tp={tensor} x pp={pipeline}", _started(world_size), valid)
    layout = Layout(name, tensor, world_size // (tensor * pipeline), pipeline)
    _check_batches(config, layout)
    _check_options(config, layout)
    return layout


def _check_combination(name: str, tensor: int, pipeline: int, world_size: int) -> None:
    if name == "Single" and world_size > 1:
        found, do = (
            f"{world_size} processes are started",
            "Give strategy=DDP (or Zero1, Pipeline, ThreeD), or start one",
        )
        raise ConfigError("strategy=Single", found, do)
    if tensor > 1 and name != "ThreeD":
        raise ConfigError(f"strategy={name} with tp={tensor}", "it cuts no layer", "Give strategy=ThreeD, or tp=1")
    if pipeline > 1 and name in ("Zero2", "Zero3", "ZeroInf"):
        found = "ZeRO-2 and ZeRO-3 cut gradients between the micro-batches of a pipeline, which accumulates them"
        raise ConfigError(f"strategy={name} with pp={pipeline}", found, "Give strategy=Pipeline (ZeRO-1), or pp=1")
    if pipeline > 1 and name not in STAGED:
        found = "it has no pipeline stages"
        raise ConfigError(f"strategy={name} with pp={pipeline}", found, "Give strategy=Pipeline or ThreeD, or pp=1")


def _check_batches(config: RunConfig, layout: Layout) -> None:
    train, data = config.train, config.data
    if data.max_tokens and layout.strategy in STAGED:
        found = "a pipeline needs the same number of samples in every micro-batch"
        do = "Give data.max_tokens=0, or strategy=DDP or Zero1 to Zero3"
        raise ConfigError(f"data.max_tokens={data.max_tokens} with strategy={layout.strategy}", found, do)
    if data.max_tokens:
        return  # a batch has as many samples as fit: the rest of a division is made up with empty micro-batches
    micro = train.micro_batch_size * layout.data
    if train.global_batch_size % micro:
        valid = [b for b in list_divisors(train.global_batch_size) if train.global_batch_size % (b * layout.data) == 0]
        found = f"micro_batch_size={train.micro_batch_size} x {layout.data} data ranks does not divide it"
        near = -(-train.global_batch_size // micro) * micro
        do = f"Valid micro batches: {', '.join(map(str, valid)) or 'none'}; or give global_batch_size={near}"
        raise ConfigError(f"train.global_batch_size={train.global_batch_size}", found, do)


def _check_options(config: RunConfig, layout: Layout) -> None:
    parallel, train = config.parallel, config.train
    if parallel.sequence_parallel and layout.strategy != "ThreeD":
        found = "only ThreeD cuts layers"
        raise ConfigError("parallel.sequence_parallel=True", found, "Give strategy=ThreeD, or sequence_parallel=False")
    if parallel.sequence_parallel and train.micro_batch_size % layout.tensor:
        found = f"tp={layout.tensor} does not divide train.micro_batch_size={train.micro_batch_size}"
        raise ConfigError("parallel.sequence_parallel=True", found, f"Give a multiple of {layout.tensor}")
    if parallel.partition_activations and not (layout.tensor > 1 and train.checkpoint_activations):
        found = f"tp={layout.tensor}, train.checkpoint_activations={train.checkpoint_activations}"
        do = "It needs tp above 1 and train.checkpoint_activations=True"
        raise ConfigError("parallel.partition_activations=True", found, do)
    if parallel.partition_activations and parallel.sequence_parallel:
        found = "with sequence_parallel=True every tensor rank keeps its own rows only already"
        raise ConfigError("parallel.partition_activations=True", found, "Leave one of the two out")
    if parallel.deepspeed_config and layout.strategy not in ZERO_STAGE:
        found = f"{layout.strategy} does not use DeepSpeed"
        raise ConfigError(f"parallel.deepspeed_config={parallel.deepspeed_config}", found, "Leave it out")
    if layout.strategy == "ZeroInf" and parallel.offload_device == "nvme" and not parallel.offload_dir:
        found = "parallel.offload_dir is empty"
        raise ConfigError("parallel.offload_device=nvme", found, "Give a folder on a fast local disk")


def _started(world_size: int) -> str:
    return "1 process is started" if world_size == 1 else f"{world_size} processes are started"


def check_sequence_parallel(device_type: str) -> None:
    """Refuse sequence parallelism where it cannot run.

    Raises:
        ConfigError: on another device than CUDA.
    """
    if device_type != "cuda":
        found = "Megatron-core places its buffers on the current CUDA device"
        raise ConfigError(f"parallel.sequence_parallel=True on {device_type}", found, "Give sequence_parallel=False")


def deal_micro_batches(num_micros: int, data_rank: int, num_data_ranks: int) -> range:
    """Indices of the global batch's micro-batches that a data rank computes: contiguous, as many on every rank.

    Indices at or beyond `num_micros` stand for empty micro-batches.
    """
    share = -(-num_micros // num_data_ranks)
    return range(data_rank * share, (data_rank + 1) * share)


def balance_layers(costs: Sequence[int], num_stages: int) -> list[int]:
    """Boundaries of the stages (num_stages + 1 numbers) that make the dearest stage cheapest; no stage is empty.

    Args:
        costs: of each layer in order, e.g. parameters.

    Raises:
        ConfigError: more stages than layers.
    """
    num_layers = len(costs)
    if num_stages > num_layers:
        raise ConfigError(f"pp={num_stages}", f"the model has {num_layers} layers", f"Valid: 1 to {num_layers}")
    sums = [0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    # best[k][i]: (the dearest stage, where the last one begins) of the first i layers in k stages
    best: list[dict[int, tuple[int, int]]] = [{0: (0, 0)}]
    for stage in range(1, num_stages + 1):
        row = {}
        for end in range(stage, num_layers - (num_stages - stage) + 1):
            row[end] = min(
                (max(cost, sums[end] - sums[start]), start) for start, (cost, _) in best[-1].items() if start < end
            )
        best.append(row)
    bounds = [num_layers]
    for stage in range(num_stages, 0, -1):
        bounds.append(best[stage][bounds[-1]][1])
    return bounds[::-1]
