"""Training as several processes: the curve of one, one writer of the run folder, and any layout goes on from any."""

from __future__ import annotations

import os
import shutil
import signal
import time
from typing import Any

import pytest

from biokit.checkpoint import load_checkpoint, newest_checkpoint
from biokit.config import config_from_dict, config_to_dict
from biokit.errors import BiokitError, ConfigError
from biokit.exchange.layers import split_layers
from biokit.layouts import find_layout
from biokit.parallel.single import Single
from biokit.runs import RunFolder
from biokit.train import train
from biokit.trainer import Trainer
from tests.distributed import RanksFailed, ranks
from tests.small_run import small_config

LOSS_BOUND = 4e-6  # 8 ulp of a loss between 4 and 8 (2^-21 each): its terms are summed in another order


def run_training(tree: dict[str, Any]) -> dict[str, Any]:
    return train(config_from_dict(tree))


def run_and_stop(tree: dict[str, Any], rank_that_is_asked: int) -> dict[str, Any]:
    """One rank alone gets a SIGTERM, in its third step."""
    own = int(os.environ["RANK"]) == rank_that_is_asked
    steps: list[int] = []
    whole = Trainer._train_step

    def counted(self: Trainer, batches: Any) -> dict[str, Any]:
        steps.append(1)
        if own and len(steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(self, batches)

    Trainer._train_step = counted  # type: ignore[method-assign]
    try:
        return train(config_from_dict(tree))
    finally:
        Trainer._train_step = whole  # type: ignore[method-assign]


def run_with_a_slow_rank(tree: dict[str, Any], slow: int, burnt_s: float) -> dict[str, Any]:
    """Rank `slow` computes so much longer in each step; the others wait for it."""
    whole = Single._backward

    def burn(self: Single, *args: Any) -> Any:
        end = time.thread_time() + burnt_s
        while self.processes.rank == slow and time.thread_time() < end:
            pass
        return whole(self, *args)

    Single._backward = burn  # type: ignore[method-assign]
    try:
        return train(config_from_dict(tree))
    finally:
        Single._backward = whole  # type: ignore[method-assign]


def run_twice(first: dict[str, Any], second: dict[str, Any]) -> list[dict[str, Any]]:
    """As a script that tries two settings."""
    return [run_training(first), run_training(second)]


def tree(config: Any, **keys: Any) -> dict[str, Any]:
    made = config_to_dict(config)
    for key, value in keys.items():
        group, _, leaf = key.rpartition("__")
        (made[group] if group else made)[leaf] = value
    return made


def losses(run_dir: Any, rank: int = 0) -> list[float]:
    return [line["loss"] for line in RunFolder(run_dir).read_metrics(rank)]


def near(found: list[float], expected: list[float]) -> bool:
    return len(found) == len(expected) and all(abs(a - b) <= LOSS_BOUND for a, b in zip(found, expected, strict=True))


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    config = small_config(folder, "single", save_interval=2)
    train(config)
    return folder, config


def test_two_processes_draw_the_curve_of_one(single, tmp_path):
    _folder, config = single
    manifests = ranks(2).run(run_training, tree(config, run_dir=str(tmp_path / "ddp"), strategy="DDP"))
    expected = losses(config.run_dir)
    assert near(losses(tmp_path / "ddp"), expected) and losses(tmp_path / "ddp", 1) == losses(tmp_path / "ddp")
    assert manifests[0]["status"] == "finished" and manifests[1] == {}
    assert manifests[0]["layout"] == {"strategy": "DDP", "world_size": 2, "tensor": 1, "data": 2, "pipeline": 1}
    assert manifests[0]["num_parameters"] == RunFolder(config.run_dir).read_manifest()["num_parameters"]


def test_token_budgets_leave_some_ranks_without_rows(single, tmp_path):
    _folder, config = single
    budget = {"data__max_tokens": 60, "train__micro_batch_size": 2, "train__eval_interval": 3}
    train(config_from_dict(tree(config, run_dir=str(tmp_path / "one"), **budget)))
    ranks(2).run(run_training, tree(config, run_dir=str(tmp_path / "two"), strategy="DDP", **budget))
    assert near(losses(tmp_path / "two"), losses(tmp_path / "one"))
    one, two = (RunFolder(tmp_path / name).read_metrics() for name in ("one", "two"))
    for first, second in zip(one, two, strict=True):
        assert (first["num_tokens"], first["token_accuracy"]) == (second["num_tokens"], second["token_accuracy"])
        assert first.get("val_loss") == pytest.approx(second.get("val_loss"), abs=LOSS_BOUND)


def test_each_rank_tells_its_own_share_of_a_step(single, tmp_path):
    """Waiting for a slow rank is not part of it, though their steps take equally long."""
    slow, burnt_s = 1, 0.1
    asked = tree(single[1], run_dir=str(tmp_path / "run"), strategy="DDP", train__train_iters=3)
    ranks(2).run(run_with_a_slow_rank, asked, slow, burnt_s)
    quick, late = (RunFolder(tmp_path / "run").read_metrics(rank) for rank in (0, 1))
    for one, other in zip(quick[1:], late[1:], strict=True):
        seconds = one["num_tokens"] / one["tokens_per_s"]
        assert one["step_s"] + 0.8 * burnt_s < other["step_s"] and burnt_s < seconds
        assert one["memory_bytes"] > 2**26 and one["memory_bytes"] != other["memory_bytes"]


def test_a_run_goes_on_under_another_layout(single, tmp_path):
    _folder, config = single
    begun = tree(config, run_dir=str(tmp_path / "run"), strategy="DDP", train__train_iters=6)
    ranks(2).run(run_and_stop, begun, 1)
    run = RunFolder(tmp_path / "run")
    assert run.read_manifest()["status"] == "stopped" and run.checkpoint_steps()[-1] == 3
    train(config_from_dict(tree(config, run_dir=str(tmp_path / "run"))))
    assert near(losses(tmp_path / "run"), losses(config.run_dir))
    assert run.read_manifest()["resumed_from"] == 3


def test_another_run_goes_on_from_its_checkpoint(single, tmp_path):
    _folder, config = single
    source = RunFolder(config.run_dir).checkpoint_dir(4)
    shorter = tree(config, run_dir=str(tmp_path / "shorter"))
    shutil.copytree(source, RunFolder(tmp_path / "shorter").checkpoint_dir(4))
    for name, load in (("by_step", source), ("by_run", shorter["run_dir"])):
        ranks(2).run(run_training, tree(config, run_dir=str(tmp_path / name), strategy="DDP", load=str(load)))
        assert near(losses(tmp_path / name), losses(config.run_dir)[4:])
    with pytest.raises(BiokitError, match=r"at the end: train\.train_iters=6\. Raise"):
        train(config_from_dict(tree(config, run_dir=str(tmp_path / "none"), load=config.run_dir)))
    with pytest.raises(BiokitError, match="there is no such folder"):
        train(config_from_dict(tree(config, run_dir=str(tmp_path / "none"), load=str(tmp_path / "nothing"))))
    with pytest.raises(BiokitError, match="neither a checkpoint nor a run"):
        train(config_from_dict(tree(config, run_dir=str(tmp_path / "none"), load=str(tmp_path))))


def test_checkpoints_of_one_and_two_processes_hold_the_same_tensors(single, tmp_path):
    _folder, config = single
    ranks(2).run(run_training, tree(config, run_dir=str(tmp_path / "ddp"), strategy="DDP"))
    one, two = (load_checkpoint(newest_checkpoint(RunFolder(path))) for path in (config.run_dir, tmp_path / "ddp"))
    for first, second in ((one.model, two.model), (one.optimizer, two.optimizer)):
        assert {n: (t.shape, t.dtype) for n, t in first.forms().items()} == {
            n: (t.shape, t.dtype) for n, t in second.forms().items()
        }
        # six AdamW steps of at most lr each; of the rounding that a step leaves, lr times a few ulp remains
        assert max(float((first[name] - second[name]).abs().max()) for name in first) < 1e-5
    assert [one.state[key] for key in ("step", "position")] == [two.state[key] for key in ("step", "position")]


def test_a_failing_main_process_ends_the_others(single, tmp_path):
    _folder, config = single
    with pytest.raises(RanksFailed) as failed:
        ranks(2).run(
            run_training,
            tree(config, run_dir=str(tmp_path / "bad"), strategy="DDP", data__dataset_path=str(tmp_path / "no.csv")),
        )
    assert "no.csv" in str(failed.value.errors[0]) and "rank 0" in str(failed.value.errors[1])


def test_a_run_starts_from_layer_files(single, tmp_path):
    config = single[1]
    split_layers(RunFolder(config.run_dir).checkpoint_dir(4), tmp_path / "layers")
    fresh = {"load": str(tmp_path / "layers"), "train__train_iters": 2}
    train(config_from_dict(tree(config, run_dir=str(tmp_path / "one"), **fresh)))
    ranks(2).run(run_training, tree(config, run_dir=str(tmp_path / "two"), strategy="Pipeline", **fresh))
    assert near(losses(tmp_path / "two"), losses(tmp_path / "one"))
    assert (
        losses(tmp_path / "one")[0] < losses(config.run_dir)[0] - 0.1
    )  # the first batch, after four steps of training
    other = tree(config, run_dir=str(tmp_path / "four"), model__num_attention_heads=2, **fresh)
    with pytest.raises(BiokitError, match="num_attention_heads"):  # the shapes fit
        train(config_from_dict(other))
    (tmp_path / "layers" / "model.layers.1.safetensors").unlink()
    with pytest.raises(BiokitError, match=r"model\.layers\.1"):
        train(config_from_dict(tree(config, run_dir=str(tmp_path / "three"), **fresh)))
    train(config_from_dict(tree(config, run_dir=str(tmp_path / "one"), load=fresh["load"], train__train_iters=3)))


def test_two_trainings_in_one_launch(single, tmp_path):
    config = single[1]
    trees = [tree(config, run_dir=str(tmp_path / name), strategy="DDP", train__train_iters=2) for name in "ab"]
    manifests = ranks(2).run(run_twice, *trees)[0]
    assert [manifest["status"] for manifest in manifests] == ["finished", "finished"]
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_the_best_are_kept_although_later_ones_are_worse(single, tmp_path):
    config = single[1]
    keys = {"train__eval_interval": 1, "train__keep_best": 2, "train__save_interval": 0, "train__lr": 0.05}
    train(config_from_dict(tree(config, run_dir=str(tmp_path / "run"), **keys)))
    run = RunFolder(tmp_path / "run")
    values = {line["step"]: line["val_loss"] for line in run.read_metrics()}
    best = sorted(values, key=lambda step: (values[step], -step))[:2]
    assert run.checkpoint_steps() == sorted({*best, 6})
    with pytest.raises(ConfigError, match="no molecule would be decoded"):
        train(
            config_from_dict(tree(config, run_dir=str(tmp_path / "none"), **keys, train__best_metric="val_exact_match"))
        )


def test_a_run_killed_while_its_data_were_made_starts_again(single, tmp_path):
    config = single[1]
    (tmp_path / "run" / ".data.partial").mkdir(parents=True)
    (tmp_path / "run" / ".data.partial" / "train.bin").write_bytes(b"half")
    train(config_from_dict(tree(config, run_dir=str(tmp_path / "run"), train__train_iters=1)))
    assert not (tmp_path / "run" / ".data.partial").exists()


def test_single_to_three_d_and_back(single, tmp_path):
    config = single[1]
    sizes = {"parallel__tensor_model_parallel_size": 2, "parallel__pipeline_model_parallel_size": 2}
    whole = tree(config, run_dir=str(tmp_path / "run"), model__dropout=0.0, train__eval_interval=2)
    for steps, strategy in ((2, "Single"), (4, "ThreeD"), (6, "Single")):
        made = {
            **whole,
            "strategy": strategy,
            "train": {**whole["train"], "train_iters": steps, "lr_schedule": "constant"},
        }
        if strategy == "ThreeD":
            made["parallel"] = {**whole["parallel"], **{key.rpartition("__")[2]: n for key, n in sizes.items()}}
            ranks(4).run(run_training, made)
        else:
            train(config_from_dict(made))
    expected = {**whole, "train": {**whole["train"], "lr_schedule": "constant"}, "run_dir": str(tmp_path / "constant")}
    train(config_from_dict(expected))
    assert near(losses(tmp_path / "run"), losses(tmp_path / "constant"))
    layouts = [
        load_checkpoint(RunFolder(tmp_path / "run").checkpoint_dir(step)).manifest["layout"]["strategy"]
        for step in (2, 4, 6)
    ]
    assert layouts == ["Single", "ThreeD", "Single"]


@pytest.mark.parametrize(
    ("keys", "processes", "words"),
    [
        ({"strategy": "Single"}, 2, "2 processes are started"),
        ({"strategy": "ThreeD", "parallel__tensor_model_parallel_size": 3}, 3, "Valid: 1, 2, 4"),
        ({"strategy": "Zero2", "parallel__pipeline_model_parallel_size": 2}, 2, "ZeRO-2 and ZeRO-3"),
        ({"strategy": "Pipeline", "parallel__pipeline_model_parallel_size": 8}, 8, "Valid: 1 to 6"),
        ({"strategy": "DDP"}, 3, "does not divide"),
        ({"strategy": "NNScaler"}, 1, "Valid: Single, DDP"),
    ],
)
def test_impossible_layouts_are_refused_before_any_group_exists(single, keys, processes, words):
    config = config_from_dict(tree(single[1], **keys))
    with pytest.raises(ConfigError, match=words):
        find_layout(config, processes)
