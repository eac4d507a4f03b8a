"""That every strategy computes what one process computes: the class that a model's parity test subclasses.

A model joins by giving its ModelSpec, a tiny configuration, a vocabulary size that no tp divides, and batches:

    class TestMyModel(StrategyParity):
        spec, model, vocab_size = MY_MODEL, ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4), 61

        @classmethod
        def make_batch(cls, step, num_rows): ...      # arrays by batch key: changing shapes, padded rows

Each trial trains on N gloo ranks and once on one process with the same micro-batches (dealt as training deals them),
and the two records are compared. An SGD step is AdamW with beta1 = 0, eps = 2^30, lr = 2^29: the update is then half
the clipped gradient, without Adam's normalisation, which hides a wrong scale; the first moment *is* that gradient.

Bounds. u = 2^-24 is the unit roundoff of fp32, L a mean loss over N tokens. All layouts form the same products; what
differs is the order of sums.
- First loss, tp = 1: every micro-batch gives the very same bits; only the float64 sum over micro-batches is ordered
  otherwise: M 2^-52 L for M micro-batches.
- Gradients: a sum of n terms has a random-walk error of sqrt(n) u of its largest partial sum. The longest chain of
  sums of a test model, some 24 products forward and backward of up to 128 terms and one over a few hundred tokens, has
  fewer than 4096 roundings: 64 u = 3.8e-6 of the largest gradient in the tensor.
- Weights after the SGD step: half of that, and the rounding of the subtraction on both sides: 2 u of the largest one.
- Gradient norm: sums of squares of some 60 tensors, one after another, on both sides: 2 sqrt(64) u = 16 u.
- Loss: the same 64 u in every token's loss, of either sign, averaged over N tokens: 64 u L / sqrt(N). The updates add
  less: where a gradient g is off by d, AdamW's step lr g / |g| is off by about lr d / |g|, the loss by lr d; over P
  weights lr 64 u g sqrt(P), below 1e-8 a step. (Weights whose gradient is zero but for rounding, key biases, walk at
  random and the loss does not depend on them.) So the bound does not grow over 8 steps.
- bf16: the same with 24 roundings of 2^-9 for 4096 of u, sqrt(24) 2^-9 L / sqrt(N): one key bias that walks otherwise
  moves every later rounding, and under tp > 1 partial sums are rounded before they are added. The first loss is exact
  as above.
- Repeated and reloaded runs of one layout, recomputed activations, gathered states: bitwise.
"""

from __future__ import annotations

import atexit
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from biokit.checkpoint import save_checkpoint
from biokit.config import ModelConfig
from biokit.models.spec import ModelSpec
from biokit.parallel.grid import DATA_PARALLEL, Layout
from biokit.runs import RunFolder
from tests.trials import NUM_ROWS, SINGLE, Record, States, Trial, play, play_once

CLIP_GRAD = 0.3
UNIT = 2.0**-24
UNIT_BF16 = 2.0**-9

DDP2, DDP4 = Layout("DDP", data=2), Layout("DDP", data=4)
ZERO1, ZERO2, ZERO3, ZEROINF = (Layout(name, data=2) for name in ("Zero1", "Zero2", "Zero3", "ZeroInf"))
PP2, PP2_DP2 = Layout("Pipeline", pipeline=2), Layout("Pipeline", pipeline=2, data=2)
TP2_PP2 = Layout("ThreeD", tensor=2, pipeline=2)
ONCE = (DDP2, ZERO1, ZERO2, ZERO3, ZEROINF, PP2, TP2_PP2)  # `make test`: each strategy once
LAYOUTS = (
    *ONCE,
    DDP4,
    replace(ZERO1, data=4),
    PP2_DP2,
    Layout("ThreeD", tensor=2),
    Layout("ThreeD", pipeline=2),
    Layout("ThreeD", tensor=2, data=2),
    Layout("ThreeD", pipeline=2, data=2),
)
JOURNEYS = (  # a checkpoint is saved under each layout and loaded under the next
    (SINGLE, TP2_PP2, SINGLE),
    (replace(ZERO1, data=4), ZERO1, replace(ZERO1, data=1)),
    (ZERO3, DDP2, ZEROINF, PP2),
    (Layout("ThreeD", tensor=2), Layout("ThreeD", tensor=4), ZERO2),
)


MUTATIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("scale", {"sgd": True}),  # the loss's scale is off by 1e-5: AdamW would hide it
    ("missing", {"sgd": True}),
    ("missing", {}),
    ("clip", {"sgd": True, "clip_grad": CLIP_GRAD}),
    ("rate", {}),
    ("seed", {"dropout": 0.1}),  # not where layers are cut: their masks are their own
    ("missing", {"precision": "bf16"}),
)


@dataclass(frozen=True)
class Finding:
    """A measured difference beside its bound."""

    layout: str
    check: str
    measured: float
    bound: float


class StrategyParity:
    """The parity section of the strategies' contract for one model; subclass it (see the module's docstring)."""

    spec: ClassVar[ModelSpec]
    model: ClassVar[ModelConfig]
    vocab_size: ClassVar[int]
    max_positions: ClassVar[int] = 24
    pad_id: ClassVar[int] = 0
    layouts: ClassVar[tuple[Layout, ...]] = LAYOUTS
    journeys: ClassVar[tuple[tuple[Layout, ...], ...]] = JOURNEYS

    @classmethod
    def make_batch(cls, step: int, num_rows: int) -> dict[str, np.ndarray]:
        """A global batch by batch key, a function of its arguments alone; labels that do not count are `pad_id`."""
        raise NotImplementedError

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Each strategy's first layout in `make test`, all layouts with `-m full`."""
        if "layout" in metafunc.fixturenames:
            budgeted = metafunc.function.__name__ == "test_token_budget"
            wanted = [layout for layout in self.layouts if not budgeted or layout.strategy in DATA_PARALLEL]
            marks = {layout: () if layout in ONCE else (pytest.mark.full,) for layout in wanted}
            values = [pytest.param(layout, id=_name(layout), marks=marks[layout]) for layout in wanted]
            metafunc.parametrize("layout", values)
        if "journey" in metafunc.fixturenames:
            marked = enumerate(self.journeys)
            values = [
                pytest.param(layouts, id="-to-".join(map(_name, layouts)), marks=(pytest.mark.full,) if index else ())
                for index, layouts in marked
            ]
            metafunc.parametrize("journey", values)

    def test_strategy_equals_one_process(self, layout: Layout) -> None:
        self.check(Trial.accumulating(layout, 4, clip_grad=CLIP_GRAD))
        for clip_grad in (0.0, CLIP_GRAD):
            self.check(Trial.accumulating(layout, 4, sgd=True, clip_grad=clip_grad))

    @pytest.mark.full
    def test_clipping_and_accumulation(self, layout: Layout) -> None:
        for accumulation in (1, 4):
            for clip_grad in (0.0, CLIP_GRAD):
                for sgd in (False, True):
                    self.check(Trial.accumulating(layout, accumulation, clip_grad=clip_grad, sgd=sgd))

    @pytest.mark.full
    def test_dropout(self, layout: Layout) -> None:
        trial = Trial.accumulating(layout, 4, dropout=0.1)
        self._check_same("dropout, same seed again", trial, self.play(trial), play(type(self), trial, None))
        assert self.play(trial).losses[0] != self.play(replace(trial, dropout=0.0)).losses[0]
        if layout.tensor == 1:  # tensor ranks draw streams of their own in the attention core and the inner layer
            self.check(trial)

    @pytest.mark.full
    def test_recompute(self, layout: Layout) -> None:
        trial = Trial.accumulating(layout, 4, dropout=0.1, keep_states=True)
        plain, recomputing = self.play(trial), replace(trial, recompute=True)
        again = {"activations made again": self.play(recomputing)}
        if layout.tensor > 1:
            partitioned = replace(recomputing, partition_activations=True)
            again["activations made again, partitioned"] = self.play(partitioned)
        assert set(plain.forwards) == {1}
        for check, record in again.items():
            self._check_same(check, trial, plain, record)
            # DeepSpeed's pipeline goes backward once for each tensor that a stage sends, through what they share again
            assert min(record.forwards) >= 2, f"{check}: calls a layer and micro-batch are {record.forwards}"

    @pytest.mark.full
    def test_bf16(self, layout: Layout) -> None:
        trial = Trial.accumulating(layout, 4, precision="bf16")
        self.check(trial)
        assert self.play(trial).losses[0] != self.play(replace(trial, precision="fp32")).losses[0]

    @pytest.mark.full
    def test_token_budget(self, layout: Layout) -> None:
        trial = Trial(layout, token_budget=True, clip_grad=CLIP_GRAD)
        self.check(trial)
        self.check(replace(trial, sgd=True, clip_grad=0.0, steps=(3, 4)))  # one row: the other ranks' share is empty

    @pytest.mark.full
    def test_reload_under_the_same_layout_is_exact(self, layout: Layout, tmp_path: Path) -> None:
        trial = Trial.accumulating(layout, 4, dropout=0.1, keep_states=True)
        first = self.play(replace(trial, steps=(0, 4)))
        second = self.play(replace(trial, steps=(4, 8)), _save(tmp_path, 4, first.states))
        self._check_states(_name(layout), first.states, second.loaded)
        whole = self.play(trial)
        self._check_same("losses after a reload", trial, replace(whole, losses=whole.losses[4:]), second)

    def test_checkpoints_fit_any_layout(self, journey: tuple[Layout, ...], tmp_path: Path) -> None:
        name, states, checkpoint = " > ".join(map(_name, journey)), None, None
        alone = self.play(Trial(SINGLE, steps=(0, 2 * len(journey))))
        for index, layout in enumerate(journey):
            trial = Trial(layout, steps=(2 * index, 2 * index + 2), keep_states=True)
            record = self.play(trial, checkpoint)
            if states is not None:
                self._check_states(name, states, record.loaded)
            part = slice(*trial.steps)
            reference = Record(alone.losses[part], alone.norms[part], alone.num_valid[part])
            self._note(_judge_curve(f"{name}", "loss after a move", trial, reference, record))
            states, checkpoint = record.states, _save(tmp_path, trial.steps[1], record.states)

    @pytest.mark.parametrize(
        ("cut", "mutation", "keys"),
        [
            (cut, mutation, keys)
            for cut in (False, True)
            for mutation, keys in MUTATIONS
            if not (cut and "dropout" in keys)
        ],
    )
    def test_the_checks_can_fail(self, cut: bool, mutation: str, keys: dict[str, Any]) -> None:
        trial = Trial.accumulating(TP2_PP2 if cut else self.layouts[0], 4, **keys)
        findings = self.compare(replace(trial, mutation=mutation))
        assert max(finding.measured / finding.bound for finding in findings) > 1

    def check(self, trial: Trial) -> None:
        """Compare with one process; every difference within its bound."""
        self._note(self.compare(trial))

    def compare(self, trial: Trial) -> list[Finding]:
        """The differences between a trial and the same on one process."""
        trial = replace(trial, steps=(trial.steps[0], trial.steps[0] + 1)) if trial.sgd else trial
        reference, record, name = self.play(trial.alone()), self.play(trial), _name(trial.layout)
        if trial.clip_grad:
            assert min(reference.norms) > 1.2 * trial.clip_grad, "the threshold does not clip"
        assert record.num_valid == reference.num_valid
        kind = trial.precision + (", dropout" if trial.dropout else "") + (", token budget" * trial.token_budget)
        if trial.sgd:
            return [
                _judge_gradients(name, f"gradients ({kind})", reference, record),
                _judge_weights(name, f"weights after SGD ({kind})", reference, record),
                _judge_norms(name, f"gradient norm ({kind})", reference, record),
            ]
        findings = _judge_curve(name, f"loss, 8 AdamW steps ({kind})", trial, reference, record)
        findings += _judge_evaluation(name, f"evaluation ({kind})", trial, reference, record)
        if trial.precision == "fp32":
            findings.append(_judge_norms(name, f"gradient norm ({kind})", reference, record))
        return findings

    def play(self, trial: Trial, checkpoint: Path | None = None) -> Record:
        """Run a trial; one that starts from the initial weights runs once a session."""
        model: Any = type(self)
        return play(model, trial, checkpoint) if checkpoint else play_once(model, trial)

    def _check_same(self, check: str, trial: Trial, first: Record, second: Record) -> None:
        gaps = [abs(a - b) for a, b in zip(first.losses, second.losses, strict=True)]
        self._note([Finding(_name(trial.layout), f"{check}: loss", max(gaps), 0.0)])
        if second.states[0]:
            self._check_states(_name(trial.layout), first.states, second.states, f"{check}: states")

    def _check_states(self, name: str, given: States, got: States, check: str = "states after a load") -> None:
        for wanted, found in zip(given, got, strict=True):
            assert list(wanted) == list(found)
            different = [key for key in wanted if not torch.equal(wanted[key], found[key])]
            gap = max((float((wanted[key] - found[key]).abs().max()) for key in different), default=0.0)
            _FINDINGS.append(Finding(name, check, gap, 0.0))
            assert not different, f"{name}, {check}: {len(different)} tensors differ by up to {gap}: {different[:5]}"

    def _note(self, findings: list[Finding]) -> None:
        _FINDINGS.extend(findings)
        for finding in findings:
            assert finding.measured <= finding.bound, finding


