"""Prediction of a property: a head on a model's hiddens against a random forest and the mean, over several splits.

    data = read_properties("esol.csv", "measured log solubility in mols per litre", model, tokenizer)
    report = compare_predictors(data, model, tokenizer)
    print(report.verdict)

Shapes: N molecules, D hidden.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from biokit.chem.similarity import Bits, fingerprints, nearest
from biokit.data.split import Parts
from biokit.errors import ConfigError
from biokit.generate.embeddings import embed_all
from biokit.generate.inputs import check_ranges, encode_smiles
from biokit.models.molbart import MolBART
from biokit.tasks.property_baselines import NUM_BITS, NUM_TREES, RADIUS, Prediction, predict_by_forest, predict_mean
from biokit.tasks.property_data import PropertyData, Targets, check_targets
from biokit.tasks.property_head import FROZEN, TUNED, EnsembleHead, HeadOptions, Part, train_frozen, train_tuned
from biokit.tasks.property_metrics import CALIBRATION, LOWER_IS_BETTER, METRICS, import_sklearn, score
from biokit.tasks.property_splits import split_molecules

if TYPE_CHECKING:
    from biokit.tokenizers import SmilesTokenizer

FRACTIONS = (0.8, 0.1, 0.1)  # train, val, test
NUM_MEMBERS = 5
MEAN, FOREST, FROZEN_HEAD, TUNED_HEAD = "mean", "forest", "frozen head", "tuned head"

Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True)
class TestPart:
    """The test molecules (N) of one split.

    Attributes:
        rows: their places in the data; `train_rows`: those of the molecules that were learnt from.
        nearest_rows: place of the most alike training molecule, and `similarities` its Tanimoto similarity (ECFP4).
    """

    __test__ = False  # no test of pytest's

    rows: npt.NDArray[np.int64]
    train_rows: npt.NDArray[np.int64]
    nearest_rows: npt.NDArray[np.int64]
    similarities: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Outcome:
    """What one method predicted of the test part of one seed's split, and its metrics."""

    method: str
    seed: int
    prediction: Prediction
    scores: dict[str, float]


@dataclass(frozen=True)
class PropertyReport:
    """Methods over the same splits.

    Attributes:
        parts: seed -> its test molecules.
    """

    data: PropertyData
    split: str
    parts: dict[int, TestPart]
    outcomes: tuple[Outcome, ...]

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(outcome.method for outcome in self.outcomes))

    @property
    def metrics(self) -> tuple[str, ...]:
        return (*METRICS[self.data.kind], CALIBRATION)

    def values(self, method: str, metric: str) -> list[float]:
        """One a seed. Raises ConfigError for a method or metric that the report does not have."""
        found = [outcome.scores.get(metric) for outcome in self.outcomes if outcome.method == method]
        known = [value for value in found if value is not None]
        if not known:
            valid = f"Valid: {', '.join(self.methods)}; {', '.join(self.metrics)}"
            raise ConfigError(f"{metric} of {method}", "the report does not have it", valid)
        return known

    def spread(self, method: str, metric: str) -> tuple[float, float]:
        """Mean and standard deviation (n - 1) over the seeds; NaN for the second with one seed."""
        values = self.values(method, metric)
        return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else float("nan")

    def describe(self, method: str, metric: str, digits: int = 3) -> str:
        """`0.871 ± 0.020`; without the second where there is one seed."""
        mean, deviation = self.spread(method, metric)
        return f"{mean:.{digits}f}" + ("" if deviation != deviation else f" ± {deviation:.{digits}f}")

    def rank(self) -> list[str]:
        """Methods, the best first, by the mean of RMSE or ROC-AUC."""
        metric = self.metrics[0]
        sign = 1 if metric in LOWER_IS_BETTER else -1
        return sorted(self.methods, key=lambda method: sign * self.spread(method, metric)[0])

    @property
    def num_won(self) -> int:
        """Splits in which the best method on average is the best of all."""
        metric, (best, *others) = self.metrics[0], self.rank()
        sign = 1 if metric in LOWER_IS_BETTER else -1
        rivals = zip(*(self.values(other, metric) for other in others), strict=True)
        own = self.values(best, metric)
        return sum(all(sign * value < sign * rival for rival in row) for value, row in zip(own, rivals, strict=True))

    @property
    def verdict(self) -> str:
        """Which method wins, in a sentence; a clear winner is the best of all in every split."""
        metric, (best, *others) = self.metrics[0], self.rank()
        num_splits = len(self.parts)
        clear = self.num_won == num_splits
        words = f"The {best} wins" if clear else f"No clear winner, the {best} is the best on average"
        if best == MEAN:
            words = "Nothing beats the mean of the training targets"
        rest = ", ".join(f"{other} {self.describe(other, metric)}" for other in others)
        where = f"best in {self.num_won} of {num_splits} {self.split} split{'s' if num_splits > 1 else ''}"
        return f"{words} ({where}): {metric} {self.describe(best, metric)}; {rest}."

    def __str__(self) -> str:
        return f"{self.data}\n{self.verdict}"


