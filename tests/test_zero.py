"""Zero1, Zero2, Zero3 and ZeroInf on two processes compute what Single computes, and their states travel.

Bounds. A micro-batch's gradient is computed by the same operations on every layout; only the order in which the at
most eight of a batch, and the squares of the norm, are added differs. In fp32 each addition errs by at most 2^-24 of
the sum, so gradients agree within 8 * 2^-23 of the whole norm. Losses (below 5 a token) see that through AdamW: eight
updates of 8 * 2^-23 each, with derivatives of order 1, give 8e-6 at most.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from biokit.config import ModelConfig, config_from_dict
from biokit.errors import CheckpointError, RunError
from biokit.models.molbart import MOLBART
from biokit.parallel.folding import PRECISIONS
from biokit.parallel.grid import Layout, deal_micro_batches
from biokit.parallel.processes import join_processes
from biokit.parallel.single import DDP, Single
from biokit.parallel.strategy import ModelParts
from biokit.parallel.zero import LossScale, Zero
from tests.distributed import TIMEOUT_S, ranks

CPU = torch.device("cpu")
STRATEGIES = ("Zero1", "Zero2", "Zero3", "ZeroInf")
LOSS_BOUND = 8e-6
GRADIENT_BOUND = 8 * 2**-23
BF16_BOUND = 2**-8  # relative error of a bf16 number, carried by the logits
EVERY_WEIGHT_IS_CUT = '{"zero_optimization": {"stage3_param_persistence_threshold": 0}}'
LR = 1e-3


def make_parts(tied=False, dropout=0.0, seed=1, num_layers=2, hidden_size=32):
    sizes = {"num_layers": num_layers, "hidden_size": hidden_size, "num_attention_heads": 4}
    config = ModelConfig(**sizes, dropout=dropout, tie_word_embeddings=tied)
    sizes = (config, 61, 40, seed)
    return ModelParts(
        MOLBART.layers(*sizes),
        lambda: MOLBART.build(*sizes),
        MOLBART.tensor_parallel_plan,
        MOLBART.tied_parameters(config),
        MOLBART.batch_keys,
        0,
    )


def make_config(strategy, folder, accumulation=2, data=None, parallel=None, **train):
    parallel = {**(parallel or {})}
    if strategy in ("Zero3", "ZeroInf"):
        path = folder / "ds_config.json"
        path.write_text(EVERY_WEIGHT_IS_CUT)
        parallel["deepspeed_config"] = str(path)
    train = {"micro_batch_size": 2, "global_batch_size": 4 * accumulation, "weight_decay": 0.1, **train}
    return config_from_dict(
        {"strategy": strategy, "parallel": parallel, "train": {"device": "cpu", **train}, "data": data or {}}
    )


def make_batches(counts, seed=0):
    """Global batches of micro-batches with changing lengths, some of whose labels are padding."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for number, count in enumerate(counts):
        micros = []
        for index in range(count):
            shapes = {"encoder_ids": (2, 9 + number), "decoder_ids": (2, 5 + index % 3), "labels": (2, 5 + index % 3)}
            micro = {key: torch.randint(6, 61, shape, generator=generator) for key, shape in shapes.items()}
            micro["labels"][1, 3 + index % 2 :] = 0
            micros.append(micro)
        batches.append(micros)
    return batches


def step(strategy, micros, number):
    """One update, with the share of this rank; the seed belongs to the micro-batch's place in the global batch."""
    place = strategy.place.data
    share = deal_micro_batches(len(micros), place, strategy.layout.data)
    empty = {**micros[0], "labels": torch.zeros_like(micros[0]["labels"])}
    mine = [micros[i] if i < len(micros) else empty for i in share]
    seeds = [1000 * number + i for i in share]
    num_valid = sum(int((micro["labels"] != 0).sum()) for micro in micros)
    result = strategy.train_batch(mine, num_valid, seeds, LR)
    assert result.sums.num_valid == num_valid
    return result