def report() -> str:
    """The worst difference of each layout and check so far, as a Markdown table."""
    worst: dict[tuple[str, str], Finding] = {}
    for finding in _FINDINGS:
        key = finding.layout, finding.check
        if key not in worst or _excess(finding) > _excess(worst[key]):
            worst[key] = finding
    rows = [f"| {f.layout} | {f.check} | {f.bound:.1e} | {f.measured:.1e} |" for f in worst.values()]
    return "\n".join(["| strategy | check | bound | measured |", "|---|---|---|---|", *rows]) + "\n"


_FINDINGS: list[Finding] = []


@atexit.register
def _write_report() -> None:
    path = os.environ.get("BIOKIT_PARITY_TABLE")
    if path and _FINDINGS:
        Path(path).write_text(report())


def _save(folder: Path, step: int, states: States) -> Path:
    """A checkpoint on the disk, whose tensors the ranks read when they need them."""
    return save_checkpoint(RunFolder(folder), step, *states, state={}, about={}, vocabulary="")


def _excess(finding: Finding) -> float:
    return finding.measured / finding.bound if finding.bound else finding.measured


def _name(layout: Layout) -> str:
    return str(layout).replace(" x ", "-") + ("-dp1" if layout.world_size == 1 and layout != SINGLE else "")


