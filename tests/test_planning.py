"""Plans on paper: what is rehearsed, how layouts are ranked, what is refused. Nothing is started."""

import argparse
import math
import subprocess
import sys
from dataclasses import replace

import pytest

from biokit.config import load_config
from biokit.errors import ConfigError
from biokit.parallel.grid import Layout
from biokit.planning.candidates import list_cases
from biokit.planning.communication import list_traffic
from biokit.planning.devices import DEVICES, adjust_device, find_device
from biokit.planning.jobs import Case, Job
from biokit.planning.parts import PARTS
from biokit.planning.plans import GIB, plan_run
from biokit.planning.report import TIMES, list_cells, list_settings, write_report
from biokit.planning.schedule import BACKWARD, FORWARD, StageTimes, count_in_flight, idle_share, list_commands, play
from biokit.planning.timing import Machine
from biokit.view import plan_command
from tests.distributed import ranks

VOCAB_SIZE, LENGTH = 523, 128
H100 = find_device("h100")


def make_job(kind="cuda", *overrides):
    sizes = ["model.num_layers=2", "model.dropout=0.1", "train.micro_batch_size=4", "train.global_batch_size=32"]
    return Job(load_config("molbart_mini", [*sizes, *overrides]), VOCAB_SIZE, kind)


def plan(*overrides, gpus=8, device=H100, **options):
    return plan_run(load_config("molbart_mini", overrides), gpus, device, vocab_size=VOCAB_SIZE, **options)


# the schedule


def list_engine_commands(num_micros, num_stages):
    """On a rank: what DeepSpeed's own schedule has each stage do, and the buffers it asks for."""
    from deepspeed.runtime.pipe.schedule import TrainSchedule

    words = {
        "ForwardPass": "forward",
        "BackwardPass": "backward",
        "SendActivation": "activation",
        "RecvActivation": "activation",
        "SendGrad": "gradient",
        "RecvGrad": "gradient",
    }
    stages = []
    for stage in range(num_stages):
        steps = list(TrainSchedule(num_micros, num_stages, stage).steps())
        commands = [[words[type(c).__name__] for c in step if type(c).__name__ in words] for step in steps]
        stages.append((commands, TrainSchedule(num_micros, num_stages, stage).num_pipe_buffers()))
    return stages


@pytest.mark.parametrize(("num_micros", "num_stages"), [(1, 2), (2, 2), (4, 2), (3, 4), (8, 4), (5, 7)])
def test_stages_do_what_deepspeed_has_them_do(num_micros, num_stages):
    (engine,) = ranks(1).run(list_engine_commands, num_micros, num_stages)
    work = {FORWARD, BACKWARD}
    for stage, (slots, num_buffers) in enumerate(engine):
        ours = [command.what for command in list_commands(num_micros, num_stages, stage)]
        assert ours == [word for slot in slots for word in slot]
        idle = sum(not work & set(slot) for slot in slots) / len(slots)
        assert idle == pytest.approx((num_stages - 1) / (num_micros + num_stages - 1))
        assert max(2, count_in_flight(num_micros, num_stages, stage)) == num_buffers


@pytest.mark.parametrize(("forward", "backward"), [(1.0, 1.0), (1.0, 2.0)])
def test_the_bubble_of_equal_stages_is_that_of_the_slots(forward, backward):
    for num_micros, num_stages in ((1, 2), (4, 4), (32, 8)):
        spans = play([StageTimes(forward, backward)] * num_stages, num_micros)
        length = (num_micros + num_stages - 1) * (forward + backward)
        assert max(span.end for span in spans) == pytest.approx(length)
        assert idle_share(spans, num_stages) == pytest.approx((num_stages - 1) / (num_micros + num_stages - 1))


def test_a_message_waits_for_both_sides():
    slow, fast = StageTimes(1.0, 2.0, activation=0.5, gradient=0.25), StageTimes(3.0, 6.0)
    spans = play([slow, fast], 1)
    assert [(s.stage, s.what, s.start, s.end) for s in sorted(spans, key=lambda s: (s.start, s.stage))] == [
        (0, "forward", 0.0, 1.0),
        (0, "activation", 1.0, 1.5),
        (1, "activation", 1.0, 1.5),
        (1, "forward", 1.5, 4.5),
        (1, "backward", 4.5, 10.5),
        (0, "gradient", 10.5, 10.75),
        (1, "gradient", 10.5, 10.75),
        (0, "backward", 10.75, 12.75),
    ]


