"""Megatron's container: its exact form, what other tools write into it, and every way in which it can be wrong."""

import shutil
from argparse import Namespace

import pytest
import torch

from biokit.checkpoint import load_checkpoint
from biokit.errors import CheckpointError
from biokit.exchange import names
from biokit.exchange.megatron import open_megatron
from biokit.exchange.names import MegatronNames, reorder_fused
from biokit.exchange.reshard import open_source, reshard
from biokit.exchange.source import KINDS, WEIGHT
from biokit.parallel.cuts import cut_tensor
from tests.small_checkpoint import assert_same, same_bits, small_checkpoint, small_config

RANK_FILE = "model_optim_rng.pt"
QKV = "encoder.0.attention.qkv.weight"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "run"
    small_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def container(run, tmp_path_factory):
    """Two tensor ranks, two stages; tests alter copies of it."""
    folder = tmp_path_factory.mktemp("container") / "m"
    reshard(run, folder, 2, 2)
    return folder


@pytest.fixture
def copy(container, tmp_path):
    shutil.copytree(container, tmp_path / "m")
    return tmp_path / "m"


def read(folder, rank="mp_rank_00_000"):
    return torch.load(folder / "iter_0000005" / rank / RANK_FILE, weights_only=False)


def alter(folder, change, rank="mp_rank_01_001"):
    """Let `change` alter what a rank's file holds."""
    saved = read(folder, rank)
    change(saved)
    torch.save(saved, folder / "iter_0000005" / rank / RANK_FILE)


