"""Tensor parallelism is the same model: values, gradients, masks and memory against one process, on 2 and 4 ranks.

Bound: what fp32 allows where sums are taken in another order. A sum of n products moves by at most n x 2^-24 of the sum
of their magnitudes (Higham 2002, section 3.1); the longest here has 128 (the feed-forward layer's columns), so 7.6e-6
a sum. Errors are taken relative to the largest gradient of the tensor, where single sums mostly cancel far below the
bound; a wrong order of QKV rows moves them by more than a thousand times of it.
"""

import contextlib
import gc
import sys
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from biokit.config import ModelConfig
from biokit.errors import ConfigError, EngineError
from biokit.models.layers import SelfAttention
from biokit.models.molbart import MOLBART, TENSOR_PARALLEL_PLAN
from biokit.parallel import folding, tensor
from biokit.parallel.cuts import find_cut, join_tensors
from biokit.parallel.grid import Layout, Place
from biokit.parallel.processes import join_processes
from tests.distributed import TIMEOUT_S, RanksFailed, ranks

CPU = torch.device("cpu")
FFN_SIZE = 128
BOUND = FFN_SIZE * 2.0**-24
SEED = 11


def make_config(**keys):
    return ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, **{"dropout": 0.0, **keys})


def make_batch(vocab_size):
    generator = torch.Generator().manual_seed(0)
    shapes = {"src": (8, 9), "tgt": (8, 7), "labels": (8, 7)}
    ids = {key: torch.randint(6, vocab_size, shape, generator=generator) for key, shape in shapes.items()}
    for key in ids:
        ids[key][2:, 5:] = 0
    return ids


@contextlib.contextmanager
def started(size, pipeline=1):
    """The tensor group, and where this rank stands."""
    with join_processes(CPU, TIMEOUT_S, needs_group=True) as processes:
        layout = Layout("ThreeD", tensor=size, data=processes.world_size // size // pipeline, pipeline=pipeline)
        group = tensor.start_tensor_parallel(layout, CPU, TIMEOUT_S)
        try:
            yield group, layout, layout.place(processes.rank)
        finally:
            tensor.stop_tensor_parallel()


def build_layers(config, vocab_size):
    """The whole model's layers by name, tied where configured."""
    layers = {name: build().train() for name, build in MOLBART.layers(config, vocab_size, 40, 1)}
    if config.tie_word_embeddings:
        layers["head"].tokens.weight = layers["embed"].embedding.tokens.weight
    return layers


def split_layers(layers, layout, place, **options):
    return {
        name: tensor.split_layer(layer, name, TENSOR_PARALLEL_PLAN, layout, place, first=name == "embed", **options)
        for name, layer in layers.items()
    }


def run(layers, ids, loss_fn, seed=None, recompute=False, precision=torch.float32, **options):
    """(loss, figures) after a forward and a backward pass."""
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        logits = folding.fold_layers(list(layers.values()), (ids["src"], ids["tgt"]), seed, recompute, **options)
    loss, figures = loss_fn(logits, ids["labels"], 0)
    (loss / int((ids["labels"] != 0).sum())).backward()
    return loss.item(), figures.tolist()


def gradients(layers):
    named = nn.ModuleDict({name.replace(".", "/"): layer for name, layer in layers.items()}).named_parameters()
    return {name.replace("/", "."): parameter.grad for name, parameter in named}


def gather(gradient, name, shape, group):
    pieces = [torch.empty_like(gradient) for _ in range(group.size())]
    dist.all_gather(pieces, gradient.contiguous(), group=group)
    return join_tensors(pieces, find_cut(TENSOR_PARALLEL_PLAN, name), shape)


def unchanged(layers):
    return layers


def compare(size, vocab_size, config_keys, prepare=unchanged, precision=torch.float32, **options):
    """On a rank: (loss, figures, norm) of one process and of the split model, and the worst relative gradient gap."""
    config, ids = make_config(**config_keys), make_batch(vocab_size)
    with started(size) as (group, layout, place):
        whole = prepare(build_layers(config, vocab_size))
        single = run(whole, ids, folding.token_loss, precision=precision)
        split = split_layers(prepare(build_layers(config, vocab_size)), layout, place, **options)
        result = run(split, ids, tensor.token_loss, precision=precision)
        expected, found = gradients(whole), gradients(split)
        assert list(expected) == list(found)
        gaps = {}
        for name, gradient in expected.items():
            gathered = gather(found[name], name, gradient.shape, group)
            gaps[name] = float((gathered - gradient).abs().max() / gradient.abs().max())
        return single, result, gaps, norms(whole, split, group)


def norms(whole, split, group):
    """Gradient norms of one process and of the split model, whose marks say which squares are added up."""
    squares = torch.zeros(2)
    for parameter in {p for layer in split.values() for p in layer.parameters()}:
        squares[int(getattr(parameter, "tensor_model_parallel", False))] += parameter.grad.square().sum()
    dist.all_reduce(cut := squares[1:].clone(), group=group)
    return float(nn.utils.get_total_norm(list(gradients(whole).values()))), float((squares[0] + cut[0]).sqrt())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("size", "vocab_size"), [*(pytest.param(size, 60, marks=pytest.mark.full) for size in (2, 4)), (2, 61), (4, 61)]
)
def test_split_model_is_the_same_model(size, vocab_size, tied):
    for single, split, gaps, norm in ranks(size).run(compare, size, vocab_size, {"tie_word_embeddings": tied}):
        assert split[0] == pytest.approx(single[0], rel=BOUND)
        assert split[1] == pytest.approx(single[1], rel=BOUND)
        assert max(gaps.values()) < BOUND, gaps
        assert norm[1] == pytest.approx(norm[0], rel=BOUND)


