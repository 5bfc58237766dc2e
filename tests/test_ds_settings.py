"""What the three DeepSpeed projects share: the loss scaler in a checkpoint, and what their JSON may hold."""

import json
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from conftest import refused
from launching import project_modules

from common.ds_settings import restore_scaler, scaler_state, without_mlflow

PROJECTS = {  # with what their JSON must hold
    "deepspeed-offload": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "deepspeed-pipeline": {"stage": 1},
    "ray-train": {"stage": 3},
}


def scaler_of(dtype: torch.dtype):
    """DeepSpeed's own, as its optimizers make it."""
    with without_mlflow():  # here: each worker of the tests imports this file
        from deepspeed.runtime.fp16.loss_scaler import CreateLossScaler
    dynamic = {"init_scale": 2.0**16, "scale_window": 2, "min_scale": 1, "delayed_shift": 2}
    return CreateLossScaler(dtype, 0, True, dynamic | {"consecutive_hysteresis": False})


def test_the_loss_scaler_goes_on_as_it_was(monkeypatch):
    monkeypatch.setattr("deepspeed.comm.get_rank", lambda: 0)
    saved, loaded = scaler_of(torch.float16), scaler_of(torch.float16)
    for overflow in (True, True, False, False, False, False, True):
        saved.update_scale(overflow)
    changed = {name for name, value in vars(saved).items() if value != vars(loaded)[name]}
    assert changed == scaler_state(saved).keys() - {"cur_scale"}  # which was halved, and doubled again
    restore_scaler(loaded, scaler_state(saved))
    assert vars(loaded) == vars(saved)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_between_precisions_no_loss_scale_is_carried_over(dtype):
    assert scaler_state(scaler_of(dtype)) == {}
    for state in ({}, {"cur_scale": 1.0}):  # the latter is in earlier checkpoints
        begun = scaler_of(torch.float16)
        restore_scaler(begun, state)
        assert vars(begun) == vars(scaler_of(torch.float16)) and begun.loss_scale == 2.0**16
    left = scaler_of(dtype)
    restore_scaler(left, scaler_state(scaler_of(torch.float16)))
    assert vars(left) == vars(scaler_of(dtype)) and left.loss_scale == 1


@pytest.mark.parametrize("project", PROJECTS)
def test_a_checkpoint_of_another_precision_leaves_the_loss_scaling_on(tmp_path, monkeypatch, project):
    torch.save({"ranks": 1, "steps": 0, "scaler": {"cur_scale": 1.0}}, tmp_path / "training.pt")
    zero = MagicMock(single_partition_of_fp32_groups=[], loss_scaler=scaler_of(torch.float16))
    with project_modules(project, "train") as modules:
        train = modules["train"]
        monkeypatch.setattr(train.dist, "get_rank", lambda: 0)
        for reads_weights in ("load_state", "load_parts"):
            monkeypatch.setattr(train, reads_weights, lambda *_: [], raising=False)
        model = [MagicMock()] if project == "deepspeed-pipeline" else []
        train.load_checkpoint(tmp_path, SimpleNamespace(optimizer=zero, module=MagicMock()), *model)
    assert zero.loss_scaler.loss_scale == 2.0**16


REFUSED = {
    "type of messages": ({"communication_data_type": "banana"}, ['communication_data_type is "banana"', "bf16, fp32"]),
    "no bucket": ({"zero_optimization": {"reduce_bucket_size": 0}}, ["reduce_bucket_size is 0", "1 or more"]),
    "no window": ({"fp16": {"loss_scale_window": 0}}, ["fp16.loss_scale_window is 0", "1 or more"]),
    "no hysteresis": ({"fp16": {"hysteresis": 0}}, ["fp16.hysteresis is 0", "1 or more"]),
    "memory": ({"memory_breakdown": True}, ["memory_breakdown", "metrics.jsonl"]),
}


@pytest.mark.parametrize("project", PROJECTS)
def test_what_deepspeed_would_fail_with_is_refused(tmp_path, project):
    needed = {"zero_optimization": PROJECTS[project]}
    with project_modules(project, "ds_settings") as modules:

        def read(settings: dict) -> dict:
            (tmp_path / "ds.json").write_text(json.dumps(settings))
            return modules["ds_settings"].read_ds_config("ds.json", tmp_path)

        for settings, words in REFUSED.values():
            with refused("ds.json", *words):
                read(needed | settings)
        for dtype in ("fp16", "bf16", "fp32"):
            accepted = needed | {"communication_data_type": dtype, "fp16": {"min_loss_scale": 0}}
            assert read(accepted) == accepted
