"""Bytes of live tensors a rank under each strategy, against what the layout's arithmetic says.

A parameter in fp32 has 4 bytes of weight, 4 of gradient and 8 of AdamW's moments. ZeRO cuts the moments (1), the
gradients too (2), the weights too (3) over the data ranks; tensor and pipeline ranks hold a share of the parameters.
Counted are all bytes that torch's CPU allocator has given out and not taken back since before the model was built, at
two instants of the second step: when AdamW is called (gradients live), and after the step. Pages that were never
touched count too: ZeRO's bucket is as large as its setting.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from biokit.config import ModelConfig
from biokit.parallel.deepspeed_config import effective_config
from biokit.parallel.grid import Layout
from tests.bench.rigs import Arrays, Rig, read_batches, share, start
from tests.bench.timing import Row
from tests.distributed import Ranks

LAYOUTS = (
    Layout(),
    Layout("DDP", data=2),
    Layout("Zero1", data=2),
    Layout("Zero2", data=2),
    Layout("Zero3", data=2),
    Layout("Pipeline", pipeline=2),
    Layout("ThreeD", tensor=2),
    Layout("ThreeD", tensor=2, pipeline=2),
)
MODEL = ModelConfig(preset="megatron", dropout=0.1)
ROWS, NUM_STEPS = 8, 2
UPDATE = "AdamW is called"
INSTANTS = ("in the update", "after the step")
