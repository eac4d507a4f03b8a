"""DeepSpeed's folders, as the real DeepSpeed writes them here, read without it: weights, fp32 copies, moments.

Two processes write every form once; what each engine says of its own parameters is the truth to compare with.
"""

import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from biokit.checkpoint import load_checkpoint
from biokit.errors import CheckpointError, ConfigError
from biokit.exchange.reshard import open_source, reshard
from biokit.exchange.safe_load import load_safely
from biokit.exchange.source import WEIGHT, Blueprint
from biokit.models import build_model
from biokit.parallel.cuts import cut_tensor
from biokit.parallel.processes import join_processes
from tests.distributed import TIMEOUT_S, ranks
from tests.small_checkpoint import random_tensors, same_bits, small_config

CPU = torch.device("cpu")
VOCAB_SIZE = 523
FORMS = ("zero0", "zero1", "zero2_bf16", "zero3", "zero1_tp2", "pipeline_pp2", "pipeline_tp2")
STEPS = 2


class Pieces(nn.Module):
    """Any module's parameters with a loss of their own, so that no forward pass needs whole layers."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        losses = [p.float().square().mean() * (i + 1) for i, p in enumerate(self.layer.parameters())]
        return x + torch.stack(losses).sum()


class Whole(nn.Module):
    """The model as it is used, which ZeRO-3 needs: it gathers weights at the entrance of the module that owns them."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        ids = torch.arange(8).view(1, 8)
        return x + self.layer(ids, ids).square().mean()


def cut_layers(tensor_rank, num_tensor):
    """The tiny model, no value twice, with every parameter cut by the plan; the vocabulary's padding is zero."""
    config = small_config()
    blueprint = Blueprint(config, VOCAB_SIZE)
    model = build_model(config, VOCAB_SIZE)
    weights, _ = random_tensors(blueprint)
    weights["encoder.0.ffn.up.bias"][3] = 0.5  # NaN would spread through the loss
    for name in weights:
        module, _, leaf = name.rpartition(".")
        piece = cut_tensor(weights[name], blueprint.cut(WEIGHT, name), num_tensor, tensor_rank)
        setattr(model.get_submodule(module), leaf, nn.Parameter(piece.clone()))
    return model


