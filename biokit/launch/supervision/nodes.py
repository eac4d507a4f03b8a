"""The supervisors of a run on several nodes: node 0 opens each life and judges it, the others follow.

Each looks after the agent and the ranks of its own node as on one machine. A life whose agent failed on one node, or
that a node left, is ended on all; the next one begins on all, at a new port.
"""

from __future__ import annotations

import time
import traceback
from dataclasses import replace

from biokit import failures, stacks
from biokit.errors import ConfigError
from biokit.launch import states
from biokit.launch.orders import Order
from biokit.launch.rendezvous import (
    find_local_address,
    first_free_port,
    join_endpoint,
    network_variables,
    split_endpoint,
)
from biokit.launch.supervision.lives import Life
from biokit.launch.supervision.meeting import LEADER, LOST_S, Follower, Leader, Meeting
from biokit.launch.supervision.supervisor import Ask, Limits, Supervisor, say
from biokit.launch.supervision.watchdog import Watchdog
from biokit.runs import RunFolder

COME_S = 300.0  # that the nodes have to come: a person may start them one after another
SAY_S = 15.0  # between two lines about who is still missing
CUT_WAIT_S = 2.0  # from the failure on another node to the end here: the ranks here shall tell what they saw
DUMP_WAIT_S = 2.5  # that the other nodes have to ask their ranks where they stand
LAST_WORD_S = 10.0  # that a follower waits for the leader's
GOOD = (states.FINISHED, states.STOPPED)


def supervisor_of_node(folder: RunFolder, order: Order, node_rank: int, owner: int, limits: Limits) -> Supervisor:
    """The supervisor of one of the nodes of a run."""
    kind = LeadingSupervisor if node_rank == LEADER else FollowingSupervisor
    return kind(folder, order, node_rank, owner, limits)


class NodeSupervisor(Supervisor):
    """What both kinds share.

    Attributes:
        lost: why the nodes cannot go on together; empty while they can.
    """

    meeting: Meeting

    def __init__(self, folder: RunFolder, order: Order, node_rank: int, owner: int, limits: Limits) -> None:
        super().__init__(folder, order, node_rank, owner, limits)
        self.lost = ""
        self._failed_elsewhere_at = 0.0

    def _run_lives(self) -> str:
        self._place(self.order.endpoint)  # to say at once what is wrong with it
        return super()._run_lives()

    def _ask(self) -> Ask:
        self._signal = max(self._signal, Ask(min(self.meeting.wanted, Ask.ORPHAN)))
        ask = super()._ask()
        self.meeting.exchange(ask)
        return ask

    def _look_after(self, life: Life, watchdog: Watchdog) -> str:
        outcome = super()._look_after(life, watchdog)
        if not outcome and (why := self._failed_elsewhere(life.number)):
            return self._end_with_others(life, why)
        return outcome

    def _failed_elsewhere(self, number: int) -> str:
        """Why a life is to end although all is well here; else empty."""
        raise NotImplementedError

    def _end_with_others(self, life: Life, why: str) -> str:
        """End a life that failed elsewhere, once its ranks have had time to tell what they saw."""
        if not self._failed_elsewhere_at:
            self._failed_elsewhere_at = time.monotonic()
            say(f"life {life.number}: {why}")
        if time.monotonic() - self._failed_elsewhere_at < CUT_WAIT_S:
            return ""
        life.end(self.limits.grace_s)
        return states.FAILED

    def _place(self, endpoint: str) -> None:
        """Have the next life's agent meet the others there.

        Raises:
            ConfigError: there is no way from this node to node 0.
        """
        address = find_local_address(endpoint)
        if not address:
            found = "this node knows no such host, or no way to it"
            raise ConfigError(f"MASTER_ADDR of {endpoint}", found, "Give an address of node 0 that every node reaches")
        variables = network_variables(address)
        self.order = replace(self.order, endpoint=endpoint, environment={**variables, **self.order.environment})
        self._failed_elsewhere_at = 0.0

    def _pause(self) -> None:
        """Wait a little; the other nodes are heard, and hear of this one."""
        self._beat()
        self._ask()
        time.sleep(self.limits.poll_s)

    def _did_not_come(self, nodes: list[int]) -> str:
        name = self.meeting.name(nodes)
        return f"{name} did not come within {COME_S:g} s: was it started, and does it see {self.folder.path}?"

    def _give_up(self, why: str) -> str:
        """The run cannot go on; its outcome."""
        if not self.lost:
            self.lost = why
            say(why)
        return states.FAILED


