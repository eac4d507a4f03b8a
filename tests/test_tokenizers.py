"""SmilesTokenizer: layout, files of both published forms, bad files, ids on real molecules, the packaged vocabulary."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import re
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from biokit.data import vocabulary
from biokit.errors import DataError
from biokit.tokenizers import PACKAGED_VOCABULARY, SmilesTokenizer
from biokit.vocabularies import CHEMISTRY, SPECIAL_TOKENS

PACKAGED = SmilesTokenizer.packaged()
SMALL = SmilesTokenizer((*SPECIAL_TOKENS, "<UNUSED_0>", "Clint_low->high", "C", "[C@H]", "Cl", "%10", "<UNUSED_1>"), 8)


def write(path: Path, tokens: list[str] | tuple[str, ...]) -> Path:
    path.write_bytes("".join(f"{token}\n" for token in tokens).encode())
    return path


def test_the_layout_is_molbarts() -> None:
    tokens = PACKAGED.vocabulary
    assert (PACKAGED.vocab_size, PACKAGED.chem_start, len(set(tokens))) == (523, 272, 523)
    assert tokens[:6] == ("<PAD>", "?", "^", "&", "<MASK>", "<SEP>")
    assert (PACKAGED.pad_id, PACKAGED.unknown_id, PACKAGED.begin_id) == (0, 1, 2)
    assert (PACKAGED.end_id, PACKAGED.mask_id, PACKAGED.sep_id) == (3, 4, 5)
    assert [tokens[i] for i in (6, 35, 36, 37, 64, 65)] == [
        f"LogD_change_({bin}]"
        for bin in ("-0.1, 0.1", "5.7, 5.9", "5.9, inf", "-0.3, -0.1", "-5.7, -5.5", "-inf, -5.7")
    ]
    assert tokens[66:72] == tuple(
        f"{name}_{change}" for name in ("Solubility", "Clint") for change in ("low->high", "high->low", "no_change")
    )
    assert (tokens[72], tokens[271]) == ("<UNUSED_0>", "<UNUSED_199>")
    assert all(re.fullmatch(r"<UNUSED_\d+>", token) for token in tokens[72:272])
    assert not any(token.startswith("<UNUSED_") for token in tokens[272:])


@pytest.mark.real_data
def test_property_and_unused_tokens_equal_the_published_ones(real_data: Path) -> None:
    published = SmilesTokenizer.from_file(real_data / "vocabularies/bart_vocab.txt")
    assert PACKAGED.vocabulary[:272] == published.vocabulary[:272]
    assert PACKAGED.vocabulary[272:] != published.vocabulary[272:]


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["bart_vocab.txt", "bart_vocab_downstream.json"])
def test_published_files_are_written_back_byte_for_byte(real_data: Path, tmp_path: Path, name: str) -> None:
    source = real_data / "vocabularies" / name
    tokenizer = SmilesTokenizer.from_file(source)
    assert (tokenizer.vocab_size, tokenizer.chem_start) == (523, 272)
    tokenizer.save(tmp_path / name)
    assert (tmp_path / name).read_bytes() == source.read_bytes()
    for other in ("again.txt", "again.json"):
        tokenizer.save(tmp_path / other)
        assert SmilesTokenizer.from_file(tmp_path / other) == tokenizer


@pytest.mark.real_data
def test_reaction_tokens_of_the_downstream_vocabulary(real_data: Path) -> None:
    tokenizer = SmilesTokenizer.from_file(real_data / "vocabularies/bart_vocab_downstream.json")
    assert tokenizer.encode("<RX_1>C>[18F]").tolist() == [264, 272, 261, tokenizer.vocabulary.index("[18F]")]
    assert 261 in tokenizer.non_chemical_ids()


def moses(folder: Path) -> Iterator[str]:
    with gzip.open(folder / "smiles_moses_zinc/train.csv.gz", "rt") as file:
        yield from (line.rstrip("\n") for line in islice(file, 1, None))


def chembl(folder: Path) -> Iterator[str]:
    with gzip.open(folder / "smiles_chembl/chembl_deepchem.csv.gz", "rt") as file:
        yield from (row["canonical_smiles"] for row in csv.DictReader(file))


def check_ids(tokenizer: SmilesTokenizer, lines: Iterator[str], expression: str) -> int:
    """Compare every id with the published expression and a dictionary; return how many strings there were."""
    findall, ids_of = re.compile(expression).findall, {token: i for i, token in enumerate(tokenizer.vocabulary)}
    num_lines = 0
    while batch := list(islice(lines, 50_000)):
        rows = [findall(text) for text in batch]
        ids, offsets = tokenizer.encode_batch(batch)
        assert offsets.tolist() == [0, *np.cumsum([len(row) for row in rows]).tolist()]
        assert ids.tolist() == [ids_of.get(token, 1) for row in rows for token in row]
        num_lines += len(batch)
    return num_lines


def published_expression(folder: Path, tokenizer: SmilesTokenizer) -> str:
    """The expression of the published file, its property and unused tokens exchanged for `tokenizer`'s."""
    tree = json.loads((folder / "vocabularies/bart_vocab_downstream.json").read_text())
    chemistry = tree["properties"]["regex"].removesuffix(")").split("<RX_8>|")[1]
    return "|".join([*map(re.escape, tokenizer.vocabulary[6:272]), chemistry])