def write_form(deepspeed, form, folder, rank, whole_group, own_group):
    """Train a little, save, and return what this rank's engine holds: {(kind, name): tensor}."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    num_tensor = 2 if form.endswith("tp2") else 1
    model = cut_layers(rank if num_tensor == 2 else 0, num_tensor)
    stage = 1 if form.startswith("pipeline") else int(form[4])
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "sub_group_size": 5000, "stage3_param_persistence_threshold": 1000},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": form.endswith("bf16")},
        "steps_per_print": 10**9,
    }
    options = {}
    if form.startswith("pipeline"):
        names = [*(f"{name}." for name in Blueprint(small_config(), VOCAB_SIZE).layers)]
        net = make_pipeline([Pieces(layer) for layer in model.layers()], num_tensor)
    else:
        names, net = None, Whole(model) if form == "zero3" else Pieces(model)
        if num_tensor == 2:
            options["mpu"] = make_mpu(rank, whole_group, own_group)
    matrices = [p for p in net.parameters() if p.dim() > 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": [p for p in net.parameters() if p.dim() < 2]}]
    engine, *_ = deepspeed.initialize(
        model=net, optimizer=torch.optim.AdamW(groups, lr=1e-2), config=settings, **options
    )
    for _ in range(STEPS):
        if names is None:
            engine.backward(engine(torch.ones((), dtype=torch.float32)).mean())
            engine.step()
        else:
            engine.train_batch(iter([(torch.ones(1, 1), torch.ones(1, 1))]))
    engine.save_checkpoint(str(folder / form))
    if stage in (1, 2):  # it links moments after the first group's step, before those of the second are there
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    truth = {}
    for name, parameter in net.named_parameters() if stage else ():
        own = own_name(name, names)
        truth[WEIGHT, own] = safe_get_full_fp32_param(parameter)
        for moment in ("exp_avg", "exp_avg_sq"):
            truth[moment, own] = safe_get_full_optimizer_state(parameter, moment)
    truth |= {} if stage else {(WEIGHT, own_name(n, names)): p for n, p in net.named_parameters()}
    engine.destroy()
    return {key: value.detach().float().clone() for key, value in truth.items()}


def own_name(name, layers):
    """`layer.embed...` of an engine, or `3.layer.ffn...` of a pipeline, as the model says it."""
    if layers is None:
        return name.removeprefix("layer.")
    position, _, rest = name.partition(".layer.")
    return layers[int(position)] + rest


def make_pipeline(layers, num_tensor):
    from deepspeed.pipe import PipelineModule
    from deepspeed.runtime.pipe.topology import PipeDataParallelTopology, PipeModelDataParallelTopology

    topology = PipeDataParallelTopology(num_pp=2, num_dp=1)
    if num_tensor == 2:
        topology = PipeModelDataParallelTopology(num_pp=1, num_mp=2, num_dp=1)
    return PipelineModule(layers, topology=topology, loss_fn=lambda y, _: y.mean(), partition_method="uniform")


def make_mpu(rank, whole_group, own_group):
    """Two tensor ranks, one data rank, as DeepSpeed asks for it."""
    return SimpleNamespace(
        get_model_parallel_rank=lambda: rank,
        get_model_parallel_world_size=lambda: 2,
        get_model_parallel_group=lambda: whole_group,
        get_data_parallel_rank=lambda: 0,
        get_data_parallel_world_size=lambda: 1,
        get_data_parallel_group=lambda: own_group,
    )


def write_folders(folder):
    """Every form, one after the other; returns {form: what this rank holds}."""
    import torch.distributed as dist

    from biokit.parallel.zero import start_deepspeed

    with join_processes(CPU, TIMEOUT_S, needs_group=True) as processes:
        deepspeed = start_deepspeed(CPU, TIMEOUT_S)
        whole_group = dist.new_group([0, 1])
        own_groups = [dist.new_group([rank]) for rank in (0, 1)]
        rank = processes.rank
        return {form: write_form(deepspeed, form, folder, rank, whole_group, own_groups[rank]) for form in FORMS}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(folder of all forms, {form: [what rank 0 holds, what rank 1 holds]})."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("deepspeed")
    found = ranks(2).run(write_folders, folder)
    return folder, {form: [one[form] for one in found] for form in FORMS}


@pytest.fixture
def copy(written, tmp_path):
    """A function that gives a form's folder and its tag, to be altered."""

    def make(form):
        shutil.copytree(written[0] / form, tmp_path / form)
        return tmp_path / form, tmp_path / form / f"global_step{STEPS}"

    return make


@pytest.mark.parametrize("form", FORMS)
def test_what_the_engine_holds_is_what_is_read(written, form):
    folder, truth = written[0] / form, written[1][form]
    source = open_source(folder, small_config(), optimizer=form != "zero0")
    assert source.step == STEPS
    num_tensor = 2 if form.endswith("tp2") else 1
    compared = set()
    for rank, held in enumerate(truth):
        for (kind, name), piece in held.items():
            cut = source.blueprint.cut(kind, name)
            found = cut_tensor(source.read(kind, name), cut, num_tensor, rank if num_tensor == 2 else 0)
            real = cut_tensor(torch.ones(source.blueprint.shape(kind, name)), cut, num_tensor, rank % num_tensor) > 0
            assert torch.equal(found[real], piece[real]), (kind, name)  # what padding holds is nobody's
            compared.add((kind, name))
    kinds = (WEIGHT,) if form == "zero0" else (WEIGHT, "exp_avg", "exp_avg_sq")
    assert compared == {(kind, name) for kind in kinds for name in source.blueprint.template}
    if form != "zero0":
        assert all(source.read("step", name) == STEPS for name in source.blueprint.template)


def test_the_comparison_could_fail(written):
    """Values differ from one another and from the initial ones, and a parameter lies on both ranks."""
    initial, _ = random_tensors(Blueprint(small_config(), VOCAB_SIZE))
    for (kind, name), value in written[1]["zero1"][0].items():
        assert value.unique().numel() > 0.9 * value.numel() or kind != WEIGHT
        assert not torch.equal(value, initial[name])
        assert value.abs().sum() > 0
    files = sorted((written[0] / "zero1" / f"global_step{STEPS}").glob("*_optim_states.pt"))
    slices = [load_safely(file)["optimizer_state_dict"]["param_slice_mappings"] for file in files]
    assert any(set(one) & set(other) for one, other in zip(*slices, strict=True))


