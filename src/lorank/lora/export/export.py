"""Writing a trained adapter in the form that a program reads, and checking what was written."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from lorank.errors import AdapterError
from lorank.lora.export.adapter_file import AdapterFile, read_adapter_file, stored_dtype
from lorank.lora.export.base_modules import base_config, base_modules
from lorank.lora.export.comparison import Factors, largest_difference
from lorank.lora.export.destination import check_out, replacing_folder, write_record
from lorank.lora.export.diffusion import component_of, read_comfyui, read_diffusers, write_comfyui, write_diffusers
from lorank.lora.export.gguf_file import FILE as GGUF
from lorank.lora.export.gguf_file import gguf_dtype, read_gguf, write_gguf
from lorank.lora.export.merged import write_merged
from lorank.lora.export.mlx import read_mlx, write_mlx
from lorank.lora.export.peft_forms import PeftForm, peft_form, tight_form, uniform_form
from lorank.lora.find_layers import find_layers
from lorank.lora.io.adapter_folder import readable_folder, replacing_adapter
from lorank.lora.io.adapter_validation import WEIGHTS
from lorank.lora.io.load_adapter import read_adapter_config
from lorank.lora.io.model_card import write_card
from lorank.lora.io.save_adapter import check_save_directory, save_adapter
from lorank.lora.io.standalone import open_standalone

FORMS: Mapping[str, str] = {
    "peft": "as lorank saves it: rank_pattern and alpha_pattern. For PEFT, and for training on",
    "tight": "rank_pattern only, lora_alpha = 1, the factor in B. For PEFT, new vLLM, TensorRT-LLM",
    "uniform": "one rank, no patterns, zeros. For SGLang, old and new vLLM, TGI, LoRAX",
    "merged": "the whole model. For everything, and for DoRA",
    "diffusers": "keys of diffusers, for image models",
    "comfyui": "keys of kohya's scripts with .alpha, for ComfyUI and others",
    "gguf": "for llama.cpp and what is built on it",
    "mlx": "for MLX-LM",
}
"""The forms, and what each is for."""
PEFT_FORMS = ("peft", "tight", "uniform")
DTYPES = ("float32", "float16", "bfloat16")
_TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float64: 1e-12}
"""The largest ‖ΔW' − ΔW‖ / ‖ΔW‖ that rounding explains; of merged modules, of their outputs."""


@dataclass(frozen=True)
class Exported:
    """A written form of an adapter. All figures are of the written files, read again.

    Attributes:
        folder: where it is.
        form: its form.
        files: the names of its files.
        bytes: their size.
        dtype: the dtype of its weights.
        ranks: per module with a LoRA, (rank in the original, rank in the written form); empty for ``merged``. A rank 0
            in the original is a module that was filled with zeros.
        difference: the largest ‖ΔW' − ΔW‖ / ‖ΔW‖ of any module, in float64; for ``merged``, the largest ‖y' − y‖ / ‖y‖
            of an adapted module's output.
        notes: what the user should know.
    """

    folder: Path
    form: str
    files: tuple[str, ...]
    bytes: int
    dtype: str
    ranks: Mapping[str, tuple[int, int]]
    difference: float
    notes: tuple[str, ...]