def compare_predictors(
    data: PropertyData,
    model: MolBART,
    tokenizer: SmilesTokenizer,
    *,
    split: str = "scaffold",
    seeds: Sequence[int] = (0, 1, 2),
    num_members: int = NUM_MEMBERS,
    num_trees: int = NUM_TREES,
    tune: bool = False,
    fractions: Sequence[float] = FRACTIONS,
    options: HeadOptions | None = None,
    progress: bool = True,
) -> PropertyReport:
    """Train and test the mean, a forest and a head on the same splits, one a seed.

    The seed decides all that varies: which scaffolds (or molecules) are tested, the starts and batches of the head's
    members, and the forest's draws. The forest learns from train and val together, for it has no use for the latter.

    Args:
        split: `scaffold` or `random`, see `split_molecules`.
        tune: also train the encoder below a head of its own (a copy; `model` stays as it is).
        fractions: of train, val (early stopping) and test.
        options: of both heads; left out: `FROZEN` and `TUNED`.

    Raises:
        ConfigError: a value outside its range. EngineError: scikit-learn is not installed.
        DataError: molecules that the model cannot take, too few of them, or a part with one class only.
    """
    _check(seeds, num_members, num_trees, fractions, options)
    check_targets(data, f'{data.name}, target "{data.target}"')
    import_sklearn("ensemble")
    splits = {seed: split_molecules(data, split, fractions, seed) for seed in seeds}
    from tqdm.auto import tqdm

    runs: dict[str, Callable[[_Bench, Parts, int], Prediction]] = {
        MEAN: _Bench.mean, FOREST: _Bench.forest, FROZEN_HEAD: _Bench.frozen,
    }  # fmt: skip
    if tune:
        runs[TUNED_HEAD] = _Bench.tuned
    bench = _Bench(data, model, tokenizer, num_members, num_trees, options)
    outcomes = []
    with tqdm(total=len(splits) * len(runs), desc="predicting", disable=not progress) as bar:
        for seed, parts in splits.items():
            measured = data.targets[parts == 2]
            for method, run in runs.items():
                bar.set_postfix_str(f"{method}, seed {seed}")
                prediction = run(bench, parts, seed)
                scores = score(data.kind, measured, prediction.mean, prediction.std)
                outcomes.append(Outcome(method, seed, prediction, scores))
                bar.update()
    tested = {seed: _find_neighbours(bench.bits, parts) for seed, parts in splits.items()}
    return PropertyReport(data, split, tested, tuple(outcomes))


def _check(
    seeds: Sequence[int], num_members: int, num_trees: int, fractions: Sequence[float], options: HeadOptions | None
) -> None:
    if not seeds or len(set(seeds)) != len(seeds):
        raise ConfigError(f"seeds={tuple(seeds)}", "they are none or not distinct", "Give e.g. (0, 1, 2)")
    check_ranges({"num_members": (num_members, 1 <= num_members <= 100)}, "1 to 100; 5 is usual")
    check_ranges({"num_trees": (num_trees, num_trees >= 1)}, "1 or more; 200 to 500 are usual")
    good = len(fractions) == 3 and all(share > 0 for share in fractions) and abs(sum(fractions) - 1) < 1e-6
    check_ranges({"fractions": (tuple(fractions), good)}, "three shares above 0 that add up to 1, as (0.8, 0.1, 0.1)")
    if options is not None:
        options.check()


