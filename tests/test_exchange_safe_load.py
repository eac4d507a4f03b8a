"""Foreign pickles: tensors and plain values are read, everything else is refused before any of it runs."""

import argparse
import os
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from biokit.errors import CheckpointError
from biokit.exchange.safe_load import Inert, load_safely


class Attack:
    """Pickles as a call of `function` with `argument`."""

    def __init__(self, function, argument):
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


def save(path, value, zipped=True):
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return path


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["model", "args", "deep"])
@pytest.mark.parametrize(("function", "name"), [(os.system, "system"), (eval, "eval"), (exec, "exec")])
def test_nothing_of_a_malicious_file_runs(tmp_path, zipped, place, function, name):
    marker = tmp_path / "marker"
    code = f"touch {marker}" if function is os.system else f"__import__('pathlib').Path({str(marker)!r}).touch()"
    attack = Attack(function, code)
    good = {"model": {"a": torch.ones(2)}, "args": argparse.Namespace(n=1)}
    value = {
        "model": {**good, "model": {"a": attack}},
        "args": {**good, "args": argparse.Namespace(n=attack)},
        "deep": {**good, "list": [({"x": attack},)]},
    }[place]
    path = save(tmp_path / "f.pt", value, zipped)
    with pytest.raises(CheckpointError, match=rf"nothing of it has run: it names \S*{name}, which is neither"):
        load_safely(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)  # the attack is a real one
    assert marker.exists()


@pytest.mark.parametrize(
    "value", [{"a": pickle.Pickler}, {"a": subprocess.run}, {"a": random.Random(1)}, {"a": np.array([{}])}]
)
def test_code_and_objects_are_refused(tmp_path, value):
    with pytest.raises(CheckpointError, match="nothing of it has run"):
        load_safely(save(tmp_path / "f.pt", value))


@pytest.mark.parametrize("zipped", [True, False])
def test_what_training_scripts_keep_is_read(tmp_path, zipped):
    value = {
        "args": argparse.Namespace(num_layers=2, params_dtype=torch.float16, lr=0.1),
        "model": {"a": torch.arange(6.0).view(2, 3).bfloat16()},
        "random_rng_state": random.Random(1).getstate(),
        "np_rng_state": np.random.RandomState(1).get_state(),
        "loss": np.float64(1.5),
        "torch_rng_state": torch.get_rng_state(),
    }
    found = load_safely(save(tmp_path / "f.pt", value, zipped))
    assert found["args"] == value["args"]
    assert torch.equal(found["model"]["a"], value["model"]["a"])
    assert found["random_rng_state"] == value["random_rng_state"]
    assert np.array_equal(found["np_rng_state"][1], value["np_rng_state"][1])
    assert found["loss"] == 1.5


def test_the_allow_list_is_not_left_open(tmp_path):
    path = save(tmp_path / "f.pt", {"args": argparse.Namespace()})
    load_safely(path)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


def test_engine_objects_become_inert_without_the_engine(tmp_path):
    """A file with DeepSpeed's loss scaler and slices, written by a process that only pretends to have DeepSpeed."""
    path = tmp_path / "f.pt"
    make = f"""
import sys, types, torch
for name in ("deepspeed", "deepspeed.utils", "deepspeed.utils.tensor_fragment"):
    sys.modules[name] = types.ModuleType(name)
module = sys.modules["deepspeed.utils.tensor_fragment"]
module.fragment_address = type("fragment_address", (), {{"__module__": module.__name__}})
place = module.fragment_address()
place.start, place.numel = 3, 4
torch.save({{"place": place}}, {str(path)!r})
"""
    subprocess.run([sys.executable, "-c", make], check=True)
    place = load_safely(path)["place"]
    assert type(place) is Inert
    assert vars(place) == {"start": 3, "numel": 4}


@pytest.mark.parametrize("zipped", [True, False])
def test_torn_files_are_an_error_that_names_the_file(tmp_path, zipped):
    content = save(tmp_path / "f.pt", {"model": {"a": torch.ones(100)}, "n": [1, "x"]}, zipped).read_bytes()
    rng = random.Random(0)
    bad = tmp_path / "bad.pt"
    refused = 0
    for _ in range(60):
        damaged = bytearray(content[: rng.randrange(len(content))] if rng.random() < 0.5 else content)
        for _ in range(3):
            if damaged:
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        bad.write_bytes(damaged)
        try:
            load_safely(bad)
        except CheckpointError as error:
            refused += "bad.pt" in str(error)
    assert refused > 30  # three bytes among tensor values are not noticed: that is what checksums are for


def test_files_that_hold_no_mapping(tmp_path):
    with pytest.raises(CheckpointError, match="it holds a Tensor, no mapping"):
        load_safely(save(tmp_path / "f.pt", torch.ones(2)))
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_safely(tmp_path / "absent.pt")
