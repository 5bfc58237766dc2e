"""`model/` in Hugging Face's form: the trained weights, and everything else as the base's folder holds it.

What can fail is tried before the training: `Export` collects every file but the weights, and writes and reads back a
small copy of the model. The weights are then written a part at a time, so that no process holds the whole model for it,
by transformers itself: names, types and tied tensors are those that `save_pretrained` would write.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from common import models
from common.config import ModelConfig
from common.errors import UserError
from common.runtime import DTYPES
from common.small_model import DTYPE_KEY, small_copies, transformers_class

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILE_SIZE = 1_000_000_000  # bytes of a safetensors file, and so of what the main process holds at a time
OURS = ("README.md", "config.json")  # the model card is the trained model's; config.json names the weights' type
LARGEST = 2**28  # bytes of a file that is kept; tokenizers take 2**25 at most
MIB = 2**20


class Export:
    """Writes `folder` for a model trained from `base`: made before the training, used by the main process after it.

    The weights are written in `dtype`: fp32, fp16 or bf16.

    Raises `UserError` if the base's files are unavailable, and if a model of its kind could not be read back.
    """

    def __init__(self, base: ModelConfig, folder: Path, dtype: str = "fp32"):
        self.folder, self._partial = folder, folder.with_name(f".writing-{folder.name}")
        self._dtype = DTYPES[dtype]
        self._shape = models.empty_model(base)  # without weights: names, class and configuration
        source = models.base_folder(base)
        self._files = kept_files(source) if source else made_files(base, self._shape)
        self.base_card = read_card(source) if source else ""
        self._files["config.json"] = config_json(self._shape, source, self._dtype)
        self._rehearse(base)

    def _rehearse(self, base: ModelConfig) -> None:
        """Write a small model with these files, and read all of it back."""
        problem: Exception = ValueError("it cannot be built from its configuration alone")
        for small in small_copies(self._shape):
            try:
                with self._new_folder():
                    settings = small.config.to_json_string(use_diff=False)
                    self._write_files(self._files | {"config.json": settings.encode()})
                    write_weights(small, small, self._partial, dtype=self._dtype, part_size=0)
                    self._write_files({"config.json": self._files["config.json"]})
                    _read_files(base, self._partial)
                return
            except Exception as error:  # of this copy, perhaps, which has fewer layers than the family demands
                if isinstance(error, OSError) and error.errno:  # no right to write, no room
                    raise UserError(f"output_dir={self.folder.parent}: cannot be written: {error.strerror}") from error
                problem = error
        if isinstance(problem, UserError):
            raise problem
        why = (str(problem) or type(problem).__name__).splitlines()[0]
        raise UserError(f"model.name={base.name}: a model of its kind cannot be saved: {why}") from problem

    def write(self, model: PreTrainedModel, card: str, gather: Callable[[Tensor], Tensor]) -> None:
        """Put the trained model in the place of `folder`, which is a whole one or none at any time.

        `model` and `gather` as in `write_weights`; other ranks call `gather_all` meanwhile.
        """
        with self._new_folder():
            self._write_files(self._files | {"README.md": card.encode()})
            write_weights(model, self._shape, self._partial, gather, self._dtype)
            shutil.rmtree(self.folder, ignore_errors=True)
            self._partial.rename(self.folder)

    @contextlib.contextmanager
    def _new_folder(self) -> Iterator[None]:
        shutil.rmtree(self._partial, ignore_errors=True)  # of a start that was killed
        self._partial.mkdir(parents=True)
        try:
            yield
        finally:
            shutil.rmtree(self._partial, ignore_errors=True)

    def _write_files(self, files: dict[str, bytes]) -> None:
        for name, content in files.items():
            (self._partial / name).parent.mkdir(exist_ok=True)
            (self._partial / name).write_bytes(content)


def kept_files(source: Path) -> dict[str, bytes]:
    """What the base's folder holds that training does not change, by name: everything but weights, card and config."""
    paths = [*source.iterdir(), *source.glob("additional_chat_templates/*")]
    names = {str(path.relative_to(source)): path for path in paths if path.is_file()}
    return {name: path.read_bytes() for name, path in sorted(names.items()) if _is_kept(name, path.stat().st_size)}


def read_card(folder: Path) -> str:
    """The model card in `folder`, or nothing."""
    path = folder / "README.md"
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _is_kept(name: str, size: int) -> bool:
    is_weights = name.lower().endswith(models.WEIGHT_ENDINGS) or size > LARGEST
    return not (is_weights or name.startswith(".") or name in OURS)


