"""Flags of the source systems: what they set, what they may not set, and how they mix with key=value."""

import pytest

from biokit.__main__ import main
from biokit.config import load_config, valid_keys
from biokit.errors import ConfigError
from biokit.flags import ALIASES, IGNORED, REFUSED, SWITCHES, find_key, read_flags


def plain(*words: str) -> list[str]:
    return read_flags(words)[1]


def refusal(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read_flags(words)
    return str(caught.value)


@pytest.mark.parametrize(
    ("words", "override"),
    [
        (["--num-layers", "2"], "model.num_layers=2"),
        (["--num_layers", "2"], "model.num_layers=2"),
        (["--num-layers=2"], "model.num_layers=2"),
        (["--hidden-size", "64"], "model.hidden_size=64"),
        (["--train-iters", "5"], "train.train_iters=5"),
        (["--tensor_model_parallel_size", "2"], "parallel.tensor_model_parallel_size=2"),
        (["--train.lr", "1e-3"], "train.lr=1e-3"),
        (["--strategy", "ThreeD"], "strategy=ThreeD"),
        (["--checkpoint-activations"], "train.checkpoint_activations=True"),
        (["--checkpoint-activations", "false"], "train.checkpoint_activations=false"),
        (["--checkpoint-activations=no"], "train.checkpoint_activations=no"),
        (["--mp_size", "2"], "parallel.tensor_model_parallel_size=2"),
        (["--model-parallel-size", "2"], "parallel.tensor_model_parallel_size=2"),
        (["--pp_size=2"], "parallel.pipeline_model_parallel_size=2"),
        (["--save", "runs/a b=c"], "run_dir=runs/a b=c"),
        (["--load", "runs/x"], "load=runs/x"),
        (["--batch-size", "8"], "train.micro_batch_size=8"),
        (["--fp16"], "train.precision=fp16"),
        (["--lr", "-1"], "train.lr=-1"),
    ],
)
def test_a_flag_sets_its_key(words: list[str], override: str) -> None:
    assert plain("molbart_mini", *words) == ["molbart_mini", override]
    assert plain(*words, "molbart_mini") == ["molbart_mini", override]


def test_flags_and_overrides_mix_in_any_order() -> None:
    words = ["train.lr=1e-4", "--checkpoint-activations", "molbart_mini", "--dry-run", "--num-layers", "2", "++seed=7"]
    own, found, notes = read_flags(words, ["--dry-run"])
    assert own == ["--dry-run"]
    assert found == [
        "molbart_mini", "train.lr=1e-4", "train.checkpoint_activations=True", "model.num_layers=2", "++seed=7",
    ]  # fmt: skip
    assert notes == []
    config = load_config(found[0], found[1:])
    assert (config.train.lr, config.model.num_layers, config.seed) == (1e-4, 2, 7)
    assert config.train.checkpoint_activations is True


def test_every_key_has_a_flag_and_every_alias_a_key() -> None:
    for key in valid_keys():
        assert find_key(f"--{key.rsplit('.', 1)[-1].replace('_', '-')}", valid_keys()) == key
    leaves = {key.rsplit(".", 1)[-1] for key in valid_keys()}
    tables = [set(ALIASES), set(SWITCHES), set(IGNORED), set(REFUSED)]
    assert set(ALIASES.values()) <= set(valid_keys())
    assert sum(map(len, tables)) == len(set.union(*tables))
    assert not leaves & set.union(*tables)


def test_launchers_flags_are_ignored_with_a_line() -> None:
    for words in (["--local_rank=3"], ["--local-rank", "3"], ["--local_rank", "3"], ["--use_env"], ["--use-env"]):
        _, found, notes = read_flags([*words, "molbart_mini", "seed=2"])
        assert found == ["molbart_mini", "seed=2"]
        assert len(notes) == 1 and notes[0].startswith(f"{words[0].partition('=')[0]} is ignored: ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-layer", "2"], "flag --num-layer: no key has that name. Did you mean --num-layers"),
        (["--quux", "2"], "See biokit train --help, or write key=value."),
        (["--num-layers"], "flag --num-layers: it has no value. Write --num-layers VALUE."),
        (["--num-layers", "--seed", "2"], "it has no value"),
        (["--local_rank"], "it has no value"),
        (["--gas", "16"], "Set train.global_batch_size = micro batch x accumulation x data-parallel size."),
        (["--zero-stage", "1"], "Set --strategy Zero1, Zero2 or Zero3."),
        (["--mp_size", "2", "--tp-size", "4"],
         "flag --tp-size 4: --mp_size has set parallel.tensor_model_parallel_size to 2. Give one of the two."),
        (["--fp16", "--bf16"], "flag --bf16 bf16: --fp16 has set train.precision to fp16"),
    ],
)  # fmt: skip
def test_refusals(words: list[str], message: str) -> None:
    assert message in refusal("molbart_mini", *words)


def test_a_later_flag_of_the_same_name_wins() -> None:
    found = plain("molbart_mini", "--lr", "1e-4", "--lr", "1e-3")
    assert load_config(found[0], found[1:]).train.lr == 1e-3


def test_an_ambiguous_name_names_its_keys() -> None:
    with pytest.raises(ConfigError, match=r"2 keys have that name\. Write one of: a\.depth, b\.depth"):
        find_key("--depth", ["a.depth", "b.depth"])


def test_on_the_command_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["train", "--num-layer", "2", "molbart_mini"]) == 2
    assert capsys.readouterr().err.startswith("biokit: flag --num-layer: ")
    assert main(["preprocess", "--use_env", "molbart_mini", "--data-path", "none.csv", "--save", "/dev/null/x"]) == 2
    error = capsys.readouterr().err
    assert "biokit: --use_env is ignored: " in error and "/dev/null/x" in error
    monkeypatch.setenv("RANK", "1")
    assert main(["train", "--use_env", "none"]) == 2
    assert "ignored" not in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "preprocess", "launch"])
def test_help_explains_the_flags(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--num-layers", "2", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "CONFIG" in text and "--mp-size: parallel.tensor_model_parallel_size" in text
