"""Pipeline stages: tied tables, norms, short batches, failures and states, beside the matrix of `tests.parity`.

Bounds are derived in `tests.parity`: with u = 2^-24, 64 u of a gradient's largest entry, 16 u of the norm, and
64 u L / sqrt(N) of a mean loss L over N tokens.
"""

import math
import os
import sys
import tempfile
from dataclasses import replace
from functools import partial

import pytest
import torch

from biokit.config import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from biokit.errors import ConfigError, RunError
from biokit.models.molbart import MOLBART
from biokit.parallel.grid import deal_micro_batches, plan_layout
from biokit.parallel.processes import join_processes
from biokit.parallel.single import Single
from biokit.parallel.strategy import ModelParts, make_strategy
from tests.distributed import TIMEOUT_S, Ranks, RanksFailed, ranks

CPU = torch.device("cpu")
VOCAB_SIZE, MAX_POSITIONS, NUM_STEPS = 61, 24, 8  # no tp divides the vocabulary
UNIT = 2.0**-24
TABLE = "embed.embedding.tokens.weight"


def make_config(name="Pipeline", tp=1, pp=1, dropout=0.0, tied=True, num_layers=2, **train):
    """A small run: 8 rows a batch, 2 a micro-batch; a norm above 1.2 is clipped at 0.3."""
    keys = {"micro_batch_size": 2, "global_batch_size": 8, "clip_grad": 0.3, "weight_decay": 0.01, **train}
    sizes = {"num_layers": num_layers, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 64}
    return RunConfig(
        strategy=name,
        model=ModelConfig(**sizes, dropout=dropout, tie_word_embeddings=tied),
        train=TrainConfig(**{"device": "cpu", **keys}),
        parallel=ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp),
    )


def make_parts(config):
    args = (config.model, VOCAB_SIZE, MAX_POSITIONS, 1)
    tied = MOLBART.tied_parameters(config.model)
    build = partial(MOLBART.build, *args)
    return ModelParts(MOLBART.layers(*args), build, MOLBART.tensor_parallel_plan, tied, MOLBART.batch_keys, 0)


def make_micros(step, num_micros=4, num_rows=2):
    """The micro-batches of a global batch, each with lengths of its own."""
    generator = torch.Generator().manual_seed(step)
    micros = []
    for _ in range(num_micros):
        source, target = torch.randint(5, 20, (2,), generator=generator).tolist()
        lengths = {"encoder_ids": source, "decoder_ids": target, "labels": target}
        ids = {key: torch.randint(1, VOCAB_SIZE, (num_rows, n), generator=generator) for key, n in lengths.items()}
        ids["encoder_ids"][0, source - 2 :] = 0
        ids["labels"][0, target - 3 :] = 0
        micros.append(ids)
    return micros


def step_once(strategy, step, num_micros=4):
    """Train on a global batch; (mean loss, gradient norm)."""
    layout, place, micros = strategy.layout, strategy.place, make_micros(step, num_micros)
    mine = deal_micro_batches(num_micros, place.data, layout.data)
    num_valid = sum(int((micro["labels"] != 0).sum()) for micro in micros)
    seeds = [1000 * step + i for i in mine]
    result = strategy.train_batch([micros[i] for i in mine], num_valid, seeds, 1e-3)
    assert result.sums.num_valid == num_valid
    return result.sums.loss / num_valid, result.grad_norm


def follow(strategy, steps, num_micros=(4,) * NUM_STEPS):
    """The curve of some steps, an evaluation, and the whole state."""
    curve = [step_once(strategy, step, num) for step, num in zip(steps, num_micros, strict=False)]
    micros, place = make_micros(99), strategy.place
    sums = strategy.evaluate([micros[i] for i in deal_micro_batches(4, place.data, strategy.layout.data)])
    return curve, sums, strategy.model_state() | strategy.optimizer_state()


def start_alone(config, state=None):
    strategy = Single(make_parts(config).build(), config.train, 0, CPU)
    if state:
        strategy.load(state, state, {})
    return strategy


def on_ranks(task, config, *args, parts=None):
    """Start the strategy of a configuration on this rank, do the task with it, and end it."""
    with join_processes(CPU, TIMEOUT_S, needs_group=True) as processes:
        parts = parts or make_parts(config)
        layout = plan_layout(config, processes.world_size, {}, len(parts.layers))
        strategy = make_strategy(parts, config, layout, processes)
        result = task(strategy, *args)
        strategy.close()
        return result


def follow_from(strategy, steps, num_micros, state):
    if state:
        strategy.load(state, state, {})
    return follow(strategy, steps, num_micros)


def follow_on(world_size, config, steps=range(NUM_STEPS), num_micros=(4,) * NUM_STEPS, state=None):
    """What the first rank saw; the others saw the same."""
    found = ranks(world_size).run(on_ranks, follow_from, config, steps, num_micros, state)
    assert all(one[:2] == found[0][:2] for one in found)
    assert not any(one[2] for one in found[1:])
    return found[0]