def _find_neighbours(bits_NF: Bits, parts: Parts) -> TestPart:
    rows, train_rows = np.flatnonzero(parts == 2), np.flatnonzero(parts != 2)
    places, similarities = nearest(bits_NF[rows], bits_NF[train_rows])
    return TestPart(rows, train_rows, train_rows[places], similarities)


class _Bench:
    """One table of molecules, and each method on a split of it; what splits have in common is computed once."""

    def __init__(
        self, data: PropertyData, model: MolBART, tokenizer: SmilesTokenizer, num_members: int, num_trees: int,
        options: HeadOptions | None,
    ) -> None:  # fmt: skip
        self.data, self.model, self.tokenizer = data, model, tokenizer
        self.num_members, self.num_trees, self.options = num_members, num_trees, options
        self.bits = fingerprints(data.smiles, RADIUS, NUM_BITS)
        self.vectors_ND = embed_all(model, tokenizer, data.smiles)

    def mean(self, parts: Parts, seed: int) -> Prediction:
        return predict_mean(self.data.targets[parts != 2], self.data.kind, int((parts == 2).sum()))

    def forest(self, parts: Parts, seed: int) -> Prediction:
        known = parts != 2
        return predict_by_forest(
            self.bits[known], self.data.targets[known], self.bits[~known], self.data.kind, seed, self.num_trees
        )

    def frozen(self, parts: Parts, seed: int) -> Prediction:
        vectors_ND = self.vectors_ND
        head = fit_frozen(vectors_ND, self.data, parts, self.model, self.num_members, seed, self.options)
        return head.predict(_to_device(vectors_ND[parts == 2], self.model))

    def tuned(self, parts: Parts, seed: int) -> Prediction:
        head, encoder = fit_tuned(self.data, parts, self.model, self.tokenizer, self.num_members, seed, self.options)
        tested = [self.data.smiles[row] for row in np.flatnonzero(parts == 2)]
        return head.predict(_to_device(embed_all(encoder, self.tokenizer, tested), self.model))


def fit_frozen(
    vectors_ND: Vectors, data: PropertyData, parts: Parts, model: MolBART, num_members: int, seed: int,
    options: HeadOptions | None = None,
) -> EnsembleHead:  # fmt: skip
    """A head on vectors of the model as it is, learnt from part 0 and stopped by part 1."""
    inputs = _to_device(vectors_ND, model)
    train, val = (_make_part(inputs, data.targets, parts == number) for number in (0, 1))
    return train_frozen(train, val, data.kind, num_members, seed, options or FROZEN)


def fit_tuned(
    data: PropertyData, parts: Parts, model: MolBART, tokenizer: SmilesTokenizer, num_members: int, seed: int,
    options: HeadOptions | None = None,
) -> tuple[EnsembleHead, MolBART]:  # fmt: skip
    """A head and the tuned copy of the model below it, learnt from part 0 and stopped by part 1."""
    inputs = encode_smiles(tokenizer, data.smiles).to(next(model.parameters()).device)
    train, val = (_make_part(inputs, data.targets, parts == number) for number in (0, 1))
    encoder = copy.deepcopy(model)
    return train_tuned(encoder, train, val, data.kind, num_members, seed, options or TUNED), encoder


def _make_part(inputs: torch.Tensor, targets: Targets, mask: npt.NDArray[np.bool_]) -> Part:
    rows = torch.from_numpy(np.flatnonzero(mask)).to(inputs.device)
    return Part(inputs[rows], torch.from_numpy(targets).to(inputs.device)[rows])


def _to_device(vectors_ND: Vectors, model: MolBART) -> torch.Tensor:
    return torch.from_numpy(vectors_ND).to(next(model.parameters()).device)