def test_the_form_of_the_container(run, container):
    assert (container / "latest_checkpointed_iteration.txt").read_text() == "5"
    ranks = ["mp_rank_00_000", "mp_rank_00_001", "mp_rank_01_000", "mp_rank_01_001"]
    assert sorted(path.name for path in (container / "iter_0000005").iterdir()) == ranks
    saved = read(container)
    assert saved["checkpoint_version"] == 3.0
    assert saved["iteration"] == 5
    expected = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 128}
    expected |= {"max_position_embeddings": 60, "padded_vocab_size": 524}
    expected |= {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    assert expected.items() <= vars(saved["args"]).items()
    assert {"lr_scheduler", "random_rng_state", "np_rng_state", "torch_rng_state", "cuda_rng_state"} <= set(saved)
    torch.Generator().set_state(saved["torch_rng_state"])
    names = [set(read(container, rank)["model"]) for rank in ranks]
    assert names[0] == names[2]
    assert names[1] == names[3]
    assert not names[0] & names[1]
    assert names[0] | names[1] == set(load_checkpoint(run / "checkpoints" / "step_00000005").model)


def test_pieces_and_moments_are_those_of_the_plan(run, container):
    whole = load_checkpoint(run / "checkpoints" / "step_00000005")
    source = open_source(run, None, optimizer=True)
    for tensor in (0, 1):
        for stage in (0, 1):
            saved = read(container, f"mp_rank_{tensor:02d}_{stage:03d}")
            order = list(saved["model"])
            (group,) = saved["optimizer"]["param_groups"]
            assert group["param_names"] == order
            for index, name in enumerate(order):
                cut = source.blueprint.cut(WEIGHT, name)
                assert same_bits(saved["model"][name], cut_tensor(whole.model[name], cut, 2, tensor))
                moments = saved["optimizer"]["state"][index]
                assert same_bits(
                    moments["exp_avg_sq"], cut_tensor(whole.optimizer[f"exp_avg_sq.{name}"], cut, 2, tensor)
                )
                assert moments["step"] == 5
    head = read(container, "mp_rank_01_001")["model"]["head.tokens.bias"]
    assert head.shape == (262,)
    assert head[-1] == 0


def test_one_stage_has_no_stage_in_its_names(run, tmp_path):
    reshard(run, tmp_path / "m", 2)
    names = sorted(path.name for path in (tmp_path / "m" / "iter_0000005").iterdir())
    assert names == ["mp_rank_00", "mp_rank_01"]
    assert open_megatron(tmp_path / "m" / "iter_0000005", None, None, True).step == 5


@pytest.mark.parametrize("num_parts", [2, 3])
def test_orders_of_fused_rows_element_by_element(num_parts):
    heads, size = 2, 5
    own = torch.arange(heads * num_parts * size * 7).view(-1, 7)
    found = {version: reorder_fused(own, num_parts, size, 3, version) for version in (0, 1, 2)}
    for head in range(heads):
        for part in range(num_parts):
            for k in range(size):
                row = own[(head * num_parts + part) * size + k]
                assert torch.equal(found[0][(part * heads + head) * size + k], row)
                assert torch.equal(found[1][(head * size + k) * num_parts + part], row)
    assert torch.equal(found[2], own)
    for version, rows in found.items():
        assert torch.equal(reorder_fused(rows, num_parts, size, version, 3), own)
    assert torch.equal(reorder_fused(found[0], num_parts, size, 0, 1), found[1])


def test_every_rank_orders_its_own_rows(run, tmp_path):
    """Version 0 of a rank is (q|k|v, its heads): not a slice of version 0 of the whole."""
    reshard(run, tmp_path / "m", 2, version=0)
    whole = load_checkpoint(run / "checkpoints" / "step_00000005").model[QKV]
    rank1 = read(tmp_path / "m", "mp_rank_01")["model"][QKV]
    q, k, v = whole.view(4, 3, 8, 32)[2:].unbind(1)  # heads 2 and 3
    assert torch.equal(rank1, torch.cat([q, k, v]).reshape(48, 32))


def test_a_model_with_names_of_its_own(run, tmp_path, monkeypatch):
    """The map is data: another model's names and order go there and come back."""
    fused = names.MEGATRON_NAMES["molbart"].fused
    modules = {"encoder.*.attention.qkv": "language_model.encoder.layers.*.attention.query_key_value"}
    monkeypatch.setitem(names.MEGATRON_NAMES, "molbart", MegatronNames(fused, modules))
    reshard(run, tmp_path / "m", 2, version=0)
    saved = read(tmp_path / "m", "mp_rank_01")
    assert "language_model.encoder.layers.1.attention.query_key_value.weight" in saved["model"]
    reshard(tmp_path / "m", tmp_path / "back", format="biokit")
    assert_same(run / "checkpoints" / "step_00000005", tmp_path / "back" / "checkpoints" / "step_00000005")
    with pytest.raises(CheckpointError, match=r"model bert: it has no form.*molbart"):
        names.find_names("bert")


def as_foreign(folder, padded=640, half=None):
    """What another program would have written: no `biokit`, the vocabulary padded further, nested names."""
    ranks = ("mp_rank_00", "mp_rank_01")
    for name in ("embed.embedding.tokens.weight", "head.tokens.weight", "head.tokens.bias"):
        whole = torch.cat([read(folder, rank)["model"][name] for rank in ranks])[:523]
        whole = torch.cat([whole, whole.new_full((padded - 523, *whole.shape[1:]), 7.0)])
        for rank, piece in zip(ranks, whole.chunk(2), strict=True):
            alter(folder, lambda saved, name=name, piece=piece: saved["model"].update({name: piece.clone()}), rank)

    def change(saved):
        del saved["biokit"], saved["optimizer"]
        saved["args"].padded_vocab_size = padded
        model = {name: tensor.to(half or tensor.dtype) for name, tensor in saved["model"].items()}
        inner = {name.removeprefix("encoder."): model.pop(name) for name in list(model) if name.startswith("encoder.")}
        saved["model"] = {**model, "encoder": {**inner, "0.core._extra_state": None}}

    for rank in ranks:
        alter(folder, change, rank)


@pytest.mark.parametrize("half", [None, torch.float16])
def test_a_container_that_biokit_did_not_write(run, tmp_path, half):
    reshard(run, tmp_path / "m", 2)
    as_foreign(tmp_path / "m", half=half)
    with pytest.raises(CheckpointError, match="Give the model's configuration"):
        reshard(tmp_path / "m", tmp_path / "back", format="biokit")
    plan = reshard(tmp_path / "m", tmp_path / "back", format="biokit", config=small_config())
    assert any("no optimizer" in note for note in plan.notes)
    found = load_checkpoint(tmp_path / "back" / "checkpoints" / "step_00000005")
    whole = load_checkpoint(run / "checkpoints" / "step_00000005").model
    for name, tensor in whole.items():
        assert same_bits(found.model[name], tensor.to(half or torch.float32).float())
    assert found.state["step"] == 5


def test_a_release_and_a_folder_above(run, copy):
    (copy / "iter_0000005").rename(copy / "release")
    (copy / "latest_checkpointed_iteration.txt").write_text("release\n")
    assert open_source(copy, None, True).step == 5


@pytest.mark.parametrize(
    ("tracker", "words"),
    [("", 'it says ""'), ("-3", '"-3"'), ("5 6", '"5 6"'), ("7", "iter_0000007, which is not there.*iter_0000005")],
)
def test_wrong_trackers(copy, tracker, words):
    (copy / "latest_checkpointed_iteration.txt").write_text(tracker)
    with pytest.raises(CheckpointError, match=words):
        open_source(copy, None, True)


def test_folders_that_are_not_whole(copy, tmp_path):
    iteration = copy / "iter_0000005"
    (iteration / "mp_rank_02_000").mkdir()
    with pytest.raises(CheckpointError, match="say tp2 x pp2, but: foreign mp_rank_02_000"):
        open_source(copy, None, True)
    (iteration / "mp_rank_02_000").rmdir()
    (iteration / "mp_rank_01_001" / RANK_FILE).rename(tmp_path / "away")
    with pytest.raises(CheckpointError, match=r"missing mp_rank_01_001/model_optim_rng\.pt"):
        open_source(copy, None, True)
    (tmp_path / "away").rename(iteration / "mp_rank_01_001" / RANK_FILE)
    iteration.rename(copy / "iter_0000006")
    with pytest.raises(CheckpointError, match="its files are of iteration 5"):
        open_source(copy / "iter_0000006", None, True)
    (copy / "iter_0000006" / "common.pt").touch()
    with pytest.raises(CheckpointError, match="torch_dist"):
        open_source(copy / "iter_0000006", None, True)
    (copy / "iter_0000009").mkdir()
    (copy / "latest_checkpointed_iteration.txt").write_text("9")
    with pytest.raises(CheckpointError, match="no mp_rank folder"):
        open_source(copy, None, True)


NORM = "head.norm.weight"


def shrink(saved):
    saved["model"][NORM] = saved["model"][NORM][:-1].clone()


def retype(saved):
    saved["model"][NORM] = [1.0]


def put(tensor):
    """A change that puts a tensor in the place of a norm's weights."""
    return lambda saved: saved["model"].update({NORM: tensor})


def rename_moments(saved):
    saved["optimizer"]["param_groups"][0]["param_names"][0] = "more"


def put_moment(value, moment="exp_avg"):
    return lambda saved: saved["optimizer"]["state"][0].update({moment: value})


def lengthen(saved):
    saved["model"]["head.tokens.bias"] = torch.zeros(300)


def drop_names(saved):
    del saved["optimizer"]["param_groups"][0]["param_names"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (shrink, r"head\.norm\.weight in mp_rank_01_001 is \(31,\) instead of \(32,\)"),
        (lengthen, r"head\.tokens\.bias in mp_rank_01_001 is \(300,\) instead of \(262,\)"),
        (retype, r"mp_rank_01_001/.*head\.norm\.weight is a list"),
        (put(torch.ones(32).to_sparse()), r"mp_rank_01_001/.*head\.norm\.weight is a sparse_coo tensor of float32"),
        (put(torch.ones(32, device="meta")), r"mp_rank_01_001/.*head\.norm\.weight is a strided .* on meta"),
        (put(torch.ones(32, dtype=torch.complex64)), r"mp_rank_01_001/.*head\.norm\.weight is .* of complex64"),
        (put(torch.ones(32, dtype=torch.int32)), r"mp_rank_01_001/.*head\.norm\.weight is .* of int32"),
        (put_moment(torch.ones(3).to_sparse()), "mp_rank_01_001/.*exp_avg of .* is a sparse_coo tensor"),
        (put_moment("five", "step"), "mp_rank_01_001/.*step of .* is a str"),
        (rename_moments, "mp_rank_01_001.*extra more"),
        (lambda saved: saved["model"].pop(NORM), r"head\.norm\.weight has 1 pieces instead of 2"),
        (lambda saved: saved["model"].update(more=torch.ones(1)), r"mp_rank_01_001.*extra more"),
        (lambda saved: setattr(saved["args"], "num_layers", 3), "args.num_layers is 3 in mp_rank_01_001"),
        (lambda saved: delattr(saved["args"], "hidden_size"), "mp_rank_01_001.*args do not say hidden_size"),
        (lambda saved: saved.update(args=Namespace()), "args do not say num_layers"),
        (lambda saved: saved.update(iteration=6), "iteration is 6 in mp_rank_01_001"),
        (lambda saved: saved.update(checkpoint_version=4.5), r"mp_rank_01_001.*checkpoint_version is 4\.5"),
        (lambda saved: saved.pop("model"), "mp_rank_01_001.*no mapping `model`"),
        (drop_names, r"mp_rank_01_001.*does not name them.*optimizer=False"),
        (lambda saved: saved["optimizer"]["state"][2].pop("exp_avg"), "mp_rank_01_001.*missing exp_avg of"),
        (lambda saved: saved.pop("optimizer"), "exp_avg of .* has 1 pieces instead of 2"),
    ],
)
def test_one_wrong_rank_is_named(copy, change, words):
    alter(copy, change)
    with pytest.raises(CheckpointError, match=words):
        open_source(copy, None, True)


