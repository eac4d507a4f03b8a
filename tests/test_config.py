"""Configuration: what is read, what is refused, and how the refusal reads."""

import pytest
import yaml

from biokit.config import (
    config_from_dict,
    config_hash,
    config_to_dict,
    config_to_yaml,
    load_config,
    packaged_configs,
    parse_override,
    valid_keys,
)
from biokit.errors import ConfigError


def test_yaml_round_trip():
    config = config_from_dict(
        {"train": {"lr": "1e-3", "train_iters": 5}, "data": {"dataset": {"train": "x[000..003]"}}}
    )
    assert config.train.lr == 1e-3
    assert config_from_dict(yaml.safe_load(config_to_yaml(config))) == config


@pytest.mark.parametrize("name", packaged_configs())
def test_packaged_configs_load(name):
    assert load_config(name).train.train_iters > 0


def test_seed_is_1234_by_default():
    assert config_from_dict({}).seed == 1234


def test_overrides_and_bionemo_forms():
    config = load_config(
        "molbart_mini", ["++do_training=False", "train.lr=3e-4", "model.data.dataset.train=x_OP_000..099_CL_"]
    )
    assert (config.do_training, config.train.lr, config.data.dataset.train) == (False, 3e-4, "x_OP_000..099_CL_")


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"train": {"leraning_rate": 1}}, ['unknown key "train.leraning_rate"', "Did you mean"]),
        ({"train": {"learning_rate": 1}}, ['"train.lr"']),
        ({"trian": {}}, ['unknown key "trian"']),
        ({"train": {"train_iters": "many"}}, ["train.train_iters is 'many' (str)", "Give an int"]),
        ({"train": {"train_iters": True}}, ["train.train_iters is True (bool)"]),
        ({"train": {"train_iters": 0}}, ["train.train_iters is 0", "Valid: 1"]),
        ({"train": {"lr": float("inf")}}, ["train.lr"]),
        ({"train": {"lr": float("nan")}}, ["train.lr is nan"]),
        ({"train": {"lr": 1e-4, "min_lr": 1e-3}}, ["min_lr=0.001 exceeds"]),
        ({"train": {"micro_batch_size": 5, "global_batch_size": 32}}, ["does not divide", "1, 2, 4, 8, 16, 32"]),
        ({"train": {"precision": "fp8"}}, ["Valid: fp32, bf16, fp16"]),
        ({"train": 3}, ["train is 3", "group of keys"]),
        ({"data": {"max_tokens": 10, "max_length": 20}}, ["max_tokens=10 is less than"]),
        ({"model": {"data": 3}}, ["data or model.data is not a group"]),
        ({"data": 3, "model": {"data": {"task": "aug"}}}, ["data or model.data is not a group"]),
        (
            {"data": {"task": "mask"}, "model": {"data": {"task": "aug"}}},
            ["data.task is 'mask' and model.data.task is 'aug'"],
        ),
        ({"train": {"early_stopping_patience": 3}}, ["eval_interval=0"]),
        ({"train": {"weight_decay": float("inf")}}, ["train.weight_decay is inf"]),
        ({"data": {"span_lambda": 0}}, ["span_lambda=0"]),
    ],
)
def test_refused(tree, words):
    with pytest.raises(ConfigError) as caught:
        config_from_dict(tree)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("text", ["train.lr", "=3", "train.lr={", ""])
def test_bad_overrides(text):
    with pytest.raises(ConfigError):
        parse_override(text)


def test_text_keys_are_taken_as_they_stand():
    texts = ["run_dir=007", "data.dataset_path=2024-01-01", "data.vocab_file=12_3", "data.dataset.train=x[00..09]"]
    config = load_config("molbart_mini", texts)
    found = (config.run_dir, config.data.dataset_path, config.data.vocab_file, config.data.dataset.train)
    assert found == ("007", "2024-01-01", "12_3", "x[00..09]")


def test_the_last_override_counts_under_either_name():
    assert load_config("molbart_mini", ["model.data.pool=7", "data.pool=5"]).data.pool == 5
    assert load_config("molbart_mini", ["data.pool=5", "model.data.pool=7"]).data.pool == 7


def test_a_group_cannot_be_overridden_whole():
    with pytest.raises(ConfigError, match="group of keys"):
        load_config("molbart_mini", ["train={lr: 1}"])


def test_override_below_a_value_is_refused():
    with pytest.raises(ConfigError, match="seed"):
        load_config("molbart_mini", ["seed.x=3"])


def test_unreadable_files(tmp_path):
    bad = tmp_path / "bad.yaml"
    for text in ("a: [", "- 1", "\x00"):
        bad.write_text(text)
        with pytest.raises(ConfigError):
            load_config(bad)
    with pytest.raises(ConfigError, match="molbart_mini"):
        load_config(tmp_path / "none.yaml")


def test_hash_ignores_only_where_the_run_lives():
    base = config_from_dict({})
    assert config_hash(base) == config_hash(config_from_dict({"run_dir": "elsewhere"}))
    assert config_hash(base) != config_hash(config_from_dict({"seed": 1}))


def test_valid_keys_are_those_of_the_tree():
    flat = []

    def walk(tree, prefix=""):
        for key, value in tree.items():
            walk(value, f"{prefix}{key}.") if isinstance(value, dict) else flat.append(prefix + key)

    walk(config_to_dict(config_from_dict({})))
    assert flat == valid_keys()
