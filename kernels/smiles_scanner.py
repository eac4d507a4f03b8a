"""SMILES text to token ids: MolBART's regular expression, and one pass over the bytes that equals it on every string.

Reference: `re.findall` and a dictionary. Fast: a numba scanner over the UTF-8 bytes of the whole batch; no compiler is
needed. `SmilesScanner.scan` chooses. Longer tokens, brackets and non-ASCII characters are looked up in a trie whose
nodes are linked by first child and next sibling, so that any vocabulary fits in a few numbers a byte.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from biokit.kernels.dispatch import reference_forced

# Facts of the MolBART vocabulary: one bracket atom, element, bond, ring label or digit a token, else one character.
BRACKET_REGEX = r"\[[^\]]+]"
OPEN_REGEX = r"Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\(|\)|\.|=|#|-|\+|\\|\/|:|~|@|\?|>|\*|\$|\%[0-9]{2}|[0-9]"
CHEMISTRY_REGEX = f"{BRACKET_REGEX}|{OPEN_REGEX}"
REGEX_SPECIAL = re.compile(r"[()\[\].|+*?$^{}\\]")

# A smaller batch is not worth importing numba for (0.4 to 1 s); once it is there, even one string is faster with it.
FAST_FROM_CHARACTERS = 20_000

IdBatch = tuple[npt.NDArray[np.uint16], npt.NDArray[np.int64]]

log = logging.getLogger(__name__)


def smiles_regex(extra_tokens: Sequence[str]) -> str:
    """The regular expression, as published files write it, of a vocabulary with these non-chemical tokens in order."""
    return f"({'|'.join([*map(_escape, extra_tokens), CHEMISTRY_REGEX, '.'])})"


def _escape(token: str) -> str:
    return REGEX_SPECIAL.sub(r"\\\g<0>", token)


def _compile_regex(extra_tokens: Sequence[str], chemistry: str) -> re.Pattern[str]:
    """`smiles_regex` behind a look at the next character: some 270 alternatives are rarely worth trying."""
    if not extra_tokens:
        return re.compile(f"{chemistry}|.")
    first = "".join(sorted({re.escape(token[0]) for token in extra_tokens}))
    return re.compile(f"(?=[{first}])(?:{'|'.join(map(_escape, extra_tokens))})|{chemistry}|.")


class SmilesScanner:
    """Ids of a batch of strings under one vocabulary.

    Args:
        vocabulary: tokens, the id of each is its place; at most 65,535.
        extra_ids: ids of the non-chemical tokens that stand before chemistry in the regular expression, in order.
        unknown_id: the id of a token that the vocabulary lacks.
    """

    def __init__(self, vocabulary: Sequence[str], extra_ids: Sequence[int], unknown_id: int) -> None:
        self.unknown_id = unknown_id
        self.ids = {token: index for index, token in enumerate(vocabulary)}
        extra_tokens = [vocabulary[index] for index in extra_ids]
        self.pattern = _compile_regex(extra_tokens, CHEMISTRY_REGEX)
        self._tail_pattern = _compile_regex(extra_tokens, OPEN_REGEX)
        self._tables = _build_tables(vocabulary, extra_ids, unknown_id)

    def split(self, text: str) -> list[str]:
        """Tokens of one string: `re.findall`, but linear in its length where many brackets are never closed."""
        closed = text.rfind("]") + 1
        if text.count("[", closed) < 2:
            return self.pattern.findall(text)
        tokens: list[str] = []
        start = len(text)
        for match in self.pattern.finditer(text):
            if match.start() >= closed:
                start = match.start()
                break
            tokens.append(match.group())
        return tokens + self._tail_pattern.findall(text, start)

    def scan(self, strings: Sequence[str]) -> IdBatch:
        """Ids of every string, flat, and the n + 1 places where strings begin and end; the version is chosen by size.

        Raises:
            TypeError: something in `strings` is not a string.
        """
        if reference_forced():
            return self.scan_reference(strings)
        loaded = _compile_scan.cache_info().currsize > 0
        if (loaded or sum(map(len, strings)) >= FAST_FROM_CHARACTERS) and _compile_scan() is not None:
            return self.scan_fast(strings)
        return self.scan_reference(strings)

    def scan_reference(self, strings: Sequence[str]) -> IdBatch:
        """The plain version: a regular expression and a dictionary."""
        rows = [[self.ids.get(token, self.unknown_id) for token in self.split(text)] for text in strings]
        offsets = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        ids = np.fromiter((index for row in rows for index in row), dtype=np.uint16, count=int(offsets[-1]))
        return ids, offsets

    def scan_fast(self, strings: Sequence[str], run: Callable[..., int] | None = None) -> IdBatch:
        """The compiled version; `run` replaces the compiled function (tests pass the Python one)."""
        run = run or _compile_scan()
        if run is None:
            raise ImportError("the compiled SMILES scanner needs numba")
        data, starts, ends = _join_bytes(strings)
        ids = np.empty(len(data), dtype=np.uint16)
        offsets = np.zeros(len(starts) + 1, dtype=np.int64)
        num_ids = run(data, starts, ends, *self._tables, self.unknown_id, ids, offsets)
        ids.resize(num_ids, refcheck=False)
        return ids, offsets


def _join_bytes(
    strings: Sequence[str],
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The strings as one UTF-8 buffer, with the first byte of each and the byte after its last (there is one).

    One join and one encode cost far less than a call a string; they need a separator that no string holds.
    """
    data = np.frombuffer("\0".join(strings).encode("utf-8", "surrogatepass") + b"\0", dtype=np.uint8)
    ends = np.flatnonzero(data == 0)
    if len(ends) == len(strings):
        return data, np.concatenate(([0], ends[:-1] + 1)), ends
    parts = [text.encode("utf-8", "surrogatepass") for text in strings]
    ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
    starts = np.concatenate(([0], ends))[: len(parts)]
    return np.frombuffer(b"".join(parts) + b"\0", dtype=np.uint8), starts, ends


