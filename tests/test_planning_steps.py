"""A plan against real steps: bytes of live tensors at their peak and in the update, and every message."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch

from biokit.parallel.grid import Layout, Place
from biokit.planning.communication import list_traffic
from biokit.planning.jobs import Case, Job
from biokit.planning.memory import find_peak, list_instants
from tests.distributed import ranks
from tests.planning_rig import LENGTH, VOCAB_SIZE, make_config, make_micro_batches, watch_step

TOLERANCE, IN_UPDATE = 0.06, 0.03  # 0.10 is asked for; in the update nothing but states and buffers is there
SINGLE, DDP, ZERO1, ZERO2, ZERO3 = Layout(), *(Layout(name, data=2) for name in ("DDP", "Zero1", "Zero2", "Zero3"))
PIPELINE, TENSOR = Layout("Pipeline", pipeline=2), Layout("ThreeD", tensor=2)
CASES = {
    "Single": (SINGLE, {}),
    "DDP bf16": (DDP, {"precision": "bf16"}),
    "Zero2": (ZERO2, {}),
    "Zero3": (ZERO3, {"num_layers": 1, "hidden_size": 512, "ffn_hidden_size": 2048, "recompute": True}),
    "Pipeline": (PIPELINE, {"num_micros": 4, "recompute": True}),
    "tensor": (TENSOR, {}),
}
MORE_CASES = {
    "Single recompute": (SINGLE, {"recompute": True}),
    "Single one micro-batch": (SINGLE, {"num_micros": 1}),
    "Single bf16 tied": (SINGLE, {"precision": "bf16", "tie_word_embeddings": True, "dropout": 0.0}),
    "DDP one micro-batch": (DDP, {"num_micros": 1, "recompute": True}),
    "Zero1": (ZERO1, {}),
    "Zero2 one micro-batch": (ZERO2, {"num_micros": 1, "recompute": True}),
    "Zero3 all small": (ZERO3, {"recompute": True}),
    "Zero3 activations": (ZERO3, {"hidden_size": 256, "ffn_hidden_size": 512}),
    "ZeroInf": (Layout("ZeroInf", data=2), {"hidden_size": 256, "recompute": True}),
    "Zero2 four ranks": (Layout("Zero2", data=4), {"recompute": True}),
    "Pipeline of four": (Layout("Pipeline", pipeline=4), {"num_micros": 6}),
    "Pipeline tied": (PIPELINE, {"num_micros": 4, "tie_word_embeddings": True}),
    "Pipeline and data": (Layout("Pipeline", data=2, pipeline=2), {"precision": "bf16"}),
    "tensor and pipeline": (Layout("ThreeD", tensor=2, pipeline=2), {"num_micros": 3}),
    "tensor and data": (Layout("ThreeD", tensor=2, data=2), {"recompute": True, "partition": True}),
}


def plan_step(config, layout):
    """The job and the case that a plan makes of a configuration."""
    train = config.train
    num_micros = train.global_batch_size // (train.micro_batch_size * layout.data)
    return Job(config, VOCAB_SIZE, "cpu"), Case(
        layout, train.micro_batch_size, num_micros, train.checkpoint_activations
    )


def of_stage(steps, layout, stage):
    return [step for rank, step in enumerate(steps) if layout.place(rank).pipeline == stage]


def check_step(layout, sizes):
    config = make_config(layout, **sizes)
    steps = ranks(layout.world_size).run(watch_step, config, layout)
    job, case = plan_step(config, layout)
    for stage in range(layout.pipeline):
        instants = list_instants(job.rank_shape(case, stage))
        own = of_stage(steps, layout, stage)
        planned, measured = max(instant.total for instant in instants), max(step.peak for step in own)
        print(f"{layout} stage {stage}: {measured:,} bytes at the peak, planned {planned / measured - 1:+.1%}")
        assert planned == pytest.approx(measured, rel=TOLERANCE)
        update = next(instant for instant in instants if instant.where == "update")
        assert update.total == pytest.approx(max(step.in_update for step in own), rel=IN_UPDATE)
        # messages depend on the tensor rank only where the vocabulary is padded, and on no data rank
        expected = Counter()
        for one in list_traffic(job, case, stage):
            expected[one.kind, one.nbytes] += one.num_messages
        assert steps[layout.rank(Place(stage, 0, layout.tensor - 1))].messages == expected


@pytest.mark.parametrize("name", CASES)
def test_a_step_needs_and_sends_what_was_planned(name):
    check_step(*CASES[name])


@pytest.mark.full
@pytest.mark.parametrize("name", MORE_CASES)
def test_more_steps_need_and_send_what_was_planned(name):
    check_step(*MORE_CASES[name])


def write_settings(path, **group):
    path.write_text(json.dumps({"zero_optimization": group}))
    return str(path)


@pytest.mark.full
@pytest.mark.parametrize("layout", [ZERO1, ZERO2, PIPELINE], ids=str)
def test_gradients_that_fill_many_buckets(layout, tmp_path):
    path = write_settings(tmp_path / "ds_config.json", reduce_bucket_size=200_000)
    check_step(layout, {"recompute": True, "deepspeed_config": path, "num_micros": 3})


@pytest.mark.full
@pytest.mark.parametrize("reach", [400_000, 10**9], ids=["near", "far"])
def test_weights_that_are_gathered_little_by_little(reach, tmp_path):
    path = write_settings(
        tmp_path / "ds_config.json",
        reduce_bucket_size=200_000,
        stage3_prefetch_bucket_size=100_000,
        stage3_max_live_parameters=400_000,
        stage3_max_reuse_distance=reach,
        stage3_param_persistence_threshold=1000,
    )
    config = make_config(ZERO3, recompute=True, num_layers=3, deepspeed_config=path)
    steps = ranks(2).run(watch_step, config, ZERO3)
    job, case = plan_step(config, ZERO3)
    assert find_peak(job.rank_shape(case, 0)).total == pytest.approx(max(s.peak for s in steps), rel=TOLERANCE)
    for kind in ("all_gather", "reduce_scatter"):
        planned = sum(one.total for one in list_traffic(job, case) if one.kind == kind)
        counted = sum(nbytes * number for (found, nbytes), number in steps[0].messages.items() if found == kind)
        assert planned == pytest.approx(counted, rel=TOLERANCE)


def test_what_an_engine_adds_would_be_missed():
    """A plan that forgets DeepSpeed's copy of the weights, or its bucket, is out of tolerance."""
    config = make_config(ZERO2)
    steps = ranks(2).run(watch_step, config, ZERO2)
    job, case = plan_step(config, ZERO2)
    instants = {instant.where: instant for instant in list_instants(job.rank_shape(case, 0))}
    peak = max(instants.values(), key=lambda instant: instant.total)
    for word, instant, measured, tolerance in (
        ("copy", instants["update"], max(step.in_update for step in steps), IN_UPDATE),
        ("bucket", peak, max(step.peak for step in steps), TOLERANCE),
    ):
        left = tuple(item for item in instant.items if word not in item.what)
        assert len(left) == len(instant.items) - 1
        assert replace(instant, items=left).total < (1 - tolerance) * measured


