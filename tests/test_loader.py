"""The loader: what a batch holds, every molecule once, resume, purity, random SMILES, worker processes."""

import json
import os
import signal
import sys
from functools import partial
from itertools import islice

import numpy as np
import psutil
import pytest

from biokit.chem.molecules import canonicalize, mol_to_bytes
from biokit.config import DataConfig
from biokit.data.batching import rank_rows
from biokit.data.indexed import StoreWriter, TokenStore
from biokit.data.molecules import MoleculeLoader, open_part, store_prefixes
from biokit.data.workers import OrderedWorkers
from biokit.errors import ConfigError, DataError, StoreError
from biokit.tokenizers import SmilesTokenizer

TOKENIZER = SmilesTokenizer.build(["CNOPSFIBrClcnos=#-+()123456[nH][C@H][C@@H][N+][O-]/\\"])
PAD, UNKNOWN, BEGIN, END, MASK = 0, 1, 2, 3, 4
SMILES = ["CC(=O)Oc1ccccc1C(=O)O", "c1ccc2[nH]ccc2c1", "CCO", "C", "CC(C)Cc1ccc(cc1)C(C)C(=O)O", "OCC1CCCN1"]


def make_store(tmp_path, documents, name="train", metadata=None):
    """Documents are lists of SMILES; cached molecules beside."""
    ids_prefix, molecules_prefix = store_prefixes(tmp_path, name)
    with StoreWriter(ids_prefix, np.uint16, {"vocab_hash": TOKENIZER.hash} if metadata is None else metadata) as ids:
        for document in documents:
            ids.add_document([TOKENIZER.encode(smiles) for smiles in document])
    return TokenStore.open(ids_prefix), molecules_prefix


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    rng = np.random.default_rng(0)
    documents = [["".join(rng.choice(list("CNOcno=()123"), rng.integers(1, 40)))] for _ in range(203)]
    return make_store(tmp_path_factory.mktemp("many"), documents)[0]


def loader(store, batch_size=16, seed=1, mols=None, share=None, **settings):
    return MoleculeLoader(store, mols, TOKENIZER, DataConfig(**settings), seed, batch_size, share)


def same(first, second):
    return first.keys() == second.keys() and all(np.array_equal(first[key], second[key]) for key in first)


def unpad(row):
    return row[row != PAD].tolist()


def one_epoch(made):
    out = []
    for batch, state in made.batches():
        if state["epoch"] == 1 and state["batch"] > 0:
            return out
        out.append((batch, state))
        if state["epoch"] == 1:
            return out
    return out


@pytest.mark.parametrize("task", ["mask", "aug", "mask_aug"])
def test_what_a_batch_holds(tmp_path, task):
    store, _ = make_store(tmp_path, [[s, *(s[::-1] for _ in range(2))] for s in SMILES])
    for batch in loader(store, 4, task=task).epoch():
        assert set(batch) == {"encoder_ids", "decoder_ids", "labels", "indices"}
        assert all(array.dtype == np.int64 and array.flags["C_CONTIGUOUS"] for array in batch.values())
        assert batch["decoder_ids"].shape == batch["labels"].shape
        for row, index in enumerate(batch["indices"].tolist()):
            texts = [store.sequence(index, k).tolist() for k in range(3)]
            encoder, decoder, labels = (unpad(batch[key][row]) for key in ("encoder_ids", "decoder_ids", "labels"))
            assert encoder[0] == BEGIN and encoder[-1] == END
            assert decoder[0] == BEGIN and labels[-1] == END and decoder[1:] == labels[:-1]
            assert labels[:-1] in (texts[:1] if task == "mask" else texts[1:])
            if task == "aug":
                assert encoder[1:-1] in texts[1:]
            assert MASK not in labels
        for key in ("encoder_ids", "decoder_ids", "labels"):
            assert (batch[key] != PAD).any(axis=0).all()  # as narrow as its longest row
            assert (np.diff((batch[key] != PAD).astype(int), axis=1) <= 0).all()  # padding stands at the end


def test_only_masks_differ_between_the_sides(many):
    masks = tokens = 0
    for batch in loader(many).epoch():
        for row in range(len(batch["indices"])):
            source, target = unpad(batch["encoder_ids"][row])[1:-1], unpad(batch["labels"][row])[:-1]
            remaining = iter(target)
            assert all(token in remaining for token in source if token != MASK)  # a subsequence
            masks, tokens = masks + source.count(MASK), tokens + len(target)
    assert 0.05 < masks / tokens < 0.15