def test_a_step_may_be_a_number(copy):
    alter(copy, put_moment(5, "step"))
    source = open_source(copy, None, True)
    assert all(source.read("step", name) == 5 for name in source.blueprint.template)


@pytest.mark.parametrize(
    ("rank", "other", "words"),
    [
        ("mp_rank_01_000", "mp_rank_00_000", "tensor_rank 0: Restore the file of tensor_rank 1"),
        ("mp_rank_00_000", "mp_rank_00_001", "pipeline_rank 1: Restore the file of pipeline_rank 0"),
    ],
)
def test_a_rank_that_is_a_copy_of_another(copy, rank, other, words):
    """Of one stage its pieces have the right names and shapes."""
    shutil.copy(copy / "iter_0000005" / other / RANK_FILE, copy / "iter_0000005" / rank / RANK_FILE)
    with pytest.raises(CheckpointError, match=rf"{rank}/.*{words.replace(': ', '.*')}"):
        open_source(copy, None, True)


def test_impossible_numbers_of_ranks_are_refused_at_once(copy):
    sizes = {"tensor_model_parallel_size": 10**12, "pipeline_model_parallel_size": 10**9}
    alter(copy, lambda saved: vars(saved["args"]).update(sizes), "mp_rank_00_000")
    with pytest.raises(CheckpointError, match=f"tp{10**12} x pp{10**9}, which is {10**21} files, and 4 are there"):
        open_source(copy, None, True)


