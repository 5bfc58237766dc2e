"""What is wrong with a local model folder that a library could not load, in one line."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from common.errors import UserError

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE = ("model.safetensors", "pytorch_model.bin")


def check_model_folder(name: str, with_weights: bool = True) -> None:
    """Raise `UserError` if `name` is a folder without a model, or with some of its weights missing or cut off.

    A name that is not a folder is left to the Hub. `with_weights=False`: only the configuration is needed.
    """
    folder = Path(name)
    if not folder.is_dir():
        if folder.exists():
            raise UserError(f"model.name={name}: is a file; set it to the folder that has the model's config.json")
        return
    where = f"model.name={name}"
    if not (folder / "config.json").is_file():
        raise UserError(_no_config(where, folder))
    if not with_weights:
        return
    found = next((folder / file for file in (*SINGLE, *INDEXES) if (folder / file).is_file()), None)
    if not found:
        raise UserError(f"{where}: the folder {folder.resolve()} has no weights ({', '.join((*SINGLE, INDEXES[0]))})")
    files = [found]
    if found.name in INDEXES:
        try:
            names = json.loads(found.read_text(encoding="utf-8"))["weight_map"].values()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{where}: {found.name} cannot be read: {error}") from None
        files = sorted({folder / name for name in names})
    if missing := [file.name for file in files if not file.is_file()]:
        raise UserError(
            f"{where}: {found.name} names {len(files)} files, and {', '.join(missing[:3])}"
            f"{' ...' if len(missing) > 3 else ''} is not there: download or copy the model again"
        )
    for file in files:
        if file.suffix == ".safetensors":
            _check_whole(where, file)


def _no_config(where: str, folder: Path) -> str:
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        try:
            base = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
        except (OSError, ValueError, KeyError, TypeError):
            base = "its base model"
        return (
            f"{where} is a LoRA adapter, not a model: merge it into {base} (PEFT's merge_and_unload, then "
            f"save_pretrained), or set model.name={base}"
        )
    is_hub_id = not folder.is_absolute() and len(folder.parts) == 2
    hub = "; it hides the model of that name on the Hub: rename the folder, or start elsewhere" if is_hub_id else ""
    return f"{where}: the folder {folder.resolve()} has no config.json, so it holds no model{hub}"


def _check_whole(where: str, file: Path) -> None:
    try:
        with safe_open(file, "pt"):  # compares the file's size with its header
            pass
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{where}: {file.name} is damaged ({error}), as by a download that broke off: download or copy it again"
        ) from None
