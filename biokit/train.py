"""Training: the one place where data, models and parallelism meet.

`train(config)` preprocesses what is not yet preprocessed, goes on from the newest checkpoint of the run folder, and
writes metrics, checkpoints and the manifest there. Loss curves are bitwise the same however often the run was killed.
"""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from biokit import __version__
from biokit.checkpoint import (
    Checkpoint,
    check_tensors,
    load_checkpoint,
    newest_checkpoint,
    remove_partial,
    save_checkpoint,
)
from biokit.config import RunConfig, config_hash, config_to_dict, config_to_yaml
from biokit.data.batching import micro_slices
from biokit.data.molecules import MoleculeLoader, open_part
from biokit.errors import BiokitError, CheckpointError, ConfigError, EngineError, RunError
from biokit.generate import sample_molecules
from biokit.models import build_model, find_model
from biokit.models.molbart import MolBART
from biokit.parallel.strategy import TokenSums, find_strategy
from biokit.reporting import open_tensorboard, progress_bar, write_tensorboard
from biokit.runs import MetricsWriter, RunFolder
from biokit.schedules import learning_rate
from biokit.tokenizers import SmilesTokenizer


@dataclass
class Progress:
    """What changes from step to step beside the weights; part of every checkpoint."""

    step: int = 0
    position: dict[str, int] | None = None  # of the loader
    best_val_loss: float = math.inf
    evaluations_since_best: int = 0


def train(config: RunConfig) -> dict[str, Any]:
    """Train as configured; returns the manifest (`status`: `preprocessed`, `finished` or `stopped`).

    A STOP file in the run folder, SIGTERM and the first SIGINT save a checkpoint at the next step boundary and end
    with the status `stopped`.

    Raises:
        BiokitError: bad input, an impossible configuration, a checkpoint that does not fit, a loss that is not finite.
    """
    folder = RunFolder(config.run_dir)
    find_model(config.model.name).resolve(config.model)
    find_strategy(config.strategy)
    folder.create()
    with folder.lock():
        try:
            store_dir = prepare_data(config)
            if not config.do_training:
                return folder.update_manifest(status="preprocessed", store_dir=str(store_dir))
            return Trainer(config, folder, store_dir).run()
        except BaseException as error:
            reason = str(error) if isinstance(error, BiokitError) else traceback.format_exc(limit=-3)
            folder.update_manifest(status="failed", error=reason)
            raise


def prepare_data(config: RunConfig) -> Path:
    """The folder of token stores for a run; made now unless it is there already.

    Raises:
        DataError: the input cannot be read, or the folder holds something else.
    """
    source = Path(config.data.dataset_path)
    if (source / "preprocess.json").is_file():
        return source
    from biokit.data.preprocess import preprocess

    out = Path(config.data.store_dir or Path(config.run_dir) / "data")
    preprocess(config.data, out, config.seed, progress=config.train.progress)
    return out


