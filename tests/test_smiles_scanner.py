"""The byte scanner gives the ids of `re.findall` and a dictionary on every string; a changed scanner does not."""

from __future__ import annotations

import inspect
import logging
import pickle
import re
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from biokit.kernels import smiles_scanner
from biokit.kernels.smiles_scanner import SmilesScanner

SPECIAL = ["<PAD>", "?", "^", "&", "<MASK>", "<SEP>"]
EXTRA = [
    *(
        "LogD_change_(-0.1, 0.1]",
        "LogD_change_(0.1, 0.3]",
        "Solubility_low->high",
        "Clint_low->high",
        "Clint_no_change",
    ),
    *("<UNUSED_1>", "<UNUSED_10>", ">", "<RX_1>", "ab", "abc", "xyz", "xy", "é!", "a]b", "+*?$^{}\\|"),
]
CHEMISTRY = [
    "C",
    "c",
    "1",
    "(",
    ")",
    "=",
    "[nH]",
    "[C@@H]",
    "[C@H]",
    "Br",
    "B",
    "Cl",
    "%10",
    "%12",
    "[[C]",
    "é",
    "😀",
    "[é]",
]
VOCABULARY = [*SPECIAL, *EXTRA, *CHEMISTRY]
SCANNER = SmilesScanner(VOCABULARY, range(len(SPECIAL), len(SPECIAL) + len(EXTRA)), 1)

# Written out here, from the published description, so that a slip in the module's own expression shows.
PUBLISHED = r"\[[^\]]+]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\(|\)|\.|=|#|-|\+|\\|\/|:|~|@|\?|>|\*|\$|\%[0-9]{2}|[0-9]|."
PATTERN = re.compile("|".join([*map(re.escape, EXTRA), PUBLISHED]))
IDS = {token: index for index, token in enumerate(VOCABULARY)}

UGLY = [
    *("", "C", "CC(=O)Oc1ccccc1", "[C@@H](C)[nH]Br", "Brr", "Cll", "rB", "lC", "BrCl", "CB", "B", "[", "]"),
    *("[]", "[]]", "[[]", "[C", "C[", "[[C]", "[]a]", "[\n]", "C\nC", "\n", "\r\n", "[C\nC]", "[[[[[[[["),
    *("[[[]C[[[", "%", "%1", "%10", "%123", "%1a", "%a1", "C%", "C%1", "%%10", "%१२", "१", "\0", "C\0C", "[\0]"),
    *("\0\0\0", "é", "😀", "é!", "é?", "[é]", "[😀]", "\ud800", "[\udfff]", "\ud83d\ude00", "\x7f", "\x80"),
    *("߿ࠀ\uffff𐀀", "<PAD>", "^C&", "<MASK>", "<UNUSED_1>", "<UNUSED_10>", "<UNUSED_100>", "<UNUSED_1"),
    *("LogD_change_(-0.1, 0.1]", "LogD_change_(-0.1, 0.1", "LogD_change_(-0.1, 0.2]", "LogD_change_(-0x1, 0.1]"),
    *("Clint_low->high", "Clint_no_changeCl", "Clint_low->hig", "Clint", "Solubility_low->highC", "abc", "abx"),
    *("ab", "a", "xyz", "xy", "x", "a]b", "[a]b]", "[a]b", "[[a]b[[", "+*?$^{}\\|", "+*?", ">", ">>"),
    *("<RX_1>C>", " C", "C ", "\t", "ÿþ"),
    "C" * 3000,
]  # fmt: skip


def plain_ids(strings: Sequence[str]) -> list[list[int]]:
    return [[IDS.get(token, 1) for token in PATTERN.findall(text)] for text in strings]


def as_lists(ids: np.ndarray, offsets: np.ndarray) -> list[list[int]]:
    return [ids[a:b].tolist() for a, b in pairwise(offsets)]


def run_python(*arguments: object) -> int:
    """The scanner's own text without a compiler: numpy scalars overflow in Python, so plain ints go in."""
    return run_text(smiles_scanner._scan_bytes, *arguments)


def run_text(scan: Callable[..., int], *arguments: object) -> int:
    *tables, unknown_id, ids, offsets = arguments
    return scan(*[table.tolist() for table in tables], unknown_id, ids, offsets)  # type: ignore[attr-defined]


