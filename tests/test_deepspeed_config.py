"""What biokit gives DeepSpeed, and how a user's own ds_config.json is read, merged and refused."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from biokit.config import RunConfig, config_from_dict
from biokit.errors import ConfigError
from biokit.parallel.deepspeed_config import effective_config, read_user_config
from biokit.parallel.deepspeed_keys import INERT_KEYS, KNOWN_KEYS
from biokit.parallel.grid import ZERO_STAGE, Layout

LAYOUTS = [
    Layout("Zero1", data=4), Layout("Zero2", data=2), Layout("Zero3", data=2), Layout("ZeroInf", data=2),
    Layout("Pipeline", pipeline=2, data=2), Layout("ThreeD", tensor=2, pipeline=2),
]  # fmt: skip

# The file that Megatron MolBART shipped, with its CPU offload and its optimizer (which its client optimizer overrode).
MOLBART: dict[str, Any] = {
    "train_batch_size": 1024,
    "train_micro_batch_size_per_gpu": 256,
    "gradient_accumulation_steps": 1,
    "steps_per_print": 1,
    "gradient_clipping": 1.0,
    "zero_optimization": {
        "stage": 1,
        "allgather_partitions": True,
        "reduce_scatter": True,
        "allgather_bucket_size": 500000000,
        "reduce_bucket_size": 500000000,
        "overlap_comm": False,
        "contiguous_gradients": False,
        "cpu_offload": False,
    },
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-5, "betas": [0.8, 0.999], "eps": 1e-8, "weight_decay": 3e-7}},
    "fp16": {"enabled": True, "loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1},
    "wall_clock_breakdown": True,
    "zero_allow_untested_optimizer": True,
}


def configure(path: Path | None = None, strategy: str = "Zero1", **train: Any) -> RunConfig:
    sizes = {"global_batch_size": 32, "micro_batch_size": 4, "device": "cpu"} | train
    parallel = {"deepspeed_config": str(path) if path else ""}
    return config_from_dict({"strategy": strategy, "train": sizes, "parallel": parallel})


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write_file(tree: Any) -> Path:
        path = tmp_path / "ds_config.json"
        path.write_text(tree if isinstance(tree, str) else json.dumps(tree, indent=1))
        return path

    return write_file


def refusal(config: RunConfig, layout: Layout = LAYOUTS[0]) -> str:
    with pytest.raises(ConfigError) as caught:
        effective_config(config, layout)
    return str(caught.value)


def read_by_deepspeed(tree: dict[str, Any], data_size: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    """DeepSpeed's own reading of a dict, as one of `data_size` data ranks."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # DeepSpeed's imports warn about torch's deprecations
        from deepspeed import comm
        from deepspeed.runtime.config import DeepSpeedConfig
    monkeypatch.setattr(comm, "get_rank", lambda: 0)
    monkeypatch.setattr(comm, "get_world_size", lambda: data_size)
    return DeepSpeedConfig(tree)


