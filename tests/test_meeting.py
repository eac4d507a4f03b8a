"""How supervisors of several nodes agree by files: who is there, what is asked, what an earlier run left."""

from pathlib import Path

import pytest

from biokit.launch.supervision.meeting import BEAT_S, LOST_S, READ_S, Follower, Leader, read_note
from biokit.runs import RunFolder


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Nodes:
    """A leader and followers in one process."""

    def __init__(self, folder: Path, num_nodes: int = 3) -> None:
        self.folder, self.clock = RunFolder(folder), Clock()
        self.leader = Leader(self.folder, num_nodes, self.clock)
        self.followers = [Follower(self.folder, node, num_nodes, self.clock) for node in range(1, num_nodes)]

    def talk(self, *silent: object, times: int = 4) -> None:
        """Everybody looks and speaks a few times; not those named."""
        for _ in range(times):
            self.clock.now += READ_S
            for one in (self.leader, *self.followers):
                if one not in silent:
                    one.exchange()


@pytest.fixture
def nodes(tmp_path: Path) -> Nodes:
    return Nodes(tmp_path)


def test_they_meet_and_a_life_begins_on_all(nodes: Nodes) -> None:
    assert nodes.leader.absent() == [1, 2]
    nodes.leader.exchange()
    assert nodes.leader.absent() == [1, 2]
    nodes.talk()
    assert nodes.leader.absent() == []
    assert [one.next_life() for one in nodes.followers] == [0, 0]
    nodes.leader.open_life(1, "node0:29500")
    nodes.talk()
    assert [(one.next_life(), one.leader.endpoint) for one in nodes.followers] == [(1, "node0:29500")] * 2
    assert nodes.leader.pending() == [1, 2] and nodes.leader.failed() == []


def test_a_life_that_failed_on_one_node_is_cut_on_all(nodes: Nodes) -> None:
    nodes.talk()
    nodes.leader.open_life(1, "a:1")
    nodes.talk()
    first, second = nodes.followers
    first.end_life(1, good=True)
    second.end_life(1, good=False)
    nodes.talk()
    assert (nodes.leader.pending(), nodes.leader.failed()) == ([], [2])
    assert nodes.leader.name([2]).startswith("node 2 (")
    assert first.leader.cut == 0
    nodes.leader.cut()
    nodes.talk()
    assert first.leader.cut == 1
    nodes.leader.open_life(2, "a:2")
    nodes.talk()
    assert [one.next_life() for one in nodes.followers] == [2, 2]
    assert (nodes.leader.pending(), nodes.leader.failed()) == ([1, 2], [])
    nodes.leader.close("finished")
    nodes.talk()
    assert [one.leader.outcome for one in nodes.followers] == ["finished"] * 2


def test_what_is_asked_on_one_node_is_asked_on_all(nodes: Nodes) -> None:
    nodes.talk()
    assert [one.wanted for one in nodes.followers] == [0, 0]
    nodes.followers[1].exchange(2)
    nodes.talk()
    assert (nodes.leader.wanted, nodes.followers[0].wanted) == (2, 2)
    nodes.leader.exchange(4)
    nodes.talk()
    assert nodes.followers[0].wanted == 4


def test_a_silent_node_is_named_and_clocks_are_not_compared(nodes: Nodes) -> None:
    nodes.talk()
    nodes.leader.open_life(1, "a:1")
    nodes.talk()
    for _ in range(int(LOST_S / BEAT_S)):
        nodes.clock.now += BEAT_S
        nodes.talk(nodes.followers[1], times=1)
    nodes.talk(nodes.followers[1], times=2)
    assert nodes.leader.lost() == [2] and nodes.followers[0].lost() == []
    nodes.talk()
    assert nodes.leader.lost() == []
    for _ in range(int(LOST_S / BEAT_S) + 1):
        nodes.clock.now += BEAT_S
        nodes.talk(nodes.leader, times=1)
    assert [one.lost() for one in nodes.followers] == [[0], [0]]


def test_a_node_that_ended_its_part_may_be_silent(nodes: Nodes) -> None:
    nodes.talk()
    nodes.leader.open_life(1, "a:1")
    nodes.talk()
    nodes.followers[1].end_life(1, good=True)
    nodes.talk()
    nodes.clock.now += 2 * LOST_S
    nodes.talk(nodes.followers[1])
    assert nodes.leader.lost() == [] and nodes.leader.pending() == [1]
    assert nodes.leader.absent() == [2]  # but no further life begins without it


def test_a_supervisor_that_was_started_again_takes_part_in_the_next_life_only(nodes: Nodes) -> None:
    nodes.talk()
    nodes.leader.open_life(1, "a:1")
    nodes.talk()
    old = nodes.followers[1]
    nodes.followers[1] = Follower(nodes.folder, 2, 3, nodes.clock)
    nodes.talk()
    assert (nodes.leader.failed(), nodes.leader.pending(), nodes.leader.absent()) == ([2], [1], [])
    assert (nodes.followers[1].next_life(), nodes.followers[0].next_life()) == (0, 1)
    nodes.leader.open_life(2, "a:2")
    nodes.talk()
    assert [one.next_life() for one in nodes.followers] == [2, 2]
    assert old.note.word != nodes.followers[1].note.word


def test_what_an_earlier_run_left_is_never_believed(tmp_path: Path) -> None:
    earlier = Nodes(tmp_path, 2)
    earlier.talk()
    earlier.leader.open_life(7, "old:1")
    earlier.followers[0].exchange(3)
    earlier.talk()
    earlier.leader.close("failed")
    later = Nodes(tmp_path, 2)
    later.followers[0].exchange()
    assert (later.followers[0].leader.word, later.followers[0].next_life(), later.followers[0].wanted) == ("", 0, 0)
    later.leader.exchange()
    assert later.leader.absent() == [1]
    later.talk()
    assert later.leader.absent() == []
    assert (later.leader.wanted, later.followers[0].wanted, later.followers[0].next_life()) == (0, 0, 0)
    assert later.followers[0].leader.outcome == ""


@pytest.mark.parametrize("text", ["", "{", "[]", '{"word": 7}', '{"word": "a", "heard": [1], "life": "x"}'])
def test_a_file_that_is_none_is_not_believed_either(text: str, nodes: Nodes) -> None:
    path = nodes.folder.node_file(1)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    note = read_note(nodes.folder, 1)
    assert note is None or (note.heard, note.life) == ({}, 0)
    nodes.leader.exchange()
    assert nodes.leader.absent() == [1, 2]


def test_files_are_rewritten_no_more_often_than_needed(nodes: Nodes) -> None:
    nodes.talk()
    nodes.talk()
    before = nodes.leader.note.beat
    for _ in range(20):
        nodes.clock.now += BEAT_S / 10
        nodes.leader.exchange()
    assert nodes.leader.note.beat - before in (1, 2)
