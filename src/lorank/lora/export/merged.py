"""The base model with the adapter merged into its weights: an ordinary model, for every program.

Each adapted module computes a result for a few random inputs before the merge. The written model is loaded again, and
its modules must compute the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import AutoTokenizer

from lorank.errors import AdapterError
from lorank.lora.export.adapter_file import AdapterFile
from lorank.lora.export.base_modules import model_class
from lorank.lora.io.load_adapter import load_adapter

_PROBES = 4


def write_merged(adapter: AdapterFile, folder: Path, config: Any | None, base: str | None) -> float:
    """Writes the whole model, with its tokenizer where the base model has one.

    Args:
        config: the configuration of the base model.
        base: its folder or hub name; None: the one that the adapter names.

    Returns:
        The largest ‖y' − y‖ / ‖y‖ of an adapted module: y before the merge, y' of the written model.

    Raises:
        AdapterError: the base model cannot be loaded, is quantised, or the adapter does not fit it.
    """
    name = str(base or adapter.config.base_model_name_or_path or "")
    if config is None:
        raise AdapterError(
            f"the form 'merged' needs the base model, and {name!r} has no configuration that can be read: give --base "
            "(a folder written by save_pretrained, or a hub name)"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise AdapterError(
            f"the base model {name!r} is quantised: the merged weights would be rounded again, by more than the "
            "adapter changes them. Give the model in full precision: --base"
        )
    make = model_class(adapter, config)
    try:
        model = make.from_pretrained(name, dtype="auto")
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise AdapterError(f"the base model {name!r} cannot be loaded: {reason} Give --base") from error
    adapted: Any = load_adapter(model, adapter.folder)
    wanted = _results(adapted.get_base_model())
    whole = _adapted_parameters(adapted.get_base_model())
    saved = _saved_modules(adapted.get_base_model())
    try:
        merged = adapted.merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError) as error:
        raise AdapterError(f"PEFT cannot merge this adapter: {error}. Serve it with PEFT (--form peft)") from error
    merged.save_pretrained(folder)
    _save_tokenizer(name, folder)
    del adapted, merged, model
    written = make.from_pretrained(folder, dtype="auto").eval()
    found = _results(written, list(wanted))
    differences = [_difference(value, found[key]) for key, value in wanted.items()]
    modules = dict(written.named_modules())
    for (owner, part), value in whole.items():
        differences.append(_difference(value, _sample(getattr(modules[owner], part).detach())))
    for key, values in saved.items():
        own = dict(modules[key].named_parameters())
        differences += [_difference(value, own[part].detach()) for part, value in values.items() if part in own]
    return max(differences)


@torch.no_grad()
def _results(model: nn.Module, names: list[str] | None = None) -> dict[str, Tensor]:
    """What the adapted modules compute for random inputs."""
    modules = dict(model.named_modules())
    if names is None:
        names = [
            name for name, one in modules.items() if isinstance(one, LoraLayer) and not isinstance(one, ParamWrapper)
        ]
    results = {}
    for number, name in enumerate(names):
        module = modules[name]
        plain: Any = module.get_base_layer() if isinstance(module, LoraLayer) else module
        generator = torch.Generator().manual_seed(number)
        results[name] = module(_inputs(plain, generator)).double()
    return results


@torch.no_grad()
def _adapted_parameters(model: nn.Module) -> dict[tuple[str, str], Tensor]:
    """Numbers of the merged parameters that have a LoRA without a module, as those of experts, by module and name."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, ParamWrapper):
            delta = module.get_delta_weight(module.active_adapters[0])
            owner = name.partition(".base_layer")[0]  # several parameters of one module have nested wrappers
            found[owner, module.parameter_name] = _sample(module.get_param().double() + delta.double())
    return found


def _sample(values: Tensor) -> Tensor:
    """At most about 100,000 numbers of a tensor, evenly apart."""
    return values.flatten()[:: 1 + values.numel() // 100_000].clone()


def _inputs(module: nn.Module, generator: torch.Generator) -> Tensor:
    plain: Any = module
    weight: Tensor = module.weight  # type: ignore[assignment]  # a module that has a LoRA has a weight
    if isinstance(module, nn.Embedding):
        return torch.randint(module.num_embeddings, (1, _PROBES), generator=generator)
    if weight.dim() > 2:  # a convolution
        sizes = [int(size) + 2 for size in weight.shape[2:]]
        channels = int(weight.shape[1]) * plain.groups
        return torch.randn(1, channels, *sizes, generator=generator).to(weight.dtype)
    width = int(weight.shape[0] if type(module).__name__ == "Conv1D" else weight.shape[1])
    return torch.randn(_PROBES, width, generator=generator).to(weight.dtype)


def _saved_modules(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """The weights of modules that the adapter saves whole."""
    return {
        name: {
            part: value.detach().clone()
            for part, value in module.modules_to_save[module.active_adapter].named_parameters()
        }
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }


def _difference(before: Tensor, after: Tensor) -> float:
    size = float(before.double().norm())
    return float((after.double() - before.double()).norm()) / size if size else float(after.abs().max() > 0)


def _save_tokenizer(name: str, folder: Path) -> None:
    try:
        AutoTokenizer.from_pretrained(name).save_pretrained(folder)
    except Exception:  # an image model, or a model of one's own: there is no tokenizer to copy
        return
