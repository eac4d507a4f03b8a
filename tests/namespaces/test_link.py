"""A link that is cut in the middle of a training on two nodes: everybody is told, and the run goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from biokit.runs import RunFolder
from tests.drills.kill_and_resume import losses
from tests.namespaces.linked import MARGIN_S, LinkedRun, configure
from tests.namespaces.pair import HOSTS, NodePair, missing_parts

STEPS, CUT_AT = 80, 25
pytestmark = pytest.mark.full


@pytest.fixture
def nodes() -> Iterator[NodePair]:
    if why := missing_parts():
        pytest.skip(f"no network namespaces: {why}")
    with NodePair() as pair:
        yield pair


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The run to compare with."""
    if why := missing_parts():
        pytest.skip(f"no network namespaces: {why}")
    config = configure(tmp_path_factory.mktemp("undisturbed") / "run", "wehi_mols", 30.0, STEPS)
    with NodePair() as pair:
        run = LinkedRun(pair, config)
        assert run.wait() == [0, 0], run.logs()
        assert pair.pids() == []
    assert len(losses(run.folder)) == STEPS
    return run.folder


def test_everybody_is_told_and_the_run_goes_on(nodes: NodePair, undisturbed: RunFolder, tmp_path: Path) -> None:
    limit_s = 12.0
    run = LinkedRun(nodes, configure(tmp_path / "run", str(undisturbed.path / "data"), limit_s, STEPS))
    run.reach(CUT_AT)
    nodes.cut()
    cut_at = time.time()
    try:
        run.wait_until("two errors", lambda: len(run.errors()) == 2, limit_s + MARGIN_S + 10)
    finally:
        nodes.mend()
    for error, other in zip(run.errors(), reversed(HOSTS), strict=True):
        assert error["time"] - cut_at < limit_s + MARGIN_S
        assert f"did not answer in {limit_s:g} s (cannot be reached: rank " in error["message"]
        assert f" on {other})" in error["message"]
    assert run.wait() == [0, 0], run.logs()
    assert nodes.pids() == []
    assert run.folder.last_life() == 2
    assert run.folder.read_manifest()["resumed_from"] > 0
    assert losses(run.folder) == losses(undisturbed)


def test_a_short_cut_is_survived(nodes: NodePair, undisturbed: RunFolder, tmp_path: Path) -> None:
    run = LinkedRun(nodes, configure(tmp_path / "run", str(undisturbed.path / "data"), 20.0, STEPS))
    run.reach(CUT_AT)
    nodes.cut()
    time.sleep(6)
    nodes.mend()
    assert run.wait() == [0, 0], run.logs()
    assert nodes.pids() == []
    assert run.folder.last_life() == 1
    assert losses(run.folder) == losses(undisturbed)


def test_sigterm_on_any_node_stops_all_at_a_step_boundary(
    nodes: NodePair, undisturbed: RunFolder, tmp_path: Path
) -> None:
    run = LinkedRun(nodes, configure(tmp_path / "run", str(undisturbed.path / "data"), 20.0, STEPS))
    run.reach(CUT_AT)
    run.stop(1)
    assert run.wait(40) == [0, 0], run.logs()
    assert nodes.pids() == []
    manifest = run.folder.read_manifest()
    assert manifest["status"] == "stopped"
    assert run.folder.checkpoint_steps()[-1] == manifest["step"] >= CUT_AT
