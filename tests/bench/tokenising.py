"""SMILES to ids: `SmilesTokenizer.encode_batch` against `re.findall` and a dictionary."""

from __future__ import annotations

import re
from collections.abc import Callable

from biokit.kernels.smiles_scanner import smiles_regex
from biokit.tokenizers import SmilesTokenizer
from tests.bench import corpora
from tests.bench.timing import Row, compare

WHAT = "tokenise, {}"
CHEMISTRY_ONLY = "`re.findall` + dict, chemistry only"  # the harder peer: 266 alternatives fewer
PUBLISHED = "`re.findall` + dict, the published expression"
TARGET = 20.0
REPEATS = 20  # of ours a round: one pass is too short to time


def measure(name: str, limit: int = 0, rounds: int = 5) -> list[Row]:
    """Rows of one corpus.

    Raises:
        AssertionError: ids that differ from the peer's.
    """
    targets = {CHEMISTRY_ONLY: TARGET, PUBLISHED: TARGET}
    smiles = corpora.load_smiles(name, limit)
    if smiles is None:
        return [Row(WHAT.format(name), peer, target=f"at least {TARGET:g}x") for peer in targets]
    tokenizer = SmilesTokenizer.packaged()
    texts = list(smiles)
    extra = tokenizer.vocabulary[len(tokenizer.special_tokens) : tokenizer.chem_start]
    peers = {CHEMISTRY_ONLY: _plain(texts, tokenizer, ()), PUBLISHED: _plain(texts, tokenizer, extra)}
    ids = tokenizer.encode_batch(texts)[0].tolist()
    for peer, encode in peers.items():
        assert [index for row in encode() for index in row] == ids, f"ids differ from {peer}"

    def ours() -> int:
        for _ in range(REPEATS):
            tokenizer.encode_batch(texts)
        return REPEATS * len(texts)

    contenders = {WHAT.format(name): ours}
    contenders |= {peer: (lambda encode=encode: len(encode())) for peer, encode in peers.items()}
    return compare(contenders, "molecules", rounds).rows(targets)


def measure_all() -> list[Row]:
    return [row for name in corpora.NAMES for row in measure(name, limit=10_000)]


def _plain(texts: list[str], tokenizer: SmilesTokenizer, extra: tuple[str, ...]) -> Callable[[], list[list[int]]]:
    """What a few lines of Python do; no group in the expression, which makes `findall` faster."""
    findall = re.compile(smiles_regex(extra)[1:-1]).findall
    ids, unknown = {token: index for index, token in enumerate(tokenizer.vocabulary)}, tokenizer.unknown_id
    return lambda: [[ids.get(token, unknown) for token in findall(text)] for text in texts]