class LeadingSupervisor(NodeSupervisor):
    """Node 0's."""

    def __init__(self, folder: RunFolder, order: Order, node_rank: int, owner: int, limits: Limits) -> None:
        super().__init__(folder, order, node_rank, owner, limits)
        self.meeting: Leader = Leader(folder, order.num_nodes)
        self._host, self._next_port = split_endpoint(order.endpoint)

    def _run_lives(self) -> str:
        outcome = states.FAILED
        try:
            outcome = super()._run_lives()
        finally:
            self.meeting.close(outcome)
        return outcome

    def _run_life(self, number: int) -> str:
        if outcome := self._gather():
            return outcome
        port = first_free_port(self._next_port)
        self._next_port = port + 1  # that of the life before may still be in use
        self._place(join_endpoint(self._host, port))
        self.meeting.open_life(number, self.order.endpoint)
        return super()._run_life(number)

    def _gather(self) -> str:
        """Wait until all nodes are there; the run's outcome where they do not come, else empty."""
        begun = said = time.monotonic()
        while absent := self.meeting.absent():
            if self._ask():
                return self._end_without_life()
            if time.monotonic() - begun > COME_S:
                return self._give_up(self._did_not_come(absent))
            if time.monotonic() - said > SAY_S:
                said = time.monotonic()
                say(f"waiting for {self.meeting.name(absent)}")
            self._pause()
        return ""

    def _failed_elsewhere(self, number: int) -> str:
        if silent := self.meeting.lost():
            self._give_up(f"{self.meeting.name(silent)} has not been heard of for {LOST_S:g} s")
            return self.lost
        failed = self.meeting.failed()
        return f"it failed on {self.meeting.name(failed)}" if failed else ""

    def _conclude(self, life: Life, outcome: str) -> str:
        """Wait for the other nodes, judge the life of all of them, and tell what there is to tell."""
        while True:
            why = self._failed_elsewhere(life.number)
            if why and outcome in GOOD:
                say(f"life {life.number}: {why}")
                outcome = states.FAILED
            if outcome not in GOOD:
                self.meeting.cut()
            if self.lost or not self.meeting.pending():
                return super()._conclude(life, outcome)
            self._pause()

    def _note_failure(self, number: int) -> None:
        super()._note_failure(number)
        if self.lost and self._failure is not None:
            self._failure = replace(self._failure, headline=self.lost)
            failures.save_failure(self.folder, self._failure)

    def _note_hang(self, life: Life, reason: str) -> None:
        if self._asked_before != Ask.TIME_OUT:
            return super()._note_hang(life, reason)
        end = time.monotonic() + DUMP_WAIT_S  # their ranks have to tell before any is ended
        while time.monotonic() < end:
            self._pause()
        super()._note_hang(life, reason)
        self.meeting.cut()

    def _is_hopeless(self, number: int) -> bool:
        return bool(self.lost) or super()._is_hopeless(number)


class FollowingSupervisor(NodeSupervisor):
    """Another node's."""

    def __init__(self, folder: RunFolder, order: Order, node_rank: int, owner: int, limits: Limits) -> None:
        super().__init__(folder, order, node_rank, owner, limits)
        self.meeting: Follower = Follower(folder, node_rank, order.num_nodes)

    def _ask(self) -> Ask:
        if not self.meeting.leader.word:  # a STOP file of an earlier run: node 0 removes it before it meets anybody
            self._stop_looked_at = time.monotonic()
        return super()._ask()

    def _run_lives(self) -> str:
        self._write(state=states.STARTING)
        self._place(self.order.endpoint)
        while not (outcome := self._await_life()):
            number = self.meeting.next_life()
            self._place(self.meeting.leader.endpoint)
            self._write(first_life=self.state.first_life or number)
            self._run_life(number)
            self._write(state=states.WAITING)
        return outcome

    def _await_life(self) -> str:
        """Wait until node 0 opens a life; the run's outcome where it does not, else empty."""
        begun, asked_at = time.monotonic(), 0.0
        while not self.meeting.next_life():
            self._pause()
            leader, now = self.meeting.leader, time.monotonic()
            if leader.outcome:
                return leader.outcome if leader.outcome in states.EXIT_CODES else states.FAILED
            if self.lost or self._failed_elsewhere(0):
                return states.FAILED
            if self._ask():
                asked_at = asked_at or now
                if now - asked_at > LAST_WORD_S:
                    return self._end_without_life()
            elif not leader.word and now - begun > COME_S:
                return self._give_up(self._did_not_come([LEADER]))
        return ""

    def _failed_elsewhere(self, number: int) -> str:
        if self.meeting.lost():
            self._give_up(f"{self.meeting.name([LEADER])} has not been heard of for {LOST_S:g} s")
            return self.lost
        return "it failed on another node" if 0 < number <= self.meeting.leader.cut else ""

    def _conclude(self, life: Life, outcome: str) -> str:
        """Node 0 tells what there is to tell: it hears of all."""
        say(f"life {life.number}: {outcome} here")
        self.meeting.end_life(life.number, outcome in GOOD)
        return outcome

    def _note_hang(self, life: Life, reason: str) -> None:
        if self._asked_before != Ask.TIME_OUT:
            return super()._note_hang(life, reason)
        try:
            stacks.find_hang(life.files, reason)  # node 0 reads the answers
        except Exception:
            say(f"life {life.number}: where the ranks stand cannot be told:\n{traceback.format_exc()}")
        end = time.monotonic() + LAST_WORD_S
        while self.meeting.leader.cut < life.number and time.monotonic() < end:
            self._pause()