class Trainer:
    """One training run in one process."""

    def __init__(self, config: RunConfig, folder: RunFolder, store_dir: Path) -> None:
        self.config, self.folder = config, folder
        if config.train.num_threads:
            torch.set_num_threads(config.train.num_threads)
        self.device = choose_device(config.train.device)
        self.tokenizer = SmilesTokenizer.from_file(store_dir / "vocab.txt")
        self.train_loader = self._loader(store_dir, "train")
        self.val_loader = self._loader(store_dir, "val")
        self.hidden_size: int = find_model(config.model.name).resolve(config.model)["hidden_size"]
        model = build_model(config, self.tokenizer.vocab_size)
        self.strategy = find_strategy(config.strategy)(model, config.train, self.tokenizer.pad_id, self.device)
        self.progress = Progress()
        self.about = {
            "config": config_to_dict(config),
            "config_hash": config_hash(config),
            "vocab_hash": self.tokenizer.hash,
            "layout": {"strategy": config.strategy, "world_size": 1, "tensor": 1, "pipeline": 1, "data": 1},
        }
        self.resumed_from = self._resume()

    def run(self) -> dict[str, Any]:
        """Train to the end, or until asked to stop; returns the manifest."""
        config, folder = self.config, self.folder
        folder.clear_stop()
        folder.write_config(config_to_yaml(config))
        folder.write_manifest(self._manifest("running"))
        metrics = MetricsWriter(folder, resume_step=self.progress.step)
        board = open_tensorboard(config, folder, self.progress.step)
        try:
            with (
                stop_signals() as signalled,
                deterministic(self.device),
                progress_bar(config, self.progress.step) as bar,
            ):
                status = self._loop(metrics, board, bar, lambda: bool(signalled) or folder.stop_requested())
        finally:
            metrics.close()
            if board is not None:
                board.close()
        folder.clear_stop()
        return folder.update_manifest(**self._manifest(status))

    def _loop(self, metrics: MetricsWriter, board: Any, bar: Any, stopping: Callable[[], bool]) -> str:
        train = self.config.train
        batches = self.train_loader.batches(self.progress.position)
        while self.progress.step < train.train_iters:
            line = self._train_step(*next(batches))
            step, last = self.progress.step, self.progress.step == train.train_iters
            stop = stopping()
            if last or (train.eval_interval and step % train.eval_interval == 0):
                line |= self._evaluate()
            early = 0 < train.early_stopping_patience <= self.progress.evaluations_since_best
            if last or stop or early or step % train.log_interval == 0 or "val_loss" in line:
                metrics.write(line)
                write_tensorboard(board, line)
            bar.update(loss=line["loss"], lr=line["lr"], val_loss=line.get("val_loss"))
            if last or stop or early or (train.save_interval and step % train.save_interval == 0):
                self.save()
            if stop:
                return "stopped"
            if early:
                break
        return "finished"

    def _train_step(self, batch: Mapping[str, np.ndarray], position: dict[str, int]) -> dict[str, Any]:
        """One update over a global batch; returns its metrics line."""
        started = time.perf_counter()
        train, step = self.config.train, self.progress.step + 1
        num_valid = int((batch["labels"] != self.tokenizer.pad_id).sum())
        sums = TokenSums()
        for index, micro in enumerate(micro_batches(batch, train.micro_batch_size, self.tokenizer.pad_id)):
            dropout_seed = (self.config.seed * 1_000_003 + step) * 65_537 + index
            sums += self.strategy.backward(micro, 1.0 / num_valid, dropout_seed)
        loss = sums.loss / num_valid
        if not math.isfinite(loss) and train.precision != "fp16":
            raise RunError(f"step {step}", f"the loss is {loss}", "Lower train.lr, or look at the batch's molecules")
        lr = learning_rate(train, step, self.hidden_size)
        grad_norm, skipped = self.strategy.step(lr)
        self.progress.step, self.progress.position = step, position
        seconds = time.perf_counter() - started
        num_tokens = sum(int((batch[key] != self.tokenizer.pad_id).sum()) for key in ("encoder_ids", "decoder_ids"))
        return {
            "step": step,
            "epoch": position["epoch"],
            "loss": loss,
            "token_accuracy": sums.num_correct / num_valid,
            "perplexity": math.exp(min(loss, 700.0)),
            "lr": lr,
            "grad_norm": grad_norm,
            "skipped": skipped,
            "num_tokens": num_tokens,
            "tokens_per_s": num_tokens / seconds,
            "samples_per_s": len(batch["labels"]) / seconds,
        }

    def _evaluate(self) -> dict[str, float]:
        """Loss, accuracy and perplexity on the val part, and molecule metrics where asked for."""
        limit = self.config.train.eval_iters or sys.maxsize
        sums, sources = TokenSums(), []
        for index, batch in enumerate(self.val_loader.epoch()):
            if index == limit:
                break
            sums += self.strategy.evaluate(as_tensors(batch))
            sources.append(batch)
        if not sums.num_valid:
            return {}
        loss = sums.loss / sums.num_valid
        best = loss < self.progress.best_val_loss
        self.progress.evaluations_since_best = 0 if best else self.progress.evaluations_since_best + 1
        self.progress.best_val_loss = min(loss, self.progress.best_val_loss)
        line = {
            "val_loss": loss,
            "val_token_accuracy": sums.num_correct / sums.num_valid,
            "val_perplexity": math.exp(min(loss, 700.0)),
        }
        return line | self._evaluate_molecules(sources)

    def _evaluate_molecules(self, batches: list[dict[str, np.ndarray]]) -> dict[str, float]:
        """Greedy decoding of `train.eval_molecules` val molecules: exact canonical matches, invalid fraction."""
        wanted = self.config.train.eval_molecules
        if not wanted:
            return {}
        from biokit.chem.scores import exact_match_and_invalid

        predicted: list[str] = []
        targets: list[str] = []
        for batch in batches:
            num = min(wanted - len(targets), len(batch["labels"]))
            if not num:
                break
            src_BS = torch.from_numpy(batch["encoder_ids"][:num])
            model = cast(MolBART, self.strategy.model)
            predicted += sample_molecules(model, self.tokenizer, src_BS, max_length=self.config.data.max_length)[0]
            targets += self.tokenizer.decode_batch(batch["labels"][:num])
        exact, invalid = exact_match_and_invalid(predicted, targets)
        return {"val_exact_match": exact, "val_invalid_fraction": invalid}

    def save(self) -> Path:
        """Write a checkpoint of this step."""
        state = {**vars(self.progress), "scaler": self.strategy.scaler_state()}
        if math.isinf(self.progress.best_val_loss):
            state["best_val_loss"] = None
        return save_checkpoint(
            self.folder,
            self.progress.step,
            self.strategy.model_state(),
            self.strategy.optimizer_state(),
            state,
            self.about,
            "\n".join(self.tokenizer.vocabulary) + "\n",
        )

    def _resume(self) -> int:
        """Take over the newest checkpoint; returns its step (0: a fresh run)."""
        remove_partial(self.folder)
        path = newest_checkpoint(self.folder)
        if path is None:
            return 0
        if not self.config.resume:
            raise RunError(
                f"run {self.folder.path}", "it has checkpoints and resume=false", "Give another run_dir, or resume=true"
            )
        saved = load_checkpoint(path)
        self._check_fits(path, saved)
        self.strategy.load(saved.model, saved.optimizer, saved.state.pop("scaler"))
        best = saved.state.pop("best_val_loss")
        self.progress = Progress(best_val_loss=math.inf if best is None else best, **saved.state)
        return self.progress.step

    def _check_fits(self, path: Path, saved: Checkpoint) -> None:
        if saved.manifest["vocab_hash"] != self.tokenizer.hash:
            raise CheckpointError(
                f"checkpoint {path}",
                "it was made with another vocabulary",
                "Give the run its own data, or another run_dir",
            )
        old, new = flatten(saved.manifest["config"]), flatten(config_to_dict(self.config))
        fixed = ("seed", "strategy", "model.", "data.")
        differing = [
            key for key in new if key.startswith(fixed) and old.get(key) != new[key] and key != "data.num_workers"
        ]
        if differing:
            changes = ", ".join(f"{key}: {old.get(key)} -> {new[key]}" for key in differing)
            raise ConfigError(
                f"resume from {path}",
                f"the configuration differs ({changes})",
                "Undo the change, or give another run_dir",
            )
        check_tensors(path, saved.model, self.strategy.model_state())

    def _loader(self, store_dir: Path, part: str) -> MoleculeLoader:
        store, molecules = open_part(store_dir, part, self.config.data)
        return MoleculeLoader(
            store, molecules, self.tokenizer, self.config.data, self.config.seed, self.config.train.global_batch_size
        )

    def _manifest(self, status: str) -> dict[str, Any]:
        lines = self.folder.read_metrics()
        return {
            "status": status,
            "step": self.progress.step,
            "train_iters": self.config.train.train_iters,
            "resumed_from": self.resumed_from,
            "config_hash": self.about["config_hash"],
            "vocab_hash": self.tokenizer.hash,
            "data_hash": self.train_loader.store.manifest_hash,
            "num_parameters": sum(p.numel() for p in self.strategy.model.parameters()),
            "device": str(self.device),
            "num_threads": torch.get_num_threads(),
            "final_loss": lines[-1]["loss"] if lines else None,
            "versions": {"biokit": __version__, "torch": torch.__version__, "numpy": np.__version__},
            "time": round(time.time(), 3),
        }


