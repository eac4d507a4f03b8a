"""Training: `train(config)`, the same call in a notebook, on the command line and in every process of a job.

It preprocesses what is not yet preprocessed, goes on from the newest checkpoint of the run folder, and writes metrics,
checkpoints and the manifest there. On the CPU loss curves are bitwise the same however often the run was killed.
"""

from __future__ import annotations

import contextlib
import os
import traceback
from pathlib import Path
from typing import Any

from biokit.checkpoint import remove_partial
from biokit.config import RunConfig, config_to_yaml
from biokit.endings import PeerError, is_lost_peer
from biokit.errors import BiokitError, ConfigError
from biokit.layouts import find_layout
from biokit.model_folder import list_models
from biokit.parallel.peers import Peers
from biokit.parallel.processes import count_processes, join_processes
from biokit.process import choose_device, interrupted_by_sigterm, kept_threads
from biokit.runs import RunFolder
from biokit.trainer import Trainer


def train(config: RunConfig) -> dict[str, Any]:
    """Train as configured; returns the manifest (`status`: `preprocessed`, `finished` or `stopped`).

    Every process of a run calls it with the same configuration; a process that no launcher started is alone. A STOP
    file in the run folder, SIGTERM and the first SIGINT save a checkpoint at the next step boundary and end with the
    status `stopped`. On the CPU the curve is bitwise the same however often the run was killed and started again, with
    the same layout and number of threads.

    Raises:
        BiokitError: bad input, an impossible configuration or layout (before any process group exists), a checkpoint
            that does not fit, a loss that is not finite.
    """
    if config.parallel.tensor_model_parallel_size > 1:
        # Megatron-core overlaps only where kernels start in order; read when CUDA starts
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    layout = find_layout(config, count_processes()[1])
    device = choose_device(config.train.device)
    folder = RunFolder(config.run_dir)
    if config.load and not Path(config.load).exists() and config.load not in list_models():
        known = f"Give a checkpoint, a run, a model or layer files, or a ready model: {', '.join(list_models())}"
        raise ConfigError(f"load={config.load}", "there is no such folder", known)
    with contextlib.ExitStack() as stack:
        if count_processes()[0] == 0:
            folder.create()
            stack.enter_context(folder.lock())
            folder.clear_stop()
            remove_partial(folder)
        stack.enter_context(kept_threads())
        timeout_s, needs_group = config.parallel.timeout_s, layout.strategy != "Single"
        processes = stack.enter_context(join_processes(device, timeout_s, needs_group))
        try:
            with interrupted_by_sigterm():
                with processes.main_first("preparing the data"):
                    store_dir = prepare_data(config)
                if not config.do_training:
                    return _note_preprocessed(config, folder, store_dir) if processes.is_main else {}
                trainer = Trainer(config, folder, store_dir, layout, processes)
            return trainer.run()
        except KeyboardInterrupt:
            if processes.is_main:
                folder.update_manifest(status="stopped")
            raise
        except BaseException as error:
            told = _tell(error, timeout_s, processes.peers)
            reason = str(told) if isinstance(told, BiokitError) else traceback.format_exc(limit=-3)
            with contextlib.suppress(OSError):  # a full disk must not hide the error itself
                if processes.is_main:
                    folder.update_manifest(status="failed", error=reason)
            if told is not error:
                raise told from error
            raise


def _tell(error: BaseException, timeout_s: float, peers: Peers) -> BaseException:
    """The error in our words, where another process is lost."""
    if isinstance(error, BiokitError) or not is_lost_peer(error):
        return error
    lost = peers.describe_lost()
    found = f"another process is gone, or did not answer in {timeout_s:g} s" + (f" ({lost})" if lost else "")
    do = "See the first error of the other ranks; start again: the run goes on from its last checkpoint"
    return PeerError("training", found, do)


def _note_preprocessed(config: RunConfig, folder: RunFolder, store_dir: Path) -> dict[str, Any]:
    folder.write_config(config_to_yaml(config))
    return folder.update_manifest(status="preprocessed", store_dir=str(store_dir))


def prepare_data(config: RunConfig) -> Path:
    """The folder of token stores for a run; made now unless it is there already.

    Raises:
        DataError: the input cannot be read, or the folder holds something else.
    """
    from biokit.data.preprocess import preprocess

    out = Path(config.data.store_dir or Path(config.run_dir) / "data")
    return preprocess(config.data, out, config.seed, progress=config.train.progress).folder
