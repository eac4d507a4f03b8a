"""What a ready model reaches on molecules that it was not trained on: MOSES' test part (`biokit data fetch moses`).

The model is $BIOKIT_MODEL (a name or a folder, as `load_model` takes it), else `molbart_mini_moses`. Every molecule is
masked as in training. Novelty: neither the molecule that was shown nor in the training part, by the SMILES in the file
(2 of 2,000 of those are written otherwise by this RDKit).
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch

from biokit.chem.molecules import canonicalize
from biokit.chem.scores import exact_match_and_invalid, score_samples
from biokit.chem.set_scores import compare_sets
from biokit.config import DataConfig
from biokit.data.molecules import MoleculeLoader
from biokit.data.tables import read_table
from biokit.datasets import find_dataset, is_here, locate, locate_companions
from biokit.generate import beam_search, encode_smiles, sample_like, sample_molecules
from biokit.model_folder import load_model
from biokit.models.molbart import MolBART
from biokit.tokenizers import SmilesTokenizer
from tests.bench.corpora import write_store
from tests.bench.timing import NOT_MEASURED, Row

DEFAULT_MODEL, SEED = "molbart_mini_moses", 4321
NUM_SAMPLES, NUM_REBUILT, BATCH_SIZE = 2000, 1000, 100
UNIQUE_AT = 1000
TARGETS = {"validity": 0.9, "uniqueness": 0.99}  # of sampling, as the issue of a model trained on a CPU has them


def measure(
    model: MolBART, tokenizer: SmilesTokenizer, held_out: list[str], trained: set[str], num_samples: int = NUM_SAMPLES
) -> list[Row]:
    """Rows of shares; `held_out` are canonical SMILES, at least as many as samples."""
    data = DataConfig(task="mask", max_length=128)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        store = write_store(Path(folder) / "held_out", tokenizer, held_out)
        loader = MoleculeLoader(store, None, tokenizer, data, SEED, BATCH_SIZE)
        for name, settings in (
            ("temperature 1", {}), ("top-p 0.9", {"top_p": 0.9}), ("temperature 0.7", {"temperature": 0.7}),
        ):  # fmt: skip
            samples = sample_like(model, tokenizer, loader, num_samples, seed=SEED, **settings)
            rows += _score(f"{num_samples:,} samples around masked molecules, {name}", samples, held_out, trained)
        rows += _rebuild(model, tokenizer, loader, min(NUM_REBUILT, len(held_out)))
    return rows


def _score(what: str, samples: list[str], held_out: list[str], trained: set[str]) -> list[Row]:
    scores = score_samples(samples, trained.union(held_out), known_is_canonical=True)
    first = score_samples(samples[:UNIQUE_AT], (), known_is_canonical=True)
    valid = [sample.smiles for sample in scores.samples if sample.valid]
    apart = compare_sets(valid, held_out).scores["Fréchet distance"] if len(valid) > 1 else float("nan")
    return [
        _row(f"{what}: validity", scores.validity, TARGETS["validity"] if "top-p" in what else None),
        _row(f"{what}: uniqueness@{UNIQUE_AT:,}", first.uniqueness, TARGETS["uniqueness"] if "top-p" in what else None),
        _row(f"{what}: novelty", scores.novelty),
        _row(f"{what}: Fréchet distance of properties", apart),
    ]


def _rebuild(model: MolBART, tokenizer: SmilesTokenizer, loader: MoleculeLoader, num_molecules: int) -> list[Row]:
    """Molecules written back, masked and whole."""
    masked: list[str] = []
    beams: list[str] = []
    targets: list[str] = []
    for batch in loader.epoch():
        src_BS = torch.from_numpy(batch["encoder_ids"])
        masked += sample_molecules(model, tokenizer, src_BS)[0]
        beams += [found[0].smiles for found in beam_search(model, tokenizer, src_BS, 5)]
        targets += tokenizer.decode_batch(batch["labels"])
        if len(targets) >= num_molecules:
            break
    whole = []
    for start in range(0, len(targets), BATCH_SIZE):
        source = encode_smiles(tokenizer, targets[start : start + BATCH_SIZE])
        whole += sample_molecules(model, tokenizer, source)[0]
    what = f"{len(targets):,} molecules written back"
    exact, invalid = exact_match_and_invalid(masked, targets)
    return [
        _row(f"{what}, masked, greedy: exact", exact),
        _row(f"{what}, masked, greedy: valid", 1 - invalid),
        _row(f"{what}, masked, 5 beams: exact", exact_match_and_invalid(beams, targets)[0]),
        _row(f"{what}, whole, greedy: exact", exact_match_and_invalid(whole, targets)[0]),
    ]


def _row(what: str, value: float, target: float | None = None) -> Row:
    shown = "-" if target is None else f"at least {target}"
    return Row(what, "-", f"{value:.3f}", target=shown, met=None if target is None else value >= target)


def measure_all() -> list[Row]:
    if not is_here(find_dataset("moses")):
        return [Row("the ready model", "-", f"{NOT_MEASURED}: biokit data fetch moses")]
    model, tokenizer = load_model(os.environ.get("BIOKIT_MODEL", "") or DEFAULT_MODEL)
    assert isinstance(model, MolBART)
    test = next(path for path in locate_companions("moses") if path.name == "test.csv.gz")
    every = [row.text for row in read_table([test])]
    held_out = [canonicalize(text) for text in every[:: len(every) // NUM_SAMPLES][:NUM_SAMPLES]]
    trained = {row.text for row in read_table([locate("moses")])}
    return measure(model, tokenizer, held_out, trained)
