"""Cards: the same facts in HTML and in text, with nothing of a run's words taken for HTML."""

from __future__ import annotations

import math
from html.parser import HTMLParser
from typing import Any

import pytest

from biokit.endings import Link, RankError
from biokit.failures import Failure
from biokit.frames import Frame
from biokit.stacks import DEAD, ELSEWHERE, STOPPED, WAITS, Hang, RankStack
from biokit.view.cards import WIDTH, Card, failure_card, hang_card, run_card

LIBRARY = "/opt/lib/python3.11/site-packages/torch/nn/module.py"
EVIL = '<script>alert("x")</script>&amp;'
TAGS = {"div", "span", "b", "p", "pre", "code", "details", "summary", "table", "tr", "td"}
STYLES = {  # what JupyterLab leaves of the styles of an output that it does not trust
    "background", "border", "border-collapse", "border-left", "border-radius", "color", "cursor", "font-size",
    "font-weight", "line-height", "margin", "margin-right", "max-height", "max-width", "opacity", "overflow",
    "overflow-wrap", "padding", "table-layout", "text-align", "vertical-align", "white-space", "width",
}  # fmt: skip


class Reader(HTMLParser):
    """Checks that all tags are ours, closed in order and styled in allowed ways; collects the text."""

    def __init__(self, card: Card) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.opened_folds: list[bool] = []
        self.feed(card.html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in TAGS
        for name, value in attrs:
            assert name in ("style", "open")
            if value and name == "style":
                assert {part.split(":")[0] for part in value.split(";")} <= STYLES
        if tag == "details":
            self.opened_folds.append(("open", None) in attrs)
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


FRAMES = (
    Frame("/run/cell.py", 12, "<module>", "train(model)"),
    Frame(LIBRARY, 100, "_call", "return self._impl()"),
    Frame(LIBRARY, 110, "_impl", "return forward()"),
    Frame("/run/cell.py", 7, "forward", "return x @ weight"),
    Frame(LIBRARY, 22, "matmul", f"return {EVIL}"),
)
CAUSE = RankError(1, 1.79e9, "node-b", "ValueError", f"bad {EVIL}\nsecond line", FRAMES)


def make_failure(**more: Any) -> Failure:
    effects = (
        RankError(0, 1.79e9, "node-a", "RuntimeError", "gloo", FRAMES[3:4], is_effect=True),
        RankError(2, 1.79e9, "node-a", "RuntimeError", "gloo: other words", FRAMES[3:4], is_effect=True),
    )
    given = {"step": 120, "loss": 3.21456, "tail": f"step 119\n{EVIL}", "logs": "/run/<rank>.log", "effects": effects}
    return Failure(**{"headline": str(CAUSE), "causes": (CAUSE,), "life": 2, **given, **more})


def test_the_root_cause_stands_first() -> None:
    card = failure_card(make_failure())
    for text in (card.text, Reader(card).text):
        places = [text.index(words) for words in (
            "FAILED", "rank 1 failed (cell line 7): ValueError: bad", "last step 120, loss 3.2146", "rank 1 on node-b",
            "cell line 12", "train(model)", "2 lines of libraries", "cell line 7, in forward", "return x @ weight",
            "second line", "2 other ranks went with it: ranks 0, 2 lost another rank (cell line 7)", "step 119",
            "/run/<rank>.log",
        )]  # fmt: skip
        assert places == sorted(places)
        assert EVIL in text and "_impl" not in text.split("The whole traceback")[0]
    assert card._repr_mimebundle_() == {"text/html": card.html, "text/plain": card.text} and repr(card) == card.text
    assert "_impl" in Reader(card).text  # folded


def test_what_came_before_and_what_failed_too() -> None:
    link = Link("the cause of the next", "KeyError", EVIL, FRAMES[:1])
    chained = RankError(1, 1.0, "h", "ValueError", "x", FRAMES, chain=(link,))
    second = RankError(5, 2.0, "h", "OSError", "disk", FRAMES[:1])
    killed = RankError(3, 3.0, "h", "SIGTERM", "ended from outside", is_effect=True, exit_code=-15)
    card = failure_card(make_failure(causes=(chained, second), effects=(*make_failure().effects, killed)))
    for text in (card.text, Reader(card).text):
        assert f"Before it (the cause of the next): KeyError: {EVIL}" in text
        assert "By itself too: rank 5 failed (cell line 12): OSError: disk" in text
        text = " ".join(text.split())  # text is wrapped
        assert "3 other ranks went with it" in text and "rank 3 was ended by SIGTERM with the run" in text


def test_ranks_that_failed_alike_are_one_line() -> None:
    causes = tuple(RankError(rank, float(rank), "h", "RunError", "nan", FRAMES) for rank in range(60))
    others = tuple(RankError(rank, 99.0, "h", "OSError", "disk", FRAMES[:1]) for rank in (60, 61))
    card = failure_card(Failure(str(causes[0]), (*causes, *others), (), 1))
    for text in (card.text, Reader(card).text):
        assert "ranks 1-59 failed in the same way" in text and text.count("nan") < 5
        assert "By themselves too: ranks 60, 61 failed (cell line 12): OSError: disk" in text


def test_a_killed_rank_has_no_traceback_but_its_output() -> None:
    killed = RankError(1, 0.0, "", "SIGKILL", "killed from outside (out of memory?)", exit_code=-9)
    card = failure_card(Failure(str(killed), (killed,), (), 1, tail="last words"))
    assert card.text == (
        "FAILED: rank 1 was ended by SIGKILL: killed from outside (out of memory?)\n"
        "  The end of its output:\n    last words"
    )
    assert Reader(card).opened_folds == [True]


STUCK = tuple(
    RankStack(rank, WAITS, "node-a", 1, "all_reduce", own=1, frames=(Frame(LIBRARY, 1, "all_reduce"), FRAMES[0]))
    for rank in (0, 1, 3)
)
HANG = Hang(
    f"the run did not end in 5 s {EVIL}",
    "Ranks 0, 1, 3 wait.",
    1,
    1.0,
    (
        *STUCK,
        RankStack(2, ELSEWHERE, "node-b", 2, own=0, frames=(Frame("/run/cell.py", 9, "f", f"sleep({EVIL})"),)),
        RankStack(4, STOPPED, "node-b"),
        RankStack(5, DEAD),
    ),
)


def test_a_hang_shows_first_who_does_not_wait() -> None:
    card = hang_card(HANG)
    read = Reader(card)
    for text in (card.text, read.text):
        places = [text.index(words) for words in (
            "HUNG", f"did not end in 5 s {EVIL}", "Ranks 0, 1, 3 wait.", "rank 2 on node-b: elsewhere, cell line 9",
            f"sleep({EVIL})", "rank 4 on node-b: stopped", "rank 5: dead", "ranks 0, 1, 3 on node-a: in all_reduce",
        )]  # fmt: skip
        assert places == sorted(places)
    assert read.opened_folds == [True, False]
    whole = failure_card(Failure("x", (), (), 1, hang=HANG))
    assert whole.text.startswith("HUNG: the run did not end") and "rank 4 on node-b: stopped" in Reader(whole).text


def test_a_run_in_rows() -> None:
    line = f"python -m torch.distributed.run 'two  spaces' {EVIL} {'x' * 200}"
    card = run_card({
        "run": f"runs/{EVIL}", "status": "timed out", "step": 3, "num_steps": 10, "life": 1, "last_life": 4,
        "loss": 1.23456, "num_parameters": 44_700_000, "layout": {"strategy": "Zero1", "data": 2}, "started": 1.79e9,
        "git": {"commit": "0123456789abcdef", "dirty": True, "changes": "f00"}, "config_hash": "ab" * 32, "line": line,
        "anything": ["else", 1],
    })  # fmt: skip
    rows = dict(row.strip().split("  ", 1) for row in card.text.splitlines()[1:])
    assert {name: value.strip() for name, value in rows.items() if name != "started"} == {
        "step": "3 of 10", "life": "1, of at most 4", "loss": "1.2346", "parameters": "44,700,000",
        "anything": "else, 1",
        "layout": "strategy Zero1, data 2", "git": "0123456789ab with changes (f00)", "config": "ab" * 8,
        "command": line,
    }  # fmt: skip
    assert card.text.startswith(f"TIMED OUT: runs/{EVIL}") and rows["started"].strip().startswith("2026-")
    assert line in Reader(card).text


@pytest.mark.parametrize("facts", [{}, {"status": EVIL}, {"step": None, "git": {}, "loss": math.nan, "started": "?"}])
def test_a_run_of_which_little_is_known(facts: dict[str, Any]) -> None:
    card = run_card(facts)
    Reader(card)
    assert card.text


def test_wide_words_are_wrapped() -> None:
    wide = RankError(0, 1.0, "h", "ValueError", "w" * 4000, (Frame("/run/cell.py", 1, "f", "x = 1 + " * 25),))
    failure = make_failure(headline="h " * 500, causes=(wide,), tail="t" * 400 + "\n" + "b " * 200)
    assert max(map(len, failure_card(failure).text.splitlines())) <= WIDTH + 8
