"""`%submit`: what `biokit submit` does, from a notebook. Loaded by `%load_ext biokit`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from IPython.core.error import UsageError
from IPython.core.magic import Magics, line_magic, magics_class, needs_local_scope, no_var_expand

from biokit.errors import BiokitError
from biokit.launch.commands.parameters import join_parameters
from biokit.launch.commands.submit import add_arguments, prepare
from biokit.launch.failed_run import told_shortly
from biokit.launch.magics.magic_line import GivenWord, refuse_given_flag, split_words
from biokit.runs import RunFolder


class _Parser(argparse.ArgumentParser):
    """A parser that raises where argparse would end the kernel."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"%submit: {message}. %submit --help tells what there is.")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        raise _Helped


class _Helped(Exception):
    """The help was shown."""


@magics_class
class SubmitMagics(Magics):
    """The magic that sends jobs."""

    @needs_local_scope
    @no_var_expand
    @line_magic
    @told_shortly()
    def submit(self, line: str, local_ns: Mapping[str, Any] | None = None) -> Any:
        """Run a notebook or a training as a Slurm job (`%submit --help`).

        Returns the Run of the job's folder; of an array, once it was followed to its end, the table of its runs.
        """
        try:
            words = split_words(line, {**self.shell.user_ns, **(local_ns or {})}, "%submit")
            options = make_parser().parse_args(join_parameters(_plain_words(words)))
            submission = None if options.follow else prepare(options)
        except _Helped:
            return None
        except BiokitError as error:  # the user's mistake, before anything is sent
            raise UsageError(str(error)) from None
        if submission is None:
            return follow(RunFolder(options.follow))
        if options.dry_run:
            return print(submission.script, end="")
        submission.write()
        job_id = submission.send()
        print(f"submitted as job {job_id}; run folder: {submission.root.path}")
        return follow(submission.root) if not options.no_follow else attach(submission.root)


def _plain_words(words: Sequence[str]) -> list[str]:
    """The words, of which no value of the notebook is taken for a flag, not even as the value of a parameter.

    Raises:
        ConfigError: one stands where a flag would.
    """
    plain: list[str] = []
    for i, word in enumerate(words):
        if i > 1 and words[i - 2] == "-p" and not isinstance(words[i - 2], GivenWord):
            plain[-1] += f"={word}"
        else:
            refuse_given_flag(word, "%submit")
            plain.append(word)
    return plain


def make_parser() -> argparse.ArgumentParser:
    """The words of `%submit`."""
    parser = _Parser(prog="%submit", description=SubmitMagics.submit.__doc__)
    add_arguments(parser)
    return parser


def follow(root: RunFolder) -> Any:
    """Follow a job to its end; the stop square of the notebook leaves, and the job goes on.

    Raises:
        RunError: it failed.
    """
    from biokit.launch.slurm.following import compare_runs, follow_job, leaving_words, open_followed

    runs = open_followed(root)
    try:
        follow_job(root)
    except KeyboardInterrupt:
        print(f"\n{leaving_words(root, runs[0].job.job_id.partition('_')[0])}")
        return attach(root)
    return compare_runs(root) if len(runs) > 1 else attach(root)


def attach(root: RunFolder) -> Any:
    """The Run of a job's folder; of an array, the table of its runs as they stand now."""
    from biokit.launch.run import Run
    from biokit.launch.slurm.following import compare_runs, open_followed

    return compare_runs(root) if len(open_followed(root)) > 1 else Run(root)
