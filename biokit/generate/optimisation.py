"""Guided optimisation: CMA-ES (Hansen 2016) in the latent space around a molecule, towards any objective.

Shapes: P population, S tokens, D hidden.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from biokit.chem.molecules import canonicalize
from biokit.chem.scores import canonicalize_all
from biokit.errors import DataError, EngineError
from biokit.generate.inputs import Hiddens, check_ranges, encode_smiles, hiddens_of
from biokit.generate.kept import check_settings, fingerprint, hold_folder
from biokit.generate.sampling import sample_molecules
from biokit.models.molbart import MolBART
from biokit.runs import write_atomically

if TYPE_CHECKING:
    from biokit.tokenizers import SmilesTokenizer

SETTINGS, HISTORY, STOP = "optimisation.json", "history.jsonl", "STOP"
Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Generation:
    """The molecules of one generation: canonical SMILES ("" where what was written is none), and their scores (NaN)."""

    smiles: tuple[str, ...]
    scores: tuple[float, ...]


@dataclass
class Optimisation:
    """What an optimisation tried, and the best of it.

    Attributes:
        start, start_score: the molecule that it began with.
        ended: why it ended: `finished`, `stopped` (a file STOP), or the reason of CMA-ES.
    """

    start: str
    start_score: float
    generations: list[Generation] = field(default_factory=list)
    ended: str = ""

    @property
    def found(self) -> dict[str, float]:
        """Every molecule that was scored, the start among them, the best first."""
        scored = {self.start: self.start_score}
        for generation in self.generations:
            scored |= dict(zip(generation.smiles, generation.scores, strict=True))
        real = {smiles: score for smiles, score in scored.items() if smiles and not math.isnan(score)}
        return dict(sorted(real.items(), key=lambda pair: -pair[1]))

    @property
    def best(self) -> tuple[str, float]:
        """The best molecule and its score."""
        return next(iter(self.found.items()), (self.start, self.start_score))

    @property
    def best_by_generation(self) -> list[float]:
        """The best score up to each generation, the start's first."""
        best = [self.start_score]
        for generation in self.generations:
            best.append(float(np.nanmax([best[-1], *generation.scores])))
        return best


def optimise(
    model: MolBART,
    tokenizer: SmilesTokenizer,
    start: str,
    objective: Callable[[str], float],
    *,
    num_generations: int = 30,
    population: int = 32,
    sigma: float = 0.5,
    grammar: bool = True,
    folder: str | Path = "",
    seed: int = 1234,
    progress: bool = True,
) -> Optimisation:
    """Search for molecules of a higher objective among those that the decoder writes around a molecule.

    CMA-ES (with a diagonal covariance, as there are S x D numbers) moves a cloud of hiddens towards what scored better;
    what is no molecule counts as worse than everything. With a folder, each generation is kept there, and the same call
    goes on behind the last one, exactly as if it had not ended; a file STOP in it ends the search.
    An objective that scores the start otherwise than before is refused there; others are not noticed.

    Args:
        objective: of a canonical SMILES, higher is better; NaN: cannot be scored.
        num_generations: in all, those of earlier calls counted.
        sigma: the cloud's first width, in standard deviations of the molecule's hiddens.

    Raises:
        EngineError: the library `cma` is not installed.
        ConfigError: a value outside its range.
        DataError: a start that cannot be encoded or scored; an objective that fails; another search's folder.
    """
    check_ranges(
        {
            "num_generations": (num_generations, num_generations >= 1),
            "population": (population, population >= 4),
            "sigma": (sigma, 0 < sigma < math.inf),
        },
        "num_generations of 1 or more, population of 4 or more, sigma above 0",
    )
    search = _Search(model, tokenizer, canonicalize(start), objective, population, sigma, grammar, seed)
    found = Optimisation(search.start, search.score(search.start))
    if math.isnan(found.start_score):
        raise DataError(f"optimise from {start}", "the objective cannot score it", "Start elsewhere")
    with hold_folder(Path(folder), f"optimise in {folder}") if folder else contextlib.nullcontext():
        kept = _Kept(Path(folder), {**search.settings, "start_score": found.start_score}) if folder else None
        _go_on(search, found, kept, num_generations, progress)
    return found


def _go_on(search: _Search, found: Optimisation, kept: _Kept | None, num_generations: int, progress: bool) -> None:
    """From the last generation that is kept to the end."""
    for generation in kept.generations() if kept else []:
        search.replay(generation)
        found.generations.append(generation)
    from tqdm.auto import tqdm

    with tqdm(total=num_generations, initial=len(found.generations), desc="optimising", disable=not progress) as bar:
        while not found.ended:
            if len(found.generations) >= num_generations:
                found.ended = "finished"
            elif kept and kept.stop_file.exists():
                found.ended = "stopped"
            elif reasons := search.strategy.stop():
                found.ended = ", ".join(reasons)
            else:
                found.generations.append(search.step())
                if kept:
                    kept.add(found.generations[-1])
                bar.set_postfix(best=f"{found.best_by_generation[-1]:.4f}")
                bar.update()


