"""What the fork server of `tests.distributed` imports once, so that a rank starts in hundredths of a second."""

import contextlib
import gc
import importlib
import os
import warnings

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is loaded
os.environ["DS_ACCELERATOR"] = "cpu"

MODULES = ("torch.distributed", "deepspeed.pipe", "megatron.core.tensor_parallel", "biokit.parallel.strategy", "pytest")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the engines warn of what is not installed; the caller may run with -W error
    for _name in MODULES:
        with contextlib.suppress(ImportError):
            importlib.import_module(_name)

gc.freeze()  # what is imported here is never garbage: ranks do not look at it again, nor copy its pages
