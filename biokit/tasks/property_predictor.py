"""A predictor of a property that is kept: fitted on all molecules, saved into a folder, loaded and asked again.

    property.json  head.safetensors  molecules.smi  encoder.safetensors (where the encoder was tuned)

A folder of that kind is whole or not there. It holds no pickle, and every file is checked before it is used.

Shapes: N molecules.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file

from biokit.checkpoint import TensorFile, check_tensors
from biokit.chem.similarity import Bits, fingerprints, nearest
from biokit.data.publish import publish_folder
from biokit.data.tables import Row
from biokit.errors import CheckpointError, DataError
from biokit.generate.attention import contributions
from biokit.generate.embeddings import embed_all, max_tokens_of, read_molecule
from biokit.generate.inputs import check_ranges
from biokit.generate.kept import fingerprint
from biokit.generate.latent import mean_of
from biokit.models.molbart import MolBART
from biokit.runs import describe_file
from biokit.safe_files import load_object
from biokit.tasks.property import NUM_MEMBERS, fit_frozen, fit_tuned
from biokit.tasks.property_baselines import NUM_BITS, RADIUS, Floats
from biokit.tasks.property_data import KINDS, PropertyData, check_targets
from biokit.tasks.property_head import EnsembleHead, HeadOptions
from biokit.tasks.property_splits import split_molecules

if TYPE_CHECKING:
    from biokit.tokenizers import SmilesTokenizer

FORMAT = "biokit-property-1"
ABOUT, HEAD, ENCODER, MOLECULES = "property.json", "head.safetensors", "encoder.safetensors", "molecules.smi"
ENCODER_PARTS = ("embed.", "encoder.")  # of a model's names: what makes hiddens of a molecule


@dataclass(frozen=True)
class PropertyPrediction:
    """What is predicted of N molecules, in the order given.

    Attributes:
        smiles: canonical.
        mean: the predicted value, or the probability of class 1.
        std: the whole standard deviation; its variance is that of `aleatoric` (the measurement's own, as the members
            believe) and of `epistemic` (between the members) together.
        nearest: the most alike molecule that was learnt from; `similarity`: its Tanimoto similarity (ECFP4). Far from
            all of them a prediction means little, whatever its `std` says.
    """

    smiles: tuple[str, ...]
    mean: Floats
    std: Floats
    aleatoric: Floats
    epistemic: Floats
    nearest: tuple[str, ...]
    similarity: Floats


@dataclass(frozen=True)
class PropertyPredictor:
    """A fitted head with its encoder, and the molecules that it knows.

    Attributes:
        model: makes the hiddens; a tuned copy where `tuned`.
        base: fingerprint of the model that was given, which `load` wants again.
        known: canonical SMILES of the molecules of training and validation.
    """

    target: str
    kind: str
    head: EnsembleHead
    model: MolBART
    tokenizer: SmilesTokenizer
    base: str
    tuned: bool
    known: tuple[str, ...]
    _known_bits: Bits = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_known_bits", fingerprints(self.known, RADIUS, NUM_BITS))

    def predict(self, smiles: Sequence[str]) -> PropertyPrediction:
        """Predict a list of molecules.

        Raises:
            DataError: no SMILES, one string in place of a list, or one that the model cannot take.
        """
        if isinstance(smiles, str) or not smiles:
            found = "it was given one string" if isinstance(smiles, str) else "the list is empty"
            raise DataError(f"predict {self.target}", found, "Give a list of SMILES")
        rows = [Row("molecules", number, text) for number, text in enumerate(smiles, start=1)]
        canonical = tuple(read_molecule(row, self.tokenizer, max_tokens_of(self.model)) for row in rows)
        vectors_ND = embed_all(self.model, self.tokenizer, canonical)
        found_N = self.head.predict(torch.from_numpy(vectors_ND).to(self.head.center_D.device))
        places, similarity = nearest(fingerprints(canonical, RADIUS, NUM_BITS), self._known_bits)
        return PropertyPrediction(
            canonical, found_N.mean, found_N.std, found_N.aleatoric, found_N.epistemic,
            tuple(self.known[place] for place in places), similarity,
        )  # fmt: skip

    def explain(self, smiles: str) -> Floats:
        """What each atom gives to the prediction (A,): the prediction less that with the atom masked.

        Atoms in the order of the SMILES, see `biokit.generate.attention.contributions`.

        Raises:
            DataError: a SMILES that the model cannot take.
        """
        values = contributions(
            self.model, self.tokenizer, smiles, lambda hiddens: self.head.predict(mean_of(hiddens)).mean
        )
        return values.astype(np.float32)

    def save(self, folder: str | Path) -> Path:
        """Write everything but the model that was given; the folder appears whole, or not at all.

        Raises:
            DataError: there is a folder already, or it cannot be written.
        """
        folder = Path(folder)
        with publish_folder(folder) as partial:
            _save_tensors(partial / HEAD, self.head.state_dict())
            (partial / MOLECULES).write_text("".join(f"{smiles}\n" for smiles in self.known), encoding="utf-8")
            if self.tuned:
                _save_tensors(partial / ENCODER, encoder_tensors(self.model))
            about = {
                "format": FORMAT, "target": self.target, "kind": self.kind, "model": self.base, "tuned": self.tuned,
                "files": {path.name: describe_file(path) for path in sorted(partial.iterdir())},
            }  # fmt: skip
            (partial / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        return folder

    @classmethod
    def load(cls, folder: str | Path, model: MolBART, tokenizer: SmilesTokenizer) -> PropertyPredictor:
        """Read what `save` wrote, for the same model and tokenizer; `model` stays as it is.

        Raises:
            CheckpointError: no such folder, a missing, foreign or altered file, another model, tensors that do not fit.
        """
        folder = Path(folder)
        about = _read_about(folder)
        base = fingerprint(model, tokenizer)
        if about["model"] != base:
            found = "it was fitted on another model or vocabulary"
            raise CheckpointError(f"predictor {folder}", found, "Give the model that it was fitted on")
        tensors = TensorFile(folder / HEAD)
        head = _build_head(folder, tensors, about["kind"], model.embed.embedding.tokens.embedding_dim)
        head.load_state_dict(dict(tensors))
        head.to(next(model.parameters()).device).eval()
        if about["tuned"]:
            model = _with_encoder(folder, model)
        known = tuple((folder / MOLECULES).read_text(encoding="utf-8").splitlines())
        return cls(about["target"], about["kind"], head, model, tokenizer, base, about["tuned"], known)


def fit_property(
    data: PropertyData,
    model: MolBART,
    tokenizer: SmilesTokenizer,
    *,
    split: str = "scaffold",
    num_members: int = NUM_MEMBERS,
    tune: bool = False,
    val_fraction: float = 0.1,
    seed: int = 0,
    options: HeadOptions | None = None,
) -> PropertyPredictor:
    """Fit a head on all molecules, but for a part that training is stopped by. Nothing is held out: how good it is
    says `compare_predictors`.

    Args:
        split: how that part is taken: whole scaffolds (`scaffold`) or molecules (`random`).
        tune: train a copy of the encoder too.

    Raises:
        ConfigError: a value outside its range.
        DataError: molecules that the model cannot take, too few of them, or a part with one class only.
    """
    check_ranges({"num_members": (num_members, 1 <= num_members <= 100)}, "1 to 100; 5 is usual")
    check_ranges({"val_fraction": (val_fraction, 0 < val_fraction < 1)}, "above 0 and below 1; 0.1 is usual")
    if options is not None:
        options.check()
    check_targets(data, f'{data.name}, target "{data.target}"')
    parts = split_molecules(data, split, (1 - val_fraction, val_fraction, 0.0), seed)
    base = fingerprint(model, tokenizer)
    if tune:
        head, model = fit_tuned(data, parts, model, tokenizer, num_members, seed, options)
    else:
        vectors_ND = embed_all(model, tokenizer, data.smiles)
        head = fit_frozen(vectors_ND, data, parts, model, num_members, seed, options)
    return PropertyPredictor(data.target, data.kind, head, model, tokenizer, base, tune, data.smiles)


def encoder_tensors(model: MolBART) -> dict[str, torch.Tensor]:
    """The weights that hiddens depend on, by their names in the model."""
    return {name: value for name, value in model.state_dict().items() if name.startswith(ENCODER_PARTS)}


def _save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    save_file({name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}, path)


def _read_about(folder: Path) -> dict[str, Any]:
    """What the folder says of itself, after every file was checked against it."""
    asked, do = f"predictor {folder}", "Give a folder that PropertyPredictor.save wrote, or restore it from a copy"
    try:
        about = load_object(folder / ABOUT)
    except (OSError, ValueError) as error:
        raise CheckpointError(asked, f"its {ABOUT} cannot be read ({error})", do) from error
    expected = {HEAD, MOLECULES} | ({ENCODER} if about.get("tuned") is True else set())
    files = about.get("files")
    if about.get("format") != FORMAT or about.get("kind") not in KINDS or not isinstance(about.get("target"), str):
        raise CheckpointError(asked, f"its {ABOUT} is not of format {FORMAT}", do)
    if not isinstance(files, dict) or set(files) != expected or not isinstance(about.get("tuned"), bool):
        raise CheckpointError(asked, f"its {ABOUT} does not name {', '.join(sorted(expected))}", do)
    paths = {name: folder / name for name in sorted(expected)}
    bad = [name for name, path in paths.items() if not path.is_file() or describe_file(path) != files[name]]
    if bad:
        raise CheckpointError(asked, f"{', '.join(bad)} missing or altered (size or sha256 differs)", do)
    if foreign := sorted(path.name for path in folder.iterdir() if path.name not in {*expected, ABOUT}):
        raise CheckpointError(asked, f"it holds other files ({', '.join(foreign[:3])})", "Move them away")
    return about


def _build_head(folder: Path, tensors: TensorFile, kind: str, hidden_size: int) -> EnsembleHead:
    """A head of the sizes that the file has. Raises CheckpointError where its tensors are not a head's."""
    up_MDW = tensors.forms().get("up_MDW", torch.empty(1, hidden_size, 1, device="meta"))
    num_members, _, width = up_MDW.shape if up_MDW.dim() == 3 else (1, hidden_size, 1)
    with torch.device("meta"):
        head = EnsembleHead(num_members, hidden_size, kind, width)
    check_tensors(folder, tensors.forms(), head.state_dict())
    return head.to_empty(device="cpu")


def _with_encoder(folder: Path, model: MolBART) -> MolBART:
    """A copy of a model with the tuned encoder of a folder."""
    tensors, model = TensorFile(folder / ENCODER), copy.deepcopy(model).eval()
    own = encoder_tensors(model)
    check_tensors(folder, tensors.forms(), own)
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(tensors[name])
    return model