def gap(first, second, prefix=""):
    """The largest difference; NaN counts as one."""
    names = [name for name in first if name.startswith(prefix)]
    assert names
    assert first.keys() == second.keys()
    gaps = [float((first[name] - second[name]).abs().max()) for name in names]
    return math.inf if any(map(math.isnan, gaps)) else max(gaps)


def compare(strategy, folder, counts, options, parts_options):
    """On a rank: train Single and the strategy alike; on the main process, the figures by which they differ."""
    torch.manual_seed(5)
    config = make_config(strategy, folder, **options)
    batches = make_batches(counts)
    with join_processes(CPU, TIMEOUT_S, needs_group=True) as processes:
        single = Single(make_parts(**parts_options).build(), config.train, 0, CPU)
        zero = Zero(make_parts(**parts_options), config, Layout(strategy, data=2), processes)
        losses, norms, gradients = [], [], 0.0
        for number, micros in enumerate(batches):
            expected, found = step(single, micros, number), step(zero, micros, number)
            losses.append(abs(expected.sums.loss - found.sums.loss) / expected.sums.num_valid)
            norms.append((expected.grad_norm, found.grad_norm))
            if number == 0:  # AdamW's first moment after one step is the clipped gradient, times 1 - beta1
                ours, theirs = single.optimizer_state(), zero.optimizer_state()
                if processes.is_main:
                    gradients = gap(ours, theirs, "exp_avg.") / (1 - config.train.adam_beta1)
        share = deal_micro_batches(len(batches[0]), processes.rank, 2)
        evaluated = zero.evaluate([batches[0][i] for i in share if i < len(batches[0])] or [batches[0][0]])
        with torch.no_grad():
            ids = [batches[0][0][key] for key in MOLBART.batch_keys[:2]]
            assert zero.engine(ids, None).dtype == PRECISIONS[config.train.precision]
        before = zero.model_state()
        zero.close()
        assert F.linear is torch._C._nn.linear
        assert before.keys() == (single.model_state().keys() if processes.is_main else set())
    return {
        "loss": max(losses),
        "norm": max(abs(a - b) / a for a, b in norms),
        "norms": [a for a, _ in norms],
        "gradient": gradients,
        "evaluated": evaluated.loss,
    }


def check(figures, loss_bound=LOSS_BOUND, gradient_bound=GRADIENT_BOUND, clipped_at=math.inf):
    ours = figures[0]
    assert ours["loss"] <= loss_bound
    assert ours["norm"] <= gradient_bound
    assert ours["gradient"] <= gradient_bound * min(ours["norms"][0], clipped_at)
    assert figures[1]["loss"] == ours["loss"]
    if clipped_at < math.inf:
        assert min(ours["norms"]) > clipped_at  # it does clip


each_strategy = pytest.mark.parametrize("strategy", STRATEGIES)


@each_strategy
def test_losses_and_gradients_are_those_of_one_process(strategy, tmp_path):
    check(ranks(2).run(compare, strategy, tmp_path, [2] * 8, {"accumulation": 1, "clip_grad": 0.0}, {}))


@each_strategy
def test_clipping_accumulation_and_dropout_are_those_of_one_process(strategy, tmp_path):
    options = {"accumulation": 4, "clip_grad": 0.3}
    dropout = {"dropout": 0.1}
    figures = ranks(2).run(compare, strategy, tmp_path, [8] * 8, options, dropout)
    check(figures, clipped_at=0.3)
    assert ranks(2).run(compare, strategy, tmp_path, [8] * 8, options, dropout) == figures
    assert ranks(2).run(compare, strategy, tmp_path, [8] * 8, options, {})[0]["norms"] != figures[0]["norms"]


@each_strategy
def test_recompute_with_tied_tables(strategy, tmp_path):
    options, parts = {"checkpoint_activations": True}, {"tied": True, "dropout": 0.1}
    check(ranks(2).run(compare, strategy, tmp_path, [4] * 4, options, parts))


