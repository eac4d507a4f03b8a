"""The line of `%torchrun` and `%%torchrun`: torchrun's own flags, read by its own parser, and a few more.

Words are split as a shell would, but no shell ever sees them; `{expression}` and `$name` are replaced after the split,
so that a value stays one word whatever it holds.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from biokit.errors import ConfigError
from biokit.launch.magics.torchrun_flags import count_processes, torchrun_parser
from biokit.launch.orders import GIVEN, HERE, SLURM
from biokit.launch.slurm.jobs import choose_placement

CELL = "cell.py"
HELP = """%torchrun [torchrun's flags] [own flags] script.py [arguments]
%%torchrun [torchrun's flags] [own flags] [-- arguments]      runs the cell in every process

No flag says where processes meet: one node, as if --standalone was given. Own flags:
  --out NAMES     variables of rank 0 that come back when the cell ends: arrays, tensors, numbers, texts, lists, dicts
                  (cell only; names separated by commas)
  --with NAMES    variables of the notebook that every rank gets first (cell only)
  --bg            return a Run at once; it ends with this kernel
  --detach        the same, but it outlives the kernel: it ends by --stop or after --timeout (default 24 h)
  --timeout S     end everything after S seconds, and show where each rank stood
  --run-dir DIR   the run folder (default: a new one under runs/torchrun)
  --dry-run       print the command and the files that there would be, start nothing
  --attach DIR    the Run of a folder, alive or ended        --stop DIR    end one        --status    list them
Values: {expression} and $name become one word each, whatever they hold; {{ and $$ are the characters themselves.

torchrun's own flags:
"""
_VALUED = ("--out", "--with", "--timeout", "--run-dir", "--attach", "--stop")
_SWITCHES = ("--bg", "--detach", "--dry-run", "--status")
_RENDEZVOUS = ("rdzv_backend", "rdzv_endpoint", "rdzv_id", "rdzv_conf", "node_rank", "master_addr", "master_port")
_UNSET: Any = object()
MAX_WORD_BYTES = (1 << 17) - 1  # of one argument of a program, on Linux
_MARK = re.compile("\ue000(\\d+)\ue001")  # private characters: nobody types them


@dataclass(frozen=True)
class MagicLine:
    """What a line asks for.

    Attributes:
        torchrun: its flags, as its help spells them; without those that the program or the placement stand for.
        program: what each rank runs, as Python takes it; of a cell only its arguments.
        num_nodes: of a Slurm allocation; 1 where torchrun's flags say where the nodes meet.
        num_ranks: of all nodes.
    """

    torchrun: tuple[str, ...] = ()
    program: tuple[str, ...] = ()
    placement: str = HERE
    num_nodes: int = 1
    num_ranks: int = 1
    out: tuple[str, ...] = ()
    given: tuple[str, ...] = ()
    background: bool = False
    detach: bool = False
    dry_run: bool = False
    status: bool = False
    help: bool = False
    timeout_s: float = 0.0
    run_dir: str = ""
    attach: str = ""
    stop: str = ""


@dataclass
class _Split:
    """A line taken apart: own flags by name, torchrun's words, and what follows the program."""

    own: dict[str, list[str]] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)
    program: str = ""
    arguments: list[str] = field(default_factory=list)


def read_line(words: Sequence[str], is_cell: bool) -> MagicLine:
    """What a line asks for.

    Raises:
        ConfigError: torchrun's parser or one of our flags refuses it.
    """
    _check_words(words, _asked(is_cell))
    split = _split_cell(words) if is_cell else _split_line(words)
    own = split.own
    if "--help" in own:
        return MagicLine(help=True)
    if {"--attach", "--stop", "--status"} & set(own):
        if len(own) > 1 or split.words or split.program:
            name = next(iter({"--attach", "--stop", "--status"} & set(own)))
            raise ConfigError(_asked(is_cell), f"{name} stands beside other words", f"Give %torchrun {name} alone")
        return MagicLine(attach=_one(own, "--attach"), stop=_one(own, "--stop"), status="--status" in own)
    if not is_cell and {"--out", "--with"} & set(own):
        found = "--out and --with are for the variables of a cell"
        raise ConfigError(_asked(is_cell), found, "Use %%torchrun, or give values as arguments: --lr {lr}")
    torchrun = _read_torchrun(split, is_cell)
    return MagicLine(
        **torchrun,
        out=_names(own, "--out"),
        given=_names(own, "--with"),
        background="--bg" in own or "--detach" in own,
        detach="--detach" in own,
        dry_run="--dry-run" in own,
        timeout_s=_seconds(own, "--timeout"),
        run_dir=_one(own, "--run-dir"),
    )


def split_words(line: str, names: Mapping[str, Any], magic: str = "%torchrun") -> list[str]:
    """The words of a line, quotes as in a shell, with `{expression}` and `$name` replaced; each stays one word.

    Args:
        magic: whose line it is, for errors.

    Raises:
        ConfigError: a quote that does not end, or an expression that fails.
    """
    spans: list[str] = []
    hidden = "".join(_hide_spans(line, spans))
    try:
        words = shlex.split(hidden)
    except ValueError as error:
        raise ConfigError(f"{magic} {line.strip()}", str(error), "Close the quote") from error
    return [_fill(_MARK.split(word), spans, names, magic) for word in words]


class GivenWord(str):
    """A word that begins with a value of the notebook, which is no flag even where it looks like one."""

    __slots__ = ()


def refuse_given_flag(word: str, magic: str) -> None:
    """Nothing, unless a value stands where it would be read as a flag.

    Raises:
        ConfigError: it does.
    """
    if isinstance(word, GivenWord) and word.startswith("-"):
        found = f"the value {word[:80]!r} begins with a hyphen and would be read as a flag"
        raise ConfigError(magic, found, "Write it behind an equals sign: --name={value}")


def _fill(parts: Sequence[str], spans: Sequence[str], names: Mapping[str, Any], magic: str) -> str:
    """A word from its parts: plain text and numbers of spans in turn."""
    filled = [_expand(spans[int(part)] if i % 2 else part, names, magic) for i, part in enumerate(parts)]
    begins_given = (not parts[0] and len(parts) > 1) or parts[0].startswith("$")
    return (GivenWord if begins_given and "".join(filled) != parts[0] else str)("".join(filled))


def describe_flags() -> str:
    """The help text: own flags, then torchrun's."""
    return HELP + torchrun_parser().format_help().partition("options:\n")[2]


def list_flags() -> list[str]:
    """All flags, as completion offers them; torchrun's in both of its spellings."""
    return sorted({*flags_of(torchrun_parser()), *_VALUED, *_SWITCHES})


def flags_of(parser: argparse.ArgumentParser) -> list[str]:
    """The long flags of a parser."""
    return [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]


def _hide_spans(line: str, spans: list[str]) -> list[str]:
    """The line in pieces, with a mark for each `{...}`: spaces and quotes in it are Python's."""
    pieces, depth, start = [], 0, 0
    for i, character in enumerate(line):
        if character == "{":
            if depth == 0:
                pieces.append(line[start:i])
                start = i
            depth += 1
        elif character == "}" and depth:
            depth -= 1
            if depth == 0:
                pieces.append(f"\ue000{len(spans)}\ue001")
                spans.append(line[start : i + 1])
                start = i + 1
    return [*pieces, line[start:]]


def _expand(piece: str, names: Mapping[str, Any], magic: str) -> str:
    """A `{...}` or plain text with its values, by IPython's rules; a dict stays as it is (JSON for a script)."""
    if not {"{", "$"} & set(piece) or _is_dict(piece):
        return piece
    from IPython.utils.text import DollarFormatter

    try:
        return DollarFormatter().vformat(piece, args=[], kwargs=dict(names))
    except Exception as error:  # any: the expression is the user's
        if not piece.startswith("{"):
            return piece
        found = f"it fails ({type(error).__name__}: {error})"
        raise ConfigError(f"{magic} {piece}", found, "Mend it, or write {{ and }} for braces") from error


def _is_dict(piece: str) -> bool:
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            return isinstance(read(piece), dict)
    return False


def _split_line(words: Sequence[str]) -> _Split:
    """Own flags are taken out up to the program: the first word with which torchrun's parser is content."""
    split = _Split()
    rest = _take_own(words, split)
    for i, word in rest:
        split.words.append(word)
        if _try(split.words) is not None:
            split.words, split.program, split.arguments = split.words[:-1], word, list(words[i + 1 :])
            break
    else:
        if not split.own.keys() & {"--help", "--attach", "--stop", "--status"}:
            _parse(split.words, is_cell=False)  # says what is wrong with them
    return split


def _split_cell(words: Sequence[str]) -> _Split:
    split = _Split(program=CELL)
    plain = (i for i, word in enumerate(words) if word == "--" and not isinstance(word, GivenWord))
    end = next(plain, len(words))
    split.words = [word for _, word in _take_own(words[:end], split)]
    split.arguments = list(words[end + 1 :])
    return split


def _take_own(words: Sequence[str], split: _Split) -> Any:
    """Yield (index, word) of those that are not ours; ours go to `split.own`."""
    i = 0
    is_open = True  # after `--` everything is torchrun's
    while i < len(words):
        word = words[i]
        name, equals, value = word.partition("=")
        name = name.replace("_", "-")
        is_open = is_open and word != "--"
        refuse_given_flag(word, "%torchrun")
        if not is_open:
            yield i, word
        elif word in ("-h", "--help"):
            split.own["--help"] = []
        elif name in _SWITCHES and not equals:
            split.own[name] = []
        elif name in _VALUED:
            if not equals:
                i += 1
                if i == len(words):
                    raise ConfigError(f"%torchrun {name}", "its value is missing", "See %torchrun?")
                value = words[i]
            split.own.setdefault(name, []).append(value)
        else:
            yield i, word
        i += 1


def _read_torchrun(split: _Split, is_cell: bool) -> dict[str, Any]:
    """The fields of a MagicLine that torchrun's flags decide."""
    asked = _asked(is_cell)
    options = _parse([*split.words, split.program], is_cell)
    if options.training_script != split.program or options.training_script_args:
        found = f"{options.training_script} is a program, and the cell is one too"
        raise ConfigError(asked, found, "Use %torchrun for it; arguments of the cell stand after --")
    if options.no_python and (options.module or is_cell):
        what = "a cell" if is_cell else "--module"
        raise ConfigError(asked, f"--no-python and {what} exclude one another", "Leave one of them out")
    given = _find_given(split)
    num_nodes, num_local = count_processes(options, asked)
    meets = any(name in given or os.environ.get(f"PET_{name.upper()}") for name in _RENDEZVOUS)
    here = choose_placement(num_nodes)
    if num_nodes > 1 and here == HERE and not meets:
        do = "Say where the nodes meet; for two on this machine: start_training(..., num_nodes=2)"
        raise ConfigError(f"{asked} --nnodes {options.nnodes}", "there is no --rdzv-endpoint", do)
    placement = GIVEN if meets else here
    dropped = {"module", "run_path"} | {HERE: {"standalone"}, SLURM: {"standalone", "nnodes"}}.get(placement, set())
    given.setdefault("nproc_per_node", options.nproc_per_node)
    module = ["-m"] if options.module else []
    start = [] if is_cell else [*module, split.program]
    return {
        "torchrun": tuple(_spell({name: value for name, value in given.items() if name not in dropped})),
        "program": (*start, *split.arguments),
        "placement": placement,
        "num_nodes": num_nodes if placement == SLURM else 1,
        "num_ranks": num_local * num_nodes,
    }


def _find_given(split: _Split) -> dict[str, Any]:
    """Which of torchrun's options stand on the line, and their values: what the parser does not set stays unset."""
    unset = dict.fromkeys(vars(torchrun_parser().parse_args(["x"])), _UNSET)
    options = vars(torchrun_parser().parse_args([*split.words, split.program], argparse.Namespace(**unset)))
    return {
        name: value for name, value in options.items() if value is not _UNSET and not name.startswith("training_script")
    }


def _spell(options: Mapping[str, Any]) -> list[str]:
    words = []
    for name, value in options.items():
        words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return words


def _try(words: Sequence[str]) -> argparse.Namespace | None:
    with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):
        return torchrun_parser().parse_args(list(words))
    return None


def _parse(words: Sequence[str], is_cell: bool) -> argparse.Namespace:
    """torchrun's options.

    Raises:
        ConfigError: with its own words.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return torchrun_parser().parse_args(list(words))
    except SystemExit as error:
        found = said.getvalue().strip().rpartition("error: ")[2]
        raise ConfigError(_asked(is_cell), found, "See %torchrun?") from error


def _check_words(words: Sequence[str], asked: str) -> None:
    """Refuse what no program can be given."""
    for word in words:
        if "\0" in word:
            raise ConfigError(asked, "a word holds a NUL character", "Leave it out")
        if len(os.fsencode(word)) > MAX_WORD_BYTES:
            found = f"a word has {len(word):,} characters, and Linux passes on {MAX_WORD_BYTES:,} bytes"
            raise ConfigError(asked, found, "Give it as a file")


def _asked(is_cell: bool) -> str:
    return "%%torchrun" if is_cell else "%torchrun"


def _one(own: Mapping[str, list[str]], name: str) -> str:
    return own[name][-1] if name in own else ""


def _names(own: Mapping[str, list[str]], flag: str) -> tuple[str, ...]:
    names = [name for value in own.get(flag, ()) for name in re.split(r"[,\s]+", value.strip()) if name]
    for name in names:
        if not name.isidentifier():
            raise ConfigError(f"{flag} {name}", "it is not a name", "Give names of variables, separated by commas")
    return tuple(dict.fromkeys(names))


def _seconds(own: Mapping[str, list[str]], flag: str) -> float:
    text = _one(own, flag)
    if not text:
        return 0.0
    with contextlib.suppress(ValueError):
        seconds = float(text)
        if 0 < seconds < float("inf"):
            return seconds
    raise ConfigError(f"{flag} {text}", "it is not a number of seconds", "Give a number above 0")