def choose_device(asked: str) -> torch.device:
    """`auto` takes CUDA where there is one.

    Raises:
        EngineError: CUDA asked for and not there.
    """
    if asked == "cuda" and not torch.cuda.is_available():
        raise EngineError(
            "train.device=cuda", "torch sees no CUDA device", "Give train.device=cpu, or see `biokit doctor`"
        )
    return torch.device("cuda" if asked != "cpu" and torch.cuda.is_available() else "cpu")


def micro_batches(batch: Mapping[str, np.ndarray], size: int, pad_id: int) -> Iterator[dict[str, torch.Tensor]]:
    """Cut a global batch into micro-batches of `size` rows, each without columns that are padding only."""
    for rows in micro_slices(len(batch["labels"]), size):
        yield as_tensors({key: trim(batch[key][rows], pad_id) for key in BATCH_KEYS})


BATCH_KEYS = ("encoder_ids", "decoder_ids", "labels")


def as_tensors(batch: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The model's arrays of a batch as tensors."""
    return {key: torch.from_numpy(np.ascontiguousarray(batch[key])) for key in BATCH_KEYS}


def trim(ids_BT: np.ndarray, pad_id: int) -> np.ndarray:
    """Leave out the columns on the right that hold padding only."""
    used = np.flatnonzero((ids_BT != pad_id).any(axis=0))
    return ids_BT[:, : used[-1] + 1]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects SIGTERM and the first SIGINT (a second one interrupts at once); only in the main thread."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number: int, _frame: Any) -> None:
        if number == signal.SIGINT and received:
            raise KeyboardInterrupt
        received.append(number)

    old = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Deterministic algorithms on the CPU, for as long as a run lasts."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(before or device.type == "cpu")
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