def test_a_byte_order_mark_is_not_part_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps({"prescale_gradients": False}), encoding="utf-8-sig")
    assert read_user_config(path) == ({"prescale_gradients": False}, [])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_deepspeed_accepts_what_biokit_makes(layout: Layout, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure(strategy=layout.strategy, precision=precision, clip_grad=0.0)
    made = effective_config(config, layout)
    read = read_by_deepspeed(json.loads(json.dumps(made)), layout.data, monkeypatch)
    assert read.zero_optimization_stage == ZERO_STAGE[layout.strategy]
    assert (read.train_batch_size, read.gradient_accumulation_steps) == (32, 32 // 4 // layout.data)
    assert read.gradient_clipping == 0.0
    assert not read.float16_config.enabled and not read.bfloat16_config.enabled  # weights stay in fp32
    assert not read.zero_config.overlap_comm
    assert (read.pipeline["pipe_partitioned"], read.pipeline.get("use_reentrant")) == (
        (False, False) if layout.strategy in ("Pipeline", "ThreeD") else (True, None)
    )
    offload = read.zero_config.offload_optimizer
    assert (offload is not None and offload.device == "cpu") == (layout.strategy == "ZeroInf")


def test_the_table_of_keys_is_that_of_the_installed_release(monkeypatch: pytest.MonkeyPatch) -> None:
    read_by_deepspeed({"train_batch_size": 1}, 1, monkeypatch)
    from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zenflow.zenflow_config import ZenFlowConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    models = {
        "zero_optimization": DeepSpeedZeroConfig,
        "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
        "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.zenflow": ZenFlowConfig,
        "zero_optimization.leaf_module": DeepSpeedZeroLeafModuleConfig,
        "fp16": DeepSpeedFP16Config,
        "bf16": DeepSpeedBF16Config,
        "tensorboard": TensorBoardConfig,
        "csv_monitor": CSVConfig,
        "wandb": WandbConfig,
        "comet": CometConfig,
    }
    for group, model in models.items():
        fields = set(model.model_fields) | {field.alias for field in model.model_fields.values() if field.alias}
        assert fields <= KNOWN_KEYS[group], (group, fields - KNOWN_KEYS[group])


def test_every_inert_key_is_named_and_none_is_passed_on(write: Any) -> None:
    tree: dict[str, Any] = {}
    for dotted in INERT_KEYS:
        group, _, name = dotted.rpartition(".")
        (tree.setdefault(group, {}) if group else tree)[name] = {}
    path = write(tree)
    left, notes = read_user_config(path)
    assert left == {"zero_optimization": {}, "pipeline": {}}
    assert len(notes) == len(INERT_KEYS)
    assert all(any(f" {key} does nothing here: " in note for note in notes) for key in INERT_KEYS)
    assert effective_config(configure(path), LAYOUTS[0]) == effective_config(configure(), LAYOUTS[0])


def test_the_file_that_molbart_shipped(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(MOLBART)
    config = configure(path, precision="fp16", global_batch_size=1024, micro_batch_size=256)
    made = effective_config(config, Layout("Zero1", data=4))
    assert "optimizer" not in made
    assert "fp16" not in made
    assert made["zero_optimization"]["contiguous_gradients"] is False
    assert (made["steps_per_print"], made["wall_clock_breakdown"]) == (1, True)
    assert read_by_deepspeed(made, 4, monkeypatch).train_batch_size == 1024
    notes = read_user_config(path)[1]
    assert [note.split(": ")[1].split()[0] for note in notes] == ["optimizer", "zero_optimization.cpu_offload", "fp16"]
    assert refusal(config, Layout("Zero1", data=2)) == (
        f"{path}: train_batch_size=1024, but train_micro_batch_size_per_gpu=256 x gradient_accumulation_steps=1 x "
        "2 data ranks = 512. Mend one of them, or leave all three out: biokit fills them in."
    )
    assert "Set train.precision=fp16" in refusal(configure(path, global_batch_size=1024, micro_batch_size=256))


def test_auto_is_filled_in_everywhere(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write({
        "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto", "fp16": {"enabled": "auto", "loss_scale_window": "auto"}, "bf16": None,
        "zero_optimization": {"stage": "auto", "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto",
                              "offload_param": {"device": "auto"}, "sub_group_size": 1e9},
    })  # fmt: skip
    made = effective_config(configure(path), LAYOUTS[0])
    assert '"auto"' not in json.dumps(made)
    assert made["zero_optimization"].pop("sub_group_size") == 1e9
    assert made == effective_config(configure(), LAYOUTS[0])
    read_by_deepspeed(made, 4, monkeypatch)
    assert sum('="auto" takes' in note for note in read_user_config(path)[1]) == 3


@pytest.mark.parametrize(
    ("tree", "train", "message"),
    [
        ({"train_batch_size": 64}, {}, "train_batch_size is 64, and for this run biokit gives 32. "
         "Set train.global_batch_size, or leave train_batch_size out of the file."),
        ({"train_micro_batch_size_per_gpu": 8}, {}, "Set train.micro_batch_size"),
        ({"gradient_accumulation_steps": 4}, {}, "gives 2. Set train.global_batch_size = micro batch x"),
        ({"gradient_clipping": 1.0}, {"clip_grad": 0.0}, "Set train.clip_grad"),
        ({"zero_optimization": {"stage": 2}}, {}, "Set strategy=DDP for stage 0, Zero1"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, {}, 'gives "none". Set strategy=ZeroInf'),
        ({"zero_optimization": {"cpu_offload": True}}, {}, "offload_optimizer.device is"),
        ({"fp16": {"enabled": True}}, {}, "train.precision is fp32. Set train.precision=fp16"),
        ({"fp16": {"enabled": False}}, {"precision": "fp16"}, "Set train.precision=fp32"),
        ({"bf16": {"enabled": True}}, {"precision": "fp16"}, "Set train.precision=bf16"),
        ({"fp16": {"loss_scale_window": 500}}, {"precision": "fp16"}, "gives 1000. Set train.loss_scale_window"),
        ({"zero_allow_untested_optimizer": False}, {}, "biokit gives DeepSpeed its own AdamW"),
        ({"zero_force_ds_cpu_optimizer": True}, {}, "biokit gives DeepSpeed its own AdamW"),
        ({"gradient_allreduce_op": "sum"}, {}, "weighs its losses for a mean"),
        ({"pipeline": {"seed_layers": True}}, {}, "same dropout mask"),
        ({"pipeline": {"stages": 2}}, {}, "Set parallel.pipeline_model_parallel_size"),
        ({"fp16": {"initial_scale_power": 12}}, {"precision": "fp16"}, "gives 16.0. Set train.initial_loss_scale"),
    ],
)  # fmt: skip
def test_contradictions_are_refused_with_the_key_to_set(
    tree: dict[str, Any], train: dict[str, Any], message: str, write: Any
) -> None:
    assert message in refusal(configure(write(tree), **train))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"zero_optimisation": {}}', 'unknown key "zero_optimisation". Did you mean "zero_optimization"?'),
        ('{"zero_optimization": {"stag": 1}}', 'unknown key "zero_optimization.stag". Did you mean "stage"?'),
        ('{"loss_scale_window": 10}', 'unknown key "loss_scale_window". Put it into fp16.'),
        ('{"zero_optimization": {"offload_param": {"devise": "cpu"}}}', 'param.devise". Did you mean "device"?'),
        ('{"zero_optimization": true}', "zero_optimization is true. It is a group of keys: allgather_"),
        ('{"train_batch_size": 8,\n "gradient_clipping": 1.0,,\n}', "line 2, column 27: it is not JSON"),
        ('{"train_batch_size": 8, "train_batch_size": 9}', 'the key "train_batch_size" stands there twice'),
        ("[1]", "it holds a list"),
    ],
)
def test_files_that_cannot_be_used(text: str, message: str, write: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        read_user_config(write(text))
    assert message in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    assert "it cannot be read" in refusal(configure(tmp_path / "none.json"))


def test_what_biokit_decides_is_not_passed_on_twice(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed takes `param_dtype` for the type of its working copy, not of the weights that it keeps."""
    path = write({"data_types": {"param_dtype": "fp32", "grad_accum_dtype": "fp32"}, "fp16": {"enabled": True}})
    made = effective_config(configure(path, precision="fp16"), LAYOUTS[0])
    assert made["data_types"] == {"grad_accum_dtype": "fp32"}
    read_by_deepspeed(made, 4, monkeypatch)


def test_token_budgets_accumulate_nothing_by_deepspeed() -> None:
    config = configure()
    config.data.max_tokens = 4096
    made = effective_config(config, LAYOUTS[0])
    assert (made["train_batch_size"], made["gradient_accumulation_steps"]) == (16, 1)


def test_nvme_offload_names_the_folder(tmp_path: Path) -> None:
    config = configure(strategy="ZeroInf")
    config.parallel.offload_device, config.parallel.offload_dir = "nvme", str(tmp_path)
    group = effective_config(config, LAYOUTS[3])["zero_optimization"]
    place = {"device": "nvme", "pin_memory": False, "nvme_path": str(tmp_path)}
    assert group["offload_param"] == {**place, "buffer_size": 50_000_000}  # the default reserves 2 GB
    assert group["offload_optimizer"] == place
    assert group["offload_optimizer"] is not group["offload_param"]