@pytest.mark.parametrize("form", ["zero2_bf16", "zero3", "pipeline_pp2"])
def test_on_into_megatron_and_biokit(written, tmp_path, form):
    folder = written[0] / form
    plan = reshard(folder, tmp_path / "m", 2, 2, config=small_config())
    assert "DeepSpeed" in plan.source
    reshard(tmp_path / "m", tmp_path / "back", format="biokit")
    found = load_checkpoint(tmp_path / "back" / "checkpoints" / f"step_{STEPS:08d}")
    source = open_source(folder, small_config(), optimizer=True)
    for name in source.blueprint.template:
        assert same_bits(found.model[name], source.read(WEIGHT, name))
        assert same_bits(found.optimizer[f"exp_avg.{name}"], source.read("exp_avg", name))
    assert found.state["step"] == STEPS


def test_the_plan_names_the_files(written, tmp_path):
    def sources(form, name):
        plan = reshard(written[0] / form, tmp_path / "m", dry_run=True, config=small_config())
        return next(move.sources for move in plan.moves if move.name == name)

    qkv = "encoder.0.attention.qkv.weight"
    assert sources("pipeline_tp2", qkv) == ("layer_01-model_00-model[0:48]", "layer_01-model_01-model[48:96]")
    assert sources("zero1_tp2", qkv) == ("mp_rank_00_model[0:48]", "mp_rank_01_model[48:96]")
    assert sources("zero3", qkv) == ("zero_pp_rank_0_mp_rank_00 to 1",)


def test_without_zero_the_optimizer_is_refused_and_the_weights_are_read(written):
    folder = written[0] / "zero0"
    with pytest.raises(CheckpointError, match=r"numbers the parameters and does not name them.*optimizer=False"):
        open_source(folder, small_config(), optimizer=True)
    assert list(open_source(folder, small_config(), optimizer=False).pieces) == [WEIGHT]


def test_half_precision_without_its_fp32_copy(copy):
    folder, tag = copy("zero2_bf16")
    for path in tag.glob("*_optim_states.pt"):
        path.unlink()
    source = open_source(folder, small_config(), optimizer=True)
    assert source.notes == ["no optimizer: weights only, of half precision"]
    assert source.read(WEIGHT, "head.norm.weight").dtype == torch.float32


def test_the_model_must_be_given_and_fit(written):
    with pytest.raises(ConfigError, match="does not say which model"):
        open_source(written[0] / "zero1", None, True)
    with pytest.raises(CheckpointError, match=r"extra|missing"):
        open_source(written[0] / "zero1", small_config(num_layers=3), True)
    with pytest.raises(CheckpointError, match=r"instead of \(48, 16\)"):
        open_source(written[0] / "zero1", small_config(hidden_size=16), True)


@pytest.mark.parametrize(
    ("form", "file", "words"),
    [
        ("zero1_tp2", "mp_rank_01_model_states.pt", "missing model states of data rank 0 and model rank 1"),
        ("zero3", "zero_pp_rank_1_mp_rank_00_model_states.pt", "missing model states of data rank 1"),
        ("zero1", "zero_pp_rank_1_mp_rank_00_optim_states.pt", "data ranks 0 of 2"),
        ("zero3", "zero_pp_rank_0_mp_rank_00_optim_states.pt", "data ranks 1 of 2"),
        ("pipeline_tp2", "layer_03-model_01-model_states.pt", "missing layer 3 of tensor rank 1"),
        ("pipeline_pp2", "mp_rank_01_model_states.pt", "missing model states of data rank 0 and model rank 1"),
    ],
)
def test_missing_files_are_named(copy, form, file, words):
    folder, tag = copy(form)
    (tag / file).unlink()
    with pytest.raises(CheckpointError, match=words):
        open_source(folder, small_config(), True)


@pytest.mark.parametrize(
    ("form", "key", "words"),
    [
        ("zero1", "mp_world_size", f"which is {10**12} files, and 1 are there"),
        ("zero3", "dp_world_size", f"which is {10**12} files, and 2 are there"),
    ],
)
def test_impossible_numbers_of_ranks_are_refused_at_once(copy, form, key, words):
    folder, tag = copy(form)
    for path in tag.glob("*_model_states.pt"):
        torch.save({**torch.load(path, weights_only=False), key: 10**12}, path)
    with pytest.raises(CheckpointError, match=words):
        open_source(folder, small_config(), True)