# the rehearsal


def test_operations_are_those_of_the_layer():
    """An encoder layer's matrix products: QKV, output and two of the feed-forward, and the attention itself."""
    job = make_job()
    use = job.rehearsal.layers(4, 1, False)[1]
    hidden, tokens = job.blueprint.sizes["hidden_size"], 4 * LENGTH
    products = 2 * tokens * hidden * (3 * hidden + hidden + 2 * 4 * hidden)
    assert use.name == "encoder.0" and use.forward.flops == products + 4 * tokens * LENGTH * hidden
    assert use.backward.flops >= 2 * products
    again = job.rehearsal.layers(4, 1, True)[1]
    assert again.backward.flops == pytest.approx(use.backward.flops + use.forward.flops, rel=0.15)
    assert again.kept < use.kept / 10


def test_a_gpu_keeps_less_of_attention_than_the_cpu():
    """The CPU's plain attention keeps every weight under dropout; a GPU's fused one none."""
    kept = {kind: make_job(kind).rehearsal.layers(4, 1, False)[1].kept for kind in ("cuda", "cpu")}
    assert kept["cuda"] < 0.7 * kept["cpu"]


def test_what_is_cut_is_divided():
    job = make_job()
    whole, half = (job.rehearsal.layers(4, tensor, False)[1] for tensor in (1, 2))
    assert half.forward.flops == whole.forward.flops / 2
    assert 0.4 * whole.kept < half.kept < 0.8 * whole.kept
    hidden_bytes = 4 * LENGTH * job.blueprint.sizes["hidden_size"] * 4
    assert dict(half.forward.messages) == dict(half.backward.messages) == {("all_reduce", hidden_bytes): 2}
    assert not whole.forward.messages


@pytest.mark.parametrize("option", ["sequence_parallel", "partition_activations"])
def test_options_of_tensor_parallelism_keep_less(option):
    """With sequence parallelism the rows between the matrices are dealt; a recomputed layer's inputs can be."""
    recompute = option == "partition_activations"
    plain, dealt = (make_job("cuda", f"parallel.{option}={on}", "train.micro_batch_size=8") for on in ("False", "True"))
    case = Case(Layout("ThreeD", tensor=2, data=2), 8, 2, recompute)
    kept = [job.stage_uses(case)[0].kept for job in (plain, dealt)]
    assert kept[1] < 0.9 * kept[0]
    kinds = {one.kind for one in list_traffic(dealt, case) if one.group == "tensor"}
    assert "all_gather" in kinds and ("reduce_scatter" in kinds) == (option == "sequence_parallel")


# layouts


def test_layouts_are_those_that_the_model_and_the_batch_allow():
    cases = list_cases(make_job(), 16)
    found = {(c.layout.strategy, c.layout.tensor, c.layout.pipeline, c.layout.data) for c in cases}
    assert {("DDP", 1, 1, 16), ("Zero3", 1, 1, 16), ("Pipeline", 1, 2, 8), ("ThreeD", 4, 2, 2)} <= found
    assert not any(tensor > 4 or pipeline > 6 for _, tensor, pipeline, _ in found)  # 4 heads, 6 layers
    assert all(c.micro_batch_size * c.num_micros * c.layout.data == 32 for c in cases)
    assert len(cases) == 2 * len(found)  # with recompute and without
    (dp16,) = {c.micro_batch_size for c in cases if c.layout.data == 16}
    assert dp16 == 2  # 4 does not divide a share of 2


def test_one_gpu_has_no_others_to_share_with():
    assert {case.layout.strategy for case in list_cases(make_job(), 1)} == {"Single", "ZeroInf"}


def test_the_fastest_that_fits_comes_first():
    table = plan("train.global_batch_size=256")
    times = [p.step.total for p in table.plans]
    assert times[1:] == sorted(times[1:]) and times[0] <= 1.02 * min(times)
    assert not table.too_large and table.best.case.layout.strategy == "DDP"
    scarce = plan("train.global_batch_size=256", reserve_gib=0.0, memory_gib=0.9 * table.best.peak.total / GIB)
    assert all(p.peak.total <= scarce.limit for p in scarce.plans)
    assert scarce.best.step.total >= table.best.step.total
    assert scarce.best.case != table.best.case


