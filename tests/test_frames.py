"""Lines of a stack: whose they are, what they are called, and which source lines are read."""

from __future__ import annotations

from pathlib import Path

import pytest

from biokit.frames import MAX_FRAMES, PACKAGE, STANDARD_LIBRARY, Frame, add_code, find_own, frames_from, shorten

TORCH = "/opt/venv/lib/python3.11/site-packages/torch/nn/module.py"


@pytest.mark.parametrize(
    ("file", "place", "own", "library"),
    [
        ("/runs/a/cell.py", "cell line 7", True, False),
        ("cell.py", "cell line 7", True, False),
        ("/runs/a/cell_12.py", "cell 12 line 7", True, False),
        ("/home/u/my_cell.py", "my_cell.py line 7", True, False),
        ("<stdin>", "<stdin> line 7", True, False),
        (TORCH, "torch/nn/module.py line 7", False, True),
        ("/usr/lib/python3/dist-packages/numpy/x.py", "numpy/x.py line 7", False, True),
        (f"{STANDARD_LIBRARY}json/decoder.py", "json/decoder.py line 7", False, True),
        (f"{PACKAGE}trainer.py", "biokit/trainer.py line 7", False, False),
        (f"{PACKAGE}launch/supervision/rank.py", "biokit/launch/supervision/rank.py line 7", False, False),
        ("<frozen runpy>", "<frozen runpy> line 7", False, True),
    ],
)
def test_places(file: str, place: str, own: bool, library: bool) -> None:
    frame = Frame(file, 7, "f")
    assert (frame.place, frame.is_own, frame.is_library) == (place, own, library)


def test_the_users_own_line_goes_before_biokits() -> None:
    torch, user = Frame(TORCH, 1, "f"), Frame("/home/u/train.py", 2, "g")
    biokit, starter = Frame(f"{PACKAGE}trainer.py", 3, "h"), Frame(f"{PACKAGE}launch/supervision/rank.py", 4, "main")
    assert find_own([torch, biokit, user, starter]) == 2
    assert find_own([torch, biokit, Frame(f"{PACKAGE}train.py", 5, "i"), starter]) == 1
    assert find_own([torch, starter, Frame("... 9 more frames ...", 0, "")]) == -1


def test_source_lines_are_read_of_python_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "k-0123456789")
    code, other, link = tmp_path / "a.py", tmp_path / "a.txt", tmp_path / "b.py"
    code.write_text("first\n    login('k-0123456789')\n" + "x" * 999)
    other.write_text("private")
    link.symlink_to(other)
    (tmp_path / "folder.py").mkdir()
    places = [(code, 1), (code, 2), (code, 3), (code, 4), (code, 0), (other, 1), (link, 1), (tmp_path / "folder.py", 1)]
    found = add_code(Frame(str(file), line, "f") for file, line in places)
    first, second, third, *rest = (frame.code for frame in found)
    assert (first, second, rest) == ("first", "login('***')", [""] * 5) and 100 < len(third) < 300
    (huge,) = add_code([Frame("/dev/zero", 1, "f")])
    assert huge.code == ""


def test_long_stacks_are_shown_from_both_ends() -> None:
    frames = tuple(Frame("a.py", line, "f") for line in range(1, 1001))
    short = shorten(frames)
    assert len(short) == MAX_FRAMES + 1 and shorten(frames[:MAX_FRAMES]) == frames[:MAX_FRAMES]
    assert (short[0], short[-1], short[MAX_FRAMES // 2].place) == (frames[0], frames[-1], "... 940 more frames ...")
    assert len(frames_from([{"file": "a.py", "line": 1}] * 10_000)) == MAX_FRAMES + 1


def test_a_line_that_calls_itself_is_shown_once() -> None:
    first, same, last = Frame("a.py", 9, "g"), Frame("a.py", 1, "f"), Frame("a.py", 2, "f")
    short = shorten((first, *[same] * 990, last))
    assert (short[:2], short[3:]) == ((first, same), (last,)) and short[2].place == "... repeated 989 more times ..."
    assert shorten((same, same, last)) == (same, same, last)
