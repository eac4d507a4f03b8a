"""Layouts that a number of devices could take: those that the model's sizes, its layers and the batch allow."""

from __future__ import annotations

from collections.abc import Iterator

from biokit.config import RunConfig
from biokit.errors import ConfigError
from biokit.parallel.grid import DATA_PARALLEL, Layout, plan_layout
from biokit.planning.jobs import Case, Job
from biokit.schema import list_divisors

MICROS_A_STAGE = 4  # leaves a bubble of a fifth at most


def list_cases(job: Job, num_gpus: int, micro_batch_size: int = 0) -> list[Case]:
    """Every layout of so many devices, without and with recompute.

    The micro-batch is the configured one; where it does not divide a data rank's share of the batch, the largest that
    does and is not above it, of a pipeline one that gives each stage MICROS_A_STAGE where the batch allows it.

    Args:
        micro_batch_size: the largest one to take; 0: the configuration's.

    Raises:
        ConfigError: no layout is possible; says why.
    """
    cases, refusals = [], dict[str, ConfigError]()
    for layout in _list_layouts(job, num_gpus):
        try:
            cases += [_make_case(job, layout, recompute, micro_batch_size) for recompute in (False, True)]
        except ConfigError as error:
            refusals.setdefault(error.found, error)
    if not cases:
        first = next(iter(refusals.values()))
        raise ConfigError(f"a layout of {num_gpus} GPUs", f"none is possible: {first.asked}, {first.found}", first.do)
    return cases


def global_batch_size(config: RunConfig, length: int) -> int:
    """Samples of a step; of a token budget as many as fit at that length."""
    return max(1, config.data.max_tokens // length) if config.data.max_tokens else config.train.global_batch_size


def _list_layouts(job: Job, num_gpus: int) -> Iterator[Layout]:
    if num_gpus == 1:
        yield Layout()
        yield Layout("ZeroInf")
        return
    for strategy in DATA_PARALLEL:
        yield Layout(strategy, data=num_gpus)
    num_layers = len(job.blueprint.parts.layers)
    for tensor in list_divisors(num_gpus):
        for pipeline in list_divisors(num_gpus // tensor):
            if tensor * pipeline > 1 and pipeline <= num_layers:
                data = num_gpus // (tensor * pipeline)
                yield Layout("ThreeD" if tensor > 1 else "Pipeline", tensor, data, pipeline)


def _make_case(job: Job, layout: Layout, recompute: bool, micro_batch_size: int) -> Case:
    """The case of a layout.

    Raises:
        ConfigError: the layout is not possible.
    """
    config = job.config
    samples = global_batch_size(config, job.rehearsal.length)
    share, rest = divmod(samples, layout.data)
    if (rest and not config.data.max_tokens) or not share:
        asked = f"train.global_batch_size={samples}"
        valid = ", ".join(map(str, list_divisors(samples)))
        found = f"{layout.data} data ranks do not divide it"
        raise ConfigError(asked, found, f"Give a multiple of {layout.data}, or data ranks among {valid}")
    micro = _choose_micro_batch(share, micro_batch_size or config.train.micro_batch_size, layout.pipeline)
    case = Case(layout, micro, share // micro, recompute)
    spec, sizes = job.blueprint.spec, job.blueprint.sizes
    divided = {name: sizes[name] for name in spec.divided}
    plan_layout(job.configure(case), layout.world_size, divided, len(job.blueprint.parts.layers))
    job.zero_settings(case)
    return case


def _choose_micro_batch(share: int, most: int, num_stages: int) -> int:
    if share % most == 0:
        return most
    if num_stages > 1:
        most = min(most, max(1, share // (MICROS_A_STAGE * num_stages)))
    return max(size for size in list_divisors(share) if size <= most)
