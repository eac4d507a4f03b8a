"""From token stores of molecules to batches of an encoder-decoder: augmentation, masking, padding, order, resume.

A batch is a dict of int64 arrays: `encoder_ids` (B, S) = begin, source, end; `decoder_ids` (B, T) = begin, target;
`labels` (B, T) = target, end; `indices` (N,) the numbers of all N molecules of the batch in the store, of which the
arrays hold the rows of this process (its share; without one: all of them). Padding is `pad_id` everywhere.
Everything random is a pure function of (seed, epoch, molecule): see `biokit.data.masking`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from biokit.config import DataConfig
from biokit.data import masking
from biokit.data.batching import Indices, plan_epoch
from biokit.data.indexed import TokenStore, pad_rows, sequence_numbers
from biokit.data.workers import OrderedWorkers
from biokit.errors import ConfigError, DataError, StoreError

Ints = NDArray[np.integer]
Ragged = tuple[Ints, NDArray[np.int64]]
Batch = dict[str, NDArray[np.int64]]
LoaderState = dict[str, int]

_CHUNK = 16_384  # molecules whose masks are drawn at once while an epoch is planned; stays in the cache


class Tokenizer(Protocol):
    """What the loader needs of `biokit.tokenizers.SmilesTokenizer`."""

    @property
    def pad_id(self) -> int: ...
    @property
    def unknown_id(self) -> int: ...
    @property
    def begin_id(self) -> int: ...
    @property
    def end_id(self) -> int: ...
    @property
    def mask_id(self) -> int: ...
    @property
    def chem_start(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def hash(self) -> str: ...
    def encode_batch(self, smiles: list[str]) -> Ragged: ...
    def decode(self, ids: Any) -> str: ...


def store_prefixes(store_dir: str | Path, part: str) -> tuple[str, str]:
    """Prefixes of the token store and of the store of cached molecules of a part (train, val, test)."""
    return str(Path(store_dir) / part), str(Path(store_dir) / f"{part}_molecules")


def open_part(store_dir: str | Path, part: str, data: DataConfig) -> tuple[TokenStore, TokenStore | None]:
    """The token store of a part, and its cached molecules where the task needs them and they were stored.

    Raises:
        StoreError: a store that is missing or not what its checksums say.
    """
    ids_prefix, molecules_prefix = store_prefixes(store_dir, part)
    store = TokenStore.open(ids_prefix)
    needed = data.task != "mask" and not data.pool and Path(f"{molecules_prefix}.idx").exists()
    return store, TokenStore.open(molecules_prefix) if needed else None


class MoleculeLoader:
    """Batches of molecules, for ever or for one epoch.

    Args:
        store: one document a molecule: canonical SMILES first, then its pool of random ones.
        mols: cached molecules (`Mol.ToBinary`), document for document, or None.
        tokenizer: ids of special tokens; encodes random SMILES that are made on the way.
        data: task, masking, buckets, token budget, workers.
        batch_size: molecules in a global batch, unless `data.max_tokens` is set.
        share: number of rows of a batch -> those that this process makes; where there is none it makes the first.

    Raises:
        StoreError: stores that do not fit the tokenizer, the configuration or one another.
        ConfigError: values that cannot work together.
    """

    def __init__(
        self,
        store: TokenStore,
        mols: TokenStore | None,
        tokenizer: Tokenizer,
        data: DataConfig,
        seed: int,
        batch_size: int,
        share: Callable[[int], slice] | None = None,
    ) -> None:
        if data.task != "aug" and data.mask_scheme == "span":
            masking.poisson_table(data.span_lambda)
        _check_stores(store, mols, tokenizer, data)
        self.store, self.data, self.seed, self.batch_size = store, data, seed, batch_size
        self._maker = _BatchMaker(store, mols, tokenizer, data, seed, share)
        self._planned: tuple[int, list[Indices]] | None = None

    def __len__(self) -> int:
        """Molecules in an epoch."""
        return len(self.store)

    def plan(self, epoch: int) -> list[Indices]:
        """The molecules of each batch of an epoch."""
        if self._planned is None or self._planned[0] != epoch:
            encoder, decoder = self._maker.planned_lengths(epoch)
            by_tokens = self.data.max_tokens > 0
            plan = plan_epoch(
                decoder,
                self.seed,
                epoch,
                batch_size=0 if by_tokens else self.batch_size,
                max_tokens=self.data.max_tokens,
                length_buckets=self.data.length_buckets,
                encoder_lengths=encoder,
            )
            self._planned = (epoch, plan)
        return self._planned[1]

    def batches(self, state: LoaderState | None = None) -> Generator[tuple[Batch, LoaderState]]:
        """Batches without end, each with the position after it; giving that position back goes on from there.

        Args:
            state: {"epoch": e, "batch": b}, plain numbers; None: the beginning.

        Raises:
            DataError: an empty store, or a position that does not exist.
        """
        if not len(self.store):
            raise DataError(f"batches of {self.store.prefix}", "it holds no molecule", "Check the split")
        start = _checked_state(state)
        if start["batch"] > len(self.plan(start["epoch"])):
            found = f"epoch {start['epoch']} has {len(self.plan(start['epoch']))} batches"
            raise DataError(f"loader state {state}", found, "Resume with the data and batch size that made it")
        return self._run(start)

    def epoch(self, epoch: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, in this process. The same epoch is the same batches: for evaluation."""
        for indices in self.plan(epoch) if len(self.store) else []:
            yield self._maker.make(epoch, indices)

    def _run(self, start: LoaderState) -> Generator[tuple[Batch, LoaderState]]:
        if not self.data.num_workers:
            for epoch, indices, after in self._tasks(start):
                yield self._maker.make(epoch, indices), after
            return
        tasks = ((epoch, indices, after) for epoch, indices, after in self._tasks(start))
        what = f"batches of {self.store.prefix}"
        with OrderedWorkers(self._maker.make_with_state, self.data.num_workers, what) as workers:
            yield from workers.run(tasks)

    def _tasks(self, start: LoaderState) -> Iterator[tuple[int, Indices, LoaderState]]:
        epoch, batch = start["epoch"], start["batch"]
        while True:
            plan = self.plan(epoch)
            for number in range(batch, len(plan)):
                last = number + 1 == len(plan)
                after = {"epoch": epoch + 1, "batch": 0} if last else {"epoch": epoch, "batch": number + 1}
                yield epoch, plan[number], after
            epoch, batch = epoch + 1, 0


