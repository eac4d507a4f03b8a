"""DeepSpeed specs of pretrained layers: own files only, tied tables, pieces of tensor ranks, marks kept."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from biokit.errors import ConfigError
from biokit.parallel.cuts import find_cut, join_tensors
from biokit.parallel.layer_files import layer_file_name
from biokit.parallel.layer_specs import PretrainedLayerSpec, TiedPretrainedLayerSpec
from biokit.parallel.processes import join_processes
from tests.distributed import TIMEOUT_S, ranks

CPU = torch.device("cpu")


class Marked(nn.Module):
    """Has all that assigning could lose: marks, a shared parameter, buffers of both kinds, a plain tensor."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 2), nn.Linear(3, 2)
        self.second.weight = self.first.weight
        self.first.weight.tensor_model_parallel = True
        self.register_buffer("kept", torch.zeros(2))
        self.register_buffer("angles", torch.arange(3.0), persistent=False)
        self.plain = torch.arange(4.0)


def test_marks_ties_and_buffers_survive(tmp_path):
    weights = {"first.weight": torch.ones(2, 3), "first.bias": torch.ones(2), "second.bias": torch.ones(2) * 2}
    save_file({**weights, "kept": torch.ones(2) * 5}, tmp_path / "layer.safetensors")
    layer = PretrainedLayerSpec(Marked, pretrained_ckpt_path=tmp_path / "layer.safetensors").build()
    assert layer.first.weight.tensor_model_parallel and layer.first.weight is layer.second.weight
    assert layer.kept.tolist() == [5, 5] and layer.angles.tolist() == [0, 1, 2] and layer.plain.tolist() == [0, 1, 2, 3]
    assert all(torch.equal(layer.get_parameter(name), value) for name, value in weights.items())


class HalfBlock(nn.Module):
    """What a tensor rank of two has of a block: shapes alone."""

    def __init__(self):
        super().__init__()
        self.tokens, self.up, self.down = nn.Embedding(7, 4), nn.Linear(4, 3), nn.Linear(3, 4)


def test_specs_cut_for_a_tensor_rank(tmp_path):
    whole = {"tokens.weight": torch.randn(13, 4), "up.weight": torch.randn(6, 4), "up.bias": torch.randn(6)}
    whole |= {"down.weight": torch.randn(4, 6), "down.bias": torch.randn(4)}
    save_file(whole, tmp_path / "layer.safetensors")
    keys = {"pretrained_ckpt_path": tmp_path / "layer.safetensors", "tp_model_size": 2, "layer_name": "l"}
    keys["plan"] = {"l.up": "column", "l.down": "row", "l.tokens": "vocab"}
    ranks = [PretrainedLayerSpec(HalfBlock, tp_rank=rank, **keys).build() for rank in range(2)]
    for name, value in whole.items():
        cut = find_cut(keys["plan"], f"l.{name}")
        assert torch.equal(join_tensors([r.get_parameter(name) for r in ranks], cut, value.shape), value)
    for wrong, match in (({"plan": None}, "without a plan"), ({"lora_mode": "lora"}, "adapters on a cut layer")):
        with pytest.raises(ConfigError, match=match):
            PretrainedLayerSpec(HalfBlock, **{**keys, **wrong})
    for wrong, match in (({"tp_rank": 2}, "tp_rank=2"), ({"lora_mode": "all"}, "Valid: full, lora, freeze")):
        with pytest.raises(ConfigError, match=match):
            PretrainedLayerSpec(HalfBlock, **{**keys, **wrong})
    with pytest.raises(ConfigError, match="without a file"):
        PretrainedLayerSpec(nn.Linear, 2, 2)


def build_stage(folder, num_layers, method):
    """Build a pipeline of specs where each rank can see the files of its own stage only."""
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec

    from biokit.parallel.zero import start_deepspeed

    with join_processes(CPU, TIMEOUT_S, needs_group=True) as processes:
        start_deepspeed(CPU, TIMEOUT_S)
        own = folder / f"rank{processes.rank}"
        files = [own / layer_file_name(i, ".pt") for i in range(num_layers)]
        table = {"pretrained_ckpt_path": own / "table.pt", "new_num_tokens": 6}
        first = TiedPretrainedLayerSpec("table", nn.Embedding, 6, 4, **table)
        blocks = [PretrainedLayerSpec(nn.Linear, 4, 4, pretrained_ckpt_path=path) for path in files]
        last = TiedPretrainedLayerSpec("table", nn.Embedding, 6, 4, forward_fn=project, **table)
        assert isinstance(first, TiedLayerSpec) and isinstance(blocks[0], LayerSpec | PretrainedLayerSpec)
        module = PipelineModule([first, *blocks, last], num_stages=2, partition_method=method)
        names = {name: value.detach().clone() for name, value in module.named_parameters()}
        return names, [spec.count_parameters() for spec in (first, *blocks)]


def project(table, carry):
    return carry @ table.weight.T


def test_a_pipeline_reads_only_its_own_files(tmp_path):
    weights = [{"weight": torch.full((4, 4), float(i)), "bias": torch.full((4,), float(i))} for i in range(4)]
    table = torch.arange(20.0).view(5, 4)
    for rank in range(2):
        (tmp_path / f"rank{rank}").mkdir()
        torch.save({"weight": table}, tmp_path / f"rank{rank}" / "table.pt")
        for i in range(2 * rank, 2 * rank + 2):
            torch.save(weights[i], tmp_path / f"rank{rank}" / layer_file_name(i, ".pt"))
    stages = ranks(2).run(build_stage, tmp_path, 4, "uniform")
    grown = torch.cat([table, table.mean(0, keepdim=True)])
    for rank, (found, counts) in enumerate(stages):
        assert counts == [24, 20, 20, 20, 20]
        assert torch.equal(found.pop("tied_modules.table.weight"), grown)
        assert set(found) == {f"{i + 1}.{name}" for i in (2 * rank, 2 * rank + 1) for name in ("weight", "bias")}
        assert all(torch.equal(value, weights[int(key[0]) - 1][key[2:]]) for key, value in found.items())