def test_an_impossible_number_of_shares_is_refused_at_once(copy):
    folder, tag = copy("zero1")
    for path in tag.glob("*_optim_states.pt"):
        saved = torch.load(path, weights_only=False)
        saved["optimizer_state_dict"]["partition_count"] = 10**12
        torch.save(saved, path)
    with pytest.raises(CheckpointError, match=f"data ranks 0, 1 of {10**12}"):
        open_source(folder, small_config(), True)


def test_tensors_that_are_no_dense_numbers_are_named(copy):
    folder, tag = copy("zero1")
    path = tag / "mp_rank_00_model_states.pt"
    saved = torch.load(path, weights_only=False)
    name = next(name for name in saved["module"] if name.endswith("head.norm.weight"))
    saved["module"][name] = saved["module"][name].to_sparse()
    torch.save(saved, path)
    with pytest.raises(CheckpointError, match=r"mp_rank_00_model_states\.pt.*norm\.weight is a sparse_coo tensor"):
        open_source(folder, small_config(), True)


def test_files_of_another_layout_are_named(copy):
    folder, tag = copy("zero1")
    shutil.copy(tag / "mp_rank_00_model_states.pt", tag / "mp_rank_01_model_states.pt")
    with pytest.raises(CheckpointError, match=r"foreign mp_rank_01_model_states\.pt"):
        open_source(folder, small_config(), True)
    (tag / "mp_rank_01_model_states.pt").rename(tag / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointError, match="ZeRO-3 and of another stage"):
        open_source(folder, small_config(), True)
    (tag / "zero_pp_rank_0_mp_rank_00_model_states.pt").rename(tag / "layer_0_expert_1_mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointError, match="mixtures of experts"):
        open_source(folder, small_config(), True)


@pytest.mark.parametrize("latest", ["", "global_step9", "../zero1", "/"])
def test_a_wrong_latest(copy, latest):
    folder, tag = copy("zero1")
    (folder / "latest").write_text(latest)
    with pytest.raises(CheckpointError, match=r"not a folder beside it.*global_step2"):
        open_source(folder, small_config(), True)
    assert open_source(tag, small_config(), True).step == STEPS


def widen_flat(section):
    flats = section["single_partition_of_fp32_groups"]
    flats[0] = flats[0].to(torch.complex64)


def change_share(section):
    place = next(iter(section["param_slice_mappings"][0].values()))
    place.numel -= 1


@pytest.mark.parametrize(
    ("form", "change", "words"),
    [
        ("zero1", change_share, "the shares of .* hold .* values instead of"),
        ("zero1", lambda section: section.pop("param_slice_mappings"), "does not say where each parameter lies"),
        ("zero1", lambda section: section["base_optimizer_state"].pop("state"), "no exp_avg of AdamW"),
        ("zero1", lambda section: section.update(partition_count=[3, 3]), "partition_count is"),
        ("zero1", widen_flat, "a flat weight is a strided tensor of complex64"),
        ("zero3", lambda section: section["fp32_flat_groups"].pop(), "the share of .* values, of"),
        ("zero3", lambda section: section.update(ds_zero_partition_groups=1), "several process groups"),
    ],
)
def test_shares_that_do_not_make_up_a_parameter(copy, form, change, words):
    folder, tag = copy(form)
    path = tag / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    saved = torch.load(path, weights_only=False)
    change(saved["optimizer_state_dict"])
    torch.save(saved, path)
    with pytest.raises(CheckpointError, match=words):
        open_source(folder, small_config(), True)


def test_a_file_that_would_run_something_is_refused(copy, tmp_path):
    class Attack:
        def __reduce__(self):
            return print, ("run",)

    folder, tag = copy("zero1")
    path = tag / "mp_rank_00_model_states.pt"
    saved = torch.load(path, weights_only=False)
    torch.save({**saved, "client_state": Attack()}, path)
    with pytest.raises(CheckpointError, match=r"mp_rank_00_model_states\.pt.*print"):
        reshard(folder, tmp_path / "m", config=small_config())
    assert not (tmp_path / "m").exists()