def profile_peak(config):
    """On a rank: torch's own allocator, beside live tensors: what an operation takes only while it runs counts too."""
    from torch.profiler import ProfilerActivity, profile

    from biokit.layouts import model_parts
    from biokit.parallel.single import Single

    micros = make_micro_batches(config, SINGLE, 0)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        strategy = Single(model_parts(config, VOCAB_SIZE, 0).build(), config.train, 0, torch.device("cpu"))
        for _ in range(2):
            strategy.train_batch(micros, config.train.global_batch_size * LENGTH, range(len(micros)), 1e-4)
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    live = peak = 0
    for _, nbytes in changes:
        live += nbytes
        peak = max(peak, live)
    return peak


def test_the_allocator_agrees():
    config = make_config(SINGLE, dropout=0.0)
    (measured,) = ranks(1).run(profile_peak, config)
    job, case = plan_step(config, SINGLE)
    assert find_peak(job.rank_shape(case, 0)).total == pytest.approx(measured, rel=0.03)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: memory that one allocates is not compared")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gpu_allocates_what_was_planned(recompute, precision):
    from biokit.layouts import model_parts
    from biokit.parallel.single import Single

    config = make_config(SINGLE, recompute=recompute, precision=precision, device="cuda", hidden_size=512)
    before = torch.cuda.memory_allocated()
    strategy = Single(model_parts(config, VOCAB_SIZE, 0).build(), config.train, 0, torch.device("cuda"))
    micros = make_micro_batches(config, SINGLE, 0)
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        strategy.train_batch(micros, config.train.global_batch_size * LENGTH, range(len(micros)), 1e-4)
    measured = torch.cuda.max_memory_allocated() - before
    job = Job(config, VOCAB_SIZE, "cuda")
    case = Case(SINGLE, config.train.micro_batch_size, len(micros), recompute)
    assert find_peak(job.rank_shape(case, 0)).total == pytest.approx(measured, rel=TOLERANCE)