def test_rows_beyond_the_padded_vocabulary(run, tmp_path):
    reshard(run, tmp_path / "m")
    alter(tmp_path / "m", lambda saved: vars(saved["args"]).update(padded_vocab_size=640), "mp_rank_00")
    with pytest.raises(CheckpointError, match=r"has 523 rows, args\.padded_vocab_size is 640"):
        open_source(tmp_path / "m", None, True)


def test_args_that_are_not_the_model(copy):
    for tensor in (0, 1):
        for stage in (0, 1):
            rank = f"mp_rank_{tensor:02d}_{stage:03d}"
            alter(copy, lambda saved: vars(saved["args"]).update(num_attention_heads=8, padded_vocab_size=500), rank)
    with pytest.raises(
        CheckpointError, match=r"num_attention_heads is 8, the model's is 4; args\.padded_vocab_size is 500"
    ):
        open_source(copy, None, True)


def test_copies_that_differ_are_found_when_read(copy, tmp_path):
    alter(copy, lambda saved: saved["model"][NORM].add_(1e-3))
    with pytest.raises(
        CheckpointError, match=r"head\.norm\.weight in mp_rank_01_001 differs from that in mp_rank_00_001"
    ):
        reshard(copy, tmp_path / "n", 1)
    assert not (tmp_path / "n").exists()


def test_weights_of_an_optimizer_that_cannot_be_read(copy):
    alter(copy, drop_names)
    source = open_source(copy, None, optimizer=False)
    assert list(source.pieces) == [WEIGHT]
    assert set(open_source(copy.parent / "m", None, optimizer=False).pieces) < set(KINDS)