@pytest.mark.real_data
def test_ids_equal_re_on_chembl_and_a_slice_of_moses(real_data: Path) -> None:
    published = SmilesTokenizer.from_file(real_data / "vocabularies/bart_vocab.txt")
    for tokenizer in (PACKAGED, published):
        expression = published_expression(real_data, tokenizer)
        assert check_ids(tokenizer, chembl(real_data), expression) == 54_590
        assert check_ids(tokenizer, islice(moses(real_data), 0, None, 100), expression) == 15_847


@pytest.mark.real_data
@pytest.mark.full
def test_ids_equal_re_on_every_line_of_moses(real_data: Path) -> None:
    expression = published_expression(real_data, PACKAGED)
    assert check_ids(PACKAGED, moses(real_data), expression) == 1_584_663


@pytest.mark.real_data
def test_no_token_of_chembl_is_unknown_to_the_packaged_vocabulary(real_data: Path) -> None:
    report = PACKAGED.unknown_report(chembl(real_data))
    assert (report.num_strings, report.num_tokens, report.num_unknown) == (54_590, 2_948_955, 0)


def test_the_packaged_vocabulary_begins_with_what_the_first_molecules_show() -> None:
    """Cheap witness of the whole re-making below: the same data, in the same order, give the same tokens."""
    variants = map(vocabulary.write_variants, islice(vocabulary.read_wheel_smiles(), 1000))
    found = tuple(dict.fromkeys(chain.from_iterable(CHEMISTRY.findall(text) for text in chain.from_iterable(variants))))
    assert len(found) > 20
    assert found == PACKAGED.vocabulary[272 : 272 + len(found)]


def test_variants_depend_on_the_molecule_alone() -> None:
    texts = ["CC(=O)Oc1ccccc1C(=O)O", "C[C@H](N)C(=O)O"]
    first = [vocabulary.write_variants(text) for text in texts]
    assert [vocabulary.write_variants(text) for text in reversed(texts)] == first[::-1]


@pytest.mark.full
def test_the_packaged_vocabulary_is_made_again_byte_for_byte(tmp_path: Path) -> None:
    vocabulary.build_packaged_vocabulary().save(tmp_path / "again.txt")
    assert (tmp_path / "again.txt").read_bytes() == PACKAGED_VOCABULARY.read_bytes()


def test_the_packaged_vocabulary_is_described() -> None:
    readme = (PACKAGED_VOCABULARY.parent.parent / "README.md").read_text()
    assert hashlib.sha256(PACKAGED_VOCABULARY.read_bytes()).hexdigest() == PACKAGED.hash
    assert PACKAGED.hash in readme


def test_the_closure_of_tokens() -> None:
    tokens = vocabulary.complete_vocabulary(["[13C@@H](F)Cl", "%10"]).vocabulary[272:]
    assert tokens[:4] == ("[13C@@H]", "(", "F", ")")
    assert len(tokens) == 251
    assert {"[13C@H]", "[C@]", "[C@@H]", "[H]", "%19", "[18F]", "[nH+]", "[Na+]", "\\", "9"} <= set(tokens)
    for found, other in (("[14N@@]", "[14N@]"), ("[14N@]", "[14N@@]")):
        assert next(token for token in vocabulary.close_tokens([found]) if token != found) == other
    assert vocabulary.complete_vocabulary(f"[{n}C]" for n in range(1, 300)).vocab_size == 272 + 299


