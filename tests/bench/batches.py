"""Cached ids to a masked, padded batch of an encoder-decoder, against Hugging Face's tokenizer and collator.

Ours plans the epoch, gathers, masks spans and pads both sides and the labels. The peer starts from strings, in the
batches of our plan (so its lengths are bucketed too, and planning costs it nothing), masks single tokens with the same
probability and pads one side and its labels.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

from biokit.config import DataConfig
from biokit.data.molecules import MoleculeLoader
from biokit.kernels.smiles_scanner import smiles_regex
from biokit.tokenizers import SmilesTokenizer
from tests.bench import corpora
from tests.bench.timing import Row, compare

BATCH_SIZE, SEED = 128, 1234
WHAT = "cached ids to masked batches of 128, {}"
LEAN = "HF `tokenizers.encode_batch_fast` + collator"
USUAL = "HF tokenizer `__call__` + collator"
CACHED = "HF collator alone, on cached ids"
TARGETS = {LEAN: 15.0, USUAL: 15.0}


def measure(name: str, limit: int = 0, rounds: int = 5) -> list[Row]:
    """Rows of one corpus."""
    smiles = corpora.load_smiles(name, limit)
    if smiles is None:
        return [Row(WHAT.format(name), peer, target=f"at least {least:g}x") for peer, least in TARGETS.items()]
    tokenizer = SmilesTokenizer.packaged()
    with tempfile.TemporaryDirectory() as folder:
        store = corpora.write_store(Path(folder) / "train", tokenizer, list(smiles))
        data = DataConfig(task="mask", max_length=corpora.MAX_LENGTH)
        loader = MoleculeLoader(store, None, tokenizer, data, SEED, BATCH_SIZE)
        batches = [[smiles[index] for index in batch.tolist()] for batch in loader.plan(0)]
        contenders = {WHAT.format(name): _ours(loader)} | _peers(tokenizer, batches)
        return compare(contenders, "molecules", rounds).rows(TARGETS)


def measure_all() -> list[Row]:
    return [row for name in corpora.NAMES for row in measure(name, limit=10_000)]


def _ours(loader: MoleculeLoader) -> Callable[[], int]:
    """An epoch of batches, each time another one, so that it is planned anew."""
    epochs = count(1)
    return lambda: sum(len(batch["encoder_ids"]) for batch in loader.epoch(next(epochs)))


def _peers(tokenizer: SmilesTokenizer, batches: list[list[str]]) -> dict[str, Callable[[], int]]:
    from transformers import DataCollatorForLanguageModeling

    fast = _hugging_face(tokenizer)
    encode = fast.backend_tokenizer.encode_batch_fast
    collate = DataCollatorForLanguageModeling(fast, mlm=True, mlm_probability=0.10)

    def features(batch: list[str]) -> list[dict[str, Any]]:
        return [{"input_ids": e.ids, "special_tokens_mask": e.special_tokens_mask} for e in encode(batch)]

    def run(inputs: Callable[[], Iterator[Any]]) -> Callable[[], int]:
        return lambda: sum(len(collate(rows)["input_ids"]) for rows in inputs())

    cached = [[fast(text)["input_ids"] for text in batch] for batch in batches]
    ours = [[tokenizer.encode(text).tolist() for text in batch] for batch in batches[:3]]
    assert [[ids[1:-1] for ids in batch] for batch in cached[:3]] == ours, "the peer's ids differ"
    masks = [[[1, *[0] * (len(ids) - 2), 1] for ids in batch] for batch in cached]
    return {
        LEAN: run(lambda: (features(batch) for batch in batches)),
        USUAL: run(lambda: (_call(fast, batch) for batch in batches)),
        CACHED: run(
            lambda: (
                [{"input_ids": i, "special_tokens_mask": m} for i, m in zip(*pair, strict=True)]
                for pair in zip(cached, masks, strict=True)
            )
        ),
    }


def _call(fast: Any, batch: list[str]) -> list[dict[str, Any]]:
    encoded = fast(batch, return_special_tokens_mask=True, return_token_type_ids=False)
    return [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]


def _hugging_face(tokenizer: SmilesTokenizer) -> Any:
    """A tokenizer of the same expression and vocabulary, with begin and end."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    pad, unknown, begin, end, mask, separator = tokenizer.special_tokens
    vocabulary = {token: index for index, token in enumerate(tokenizer.vocabulary)}
    made = Tokenizer(WordLevel(vocabulary, unk_token=unknown))
    made.pre_tokenizer = Split(Regex(smiles_regex(())[1:-1]), "isolated")
    ends = [(begin, tokenizer.begin_id), (end, tokenizer.end_id)]
    made.post_processor = TemplateProcessing(single=f"{begin} $A {end}", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token=pad, unk_token=unknown, bos_token=begin, eos_token=end, mask_token=mask,
        sep_token=separator,
    )  # fmt: skip