@each_strategy
def test_batches_of_changing_numbers_of_micro_batches(strategy, tmp_path):
    """As token budgets make them: one micro-batch leaves a rank with an empty one; seven leave one at the end."""
    options = {"data": {"max_tokens": 512}, "clip_grad": 0.3}
    check(
        ranks(2).run(compare, strategy, tmp_path, [7, 1, 4, 2, 1, 5, 8, 3], options, {"dropout": 0.1}), clipped_at=0.3
    )


@each_strategy
def test_bf16_is_near_one_process_in_bf16(strategy, tmp_path):
    figures = ranks(2).run(compare, strategy, tmp_path, [4] * 8, {"precision": "bf16"}, {"dropout": 0.1})
    check(figures, BF16_BOUND, BF16_BOUND)


def go_on(strategy, folder, precision):
    """On a rank: three steps, hand the state to a fresh engine of another seed, and two more steps of both."""
    config = make_config(strategy, folder, precision=precision, loss_scale_window=2, initial_loss_scale=4.0)
    batches, layout = make_batches([4] * 5), Layout(strategy, data=2)
    with join_processes(CPU, TIMEOUT_S, needs_group=True) as processes:
        first = Zero(make_parts(tied=True, dropout=0.1), config, layout, processes)
        fresh = first.optimizer_state()
        assert not any(tensor.any() for tensor in fresh.values())
        assert {name: t.shape for name, t in fresh.items()} == (
            {name: t.shape for name, t in first.optimizer_template().items()} if processes.is_main else {}
        )
        for number in range(3):
            step(first, batches[number], number)
        second = Zero(make_parts(tied=True, dropout=0.1, seed=2), config, layout, processes)
        step(second, batches[4], 0)  # what it was before must not shine through
        states = [spread(processes, first.template, first.model_state())]
        states.append(spread(processes, first.optimizer_template(), first.optimizer_state()))
        second.load(*states, first.scaler_state())
        assert {states[1]["step." + name].item() for name in first.template} == {3.0}
        results = []
        for engine in (first, second):
            results.append([step(engine, batches[number], number) for number in (3, 4)])
        assert results[0] == results[1]
        assert first.scaler_state() == second.scaler_state()
        for one, other in (
            (first.model_state(), second.model_state()),
            (first.optimizer_state(), second.optimizer_state()),
        ):
            assert one.keys() == other.keys()
            assert all(torch.equal(one[name], other[name]) for name in one)
        second.load(states[0], {}, {})  # weights alone: moments are fresh
        assert not any(tensor.any() for tensor in second.optimizer_state().values())
        whole = second.whole_model()
        assert (whole is None) == (not processes.is_main)
        logits = second.evaluate([batches[0][0]])
        if whole is not None:
            single = Single(whole, config.train, 0, CPU)
            assert all(torch.equal(single.model_state()[name], states[0][name]) for name in first.template)
            assert not whole.training
            assert 2 * single.evaluate([batches[0][0]]).loss == pytest.approx(logits.loss, rel=2**-20)
        lopsided = {**states[1], "step." + next(iter(first.template)): torch.tensor(7.0)}
        with pytest.raises(CheckpointError, match="after 7 and after 3 steps"):
            second.load(states[0], lopsided, {})
        for engine in (first, second):
            engine.close()


def spread(processes, template, state):
    """The main process's tensors on all."""
    return {
        name: processes.share(state[name].clone() if state else torch.empty(tensor.shape), 0)
        for name, tensor in template.items()
    }


@each_strategy
def test_a_fresh_engine_goes_on_bitwise(strategy, tmp_path):
    ranks(2).run(go_on, strategy, tmp_path, "fp32")


