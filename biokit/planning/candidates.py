"""Layouts that a number of devices could take: those that the model's sizes, its layers and the batch allow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from biokit.config import RunConfig
from biokit.errors import ConfigError
from biokit.parallel.grid import DATA_PARALLEL, Layout, plan_layout
from biokit.planning.jobs import Case, Job
from biokit.schema import list_divisors

MICROS_A_STAGE = 4  # leaves a bubble of a fifth at most


def list_cases(job: Job, num_gpus: int) -> list[Case]:
    """Every layout of so many devices, without and with recompute.

    The micro-batch is the configured one; where it does not divide a data rank's share of the batch, the largest that
    does and is not above it, of a pipeline one that gives each stage MICROS_A_STAGE where the batch allows it.

    Raises:
        ConfigError: no layout is possible; says why.
    """
    cases, refusals = [], list[ConfigError]()
    for layout in _list_layouts(job, num_gpus):
        try:
            cases += [_make_case(job, layout, recompute) for recompute in (False, True)]
        except ConfigError as error:
            refusals.append(error)
    if not cases:
        first = refusals[0]
        raise ConfigError(f"a layout of {num_gpus} GPUs", f"none is possible: {first.asked}, {first.found}", first.do)
    return cases


def with_smaller_micro_batch(job: Job, case: Case, most: float) -> Case | None:
    """The case with the largest smaller micro-batch that is not above `most`, or with the smallest; None: it has it."""
    share = case.micro_batch_size * case.num_micros
    smaller = [size for size in _list_micro_batches(job, case.layout, share) if size < case.micro_batch_size]
    if not smaller:
        return None
    size = max((size for size in smaller if size <= most), default=smaller[0])
    return replace(case, micro_batch_size=size, num_micros=share // size)


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


def _make_case(job: Job, layout: Layout, recompute: bool) -> Case:
    """The case of a layout.

    Raises:
        ConfigError: the layout is not possible.
    """
    config = job.config
    samples = global_batch_size(config, job.rehearsal.length)
    share, rest = divmod(samples, layout.data)
    sizes = _list_micro_batches(job, layout, share) if share else []
    if (rest and not config.data.max_tokens) or not sizes:
        valid = ", ".join(map(str, list_divisors(samples)))
        found = f"{layout.data} data ranks do not divide it"
        do = f"Give a multiple of {layout.data}, or data ranks among {valid}"
        raise ConfigError(f"train.global_batch_size={samples}", found, do)
    micro = _choose_micro_batch(sizes, share, config.train.micro_batch_size, layout.pipeline)
    case = Case(layout, micro, share // micro, recompute)
    spec, model = job.blueprint.spec, job.blueprint.sizes
    divided = {name: model[name] for name in spec.divided}
    plan_layout(job.configure(case), layout.world_size, divided, len(job.blueprint.parts.layers))
    job.zero_settings(case)
    return case


def _list_micro_batches(job: Job, layout: Layout, share: int) -> list[int]:
    """Sizes that divide a data rank's share and are not above the configured one, smallest first."""
    sequence_parallel = job.config.parallel.sequence_parallel and layout.tensor > 1
    unit = layout.tensor if sequence_parallel else 1  # rows are dealt to the tensor ranks
    most = job.config.train.micro_batch_size
    return [size for size in list_divisors(share) if size <= most and size % unit == 0]


def _choose_micro_batch(sizes: Sequence[int], share: int, configured: int, num_stages: int) -> int:
    if configured in sizes or num_stages == 1:
        return sizes[-1]
    return max((size for size in sizes if size * MICROS_A_STAGE * num_stages <= share), default=sizes[0])
