"""`reshard`: bitwise from any layout to any other, whole or not at all, and said before it is done."""

import resource
import shutil
import signal

import pytest
import torch

from biokit.checkpoint import load_model
from biokit.errors import BiokitError, CheckpointError, ConfigError
from biokit.exchange.reshard import reshard
from biokit.generate import sample_molecules
from biokit.runs import RunFolder
from biokit.train import train
from tests.small_checkpoint import assert_same, small_checkpoint, small_config
from tests.small_run import small_config as training_config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "run"
    small_checkpoint(folder)
    return folder


def checkpoint_of(run):
    return run / "checkpoints" / "step_00000005"


@pytest.mark.parametrize("layouts", [[(2, 2), (4, 1)], [(1, 6), (2, 3)]])
def test_round_trips_are_bitwise(run, tmp_path, layouts):
    source = run
    for number, (tensor, pipeline) in enumerate(layouts):
        reshard(source, tmp_path / f"m{number}", tensor, pipeline)
        source = tmp_path / f"m{number}"
    reshard(source, tmp_path / "back", format="biokit")
    assert_same(checkpoint_of(run), checkpoint_of(tmp_path / "back"))


@pytest.mark.parametrize("version", [0, 1])
def test_every_order_of_fused_rows_comes_back(run, tmp_path, version):
    reshard(run, tmp_path / "m", 2, 2, version=version)
    reshard(tmp_path / "m", tmp_path / "back", format="biokit")
    assert_same(checkpoint_of(run), checkpoint_of(tmp_path / "back"))


@pytest.mark.parametrize("version", [0, 1])
def test_a_wrong_version_would_show(run, tmp_path, version):
    """The rows really are in another order in the file: the round trip above is not two times nothing."""
    reshard(run, tmp_path / "m", 2, 1, version=version)
    files = (tmp_path / "m").glob("iter_*/mp_rank_*/*.pt")
    for file in files:
        saved = torch.load(file, weights_only=False)
        torch.save({**saved, "checkpoint_version": 3.0}, file)
    reshard(tmp_path / "m", tmp_path / "back", format="biokit")
    with pytest.raises(AssertionError, match=r"qkv|kv"):
        assert_same(checkpoint_of(run), checkpoint_of(tmp_path / "back"))


def test_tied_tables_travel_once(tmp_path):
    small_checkpoint(tmp_path / "run", tie_word_embeddings=True)
    reshard(tmp_path / "run", tmp_path / "m", 2, 3)
    reshard(tmp_path / "m", tmp_path / "back", format="biokit")
    assert_same(checkpoint_of(tmp_path / "run"), checkpoint_of(tmp_path / "back"))


def test_what_comes_back_is_a_model_that_runs(run, tmp_path):
    reshard(run, tmp_path / "m", 2, 1)
    reshard(tmp_path / "m", tmp_path / "back", format="biokit")
    model, tokenizer = load_model(checkpoint_of(tmp_path / "back"))
    assert len(sample_molecules(model, tokenizer, torch.tensor([[2, 272, 3]]), max_length=5)[0]) == 1
    assert (tmp_path / "back" / "config.yaml").is_file()


def test_weights_alone(run, tmp_path):
    plan = reshard(run, tmp_path / "m", 2, optimizer=False)
    assert "weights only" in str(plan)
    assert all("optimizer" not in torch.load(f, weights_only=False) for f in (tmp_path / "m").glob("iter_*/*/*.pt"))
    plan = reshard(tmp_path / "m", tmp_path / "back", format="biokit")
    assert any("weights only" in note for note in plan.notes)
    assert not (tmp_path / "back" / "checkpoints" / "step_00000005" / "optimizer.safetensors").stat().st_size > 100


