"""`biokit submit`: a notebook or a training as a Slurm job; the words are those of `%submit` too."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from biokit.errors import ConfigError
from biokit.launch.commands.parameters import add_parameters, read_parameters
from biokit.launch.slurm.sbatch import SIGNAL_BEFORE_S

LIVES = 3  # nobody sits beside a job

MOST = 2**31 - 1  # that Slurm counts
EPILOG = """\
Several values by commas make a job array with one run folder each, and a table of them all at the end:
  biokit submit notebook.ipynb -p lr 1e-4,3e-4 --gpus-per-node 1
  biokit submit molbart_mini train.lr=1e-4,3e-4 -p strategy DDP,Zero1 --nodes 2 --gpus-per-node 8 --time 12:00:00
A comma inside quotes, brackets or braces parts nothing: -p smiles '"CC,CO"'. Secrets come by the environment only.
What a cluster wants of every job (account, partition, modules, container ...) stands in a site file:
  ~/.config/biokit/site.yaml, or the file that BIOKIT_SITE or --site names; see biokit/launch/slurm/sites.py."""


def add_parser(commands: Any) -> None:
    """Add the command to the command line's own parser."""
    parser = commands.add_parser("submit", help="run a notebook or a training as a Slurm job, and follow it")
    add_arguments(parser)
    parser.set_defaults(run=run)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The words that `biokit submit` and `%submit` take."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    add = parser.add_argument
    add("target", nargs="?", default="", metavar="NOTEBOOK|CONFIG", help="a .ipynb file, or what `biokit train` takes")
    add("overrides", nargs="*", metavar="key=value", help="of a configuration, as `biokit train` takes them")
    help_p = "a parameter of the notebook, or a key of the configuration; several values by commas"
    add_parameters(parser, help_p)
    add("--nodes", type=_count, default=1, metavar="N", help="nodes (1)")
    add("--gpus-per-node", type=_count_or_none, default=0, metavar="N", help="GPUs asked for on each node (0)")
    add("--nproc-per-node", type=_count, default=0, metavar="N", help="ranks on each node (one a GPU, or 1)")
    add("--time", default="", metavar="HH:MM:SS", help="time limit (the partition's)")
    add("--site", type=Path, metavar="FILE", help="the cluster's ways (BIOKIT_SITE, ~/.config/biokit/site.yaml)")
    add("--run-dir", type=Path, metavar="DIR", help="run folder (the configuration's; runs/<notebook's name>)")
    add("--job-name", default="", metavar="NAME", help="in the queue (the notebook's or configuration's)")
    help_l = f"launches within one start of the job: where ranks fail, the next goes on from the checkpoint ({LIVES})"
    add("--lives", type=_count, default=LIVES, metavar="N", help=help_l)
    help_s = f"seconds before the time limit at which to save and go back into the queue ({SIGNAL_BEFORE_S})"
    add("--signal-before", type=_count, default=SIGNAL_BEFORE_S, metavar="S", help=help_s)
    add("--dry-run", action="store_true", help="show job.sbatch, write and submit nothing")
    add("--no-follow", action="store_true", help="submit and return")
    add("--follow", type=Path, metavar="DIR", help="follow the job of a run folder that was submitted before")


def run(options: argparse.Namespace) -> int:
    """Carry out `biokit submit`; returns the exit status.

    Raises:
        BiokitError: nothing was submitted, or the job failed.
    """
    from biokit.launch.slurm.following import follow_job, leaving_words
    from biokit.runs import RunFolder

    if options.follow:
        follow_job(RunFolder(options.follow))
        return 0
    submission = prepare(options)
    if options.dry_run:
        print(submission.script, end="")
        return 0
    submission.write()
    print(f"job script: {submission.script_file}")
    job_id = submission.send()
    print(f"submitted as job {job_id}; run folder: {submission.root.path}")
    try:
        if not options.no_follow:
            follow_job(submission.root)
            return 0
    except KeyboardInterrupt:
        print()
    print(leaving_words(submission.root, job_id))
    return 0


def prepare(options: argparse.Namespace) -> Any:
    """The job that the words stand for; nothing is written yet.

    Raises:
        BiokitError: something in it cannot be.
    """
    from biokit.launch.slurm.sites import find_site_file, load_site
    from biokit.launch.slurm.submission import Resources, prepare_notebook, prepare_training

    if not options.target:
        raise ConfigError("biokit submit", "nothing to run is given", "Give a notebook or a configuration")
    parameters = read_parameters(options.parameters)
    site = load_site(options.site or find_site_file())
    resources = Resources(
        options.nodes,
        options.gpus_per_node,
        options.nproc_per_node,
        options.time,
        options.lives,
        options.signal_before,
        options.job_name,
    )
    if options.target.endswith(".ipynb"):
        if options.overrides:
            found = f"a notebook takes its values by -p, not as {options.overrides[0]}"
            raise ConfigError(f"biokit submit {options.target}", found, "Write -p NAME VALUE")
        return prepare_notebook(Path(options.target), parameters, resources, site, options.run_dir)
    return prepare_training(options.target, options.overrides, parameters, resources, site, options.run_dir)


def _count(text: str) -> int:
    return _number(text, 1)


def _count_or_none(text: str) -> int:
    return _number(text, 0)


def _number(text: str, low: int) -> int:
    if not text.isascii() or not text.isdecimal() or not low <= int(text[:20]) <= MOST:
        raise argparse.ArgumentTypeError(f"{text}: a whole number from {low} to {MOST}")
    return int(text)
