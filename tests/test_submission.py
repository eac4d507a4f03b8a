"""What `biokit submit` and `%submit` make of their words; in Slurm's place stands what notes the words it is given."""

from __future__ import annotations

import argparse
import atexit
import json
from pathlib import Path
from typing import Any

import nbformat
import pytest
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

from biokit.__main__ import main
from biokit.config import config_to_yaml, load_config
from biokit.errors import BiokitError, ConfigError, DataError
from biokit.launch.commands.parameters import join_parameters
from biokit.launch.commands.submit import add_arguments, prepare
from biokit.launch.magics.slurm_magics import SubmitMagics
from biokit.launch.orders import read_order
from biokit.launch.run import Run
from biokit.launch.slurm import following, jobs
from biokit.launch.slurm.jobs import read_job, submit_script
from biokit.launch.slurm.submission import Submission
from biokit.launch.slurm.sweeps import combine, read_values, task_name
from biokit.runs import RunFolder
from tests.fake_slurm import FakeSlurm
from tests.small_run import small_config

TOKEN = "hf_QwErTy123456"


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """A Slurm that is none, and a folder to work in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("BIOKIT_SITE", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    made = FakeSlurm.install(tmp_path, monkeypatch)
    made.answer(sbatch=(0, "12;cluster\n", ""))
    (tmp_path / "small.yaml").write_text(config_to_yaml(small_config(tmp_path)))
    return made


@pytest.fixture
def notebook(fake: FakeSlurm, tmp_path: Path) -> Path:
    """A notebook with parameters."""
    cell = nbformat.v4.new_code_cell('run_dir = ""\nlr = 1e-3\nnote = ""', metadata={"tags": ["parameters"]})
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata={"kernelspec": kernel}), tmp_path / "n b.ipynb")
    return tmp_path / "n b.ipynb"


def prepared(*words: object) -> Submission:
    """What the words stand for."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return prepare(parser.parse_args(join_parameters(list(map(str, words)))))


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1e-4,3e-4", [1e-4, 3e-4]), ("true", [True]), ("007", ["007"]), ("1:30", ["1:30"]), ("0.5", [0.5]), ("0", [0]),
        ('"a,b"', ["a,b"]), ('"a,b",c', ["a,b", "c"]), ("[1, 2]", [[1, 2]]), ("[1],[2]", [[1], [2]]),
        ("[1, 2", ["[1, 2"]),
        ('{"a": 1, "b": 2}', [{"a": 1, "b": 2}]), ("it's, so", ["it's", "so"]), ("", [""]), ("a; $(b)", ["a; $(b)"]),
        ("C(=O)[O-],CC", ["C(=O)[O-]", "CC"]), ("nan", ["nan"]), ("2024-01-01", ["2024-01-01"]),
    ],
)  # fmt: skip
def test_values(text: str, values: list[Any]) -> None:
    assert read_values(text) == values


def test_combinations() -> None:
    runs, varied = combine({"a": [1, 2], "b": ["x"], "c": [True, False]})
    assert varied == ("a", "c") and [list(run.values()) for run in runs][:2] == [[1, "x", True], [1, "x", False]]
    assert len(runs) == 4 and task_name(7) == "007"
    with pytest.raises(ConfigError, match="a value stands there twice"):
        combine({"a": [1, 1]})
    with pytest.raises(ConfigError, match="they make 1600 runs"):
        combine({"a": list(range(40)), "b": list(range(40))})