def test_a_smaller_micro_batch_is_taken_where_the_configured_one_is_too_large():
    roomy = plan("train.global_batch_size=256", gpus=1)
    single = next(p for p in roomy.plans if p.case.layout == Layout() and not p.case.recompute)
    assert single.case.micro_batch_size == 32
    scarce = plan("train.global_batch_size=256", gpus=1, reserve_gib=0.0, memory_gib=single.peak.total / GIB / 2)
    smaller = next(p for p in scarce.plans if p.case.layout == Layout() and not p.case.recompute)
    assert smaller.case.micro_batch_size in (8, 16) and smaller.fits
    assert "train.micro_batch_size=" in " ".join(list_settings(smaller))


def test_a_faster_link_shortens_what_is_sent_and_nothing_else():
    for p in plan(gpus=4).plans:
        slow, fast = (
            replace(p, machine=Machine(adjust_device(H100, link_gb_s=rate), 8)).step.parts for rate in (1.0, 100.0)
        )
        for name in ("compute", "update"):
            assert slow[name] == fast[name]
        sent = {"tensor": p.case.layout.tensor, "pipeline": p.case.layout.pipeline, "data": p.case.layout.data}
        for name, size in sent.items():
            assert slow[name] > fast[name] if size > 1 else slow[name] == fast[name] == 0


def test_messages_between_nodes_cross_the_slower_link():
    machine = Machine(H100, gpus_per_node=8)
    near, far = Layout("DDP", data=8), Layout("DDP", data=16)
    size = 10**10  # latency is small beside it
    inside = machine.message_s("all_reduce", size, near, "data")
    assert inside == pytest.approx(2 * 7 / 8 * size / (0.8 * 450e9), rel=0.01)
    across = machine.message_s("all_reduce", size, far, "data")
    assert across == pytest.approx(2 * 15 / 16 * size / (0.8 * 8 * 50e9), rel=0.01)
    pairs = Layout("ThreeD", tensor=8, data=2)  # each rank's only partner stands in the other node
    assert machine.message_s("all_reduce", size, pairs, "data") == pytest.approx(size / (0.8 * 50e9), rel=0.01)
    assert machine.message_s("all_reduce", size, pairs, "tensor") == pytest.approx(inside, rel=0.01)


def test_parts_make_up_the_whole():
    table = plan("train.global_batch_size=64", gpus=4)
    assert table.unit[0] == "MiB"
    for p in table.plans:
        assert sum(p.peak.parts().values()) == p.peak.total and set(p.peak.parts()) == set(PARTS)
        assert set(p.step.parts) == set(TIMES) and min(p.step.parts.values()) >= 0
        cells = list_cells(p, table.unit)
        assert float(cells["MiB a rank"]) == pytest.approx(sum(float(cells[part]) for part in PARTS), abs=0.05)


# what is said


def test_the_report_says_what_is_best_and_what_was_assumed():
    table = plan("train.global_batch_size=256", "train.precision=bf16", gpus=64, memory_gib=80.0)
    text = write_report(table)
    assert text.startswith(
        "molbart mini: 1,523,467 parameters, 256 samples a step of 128 tokens a side, bf16\n64 x h100"
    )
    for words in (
        "Best: ",
        "The next, ",
        "Run it with: strategy=",
        "Messages of the fullest rank in a step (count: MB in all); bubble (1F1B)",
        "989.4 TFLOP/s in bf16",
        "50% of the rate in matrix products",
        "4 GiB a GPU are left",
        "have not been measured",
    ):
        assert words in text
    assert len(write_report(table, 0)) > len(text) and str(table) == text
    heads = text.splitlines()[3].split()
    assert set(PARTS) | set(TIMES) <= set(heads)


def test_layouts_that_are_too_large_say_which_part():
    overrides = ["model.preset=large", "train.global_batch_size=64", "train.micro_batch_size=1"]
    text = str(plan(*overrides, memory_gib=7.0))
    assert "  DDP x dp8: " in text and "of them gradients" in text  # in DDP's buckets, and gathered beside them