def test_replace_scheme_keeps_places(many):
    changed = 0
    for batch in loader(many, mask_scheme="replace", mask_prob=0.3, show_mask_token_prob=0.5).epoch():
        source, target = batch["encoder_ids"][:, 1:], batch["labels"]
        assert source.shape == target.shape
        changed += (source != target).sum()
        assert ((source >= TOKENIZER.chem_start) | (source == MASK) | (source == target)).all()
    assert changed


@pytest.mark.parametrize("settings", [{}, {"length_buckets": False}, {"max_tokens": 512}])
def test_every_molecule_once_an_epoch(many, settings):
    made = loader(many, **settings)
    for epoch in range(2):
        seen = np.concatenate([batch["indices"] for batch in made.epoch(epoch)])
        assert np.array_equal(np.sort(seen), np.arange(len(many)))
    run = one_epoch(made)
    assert np.array_equal(np.sort(np.concatenate([b["indices"] for b, _ in run])), np.arange(len(many)))
    assert run[-1][1] == {"epoch": 1, "batch": 0}
    if "max_tokens" in settings:
        assert all(b[k].size <= 512 for b, _ in run for k in ("encoder_ids", "labels"))


def test_resume_from_every_state_is_identical(many):
    run = list(islice(loader(many).batches(), 2 * 13 + 3))  # two epochs and a bit
    for number, (_, state) in enumerate(run[:-1]):
        state = json.loads(json.dumps(state))
        for (batch, position), (again, there) in zip(run[number + 1 :], loader(many).batches(state), strict=False):
            assert position == there and same(batch, again)


def test_running_on_is_epoch_after_epoch(many):
    made = loader(many)
    expected = [batch for epoch in range(3) for batch in made.epoch(epoch)]
    run = [batch for batch, _ in islice(loader(many).batches(), len(expected))]
    assert all(same(*pair) for pair in zip(run, expected, strict=True))


def test_the_end_of_an_epoch_may_be_written_either_way(many):
    first, _ = next(loader(many).batches({"epoch": 0, "batch": 13}))
    other, _ = next(loader(many).batches({"epoch": 1, "batch": 0}))
    assert same(first, other)


@pytest.mark.parametrize(
    "state",
    [{"epoch": 0}, {"epoch": 0, "batch": 14}, {"epoch": -1, "batch": 0}, [0, 0], {"epoch": 0, "batch": 1.0}],
)
def test_positions_that_do_not_exist_are_refused(many, state):
    with pytest.raises(DataError, match="loader state"):
        loader(many).batches(state)


def samples(made, epoch=0):
    """Each molecule's own ids on both sides, whatever batch it stood in."""
    return {
        int(index): (unpad(batch["encoder_ids"][row]), unpad(batch["labels"][row]))
        for batch in made.epoch(epoch)
        for row, index in enumerate(batch["indices"])
    }


def test_a_sample_does_not_depend_on_its_batch(many):
    for settings in ({}, {"mask_scheme": "replace"}):
        whole = samples(loader(many, 203, **settings))
        assert samples(loader(many, 7, **settings)) == whole
        assert samples(loader(many, 7, length_buckets=False, **settings)) == whole
        assert samples(loader(many, max_tokens=300, max_length=300, **settings)) == whole
        assert samples(loader(many, 203, **settings), epoch=1) != whole
        assert samples(loader(many, 203, seed=2, **settings)) != whole


def test_shares_of_the_ranks_concatenate_to_the_global_batch(many):
    parts = [loader(many, share=partial(rank_rows, micro_batch_size=2, rank=rank, num_ranks=3)) for rank in range(3)]
    for batch, *shares in zip(loader(many).epoch(), *(part.epoch() for part in parts), strict=True):
        rows = []
        for rank, share in enumerate(shares):
            own = rank_rows(len(batch["indices"]), 2, rank, 3)
            assert np.array_equal(share["indices"], batch["indices"])
            assert len(share["labels"]) == max(1, own.stop - own.start)
            rows += [row[row != 0].tolist() for row in share["encoder_ids"][: own.stop - own.start]]
        assert rows == [row[row != 0].tolist() for row in batch["encoder_ids"]]