def _worst(name: str, check: str, pairs: list[tuple[float, float]]) -> Finding:
    """The pair (measured, bound) that comes nearest to its bound, or goes farthest beyond."""
    return Finding(name, check, *max(pairs, key=lambda pair: pair[0] / pair[1]))


def _loss_bound(trial: Trial, loss: float, num_tokens: float) -> float:
    each = 64 * UNIT if trial.precision == "fp32" else math.sqrt(24) * UNIT_BF16
    return each * loss / math.sqrt(num_tokens)


def _judge_curve(name: str, check: str, trial: Trial, reference: Record, record: Record) -> list[Finding]:
    steps = list(zip(reference.losses, record.losses, reference.num_valid, strict=True))
    curve = _worst(name, check, [(abs(a - b), _loss_bound(trial, a, n)) for a, b, n in steps])
    if trial.layout.tensor > 1 or trial.steps[0]:
        return [curve]
    loss, other, _ = steps[0]
    num_micros = NUM_ROWS // trial.micro_batch_size
    return [curve, Finding(name, "first loss", abs(loss - other), num_micros * 2.0**-52 * loss)]


def _judge_evaluation(name: str, check: str, trial: Trial, reference: Record, record: Record) -> list[Finding]:
    first, second = reference.sums, record.sums
    assert first.num_valid == second.num_valid > 0
    if trial.precision == "fp32" and not trial.mutation:
        assert first.num_correct == second.num_correct
    loss = first.loss / first.num_valid
    gap = abs(first.loss - second.loss) / first.num_valid
    return [Finding(name, check, gap, _loss_bound(trial, loss, first.num_valid))]


def _judge_norms(name: str, check: str, reference: Record, record: Record) -> Finding:
    pairs = zip(reference.norms, record.norms, strict=True)
    return _worst(name, check, [(abs(a - b), 16 * UNIT * a) for a, b in pairs])


def _judge_gradients(name: str, check: str, reference: Record, record: Record) -> Finding:
    first, second = (_gradients(found.states[1]) for found in (reference, record))
    assert list(first) == list(second)
    assert all(float(gradient.abs().max()) > 0 for gradient in first.values())
    pairs = [(_gap(first[key], second[key]), 64 * UNIT * float(first[key].abs().max())) for key in first]
    return _worst(name, check, pairs)


def _judge_weights(name: str, check: str, reference: Record, record: Record) -> Finding:
    first, second, gradients = reference.states[0], record.states[0], _gradients(reference.states[1])
    pairs = []
    for key, gradient in gradients.items():
        bound = 32 * UNIT * float(gradient.abs().max()) + 2 * UNIT * float(first[key].abs().max())
        pairs.append((_gap(first[key], second[key]), bound))
    return _worst(name, check, pairs)


def _gradients(optimizer: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The clipped gradients that the optimizer took: with beta1 = 0 they are the first moments."""
    return {key.removeprefix("exp_avg."): value for key, value in optimizer.items() if key.startswith("exp_avg.")}


def _gap(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).abs().max())
