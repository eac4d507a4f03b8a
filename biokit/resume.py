"""Where a run begins: at its newest checkpoint, at that of another run, at layer files, or from nothing.

The main process decides and the others follow: a folder that is being written looks different from node to node.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from biokit.checkpoint import Checkpoint, check_tensors, newest_checkpoint
from biokit.config import RunConfig, config_from_dict, config_to_dict
from biokit.errors import CheckpointError, ConfigError, RunError
from biokit.model_folder import SavedModel, find_model_folder, is_model_folder
from biokit.parallel.layer_files import is_layer_folder
from biokit.parallel.processes import Processes
from biokit.parallel.strategy import Strategy
from biokit.runs import RunFolder

FIXED = ("seed", "model.", "data.", "train.global_batch_size")  # a resumed run may not change these,
FREE = ("data.dataset_path", "data.dataset.", "data.store_dir", "data.num_workers")  # but where its data lie


@dataclass(frozen=True)
class Start:
    """A checkpoint to go on from, or a model or a folder of layer files to begin with, or nothing."""

    checkpoint: Path | None = None
    layers: Path | None = None
    model: Path | None = None


def find_start(config: RunConfig, folder: RunFolder, processes: Processes) -> Start:
    """What a run goes on from, the same on every process.

    Raises:
        RunError: the run has checkpoints and `resume=false`.
        CheckpointError: `load` is no checkpoint, run, model or folder of layer files.
    """
    kind, path = "", Path()
    with processes.together("finding where the run begins"):
        if processes.is_main:
            kind, path = _decide(config, folder)
    kind, path = processes.agree(kind), Path(processes.agree(str(path)))
    return Start(**{kind: path}) if kind else Start()


def _decide(config: RunConfig, folder: RunFolder) -> tuple[str, Path]:
    newest = newest_checkpoint(folder)
    if newest is not None:
        if not config.resume:
            found = "it has checkpoints and resume=false"
            raise RunError(f"run {folder.path}", found, "Give another run_dir, or resume=true")
        return "checkpoint", newest
    if not config.load:
        return "", Path()
    source = Path(config.load)
    if is_layer_folder(source):
        return "layers", source
    begin = find_model_folder(config.load)
    return ("model", begin) if is_model_folder(begin) else ("checkpoint", begin)


def check_fits(path: Path, saved: Checkpoint, config: RunConfig, ours: Mapping[str, Any], strategy: Strategy) -> None:
    """Refuse a checkpoint that is not of this training.

    Args:
        ours: what this run writes into its own checkpoints' manifests.

    Raises:
        CheckpointError: another vocabulary or other molecules, or tensors that do not fit the model.
        ConfigError: a configuration that differs where it must not, or a step beyond the last one.
    """
    asked = f"resume from {path}"
    made_with = config_from_dict(saved.manifest["config"], where=f"{path}")
    old, new = flatten(config_to_dict(made_with)), flatten(config_to_dict(config))
    differing = [key for key in new if key.startswith(FIXED) and not key.startswith(FREE) and old[key] != new[key]]
    if differing:
        changes = ", ".join(f"{key}: {old[key]} -> {new[key]}" for key in differing)
        raise ConfigError(asked, f"the configuration differs ({changes})", "Undo the change, or give another run_dir")
    for key, what in (("vocab_hash", "another vocabulary"), ("data_hash", "other molecules")):
        unknown = key == "data_hash" and saved.manifest.get(key) == ""  # another program's checkpoint
        if not unknown and saved.manifest.get(key) != ours[key]:
            raise CheckpointError(asked, f"it was made with {what}", "Give the run its own data, or another run_dir")
    step, wanted = saved.state["step"], config.train.train_iters
    own_run = path.parent == RunFolder(config.run_dir).checkpoints
    if step > wanted or (step == wanted and not own_run):
        at = "beyond" if step > wanted else "at the end:"
        raise ConfigError(asked, f"it is at step {step}, {at} train.train_iters={wanted}", "Raise train_iters")
    check_tensors(path, saved.model.forms(), strategy.template)
    if len(saved.optimizer):  # one of weights only starts with fresh moments
        check_tensors(path, saved.optimizer.forms(), strategy.optimizer_template())


def check_model_fits(saved: SavedModel, vocabulary_hash: str, template: Mapping[str, Any]) -> None:
    """Refuse a model that this training cannot begin with.

    Raises:
        CheckpointError: another vocabulary, or tensors that are not those of the run's model.
    """
    if saved.tokenizer.hash != vocabulary_hash:
        asked = f"begin with the model {saved.folder}"
        do = f"Give the run its vocabulary: data.vocab_file={saved.folder / 'vocab.txt'}"
        raise CheckpointError(asked, "it was made with another vocabulary", do)
    check_tensors(saved.folder, saved.tensors.forms(), template)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