def test_a_training_is_written_and_sent(fake: FakeSlurm, tmp_path: Path) -> None:
    made = prepared("small.yaml", "strategy=DDP", "data.split_ratio=70,20,10", "--nodes", 2, "--lives", 3)
    assert not (tmp_path / "run").exists()  # nothing is written before it is wanted
    made.write()
    assert made.send() == "12"
    folder = RunFolder(tmp_path / "run")
    assert made.root.path == folder.path and fake.said == [["sbatch", "--parsable", str(folder.path / "job.sbatch")]]
    order, job = read_order(folder), read_job(folder)
    assert (order.kind, order.placement, order.num_nodes, order.max_lives) == ("train", "slurm", 2, 3)
    assert order.torchrun == ("--nproc-per-node", "1") and order.facts["versions"]
    config = load_config(order.program[-1])
    assert (config.strategy, config.data.split_ratio, config.run_dir) == ("DDP", "70,20,10", str(folder.path))
    assert job is not None and (job.job_id, job.kind, job.parameters, job.outcome) == ("12", "train", {}, "")
    with pytest.raises(BiokitError, match="job 12 is there, running"):
        fake.answer(squeue=(0, "12|RUNNING|node1|None\n", ""))
        made.write()
    fake.answer(squeue=(0, "12|COMPLETED||None\n", ""), sbatch=(0, "13\n", ""))
    made.write()
    assert made.send() == "13"


def test_an_array_is_not_written_over_while_a_task_waits(fake: FakeSlurm, notebook: Path, tmp_path: Path) -> None:
    made = prepared(notebook, "-p", "lr", "1e-4,3e-4")
    made.write()
    made.send()
    text = Path(made.members[0].job.program).read_text()
    notebook.write_text(notebook.read_text().replace("note", "changed"))
    fake.answer(squeue=(0, "12_0|COMPLETED||None\n12_1|PENDING||Priority\n", ""))
    for words in ([notebook], [notebook, "-p", "lr", "1,2,3"]):
        with pytest.raises(BiokitError, match="job 12_1 is there, pending"):
            prepared(*words).write()
    assert Path(made.members[0].job.program).read_text() == text
    fake.answer(squeue=(0, "12_0|COMPLETED||None\n12_1|COMPLETED||None\n", ""))
    prepared(notebook).write()


def test_an_array_does_not_take_the_folder_of_a_job_that_waits(fake: FakeSlurm, tmp_path: Path) -> None:
    made = prepared("small.yaml")
    made.write()
    made.send()
    fake.answer(squeue=(0, "12|PENDING||Priority\n", ""))
    with pytest.raises(BiokitError, match="job 12 is there, pending"):
        prepared("small.yaml", "train.lr=1e-4,3e-4").write()


def test_a_job_that_slurm_does_not_take_has_failed(fake: FakeSlurm) -> None:
    made = prepared("small.yaml")
    made.write()
    fake.answer(sbatch=(1, "", "sbatch: error: invalid partition\n"))
    with pytest.raises(BiokitError, match="invalid partition"):
        made.send()
    run = Run.attach(made.root)
    assert (run.status, run.ended, run.stop()) == ("failed", True, "failed")
    fake.answer(sbatch=(0, "13\n", ""), squeue=(0, "13|PENDING||Priority\n", ""))
    made.write()
    made.send()
    assert run.status == "queued"


def test_a_notebook_that_slurm_does_not_take_has_failed(fake: FakeSlurm, notebook: Path) -> None:
    made = prepared(notebook)
    made.write()
    fake.answer(sbatch=(1, "", "sbatch: error: invalid partition\n"))
    with pytest.raises(BiokitError, match="invalid partition"):
        made.send()
    assert Run.attach(made.root).status == "failed"