PIECES = st.sampled_from(
    [*VOCABULARY, *UGLY[:-1], "[", "[[", "]", "%", "C", "B", "l", "r", "1", "<", "L", "LogD_change_(", "\n", "\0"]
)
TEXTS = st.one_of(
    st.lists(PIECES, max_size=12).map("".join),
    st.text(alphabet="CBNOSclr[]()%0123456789@+-=#/\\.<>_LogD\n\0é😀", max_size=40),
    st.text(alphabet=st.characters(), max_size=20),  # lone surrogates included
)


@settings(max_examples=1000, deadline=None)
@given(st.lists(TEXTS, max_size=6))
def test_every_version_equals_re_on_any_strings(strings: list[str]) -> None:
    expected = plain_ids(strings)
    assert as_lists(*SCANNER.scan_reference(strings)) == expected
    assert as_lists(*SCANNER.scan_fast(strings)) == expected


def test_every_version_equals_re_on_ugly_strings() -> None:
    for batch in (UGLY, [text for text in UGLY if "\0" not in text], *[[text] for text in UGLY]):
        expected = plain_ids(batch)
        assert as_lists(*SCANNER.scan_reference(batch)) == expected
        assert as_lists(*SCANNER.scan_fast(batch)) == expected
        assert as_lists(*SCANNER.scan_fast(batch, run_python)) == expected
        assert [SCANNER.split(text) for text in batch] == [PATTERN.findall(text) for text in batch]


MUTATIONS = [
    ("data[i + 1] == 108", "data[i + 1] == 109"),
    ("data[i + 1] == 114", "data[i + 1] == 115"),
    ("j > i + 1:", "j > i:"),
    ("unclosed = j == end", "unclosed = True"),
    ("data[j] != 93:", "data[j] != 93 and data[j] != 10:"),
    ("48 <= data[i + 2] <= 57", "48 <= data[i + 2] <= 58 or data[i + 2] == 97"),
    ("i + 2 < end and", "i + 3 < end and"),
    ("c == 10:", "c == 13:"),
    ("c >= 192:", "c >= 240:"),
    ("(c >= 240)", "0"),
    ("0 <= extra[node] < best", "0 <= extra[node]"),
    ("child[node] if j < end else -1", "child[node] if j + 1 < end else -1"),
    ("if length == 0:", "if True:"),
    ("found = token[node] if node >= 0 else unknown_id", "found = token[node] if node >= 0 else 0"),
    ("offsets[row + 1] = count", "offsets[row] = count"),
    ("if what == 2:", "if False:"),
]


@pytest.mark.parametrize(("old", "new"), MUTATIONS)
def test_a_mutated_scanner_fails(old: str, new: str) -> None:
    source = inspect.getsource(smiles_scanner._scan_bytes)
    assert source.count(old) == 1
    names: dict[str, Callable[..., int]] = {}
    exec(source.replace(old, new), {"Any": object}, names)  # the text of this repository, one place changed
    mutant = names["_scan_bytes"]
    try:
        found = as_lists(*SCANNER.scan_fast(UGLY, lambda *arguments: run_text(mutant, *arguments)))
    except IndexError:
        return
    assert found != plain_ids(UGLY)


def test_the_expression_is_the_published_one() -> None:
    written = smiles_scanner.smiles_regex(["LogD_change_(-0.1, 0.1]"])
    assert written == rf"(LogD_change_\(-0\.1, 0\.1\]|{PUBLISHED})"
    assert [re.fullmatch(smiles_scanner.smiles_regex([t]), t) is not None for t in EXTRA] == [True] * len(EXTRA)


def test_offsets_and_types() -> None:
    for ids, offsets in (SCANNER.scan_fast(["CC", "", "[nH]"]), SCANNER.scan_reference(["CC", "", "[nH]"])):
        assert (ids.dtype, offsets.dtype) == (np.uint16, np.int64)
        assert offsets.tolist() == [0, 2, 2, 3]
    for ids, offsets in (SCANNER.scan_fast([]), SCANNER.scan_reference([])):
        assert (len(ids), offsets.tolist()) == (0, [0])


class CountingBytes(list[int]):
    """Bytes that count how often they are read."""

    num_reads = 0

    def __getitem__(self, index: object) -> int:  # type: ignore[override]
        self.num_reads += 1
        return super().__getitem__(index)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize("text", ["[]" + "[" * 3000, "[" * 3000 + "]", "[]" * 1500, "%" * 3000, "<UNUSED_1" * 300])
