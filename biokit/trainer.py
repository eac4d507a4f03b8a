"""One training as one of its processes sees it: the one place where data, models and parallelism meet.

The main process alone writes the run folder, but for every rank's own metrics.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from biokit import __version__
from biokit.checkpoint import (
    CheckpointWriter,
    load_checkpoint,
)
from biokit.config import RunConfig, config_hash, config_to_dict, config_to_yaml
from biokit.data.batching import rank_rows
from biokit.data.micro_batches import count_tokens, own_micro_batches
from biokit.data.molecules import MoleculeLoader, open_part
from biokit.errors import ConfigError, DataError, EngineError, RunError
from biokit.generate import sample_molecules
from biokit.layouts import model_parts
from biokit.model_folder import open_model
from biokit.models import find_model
from biokit.models.molbart import MolBART
from biokit.parallel.deepspeed_config import read_user_config
from biokit.parallel.grid import Layout, deal_micro_batches, resolve_strategy
from biokit.parallel.layer_loading import load_layers
from biokit.parallel.processes import Processes
from biokit.parallel.strategy import ModelParts, TokenSums, make_strategy
from biokit.process import deterministic, stop_signals, used_memory
from biokit.reporting import ProgressBar, open_tensorboard, progress_bar, write_tensorboard
from biokit.resume import check_fits, check_model_fits, find_start
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


class Trainer:
    """One training run, as one of its processes sees it."""

    def __init__(
        self, config: RunConfig, folder: RunFolder, store_dir: Path, layout: Layout, processes: Processes
    ) -> None:
        self.config, self.folder, self.store_dir = config, folder, store_dir
        self.layout, self.processes, self.place = layout, processes, layout.place(processes.rank)
        self.spec = find_model(config.model.name)
        if config.train.num_threads:
            torch.set_num_threads(config.train.num_threads)
        self.tokenizer = SmilesTokenizer.from_file(store_dir / "vocab.txt")
        share = partial(
            rank_rows,
            micro_batch_size=config.train.micro_batch_size,
            rank=self.place.data,
            num_ranks=layout.data,
        )
        self.train_loader, self.val_loader = self._loader("train", share), self._loader("val", share)
        if config.train.eval_molecules and importlib.util.find_spec("rdkit") is None:
            found = "rdkit is not installed, which reads the decoded molecules"
            raise EngineError("train.eval_molecules", found, "Install rdkit, or give train.eval_molecules=0")
        if config.train.keep_best and config.train.best_metric == "val_exact_match" and not config.train.eval_molecules:
            found = "train.eval_molecules=0: no molecule would be decoded"
            raise ConfigError("train.best_metric=val_exact_match", found, "Give train.eval_molecules, e.g. 100")
        if config.train.early_stopping_patience and not len(self.val_loader):
            raise DataError("train.early_stopping_patience", "the val part holds no molecule", "Check data.split")
        self.hidden_size: int = self.spec.resolve(config.model)["hidden_size"]
        self.start = find_start(config, folder, processes)
        self.strategy = make_strategy(self._model_parts(), config, layout, processes)
        self.progress = Progress()
        self.last_line: dict[str, Any] = {}
        self.checkpoint_manifest = {
            "config": config_to_dict(config),
            "config_hash": config_hash(config),
            "vocab_hash": self.tokenizer.hash,
            "data_hash": self.train_loader.store.manifest_hash,
            "layout": layout.as_dict(),
        }
        self.check_s, self.resumed_from, self.saved_step = 0.0, 0, 0

    def run(self) -> dict[str, Any]:
        """Train to the end, or until asked to stop; returns the manifest (empty beside the main process)."""
        with contextlib.closing(self.strategy):
            self.resumed_from = self.saved_step = self._resume()
            status = self._run(self.config if self.processes.is_main else without_display(self.config))
        if not self.processes.is_main:
            return {}
        self.folder.clear_stop()
        return self.folder.update_manifest(**self._manifest(status))

    def _run(self, config: RunConfig) -> str:
        folder, train = self.folder, config.train
        if self.processes.is_main:
            folder.write_config(config_to_yaml(config))
            self._say_notes()
            if self.strategy.engine_settings:
                folder.write_deepspeed_config(self.strategy.engine_settings)
            folder.write_manifest(self._manifest("running"))
        self.writer = CheckpointWriter(folder, train.async_save, train.keep_last, train.keep_best, train.best_metric)
        with (
            contextlib.closing(MetricsWriter(folder, self.processes.rank, resume_step=self.progress.step)) as metrics,
            contextlib.ExitStack() as stack,
        ):
            self.board = open_tensorboard(config, folder, self.progress.step)
            if self.board is not None:
                stack.callback(self.board.close)
            signalled = stack.enter_context(stop_signals())
            stack.enter_context(deterministic(self.processes.device))
            bar = stack.enter_context(progress_bar(config, self.progress.step))
            stack.enter_context(contextlib.closing(self.writer))
            # one process looks at the file: a shared disk may show the others an old one
            status = self._loop(
                metrics, bar, lambda: bool(signalled) or (self.processes.is_main and folder.stop_requested())
            )
            with self.processes.together("the last checkpoint"):
                self.writer.wait()
        return status

    def _say_notes(self) -> None:
        """What runs other than asked: another strategy's name, keys of a ds_config.json that do nothing here."""
        notes = [resolve_strategy(self.config.strategy)[1]]
        if self.config.parallel.deepspeed_config:
            notes += read_user_config(self.config.parallel.deepspeed_config)[1]
        for note in filter(None, notes):
            print(note, file=sys.stderr)

    def _loop(self, metrics: MetricsWriter, bar: ProgressBar, stopping: Callable[[], bool]) -> str:
        train, progress = self.config.train, self.progress
        with contextlib.closing(self.train_loader.batches(progress.position)) as batches:
            while progress.step < train.train_iters and not self._stopped_early():
                if self.processes.sum([stopping()])[0]:
                    if progress.step > self.saved_step:
                        self.save()
                    return "stopped"
                line = self.last_line = self._train_step(batches)
                step, last = progress.step, progress.step == train.train_iters
                if last or (train.eval_interval and step % train.eval_interval == 0):
                    line |= self._evaluate()
                best = train.early_stopping_patience > 0 and line.get("val_loss") == progress.best_val_loss
                best |= train.keep_best > 0 and "val_loss" in line  # retention ranks those that were evaluated
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
        """One update over a global batch; returns its metrics line.

        `tokens_per_s` counts real tokens of both sides. `step_s` is this rank's own part of the step: on the CPU
        without its waiting for the others, which takes no CPU time; on CUDA the whole step.
        """
        started = time.perf_counter()
        train, step = self.config.train, self.progress.step + 1
        epoch = self.progress.position["epoch"] if self.progress.position else 0
        batch, position = next(batches)
        micros, indices = self._own_micro_batches(batch)
        counted = count_tokens(micros, self.tokenizer.pad_id, self.spec.batch_keys)
        own_s, cpu_s = time.perf_counter() - started, time.thread_time()
        first = self.place.tensor == 0 and self.place.pipeline == 0  # every data rank counts once
        num_valid, num_tokens = map(int, self.processes.sum([n if first else 0 for n in counted]))
        if not num_valid:
            raise DataError(f"step {step}", "no label of its batch counts", "Look at the molecules of the train part")
        seeds = [(self.config.seed * 1_000_003 + step) * 65_537 + index for index in indices]
        lr = learning_rate(train, step, self.hidden_size)
        done = self.strategy.train_batch(micros, num_valid, seeds, lr)
        self.progress.step, self.progress.position = step, position
        seconds = time.perf_counter() - started
        device = self.processes.device
        own_s = own_s + time.thread_time() - cpu_s if device.type == "cpu" else seconds
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
            "samples_per_s": len(batch["indices"]) / seconds,
            "step_s": own_s,
            "memory_bytes": used_memory(device),
        }

    def _evaluate(self) -> dict[str, float]:
        """Loss, accuracy and perplexity on the val part, and molecule metrics where asked for."""
        limit = self.config.train.eval_iters or sys.maxsize
        sums = TokenSums()
        for batch in itertools.islice(self.val_loader.epoch(), limit):
            sums += self.strategy.evaluate(self._own_micro_batches(batch)[0])
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
        return line | self._evaluate_molecules()

    def _evaluate_molecules(self) -> dict[str, float]:
        """Greedy decoding of `train.eval_molecules` val molecules: exact canonical matches, invalid fraction."""
        wanted = self.config.train.eval_molecules
        if not wanted:
            return {}
        model, scores = self.strategy.whole_model(), torch.zeros(2, dtype=torch.float64)
        with self.processes.together("decoding val molecules"):
            if model is not None:
                scores[:] = torch.tensor(self._decode(cast(MolBART, model), wanted))
        exact, invalid = self.processes.share(scores, 0).tolist()
        return {"val_exact_match": exact, "val_invalid_fraction": invalid}

    def _decode(self, model: MolBART, wanted: int) -> tuple[float, float]:
        """(exact matches, invalid fraction) among the first val molecules, whichever ranks evaluate them."""
        from biokit.chem.scores import exact_match_and_invalid

        predicted: list[str] = []
        targets: list[str] = []
        for batch in self._loader("val").epoch():
            num = min(wanted - len(targets), len(batch["labels"]))
            src_BS = torch.from_numpy(batch["encoder_ids"][:num])
            predicted += sample_molecules(model, self.tokenizer, src_BS, max_length=self.config.data.max_length)[0]
            targets += self.tokenizer.decode_batch(batch["labels"][:num])
            if len(targets) == wanted:
                break
        return exact_match_and_invalid(predicted, targets)

    def save(self) -> None:
        """Write a checkpoint of this step (or begin to: `train.async_save`)."""
        if self.board is not None:
            self.board.flush()
        state = {**vars(self.progress), "scaler": self.strategy.scaler_state()}
        if math.isinf(self.progress.best_val_loss):
            state["best_val_loss"] = None
        metrics = {key: value for key, value in self.last_line.items() if key.startswith(("val_", "loss"))}
        with self.processes.together("the checkpoint before this one"):  # memory holds one copy of the state
            self.writer.wait()
        model, optimizer = self.strategy.model_state(), self.strategy.optimizer_state()
        self.saved_step = self.progress.step
        with self.processes.together(f"the checkpoint of step {self.progress.step}"):
            if self.processes.is_main:
                about = {**self.checkpoint_manifest, "metrics": metrics}
                vocabulary = "\n".join(self.tokenizer.vocabulary) + "\n"
                self.writer.write(self.progress.step, model, optimizer, state, about, vocabulary)

    def _resume(self) -> int:
        """Take over the checkpoint that the run goes on from; returns its step (0: a fresh run)."""
        path = self.start.checkpoint
        if path is None:
            self._begin_with_model()
            return 0
        with self.processes.together(f"checking {path}"):
            saved = load_checkpoint(path, check=self.processes.is_main)
        with self.processes.together(f"taking over {path}"):
            check_fits(path, saved, self.config, self.checkpoint_manifest, self.strategy)
        self.check_s = saved.check_s
        self.strategy.load(saved.model, saved.optimizer, saved.state.pop("scaler"))
        best = saved.state.pop("best_val_loss")
        self.progress = Progress(best_val_loss=math.inf if best is None else best, **saved.state)
        return self.progress.step

    def _begin_with_model(self) -> None:
        """Take over the weights of the model that the run begins with, where it begins with one."""
        if self.start.model is None:
            return
        with self.processes.together(f"taking over {self.start.model}"):
            saved = open_model(self.start.model)
            check_model_fits(saved, self.tokenizer.hash, self.strategy.template)
        self.strategy.load(saved.tensors, {}, self.strategy.scaler_state())

    def _own_micro_batches(self, batch: Mapping[str, np.ndarray]) -> tuple[list[dict[str, torch.Tensor]], range]:
        """This data rank's micro-batches and their numbers in the global batch; as many on every rank."""
        size, num_ranks = self.config.train.micro_batch_size, self.layout.data
        num_rows = len(batch["indices"])
        own = deal_micro_batches(-(-num_rows // size), self.place.data, num_ranks)
        keys, pad_id = self.spec.batch_keys, self.tokenizer.pad_id
        return own_micro_batches(batch, size, pad_id, keys, num_rows, own), own

    def _loader(self, part: str, share: Callable[[int], slice] | None = None) -> MoleculeLoader:
        store, molecules = open_part(self.store_dir, part, self.config.data)
        size = self.config.train.global_batch_size
        return MoleculeLoader(store, molecules, self.tokenizer, self.config.data, self.config.seed, size, share)

    def _model_parts(self) -> ModelParts:
        parts = model_parts(self.config, self.tokenizer.vocab_size, self.tokenizer.pad_id)
        if self.start.layers is not None:
            sizes = {"name": self.spec.name, **self.spec.resolve(self.config.model)}
            return load_layers(parts, self.start.layers, vocabulary_hash=self.tokenizer.hash, sizes=sizes)
        return parts

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
            "num_parameters": sum(p.numel() for p in self.strategy.template.values()),
            "layout": self.layout.as_dict(),
            "device": str(self.processes.device),
            "checkpoint_check_s": round(self.check_s, 4),
            "num_threads": torch.get_num_threads(),
            "final_loss": lines[-1]["loss"] if lines else None,
            "versions": {"biokit": __version__, "torch": torch.__version__, "numpy": np.__version__},
            "time": round(time.time(), 3),
        }


def without_display(config: RunConfig) -> RunConfig:
    """The same run with nothing to see: one process shows it."""
    return replace(config, train=replace(config.train, progress=False, tensorboard=False))
