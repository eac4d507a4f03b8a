"""How a model is run and updated: one small interface, chosen by name.

`train_batch` does one update over a global batch that is cut into micro-batches: a pipeline needs them all at once.
Each data rank brings its own micro-batches; what comes back is of the global batch, the same on every rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from biokit.config import RunConfig, TrainConfig
from biokit.parallel.cuts import WHOLE, Cut, cut_tensor, find_cut, join_tensors
from biokit.parallel.grid import Layout, Place, balance_layers
from biokit.parallel.processes import Processes

MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # of AdamW
BATCH_KEYS = ("encoder_ids", "decoder_ids", "labels")


@dataclass
class TokenSums:
    """Sums over valid tokens, to be divided by their number in the global batch."""

    loss: float = 0.0
    num_correct: int = 0
    num_valid: int = 0

    def __add__(self, other: TokenSums) -> TokenSums:
        return TokenSums(self.loss + other.loss, self.num_correct + other.num_correct, self.num_valid + other.num_valid)

    @classmethod
    def of(cls, figures: Iterable[float]) -> TokenSums:
        """From (loss, correct, valid)."""
        loss, num_correct, num_valid = figures
        return cls(loss, int(num_correct), int(num_valid))


@dataclass
class StepResult:
    """What one update did: token sums, gradient norm before clipping, whether fp16 left the weights as they were."""

    sums: TokenSums
    grad_norm: float
    skipped: bool


@dataclass(frozen=True)
class ModelParts:
    """What a strategy needs of a model, as plain data.

    Attributes:
        layers: (name, builder) in order; a builder initialises its layer alike on whichever rank it runs.
        build: the whole model, initialised; has `layers()`.
        plan: the tensor-parallel plan, see `biokit.parallel.cuts`.
        tied: parameter -> the earlier parameter whose tensor it shares.
        batch_keys: the arrays of a batch: inputs of the first layer in order, labels last.
        untrained: the whole model with weights that do not matter, where `build` reads them from files.
    """

    layers: Sequence[tuple[str, Callable[[], nn.Module]]]
    build: Callable[[], nn.Module]
    plan: Mapping[str, str]
    tied: Mapping[str, str]
    batch_keys: tuple[str, ...]
    pad_id: int
    untrained: Callable[[], nn.Module] | None = None

    def build_untrained(self) -> nn.Module:
        """The whole model, to be filled; reads no file."""
        return (self.untrained or self.build)()

    def stage_bounds(self, num_stages: int) -> list[int]:
        """Positions of the layers at which pipeline stages begin, and the end; the dearest stage is as cheap as can be.

        Raises:
            ConfigError: more stages than layers.
        """
        sizes = {name: weight.numel() for name, weight in self.template().items()}
        costs = [sum(n for name, n in sizes.items() if name.startswith(f"{layer}.")) for layer, _ in self.layers]
        return balance_layers(costs, num_stages)

    def template(self) -> dict[str, torch.Tensor]:
        """Every parameter of the whole model by name, in order, without storage; tied ones once."""
        with torch.device("meta"):
            return {
                f"{name}.{key}": parameter.detach()
                for name, build in self.layers
                for key, parameter in build().named_parameters()
                if f"{name}.{key}" not in self.tied
            }


class Strategy(ABC):
    """A model under one layout. `model` is this rank's part of it.

    States are of the whole model, whatever the layout: parameters by their name in the model, AdamW's moments as
    `<moment>.<parameter>`. They are gathered on the main process, a tensor at a time; the others get empty ones.
    """

    model: nn.Module
    layout: Layout
    processes: Processes
    config: TrainConfig
    template: dict[str, torch.Tensor]
    engine_settings: Mapping[str, Any] = {}  # DeepSpeed's configuration; empty where torch works alone
    plan: Mapping[str, str] = {}

    @property
    def place(self) -> Place:
        """Where this process stands."""
        return self.layout.place(self.processes.rank)

    @abstractmethod
    def train_batch(
        self, micro_batches: Sequence[Mapping[str, torch.Tensor]], num_valid: int, seeds: Sequence[int], lr: float
    ) -> StepResult:
        """One update over a global batch.

        Args:
            micro_batches: those of this data rank, as many on every rank; one may have no label that counts.
            num_valid: tokens that count in the global batch.
            seeds: of the dropout masks, one a micro-batch of this rank, drawn for its place in the *global* batch.

        Raises:
            RunError: a loss or gradient that is not finite (fp16: after the loss scale has come down to 1).
        """

    def sum_figures(self, figures: Sequence[torch.Tensor], counts: bool = True) -> TokenSums:
        """Sums of (3,) figures of `token_loss` over all processes that count; one wait for the device."""
        own = torch.stack(list(figures)).sum(0).tolist() if counts and figures else [0.0, 0.0, 0.0]
        return TokenSums.of(self.processes.sum(own))

    @abstractmethod
    def evaluate(self, micro_batches: Sequence[Mapping[str, torch.Tensor]]) -> TokenSums:
        """Sums over the micro-batches of all data ranks, without dropout; as many micro-batches on every rank."""

    @abstractmethod
    def read_piece(self, name: str, moment: str | None) -> torch.Tensor | None:
        """This tensor rank's piece of a parameter or of its moment in fp32, on its device; zeros before the first step.

        All data ranks of a stage call it together. None on a stage that does not hold the parameter.
        """

    @abstractmethod
    def write_piece(self, name: str, moment: str | None, piece: torch.Tensor) -> None:
        """Set what `read_piece` reads; called on every rank that holds the parameter, in the same order."""

    def holds(self, name: str) -> bool:
        """Whether this rank's part of the model has (a piece of) that parameter."""
        return True

    def owner_stage(self, name: str) -> int:
        """The pipeline stage that holds a parameter."""
        return 0

    def scaler_state(self) -> dict[str, Any]:
        """Loss scale and its growth counter (fp16), plain numbers."""
        return {}

    def load_scaler(self, state: Mapping[str, Any]) -> None:
        """Take over what `scaler_state` gave; one of another strategy may not fit and is left out."""

    def start_load(self) -> None:
        """Before the first `write_piece` of a load."""

    def finish_load(self) -> None:
        """After the last `write_piece` of a load."""

    def model_state(self) -> dict[str, torch.Tensor]:
        """Every parameter by name, on the main process; empty on the others. All processes call it together."""
        return self._gathered((name, None, name) for name in self.template)

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        """`<moment>.<parameter name>` -> tensor, on the main process. All processes call it together."""
        return self._gathered((f"{moment}.{name}", moment, name) for name in self.template for moment in MOMENTS)

    def optimizer_template(self) -> dict[str, torch.Tensor]:
        """Names and shapes of `optimizer_state`, without storage."""
        scalar = torch.zeros((), device="meta")
        return {
            f"{moment}.{name}": scalar if moment == "step" else parameter
            for name, parameter in self.template.items()
            for moment in MOMENTS
        }

    def load(
        self, model: Mapping[str, torch.Tensor], optimizer: Mapping[str, torch.Tensor], scaler: Mapping[str, Any]
    ) -> None:
        """Take over states that `model_state`, `optimizer_state` and `scaler_state` gave, under whichever layout.

        Args:
            model, optimizer: whole tensors by name; only those that this rank holds are looked up, one at a time. An
                empty optimizer keeps fresh moments.
        """
        self.start_load()
        for name in self.template:
            if self.holds(name):
                self.write_piece(name, None, self._cut(name, None, model[name]))
        for name in self.template if optimizer else ():
            if self.holds(name):
                for moment in MOMENTS:
                    self.write_piece(name, moment, self._cut(name, moment, optimizer[f"{moment}.{name}"]))
        self.finish_load()
        self.load_scaler(scaler)

    def whole_model(self) -> nn.Module | None:
        """The whole model in evaluation mode on the main process, None on the others. All call it together."""
        return self.model.eval() if self.processes.is_main else None

    def close(self) -> None:
        """Give back what the engine holds."""

    def cut(self, name: str, moment: str | None) -> Cut:
        """How this layout cuts a parameter or its moment."""
        return WHOLE if moment == "step" or self.layout.tensor == 1 else find_cut(self.plan, name)

    def _cut(self, name: str, moment: str | None, whole: torch.Tensor) -> torch.Tensor:
        return cut_tensor(whole, self.cut(name, moment), self.layout.tensor, self.place.tensor)

    def _gathered(self, wanted: Iterable[tuple[str, str | None, str]]) -> dict[str, torch.Tensor]:
        state = {}
        for key, moment, name in wanted:
            whole = self._gather(name, moment)
            if whole is not None:
                state[key] = whole
        return state

    def _gather(self, name: str, moment: str | None) -> torch.Tensor | None:
        """The whole tensor on the main process: its stage's first data rank sends the pieces of all tensor ranks."""
        layout, place, stage = self.layout, self.place, self.owner_stage(name)
        piece = self.read_piece(name, moment) if place.pipeline == stage else None
        cut, shape = self.cut(name, moment), () if moment == "step" else tuple(self.template[name].shape)
        sources = [
            layout.rank(Place(stage, 0, tensor)) for tensor in range(layout.tensor if cut.dim is not None else 1)
        ]
        rank = self.processes.rank
        own = piece.detach().to("cpu", copy=True).contiguous() if piece is not None and rank in sources else None
        if own is not None and rank != 0:
            self.processes.send(own, 0)
        if rank != 0:
            return None
        form = cut_tensor(torch.empty(shape, device="meta"), cut, layout.tensor, 0).shape
        pieces = [
            own if source == 0 and own is not None else self.processes.receive(torch.empty(form), source)
            for source in sources
        ]
        return join_tensors(pieces, cut, shape)


def make_strategy(parts: ModelParts, config: RunConfig, layout: Layout, processes: Processes) -> Strategy:
    """The strategy of a layout; engines are imported only where they are used.

    Raises:
        EngineError: the engine is not installed.
        ConfigError: the engine cannot work with the configuration.
    """
    if layout.strategy in ("Single", "DDP"):
        from biokit.parallel.single import DDP, Single

        model = parts.build()
        if layout.strategy == "Single":
            return Single(model, config.train, parts.pad_id, processes.device, parts.batch_keys)
        return DDP(model, config.train, parts.pad_id, processes, parts.batch_keys)
    if layout.pipeline == 1 and layout.strategy not in ("Pipeline", "ThreeD"):
        from biokit.parallel.zero import Zero

        return Zero(parts, config, layout, processes)
    from biokit.parallel.pipeline import Staged

    return Staged(parts, config, layout, processes)