def export_adapter(
    adapter: str | Path | nn.Module,
    out: str | Path,
    form: str = "tight",
    *,
    base: str | Path | None = None,
    rank: int | None = None,
    dtype: str | None = None,
    component: str | None = None,
    overwrite: bool = False,
) -> Exported:
    """Writes an adapter in the form that a program reads, and checks what was written (docs/serving.md).

        lorank.export_adapter("runs/mine/adapter", "for_llama", form="gguf")

    Args:
        adapter: the folder of any plain PEFT LoRA adapter; or a live model with one. It is not changed.
        out: the folder for the written form. It must be new or empty, unless ``overwrite`` is set.
        form: a key of :data:`FORMS`.
        base: the folder or hub name of the base model, for ``merged``, ``gguf``, ``uniform`` and ``mlx``; None: the one
            that the adapter names. All but ``merged`` read its configuration only.
        rank: for ``uniform`` and ``mlx``, the rank of all modules; None: the smallest possible one.
        dtype: float32, float16 or bfloat16; None: the adapter's own, or float32 where a factor would round B.
        component: for ``diffusers`` and ``comfyui``, the part of the pipeline; None: by the modules' names.
        overwrite: replace an earlier export in ``out``. Other files there are never touched.

    Returns:
        What was written, with the largest difference of any module's update from the original one.

    Raises:
        AdapterError: the adapter cannot be read; the form cannot hold it (the message names one that can); ``out`` is
            not empty; or the written update differs from the original.
        MissingPackageError: ``gguf`` needs the package of that name.
        WriteError: no space, no permission.
    """
    check_form(form, rank, dtype, component)
    if isinstance(adapter, nn.Module):
        with tempfile.TemporaryDirectory() as temporary:
            saved = save_adapter(find_layers(adapter), Path(temporary) / "adapter")
            return export_adapter(
                saved, out, form, base=base, rank=rank, dtype=dtype, component=component, overwrite=overwrite
            )
    target = Path(out)
    check_out(target, Path(adapter), overwrite=overwrite, is_adapter=form in PEFT_FORMS)
    number = None if dtype is None else getattr(torch, dtype)
    name = None if base is None else str(base)
    if form == "merged":
        return _export_merged(Path(adapter), target, name)
    read = read_adapter_file(adapter)
    if form in PEFT_FORMS:
        return _export_peft(read, target, form, number, rank, name)
    return _export_other(read, target, form, number, rank, name, component)


def check_form(form: str, rank: int | None, dtype: str | None, component: str | None) -> None:
    """Raises AdapterError for a form that there is not, or an option that the form does not have."""
    if form not in FORMS:
        raise AdapterError(f"form {form!r}: expected one of {', '.join(FORMS)}")
    if dtype is not None and dtype not in DTYPES:
        raise AdapterError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    if dtype is not None and form == "merged":
        raise AdapterError("a merged model keeps the dtype of the base model: leave dtype out")
    if rank is not None and form not in ("uniform", "mlx"):
        raise AdapterError(f"rank={rank} is for the forms 'uniform' and 'mlx'. To change ranks: lorank resize")
    if rank is not None and rank < 1:
        raise AdapterError(f"rank={rank}: expected at least 1")
    if component is not None and form not in ("diffusers", "comfyui"):
        raise AdapterError(f"component {component!r} is for the forms 'diffusers' and 'comfyui'")


def make_form(
    adapter: AdapterFile, form: str, dtype: torch.dtype | None = None, rank: int | None = None, base: str | None = None
) -> PeftForm:
    """One of the three forms that PEFT reads, in memory."""
    if form == "peft":
        return peft_form(adapter, dtype)
    if form == "tight":
        return tight_form(adapter, dtype)
    config = base_config(adapter, base, download=base is not None)
    return uniform_form(adapter, dtype, rank=rank, base=base_modules(adapter, config))