def fail_and_go_on(strategy, folder):
    """On a rank: a batch whose loss, then one whose gradient is not finite, between two good ones."""
    config, (first, bad, second) = make_config(strategy, folder, clip_grad=0.3), make_batches([4] * 3)
    with join_processes(CPU, TIMEOUT_S, needs_group=True) as processes:
        layout = Layout(strategy, data=2)
        spoiled, clean = (Zero(make_parts(), config, layout, processes) for _ in range(2))
        for zero in (spoiled, clean):
            step(zero, first, 0)
        before = spoiled.model_state()
        loss = spoiled._loss
        if processes.rank == 1:
            spoiled._loss = lambda micro, seed: (loss(micro, seed)[0], torch.tensor([math.inf, 0.0, 0.0]).double())
        with pytest.raises(RunError, match="the loss is inf"):
            step(spoiled, bad, 1)
        spoiled._loss = loss
        with pytest.raises(RunError, match="the gradient norm is"):
            spoiled.train_batch(bad[:2], 1e-38, [1, 2], LR)  # fp32 ends at 3.4e38
        after = spoiled.model_state()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert step(spoiled, second, 2) == step(clean, second, 2)
        ours, theirs = spoiled.optimizer_state(), clean.optimizer_state()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        for zero in (spoiled, clean):
            zero.close()


@each_strategy
def test_what_is_not_finite_leaves_the_weights(strategy, tmp_path):
    ranks(2).run(fail_and_go_on, strategy, tmp_path)


def overflow(strategy, folder):
    """On a rank: fp16 from a scale that overflows at first, beside DDP (whose scaled gradients are as large)."""
    config = make_config(strategy, folder, precision="fp16", initial_loss_scale=2.0**22, loss_scale_window=2)
    with join_processes(CPU, TIMEOUT_S, needs_group=True) as processes:
        ddp = DDP(make_parts().build(), config.train, 0, processes)
        zero = Zero(make_parts(), config, Layout(strategy, data=2), processes)
        skipped = []
        for number, micros in enumerate(make_batches([4] * 10)):
            expected, found = step(ddp, micros, number), step(zero, micros, number)
            assert expected.skipped == found.skipped
            assert zero.scaler_state() == ddp.scaler_state()
            assert found.sums.loss == pytest.approx(expected.sums.loss, rel=BF16_BOUND)
            skipped.append(found.skipped)
        ddp.load_scaler(zero.scaler_state())
        zero.close()
    return skipped


@each_strategy
def test_fp16_scales_as_torch_does(strategy, tmp_path):
    skipped = ranks(2).run(overflow, strategy, tmp_path)[0]
    assert skipped[0]
    assert not all(skipped)


def run_twice(strategy):
    """Alone, as a notebook: two runs in one process, each with a group of its own."""
    import os

    results = []
    for _ in range(2):
        for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
            os.environ.pop(name, None)
        config = config_from_dict({"strategy": strategy, "train": {"micro_batch_size": 2, "global_batch_size": 4}})
        with join_processes(CPU, TIMEOUT_S, needs_group=True) as processes:
            zero = Zero(make_parts(), config, Layout(strategy), processes)
            results.append(step(zero, make_batches([2])[0], 0))
            zero.close()
    assert results[0] == results[1]


@pytest.mark.parametrize("strategy", ["Zero1", "Zero3"])
def test_runs_follow_one_another_in_a_process(strategy):
    ranks(2).run(run_twice, strategy)


@pytest.mark.parametrize("overflows", [[], [2], [0, 1], [1, 4, 5]])
def test_the_loss_scale_is_that_of_torch(overflows):
    theirs = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    ours = LossScale(True, 1024.0, 2)
    weight = torch.nn.Parameter(torch.zeros(1))
    sgd = torch.optim.SGD([weight], 0.1)
    for number in range(8):
        theirs.scale(weight.sum()).backward()
        if number in overflows:
            weight.grad.fill_(math.inf)
        theirs.step(sgd)
        theirs.update()
        sgd.zero_grad()
        ours.update(number in overflows)
        assert ours.state() == theirs.state_dict()
    other = LossScale(True, 1.0, 1)
    other.load(theirs.state_dict())
    assert other == ours