def test_build_keeps_the_order_of_first_appearance() -> None:
    tokenizer = SmilesTokenizer.build(["CCl", "c1ccccc1[C@@H]Br", "C?"])
    assert tokenizer.vocabulary[272:278] == ("C", "Cl", "c", "1", "[C@@H]", "Br")
    assert tokenizer.vocabulary[278] == "<UNUSED_200>"
    assert (tokenizer.vocab_size, tokenizer.vocabulary[-1]) == (523, f"<UNUSED_{200 + 523 - 279}>")
    assert set(range(278, 523)) <= set(tokenizer.non_chemical_ids().tolist())


def test_a_vocabulary_that_is_filled_up_is_written_and_read_in_both_forms(tmp_path: Path) -> None:
    tokenizer = SmilesTokenizer.build(["CCl"])
    for name in ("v.txt", "v.json"):
        tokenizer.save(tmp_path / name)
        assert SmilesTokenizer.from_file(tmp_path / name) == tokenizer


@pytest.mark.parametrize("odd", ["C!", "C C", "C\n", "Cé", "[C", "C^"])
def test_build_refuses_what_is_no_smiles(odd: str) -> None:
    with pytest.raises(DataError, match="string 2"):
        SmilesTokenizer.build(["CC", odd])


@pytest.mark.parametrize("num_chemistry", [1, 250, 5000, 65_535 - 272])
def test_other_sizes(tmp_path: Path, num_chemistry: int) -> None:
    tokens = [*PACKAGED.vocabulary[:272], *(f"[{n}C]" for n in range(num_chemistry))]
    for name in ("v.txt", "v.json"):
        tokenizer = SmilesTokenizer(tuple(tokens))
        tokenizer.save(tmp_path / name)
        again = SmilesTokenizer.from_file(tmp_path / name)
        assert again == tokenizer and again.chem_start == 272
        assert again.encode(f"[{num_chemistry - 1}C][xC]").tolist() == [len(tokens) - 1, 1]


def test_encode_decode_and_tokens() -> None:
    text = "C[C@H]Cl%10Clint_low->highN"
    assert SMALL.tokens(text) == ["C", "[C@H]", "Cl", "%10", "Clint_low->high", "N"]
    ids = SMALL.encode(text)
    assert ids.dtype == np.uint16
    assert ids.tolist() == [8, 9, 10, 11, 7, 1]
    assert SMALL.decode(ids) == "C[C@H]Cl%10Clint_low->high?"
    assert SMALL.decode([2, 8, 0, 10, 3, 9, 9]) == "CCl"
    assert SMALL.decode_batch(np.array([[2, 8, 3, 0], [2, 10, 10, 8], [3, 0, 0, 0]])) == ["C", "ClClC", ""]
    flat, offsets = SMALL.encode_batch(["CCl", "", "C"])
    assert (flat.tolist(), offsets.tolist()) == ([8, 10, 8], [0, 2, 2, 3])
    assert SMALL.non_chemical_ids().tolist() == [0, 1, 2, 4, 5, 6, 7, 12]
    assert SMALL.unknown_report([]).num_strings == 0


@given(st.lists(st.sampled_from(PACKAGED.vocabulary[272:]), max_size=30))
def test_known_tokens_survive_the_round_trip(tokens: list[str]) -> None:
    assert PACKAGED.decode(PACKAGED.encode("".join(tokens))) == "".join(tokens)


def test_tensors_decode_too() -> None:
    import torch

    assert SMALL.decode_batch(torch.tensor([[2, 8, 3]])) == ["C"]


@pytest.mark.parametrize("index", [13, -1, 70_000])
def test_decode_refuses_ids_of_another_vocabulary(index: int) -> None:
    with pytest.raises(DataError, match=f"id {index}"):
        SMALL.decode([8, index])