def test_each_byte_is_read_a_few_times_only(text: str) -> None:
    data = CountingBytes(text.encode() + b"\0")

    def scan(_: object, *arguments: object) -> int:
        *tables, unknown_id, ids, offsets = arguments
        lists = [table.tolist() for table in tables]  # type: ignore[attr-defined]
        return smiles_scanner._scan_bytes(data, *lists, unknown_id, ids, offsets)

    assert as_lists(*SCANNER.scan_fast([text], scan)) == plain_ids([text])
    assert data.num_reads < 30 * len(data)


def test_a_million_open_brackets_come_back() -> None:
    text = "[]" + "[" * 1_000_000  # the plain expression looks for "]" 1e12 times here
    assert SCANNER.split(text) == list(text)
    assert SCANNER.scan_fast([text])[0].tolist() == [1] * len(text)


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_other_vocabularies(data: st.DataObject) -> None:
    token = st.text(alphabet="Cl[]<ab%1é>", min_size=1, max_size=4)
    tokens = data.draw(st.lists(token, unique=True, max_size=12).filter(lambda ts: not set(ts) & set(SPECIAL)))
    num_extra = data.draw(st.integers(0, len(tokens)))
    vocabulary = [*SPECIAL, *tokens]
    scanner = SmilesScanner(vocabulary, range(6, 6 + num_extra), 1)
    strings = data.draw(
        st.lists(st.lists(st.sampled_from([*tokens, "C", "[", "é"]), max_size=8).map("".join), max_size=5)
    )
    pattern = re.compile("|".join([*map(re.escape, tokens[:num_extra]), PUBLISHED]))
    ids = {text: index for index, text in enumerate(vocabulary)}
    expected = [[ids.get(text, 1) for text in pattern.findall(string)] for string in strings]
    assert as_lists(*scanner.scan_fast(strings)) == expected
    assert as_lists(*scanner.scan_reference(strings)) == expected


def test_without_property_tokens() -> None:
    """Property tokens share first letters with Cl and Br, and must not be what makes these work."""
    scanner = SmilesScanner([*SPECIAL, *CHEMISTRY], [], 1)
    ids = {token: index for index, token in enumerate([*SPECIAL, *CHEMISTRY])}
    expected = [[ids.get(token, 1) for token in re.findall(PUBLISHED, text)] for text in UGLY]
    assert as_lists(*scanner.scan_fast(UGLY)) == expected
    assert as_lists(*scanner.scan_reference(UGLY)) == expected


def test_the_largest_vocabulary() -> None:
    vocabulary = [*SPECIAL, *(f"[{number}C]" for number in range(65_535 - len(SPECIAL)))]
    scanner = SmilesScanner(vocabulary, [], 1)
    strings = ["[0C][65528C][65529C]", "C[7C]"]
    assert as_lists(*scanner.scan_fast(strings)) == [[6, 65_534, 1], [1, 13]]
    assert as_lists(*scanner.scan_reference(strings)) == [[6, 65_534, 1], [1, 13]]


def test_without_numba_the_reference_runs_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    smiles_scanner._compile_scan.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                ids, _ = SCANNER.scan(["C" * 30_000])
                assert ids.tolist() == [IDS["C"]] * 30_000
        assert len(caplog.records) == 1 and "numba" in caplog.text
        with pytest.raises(ImportError, match="numba"):
            SCANNER.scan_fast(["C"])
    finally:
        smiles_scanner._compile_scan.cache_clear()


def test_numba_is_imported_only_for_a_large_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(SCANNER, "scan_fast", lambda strings: calls.append("fast"))
    smiles_scanner._compile_scan.cache_clear()
    SCANNER.scan(["C"] * 100)
    assert calls == [] and smiles_scanner._compile_scan.cache_info().currsize == 0
    SCANNER.scan(["C" * 20_000])
    SCANNER.scan(["C"])
    assert calls == ["fast", "fast"]


def test_the_reference_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIOKIT_KERNELS", "reference")
    monkeypatch.setattr(SCANNER, "scan_fast", None)
    assert len(SCANNER.scan(["C" * 30_000])[0]) == 30_000


def test_a_scanner_travels_to_other_processes() -> None:
    copy = pickle.loads(pickle.dumps(SCANNER))  # what multiprocessing does with it
    assert as_lists(*copy.scan_fast(UGLY)) == plain_ids(UGLY)
