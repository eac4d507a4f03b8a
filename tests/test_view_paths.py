"""Paths in cards."""

import shlex

from biokit.view.paths import show_near


def test_near_paths_are_shown_from_the_working_directory(tmp_path, monkeypatch):
    work = tmp_path / "a" / "notebooks"
    work.mkdir(parents=True)
    monkeypatch.chdir(work)
    line = shlex.join([f"{tmp_path}/a/bin/python", "-m", "biokit", "train", f"{work}/runs/x.yaml"])
    assert show_near(line) == "../bin/python -m biokit train runs/x.yaml"
    assert show_near("--log-dir=/usr/share and 3/4 of it") == "--log-dir=/usr/share and 3/4 of it"


def test_a_quoted_path_stays_quoted(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert show_near(shlex.join([f"{tmp_path}/my run/x"])) == "'../my run/x'"


def test_far_paths_stay(tmp_path, monkeypatch):
    deep = tmp_path / "a" / "b" / "c" / "d"
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    assert show_near(f"{tmp_path}/x") == f"{tmp_path}/x"
