"""Notebooks: how they are written, and the runner that executes, judges and trusts them."""

import contextlib
import json
import re
import warnings
from pathlib import Path

import nbformat
import papermill
import pytest
from nbformat.sign import NotebookNotary

from biokit.errors import DataError, RunError
from biokit.launch.notebooks import run_notebook

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SOLUTIONS = sorted((ROOT / "notebooks" / "solutions").glob("*.ipynb"))
names = [path.stem for path in NOTEBOOKS]


def cells(path, kind="code"):
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == kind]


@pytest.mark.parametrize("path", NOTEBOOKS + SOLUTIONS, ids=lambda path: path.stem)
def test_outputs_are_committed_and_whole(path):
    for number, cell in enumerate(cells(path), start=1):
        assert cell.execution_count == number, "nbval skips a cell without a count, silently"
        fails = any(output.output_type == "error" for output in cell.outputs)
        assert fails == ("raises-exception" in cell.metadata.get("tags", []))
        assert "injected-parameters" not in cell.metadata.get("tags", [])


@pytest.mark.parametrize("path", NOTEBOOKS + SOLUTIONS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_one_parameters_cell_of_literals_with_comments(path):
    (cell,) = [cell for cell in cells(path) if "parameters" in cell.metadata.get("tags", [])]
    for line in cell.source.splitlines():
        assert re.fullmatch(r"\w+ = (\".*\"|\d+(\.\d+)?|True|False)  # \S.*", line), line
    found = papermill.inspect_notebook(str(path))  # a value with "=" in it would be missed
    assert "run_dir" in found and len(found) == len(cell.source.splitlines())


@pytest.mark.parametrize("path", NOTEBOOKS + SOLUTIONS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_no_notebook_removes_anything(path):
    assert not any(re.search(r"rmtree|unlink|\brm\b|overwrite=True", cell.source) for cell in cells(path))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names)
def test_cells_are_short_and_define_nothing(path):
    for cell in cells(path):
        assert len(cell.source.splitlines()) <= 22, cell.source[:80]
        assert not re.search(r"^\s*(def|class) ", cell.source, re.MULTILINE)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names)
def test_opens_with_a_question_and_ends_with_exercises(path):
    text = [cell.source for cell in cells(path, "markdown")]
    assert all(word in text[0] for word in ("**Question:**", "Reads", "Writes", "Time"))
    assert "What was learned" in text[-1] and "Exercises" in text[-1]
    assert (ROOT / "notebooks" / "solutions" / path.name).exists()


@pytest.mark.parametrize("path", NOTEBOOKS + SOLUTIONS, ids=lambda path: path.stem)
def test_every_picture_has_words_and_no_path_of_a_machine(path):
    for cell in cells(path):
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                assert len(output.data["text/plain"]) > 40
    assert not re.search(r"(?<![\w.])/(home|root|tmp|work)/", json.dumps([c.outputs for c in cells(path)]))


def write_notebook(path, *sources):
    notebook = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    )
    notebook.cells = [nbformat.v4.new_code_cell(source) for source in sources]
    notebook.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(notebook, path)
    return path


FINISH = "from biokit.runs import RunFolder\nRunFolder(run_dir).update_manifest(status=status)"


def test_a_notebook_is_executed_judged_and_trusted(tmp_path):
    path = write_notebook(tmp_path / "a.ipynb", 'run_dir = ""  # folder\nstatus = "finished"  # end', FINISH)
    done = run_notebook(path, tmp_path / "out")
    notary = NotebookNotary()
    with contextlib.closing(notary.store):
        assert notary.check_signature(nbformat.read(done.path, 4))
    assert "manifest.json" in str(done)
    with pytest.raises(RunError, match="it ran to its end and wrote no manifest"):
        run_notebook(write_notebook(tmp_path / "b.ipynb", 'run_dir = ""'), tmp_path / "none")
    with pytest.raises(RunError, match="its run is 'failed'"):
        run_notebook(path, tmp_path / "out", {"status": "failed"})


def test_a_failing_cell_is_named(tmp_path):
    path = write_notebook(tmp_path / "a.ipynb", 'run_dir = ""  # folder', "1 / 0")
    with pytest.raises(RunError, match=r"its cell \[3\] failed \(ZeroDivisionError"):  # papermill adds one
        run_notebook(path, tmp_path / "out")
    assert (tmp_path / "out" / "a.ipynb").exists()


def test_unknown_parameters_and_files_are_refused(tmp_path):
    path = write_notebook(tmp_path / "a.ipynb", 'run_dir = ""  # folder')
    with pytest.raises(DataError, match="no parameter lr"):
        run_notebook(path, tmp_path / "out", {"lr": 1})
    with pytest.raises(DataError, match="no such file"):
        run_notebook(tmp_path / "b.ipynb", tmp_path / "out")
    untagged = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("run_dir = 1")])
    nbformat.write(untagged, tmp_path / "c.ipynb")
    with pytest.raises(DataError, match=r"no parameter run_dir\. Tag the cell that sets them as `parameters`"):
        run_notebook(tmp_path / "c.ipynb", tmp_path / "out")


def test_cells_without_ids_are_no_noise(tmp_path):
    path = write_notebook(tmp_path / "a.ipynb", 'run_dir = ""  # folder\nstatus = "finished"', FINISH)
    notebook = json.loads(path.read_text())
    for cell in notebook["cells"]:
        del cell["id"]
    path.write_text(json.dumps(notebook))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_notebook(path, tmp_path / "out")