def check_near(found, wanted, num_tokens=40):
    """Curves, evaluations and first moments within their bounds; `num_tokens` count in every batch at least."""
    for (loss, norm), (wanted_loss, wanted_norm) in zip(found[0], wanted[0], strict=True):
        assert abs(loss - wanted_loss) <= 64 * UNIT * wanted_loss / math.sqrt(num_tokens)
        assert abs(norm - wanted_norm) <= 16 * UNIT * wanted_norm
    assert (found[1].num_valid, found[1].num_correct) == (wanted[1].num_valid, wanted[1].num_correct)
    assert abs(found[1].loss - wanted[1].loss) <= 64 * UNIT * wanted[1].loss / math.sqrt(num_tokens)
    assert set(found[2]) == set(wanted[2])
    assert all(found[2][key].shape == tensor.shape for key, tensor in wanted[2].items())


LAYOUTS = {
    "1": (1, make_config("ThreeD", dropout=0.1)),
    "dp2": (2, make_config("ThreeD", dropout=0.1)),
    "pp2": (2, make_config(pp=2, dropout=0.1)),
    "pp2-free": (2, make_config(pp=2, clip_grad=0.0)),
    "pp2-dp2": (4, make_config(pp=2, dropout=0.1)),
    "pp4": (4, make_config(pp=4, num_layers=1, dropout=0.1)),  # the first stage has no vector of its own
    "tp2": (2, make_config("ThreeD", tp=2)),
    "tp2-pp2": (4, make_config("ThreeD", tp=2, pp=2)),
}


ONCE = ("pp2", "tp2-pp2")  # in every run of the tests


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in ONCE else pytest.mark.full) for n in LAYOUTS])
def test_tied_tables_train_as_on_one_process(name):
    world_size, config = LAYOUTS[name]
    check_near(follow_on(world_size, config), follow(start_alone(config), range(NUM_STEPS)))


@pytest.mark.parametrize("name", ["pp2", pytest.param("tp2-pp2", marks=pytest.mark.full)])
def test_every_gradient_is_that_of_one_process(name):
    """With beta1 = 0 the first moment is the clipped gradient."""
    world_size, config = LAYOUTS[name]
    config = replace(config, train=replace(config.train, adam_beta1=0.0))
    state = follow_on(world_size, config, range(1))[2]
    for key, wanted in follow(start_alone(config), range(1))[2].items():
        if key.startswith("exp_avg."):
            assert float((state[key] - wanted).abs().max()) <= 64 * UNIT * float(wanted.abs().max())


@pytest.mark.parametrize("name", ["pp2", pytest.param("dp2", marks=pytest.mark.full)])
def test_the_last_batch_of_an_epoch_may_be_smaller(name):
    world_size, config = LAYOUTS[name]
    counts = (4, 2, 6, 2)
    found = follow_on(world_size, config, range(4), counts)
    check_near(found, follow(start_alone(config), range(4), counts), num_tokens=10)


def fail_twice(strategy):
    """The errors of a step with an infinite gradient, then of one with an infinite loss; weights stay."""
    before, messages = strategy.model_state(), []
    if strategy.holds("encoder.0.ffn.up.weight"):
        hook = strategy.parameters["encoder.0.ffn.up.weight"].register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(RunError) as caught:
        step_once(strategy, 0)
    messages.append(str(caught.value))
    if strategy.holds("encoder.0.ffn.up.weight"):
        hook.remove()
    after = strategy.model_state()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    step_once(strategy, 0)
    if strategy.holds("head.tokens.bias"):
        bias = torch.zeros(VOCAB_SIZE)
        bias[7] = -math.inf  # the loss of a label is infinite, its gradient is not
        strategy.write_piece("head.tokens.bias", None, bias)
    before = strategy.model_state()
    with pytest.raises(RunError) as caught:
        step_once(strategy, 1)
    after = strategy.model_state()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    return [*messages, str(caught.value)]


def test_what_is_not_finite_ends_the_run_on_every_rank_and_leaves_the_weights():
    assert any((micro["labels"] == 7).any() for micro in make_micros(1))
    for messages in ranks(2).run(on_ranks, fail_twice, make_config(pp=2)):
        assert "gradient norm is inf" in messages[0]
        assert "loss is inf" in messages[1]


def scale_losses(strategy):
    """Per step whether it was skipped, and the scale after it."""
    seen = []
    for step in range(5):
        micros = make_micros(step)
        num_valid = sum(int((micro["labels"] != 0).sum()) for micro in micros)
        result = strategy.train_batch(micros, num_valid, [0] * 4, 1e-3)
        seen.append((result.skipped, strategy.scaler_state()["scale"]))
    return seen, strategy.model_state()