class WrongOrder(SelfAttention):
    """Rows of QKV ordered (q|k|v, head, head size): the shapes fit, whatever the number of heads."""

    def forward(self, x_BTD, key_mask_BS=None, causal=False, cache=None):
        qkv = self.qkv(x_BTD).unflatten(-1, (3, -1, self.head_size)).unbind(2)
        return self.out(self.core(*(part_BTHK.transpose(1, 2) for part_BTHK in qkv), key_mask_BS, causal))


def order_wrongly(layers):
    for layer in layers.values():
        for module in layer.modules():
            if isinstance(module, SelfAttention):
                module.__class__ = WrongOrder
    return layers


def test_a_wrong_order_of_qkv_rows_is_found():
    _, _, gaps, _ = ranks(2).run(compare, 2, 60, {}, order_wrongly)[0]
    assert max(gaps.values()) > 1000 * BOUND


def test_bf16_is_near_one_process_in_bf16():
    """A path through 4 layers and back takes some 80 roundings of 2^-8, which add up as squares."""
    for single, split, gaps, _ in ranks(2).run(compare, 2, 61, {}, unchanged, torch.bfloat16):
        assert split[0] == pytest.approx(single[0], rel=2.0**-8)
        assert max(gaps.values()) < 80**0.5 * 2.0**-8


