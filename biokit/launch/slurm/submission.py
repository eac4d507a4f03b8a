"""From a notebook or a configuration to a job in Slurm's queue: everything is checked, shown or written, then sent."""

from __future__ import annotations

import importlib.util
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from biokit.config import RunConfig, config_to_yaml, load_config, parse_override
from biokit.errors import ConfigError, RunError
from biokit.launch.facts import asked_file, collect_facts
from biokit.launch.orders import HERE, SLURM, Order, write_order
from biokit.launch.slurm import jobs
from biokit.launch.slurm.jobs import NOTEBOOK, SCRIPT_FILE, SWEEP, TRAIN, Job, read_job, write_job
from biokit.launch.slurm.sbatch import SIGNAL_BEFORE_S, JobRequest, write_script
from biokit.launch.slurm.sites import Site
from biokit.launch.slurm.sweeps import combine, read_values, refuse_secrets, task_name
from biokit.launch.started import check_free
from biokit.launch.states import FAILED
from biokit.launch.training_order import training_order
from biokit.runs import RunFolder, write_atomically
from biokit.schema import leaf_types

RUN_DIR = "run_dir"


@dataclass(frozen=True)
class Resources:
    """What a job is to have.

    Attributes:
        num_processes: ranks a node; 0: one a GPU, or one.
        time: as sbatch takes it; empty: the partition's.
        max_lives: launches within one start of the job, where ranks fail.
    """

    num_nodes: int = 1
    gpus_per_node: int = 0
    num_processes: int = 0
    time: str = ""
    max_lives: int = 1
    signal_before_s: int = SIGNAL_BEFORE_S
    name: str = ""

    @property
    def ranks_per_node(self) -> int:
        return self.num_processes or self.gpus_per_node or 1


@dataclass(frozen=True)
class Member:
    """One run of a submission; a sweep has several."""

    folder: RunFolder
    job: Job
    config: RunConfig | None = None
    order: Order | None = None


@dataclass(frozen=True)
class Submission:
    """A job that is ready to be written and sent.

    Attributes:
        root: the run folder; of a sweep: the folder of all run folders.
        job: what `root` remembers of it.
        script: the text of job.sbatch.
    """

    root: RunFolder
    job: Job
    script: str
    members: tuple[Member, ...]

    @property
    def script_file(self) -> Path:
        """Where the script is written."""
        return self.root.path / SCRIPT_FILE

    def write(self) -> None:
        """Write the script and all that it needs into the run folder.

        Raises:
            RunError: a job or a run is alive there.
        """
        for path in dict.fromkeys([self.root.path, *(member.folder.path for member in self.members)]):
            _refuse_alive(RunFolder(path))
        self.root.create()
        if self.job.notebook:
            self._notebook_file().parent.mkdir(exist_ok=True)
            shutil.copyfile(self.job.notebook, self._notebook_file())
        for member in self.members:
            member.folder.create()
            member.folder.clear_stop()
            if member.config is not None and member.order is not None:
                write_atomically(asked_file(member.folder), config_to_yaml(member.config))
                facts = collect_facts(member.order)
                write_order(member.folder, replace(member.order, facts=facts))
            write_job(member.folder, member.job)
        write_job(self.root, self.job)
        write_atomically(self.script_file, self.script)

    def send(self) -> str:
        """Hand the written script to Slurm; returns the job's id.

        Raises:
            EngineError: Slurm is not on this machine.
            RunError: it does not take the job.
        """
        try:
            job_id, now = jobs.submit_script(self.script_file), round(time.time(), 3)
        except jobs.SlurmRefusal as error:  # else it would seem to be on its way
            for member in self.members:
                write_job(member.folder, replace(member.job, outcome=FAILED, error=str(error)))
            raise
        for index, member in enumerate(self.members):
            own_id = f"{job_id}_{index}" if self.job.num_tasks else job_id
            current = read_job(member.folder) or member.job  # it may have begun, and have said something
            write_job(member.folder, replace(current, job_id=own_id, submitted=now))
        if self.job.num_tasks:
            write_job(self.root, replace(self.job, job_id=job_id, submitted=now))
        return job_id

    def _notebook_file(self) -> Path:
        return Path(self.members[0].job.program)


