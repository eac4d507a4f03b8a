"""Training: the one place where data, models and parallelism meet.

`train(config)` preprocesses what is not yet preprocessed, goes on from the newest checkpoint of the run folder, and
writes metrics, checkpoints and the manifest there. Loss curves are bitwise the same however often the run was killed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from biokit.errors import BiokitError, CheckpointError, ConfigError, DataError, EngineError, RunError
from biokit.generate import sample_molecules
from biokit.models import build_model, find_model
from biokit.models.molbart import MOLBART, MolBART
from biokit.parallel.strategy import TokenSums, find_strategy
from biokit.process import choose_device, deterministic, interrupted_by_sigterm, kept_threads, stop_signals
from biokit.reporting import ProgressBar, open_tensorboard, progress_bar, write_tensorboard
from biokit.runs import MetricsWriter, RunFolder
from biokit.schedules import learning_rate
from biokit.tokenizers import SmilesTokenizer

FIXED = ("seed", "strategy", "model.", "data.", "train.global_batch_size")  # a resumed run may not change these,
FREE = ("data.dataset_path", "data.dataset.", "data.store_dir", "data.num_workers")  # but where its data lie


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
    with the status `stopped`. The curve is bitwise the same however often the run was killed and started again, with
    the same number of threads.

    Raises:
        BiokitError: bad input, an impossible configuration, a checkpoint that does not fit, a loss that is not finite.
    """
    folder = RunFolder(config.run_dir)
    find_model(config.model.name).resolve(config.model)
    find_strategy(config.strategy)
    choose_device(config.train.device)
    folder.create()
    with folder.lock(), kept_threads():
        folder.clear_stop()
        try:
            with interrupted_by_sigterm():
                store_dir = prepare_data(config)
                if not config.do_training:
                    folder.write_config(config_to_yaml(config))
                    return folder.update_manifest(status="preprocessed", store_dir=str(store_dir))
                trainer = Trainer(config, folder, store_dir)
            return trainer.run()
        except KeyboardInterrupt:
            folder.update_manifest(status="stopped")
            raise
        except BaseException as error:
            reason = str(error) if isinstance(error, BiokitError) else traceback.format_exc(limit=-3)
            with contextlib.suppress(OSError):  # a full disk must not hide the error itself
                folder.update_manifest(status="failed", error=reason)
            raise


def prepare_data(config: RunConfig) -> Path:
    """The folder of token stores for a run; made now unless it is there already.

    Raises:
        DataError: the input cannot be read, or the folder holds something else.
    """
    from biokit.data.preprocess import preprocess

    out = Path(config.data.store_dir or Path(config.run_dir) / "data")
    return preprocess(config.data, out, config.seed, progress=config.train.progress).folder


