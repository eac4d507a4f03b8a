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
        (["--checkpoint-activations", "false"], "train.checkpoint_activations=False"),
        (["--checkpoint-activations", "1"], "train.checkpoint_activations=True"),
        (["--checkpoint-activations=0"], "train.checkpoint_activations=False"),
        (["--checkpoint-activations=no"], "train.checkpoint_activations=False"),
        (["--ifresume", "ON"], "resume=True"),
        (["--mp_size", "2"], "parallel.tensor_model_parallel_size=2"),
        (["--model-parallel-size", "2"], "parallel.tensor_model_parallel_size=2"),
        (["--pp_size=2"], "parallel.pipeline_model_parallel_size=2"),
        (["--save", "runs/a b=c"], "run_dir=runs/a b=c"),
        (["--load", "runs/x"], "load=runs/x"),
        (["--batch-size", "8"], "train.micro_batch_size=8"),
        (["--fp16"], "train.precision=fp16"),
        (["--bf16=True"], "train.precision=bf16"),
        (["--cpu", "yes"], "train.device=cpu"),
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
        (["--save", "a", "run_dir=b"], "run_dir=b: --save has set run_dir to a. Give one of the two."),
        (["++run_dir=b", "--save", "a"], "flag --save a: run_dir has set run_dir to b. Give one of the two."),
        (["data.max_tokens=600", "model.data.max_tokens=700"], "model.data.max_tokens=700: data.max_tokens has set"),
        (["--checkpoint-activations", "maybe"],
         "flag --checkpoint-activations maybe: it takes True or False. Write --checkpoint-activations alone, or with"),
        (["--checkpoint-activations=maybe"], "flag --checkpoint-activations maybe: it takes True or False."),
        (["--checkpoint-activations="], "it takes True or False"),
        (["--bf16", "2"], "flag --bf16 2: it takes True or False."),
        (["--bf16=fp32"], "flag --bf16 fp32: it takes True or False."),
        (["--fp16", "False"],
         "flag --fp16 False: it does not say what to take instead. Leave --fp16 out, or set train.precision=fp32."),
        (["--cpu=0"], "flag --cpu 0: it does not say what to take instead. Leave --cpu out, or set train.device=auto."),
    ],
)  # fmt: skip
def test_refusals(words: list[str], message: str) -> None:
    assert message in refusal("molbart_mini", *words)


def test_a_later_word_of_the_same_name_wins() -> None:
    for words in (["--lr", "1e-4", "--lr", "1e-3"], ["train.lr=1e-4", "++train.lr=1e-3"]):
        found = plain("molbart_mini", *words)
        assert load_config(found[0], found[1:]).train.lr == 1e-3


def test_two_names_may_say_the_same() -> None:
    words = ["--save", "a", "run_dir=a", "--checkpoint-activations", "train.checkpoint_activations=true"]
    assert load_config("molbart_mini", plain(*words)).run_dir == "a"
    assert "has set run_dir to 07" in refusal("--save", "07", "run_dir=7")  # text, not numbers


def test_a_word_behind_a_switch_is_the_configurations_name_where_none_stands_elsewhere() -> None:
    assert plain("--bf16", "tiny.yaml", "seed=2") == ["tiny.yaml", "train.precision=bf16", "seed=2"]
    assert plain("--num-layers", "2", "tiny.yaml") == ["tiny.yaml", "model.num_layers=2"]
    message = "flag --checkpoint-activations maybe: it takes True or False"
    assert message in refusal("--bf16", "tiny.yaml", "--checkpoint-activations", "maybe")
    assert message in refusal("--checkpoint-activations", "maybe", "tiny.yaml")


def test_suggestions_are_written_as_flags() -> None:
    assert "Did you mean --num-layers" in refusal("--num-layerz", "2")
    assert "--model." not in refusal("--num-layerz", "2")
    assert "Did you mean --model.num-layers" in refusal("--model.num-layerz", "2")


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
