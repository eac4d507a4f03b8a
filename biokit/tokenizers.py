"""Text to token ids and back. `SmilesTokenizer` has MolBART's vocabulary layout and regular expression.

The layout (MolecularAI/MolBART, `bart_vocab.txt`; Chemformer's JSON carries the same): six special tokens, property
tokens, unused ones, and from `chem_start` on chemistry. The id of a token is its place.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from biokit.errors import DataError
from biokit.kernels.smiles_scanner import CHEMISTRY_REGEX, IdBatch, SmilesScanner
from biokit.vocabularies import (
    CHEM_START,
    CHEMISTRY,
    SPECIAL_TOKENS,
    UNUSED,
    VOCAB_SIZE,
    check_vocabulary,
    find_chem_start,
    format_json,
    property_tokens,
    quote,
    read_json,
    read_lines,
)

PACKAGED_VOCABULARY = Path(__file__).parent / "assets" / "vocabularies" / "smiles_vocab.txt"
_CHEMISTRY_OR_ANY = re.compile(f"{CHEMISTRY_REGEX}|.", re.DOTALL)


@dataclass(frozen=True)
class SmilesTokenizer:
    """Tokens of SMILES under one vocabulary.

    Args:
        vocabulary: tokens; the id of each is its place, 0 to 5 are `special_tokens`.
        chem_start: the id where chemistry begins; ids 6 to `chem_start` - 1 are property and unused tokens, which are
            looked for before chemistry.
        special_tokens: padding, unknown, begin, end, mask and separator.

    Raises:
        DataError: a vocabulary that cannot work; the message names the entry.
    """

    vocabulary: tuple[str, ...]
    chem_start: int = CHEM_START
    special_tokens: tuple[str, ...] = SPECIAL_TOKENS

    pad_id: ClassVar[int] = 0
    unknown_id: ClassVar[int] = 1
    begin_id: ClassVar[int] = 2
    end_id: ClassVar[int] = 3
    mask_id: ClassVar[int] = 4
    sep_id: ClassVar[int] = 5

    def __post_init__(self) -> None:
        object.__setattr__(self, "vocabulary", tuple(self.vocabulary))
        object.__setattr__(self, "special_tokens", tuple(self.special_tokens))
        check_vocabulary(self.vocabulary, self.chem_start, self.special_tokens, "vocabulary entry")

    @classmethod
    def packaged(cls) -> SmilesTokenizer:
        """The vocabulary that ships with biokit. Published checkpoints need the file published with them."""
        return cls.from_file(PACKAGED_VOCABULARY)

    @classmethod
    def from_file(cls, path: str | Path) -> SmilesTokenizer:
        """Read MolBART's `.txt` (one token a line) or Chemformer's `.json`.

        Raises:
            DataError: a file that is missing or not such a vocabulary; the message names the line.
        """
        path = Path(path)
        if path.suffix == ".json":
            return cls(*read_json(path))
        if path.suffix != ".txt":
            raise DataError(
                f"vocabulary {path}", "its name ends in neither .txt nor .json", "Give one of the two forms"
            )
        tokens = read_lines(path)
        check_vocabulary(tokens, len(tokens), SPECIAL_TOKENS, f"{path} line")
        return cls(tuple(tokens), find_chem_start(tokens, path))

    @classmethod
    def build(cls, smiles: Iterable[str]) -> SmilesTokenizer:
        """A vocabulary from SMILES: chemistry in order of first appearance, filled up to 523 entries with unused ones.

        Raises:
            DataError: a string with a character that no SMILES has.
        """
        chemistry: dict[str, None] = {}
        for row, text in enumerate(smiles, start=1):
            for token in _CHEMISTRY_OR_ANY.findall(text):
                if token not in chemistry and not CHEMISTRY.fullmatch(token):
                    raise DataError(
                        f"build a vocabulary: string {row} {quote(text)}",
                        f"it has {token!r}, which no SMILES has",
                        "Clean the SMILES first",
                    )
                chemistry[token] = None
        head = [*SPECIAL_TOKENS, *property_tokens()]
        head += [f"<UNUSED_{index}>" for index in range(CHEM_START - len(head))]
        tokens = head + [token for token in chemistry if token not in SPECIAL_TOKENS]
        num_unused = CHEM_START - len(SPECIAL_TOKENS) - len(property_tokens())
        tokens += [f"<UNUSED_{num_unused + index}>" for index in range(VOCAB_SIZE - len(tokens))]
        return cls(tuple(tokens))

    def save(self, path: str | Path) -> None:
        """Write MolBART's `.txt` or Chemformer's `.json`; `from_file` reads an equal tokenizer back.

        Raises:
            DataError: a `.txt` could not say where chemistry begins or which tokens are special.
        """
        path = Path(path)
        if path.suffix == ".json":
            text = format_json(self.vocabulary, self.chem_start, self.special_tokens)
        elif path.suffix == ".txt":
            found = find_chem_start(self.vocabulary, path)
            if (found, self.special_tokens) != (self.chem_start, SPECIAL_TOKENS):
                raise DataError(
                    f"save vocabulary as {path}",
                    f"the form cannot say that chemistry begins at {self.chem_start} (it looks like {found}) "
                    f"or that the special tokens are {' '.join(self.special_tokens)}",
                    "Save it as .json",
                )
            text = self._to_text()
        else:
            raise DataError(f"save vocabulary as {path}", "the name ends in neither .txt nor .json", "Choose one")
        beside = path.with_name(path.name + ".partial")
        beside.write_bytes(text.encode())
        beside.replace(path)

    @property
    def vocab_size(self) -> int:
        """How many tokens there are."""
        return len(self.vocabulary)

    @functools.cached_property
    def hash(self) -> str:
        """sha256 of the vocabulary, equal to that of its `.txt` file."""
        return hashlib.sha256(self._to_text().encode()).hexdigest()

    def tokens(self, smiles: str) -> list[str]:
        """The tokens of one string, without begin and end. Newlines outside brackets belong to no token."""
        return self._scanner.split(smiles)

    def encode(self, smiles: str) -> npt.NDArray[np.uint16]:
        """The ids of one string, without begin and end."""
        return self.encode_batch([smiles])[0]

    def encode_batch(self, smiles: Sequence[str]) -> IdBatch:
        """The ids of n strings, without begin and end: flat ids, and n + 1 offsets (string i is `ids[o[i]:o[i + 1]]`).

        Raises:
            DataError: an item that is not a string.
        """
        if isinstance(smiles, str):
            raise DataError("encode_batch", "it was given one string", "Give a list of strings, or call encode")
        smiles = smiles if isinstance(smiles, (list, tuple)) else list(smiles)
        try:
            return self._scanner.scan(smiles)
        except (TypeError, AttributeError):
            row = next((row for row, text in enumerate(smiles) if not isinstance(text, str)), None)
            if row is None:
                raise
            kind = type(smiles[row]).__name__
            raise DataError(
                f"encode_batch item {row}",
                f"{smiles[row]!r} is a {kind}, not a string",
                "Drop or mend the row",
            ) from None

    def decode(self, ids: Any) -> str:
        """The text of one sequence of ids (array, tensor or list): begin and padding left out, cut at the first end.

        Raises:
            DataError: an id that the vocabulary does not have.
        """
        text = []
        for index in ids.tolist() if hasattr(ids, "tolist") else list(ids):
            if index == self.end_id:
                break
            if not 0 <= index < len(self.vocabulary):
                raise DataError(
                    f"decode id {index}",
                    f"the vocabulary has ids 0 to {len(self.vocabulary) - 1}",
                    "Use the vocabulary that the ids were made with",
                )
            if index not in (self.begin_id, self.pad_id):
                text.append(self.vocabulary[index])
        return "".join(text)

    def decode_batch(self, ids_BT: Any) -> list[str]:
        """The text of each row of ids."""
        return [self.decode(ids_T) for ids_T in ids_BT]

    def non_chemical_ids(self) -> npt.NDArray[np.int64]:
        """Ids that generation must never emit: unused, property and special tokens, except the end."""
        banned = [
            index
            for index, token in enumerate(self.vocabulary)
            if (index < self.chem_start or UNUSED.fullmatch(token)) and index != self.end_id
        ]
        return np.array(banned, dtype=np.int64)

    def unknown_report(self, smiles: Iterable[str], max_examples: int = 3) -> UnknownReport:
        """Count the tokens that the vocabulary lacks; a special token that stands in the text counts as such."""
        report = UnknownReport(self.vocab_size)
        for batch in _batched(smiles, 4096):
            ids, offsets = self.encode_batch(batch)
            report.num_strings += len(batch)
            report.num_tokens += len(ids)
            rows = np.searchsorted(offsets, np.flatnonzero(ids < len(SPECIAL_TOKENS)), side="right") - 1
            for row in dict.fromkeys(rows.tolist()):
                report.num_strings_with_unknown += 1
                known = self._scanner.ids
                for token in self.tokens(batch[row]):
                    if known.get(token, self.unknown_id) < len(SPECIAL_TOKENS):
                        report.counts[token] += 1
                        examples = report.examples.setdefault(token, [])
                        if len(examples) < max_examples and batch[row] not in examples:
                            examples.append(batch[row])
        return report

    @functools.cached_property
    def _scanner(self) -> SmilesScanner:
        return SmilesScanner(self.vocabulary, range(len(SPECIAL_TOKENS), self.chem_start), self.unknown_id)

    def _to_text(self) -> str:
        return "".join(f"{token}\n" for token in self.vocabulary)


@dataclass
class UnknownReport:
    """What `SmilesTokenizer.unknown_report` found; `print` it."""

    vocab_size: int
    num_strings: int = 0
    num_tokens: int = 0
    num_strings_with_unknown: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    @property
    def num_unknown(self) -> int:
        """How many tokens are unknown, repeats included."""
        return self.counts.total()

    def __str__(self) -> str:
        head = (
            f"{self.num_unknown:,} of {self.num_tokens:,} tokens are unknown to the vocabulary of {self.vocab_size}; "
            f"they stand in {self.num_strings_with_unknown:,} of {self.num_strings:,} strings"
        )
        rows = [f"{n:>9,}  {token!r}  e.g. {quote(self.examples[token][0])}" for token, n in self.counts.most_common()]
        return "\n".join([head + ("." if not rows else ":"), *rows])


def _batched(items: Iterable[str], size: int) -> Iterator[list[str]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
