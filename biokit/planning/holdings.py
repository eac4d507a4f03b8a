"""Who holds which part of which layer in a run of many processes, and in how many bytes: nothing is started."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from biokit.parallel.grid import ZERO_STAGE, Layout

if TYPE_CHECKING:
    from biokit.config import RunConfig
    from biokit.exchange.source import Blueprint

FLOAT_BYTES = 4  # weights, gradients and moments are fp32


@dataclass(frozen=True)
class RankMemory:
    """Bytes of fp32 values that a rank holds in a step (Rajbhandari et al. 2020, arXiv 1910.02054, section 5).

    Attributes:
        num_parameters: of its part of the model; of which ZeRO-3 keeps a share.
        copies: of the weights that this rank updates, which DeepSpeed keeps beside the layers' own.
    """

    num_parameters: int
    weights: int
    gradients: int
    moments: int
    copies: int

    @property
    def total(self) -> int:
        """All of it; activations and the engine's buffers come on top."""
        return self.weights + self.gradients + self.moments + self.copies


def rank_memory(layout: Layout, num_parameters: int) -> RankMemory:
    """Bytes of a rank whose part of the model has so many parameters, under the layout's ZeRO partition."""
    stage = ZERO_STAGE.get(layout.strategy, 0)
    whole, share = FLOAT_BYTES * num_parameters, FLOAT_BYTES * -(-num_parameters // layout.data)
    return RankMemory(
        num_parameters,
        weights=share if stage == 3 else whole,
        gradients=share if stage >= 2 else whole,
        moments=2 * (share if stage else whole),
        copies=share if stage else 0,
    )


@dataclass(frozen=True)
class Holdings:
    """Who holds how much of each layer: `held[rank][i]` parameters of `layers[i]`, a layer of `sizes[i]`."""

    layout: Layout
    layers: list[str]
    sizes: list[int]
    held: list[list[int]]

    def kept(self, rank: int) -> list[int]:
        """Parameters of each layer that stay on a rank between its uses: under ZeRO-3 its share of what it holds."""
        num_owners = self.layout.data if ZERO_STAGE.get(self.layout.strategy) == 3 else 1
        return [-(-count // num_owners) for count in self.held[rank]]


def find_holdings(config: RunConfig, layout: Layout, vocab_size: int = 0) -> Holdings:
    """Compute from the model's plan what each rank of a layout holds, before ZeRO; no weight is made.

    Args:
        vocab_size: 0: of `data.vocab_file`, or of the packaged vocabulary.

    Raises:
        ConfigError: no such model or preset, more stages than layers, a size that tensor parallelism does not divide.
    """
    from biokit.exchange.source import Blueprint
    from biokit.parallel.cuts import cut_tensor

    blueprint = Blueprint(config, vocab_size or read_vocab_size(config))
    template, contents = blueprint.template, _deal_layers(blueprint, layout.pipeline)
    sizes = [sum(template[name].numel() for name in names) for _, names in contents.values()]
    held = []
    for place in map(layout.place, range(layout.world_size)):
        pieces = {
            name: cut_tensor(template[name], blueprint.cut("weight", name), layout.tensor, place.tensor).numel()
            for stage, names in contents.values()
            for name in names
            if stage == place.pipeline
        }
        held.append(
            [sum(pieces[name] for name in names if stage == place.pipeline) for stage, names in contents.values()]
        )
    return Holdings(layout, list(contents), sizes, held)


def _deal_layers(blueprint: Blueprint, num_stages: int) -> dict[str, tuple[int, list[str]]]:
    """Layer -> its stage, and its parameters: with a copy of a tied one that another stage holds."""
    stages, contents, stage = [set(names) for names in blueprint.stages(num_stages)], {}, 0
    for layer, names in blueprint.layers.items():
        stage = next((number for number, of_stage in enumerate(stages) if of_stage & set(names)), stage)
        tied = [earlier for name, earlier in blueprint.parts.tied.items() if name.startswith(f"{layer}.")]
        contents[layer] = stage, names + [name for name in tied if name not in stages[stage]]
    return contents


def read_vocab_size(config: RunConfig) -> int:
    """Entries of `data.vocab_file`, or of the packaged vocabulary."""
    from biokit.tokenizers import SmilesTokenizer

    file = config.data.vocab_file
    return (SmilesTokenizer.from_file(file) if file else SmilesTokenizer.packaged()).vocab_size