def _build_tables(vocabulary: Sequence[str], extra_ids: Sequence[int], unknown_id: int) -> tuple[Any, ...]:
    """Tables of `_scan_bytes`: (kind, single, root, child, sibling, byte, token, extra), see there."""
    ranks = {index: rank for rank, index in enumerate(extra_ids)}
    child, sibling, byte, token, extra = [-1], [-1], [0], [unknown_id], [-1]
    for index, text in enumerate(vocabulary):
        node = 0
        for value in text.encode("utf-8", "surrogatepass"):
            parent, last, node = node, -1, child[node]
            while node >= 0 and byte[node] != value:
                last, node = node, sibling[node]
            if node < 0:
                node = len(byte)
                for column, start in (
                    (child, -1),
                    (sibling, -1),
                    (byte, value),
                    (token, unknown_id),
                    (extra, -1),
                ):
                    column.append(start)
                if last < 0:
                    child[parent] = node
                else:
                    sibling[last] = node
        token[node] = index
        extra[node] = ranks.get(index, -1)
    root = np.full(256, -1, dtype=np.int32)
    single = np.full(256, unknown_id, dtype=np.uint16)
    node = child[0]
    while node >= 0:
        root[byte[node]], single[byte[node]] = node, token[node]
        node = sibling[node]
    kind = np.zeros((256, 256), dtype=np.uint8)
    kind[128:] = 1
    kind[list(b"[%\n")] = 1
    kind[ord("B"), ord("r")] = kind[ord("C"), ord("l")] = 1
    for index in extra_ids:
        first, *others = vocabulary[index].encode("utf-8", "surrogatepass")
        kind[first, others[0] if others else slice(None)] = 2
    narrow = [np.array(column, dtype=np.int32) for column in (child, sibling, byte, token, extra)]
    return kind.ravel(), single, root, *narrow


def _scan_bytes(  # numba compiles it: one function, plain loops
    data: Any,
    starts: Any,
    ends: Any,
    kind: Any,
    single: Any,
    root: Any,
    child: Any,
    sibling: Any,
    byte: Any,
    token: Any,
    extra: Any,
    unknown_id: int,
    ids: Any,
    offsets: Any,
) -> int:
    """Write the ids of every string `data[starts[i]:ends[i]]` and where each ends; return how many there are.

    By a byte and the next: `kind` 0 is a token by itself, whose id is `single`; 1 needs the rules of the regular
    expression; 2 may begin a non-chemical token too. The trie: `root` by first byte, then `child` and `sibling`, each
    node with its `byte`, the `token` id that ends there (or unknown) and the precedence of the `extra` token that
    ends there (or -1).
    """
    count = 0
    for row in range(len(starts)):
        i, end = starts[row], ends[row]
        unclosed = False  # no "]" follows: found once, so that "[[[[..." stays linear
        while i < end:
            c = int(data[i])
            what = kind[c * 256 + data[i + 1]]
            if what == 0:
                ids[count] = single[c]
                count += 1
                i += 1
                continue
            length, found = 0, unknown_id
            if what == 2:  # the first alternative of the expression wins, not the longest
                best, node, j = len(token), root[c], i + 1
                while node >= 0:
                    if 0 <= extra[node] < best:
                        best, length, found = extra[node], j - i, token[node]
                    node = child[node] if j < end else -1
                    while node >= 0 and byte[node] != data[j]:
                        node = sibling[node]
                    j += 1
            if length == 0:
                length = 1
                if c == 91 and not unclosed:  # "[": up to "]", with something between
                    j = i + 1
                    while j < end and data[j] != 93:
                        j += 1
                    unclosed = j == end
                    if j < end and j > i + 1:
                        length = j + 1 - i
                elif i + 1 < end and ((c == 67 and data[i + 1] == 108) or (c == 66 and data[i + 1] == 114)):
                    length = 2  # Cl, Br
                elif c == 37 and i + 2 < end and 48 <= data[i + 1] <= 57 and 48 <= data[i + 2] <= 57:
                    length = 3  # %10
                elif c == 10:  # the expression's "." is any character but a newline
                    i += 1
                    continue
                elif c >= 192:  # the first byte of a character of 2, 3 or 4
                    length = 2 + (c >= 224) + (c >= 240)
                node = root[c]
                for j in range(i + 1, i + length):
                    node = child[node] if node >= 0 else -1
                    while node >= 0 and byte[node] != data[j]:
                        node = sibling[node]
                found = token[node] if node >= 0 else unknown_id
            ids[count] = found
            count += 1
            i += length
        offsets[row + 1] = count
    return count


@functools.cache
def _compile_scan() -> Callable[..., int] | None:
    """The compiled `_scan_bytes`, or None (said once) where numba is missing. Takes seconds, once a process."""
    try:
        import numba
    except ImportError as error:
        log.warning("SMILES are tokenised by `re`: numba cannot be imported (%s). Install it for 20x speed.", error)
        return None
    try:
        return numba.njit(cache=True, nogil=True)(_scan_bytes)
    except RuntimeError:  # no folder that numba could keep the compiled code in
        return numba.njit(nogil=True)(_scan_bytes)
