"""Pictures of molecules and tokens: every one is PNG and words, whatever the strings."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from biokit.errors import DataError, RunError
from biokit.view.canvas import printable
from biokit.view.molecules import TokenRow, show_molecules, show_random_smiles, show_tokens
from biokit.view.picture import PNG_SIGNATURE, Picture

ASPIRIN = "CC(=O)Oc1ccccc1C(=O)O"
UGLY = [
    "",
    " ",
    "C1CC(",
    "C" * 5000 + "(",
    "c1cc$x$µ漢\x00\n\t",
    "\ud800",
    "🙂" * 50,
    "C" * 30_000,
    "N[C@@H](C)C(=O)" * 500 + "O",
]


def test_a_picture_is_a_bundle_of_png_and_words(tmp_path: Path) -> None:
    picture = show_molecules(["CCO"], title="Ethanol")
    bundle = picture._repr_mimebundle_()
    assert base64.b64decode(bundle["image/png"]) == picture.png and picture.png.startswith(PNG_SIGNATURE)
    assert bundle["text/plain"] == repr(picture) == picture.alt == "Ethanol: 1 molecule drawn\n1. CCO"
    assert picture.save(tmp_path / "new" / "a.png").read_bytes() == picture.png
    with pytest.raises(RunError, match=r'the ending is "\.svg"'):
        picture.save(tmp_path / "a.svg")
    with pytest.raises(RunError, match="are not a PNG"):
        Picture(b"GIF89a", "no")


def test_the_same_input_gives_the_same_bytes() -> None:
    assert show_molecules(["CCO", "C("]).png == show_molecules(["CCO", "C("]).png


def test_a_grid_shows_invalid_strings_as_text_and_says_so() -> None:
    picture = show_molecules(["CCO", "C1CC(", ""], ["good", "bad", "empty"])
    assert "3 molecules drawn, 2 of them as text because not valid" in picture.alt
    assert "2. C1CC( (bad) [not valid]" in picture.alt and "3. (empty) (empty) [not valid]" in picture.alt


@pytest.mark.parametrize("text", UGLY)
def test_no_string_breaks_a_grid(text: str) -> None:
    picture = show_molecules([text, ASPIRIN], title=text)
    assert picture.png.startswith(PNG_SIGNATURE)
    assert max(map(len, picture.alt.splitlines()), default=0) < 40_000
    assert show_molecules(["CCO"], [text]).png.startswith(PNG_SIGNATURE)


def test_no_molecules_is_a_picture_too() -> None:
    assert show_molecules([]).alt == "0 molecules drawn"
    assert show_random_smiles([]).png.startswith(PNG_SIGNATURE)
    assert show_tokens("", []).png.startswith(PNG_SIGNATURE)


def test_what_is_not_drawn_is_counted() -> None:
    small, large = show_molecules(["C"] * 8, max_molecules=8), show_molecules(["C"] * 30, max_molecules=8)
    assert "8 molecules drawn, 22 more not drawn" in large.alt
    assert large.size[1] > small.size[1]  # the line that says so


def test_large_molecules_get_larger_tiles() -> None:
    peptide = "N[C@@H](C)C(=O)" * 30 + "O"
    assert show_molecules([peptide, "CCO"]).size[1] > show_molecules(["CCO", "CCO"]).size[1] + 150
    assert show_molecules([ASPIRIN] * 8).size[0] <= 1000


def test_wrong_counts_are_refused() -> None:
    with pytest.raises(DataError, match="2 molecules but 1 legends"):
        show_molecules(["C", "C"], ["one"])
    with pytest.raises(DataError, match="columns=0"):
        show_molecules(["C"], columns=0)
    with pytest.raises(DataError, match="3 tokens but 1 marks"):
        TokenRow("row", ["C", "C", "O"], [True])


def test_token_rows_in_words() -> None:
    tokens = ["^", *ASPIRIN, "&"]
    masked = [*tokens[:3], "<MASK>", *tokens[6:]]
    hidden = [3 <= i < 6 for i in range(len(tokens))]
    picture = show_tokens(ASPIRIN, [TokenRow("Original", tokens, hidden), TokenRow("Masked", masked)])
    assert "Original: ^ C C [(] [=] [O] ) O" in picture.alt and "Masked: ^ C C <MASK> ) O" in picture.alt


def test_random_smiles_of_one_molecule() -> None:
    picture = show_random_smiles([ASPIRIN, "c1(OC(=O)C)c(C(O)=O)cccc1"])
    assert picture.alt.endswith("2. c1(OC(=O)C)c(C(O)=O)cccc1")
    with pytest.raises(DataError, match='random SMILES 2 of 2: "C1CC" is not a molecule'):
        show_random_smiles([ASPIRIN, "C1CC"])
    with pytest.raises(DataError, match="is not the first molecule"):
        show_random_smiles([ASPIRIN, "CCO"])


def test_signs_without_a_glyph_are_written_as_codes() -> None:
    assert printable("C=O µ –") == "C=O µ –"
    assert printable("soft\xadhyphen") == "soft\\xadhyphen"
    assert printable("a\n\x00漢\ud800") == "a\\n\\x00\\u6f22\\ud800"