def _read_files(base: ModelConfig, folder: Path) -> None:
    """Raise `UserError` unless configuration and tokenizer can be read from `folder`."""
    try:
        with _quiet():  # of what it warns, it has warned, or will, where the base's are loaded
            AutoConfig.from_pretrained(folder)
            models.read_tokenizer(ModelConfig(str(folder)))
    except Exception as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"model.name={base.name}: its files besides the weights cannot be read from another folder, so neither "
            f"could the trained model: {why}"
        ) from error


def made_files(base: ModelConfig, shape: PreTrainedModel) -> dict[str, bytes]:
    """The same of a model that comes from no folder: tokenizer and generation settings as transformers writes them."""
    with tempfile.TemporaryDirectory() as folder:
        models.load_tokenizer(base).save_pretrained(folder)
        if shape.generation_config is not None:
            shape.generation_config.save_pretrained(folder)
        return kept_files(Path(folder))


def config_json(shape: PreTrainedModel, source: Path | None, dtype: torch.dtype) -> bytes:
    """The base's config.json with the trained weights' class and type, and otherwise as it was."""
    settings = json.loads((source / "config.json").read_bytes()) if source else {}
    if settings.get("model_type") != shape.config.model_type:  # no folder, or a part of a larger model's configuration
        settings = json.loads(shape.config.to_json_string())
    name = str(dtype).removeprefix("torch.")
    for part in (settings, *(value for value in settings.values() if isinstance(value, dict))):
        for key in ("dtype", "torch_dtype"):
            if key in part:
                part[key] = name
    if "dtype" not in settings:  # as transformers 4 and 5 both read it
        settings["torch_dtype"] = name
    settings["architectures"] = [transformers_class(shape).__name__]
    return (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()


def parts(model: torch.nn.Module, part_size: int) -> Iterator[dict[str, Tensor]]:
    """All tensors of `model` by name, in parts of at most `part_size` bytes in fp32, or of one decoder layer.

    A layer stays in one piece, and so do the names of a tied tensor: published files may have what a layer holds under
    other names, split or joined.
    """
    tensors = model.state_dict(keep_vars=True)
    first_name: dict[int, str] = {}
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        first = first_name.setdefault(id(tensor), name)
        layer = re.match(r"(.*?\.\d+)\.", first)
        groups.setdefault(layer[1] if layer else first, {})[name] = tensor
    part: dict[str, Tensor] = {}
    size = 0
    for group in groups.values():
        more = 4 * sum(tensor.numel() for tensor in {id(t): t for t in group.values()}.values())
        if part and size + more > part_size:
            yield part
            part, size = {}, 0
        part |= group
        size += more
    yield part


def gathered(part: dict[str, Tensor], gather: Callable[[Tensor], Tensor | None]) -> dict[str, Tensor | None]:
    """What `gather` gives for each tensor of `part`, by name; for a tied tensor it is called once."""
    whole = {}
    for tensor in part.values():
        if id(tensor) not in whole:
            whole[id(tensor)] = gather(tensor)
    return {name: whole[id(tensor)] for name, tensor in part.items()}


@torch.no_grad()
def gather_all(model: torch.nn.Module, gather: Callable[[Tensor], Tensor]) -> None:
    """What the other ranks do while the main process writes: `gather` may be a collective."""

    def drop(tensor: Tensor) -> None:
        gather(tensor)

    for part in parts(model, FILE_SIZE):
        gathered(part, drop)


@torch.no_grad()
def write_weights(
    model: torch.nn.Module,
    shape: PreTrainedModel,
    folder: Path,
    gather: Callable[[Tensor], Tensor] = Tensor.detach,
    dtype: torch.dtype = torch.float32,
    part_size: int | None = None,
) -> None:
    """Write `model`'s weights as `dtype` to `folder`, in safetensors files of FILE_SIZE or one layer; read them back.

    `shape` is the same model before it was wrapped or sharded, and may be empty. `gather` gives the whole of a sharded
    tensor, in fp32; it is called once for each, in the same order on every rank. `folder` holds a config.json.
    Raises `UserError` if transformers would read another model from `folder`, and if a weight is too large for fp16.
    """

    def rounded(tensor: Tensor) -> Tensor:
        result = tensor.to(dtype) if tensor.is_floating_point() else tensor
        if dtype == torch.float16 and result.isinf().any():
            too_large.append(result)
        return result

    too_large: list[Tensor] = []
    files: list[Path] = []
    checksums: dict[str, int] = {}
    for part in parts(model, FILE_SIZE if part_size is None else part_size):
        whole = gathered(part, lambda tensor: rounded(gather(tensor)).cpu().contiguous())
        checksums |= {name: _checksum(tensor) for name, tensor in whole.items()}
        files.append(_save_part(shape, whole, folder, len(files)))
        del whole
    if too_large:  # said here only: other ranks take part in all of `gather`
        raise UserError("export.dtype=fp16: a weight is beyond 65,504, fp16's largest number: set it to bf16 or fp32")
    _name_files(files, folder)
    _read_back(shape, folder, checksums, dtype)


def _save_part(shape: PreTrainedModel, tensors: dict[str, Tensor], folder: Path, number: int) -> Path:
    from transformers import modeling_utils  # here: only a rank with a model needs it, and it takes a second

    place = folder / f"part-{number}"
    generation, shape.generation_config = shape.generation_config, GenerationConfig()  # the base's may not be valid
    # transformers lets accelerate unwrap the model, which `shape` does not need. It would import DeepSpeed, if that is
    # installed, which takes seconds and warns about a missing GPU.
    unwrap, modeling_utils.unwrap_model = modeling_utils.unwrap_model, lambda model, **options: model
    try:
        with _quiet():
            shape.save_pretrained(place, state_dict=tensors, max_shard_size="100TB")
    finally:
        shape.generation_config, modeling_utils.unwrap_model = generation, unwrap
    path = folder / f"{number}.safetensors"
    (place / SAFE_WEIGHTS_NAME).rename(path)
    shutil.rmtree(place)
    shutil.copymode(folder / "config.json", path)  # safetensors makes it the owner's only
    return path


def _name_files(files: list[Path], folder: Path) -> None:
    """Give the files their final names, and write the index if there are several."""
    if len(files) == 1:
        files[0].rename(folder / SAFE_WEIGHTS_NAME)
        return
    weight_map, total = {}, 0
    for number, path in enumerate(files, 1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        path = path.rename(folder / name)
        with safe_open(path, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118
                weight_map[key] = name
        total += path.stat().st_size - 8 - int.from_bytes(path.open("rb").read(8), "little")  # without its header
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _read_back(shape: PreTrainedModel, folder: Path, checksums: dict[str, int], dtype: torch.dtype) -> None:
    """Raise `UserError` unless transformers reads from `folder` the class and the tensors that were written."""
    name = transformers_class(shape).__name__
    try:
        with _quiet():
            model, report = AutoModelForCausalLM.from_pretrained(
                folder, output_loading_info=True, **{DTYPE_KEY: torch.float32}
            )
        problem = models.load_problem(report)
        if not problem and type(model).__name__ != name:
            problem = f"it is a {type(model).__name__}"
        if not problem:
            tensors = {k: t.to(dtype) if t.is_floating_point() else t for k, t in model.state_dict().items()}
            wrong = [key for key, value in checksums.items() if _checksum(tensors[key]) != value]
            problem = f"other values: {', '.join(wrong[:3])}" if wrong else None
    except Exception as error:
        problem = (str(error) or type(error).__name__).splitlines()[0]
    if problem:
        raise UserError(
            f"transformers {transformers.__version__} does not read back the {name} that it has written ({problem}): "
            f"nothing was exported; install another version of transformers, or choose another model"
        )


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and reports."""
    logging = transformers.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def check_export(base: ModelConfig, folder: Path, dtype: str) -> None:
    """Raise `UserError` as `Export` does."""
    Export(base, folder, dtype)


def check_space(folder: Path, parameters: int, checkpoints: Path, left_to_train: bool) -> None:
    """Raise `UserError` if `folder`'s disk has no room for the next checkpoint and for `model/`.

    A checkpoint holds master weights and both moments of AdamW in fp32; the one before it goes after it is complete.
    """
    checkpoint, model = 12 * parameters, 4 * parameters
    earlier = max((_size(path) for path in checkpoints.glob("step-*")), default=0)
    needed = max(checkpoint, checkpoint + model - earlier) if left_to_train else model
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"output_dir={folder}: {free / MIB:,.0f} MiB are free, and a checkpoint and model/ take "
            f"{needed / MIB:,.0f} MiB: make room, or set output_dir to a larger disk"
        )


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