class Trainer:
    """One training run in one process."""

    def __init__(self, config: RunConfig, folder: RunFolder, store_dir: Path) -> None:
        self.config, self.folder = config, folder
        self.spec = find_model(config.model.name)
        if config.train.num_threads:
            torch.set_num_threads(config.train.num_threads)
        self.device = choose_device(config.train.device)
        self.tokenizer = SmilesTokenizer.from_file(store_dir / "vocab.txt")
        self.train_loader = self._loader(store_dir, "train")
        self.val_loader = self._loader(store_dir, "val")
        if config.train.eval_molecules and importlib.util.find_spec("rdkit") is None:
            found = "rdkit is not installed, which reads the decoded molecules"
            raise EngineError("train.eval_molecules", found, "Install rdkit, or give train.eval_molecules=0")
        if config.train.early_stopping_patience and not len(self.val_loader):
            raise DataError("train.early_stopping_patience", "the val part holds no molecule", "Check data.split")
        self.hidden_size: int = self.spec.resolve(config.model)["hidden_size"]
        model = build_model(config, self.tokenizer.vocab_size)
        self.strategy = find_strategy(config.strategy)(
            model, config.train, self.tokenizer.pad_id, self.device, self.spec.batch_keys
        )
        self.progress = Progress()
        self.checkpoint_manifest = {
            "config": config_to_dict(config),
            "config_hash": config_hash(config),
            "vocab_hash": self.tokenizer.hash,
            "data_hash": self.train_loader.store.manifest_hash,
            "layout": {"strategy": config.strategy, "world_size": 1, "tensor": 1, "pipeline": 1, "data": 1},
        }
        self.resumed_from = self._resume()

    def run(self) -> dict[str, Any]:
        """Train to the end, or until asked to stop; returns the manifest."""
        config, folder = self.config, self.folder
        folder.write_config(config_to_yaml(config))
        folder.write_manifest(self._manifest("running"))
        metrics = MetricsWriter(folder, resume_step=self.progress.step)
        self.board = open_tensorboard(config, folder, self.progress.step)
        try:
            with (
                stop_signals() as signalled,
                deterministic(self.device),
                progress_bar(config, self.progress.step) as bar,
            ):
                status = self._loop(metrics, bar, lambda: bool(signalled) or folder.stop_requested())
        finally:
            metrics.close()
            if self.board is not None:
                self.board.close()
        folder.clear_stop()
        return folder.update_manifest(**self._manifest(status))

    def _loop(self, metrics: MetricsWriter, bar: ProgressBar, stopping: Callable[[], bool]) -> str:
        train, progress = self.config.train, self.progress
        with contextlib.closing(self.train_loader.batches(progress.position)) as batches:
            while progress.step < train.train_iters and not self._stopped_early():
                if stopping():
                    if progress.step > self.resumed_from:
                        self.save()
                    return "stopped"
                line = self._train_step(batches)
                step, last = progress.step, progress.step == train.train_iters
                if last or (train.eval_interval and step % train.eval_interval == 0):
                    line |= self._evaluate()
                best = train.early_stopping_patience > 0 and line.get("val_loss") == progress.best_val_loss
                ends = last or self._stopped_early()
                if ends or step % train.log_interval == 0 or "val_loss" in line:
                    metrics.write(line)
                    write_tensorboard(self.board, line)
                bar.update(loss=line["loss"], lr=line["lr"], val_loss=line.get("val_loss"))
                if ends or best or (train.save_interval and step % train.save_interval == 0):
                    self.save()
        return "finished"

    def _stopped_early(self) -> bool:
        return 0 < self.config.train.early_stopping_patience <= self.progress.evaluations_since_best

    def _train_step(self, batches: Iterator[tuple[dict[str, np.ndarray], dict[str, int]]]) -> dict[str, Any]:
        """One update over a global batch; returns its metrics line (`tokens_per_s`: real tokens of both sides)."""
        started = time.perf_counter()
        train, step = self.config.train, self.progress.step + 1
        epoch = self.progress.position["epoch"] if self.progress.position else 0
        batch, position = next(batches)
        num_valid = int((batch["labels"] != self.tokenizer.pad_id).sum())
        micros = self._micro_batches(batch)
        seeds = [(self.config.seed * 1_000_003 + step) * 65_537 + index for index in range(len(micros))]
        lr = learning_rate(train, step, self.hidden_size)
        done = self.strategy.train_batch(micros, num_valid, seeds, lr)
        self.progress.step, self.progress.position = step, position
        seconds = time.perf_counter() - started
        num_tokens = sum(int((batch[key] != self.tokenizer.pad_id).sum()) for key in self.spec.batch_keys[:-1])
        loss = done.sums.loss / num_valid
        return {
            "step": step,
            "epoch": epoch,
            "loss": loss,
            "token_accuracy": done.sums.num_correct / num_valid,
            "perplexity": math.exp(min(loss, 700.0)),
            "lr": lr,
            "grad_norm": None if done.skipped else done.grad_norm,
            "skipped": done.skipped,
            "num_tokens": num_tokens,
            "tokens_per_s": num_tokens / seconds,
            "samples_per_s": len(batch["labels"]) / seconds,
        }

    def _evaluate(self) -> dict[str, float]:
        """Loss, accuracy and perplexity on the val part, and molecule metrics where asked for."""
        limit = self.config.train.eval_iters or sys.maxsize
        wanted = self.config.train.eval_molecules
        sums = TokenSums()
        decoded: list[dict[str, np.ndarray]] = []
        for batch in itertools.islice(self.val_loader.epoch(), limit):
            for micro in self._micro_batches(batch):
                sums += self.strategy.evaluate(micro)
            if sum(len(b["labels"]) for b in decoded) < wanted:
                decoded.append(batch)
        if not sums.num_valid:
            return {}
        loss = sums.loss / sums.num_valid
        if not math.isfinite(loss):
            raise RunError(
                "evaluation", f"the validation loss is {loss}", "Lower train.lr, or look at the val molecules"
            )
        best = loss < self.progress.best_val_loss
        self.progress.evaluations_since_best = 0 if best else self.progress.evaluations_since_best + 1
        self.progress.best_val_loss = min(loss, self.progress.best_val_loss)
        line = {
            "val_loss": loss,
            "val_token_accuracy": sums.num_correct / sums.num_valid,
            "val_perplexity": math.exp(min(loss, 700.0)),
        }
        return line | self._evaluate_molecules(decoded)

    def _evaluate_molecules(self, batches: list[dict[str, np.ndarray]]) -> dict[str, float]:
        """Greedy decoding of `train.eval_molecules` val molecules: exact canonical matches, invalid fraction."""
        wanted = self.config.train.eval_molecules
        if not wanted or not batches:
            return {}
        from biokit.chem.scores import exact_match_and_invalid

        predicted: list[str] = []
        targets: list[str] = []
        for batch in batches:
            num = min(wanted - len(targets), len(batch["labels"]))
            src_BS = torch.from_numpy(batch["encoder_ids"][:num])
            model = cast(MolBART, self.strategy.model)
            predicted += sample_molecules(model, self.tokenizer, src_BS, max_length=self.config.data.max_length)[0]
            targets += self.tokenizer.decode_batch(batch["labels"][:num])
        exact, invalid = exact_match_and_invalid(predicted, targets)
        return {"val_exact_match": exact, "val_invalid_fraction": invalid}

    def save(self) -> Path:
        """Write a checkpoint of this step."""
        if self.board is not None:
            self.board.flush()
        state = {**vars(self.progress), "scaler": self.strategy.scaler_state()}
        if math.isinf(self.progress.best_val_loss):
            state["best_val_loss"] = None
        return save_checkpoint(
            self.folder,
            self.progress.step,
            self.strategy.model_state(),
            self.strategy.optimizer_state(),
            state,
            self.checkpoint_manifest,
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
        asked = f"resume from {path}"
        for key, what in (("vocab_hash", "another vocabulary"), ("data_hash", "other molecules")):
            if saved.manifest.get(key) != self.checkpoint_manifest[key]:
                raise CheckpointError(
                    asked, f"it was made with {what}", "Give the run its own data, or another run_dir"
                )
        old, new = flatten(saved.manifest["config"]), flatten(config_to_dict(self.config))
        differing = [
            key for key in new if key.startswith(FIXED) and not key.startswith(FREE) and old.get(key) != new[key]
        ]
        if differing:
            changes = ", ".join(f"{key}: {old.get(key)} -> {new[key]}" for key in differing)
            raise ConfigError(
                asked, f"the configuration differs ({changes})", "Undo the change, or give another run_dir"
            )
        step, wanted = saved.state["step"], self.config.train.train_iters
        if step > wanted:
            raise ConfigError(asked, f"it is at step {step}, beyond train.train_iters={wanted}", "Raise train_iters")
        check_tensors(path, saved.model, self.strategy.model_state())
        check_tensors(path, saved.optimizer, self.strategy.optimizer_template())

    def _micro_batches(self, batch: Mapping[str, np.ndarray]) -> list[dict[str, torch.Tensor]]:
        size, pad_id = self.config.train.micro_batch_size, self.tokenizer.pad_id
        return list(micro_batches(batch, size, pad_id, self.spec.batch_keys))

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
            "config_hash": self.checkpoint_manifest["config_hash"],
            "vocab_hash": self.tokenizer.hash,
            "data_hash": self.train_loader.store.manifest_hash,
            "num_parameters": sum(p.numel() for p in self.strategy.model.parameters()),
            "device": str(self.device),
            "num_threads": torch.get_num_threads(),
            "final_loss": lines[-1]["loss"] if lines else None,
            "versions": {"biokit": __version__, "torch": torch.__version__, "numpy": np.__version__},
            "time": round(time.time(), 3),
        }


def micro_batches(
    batch: Mapping[str, np.ndarray], size: int, pad_id: int, keys: Sequence[str]
) -> Iterator[dict[str, torch.Tensor]]:
    """Cut a global batch into micro-batches of `size` rows, each without columns that are padding only."""
    for rows in micro_slices(len(batch[keys[-1]]), size):
        yield as_tensors({key: trim(batch[key][rows], pad_id) for key in keys}, keys)


def as_tensors(batch: Mapping[str, np.ndarray], keys: Sequence[str] = MOLBART.batch_keys) -> dict[str, torch.Tensor]:
    """The model's arrays of a batch as tensors."""
    return {key: torch.from_numpy(np.ascontiguousarray(batch[key])) for key in keys}


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
