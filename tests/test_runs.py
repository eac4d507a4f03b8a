"""The run folder: what is whole counts, what is torn does not."""

import json
import multiprocessing
import os

import pytest

from biokit.errors import RunError
from biokit.runs import MetricsWriter, RunFolder, write_atomically


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.create()
    return folder


def test_layout(folder):
    assert folder.metrics_file(3).name == "rank_00003.jsonl"
    assert folder.checkpoint_dir(120).name == "step_00000120"


def test_checkpoint_steps_ignore_everything_else(folder):
    for name in ("step_00000010", "step_00000002", ".partial-step_00000030-1", "step_x"):
        (folder.checkpoints / name).mkdir()
    (folder.checkpoints / "step_00000099").touch()
    assert folder.checkpoint_steps() == [2, 10]


def test_metrics_round_trip_and_torn_line(folder):
    writer = MetricsWriter(folder)
    for step in (1, 2, 3):
        writer.write({"step": step, "loss": step / 3})
    writer.close()
    with folder.metrics_file().open("a") as file:
        file.write('{"step": 4, "lo')
    lines = folder.read_metrics()
    assert [line["loss"] for line in lines] == [1 / 3, 2 / 3, 1.0]
    assert all("time" in line for line in lines)


def test_resume_drops_the_lines_it_will_redo(folder):
    for resume_step, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        writer = MetricsWriter(folder, resume_step=resume_step)
        for step in steps:
            writer.write({"step": step})
        writer.close()
    assert [line["step"] for line in folder.read_metrics()] == [1, 2, 3, 4]
    MetricsWriter(folder).close()
    assert folder.read_metrics() == []


def test_manifest(folder):
    folder.update_manifest(status="running", step=1)
    assert folder.update_manifest(step=2) == folder.read_manifest() == {"status": "running", "step": 2}
    folder.manifest_file.write_text("{")
    with pytest.raises(RunError, match="cannot be read"):
        folder.read_manifest()
    folder.manifest_file.write_text("[]")
    with pytest.raises(RunError, match="not a mapping"):
        folder.read_manifest()


def test_failed_write_leaves_the_old_text(folder):
    write_atomically(folder.config_file, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(folder.config_file, "new \ud800")
    assert folder.config_file.read_text() == "old"
    assert [p.name for p in folder.path.iterdir() if p.name.startswith(".config")] == []


def test_stop_file(folder, tmp_path):
    assert not folder.stop_requested()
    folder.request_stop()
    assert folder.stop_requested()
    folder.clear_stop()
    assert not folder.stop_requested()
    with pytest.raises(RunError, match="no such run"):
        RunFolder(tmp_path / "none").request_stop()


def _try_lock(path, queue):
    try:
        with RunFolder(path).lock():
            queue.put("held")
    except RunError as error:
        queue.put(str(error))


def test_one_trainer_a_run(folder):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    with folder.lock():
        process = context.Process(target=_try_lock, args=(folder.path, queue))
        process.start()
        assert "another process is training" in queue.get(timeout=60)
        process.join()
    _try_lock(folder.path, queue)
    assert queue.get(timeout=60) == "held"


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(RunError, match="cannot be made"):
        RunFolder(tmp_path / "run").create()


def test_metrics_are_json_lines(folder):
    writer = MetricsWriter(folder)
    writer.write({"step": 1})
    writer.close()
    assert json.loads(folder.metrics_file().read_text())["step"] == 1


def test_lines_that_a_crash_made_unreadable_are_left_out(tmp_path):
    folder = RunFolder(tmp_path)
    folder.create()
    folder.metrics_file().write_bytes(b'{"step": 1}\n\0\0\0\0\n{"st\xff\n[1]\n{"step": 2}\n{"step"')
    assert folder.read_metrics() == [{"step": 1}, {"step": 2}]


def test_only_plain_files_of_a_run_are_read(folder, tmp_path):
    (tmp_path / "secret").write_text('{"status": "finished", "step": 1}\n')
    for file in (folder.manifest_file, folder.metrics_file()):
        file.symlink_to(tmp_path / "secret")
    assert folder.read_metrics() == []
    with pytest.raises(RunError, match="cannot be read"):
        folder.read_manifest()
    folder.manifest_file.unlink()
    os.mkfifo(folder.manifest_file)
    with pytest.raises(RunError, match="no plain file"):
        folder.read_manifest()
    (tmp_path / "link").symlink_to(folder.path)
    folder.metrics_file().unlink()
    folder.metrics_file().write_text('{"step": 1}\n')
    assert RunFolder(tmp_path / "link").read_metrics() == [{"step": 1}]


def test_metrics_of_wrong_types_are_left_out(folder):
    lines = ("[" * 100_000, '{"step": null}', '{"step": 1e400}', '{"step": 2, "time": "x"}', '{"step": 3}')
    folder.metrics_file().write_text("\n".join(lines) + "\n")
    assert folder.read_metrics() == [{"step": 3}]
