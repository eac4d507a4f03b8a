"""The command line: `biokit COMMAND ...`, the same as `python -m biokit COMMAND ...`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from biokit import __version__
from biokit.errors import BiokitError, ConfigError
from biokit.launch.commands import launch
from biokit.launch.commands.parameters import add_parameters, join_parameters, read_parameters
from biokit.view import data_command, plan_command

EXIT_USER_ERROR = 2
# commands that take a configuration, and their flags that are none of its keys
OWN_FLAGS: dict[str, tuple[str, ...]] = {
    "train": (),
    "preprocess": (),
    "launch": launch.SWITCHES,
    "plan": plan_command.SWITCHES,
}
OWN_FLAGS_WITH_VALUE: dict[str, tuple[str, ...]] = {
    "launch": launch.WITH_VALUE,
    "plan": plan_command.WITH_VALUE,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (0: done, 2: something the user can mend, said in one line)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        options = _parser().parse_args(_plain_words(words))
        return options.run(options)
    except BiokitError as error:
        rank = os.environ.get("RANK", "0")
        if rank == "0" or not isinstance(error, ConfigError):  # a wrong configuration is wrong on every rank
            print(f"biokit: {error}" if rank == "0" else f"biokit: rank {rank}: {error}", file=sys.stderr)
        _leave_error(error)
        return EXIT_USER_ERROR
    except BrokenPipeError:  # `biokit runs list | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(f"biokit: {words[0]}: {str(error).rstrip('.')}. Check the disk and the permissions.", file=sys.stderr)
        _leave_error(error)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("biokit: interrupted", file=sys.stderr)
        return 130


def _leave_error(error: Exception) -> None:
    """For the supervisor, where this is a rank of a run: it sees no more than an exit code."""
    if "BIOKIT_LIFE" in os.environ:
        from biokit.launch.supervision.rank import note_own_error

        note_own_error(error)


def _plain_words(words: list[str]) -> list[str]:
    """The command line with flags for the configuration written as key=value, behind its name."""
    command, *rest = words or [""]
    if command in ("notebook", "submit"):
        return [command, *join_parameters(rest)]
    if command not in OWN_FLAGS or {"-h", "--help"} & set(rest):
        return [command, "--help"] if command in OWN_FLAGS else words
    from biokit.flags import read_flags

    own, plain, notes = read_flags(rest, OWN_FLAGS[command], OWN_FLAGS_WITH_VALUE.get(command, ()))
    if os.environ.get("RANK", "0") == "0":
        for note in notes:
            print(f"biokit: {note}", file=sys.stderr)
    return [command, *own, *plain]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="biokit", description="Molecular language models, from a notebook.")
    parser.add_argument("--version", action="version", version=f"biokit {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    train = commands.add_parser("train", help="preprocess what is needed and train, as a notebook does")
    _add_config(train)
    train.set_defaults(run=_run_train)

    preprocess = commands.add_parser("preprocess", help="read, clean, split and tokenise molecules; then stop")
    _add_config(preprocess)
    preprocess.set_defaults(run=_run_preprocess)

    own = commands.add_parser(
        "launch", help="start the processes of a run by torchrun; read where from the environment"
    )
    _add_config(own)
    launch.add_flags(own)

    split = commands.add_parser("split-layers", help="write a checkpoint as one file a layer, for `--load`")
    split.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a checkpoint, or a run folder")
    split.add_argument("directory", type=Path, metavar="DIR", help="a new folder")
    split.set_defaults(run=_run_split_layers)

    export = commands.add_parser("export-model", help="write the model of a checkpoint by itself, without the training")
    export.add_argument("source", metavar="MODEL", help="a checkpoint, a run folder (its newest one) or a model")
    export.add_argument("directory", type=Path, metavar="DIR", help="a new folder")
    export.add_argument("--dtype", default="bf16", help="of the weights: bf16 (default) or fp32")
    export.set_defaults(run=_run_export_model)

    _add_reshard(commands.add_parser("reshard", help="write a checkpoint cut for another layout, or in biokit's form"))

    notebook = commands.add_parser("notebook", help="execute a notebook by papermill into a run folder")
    notebook.add_argument("notebook", type=Path, metavar="NOTEBOOK", help="a .ipynb file with a `parameters` cell")
    notebook.add_argument(
        "run_dir", type=Path, metavar="RUN_DIR", help="its run folder; the executed copy goes there too"
    )
    add_parameters(notebook, "a value for its parameters cell, e.g. -p train_iters 300")
    notebook.set_defaults(run=_run_notebook)

    from biokit.launch.commands import runs, submit

    runs.add_parser(commands)
    submit.add_parser(commands)
    plan_command.add_parser(commands)
    data_command.add_parser(commands)

    doctor = commands.add_parser("doctor", help="versions, engines, kernels, devices; what to install for more")
    doctor.set_defaults(run=_run_doctor)
    return parser


def _add_config(command: argparse.ArgumentParser) -> None:
    from biokit.config import packaged_configs
    from biokit.flags import describe_flags

    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.epilog = describe_flags()
    command.add_argument("config", metavar="CONFIG", help=f"{', '.join(packaged_configs())}, or a YAML file")
    command.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="e.g. train.lr=1e-3 (or ++train.lr=1e-3); keys: biokit/config.py",
    )


def _add_reshard(command: argparse.ArgumentParser) -> None:
    command.add_argument("src", type=Path, metavar="SRC", help="a biokit checkpoint or run, Megatron's or DeepSpeed's")
    command.add_argument("dst", type=Path, metavar="DST", help="a new folder")
    sizes = {"tensor": ("--tp", "--tensor_model_parallel_size"), "pipeline": ("--pp", "--pipeline_model_parallel_size")}
    for name, flags in sizes.items():
        command.add_argument(*flags, dest=name, type=int, default=1, metavar="N", help=f"{name} ranks (1)")
    command.add_argument("--dry-run", action="store_true", help="print what would move, write nothing")
    command.add_argument("--format", choices=("megatron", "biokit"), default="megatron", help="form of DST (megatron)")
    command.add_argument("--config", help="the model's configuration, where SRC was not made by biokit")
    command.add_argument("--no-optimizer", "--finetune", dest="optimizer", action="store_false", help="weights only")
    command.add_argument(
        "--checkpoint-version", dest="version", type=float, default=3, help="Megatron's; decides the order in QKV (3)"
    )
    command.set_defaults(run=_run_reshard)


def _run_train(options: argparse.Namespace) -> int:
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # torchrun starts ranks in sessions of their own: were it killed, they would go on, and hold the devices
        from biokit.launch.tree import end_with

        end_with(os.getppid())
    from biokit.config import load_config
    from biokit.train import train

    manifest = train(load_config(options.config, options.overrides))
    if manifest:  # beside the main process there is none
        print(_summary(manifest))
    return 0


def _run_preprocess(options: argparse.Namespace) -> int:
    from biokit.config import load_config
    from biokit.data.preprocess import load_report
    from biokit.train import train

    config = load_config(options.config, [*options.overrides, "do_training=False"])
    store_dir = train(config)["store_dir"]
    print(load_report(store_dir))
    print(f"token stores: {store_dir}")
    return 0


def _run_split_layers(options: argparse.Namespace) -> int:
    from biokit.exchange.layers import split_layers

    layers = split_layers(options.checkpoint, options.directory)["layers"]
    print(f"{len(layers)} layers, {sum(layer['bytes'] for layer in layers):,} bytes: {options.directory}")
    return 0


def _run_export_model(options: argparse.Namespace) -> int:
    from biokit.model_folder import export_model

    about = export_model(options.source, options.directory, options.dtype).about
    size = sum(entry["bytes"] for entry in about["files"].values())
    print(f"{about['num_parameters']:,} parameters in {about['dtype']}, {size:,} bytes: {options.directory}")
    return 0


def _run_reshard(options: argparse.Namespace) -> int:
    from biokit.exchange.reshard import reshard

    print(
        reshard(
            options.src,
            options.dst,
            options.tensor,
            options.pipeline,
            dry_run=options.dry_run,
            format=options.format,
            config=options.config,
            optimizer=options.optimizer,
            version=options.version,
        )
    )
    return 0


def _run_notebook(options: argparse.Namespace) -> int:
    from biokit.config import parse_override
    from biokit.launch.notebooks import run_notebook

    given = read_parameters(options.parameters)
    parameters = dict(parse_override(f"{name}={value}") for name, value in given.items())
    print(run_notebook(options.notebook, options.run_dir, parameters))
    return 0


def _run_doctor(options: argparse.Namespace) -> int:
    from biokit.doctor import report

    print(report())
    return 0


def _summary(manifest: dict[str, Any]) -> str:
    if manifest["status"] == "preprocessed":
        return f"preprocessed, not trained (do_training=False): {manifest['store_dir']}"
    done = f"{manifest['status']} at step {manifest['step']} of {manifest['train_iters']}"
    return done if manifest["final_loss"] is None else f"{done}, loss {manifest['final_loss']:.4f}"


if __name__ == "__main__":
    sys.exit(main())