class _Search:
    """The strategy, the decoder and the objective."""

    def __init__(
        self, model: MolBART, tokenizer: SmilesTokenizer, start: str, objective: Callable[[str], float],
        population: int, sigma: float, grammar: bool, seed: int,
    ) -> None:  # fmt: skip
        try:
            import cma
        except ImportError as error:
            raise EngineError("guided optimisation", "cma is not installed", "pip install cma") from error
        self.model, self.tokenizer, self.start, self.objective = model, tokenizer, start, objective
        self.grammar = grammar
        self.hiddens = hiddens_of(model, encode_smiles(tokenizer, [start]))
        self.spread = float(self.hiddens.values_BSD.float().std())
        self.scores: dict[str, float] = {}
        draws = np.random.default_rng(seed)
        options = {
            "popsize": population, "CMA_diagonal": True, "seed": math.nan, "verbose": -9, "verb_log": 0,
            "tolfun": 0, "tolfunhist": 0, "tolflatfitness": math.inf, "maxiter": math.inf,
            "randn": lambda *sizes: draws.standard_normal(sizes),
        }  # fmt: skip
        size = self.hiddens.values_BSD.numel()
        self.strategy = cma.CMAEvolutionStrategy(np.zeros(size), sigma, options)
        self.settings = {
            "start": start, "population": population, "sigma": sigma, "grammar": grammar, "seed": seed,
            "model": fingerprint(model, tokenizer),
        }  # fmt: skip

    def step(self) -> Generation:
        """Try one generation."""
        points: list[Values] = self.strategy.ask()
        smiles = tuple(canonicalize_all(self._decode(np.stack(points))))
        generation = Generation(smiles, tuple(self.score(one) if one else math.nan for one in smiles))
        self.strategy.tell(points, _costs(generation.scores))
        return generation

    def replay(self, generation: Generation) -> None:
        """Take the strategy through a generation that was tried before."""
        self.scores |= dict(zip(generation.smiles, generation.scores, strict=True))
        self.strategy.tell(self.strategy.ask(), _costs(generation.scores))

    def score(self, smiles: str) -> float:
        """Of a canonical SMILES, computed once. Raises DataError where the objective fails."""
        if smiles not in self.scores:
            try:
                self.scores[smiles] = float(self.objective(smiles))
            except Exception as error:
                found = f"it fails on {smiles}: {type(error).__name__}: {error}"
                raise DataError("the objective", found, "Mend it, or have it return NaN there") from error
        return self.scores[smiles]

    def _decode(self, points_PX: Values) -> list[str]:
        first_1SD = self.hiddens.values_BSD
        moves_PSD = torch.from_numpy(points_PX).to(first_1SD.device, torch.float32).view(-1, *first_1SD.shape[1:])
        values_PSD = (first_1SD + self.spread * moves_PSD).to(first_1SD.dtype)
        cloud = Hiddens(values_PSD, self.hiddens.mask_BS.expand(len(values_PSD), -1))
        return sample_molecules(self.model, self.tokenizer, cloud, grammar=self.grammar)[0]


class _Kept:
    """A search in a folder: what was asked, and a line a generation."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.history, self.stop_file = folder / HISTORY, folder / STOP
        self.population = int(settings["population"])
        check_settings(folder / SETTINGS, settings, f"optimise in {folder}")

    def generations(self) -> list[Generation]:
        """Those of earlier calls; a last line that was not written to its end is cut off."""
        if not self.history.exists():
            return []
        lines = self.history.read_text(encoding="utf-8").splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            write_atomically(self.history, "".join(lines := lines[:-1]))
        try:
            return [self._read(json.loads(line)) for line in lines]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self.history}", f"it cannot be read ({error})", "Give a new folder") from error

    def _read(self, entry: Any) -> Generation:
        generation = Generation(tuple(map(str, entry["smiles"])), tuple(map(_number, entry["scores"])))
        if not len(generation.smiles) == len(generation.scores) == self.population:
            raise ValueError(f"a generation is not {self.population} molecules and their scores")
        return generation

    def add(self, generation: Generation) -> None:
        scores = [None if math.isnan(score) else score for score in generation.scores]
        try:
            with self.history.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"smiles": generation.smiles, "scores": scores}) + "\n")
        except OSError as error:
            found = f"it cannot be written ({error.strerror})"
            raise DataError(f"{self.history}", found, "Free space and call again: it goes on") from error


def _number(score: float | None) -> float:
    return math.nan if score is None else float(score)


def _costs(scores: tuple[float, ...]) -> list[float]:
    """What CMA-ES makes small; what has no score is worse than all that has."""
    known = [-score for score in scores if not math.isnan(score)]
    worst = max(known, default=0.0) + 1.0
    return [worst if math.isnan(score) else -score for score in scores]
