"""Export a checkpoint to `model/`, plain Hugging Face safetensors: on one process, without GPU, whatever the stages.

A run that ends by itself has exported already; this is for one that was stopped. With the settings of the training:

    python deepspeed-pipeline/export.py --config smoke.yaml                        # the newest checkpoint
    python deepspeed-pipeline/export.py checkpoint.resume=runs/x/checkpoints/step-00000100      # any other
"""

from pathlib import Path

import torch
from masters import read_state
from settings import PROJECT, Config

from common import models
from common.checkpoints import Checkpoints
from common.config import parse_config
from common.errors import UserError, run
from common.export import Export
from common.model_card import model_card


def main() -> None:
    cfg = parse_config(Config, __file__)
    output = Path(cfg.output_dir).resolve()
    model = models.empty_model(cfg.model)
    same_model = {"the project": PROJECT, "the model's architecture": models.architecture(model.config)}
    resume = "auto" if cfg.checkpoint.resume == "never" else cfg.checkpoint.resume  # `never` was the training's
    found = Checkpoints(output / "checkpoints", cfg.checkpoint.keep, same_model).find(resume)
    if found is None:
        raise UserError(f"output_dir={cfg.output_dir}: no checkpoint in it; set output_dir or checkpoint.resume")
    step, folder = found
    names = {parameter: name for name, parameter in model.named_parameters()}

    def read(parameter: torch.Tensor) -> torch.Tensor:
        whole = torch.empty(parameter.shape)
        read_state(folder / "state", "masters", names[parameter], whole.view(-1))
        return whole

    export = Export(cfg.model, output / "model", cfg.export.dtype)
    export.write(model, model_card(cfg, {"project": PROJECT, "steps": step}, base_card=export.base_card), read)
    print(f"The model of step {step} is in {output / 'model'}")


if __name__ == "__main__":
    run(main)
