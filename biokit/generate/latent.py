"""The latent space: molecules around a molecule, on the way between two, and one vector a molecule.

Shapes: B batch, N samples, S source length, D hidden.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from biokit.errors import ConfigError
from biokit.generate.beams import beam_search
from biokit.generate.inputs import Hiddens, check_ranges, encode_smiles, hiddens_of
from biokit.generate.sampling import sample_molecules
from biokit.models.molbart import MolBART

if TYPE_CHECKING:
    from biokit.tokenizers import SmilesTokenizer

SAMPLING_METHODS = (
    "greedy-perturbate", "topkp-perturbate", "beam-search-perturbate", "beam-search-single-sample",
    "beam-search-perturbate-sample",
)  # fmt: skip

MAX_RADIUS = 1000.0


def embed(model: MolBART, tokenizer: SmilesTokenizer, smiles: Sequence[str]) -> npt.NDArray[np.float32]:
    """One vector (B,D) a molecule: the mean of its hiddens over its tokens, begin and end included, padding not.

    Raises:
        DataError: an empty list, an empty SMILES, unknown tokens, or one longer than the model's positions.
    """
    return mean_of(hiddens_of(model, encode_smiles(tokenizer, smiles))).cpu().numpy()


def mean_of(hiddens: Hiddens) -> torch.Tensor:
    """The mean (B,D) of hiddens over tokens, in fp32."""
    mask_BS1 = hiddens.mask_BS[..., None]
    return hiddens.values_BSD.float().masked_fill(~mask_BS1, 0.0).sum(1) / mask_BS1.sum(1)


def perturb(hiddens: Hiddens, radius: float, seed: int) -> Hiddens:
    """Hiddens with Gaussian noise on every value, of `radius` times the standard deviation of its molecule's values.

    Raises:
        ConfigError: a radius outside 0 to `MAX_RADIUS`.
    """
    check_ranges({"radius": (radius, 0 <= radius <= MAX_RADIUS)}, f"0 to {MAX_RADIUS:g}; 0.5 to 1.5 are usual")
    values_BSD, mask_BS1 = hiddens.values_BSD.float(), hiddens.mask_BS[..., None]
    count_B = mask_BS1.sum((1, 2)) * values_BSD.shape[2]
    mean_B = values_BSD.masked_fill(~mask_BS1, 0.0).sum((1, 2)) / count_B
    apart_BSD = (values_BSD - mean_B[:, None, None]).masked_fill(~mask_BS1, 0.0)
    deviation_B = (apart_BSD.square().sum((1, 2)) / count_B).sqrt()
    generator = torch.Generator(values_BSD.device).manual_seed(seed)
    noise_BSD = torch.randn(values_BSD.shape, generator=generator, device=values_BSD.device)
    noisy_BSD = values_BSD + radius * deviation_B[:, None, None] * noise_BSD
    return Hiddens(noisy_BSD.to(hiddens.values_BSD.dtype), hiddens.mask_BS)


def sample_around(
    model: MolBART,
    tokenizer: SmilesTokenizer,
    source: torch.Tensor | Hiddens,
    num_samples: int = 10,
    sampling_method: str = "greedy-perturbate",
    *,
    radius: float = 1.0,
    top_k: int = 0,
    top_p: float = 0.9,
    temperature: float = 1.0,
    num_beams: int = 5,
    banned: Collection[str] = (),
    grammar: bool = False,
    max_length: int = 0,
    seed: int = 1234,
) -> list[list[str]]:
    """SMILES in the neighbourhood of each molecule, as they come: invalid ones and repeats among them.

    Sampling methods (MegaMolBART's names):
        greedy-perturbate: `num_samples` times other noise; the likeliest token each time.
        topkp-perturbate: the same noise; tokens are drawn under `top_k`, `top_p` and `temperature`.
        beam-search-perturbate: the same noise; the best of `num_beams` beams.
        beam-search-single-sample: no noise; the `num_samples` beams of one search.
        beam-search-perturbate-sample: noise once; the `num_samples` beams of one search.

    Args:
        source: encoder inputs (B,S) of the molecules, or their hiddens.
        radius: how far away, see `perturb`.

    Returns:
        For each molecule, `num_samples` SMILES (fewer where a search has no more).

    Raises:
        ConfigError: an unknown method, or a value outside its range. DataError: an input that is too long.
    """
    if sampling_method not in SAMPLING_METHODS:
        raise ConfigError(
            f"sampling_method={sampling_method}", "it is not known", f"Valid: {', '.join(SAMPLING_METHODS)}"
        )
    check_ranges({"num_samples": (num_samples, num_samples >= 1)}, "1 or more")
    hiddens = hiddens_of(model, source)
    rules: dict[str, Any] = {"banned": banned, "grammar": grammar, "max_length": max_length}
    if sampling_method in ("beam-search-single-sample", "beam-search-perturbate-sample"):
        if sampling_method == "beam-search-perturbate-sample":
            hiddens = perturb(hiddens, radius, seed)
        found = beam_search(model, tokenizer, hiddens, num_samples, **rules)
        return [[hypothesis.smiles for hypothesis in hypotheses] for hypotheses in found]
    rows = torch.arange(len(hiddens), device=hiddens.mask_BS.device).repeat_interleave(num_samples)
    noisy = perturb(hiddens.select(rows), radius, seed)
    if sampling_method == "beam-search-perturbate":
        texts = [beams[0].smiles for beams in beam_search(model, tokenizer, noisy, num_beams, **rules)]
    elif sampling_method == "greedy-perturbate":
        texts, _ = sample_molecules(model, tokenizer, noisy, "greedy", **rules)
    else:
        texts, _ = sample_molecules(
            model, tokenizer, noisy, "sample", top_k=top_k, top_p=top_p, temperature=temperature, seed=seed, **rules
        )
    return [texts[start : start + num_samples] for start in range(0, len(texts), num_samples)]


def interpolate(
    model: MolBART,
    tokenizer: SmilesTokenizer,
    first: str,
    second: str,
    num_points: int = 11,
    *,
    num_beams: int = 1,
    grammar: bool = False,
) -> list[str]:
    """SMILES at evenly spaced points on the straight line between the hiddens of two molecules, both ends included.

    Where one has fewer tokens, its last one stands in for the rest, and the number of tokens goes over evenly.

    Raises:
        ConfigError: fewer than 2 points. DataError: a SMILES that cannot be encoded.
    """
    check_ranges({"num_points": (num_points, num_points >= 2)}, "2 or more: a line has two ends")
    ends = hiddens_of(model, encode_smiles(tokenizer, [first, second]))
    return [beams[0].smiles for beams in beam_search(
        model, tokenizer, points_between(ends, num_points), num_beams, grammar=grammar
    )]  # fmt: skip


def points_between(ends: Hiddens, num_points: int) -> Hiddens:
    """Hiddens (num_points,S,D) on the line between two molecules' (2,S,D)."""
    lengths = ends.mask_BS.sum(1)
    places_S = torch.arange(ends.mask_BS.shape[1], device=lengths.device)
    filled = [values_SD[places_S.clamp(max=int(n) - 1)] for values_SD, n in zip(ends.values_BSD, lengths, strict=True)]
    share_N = torch.linspace(0, 1, num_points, device=lengths.device)
    first_SD, last_SD = (values_SD.float() for values_SD in filled)
    values_NSD = first_SD + share_N[:, None, None] * (last_SD - first_SD)
    length_N = (lengths[0] + share_N * (lengths[1] - lengths[0])).round()
    return Hiddens(values_NSD.to(ends.values_BSD.dtype), places_S[None] < length_N[:, None])
