"""A training of a second that uses everything that carries state; shared by the tests of training and its faults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from biokit.config import RunConfig, config_from_dict

SMILES = [
    "CCO", "CCN", "c1ccccc1", "CC(=O)O", "CC(C)O", "c1ccncc1", "CCOC(C)=O", "CC(=O)Nc1ccc(O)cc1", "C1CCCCC1",
    "CC(C)Cc1ccc(cc1)C(C)C(=O)O", "Cn1cnc2c1c(=O)n(C)c(=O)n2C", "O=C1CCCN1", "CCCCCC", "c1ccc2ccccc2c1", "OCC(O)CO",
    "N#Cc1ccccc1", "CS(C)=O", "ClCCl", "BrCCBr", "FC(F)F", "CC#C", "C=CC=C", "O=Cc1ccco1", "c1ccsc1",
]  # fmt: skip


def write_smiles(folder: Path) -> Path:
    """The molecules above as a .smi file."""
    path = folder / "molecules.smi"
    path.write_text("\n".join(SMILES) + "\n")
    return path


def small_config(folder: Path, run: str = "run", **train: Any) -> RunConfig:
    """A tiny model on 24 molecules, with dropout, random SMILES, masks and accumulation."""
    return config_from_dict(
        {
            "run_dir": str(folder / run),
            "data": {
                "dataset_path": str(write_smiles(folder)),
                "task": "mask_aug",
                "max_length": 60,
                "split_ratio": "70,20,10",
            },
            "model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "dropout": 0.1},
            "train": {
                "train_iters": 6,
                "micro_batch_size": 4,
                "global_batch_size": 8,
                "num_threads": 1,
                "progress": False,
                "tensorboard": False,
                **train,
            },
        }
    )
