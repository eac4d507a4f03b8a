"""ZeroInf on a disk: DeepSpeed's swapping of weights, gradients and moments, with its one C++ operator stood in for.

The operator (async_io) reads and writes files beside the computation; it needs libaio and a compiler. The stand-in does
the same at once, so that everything above it runs here: which tensors leave memory, and what comes back.
"""

import types
from functools import partial
from typing import ClassVar

import numpy as np
import pytest
import torch

from biokit.errors import EngineError
from biokit.parallel.grid import Layout
from biokit.parallel.processes import Processes, join_processes
from biokit.parallel.zero import Zero, prepare_nvme
from tests import test_zero
from tests.distributed import TIMEOUT_S, RanksFailed, ranks


class FileHandle:
    """`aio_handle` of DeepSpeed's async_io, one file access after another."""

    pinned: ClassVar[list[torch.Tensor]] = []
    num_reads = num_writes = 0

    def __init__(self, **_):
        self.num_pending = 0

    def async_pread(self, tensor, path, offset):
        assert offset == 0
        _bytes(tensor)[:] = np.fromfile(path, np.uint8, tensor.numel() * tensor.element_size())
        self.num_pending, FileHandle.num_reads = self.num_pending + 1, FileHandle.num_reads + 1
        return 0

    def async_pwrite(self, tensor, path, offset):
        assert offset == 0
        _bytes(tensor).tofile(path)
        self.num_pending, FileHandle.num_writes = self.num_pending + 1, FileHandle.num_writes + 1
        return 0

    def wait(self):
        done, self.num_pending = self.num_pending, 0
        return done

    def new_cpu_locked_tensor(self, num_elements, like):
        FileHandle.pinned.append(torch.empty(int(num_elements), dtype=like.dtype))
        return FileHandle.pinned[-1]

    def free_cpu_locked_tensor(self, tensor):
        FileHandle.pinned = [one for one in FileHandle.pinned if one is not tensor]

    def is_pinned(self, tensor):
        return any(0 <= tensor.data_ptr() - one.data_ptr() < one.nbytes for one in FileHandle.pinned)


def _bytes(tensor):
    return tensor.detach().view(-1).view(torch.uint8).numpy()


# large enough that the halves of its larger matrices (over 1 MiB) are swapped, while the others are not
make_parts = partial(test_zero.make_parts, num_layers=1, hidden_size=384)


def run_on_disk(function, folder, *args):
    """On a rank: a function of `test_zero`, with a larger model, files for memory and the stand-in for the operator."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    parallel = {"offload_device": "nvme", "offload_dir": str(folder / "swap")}
    plain_config = test_zero.make_config

    def make_config(strategy, folder, *args, **keys):
        return plain_config(strategy, folder, *args, **{**keys, "parallel": parallel})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: True)
        patch.setattr(AsyncIOBuilder, "load", lambda self, verbose=False: types.SimpleNamespace(aio_handle=FileHandle))
        patch.setattr(test_zero, "make_parts", make_parts)
        patch.setattr(test_zero, "make_config", make_config)
        result = getattr(test_zero, function)("ZeroInf", folder, *args)
    assert min(FileHandle.num_reads, FileHandle.num_writes) > 10
    return result


def test_losses_and_gradients_are_those_of_one_process(tmp_path):
    options = {"clip_grad": 0.3}
    figures = ranks(2).run(run_on_disk, "compare", tmp_path, [4] * 3, options, {"dropout": 0.1})[0]
    assert figures["gradient"] <= test_zero.GRADIENT_BOUND * 0.3
    assert figures["loss"] <= test_zero.LOSS_BOUND
    assert list((tmp_path / "swap" / "zero_stage_3").rglob("*.swp"))


def test_a_fresh_engine_goes_on_bitwise(tmp_path):
    ranks(2).run(run_on_disk, "go_on", tmp_path, "fp32")


def ask_for_nvme(folder):
    parallel = {"offload_device": "nvme", "offload_dir": str(folder / "swap")}
    with join_processes(torch.device("cpu"), TIMEOUT_S, needs_group=True) as processes:
        config = test_zero.make_config("ZeroInf", folder, parallel=parallel)
        Zero(make_parts(), config, Layout("ZeroInf", data=2), processes)


def test_without_its_operator_it_is_refused(tmp_path):
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if AsyncIOBuilder().is_compatible():
        pytest.skip("libaio is here")
    with pytest.raises(RanksFailed) as failure:
        ranks(2).run(ask_for_nvme, tmp_path)
    assert any(isinstance(error, EngineError) and "libaio" in str(error) for error in failure.value.errors.values())


def test_a_build_that_was_ended_is_not_waited_for(tmp_path, monkeypatch):
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: True)
    monkeypatch.setattr(AsyncIOBuilder, "load", lambda self, verbose=False: None)
    monkeypatch.setattr("shutil.which", lambda tool: tool)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "builds"))
    prepare_nvme(tmp_path / "swap", Processes())
    lock = next((tmp_path / "builds").rglob("async_io")) / "lock"
    lock.touch()
    with pytest.raises(EngineError, match="under way, or was ended"):
        prepare_nvme(tmp_path / "swap", Processes())
    lock.unlink()
    monkeypatch.setattr("shutil.which", lambda tool: None if tool == "ninja" else tool)
    with pytest.raises(EngineError, match="ninja not found"):
        prepare_nvme(tmp_path / "swap", Processes())