def test_planned_lengths_are_the_real_ones(many, tmp_path):
    pools, _ = make_store(tmp_path, [[s, s + "C", s + "CC", s + "CCC"] for s in SMILES * 5])
    odd, _ = make_store(tmp_path, [["CCOCCN?CCC", "C?CCCCCC"] for _ in range(40)], name="odd")
    for store in (many, pools, odd):
        for task in ("mask", "mask_aug", "aug"):
            made = loader(store, task=task, mask_prob=0.4)
            if task != "mask" and store is many:
                continue
            encoder, decoder = made._maker.planned_lengths(3)
            for index, (source, labels) in samples(made, 3).items():
                assert (len(source), len(labels) + 1) == (encoder[index], decoder[index])


def test_pools_are_drawn_from_independently(tmp_path):
    store, _ = make_store(tmp_path, [["C", "CC", "CCC"] for _ in range(2000)] + [["N"]])
    lengths = np.array([(len(s) - 2, len(t) - 1) for s, t in samples(loader(store, task="aug"), 0).values()])
    drawn = lengths[(lengths > 1).all(axis=1)]
    assert len(drawn) == 2000  # the molecule without a pool keeps its canonical SMILES
    counts = np.bincount(2 * (drawn[:, 0] - 2) + drawn[:, 1] - 2, minlength=4)
    assert np.abs(counts - 500).max() < 5 * np.sqrt(2000 * 0.25 * 0.75)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    canonical = [canonicalize(s) for s in SMILES]
    store, molecules_prefix = make_store(folder, [[s] for s in canonical])
    with StoreWriter(molecules_prefix, np.uint8) as writer:
        for smiles in canonical:
            writer.add_document([np.frombuffer(mol_to_bytes(smiles), np.uint8)])
    return folder, canonical, store, TokenStore.open(molecules_prefix)


@pytest.mark.parametrize("task", ["aug", "mask_aug"])
def test_random_smiles_are_the_same_molecule(real, task):
    _, canonical, store, mols = real
    made = loader(store, 3, mols=mols, task=task)
    seen = set()
    for epoch in range(6):
        for index, (source, labels) in samples(made, epoch).items():
            target = TOKENIZER.decode(labels)
            assert canonicalize(target) == canonical[index]
            if task == "aug":
                assert canonicalize(TOKENIZER.decode(source)) == canonical[index]
                seen.add((index, TOKENIZER.decode(source) == target))
    assert task != "aug" or {(0, False), (4, False)} <= seen  # two draws, not one
    uncached = loader(store, 2, task=task)
    assert samples(uncached, 0).keys() == samples(made, 0).keys()
    assert samples(made, 0) == samples(loader(store, 5, mols=mols, task=task), 0)
    assert samples(made, 0) != samples(made, 1)


def test_unusable_random_smiles_fall_back_to_the_canonical_one(real, monkeypatch):
    _, canonical, store, mols = real
    for texts in (["?", "C" * 999], ["", "Q"]):
        monkeypatch.setattr("biokit.chem.molecules.random_smiles", lambda *_, texts=texts: texts)
        for index, (source, labels) in samples(loader(store, 4, mols=mols, task="aug")).items():
            assert TOKENIZER.decode(source) == TOKENIZER.decode(labels) == canonical[index]
    monkeypatch.setattr("biokit.chem.molecules.random_smiles", lambda *_: ["CCN", "?"])
    for index, (source, labels) in samples(loader(store, 4, mols=mols, task="aug")).items():
        assert (TOKENIZER.decode(source), TOKENIZER.decode(labels)) == ("CCN", canonical[index])


def test_budget_holds_for_random_smiles(real):
    _, _, store, mols = real
    for batch in loader(
        store, mols=mols, task="mask_aug", max_tokens=60, max_length=60, mask_prob=0.9, span_lambda=0.1
    ).epoch():
        assert max(batch["encoder_ids"].size, batch["labels"].size) <= 60


def test_open_part(real):
    folder, _, _, _ = real
    assert open_part(folder, "train", DataConfig())[1] is None
    assert len(open_part(folder, "train", DataConfig(task="aug"))[1]) == len(SMILES)
    assert open_part(folder, "train", DataConfig(task="aug", pool=3))[1] is None
    with pytest.raises(StoreError, match=r"val\.json"):
        open_part(folder, "val", DataConfig())