@pytest.mark.parametrize(
    ("item", "kind"), [(None, "NoneType"), (float("nan"), "float"), (b"CC", "bytes"), (["C"], "list")]
)
@pytest.mark.parametrize("repeat", [1, 30_000])
def test_encode_batch_names_what_is_no_string(item: object, kind: str, repeat: int) -> None:
    with pytest.raises(DataError, match=rf"item {repeat}.*{kind}"):
        SMALL.encode_batch([*["C"] * repeat, item])  # type: ignore[list-item]


def test_encode_batch_refuses_one_string_and_takes_any_sequence() -> None:
    with pytest.raises(DataError, match="one string"):
        SMALL.encode_batch("CCl")
    assert SMALL.encode_batch(np.array(["C", "Cl"], dtype=object))[0].tolist() == [8, 10]


def test_unknown_report() -> None:
    strings = ["C", "CN", "NN", "Cé", "[C@@H]C", "C^", *["CN"] * 5000]
    report = SMALL.unknown_report(strings, max_examples=2)
    assert dict(report.counts) == {"N": 5003, "é": 1, "[C@@H]": 1, "^": 1}
    assert report.examples["N"] == ["CN", "NN"]
    assert (report.num_strings, report.num_strings_with_unknown, report.num_unknown) == (5006, 5005, 5006)
    assert str(report).splitlines()[0].startswith("5,006 of 10,011 tokens are unknown")
    assert "'[C@@H]'" in str(report)
    assert str(SMALL.unknown_report(["CC"])) == (
        "0 of 2 tokens are unknown to the vocabulary of 13; they stand in 0 of 1 strings."
    )


def test_the_hash_is_that_of_the_text_file(tmp_path: Path) -> None:
    SMALL.save(tmp_path / "v.json")
    PACKAGED.save(tmp_path / "v.txt")
    assert SmilesTokenizer.from_file(tmp_path / "v.json").hash == SMALL.hash != PACKAGED.hash
    assert hashlib.sha256((tmp_path / "v.txt").read_bytes()).hexdigest() == PACKAGED.hash


def test_a_tokenizer_is_frozen_and_compares_by_value() -> None:
    assert SmilesTokenizer(SMALL.vocabulary, 8) == SMALL and hash(SmilesTokenizer(SMALL.vocabulary, 8)) == hash(SMALL)
    with pytest.raises(AttributeError):
        SMALL.chem_start = 9  # type: ignore[misc]


GOOD = [*SPECIAL_TOKENS, "<UNUSED_0>", "C", "c", "Cl"]


@pytest.mark.parametrize(
    ("content", "line", "cause"),
    [
        ([*GOOD, "C"], 11, "stands already at 8"),
        ([*GOOD[:7], "", *GOOD[7:]], 8, "blank"),
        ([*GOOD, " "], 11, "blank"),
        ([*GOOD, ""], 11, "blank"),
        (GOOD[1:], 1, "must be <PAD>"),
        ([GOOD[1], GOOD[0], *GOOD[2:]], 1, "must be <PAD>"),
        ([*GOOD[:4], GOOD[5], GOOD[4], *GOOD[6:]], 5, "must be <MASK>"),
        (GOOD[:4], 5, "ends before <MASK> <SEP>"),
        (["\ufeff" + GOOD[0], *GOOD[1:]], 1, "byte order mark"),
        ([token + "\r" for token in GOOD], 1, "carriage return"),
        ([*GOOD[:8], GOOD[8] + "\r", GOOD[9]], 9, "carriage return"),
        ([*GOOD[:8], "Foo", GOOD[8]], 9, "chemistry begins before it"),
        ([*GOOD, *(f"[{n}C]" for n in range(65_536 - len(GOOD)))], 65_536, "65,534"),
    ],
)
def test_bad_text_files_name_the_line(tmp_path: Path, content: list[str], line: int, cause: str) -> None:
    path = write(tmp_path / "v.txt", content)
    with pytest.raises(DataError, match=re.escape(cause)) as error:
        SmilesTokenizer.from_file(path)
    assert error.value.asked == f"{path} line {line}"


@pytest.mark.parametrize(("content", "asked"), [(b"", "vocabulary"), (b"<PAD>\n?\n\xff\n", "line 3")])
def test_empty_and_badly_encoded_files(tmp_path: Path, content: bytes, asked: str) -> None:
    (tmp_path / "v.txt").write_bytes(content)
    with pytest.raises(DataError, match=asked):
        SmilesTokenizer.from_file(tmp_path / "v.txt")