def test_dry_run_says_what_moves_and_writes_nothing(run, tmp_path):
    plan = reshard(run, tmp_path / "m", 2, 2, dry_run=True)
    assert list(tmp_path.iterdir()) == []
    moves = {move.name: move for move in plan.moves}
    qkv = moves["encoder.0.attention.qkv.weight"]
    assert (qkv.shape, qkv.word, qkv.sources) == ((96, 32), "column", ("model.safetensors",))
    assert qkv.targets == ("mp_rank_00_000[0:48]", "mp_rank_01_000[48:96]")
    assert qkv.num_bytes == 96 * 32 * 4 * 3 + 2 * 4  # weight, two moments, a step on either rank
    assert moves["decoder.1.ffn.down.weight"].targets == ("mp_rank_00_001[:, 0:64]", "mp_rank_01_001[:, 64:128]")
    assert moves["head.norm.weight"].word == "replicated"
    assert moves["head.norm.weight"].num_bytes == 2 * (32 * 4 * 3 + 4)
    assert moves["head.tokens.bias"].targets == ("mp_rank_00_001[0:262]", "mp_rank_01_001[262:523]")
    assert moves["head.tokens.bias"].num_bytes == 524 * 4 * 3 + 2 * 4
    text = str(plan)
    assert "4 files; nothing is written (dry run)" in text
    assert len(text.splitlines()) == 2 + 1 + len(moves) + 1


def test_the_plan_counts_the_bytes_that_are_written(run, tmp_path):
    plan = reshard(run, tmp_path / "m", 4, 2)
    num_bytes = 0
    for file in (tmp_path / "m").glob("iter_*/*/*.pt"):
        saved = torch.load(file, weights_only=False)
        tensors = [*saved["model"].values()]
        tensors += [value for state in saved["optimizer"]["state"].values() for value in state.values()]
        num_bytes += sum(tensor.untyped_storage().nbytes() for tensor in tensors)  # no view saved with its whole
    assert plan.num_bytes == num_bytes
    again = reshard(tmp_path / "m", tmp_path / "n", 2, dry_run=True)
    tokens = next(move for move in again.moves if move.name == "embed.embedding.tokens.weight")
    assert tokens.sources[-1] == "mp_rank_03_000[393:523]"


@pytest.mark.parametrize(
    ("tensor", "pipeline", "words"),
    [
        (3, 1, r"tp=3: it does not divide num_attention_heads=4\. Valid: 1, 2, 4"),
        (1, 7, r"pp=7: the model has 6 layers.*Valid: 1 to 6"),
        (0, 1, "tp=0"),
        (1, -1, "pp=-1"),
    ],
)
def test_impossible_layouts_are_refused(run, tmp_path, tensor, pipeline, words):
    with pytest.raises(ConfigError, match=words):
        reshard(run, tmp_path / "m", tensor, pipeline)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_never_overwritten(run, tmp_path):
    (tmp_path / "m").mkdir()
    with pytest.raises(CheckpointError, match="there already"):
        reshard(run, tmp_path / "m")


@pytest.mark.parametrize("format", ["megatron", "biokit"])
def test_a_full_disk_leaves_nothing_half(run, tmp_path, format):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(BiokitError, match="writ"):
            reshard(run, tmp_path / "m", format=format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    assert list(tmp_path.iterdir()) == []
    reshard(run, tmp_path / "m", format=format)


def test_requests_that_cannot_be_met(run, tmp_path):
    with pytest.raises(ConfigError, match="Valid: megatron, biokit"):
        reshard(run, tmp_path / "m", format="nemo")
    with pytest.raises(ConfigError, match="fits every layout"):
        reshard(run, tmp_path / "m", 2, format="biokit")
    with pytest.raises(CheckpointError, match="Known versions: 0, 1, 2, 3"):
        reshard(run, tmp_path / "m", version=4)
    with pytest.raises(CheckpointError, match="neither a biokit checkpoint"):
        reshard(tmp_path, tmp_path / "m")
    with pytest.raises(ConfigError, match="its own configuration"):
        reshard(run, tmp_path / "m", config=small_config())
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a run with one"):
        reshard(tmp_path / "empty", tmp_path / "m")


def test_an_altered_source_is_found(tmp_path):
    path = small_checkpoint(tmp_path / "run")
    file = path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        reshard(path, tmp_path / "m")


def test_a_run_goes_on_from_a_checkpoint_that_travelled(tmp_path):
    train(training_config(tmp_path, run="straight", train_iters=4))
    train(training_config(tmp_path, run="first", train_iters=4, save_interval=2))
    shutil.rmtree(tmp_path / "first" / "checkpoints" / "step_00000004")
    reshard(tmp_path / "first", tmp_path / "m", 2, 2)
    reshard(tmp_path / "m", tmp_path / "second", format="biokit")
    assert train(training_config(tmp_path, run="second", train_iters=4))["step"] == 4
    losses = [line["loss"] for line in RunFolder(tmp_path / "second").read_metrics()]
    assert losses == [line["loss"] for line in RunFolder(tmp_path / "straight").read_metrics()][2:]