def write_form(form: PeftForm, folder: Path) -> None:
    """Writes the settings and the weights into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(form.tensors), folder / WEIGHTS, metadata={"format": "pt"})
    form.config.save_pretrained(str(folder))


def _export_peft(
    adapter: AdapterFile, target: Path, form: str, dtype: torch.dtype | None, rank: int | None, base: str | None
) -> Exported:
    check_save_directory(target)
    made = make_form(adapter, form, dtype, rank, base)
    with replacing_adapter(target) as temporary:
        write_form(made, temporary)
        written = read_adapter_file(temporary)
        # what PEFT itself makes of the files; it cannot be asked about convolutions without their base model
        if not any(one.is_convolution for one in written.updates.values()):
            loaded = open_standalone(temporary)
            for name, layer in loaded.layers.items():
                if abs(layer.scaling - written.updates[name].scaling) > 1e-12 * abs(layer.scaling):
                    raise AdapterError(f"PEFT reads another factor for {name} than was written: please report this")
            about = {"Form": f"{form}: {FORMS[form]}"}
            write_card(temporary, loaded.layers, about, base=adapter.config.base_model_name_or_path)
        stored = stored_dtype(written)
        difference = largest_difference(_factors(adapter), _factors(written))
        _check_difference(difference, stored)
    return _exported(target, form, stored, adapter, written.ranks, difference, made.notes)


def _export_other(
    adapter: AdapterFile,
    target: Path,
    form: str,
    dtype: torch.dtype | None,
    rank: int | None,
    base: str | None,
    component: str | None,
) -> Exported:
    ranks = adapter.ranks
    with replacing_folder(target) as folder:
        if form in ("diffusers", "comfyui"):
            part = component_of(adapter, component)
            write, read = (write_diffusers, read_diffusers) if form == "diffusers" else (write_comfyui, read_comfyui)
            notes = write(adapter, folder, part, dtype)
            found = read(adapter, folder, part)
        else:
            config = base_config(adapter, base, download=form == "gguf" or base is not None)
            if form == "gguf":
                notes = write_gguf(adapter, folder, config, dtype)
                found = read_gguf(adapter, folder, config)
            else:
                notes = write_mlx(adapter, folder, config, dtype, rank)
                found = read_mlx(folder)
                ranks = {name: len(A) for name, (_, A) in found.items()}
        stored = _written_dtype(folder)
        difference = largest_difference(_factors(adapter), found)
        _check_difference(difference, stored)
        write_record(folder, form, str(adapter.folder), difference)
    return _exported(target, form, stored, adapter, ranks, difference, notes)


def _export_merged(adapter: Path, target: Path, base: str | None) -> Exported:
    folder = readable_folder(adapter)
    settings = read_adapter_config(
        folder
    )  # nothing else is read here, so that DoRA, experts and others are merged, too
    read = AdapterFile(folder, LoraConfig.from_pretrained(str(folder)), settings, {}, {}, ())
    with replacing_folder(target) as temporary:
        difference = write_merged(read, temporary, base_config(read, base), base)
        stored = _written_dtype(temporary)
        _check_difference(difference, stored)
        write_record(temporary, "merged", str(adapter), difference)
    return _exported(target, "merged", stored, read, {}, difference, ())


def _exported(
    folder: Path,
    form: str,
    dtype: torch.dtype,
    adapter: AdapterFile,
    ranks: Mapping[str, int],
    difference: float,
    notes: tuple[str, ...],
) -> Exported:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return Exported(
        folder=folder,
        form=form,
        files=tuple(path.name for path in files),
        bytes=sum(path.stat().st_size for path in files),
        dtype=str(dtype).removeprefix("torch."),
        ranks={name: (adapter.ranks.get(name, 0), rank) for name, rank in ranks.items()},
        difference=difference,
        notes=notes,
    )


def _factors(adapter: AdapterFile) -> dict[str, Factors]:
    return {name: one.factors for name, one in adapter.updates.items()}


def _check_difference(difference: float, dtype: torch.dtype) -> None:
    """Raises AdapterError if what was written is not the original up to rounding. Nothing is left of it then."""
    if not difference <= _TOLERANCE[dtype]:
        raise AdapterError(
            f"what was written differs from the original by {difference:.1e} of a module's update, and rounding to "
            f"{str(dtype).removeprefix('torch.')} explains {_TOLERANCE[dtype]:.0e}. Nothing was kept; please report it"
        )


def _written_dtype(folder: Path) -> torch.dtype:
    """The coarsest dtype of floating-point weights in safetensors files; float32 for the other forms' files."""
    names = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
    found = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {names.get(file.get_slice(key).get_dtype()) for key in file.keys()}  # noqa: SIM118  # not a dict
    if not found and (folder / GGUF).is_file():
        return gguf_dtype(folder)
    present = [dtype for dtype in found if dtype is not None]
    return max(present, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)