def on_cpu(function, *args):
    """Megatron-core asks CUDA where to place what it gathers; on a rank."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "current_device", lambda: CPU)
        return function(*args)


def compare_rows(*args):
    return compare(*args, sequence_parallel=True)


@pytest.mark.parametrize(("size", "vocab_size", "tied"), [(1, 61, False), (2, 61, True), (4, 60, False)])
def test_sequence_parallel_is_the_same_model(size, vocab_size, tied):
    keys = {"tie_word_embeddings": tied}
    for single, split, gaps, norm in ranks(max(size, 2)).run(on_cpu, compare_rows, size, vocab_size, keys):
        assert split[1] == pytest.approx(single[1], rel=BOUND)
        assert max(gaps.values()) < BOUND, gaps
        assert norm[1] == pytest.approx(norm[0], rel=BOUND)


def draw_masks(size):
    with started(size) as (_, layout, place):
        layer = split_layers(build_layers(make_config(dropout=0.5), 60), layout, place)["encoder.0"]
        results = []
        for _ in range(2):
            torch.manual_seed(5)
            masks = [module(torch.ones(64)).tolist() for module in (layer.ffn.inner_dropout, layer.dropout)]
            results.append((*masks, torch.rand(1).item()))
    assert results[0] == results[1]
    return results[0]


def test_local_masks_differ_between_ranks_and_replicated_ones_agree():
    local, replicated, after = zip(*ranks(4).run(draw_masks, 4), strict=True)
    assert len({tuple(mask) for mask in local}) == 4
    assert len({tuple(mask) for mask in replicated}) == len(set(after)) == 1


def train_with_dropout(size, sequence_parallel):
    """On a rank: losses under three seeds, whether recompute gives the same gradients, masks between the matrices."""
    ids, masks = make_batch(60), []
    with started(size) as (group, layout, place):
        layers = build_layers(make_config(dropout=0.3), 60)
        layers = split_layers(layers, layout, place, sequence_parallel=sequence_parallel)
        layers["encoder.0"].dropout.register_forward_hook(lambda _m, _a, output: masks.append((output == 0).tolist()))
        losses, found = [], []
        ways = [(1, False, {}), (2, False, {}), (1, True, {})]
        if not sequence_parallel:
            ways.append((1, True, {"checkpointed": tensor.PartitionedCheckpoint(group)}))
        for seed, recompute, options in ways:
            torch.rand(place.tensor + 1)  # whatever the rank's stream did before
            for layer in layers.values():
                layer.zero_grad()
            losses.append(run(layers, ids, tensor.token_loss, seed, recompute, **options)[0])
            found.append(gradients(layers))
        same = [all(torch.equal(found[0][name], other[name]) for name in other) for other in found[1:]]
    return losses, same, masks[0]


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["whole-rows", "sequence-parallel"])
def test_dropout_follows_the_seed_and_recompute_repeats_it(sequence_parallel):
    (losses, same, mask), (other_losses, other_same, other_mask) = ranks(2).run(
        on_cpu, train_with_dropout, 2, sequence_parallel
    )
    assert losses == other_losses and same == other_same
    assert losses[0] == losses[2] == losses[-1] != losses[1]
    assert same[0] is False and all(same[1:])
    assert (mask == other_mask) is not sequence_parallel


class MadeStorages(TorchDispatchMode):
    """Notes every storage that is made."""

    def __init__(self):
        super().__init__()
        self.made = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                reference = StorageWeakRef(storage)
                self.made.setdefault(reference.cdata, (reference, storage.nbytes()))
        return result

    def live_bytes(self):
        """What lives on once gloo's threads have let go of the last tensors that they sent."""
        gc.collect()
        counts = []
        for _ in range(10):
            time.sleep(0.05)
            counts.append(sum(num_bytes for reference, num_bytes in self.made.values() if not reference.expired()))
        return min(counts)


def measure_saved(size):
    """On a rank: bytes that live on after the forward pass, inputs kept whole and in parts."""
    ids, measured = make_batch(60), []
    with started(size) as (group, layout, place):
        layers = list(split_layers(build_layers(make_config(), 60), layout, place).values())
        for checkpointed in (folding.checkpoint_layer, tensor.PartitionedCheckpoint(group)):
            with MadeStorages() as storages:
                logits = folding.fold_layers(
                    layers, (ids["src"], ids["tgt"]), 1, recompute=True, checkpointed=checkpointed
                )
            measured.append(storages.live_bytes())
            del logits
    return measured


@pytest.mark.parametrize("size", [2, 4])
def test_partitioned_activations_keep_a_part_of_every_input(size):
    ids = make_batch(60)
    inputs = 3 * (ids["src"].numel() + ids["tgt"].numel()) * 32 * 4  # x, x, memory and y, y, y of D = 32 in fp32
    for whole, parts in ranks(size).run(measure_saved, size):
        assert whole - parts == inputs - inputs // size


