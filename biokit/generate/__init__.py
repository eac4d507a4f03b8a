"""Generation: molecules from a trained model, around others and out of its latent space.

What needs rdkit stands in modules of its own (`embeddings`), for training imports this package.
"""

from biokit.generate.beams import Hypothesis, beam_search
from biokit.generate.inputs import Hiddens, encode_smiles, hiddens_of
from biokit.generate.latent import SAMPLING_METHODS, embed, interpolate, mean_of, perturb, sample_around
from biokit.generate.likelihood import log_likelihoods
from biokit.generate.sampling import filter_logits, sample_like, sample_molecules

__all__ = [
    "SAMPLING_METHODS",
    "Hiddens",
    "Hypothesis",
    "beam_search",
    "embed",
    "encode_smiles",
    "filter_logits",
    "hiddens_of",
    "interpolate",
    "log_likelihoods",
    "mean_of",
    "perturb",
    "sample_around",
    "sample_like",
    "sample_molecules",
]
