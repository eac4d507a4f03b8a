"""The comparison of layouts: words, refusals before anything starts, and one real check."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from biokit.config import RunConfig, config_from_dict, config_to_dict
from biokit.errors import ConfigError, RunError
from biokit.launch import check_parallel as module
from biokit.launch.check_parallel import check_parallel, parse_layout
from biokit.launch.failed_run import RunFailed
from biokit.runs import MetricsWriter, RunFolder
from tests.small_run import small_config


@pytest.mark.parametrize(
    ("word", "strategy", "tensor", "data", "pipeline"),
    [
        ("1", "Single", 1, 1, 1),
        ("dp2", "DDP", 1, 2, 1),
        ("tp2", "ThreeD", 2, 1, 1),
        ("pp3", "Pipeline", 1, 1, 3),
        ("dp2xpp2", "Pipeline", 1, 2, 2),
        ("tp2xpp2", "ThreeD", 2, 1, 2),
        ("pp2xtp2xdp4", "ThreeD", 2, 4, 2),
        ("Zero2:dp2", "Zero2", 1, 2, 1),
        ("ThreeD:dp2", "ThreeD", 1, 2, 1),
    ],
)
def test_words(word: str, strategy: str, tensor: int, data: int, pipeline: int) -> None:
    found = parse_layout(word)
    assert (found.strategy, found.tensor, found.data, found.pipeline) == (strategy, tensor, data, pipeline)


@pytest.mark.parametrize(
    "word", ["", "2", "dp", "dp0", "dp2x", "xdp2", "dp2xdp2", "dp2 tp2", "Zero2", "DP2", "dp2;ls", "dp²"]
)
def test_words_that_are_none(word: str) -> None:
    with pytest.raises(ConfigError, match="not of that form"):
        parse_layout(word)


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[RunConfig, int]]:
    """Trainings that would be started; each leaves the losses of the configuration's `lr`, plus a little for ThreeD."""
    runs: list[tuple[RunConfig, int]] = []

    class Done:
        alive = False

        def __init__(self, folder: RunFolder) -> None:
            self.folder = folder

        def metrics(self) -> list[dict[str, Any]]:
            return self.folder.read_metrics()

        def raise_on_failure(self) -> None:
            if not self.folder.read_metrics():
                raise RunFailed("run", "it failed", "Look")

    def start(config: RunConfig, num_processes: int, timeout_s: float) -> Done:
        runs.append((config, num_processes))
        folder = RunFolder(config.run_dir)
        folder.create()
        layout = {"strategy": config.strategy, "world_size": num_processes, "tensor": 1, "data": num_processes}
        folder.write_manifest({"layout": {**layout, "pipeline": 1}})
        writer = MetricsWriter(folder)
        for step in range(1, config.train.train_iters + 1):
            extra = config.train.weight_decay if config.strategy == "ThreeD" else 0.0
            loss = math.nan if extra == 9.0 else 6.0 / step + extra
            if math.isfinite(loss):
                writer.write({"step": step, "loss": loss, "num_tokens": 10, "tokens_per_s": 10.0})
        writer.close()
        return Done(folder)

    monkeypatch.setattr(module, "start_training", start)
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))
    return runs


def test_each_layout_trains_the_same_configuration_on_one_store(tmp_path: Path, started: list[Any]) -> None:
    config = small_config(tmp_path, precision="bf16", eval_interval=1, keep_best=1, early_stopping_patience=1)
    check = check_parallel(config, ["1", "dp2", "tp2", "Zero2:dp2"], 3)
    assert check.within and [row.name for row in check.table.rows] == ["dp2", "tp2", "Zero2:dp2"]
    assert [(one.strategy, number) for one, number in started] == [
        ("Single", 1),
        ("DDP", 2),
        ("ThreeD", 2),
        ("Zero2", 2),
    ]
    trees = []
    for one, _ in started:
        tree = config_to_dict(config_from_dict(config_to_dict(one)))  # it must be one that a file could hold
        trees.append({key: value for key, value in tree.items() if key not in ("run_dir", "strategy", "parallel")})
        assert (one.model.dropout, one.train.precision, one.train.train_iters) == (0.0, "fp32", 3)
    assert all(tree == trees[0] for tree in trees)
    assert not Path(started[0][0].run_dir).parent.exists(), "the scratch is removed"
    words = repr(check)
    assert "model.dropout=0.1 is 0 here" in words and "train.precision=bf16 is fp32 here" in words
    bundle = check._repr_mimebundle_()
    assert set(bundle) == {"text/html", "image/png", "text/plain"} and "<table>" in bundle["text/html"]
    json.dumps(bundle)


def test_dropout_stays_where_no_layer_is_cut(tmp_path: Path, started: list[Any]) -> None:
    check_parallel(small_config(tmp_path), ["1", "dp2"], 2)
    assert {one.model.dropout for one, _ in started} == {0.1}


def test_a_store_that_is_there_is_used(tmp_path: Path, started: list[Any]) -> None:
    config = small_config(tmp_path)
    (Path(config.run_dir) / "data").mkdir(parents=True)
    check_parallel(config, ["1", "dp2"], 2)
    assert {one.data.store_dir for one, _ in started} == {str(Path(config.run_dir) / "data")}


def test_a_curve_outside_the_bound_is_an_error_that_names_it(tmp_path: Path, started: list[Any]) -> None:
    check = check_parallel(small_config(tmp_path, weight_decay=1e-3), ["1", "dp2", "tp2"], 3)
    assert not check.within
    with pytest.raises(RunError, match=r"losses of Single: other layouts differ: tp2 by 1\.0e-03 at step"):
        check.raise_if_outside()


def test_a_run_that_fails_leaves_its_folder(tmp_path: Path, started: list[Any]) -> None:
    with pytest.raises(RunFailed):
        check_parallel(small_config(tmp_path, weight_decay=9.0), ["tp2", "1"], 3)
    assert len(started) == 1 and Path(started[0][0].run_dir).is_dir()


def test_all_impossible_layouts_are_named_and_nothing_starts(tmp_path: Path, started: list[Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        check_parallel(small_config(tmp_path), ["1", "dp3", "tp3", "Zero2:pp2", "DDP:tp2"])
    words = str(caught.value)
    assert words.startswith("4 of 5 layouts: they cannot be: dp3: ") and words.endswith("Nothing was started.")
    assert all(name in words for name in ("tp3: tp=3", "Zero2:pp2: strategy=Zero2", "DDP:tp2: strategy=DDP"))
    assert not started


@pytest.mark.parametrize(
    ("words", "found"), [(["1"], "there is 1"), (["1", "dp2", "1"], "1 is named twice"), (["x", "y"], '"x".*"y"')]
)
def test_words_that_make_no_comparison(tmp_path: Path, started: list[Any], words: list[str], found: str) -> None:
    with pytest.raises(ConfigError, match=found):
        check_parallel(small_config(tmp_path), words)
    assert not started


def test_options_of_other_strategies_are_left_out(tmp_path: Path, started: list[Any]) -> None:
    config = small_config(tmp_path, checkpoint_activations=True)
    config = replace(
        config, parallel=replace(config.parallel, partition_activations=True, pipeline_model_parallel_size=2)
    )
    check_parallel(config, ["dp2", "tp2", "pp2"], 2)
    assert [one.parallel.partition_activations for one, _ in started] == [False, True, False]
    assert [one.parallel.pipeline_model_parallel_size for one, _ in started] == [0, 1, 2]