class _BatchMaker:
    """Makes any batch from its epoch and molecules; what a worker process holds."""

    def __init__(
        self,
        store: TokenStore,
        mols: TokenStore | None,
        tokenizer: Tokenizer,
        data: DataConfig,
        seed: int,
        share: Callable[[int], slice] | None,
    ) -> None:
        self.share = share
        self.store, self.mols, self.tokenizer, self.data, self.seed = store, mols, tokenizer, data, seed
        self.has_pool = store.num_sequences > len(store)
        self.masks, self.augments = data.task != "aug", data.task != "mask"

    def make_with_state(self, epoch: int, indices: Indices, after: LoaderState) -> tuple[Batch, LoaderState]:
        return self.make(epoch, indices), after

    def make(self, epoch: int, batch_indices: Indices) -> Batch:
        indices = batch_indices
        if self.share is not None:
            own = self.share(len(batch_indices))
            indices = batch_indices[own] if own.start < own.stop else batch_indices[:1]
        source, target = self._sides(epoch, indices)
        if self.masks:
            source = self._mask(source, epoch, indices)
        encoder_ids, _ = self._padded(source)
        target_ids, ends = self._padded(target)
        decoder_ids = target_ids[:, :-1].copy()
        shorter = np.flatnonzero(ends < decoder_ids.shape[1])
        decoder_ids[shorter, ends[shorter]] = self.tokenizer.pad_id
        labels = np.ascontiguousarray(target_ids[:, 1:])
        return {
            "encoder_ids": encoder_ids,
            "decoder_ids": decoder_ids,
            "labels": labels,
            "indices": np.asarray(batch_indices, dtype=np.int64),
        }

    def planned_lengths(self, epoch: int) -> tuple[Ints, Ints]:
        """Tokens of each molecule on the encoder and the decoder side, begin and end included.

        Exact for the task `mask` and for pools. Random SMILES that are made on the way are planned at their
        canonical length, or, under a token budget, at the length beyond which they are not used.
        """
        indices = np.arange(len(self.store))
        source_lengths: Ints
        if self.augments and self.has_pool:
            source, target = self._pool_picks(epoch, indices)
            source_lengths = self.store.sequence_lengths[source].astype(np.int64)
            target_lengths = self.store.sequence_lengths[target].astype(np.int64)
        else:
            target_lengths = np.asarray(self._longest(indices) if self.augments else self.store.lengths, np.int64)
            source_lengths = target_lengths
            source = sequence_numbers(self.store, indices)
        exact = self.has_pool or not self.augments
        if self.masks and self.data.mask_scheme == "span" and exact:
            source_lengths = self._masked_lengths(source_lengths, source, epoch)
        return source_lengths + 2, target_lengths + 2

    def _masked_lengths(self, lengths: Ints, numbers: Ints, epoch: int) -> Ints:
        chem_start = self.tokenizer.chem_start
        protected = bool(len(self.store.ids)) and bool((self.store.ids < chem_start).any())
        out = np.empty(len(lengths), dtype=np.int64)
        for start in range(0, len(lengths), _CHUNK):
            rows = slice(start, min(start + _CHUNK, len(lengths)))
            flat = self.store.gather(numbers[rows])[0] if protected else None
            offsets = np.concatenate([[0], np.cumsum(lengths[rows])])
            keys = masking.mask_keys(self.seed, epoch, np.arange(rows.start, rows.stop))
            out[rows] = masking.masked_lengths(
                offsets,
                keys,
                prob=self.data.mask_prob,
                lam=self.data.span_lambda,
                max_length=self.data.max_length - 2,
                flat=flat,
                chem_start=chem_start,
            )
        return out

    def _mask(self, source: Ragged, epoch: int, indices: Indices) -> Ragged:
        data, ids = self.data, self.tokenizer
        made_now = self.augments and not self.has_pool
        if data.mask_scheme == "span":
            return masking.mask_spans(
                *source,
                masking.mask_keys(self.seed, epoch, indices),
                mask_id=ids.mask_id,
                prob=data.mask_prob,
                lam=data.span_lambda,
                chem_start=ids.chem_start,
                max_length=self._longest(indices, capped=True) if made_now else data.max_length - 2,
            )
        return masking.mask_replace(
            *source,
            masking.mask_keys(self.seed, epoch, indices),
            mask_id=ids.mask_id,
            chem_start=ids.chem_start,
            vocab_size=ids.vocab_size,
            prob=data.mask_prob,
            show_mask_token_prob=data.show_mask_token_prob,
        )

    def _padded(self, rows: Ragged) -> tuple[NDArray[np.int64], Ints]:
        """(N, longest + 2): begin, ids, end, padding; and the column of each end."""
        flat, offsets = rows
        ends = np.diff(offsets) + 1
        out = pad_rows(flat, offsets, self.tokenizer.pad_id, width=int(ends.max()) + 1, shift=1)
        out[:, 0] = self.tokenizer.begin_id
        out[np.arange(len(out)), ends] = self.tokenizer.end_id
        return out, ends

    def _sides(self, epoch: int, indices: Indices) -> tuple[Ragged, Ragged]:
        """Source and target ids of molecules, before masking."""
        if self.augments and self.has_pool:
            source, target = self._pool_picks(epoch, indices)
            return self.store.gather(source), self.store.gather(target)
        canonical = self.store.gather(sequence_numbers(self.store, indices))
        if not self.augments:
            return canonical, canonical
        return self._random_sides(epoch, indices, canonical)

    def _pool_picks(self, epoch: int, indices: Indices) -> tuple[Ints, Ints]:
        """Sequence numbers of one random SMILES a side, drawn independently; the canonical one where there is none."""
        firsts = self.store.document_starts[indices]
        num_random = self.store.document_starts[indices + 1] - firsts - 1
        picks = []
        for stream in (masking.PICK_ENCODER, masking.PICK_DECODER):
            upper = masking.sample_keys(self.seed, epoch, indices, stream) >> np.uint64(32)
            drawn = ((upper * num_random.astype(np.uint64)) >> np.uint64(32)).astype(np.int64)
            picks.append(firsts + np.where(num_random > 0, 1 + drawn, 0))
        return picks[0], picks[1]

    def _random_sides(self, epoch: int, indices: Indices, canonical: Ragged) -> tuple[Ragged, Ragged]:
        """Two random SMILES a molecule, made now; unknown tokens, or too long: the canonical one instead."""
        from biokit.chem.molecules import mol_to_bytes, random_smiles

        flat, offsets = canonical
        seeds = masking.sample_keys(self.seed, epoch, indices, masking.AUGMENT).tolist()
        strings: list[str] = []
        for row, (index, seed) in enumerate(zip(indices.tolist(), seeds, strict=True)):
            if self.mols is not None:
                molecule = self.mols.sequence(index).tobytes()
            else:
                molecule = mol_to_bytes(self.tokenizer.decode(flat[offsets[row] : offsets[row + 1]]))
            strings += random_smiles(molecule, 2, seed >> 1)
        ids, bounds = self.tokenizer.encode_batch(strings)
        lengths = np.diff(bounds)
        odd = np.concatenate([[0], np.cumsum(ids < self.tokenizer.chem_start)])
        usable = (odd[bounds[1:]] == odd[bounds[:-1]]) & (lengths > 0)
        usable &= lengths <= np.repeat(self._longest(indices, capped=True), 2)
        pool, starts = np.concatenate([ids, flat]), np.append(bounds[:-1], 0)
        sides = []
        for side in (0, 1):
            good = usable[side::2]
            begins = np.where(good, starts[side:-1:2], len(ids) + offsets[:-1])
            sizes = np.where(good, lengths[side::2], np.diff(offsets))
            out = np.concatenate([[0], np.cumsum(sizes)])
            sides.append((pool[np.repeat(begins - out[:-1], sizes) + np.arange(out[-1])], out))
        return sides[0], sides[1]

    def _longest(self, indices: Indices, capped: bool = False) -> Ints:
        """Tokens at which a random SMILES is planned (or `capped`: up to which it is used), per molecule."""
        lengths = self.store.lengths[indices].astype(np.int64)
        limit = self.data.max_length - 2
        if self.data.max_tokens:
            return np.minimum(lengths + lengths // 2 + 4, limit)
        return np.full_like(lengths, limit) if capped else lengths


def _checked_state(state: LoaderState | None) -> LoaderState:
    if state is None:
        return {"epoch": 0, "batch": 0}
    valid = isinstance(state, dict) and set(state) == {"epoch", "batch"}
    if not valid or any(type(value) is not int or value < 0 for value in state.values()):
        raise DataError(f"loader state {state!r}", "it is not a position", 'Give {"epoch": e, "batch": b}, from 0')
    return state


def _check_stores(store: TokenStore, mols: TokenStore | None, tokenizer: Tokenizer, data: DataConfig) -> None:
    asked, again = f"token store {store.prefix}", "Run `biokit preprocess` again with this configuration"
    noted = store.metadata.get("vocab_hash")
    if noted is not None and noted != tokenizer.hash:
        raise StoreError(
            asked, "it was written with another vocabulary", "Give data.vocab_file the one it was made with"
        )
    if noted is None and len(store.ids) and int(store.ids.max()) >= tokenizer.vocab_size:
        found = f"it holds id {int(store.ids.max())}, the vocabulary ends at {tokenizer.vocab_size - 1}"
        raise StoreError(asked, found, "Give the vocabulary it was made with")
    empty = np.flatnonzero(np.diff(store.document_starts) == 0)
    if len(empty):
        raise StoreError(asked, f"molecule {empty[0]} has no sequence", again)
    longest = int(store.sequence_lengths.max(initial=0)) + 2
    if longest > data.max_length:
        found = f"a sequence has {longest} tokens, begin and end included"
        raise StoreError(asked, found, f"Raise data.max_length (now {data.max_length}), or preprocess again")
    if mols is not None and (len(mols) != len(store) or mols.dtype != np.uint8):
        found = f"{len(mols)} molecules ({mols.dtype}) beside {len(store)} documents"
        raise StoreError(f"cached molecules {mols.prefix}", found, again)
    if mols is not None and mols.metadata.get("ids_sha256", store.bin_sha256) != store.bin_sha256:
        raise StoreError(f"cached molecules {mols.prefix}", "they were made with another token store", again)
    if data.max_tokens and longest > data.max_tokens:
        raise ConfigError(f"data.max_tokens={data.max_tokens}", f"a molecule has {longest} tokens", "Raise it")