def compare_losses(size, pad_id):
    """On a rank: loss, figures and gradient of whole logits and of this rank's columns; ties over the ranks' border."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-2, 3, (3, 5, 12), generator=generator).float()  # five values: many equals
    labels = torch.randint(0, 12, (3, 5), generator=generator)
    labels[0, 2:] = pad_id
    whole = logits.clone().requires_grad_()
    with started(size) as (group, _, place):
        part = logits.chunk(size, dim=-1)[place.tensor].clone().requires_grad_()
        before = part.detach().clone()
        results = [folding.token_loss(whole, labels, pad_id), tensor.token_loss(part, labels, pad_id)]
        for loss, _ in results:
            loss.backward()
        assert torch.equal(part.detach(), before)
        assert group.size() == size
        gap = (part.grad - whole.grad.chunk(size, dim=-1)[place.tensor]).abs().max()
    return [figures.tolist() for _, figures in results], float(gap)


@pytest.mark.parametrize("pad_id", [0, -100])
def test_token_loss_over_a_cut_vocabulary(pad_id):
    for (whole, part), gap in ranks(4).run(compare_losses, 4, pad_id):
        assert part[1:] == whole[1:] and whole[1] > 0
        assert part[0] == pytest.approx(whole[0], rel=1e-6)  # sums of 12 terms in fp32
        assert gap < 1e-6


def list_group(size, pipeline):
    with started(size, pipeline) as (group, layout, place):
        wanted = [layout.rank(Place(place.pipeline, place.data, other)) for other in range(size)]
        return wanted, dist.get_process_group_ranks(group), group.rank() == place.tensor


@pytest.mark.parametrize("pipeline", [1, 2])
def test_groups_follow_the_layout(pipeline):
    for wanted, found, stands_there in ranks(4).run(list_group, 2, pipeline):
        assert found == wanted and stands_there


def keep_state(size):
    """On a rank: a split model's states keep the plain names, and load; frozen weights work."""
    with started(size) as (_, layout, place):
        layers = build_layers(make_config(), 61)
        names = {name: list(layer.state_dict()) for name, layer in layers.items()}
        for name, layer in split_layers(layers, layout, place).items():
            assert list(layer.state_dict()) == names[name]
            layer.load_state_dict(layer.state_dict())
            for parameter in layer.parameters():
                parameter.requires_grad_("norm" in name or parameter.dim() == 1)
        run(layers, make_batch(61), tensor.token_loss)
        assert layers["encoder.0"].attention.qkv.weight.grad is None
        return layers["encoder.0"].attention.qkv.bias.grad.shape, layers["head"].tokens.weight.shape


def test_states_keep_their_names():
    assert ranks(2).run(keep_state, 2) == [(torch.Size([48]), torch.Size([31, 32]))] * 2


def meta_layers():
    return MOLBART.layers(make_config(), 60, 40, 1)


def test_the_plan_fits_the_model():
    tensor.check_plan(TENSOR_PARALLEL_PLAN, meta_layers())


@pytest.mark.parametrize(
    ("pattern", "word", "message"),
    [
        ("encoder.*.attention.kvq", "column", "it matches no module"),
        ("encoder.*.attention.qkv", "columns", "there is no such word. Valid: column, row, vocab, local"),
        ("encoder.*.ffn_norm", "row", "the module is a LayerNorm. row fits Linear"),
        ("encoder.0.attention", "local", "the SelfAttention has parameters"),
        ("encoder.0.attention.qkv", "row", "patterns say column, row"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(pattern, word, message):
    plan = dict(TENSOR_PARALLEL_PLAN)
    plan[pattern] = word
    with pytest.raises(ConfigError, match=message):
        tensor.check_plan(plan, meta_layers())


def split_odd_heads(size):
    with started(size) as (_, layout, place):
        tensor.split_layer(nn.ModuleDict({"up": nn.Linear(4, 6)}), "x", {"x.up": "column"}, layout, place)


def test_a_size_that_does_not_divide_is_refused():
    with pytest.raises(RanksFailed, match="tp=4: it does not divide a dimension of 6"):
        ranks(4).run(split_odd_heads, 4)


def test_sequence_parallel_is_refused_on_the_cpu():
    with pytest.raises(ConfigError, match="on cpu: Megatron-core places its buffers"):
        tensor.start_tensor_parallel(Layout("ThreeD", 2), CPU, TIMEOUT_S, sequence_parallel=True)


def test_a_missing_megatron_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("megatron")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "megatron", None)
    tensor._megatron.cache_clear()
    with pytest.raises(EngineError, match="megatron-core is not installed"):
        tensor.stop_tensor_parallel()