def test_fp16_scales_losses_as_one_process_does():
    config = make_config(pp=2, precision="fp16", initial_loss_scale=2.0**22, loss_scale_window=2)
    found, alone = ranks(2).run(on_ranks, scale_losses, config), scale_losses(start_alone(config))
    assert found[0][0] == found[1][0] == alone[0]
    assert {skipped for skipped, _ in alone[0]} == {True, False}
    for name, weight in alone[1].items():
        # a tenth of one update; the gradient of a key's bias is rounding alone, and its updates are what they like
        if not name.endswith(("qkv.bias", "kv.bias")):
            assert float((found[0][1][name] - weight).abs().max()) < 1e-4


@torch.no_grad()
def predict(model):
    micro = make_micros(3)[0]
    return model(micro["encoder_ids"], micro["decoder_ids"])


def copies_of_table(strategy):
    for step in range(NUM_STEPS):
        step_once(strategy, step)
    model = strategy.whole_model()
    logits = None
    if model is not None:
        assert not model.training
        assert model.head.tokens.weight is model.embed.embedding.tokens.weight
        logits = predict(model)
    return strategy.parameters[TABLE].detach().clone(), strategy.owner_stage(TABLE), logits


def test_copies_of_a_table_stay_alike_and_make_one_model():
    config = make_config(pp=2)
    (first, owner, logits), (second, _, nothing) = ranks(2).run(on_ranks, copies_of_table, config)
    assert (owner, nothing) == (0, None)
    assert torch.equal(first, second)
    alone = start_alone(config)
    follow(alone, range(NUM_STEPS))
    # logits of order 1 from weights that 8 updates of 1e-3 moved: a hundredth of one update is not seen
    assert float((logits - predict(alone.whole_model())).abs().max()) < 1e-5


def same(first, second):
    assert list(first) == list(second)
    return all(torch.equal(first[key], second[key]) for key in first)


def test_states_go_to_one_process_and_back():
    config, wide = make_config(pp=2, dropout=0.1), make_config("ThreeD", tp=2, pp=2)
    plain = make_config(pp=2)
    whole, first = follow_on(2, config, range(6)), follow_on(2, config, range(3))
    again = follow_on(2, config, range(3, 6), state=first[2])
    assert again[0] == whole[0][3:]
    assert same(again[2], whole[2])
    alone = start_alone(plain, first[2])
    assert same(alone.model_state() | alone.optimizer_state(), first[2])
    assert same(follow_on(4, wide, (), state=first[2])[2], first[2])
    check_near(follow_on(4, wide, range(3, 6), state=first[2]), follow(alone, range(3, 6)))


def test_a_load_without_moments_starts_them_afresh():
    assert ranks(2).run(on_ranks, forget, make_config(pp=2))[0] == {0.0}


def forget(strategy):
    step_once(strategy, 0)
    strategy.load(strategy.parts.build().state_dict(), {}, {})
    return {float(moment.abs().max()) for moment in strategy.optimizer_state().values()}


class Recorder:
    """Builders that note which layers are built in earnest."""

    def __init__(self, parts):
        self.built = []
        self.layers = [(name, partial(self.build, name, build)) for name, build in parts.layers]

    def build(self, name, build):
        layer = build()
        if next(layer.parameters()).device.type != "meta":
            self.built.append(name)
        return layer


def list_built(config):
    """Layers that this rank built, what it printed, whether the module of tensor parallelism was imported."""
    parts = make_parts(config)
    recorder = Recorder(parts)
    with tempfile.TemporaryFile() as file:
        saved = os.dup(1), os.dup(2)
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        on_ranks(partial(follow, steps=range(2)), config, parts=replace(parts, layers=recorder.layers))
        for old, stream in zip(saved, (1, 2), strict=True):
            sys.stdout.flush()
            os.dup2(old, stream)
        file.seek(0)
        return recorder.built, file.read().decode(), "biokit.parallel.tensor" in sys.modules


def test_a_rank_builds_its_own_layers_alone_and_says_nothing():
    with Ranks(2) as fresh:
        (first, *_), (second, *_) = found = fresh.run(list_built, make_config(pp=2, tied=False))
    assert first == ["embed", "encoder.0", "encoder.1"]
    assert second == ["decoder.0", "decoder.1", "head"]
    assert [one[1:] for one in found] == [("", False)] * 2


def spread(config):
    parts = make_parts(config)
    tied = dict.fromkeys(("encoder.1.ffn_norm.weight", "head.norm.weight"), "encoder.0.ffn_norm.weight")
    on_ranks(follow, config, parts=replace(parts, tied=tied))


def test_a_parameter_tied_over_three_stages_is_refused():
    with pytest.raises(RanksFailed) as caught:
        ranks(4).run(spread, make_config(pp=4, tied=False))
    assert all(isinstance(error, ConfigError) for error in caught.value.errors.values())
