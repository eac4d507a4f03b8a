"""When each stage of a pipeline computes, sends and waits: DeepSpeed's order of commands, played on paper.

One forward, one backward (Narayanan et al. 2021, arXiv 2104.04473, section 2.2.1): stage s of p runs micro-batch j
forward in slot 2j + s and backward in slot 2j + 2p - 1 - s. A message is handed over only when both sides have come to
it, so that with unequal slots a stage waits more than the slots alone would say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

FORWARD, BACKWARD = "forward", "backward"
ACTIVATION, GRADIENT = "activation", "gradient"


@dataclass(frozen=True)
class Command:
    """One thing that a stage does with a micro-batch.

    Attributes:
        what: `forward` or `backward`, or what is handed over: `activation` or `gradient`.
        peer: the stage it is handed to or taken from; -1: none.
    """

    what: str
    micro: int
    peer: int = -1


@dataclass(frozen=True)
class Span:
    """A stretch of a stage's time, in seconds from the beginning of the step."""

    stage: int
    what: str
    micro: int
    start: float
    end: float


@dataclass(frozen=True)
class StageTimes:
    """Seconds of one micro-batch on a stage: its passes, and handing an activation on and a gradient back."""

    forward: float
    backward: float
    activation: float = 0.0
    gradient: float = 0.0


def count_in_flight(num_micros: int, num_stages: int, stage: int) -> int:
    """Micro-batches whose activations a stage keeps at most."""
    return min(num_micros, num_stages - stage)


def list_commands(num_micros: int, num_stages: int, stage: int) -> list[Command]:
    """What a stage does in a step, in order."""
    commands, last = list[Command](), num_stages - 1
    before = -1  # the micro-batch of the slot before, where there is one
    for slot in range(2 * (num_micros + last)):
        forward = (slot - stage) % 2 == 0
        micro = (slot - stage) // 2 if forward else (slot - 2 * num_stages + 1 + stage) // 2
        valid = 0 <= micro < num_micros
        if forward:
            if before >= 0 and stage:
                commands.append(Command(GRADIENT, before, stage - 1))
            if valid and stage:
                commands.append(Command(ACTIVATION, micro, stage - 1))
        else:
            if valid and stage < last:
                commands.append(Command(GRADIENT, micro, stage + 1))
            if before >= 0 and stage < last:
                commands.append(Command(ACTIVATION, before, stage + 1))
        if valid:
            commands.append(Command(FORWARD if forward else BACKWARD, micro))
        before = micro if valid else -1
    return commands


def play(stages: Sequence[StageTimes], num_micros: int) -> list[Span]:
    """The step as it would run: every pass and every message, with its time on each stage that takes part."""
    queues = [list_commands(num_micros, len(stages), stage)[::-1] for stage in range(len(stages))]
    clocks, spans = [0.0] * len(stages), list[Span]()
    while any(queues):
        for stage, queue in enumerate(queues):
            while queue:
                command = queue[-1]
                times = stages[stage if command.peer < 0 else min(stage, command.peer)]
                took = getattr(times, command.what)
                taking_part = [stage]
                if command.peer >= 0:
                    others = queues[command.peer]
                    if not others or others[-1] != Command(command.what, command.micro, stage):
                        break  # the other side is not there yet
                    taking_part.append(command.peer)
                start = max(clocks[one] for one in taking_part)
                for one in taking_part:
                    queues[one].pop()
                    spans.append(Span(one, command.what, command.micro, start, start + took))
                    clocks[one] = start + took
    return spans


def idle_share(spans: Sequence[Span], num_stages: int) -> float:
    """The part of all stages' time in which a stage neither computes nor hands anything over."""
    length = max(span.end for span in spans)
    return 1.0 - sum(span.end - span.start for span in spans) / (length * num_stages) if length else 0.0