def prepare_training(
    name: str,
    overrides: Sequence[str],
    parameters: Mapping[str, str],
    resources: Resources,
    site: Site,
    run_dir: Path | None = None,
) -> Submission:
    """A training, or one a combination of values.

    Args:
        name: of a packaged configuration, or a YAML file.
        overrides: `key=value`; several values by commas, where the key's own values are not text.
        parameters: the same as key -> value; several values by commas in text too.

    Raises:
        ConfigError: an unknown key, a value or layout that cannot be, a secret.
    """
    lists = {key: read_values(text) for key, text in parameters.items()}
    fixed = []
    for text in overrides:
        key = parse_override(text)[0]
        given = [] if _is_text(key) else read_values(text.partition("=")[2])
        if key in lists:
            raise ConfigError(f"{key}", "it is given twice", "Give it once")
        if len(given) > 1:
            lists[key] = given
        else:
            fixed.append(text)
    combinations, varied = combine(lists)
    base = load_config(name, fixed)
    root = RunFolder((run_dir or Path(base.run_dir)).absolute())
    members = []
    for index, values in enumerate(combinations):
        refuse_secrets(values)
        folder = RunFolder(root.path / task_name(index)) if varied else root
        words = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]
        config = load_config(name, [*fixed, *words, f"{RUN_DIR}={folder.path}"])
        if not config.resume:
            found = "a job that is put back into the queue goes on from its checkpoint"
            raise ConfigError("submit with resume=false", found, "Leave resume out; give a new run_dir to begin anew")
        order = training_order(
            config,
            folder,
            resources.ranks_per_node,
            num_nodes=resources.num_nodes,
            placement=SLURM if resources.num_nodes > 1 else HERE,
            max_lives=resources.max_lives,
        )
        job = Job(TRAIN, _job_name(resources, name), str(asked_file(folder)), parameters=values, varied=varied)
        members.append(Member(folder, job, config, order))
    return _submission(f"Trains {Path(name).name}", root, members, resources, site)


def prepare_notebook(
    notebook: Path, parameters: Mapping[str, str], resources: Resources, site: Site, run_dir: Path | None = None
) -> Submission:
    """A notebook by papermill, or one a combination of parameters. It is copied now, and runs as if it stood where it
    came from.

    Raises:
        DataError: no such notebook, or a parameter that its `parameters` cell does not have.
        ConfigError: a value that cannot be, a secret.
    """
    from biokit.launch.notebooks import check_parameters

    if RUN_DIR in parameters:
        raise ConfigError(f"-p {RUN_DIR}", "the run folder is not a parameter here", "Give --run-dir")
    combinations, varied = combine({name: read_values(text) for name, text in parameters.items()})
    if importlib.util.find_spec("papermill") is not None:  # a login node may do without; the job says it then
        check_parameters(notebook, {**combinations[0], RUN_DIR: ""})
    root = RunFolder((run_dir or Path("runs") / notebook.stem).absolute())
    copy, source = root.path / "submitted" / notebook.name, str(notebook.absolute())
    members = []
    for index, values in enumerate(combinations):
        refuse_secrets(values)
        folder = RunFolder(root.path / task_name(index)) if varied else root
        name = _job_name(resources, notebook.stem)
        members.append(Member(folder, Job(NOTEBOOK, name, str(copy), source, values, varied)))
    return _submission(f"Runs the notebook {notebook.name}", root, members, resources, site)


def _submission(what: str, root: RunFolder, members: Sequence[Member], resources: Resources, site: Site) -> Submission:
    """The script and the record of a job, from its runs."""
    varied, num_tasks = members[0].job.varied, len(members) if members[0].job.varied else 0
    root.check_path()
    many = f", {num_tasks} times: all values of {', '.join(varied)}" if num_tasks else ""
    size = f" on {resources.num_nodes} node{'s' if resources.num_nodes > 1 else ''} x {resources.ranks_per_node}"
    request = JobRequest(
        name=members[0].job.name,
        title=f"{what}{size} rank{'s' if resources.ranks_per_node > 1 else ''}{many}.",
        run_dir=root.path,
        work_dir=Path.cwd(),
        num_nodes=resources.num_nodes,
        gpus_per_node=resources.gpus_per_node,
        num_processes=resources.ranks_per_node,
        time=resources.time,
        signal_before_s=resources.signal_before_s,
        num_tasks=num_tasks,
    )
    script = write_script(request, site)
    told = [replace(member, job=replace(member.job, signal_before_s=resources.signal_before_s)) for member in members]
    job = told[0].job
    if num_tasks:
        job = replace(job, kind=SWEEP, parameters={}, num_tasks=num_tasks)
    return Submission(root, job, script, tuple(told))


def _job_name(resources: Resources, name: str) -> str:
    return resources.name or Path(name).stem


def _is_text(key: str) -> bool:
    """Whether a configuration key takes text, in which a comma parts nothing."""
    return dict(leaf_types(RunConfig)).get(key.removeprefix("model.") if key.startswith("model.data.") else key) is str


def _refuse_alive(folder: RunFolder) -> None:
    asked, job = f"submit into {folder.path}", read_job(folder)
    if job is not None and (entry := jobs.find_alive(job.job_id)):
        do = f"Wait, end it with `scancel {job.job_id}`, or give another --run-dir"
        raise RunError(asked, f"job {entry.job_id} is there, {entry.state.lower()}", do)
    check_free(folder)
