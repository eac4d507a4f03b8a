"""The line of `%torchrun`: torchrun's own parser, our flags beside it, and values that stay one word."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.run import get_args_parser

from biokit.errors import ConfigError
from biokit.launch.magics.magic_line import MagicLine, describe_flags, list_flags, read_line, split_words
from biokit.launch.magics.torchrun_flags import torchrun_parser
from biokit.launch.orders import GIVEN, HERE, Order
from tests.kernel import REPOSITORY

ODD = "a b\"c'; touch X # $(touch Y) `touch Z` | & \\ {x} $x \n end"


def read(line: str, is_cell: bool = False) -> MagicLine:
    return read_line(shlex.split(line), is_cell)


@pytest.mark.parametrize(
    ("line", "torchrun", "program", "placement", "num_ranks"),
    [
        ("x.py", "--nproc-per-node 1", "x.py", HERE, 1),
        ("--nproc-per-node 2 x.py --lr 1e-3", "--nproc-per-node 2", "x.py --lr 1e-3", HERE, 2),
        ("--nproc_per_node=2 --standalone x.py", "--nproc-per-node 2", "x.py", HERE, 2),
        ("--nnodes=1:1 x.py --nnodes 2", "--nnodes 1:1 --nproc-per-node 1", "x.py --nnodes 2", HERE, 1),
        ("-m pkg.mod a", "--nproc-per-node 1", "-m pkg.mod a", HERE, 1),
        ("--run-path /a/x.py", "--nproc-per-node 1", "/a/x.py", HERE, 1),
        ("--no-python ls -l", "--no-python --nproc-per-node 1", "ls -l", HERE, 1),
        ("--te 3 -r 1 x.py", "--redirects 1 --tee 3 --nproc-per-node 1", "x.py", HERE, 1),
        ("--max-restarts 2 x.py --bg", "--max-restarts 2 --nproc-per-node 1", "x.py --bg", HERE, 1),
        ("-- --bg --status", "--nproc-per-node 1", "--bg --status", HERE, 1),
        ("-- x.py --bg -- y", "--nproc-per-node 1", "x.py --bg -- y", HERE, 1),
        (
            "--nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint h:1 x.py",
            "--nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint h:1",
            "x.py", GIVEN, 16,
        ),
        ("--master-port 1234 x.py", "--nproc-per-node 1 --master-port 1234", "x.py", GIVEN, 1),
        ("--standalone --rdzv-id 7 x.py", "--rdzv-id 7 --standalone --nproc-per-node 1", "x.py", GIVEN, 1),
    ],
)  # fmt: skip
def test_flags_become_an_order(line: str, torchrun: str, program: str, placement: str, num_ranks: int) -> None:
    asked = read(line)
    assert sorted(asked.torchrun) == sorted(torchrun.split())
    assert (asked.program, asked.placement, asked.num_ranks) == (tuple(program.split()), placement, num_ranks)
    # read again by torchrun, they mean the same
    parser = get_args_parser()
    ours = vars(parser.parse_args([*asked.torchrun, "--", *asked.program]))
    typed = vars(parser.parse_args(shlex.split(line)))
    skipped = {"module", "run_path", "standalone", "training_script", "training_script_args"}
    assert {k: v for k, v in ours.items() if k not in skipped} == {k: v for k, v in typed.items() if k not in skipped}


def test_our_flags_stand_before_the_script() -> None:
    line = "--bg --nproc-per-node 2 --timeout=5 --run-dir 'my run' --dry_run x.py --timeout 9 --run-dir no"
    assert read(line) == MagicLine(
        torchrun=("--nproc-per-node", "2"),
        program=("x.py", "--timeout", "9", "--run-dir", "no"),
        num_ranks=2, background=True, dry_run=True, timeout_s=5.0, run_dir="my run",
    )  # fmt: skip
    asked = read("--detach x.py")
    assert asked.background and asked.detach


def test_a_cell_is_the_program() -> None:
    asked = read("--nproc-per-node 2 --out a,b --out c --with d -- --lr 3 --bg", is_cell=True)
    assert asked == MagicLine(
        torchrun=("--nproc-per-node", "2"),
        program=("--lr", "3", "--bg"),
        num_ranks=2,
        out=("a", "b", "c"),
        given=("d",),
    )


def test_a_node_by_the_environment_is_no_meeting_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PET_RDZV_ENDPOINT", "host:1")
    torchrun_parser.cache_clear()
    assert read("x.py").placement == GIVEN
    monkeypatch.undo()
    torchrun_parser.cache_clear()


@pytest.mark.parametrize(
    ("line", "is_cell", "message"),
    [
        ("", False, "%torchrun: the following arguments are required: training_script"),
        ("--bogus x.py", False, "%torchrun: unrecognized arguments: --bogus"),
        ("--max-restarts x y.py", False, "argument --max-restarts/--max_restarts: invalid int value: 'x'"),
        ("--nproc-per-node", False, "argument --nproc-per-node/--nproc_per_node: expected one argument"),
        ("--nproc-per-node two x.py", False, "Unsupported nproc_per_node value: two"),
        ("--nnodes a x.py", False, "invalid literal for int"),
        ("--start-method thread x.py", False, "invalid choice: 'thread'"),
        ("--no-python -m x", False, "--no-python and --module exclude one another"),
        ("--timeout soon x.py", False, "--timeout soon: it is not a number of seconds"),
        ("--timeout 0 x.py", False, "--timeout 0: "),
        ("--run-dir", False, "%torchrun --run-dir: its value is missing"),
        ("--out a x.py", False, "--out and --with are for the variables of a cell"),
        ("--stop a b.py", False, "--stop stands beside other words"),
        ("--attach a --bg", False, "--attach stands beside other words"),
        ("--status", True, "--status stands beside other words"),
        ("--nproc-per-node 2 x.py", True, "x.py is a program, and the cell is one too"),
        ("--no-python", True, "--no-python and a cell exclude one another"),
        ("--out 2x", True, "--out 2x: it is not a name"),
        ("--nproc-per-node 0 x.py", False, "--nproc-per-node 0: it is below 1"),
        ("--nproc-per-node -1 x.py", False, "it is below 1"),
        ("--nnodes 0 x.py", False, "min_nodes must be > 0"),
        ("--nnodes 2:1 x.py", False, "min_nodes must be > 0 and <= max_nodes"),
        ("--nnodes 2", True, "%%torchrun --nnodes 2: there is no --rdzv-endpoint"),
        ("--tee 9 x.py", False, "9 does not match"),
        ("--redirects 0:7 x.py", False, "0:7 does not match"),
        ("--max-restarts -3 x.py", False, "max_restarts must be >= 0"),
        ("--logs-specs nosuch x.py", False, "nosuch"),
        ("--log-dir /proc/nope x.py", False, "--log-dir /proc/nope: it cannot be made"),
        ("x.py a\0b", False, "a word holds a NUL character"),
        (f"x.py {'a' * 200_000}", False, "a word has 200,000 characters"),
    ],
)
def test_mistakes(line: str, is_cell: bool, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(line, is_cell)
    assert message in str(caught.value)


def test_values_stay_one_word_whatever_they_hold() -> None:
    names = {"odd": ODD, "lr": 1e-3, "d": {"k": ODD}, "empty": "", "words": ["a", "b"]}
    expected = ["x.py", "--a", ODD, f"--b={ODD}", ODD, "0.001", "", "a b", "v0.001w", repr(ODD), ODD.upper()]
    line = "x.py --a {odd} --b={d['k']} $odd {lr} {empty} {' '.join(words)} v{lr}w {odd!r} '{odd.upper()}'"
    assert split_words(line, names) == expected


def test_what_is_no_expression_stays() -> None:
    line = """x.py '{"a": 1, "b": [2]}' {"c": {"d": 3}} {{lr}} $$lr $HOME 'a  b' {} "{'e': 4}" }"""
    assert split_words(line, {"lr": 1}) == [
        "x.py", '{"a": 1, "b": [2]}', '{"c": {"d": 3}}', "{lr}", "$lr", "$HOME", "a  b", "{}", "{'e': 4}", "}",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "message"),
    [("{lr}", "NameError: name 'lr'"), ("{1/0}", "ZeroDivisionError"), ("{a b}", "SyntaxError"), ("'a", "Close the")],
)  # fmt: skip
def test_expressions_that_fail_are_not_passed_on(line: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        split_words(line, {})
    with pytest.raises(ConfigError, match=r"^%submit "):
        split_words(line, {}, "%submit")


def test_flags_are_looked_at_without_a_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    asked = read(f"--nproc-per-node 2 --log-dir {tmp_path / 'a' / 'logs'} x.py")
    assert asked.num_ranks == 2 and not list(tmp_path.iterdir()) and "OMP_NUM_THREADS" not in os.environ


def test_an_interrupt_leaves_no_import_half_done(tmp_path: Path) -> None:
    """A line that is read first has torch imported; the interrupt comes while a module of it waits."""
    (tmp_path / "slow.py").write_text("import time\nprint('begun', flush=True)\ntime.sleep(1)\nx = 1\n")
    code = (
        "from biokit.launch.whole_imports import import_whole\n"
        "try:\n    import_whole('slow')\n    print('not interrupted')\n"
        "except KeyboardInterrupt:\n    pass\n"
        "print(import_whole('slow').x)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(tmp_path)])}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30)[0] == "1\n"  # imported once, to its end


def test_torch_is_imported_whole() -> None:
    code = (
        "import sys, threading\nfrom biokit.launch.magics.magic_line import read_line\n"
        "class Finder:\n    def find_spec(self, name, path=None, target=None):\n"
        "        assert name != 'torch' or threading.current_thread() is not threading.main_thread()\n"
        "sys.meta_path.insert(0, Finder())\nread_line(['x.py'], False)\nassert 'torch' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_order_line_is_safe_for_a_shell() -> None:
    line = Order("script", ("x.py", ODD)).line()
    assert shlex.split(line)[1:] == ["x.py", ODD]


def test_all_flags_are_offered_and_described() -> None:
    flags = set(list_flags())
    actions: list[Any] = get_args_parser()._actions
    theirs = {word for action in actions for word in action.option_strings if word[:2] == "--"}
    assert theirs | {"--out", "--with", "--bg", "--detach", "--timeout", "--dry-run", "--run-dir"} <= flags
    assert flags - theirs == {
        "--out", "--with", "--bg", "--detach", "--timeout", "--dry-run", "--run-dir", "--attach", "--stop", "--status",
    }  # fmt: skip
    text = describe_flags()
    assert all(flag in text for flag in flags if "_" not in flag) and "Maximum number of worker group restarts" in text


def test_loading_costs_no_torch() -> None:
    code = "import sys; from biokit.launch.magics import extension, torchrun_magics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