def test_stores_that_do_not_fit_are_refused(tmp_path, many, real):
    mols = real[3]
    for documents, metadata, settings, match in (
        ([["CC"]], {"vocab_hash": "else"}, {}, "another vocabulary"),
        ([["CC"], []], None, {}, "molecule 1 has no sequence"),
        ([["CCCCC"]], None, {"max_length": 6}, "has 7 tokens"),
        ([["CCCCC"]], None, {"max_tokens": 6, "max_length": 10}, "has 7 tokens"),
    ):
        store, _ = make_store(tmp_path, documents, metadata=metadata)
        with pytest.raises((StoreError, ConfigError), match=match):
            loader(store, **settings)
    with StoreWriter(tmp_path / "other", np.uint16) as writer:
        writer.add_document([np.array([TOKENIZER.vocab_size])])
    with pytest.raises(StoreError, match="the vocabulary ends at 522"):
        loader(TokenStore.open(tmp_path / "other"))
    with pytest.raises(StoreError, match=r"6 molecules \(uint8\) beside 203"):
        loader(many, mols=mols)
    with pytest.raises(ConfigError, match="span_lambda"):
        loader(many, span_lambda=0.0)


def test_an_empty_store(tmp_path):
    made = loader(make_store(tmp_path, [])[0])
    assert list(made.epoch()) == [] and len(made) == 0
    with pytest.raises(DataError, match="holds no molecule"):
        made.batches()


def test_workers_give_the_same_batches_and_leave_nothing(many, real):
    _, _, store, mols = real
    for made, settings in ((many, {}), (store, {"mols": mols, "task": "mask_aug"})):
        alone = list(islice(loader(made, 4, **settings).batches({"epoch": 0, "batch": 1}), 60))
        shared = loader(made, 4, num_workers=2, **settings).batches({"epoch": 0, "batch": 1})
        for (batch, state), (other, there) in zip(alone, shared, strict=False):
            assert state == there and same(batch, other)
        shared.close()
    process = psutil.Process()
    before = process.num_fds(), children(process)
    for _ in range(3):
        iterator = loader(many, 4, num_workers=2).batches()
        next(iterator)
        del iterator
    assert (process.num_fds(), children(process)) == before


def children(process):
    return sorted(child.pid for child in process.children() if "resource_tracker" not in " ".join(child.cmdline()))


def test_opening_and_closing_many_times_leaks_nothing(many):
    before = psutil.Process().num_fds()
    for _ in range(200):
        next(loader(TokenStore.open(many.prefix)).batches())
    assert psutil.Process().num_fds() <= before


def answer(number):
    if number == 3:
        raise ValueError("three")
    if number == 4:
        raise DataError("task 4", "it is bad", "Mend it")
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 6:
        sys.exit(7)
    return np.full(30_000, number)


@pytest.mark.parametrize(
    ("bad", "match"),
    [(3, "raised ValueError.*three"), (4, "task 4: it is bad"), (5, "killed by SIGKILL"), (6, "exit code 7")],
)
def test_a_worker_that_fails_is_an_error_in_its_place(bad, match):
    got = []
    with pytest.raises(DataError, match=match), OrderedWorkers(answer, 2, "the work") as workers:
        for result in workers.run((n,) for n in (0, 1, 2, bad, 7, 8)):
            got.append(int(result[0]))
    assert got == [0, 1, 2]


def test_large_tasks_and_results_do_not_block():
    with OrderedWorkers(np.negative, 2, "the work") as workers:
        results = list(workers.run((np.full(200_000, n),) for n in range(20)))
    assert [int(result[0]) for result in results] == [-n for n in range(20)]


def test_a_light_path_imports_little():
    import subprocess

    code = (
        "import sys, biokit.data.molecules, biokit.data.workers\n"
        "print([m for m in ('torch', 'rdkit', 'numba', 'pyarrow', 'pandas', 'tqdm', 'matplotlib') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_cached_molecules_of_another_store_are_refused(tmp_path):
    from biokit.config import DataConfig
    from biokit.data.molecules import MoleculeLoader, open_part
    from biokit.data.preprocess import preprocess
    from biokit.tokenizers import SmilesTokenizer

    for name, smiles in (("a", "CCO\nCCN\nCCC\n"), ("b", "CO\nCN\nCC\n")):
        (tmp_path / f"{name}.smi").write_text(smiles)
        data = DataConfig(dataset_path=str(tmp_path / f"{name}.smi"), split_ratio="100,0,0", task="aug")
        preprocess(data, tmp_path / name, 1, progress=False)
    for suffix in ("bin", "idx", "json"):
        (tmp_path / "b" / f"train_molecules.{suffix}").replace(tmp_path / "a" / f"train_molecules.{suffix}")
    store, mols = open_part(tmp_path / "a", "train", data)
    with pytest.raises(StoreError, match="another token store"):
        MoleculeLoader(store, mols, SmilesTokenizer.packaged(), data, 1, 2)
