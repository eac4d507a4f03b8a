"""From a global batch of arrays to the micro-batches of tensors that one data rank computes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from biokit.data.batching import micro_slices

MOLECULE_KEYS = ("encoder_ids", "decoder_ids", "labels")


def micro_batches(
    batch: Mapping[str, np.ndarray], size: int, pad_id: int, keys: Sequence[str]
) -> Iterator[dict[str, torch.Tensor]]:
    """Cut a global batch into micro-batches of `size` rows, each without columns that are padding only."""
    for rows in micro_slices(len(batch[keys[-1]]), size):
        yield as_tensors({key: trim(batch[key][rows], pad_id) for key in keys}, keys)


def as_tensors(batch: Mapping[str, np.ndarray], keys: Sequence[str] = MOLECULE_KEYS) -> dict[str, torch.Tensor]:
    """The model's arrays of a batch as tensors."""
    return {key: torch.from_numpy(np.ascontiguousarray(batch[key])) for key in keys}


def trim(ids_BT: np.ndarray, pad_id: int) -> np.ndarray:
    """Leave out the columns on the right that hold padding only."""
    used = np.flatnonzero((ids_BT != pad_id).any(axis=0))
    return ids_BT[:, : used[-1] + 1]


def own_micro_batches(
    batch: Mapping[str, np.ndarray], size: int, pad_id: int, keys: Sequence[str], num_rows: int, own: range
) -> list[dict[str, torch.Tensor]]:
    """The micro-batches of one data rank, as many as every other rank has.

    Args:
        batch: the rows of this rank's share (see `MoleculeLoader`); labels under the last of `keys`.
        num_rows: of the global batch.
        own: numbers of this rank's micro-batches in the global batch; those beyond its end are empty: one row whose
            labels are padding.
    """
    num_real = sum(number * size < num_rows for number in own)
    micros = list(micro_batches(batch, size, pad_id, keys))
    empty = {key: ids[:1] for key, ids in micros[0].items()}
    empty[keys[-1]] = torch.full_like(empty[keys[-1]], pad_id)
    return micros[:num_real] + [empty] * (len(own) - num_real)


def count_tokens(micros: Sequence[Mapping[str, torch.Tensor]], pad_id: int, keys: Sequence[str]) -> tuple[int, int]:
    """(labels that count, real tokens of the inputs) over micro-batches, empty ones left out."""
    *inputs, labels = keys
    num_valid = num_tokens = 0
    for micro in micros:
        valid = int((micro[labels] != pad_id).sum())
        num_valid += valid
        num_tokens += sum(int((micro[key] != pad_id).sum()) for key in inputs) if valid else 0
    return num_valid, num_tokens