def test_files_that_are_missing_or_of_another_form(tmp_path: Path) -> None:
    for path, cause in (
        (tmp_path / "no.txt", "cannot be read"),
        (tmp_path, "neither"),
        (tmp_path / "v.model", "neither"),
    ):
        with pytest.raises(DataError, match=cause):
            SmilesTokenizer.from_file(path)
    with pytest.raises(DataError, match="neither"):
        SMALL.save(tmp_path / "v.model")


def small_json(tmp_path: Path) -> dict:
    SMALL.save(tmp_path / "good.json")
    return json.loads((tmp_path / "good.json").read_text())


@pytest.mark.parametrize(
    ("keys", "value", "cause"),
    [
        (("vocabulary",), None, '"vocabulary" is missing'),
        (("vocabulary",), {"C": 0}, '"vocabulary" is a dict'),
        (("vocabulary", 8), "Cl", "entry 11.*stands already at 9"),
        (("vocabulary", 8), 5, "entry 9.*not a string"),
        (("vocabulary", 8), "a\nb", "entry 9.*line end"),
        (("vocabulary", 8), "\ud800", "entry 9.*UTF-8"),
        (("vocabulary", 0), "C", "entry 1.*must be <PAD>"),
        (("properties",), [], '"properties" is a list'),
        (("properties", "chem_start_idx"), "8", '"chem_start_idx" is a str'),
        (("properties", "chem_start_idx"), True, '"chem_start_idx" is a bool'),
        (("properties", "chem_start_idx"), 5, "chem_start 5"),
        (("properties", "chem_start_idx"), 99, "chem_start 99"),
        (("properties", "special_tokens", "mask"), None, '"mask" is missing'),
        (("properties", "special_tokens", "mask"), "<M>", "entry 5.*must be <M>"),
        (("properties", "regex"), "(C|.)", "not the expression"),
        (("properties", "regex"), "(", r"at character 1\."),
    ],
)
def test_bad_json_files(tmp_path: Path, keys: tuple, value: object, cause: str) -> None:
    tree = small_json(tmp_path)
    place = tree
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    (tmp_path / "bad.json").write_text(json.dumps(tree))
    with pytest.raises(DataError, match=cause):
        SmilesTokenizer.from_file(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("text", "cause"),
    [("{\n]", "line 2.*not JSON"), ("[]", "missing"), ("\ufeff{}", "not JSON"), ("[" * 10**5, "deep")],
)
def test_text_that_is_no_such_json(tmp_path: Path, text: str, cause: str) -> None:
    (tmp_path / "bad.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=cause):
        SmilesTokenizer.from_file(tmp_path / "bad.json")


def test_json_keeps_what_a_text_file_cannot(tmp_path: Path) -> None:
    special = ("[PAD]", "[UNK]", "[CLS]", "[END]", "[MASK]", "[SEP]")
    tokenizer = SmilesTokenizer((*special, "+*?", "C", "é", "c"), 7, special)
    with pytest.raises(DataError, match=r"Use the \.json form"):
        tokenizer.save(tmp_path / "v.txt")
    with pytest.raises(DataError, match=r"Save it as \.json"):
        SmilesTokenizer((*special, "C"), 6, special).save(tmp_path / "v.txt")
    tokenizer.save(tmp_path / "v.json")
    again = SmilesTokenizer.from_file(tmp_path / "v.json")
    assert again == tokenizer
    assert again.encode("C+*?+é[MASK]").tolist() == [7, 6, 1, 8, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v.json"]


def test_published_escapes_are_accepted(tmp_path: Path) -> None:
    """One published file leaves the dots of its property tokens unescaped."""
    tokenizer = SmilesTokenizer.build(["C"])
    tokenizer.save(tmp_path / "v.json")
    tree = json.loads((tmp_path / "v.json").read_text())
    head, tail = tree["properties"]["regex"].split("<UNUSED_0>")
    tree["properties"]["regex"] = head.replace(r"\.", ".") + "<UNUSED_0>" + tail
    (tmp_path / "loose.json").write_text(json.dumps(tree))
    assert SmilesTokenizer.from_file(tmp_path / "loose.json") == tokenizer