def test_where_nothing_fits_the_least_need_is_said_and_what_would_help():
    with pytest.raises(ConfigError) as caught:
        plan("model.preset=large", "train.global_batch_size=8", "train.micro_batch_size=2", gpus=2, memory_gib=4.9)
    error = caught.value
    assert "no layout fits into 0.9 GiB a rank" in error.found and "micro-batches of 1, needs" in error.found
    assert error.do.startswith("What would help: GPUs of 6 GiB; or ") and " GPUs (" in error.do


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpus": 12}, r"12 GPUs: they do not fill nodes of 8\. Give a multiple, e\.g\. 16"),
        ({"gpus": 0}, r"0 GPUs, 8 a node: there must be one"),
        (
            {"gpus": 13, "gpus_per_node": 13},
            r"none is possible: train\.global_batch_size=32, 13 data ranks do not divide",
        ),
        ({"length": 200}, r"sequences of 200 tokens: the model has positions for data\.max_length=128"),
        ({"memory_gib": 3.0}, r"GPU memory 3 GiB: 4 GiB of it are left"),
    ],
)
def test_impossible_numbers_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        plan(**options)


def test_devices_that_are_not_in_the_table_are_named():
    with pytest.raises(ConfigError, match=r"device b9000: .*Valid: v100, a100, h100, h200, cpu"):
        find_device("b9000")
    with pytest.raises(ConfigError, match="it is no size"):
        adjust_device(H100, link_gb_s=-1.0)
    for keys in ({"vocab_size": -3}, {"memory_gib": math.nan}, {"reserve_gib": math.nan}, {"memory_gib": -1.0}):
        with pytest.raises(ConfigError, match=r"below 0|no size"):
            plan_run(load_config("molbart_mini"), 2, H100, **keys)
    own = adjust_device(DEVICES["a100"], tflops=400.0)
    assert (
        own.tflops == {"fp32": 400.0, "fp16": 400.0, "bf16": 400.0} and own.memory_gb_s == DEVICES["a100"].memory_gb_s
    )


# the command


def run_command(*words):
    parser = argparse.ArgumentParser()
    plan_command.add_parser(parser.add_subparsers())
    options = parser.parse_args(["plan", *words])
    return options.run(options)


def test_the_command_prints_the_plan_and_draws_it(tmp_path, capsys):
    picture = tmp_path / "plan.png"
    words = ["molbart_mini", "train.global_batch_size=64", "--gpus", "4", "--device", "cpu", "--gpu-memory", "2"]
    assert run_command(*words, "--link", "5", "--picture", str(picture), "--all") == 0
    text = capsys.readouterr().out
    assert text.startswith("molbart mini: ") and "links 5 GB/s in a node" in text
    assert picture.read_bytes().startswith(b"\x89PNG") and f"picture: {picture}" in text


def test_the_command_names_its_flags():
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()
    plan_command.add_parser(commands)
    flags = {flag for action in commands.choices["plan"]._actions for flag in action.option_strings}
    assert {*plan_command.SWITCHES, *plan_command.WITH_VALUE} == flags - {"-h", "--help"}


def test_no_engine_is_imported_and_no_group_made():
    code = (
        "import sys, torch.distributed as dist; from biokit.config import load_config\n"
        "from biokit.planning.plans import plan_run; from biokit.planning.devices import find_device\n"
        "import torch; state = torch.get_rng_state()\n"
        "str(plan_run(load_config('molbart_mini', ['model.num_layers=1']), 4, find_device('h100')))\n"
        "print(*(name for name in ('megatron', 'deepspeed') if name in sys.modules), dist.is_initialized(),\n"
        "      torch.equal(state, torch.get_rng_state()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_a_plan_reads_the_engine_settings_of_the_user(tmp_path):
    path = tmp_path / "ds_config.json"
    path.write_text('{"zero_optimization": {"overlap_comm": false, "reduce_bucket_size": 1000}}')
    job = make_job("cuda")
    case = Case(Layout("Zero2", data=2), 4, 4, False)
    assert job.rank_shape(case, 0).overlap and job.rank_shape(case, 0).bucket == job.num_parameters
    parallel = replace(job.config.parallel, deepspeed_config=str(path))
    own = Job(replace(job.config, parallel=parallel), VOCAB_SIZE, "cuda").rank_shape(case, 0)
    assert not own.overlap and own.bucket == 1000