def test_a_job_for_another_machine_has_not_failed(fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is sent by hand, from where Slurm is."""
    made = prepared("small.yaml")
    made.write()
    monkeypatch.setattr(jobs.shutil, "which", lambda _: None)
    with pytest.raises(BiokitError, match="sbatch is not on this machine"):
        made.send()
    job = read_job(made.root)
    assert job is not None and job.outcome == ""


def test_values_that_begin_with_a_hyphen(fake: FakeSlurm, notebook: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepared(notebook, "-p", "lr", "-1e-3").members[0].job.parameters == {"lr": -1e-3}
    assert prepared(notebook, "-p", "note=--nodes", "-p", "lr=-0.5").members[0].job.parameters == {
        "note": "--nodes", "lr": -0.5
    }  # fmt: skip
    assert main(["submit", str(notebook), "-p", "lr", "-1e-3", "--dry-run"]) == 0
    assert main(["submit", str(notebook), "-p", "lr=3", "--dry-run"]) == 0
    assert "#SBATCH" in capsys.readouterr().out and fake.said == []
    for words in (["-p", "lr", "--dry-run"], ["-p", "note", "-p", "lr", "1"]):
        assert main(["submit", str(notebook), *words]) == 2
        assert "follows in place of a value" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["submit", str(notebook), "-p", "lr"])
    assert "give a name and a value: -p NAME VALUE" in capsys.readouterr().err and fake.said == []


def test_an_array_has_a_folder_for_each(fake: FakeSlurm, tmp_path: Path) -> None:
    words = ["train.lr=1e-4,3e-4", "-p", "strategy", "Single,DDP", "-p", "data.split_ratio", '"70,20,10"']
    made = prepared("small.yaml", *words, "--run-dir", "sweep")
    made.write()
    made.send()
    folders = [RunFolder(tmp_path / "sweep" / name) for name in ("000", "001", "002", "003")]
    configs = [load_config(read_order(folder).program[-1]) for folder in folders]
    assert [(c.strategy, c.train.lr) for c in configs] == [
        ("Single", 1e-4), ("Single", 3e-4), ("DDP", 1e-4), ("DDP", 3e-4)
    ]  # fmt: skip
    assert {c.data.split_ratio for c in configs} == {"70,20,10"} and configs[3].run_dir == str(folders[3].path)
    jobs = [read_job(folder) for folder in folders]
    assert [job and job.job_id for job in jobs] == ["12_0", "12_1", "12_2", "12_3"]
    root = read_job(made.root)
    assert root is not None and (root.kind, root.num_tasks, root.varied) == ("sweep", 4, ("strategy", "train.lr"))
    assert "#SBATCH --array=0-3" in made.script and "4 times: all values of strategy, train.lr" in made.script


def test_a_notebook_is_kept_as_it_is_now(fake: FakeSlurm, notebook: Path, tmp_path: Path) -> None:
    text, note = notebook.read_text(), "a'b; touch PWNED $(touch PWNED)\ntouch PWNED"
    made = prepared(notebook, "-p", "lr", "1e-4,3e-4", "-p", "note", json.dumps(note))
    made.write()
    made.send()
    notebook.unlink()
    job = read_job(RunFolder(tmp_path / "runs" / "n b" / "001"))
    assert job is not None and job.parameters == {"lr": 3e-4, "note": note}
    assert (Path(job.program).read_text(), job.notebook) == (text, str(notebook))
    assert "PWNED" not in made.script and "#SBATCH --job-name='n b'" in made.script


def test_secrets_stay_out(fake: FakeSlurm, notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name, value in (("api_key", "k-123456"), ("note", f"with {TOKEN} inside")):
        with pytest.raises((ConfigError, DataError)) as caught:
            prepared(notebook, "-p", name, value)
        assert value not in str(caught.value)
    with pytest.raises(ConfigError, match="Set it in the environment where you submit"):
        prepared(notebook, "-p", "note", TOKEN)
    made = prepared(notebook, "-p", "note", "plain")
    made.write()
    made.send()
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert len(files) >= 3 and not [path for path in files if TOKEN in path.read_text()]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Give a notebook or a configuration"),
        (["missing.ipynb"], "there is no such file"),
        (["n b.ipynb", "lr=1"], "Write -p NAME VALUE"),
        (["n b.ipynb", "-p", "run_dir", "x"], "Give --run-dir"),
        (["n b.ipynb", "-p", "nope", "1"], "it has no parameter nope"),
        (["n b.ipynb", "-p", "lr", "1", "-p", "lr", "2"], "a name is given twice"),
        (["nope.yaml"], "neither a YAML file nor"),
        (["small.yaml", "train.lrr=1"], "train.lr"),
        (["small.yaml", "train.lr=1", "-p", "train.lr", "2"], "it is given twice"),
        (["small.yaml", "--nodes", "2"], "Single"),
        (["small.yaml", "--time", "soon"], "not a time limit"),
        (["small.yaml", "--site", "nope.yaml"], "site file nope.yaml"),
        (["n b.ipynb", "-p", "note", "https://anna:pa55word@host"], "looks like a secret"),
        (["small.yaml", "--run-dir", "small.yaml"], "run folder .*small.yaml: it is a file"),
        (["small.yaml", "--run-dir", "small.yaml/x"], "Not a directory"),
        (["n b.ipynb", "--run-dir", "r" * 300], "File name too long"),
        (["small.yaml", "resume=false"], "goes on from its checkpoint"),
    ],
)  # fmt: skip
def test_mistakes_are_said_before_anything_is_written(
    fake: FakeSlurm, notebook: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    with pytest.raises(BiokitError, match=message):
        prepared(*words)
    assert not (tmp_path / "runs").exists() and not (tmp_path / "run").exists() and fake.said == []


def test_without_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script is there, and how it gets to a cluster is said."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        BiokitError, match=r"sbatch is not on this machine.*copy it there first: rsync -a '/a b/' HOST:'/a b/'"
    ):
        submit_script(Path("/a b/job.sbatch"))


def test_the_command(fake: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "small.yaml", "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("#!/bin/bash\n") and not (tmp_path / "run").exists()
    assert main(["submit", "small.yaml", "--no-follow"]) == 0
    said = capsys.readouterr().out
    assert "submitted as job 12" in said and "scancel 12" in said and fake.said[-1][0] == "sbatch"
    fake.answer(sbatch=(1, "", "sbatch: error: invalid account\n"), squeue=(1, "", "Invalid job id specified"))
    assert main(["submit", "small.yaml", "--no-follow"]) == 2
    assert "invalid account" in capsys.readouterr().err


def test_leaving_a_job(fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """An interrupt while following changes nothing for the job."""

    def interrupt(_: RunFolder) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(following, "follow_job", interrupt)
    assert main(["submit", "small.yaml"]) == 0
    assert "job 12 goes on; look: biokit submit --follow" in capsys.readouterr().out
    assert [words[0] for words in fake.said] == ["sbatch"]


def test_the_magic(fake: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The same words; a value of the notebook stays one word, whatever it holds."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    shell = InteractiveShell(config=Config({"HistoryManager": {"enabled": False}}))
    shell.user_ns["odd"] = "it's; $(touch PWNED)"
    magics = SubmitMagics(shell)
    assert magics.submit("small.yaml --job-name {odd} --dry-run") is None
    assert """--job-name='it'"'"'s; $(touch PWNED)'""" in capsys.readouterr().out
    shell.user_ns |= {"flag": "--no-follow", "low": -1e-3, "p": "-p"}
    with pytest.raises(UsageError, match=r"train\.lr is -0\.001\. Valid: 0 or more"):
        magics.submit("small.yaml -p train.lr {low} --dry-run")
    for line in ("small.yaml {flag}", "small.yaml {p} train.lr 1"):
        with pytest.raises(UsageError, match="would be read as a flag"):
            magics.submit(line)
    assert magics.submit("small.yaml -p data.smiles_column {flag} --dry-run") is None
    assert "#SBATCH" in capsys.readouterr().out
    assert magics.submit("--help") is None and "NOTEBOOK|CONFIG" in capsys.readouterr().out
    for line in ("--bogus", "small.yaml --nodes none", "nope.yaml"):
        with pytest.raises(UsageError):
            magics.submit(line)
    run = magics.submit("small.yaml --no-follow")
    assert run.folder.path == tmp_path / "run" and "submitted as job 12" in capsys.readouterr().out
    shell.atexit_operations()
    atexit.unregister(shell.atexit_operations)
