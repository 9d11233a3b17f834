"""The model card of an adapter, ``README.md``: what it adapts, by which method, and the ranks of its modules.

A card is lorank's between two marks. Text outside them belongs to the user and stays, as does every README without
marks. PEFT's own card, which is an unfilled form, is replaced as long as nobody has filled it in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median

from huggingface_hub import ModelCard, ModelCardData

from lorank._version import __version__
from lorank.files import read_bounded, write_text
from lorank.lora.layer import AdapterLayers

README = "README.md"
BEGIN = "<!-- lorank: each save writes these lines anew. Your own text stays if it is above or below them. -->"
END = "<!-- lorank: end -->"
_SECTION = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
_FRONT_MATTER = re.compile(r"\A---\n.*?^---\s*\n", re.DOTALL | re.MULTILINE)
_OF_PEFT = re.compile(
    r"\s*(### Framework versions|- PEFT \S+|## Training procedure|The following `\w+` quantization config was used.*"
    r"|- (quant_method|_?load_in_\w+|llm_int8_\w+|bnb_4bit_\w+): .*)?\s*"
)
"""The lines that PEFT itself adds to its form."""
_MAX_README = 10_000_000
_MAX_ROWS = 30


def write_card(
    folder: Path, layers: AdapterLayers, about: Mapping[str, str] | None = None, base: str | None = None
) -> None:
    """Writes the card of the adapter in ``folder``, or the part of its ``README.md`` that is lorank's.

    A README that somebody else wrote stays as it is.

    Args:
        about: further lines of the card's first table, label → text: method, budget, data.
        base: the name of the base model; None: the one in the layers' settings.

    Raises:
        WriteError: no space, no permission.
    """
    path = folder / README
    name = base or layers.config.base_model_name_or_path or ""
    text = merged_card(path, _card(path, layers, str(name), about or {}))
    if text is not None:
        write_text(path, text)


def merged_card(path: Path, card: str) -> str | None:
    """The text for a README beside a new adapter; None if the file that is there must stay as it is.

    Args:
        path: the README that is there, or is not.
        card: the new adapter's card.
    """
    if not path.is_file():
        return None if path.is_symlink() or path.exists() else card
    try:
        text = read_bounded(path, _MAX_README)
    except (OSError, ValueError):
        return None
    section = _SECTION.search(card)
    if section is not None and _SECTION.search(text):
        return _SECTION.sub(lambda _: section[0], text, count=1)
    rest = _after_empty_form(text)
    return card if rest is not None and all(_OF_PEFT.fullmatch(line) for line in rest.splitlines()) else None


def _card(path: Path, layers: AdapterLayers, base: str, about: Mapping[str, str]) -> str:
    """The whole card, with the metadata and the remarks about quantisation of the card that PEFT has written."""
    card, rest = None, ""
    try:
        if _after_empty_form(read_bounded(path, _MAX_README)) is not None:
            card = ModelCard.load(path)
            rest = (_after_empty_form(card.text) or "").strip()
    except (OSError, ValueError):
        pass
    if card is None:
        data = ModelCardData(base_model=base or None, library_name="peft", tags=["lora"])
        card = ModelCard(f"---\n{data.to_yaml()}\n---\n")
    card.data["tags"] = sorted({*(card.data.get("tags") or ()), "lorank"})
    card.text = "\n\n".join(["", _section(layers, base, about), rest or f"### Framework versions\n\n- PEFT {_peft()}"])
    return f"{card}\n"


def _section(layers: AdapterLayers, base: str, about: Mapping[str, str]) -> str:
    ranks = layers.ranks
    live = {name: rank for name, rank in ranks.items() if rank}
    absent = len(ranks) - len(live)
    local = Path(base).is_absolute()  # the path says nothing to others, and may name its owner
    facts = {
        "Base model": f"{Path(base).name} (a local folder)" if local else base or "not named in the adapter's settings",
        **about,
        "Modules": f"{len(live)} with a LoRA" + (f"; {absent} at rank 0, not in the file" * bool(absent)),
        "Ranks": f"{sum(ranks.values())} in all; {_spread(list(live.values()))} (smallest / median / largest)",
        "Parameters in A and B": f"{_parameters(layers, ranks):,}",
        "Written by": f"lorank {__version__}, PEFT {_peft()}",
    }
    lines = [
        BEGIN,
        f"# LoRA adapter of {_cell(facts['Base model'])}",
        f"A plain PEFT adapter: `PeftModel.from_pretrained` loads it, without lorank. {_ranks_stated(layers)}",
        "\n".join(["| | |", "|---|---|", *(f"| {_cell(name)} | {_cell(text)} |" for name, text in facts.items())]),
        "## Ranks by projection",
        _table(layers, ranks),
        END,
    ]
    return "\n\n".join(lines)


def _ranks_stated(layers: AdapterLayers) -> str:
    config = layers.config
    patterns = [name for name in ("rank_pattern", "alpha_pattern") if getattr(config, name)]
    if not patterns:
        return "All modules have one rank."
    return (
        f"Each module has a rank of its own (`{'` and `'.join(patterns)}` in `adapter_config.json`). "
        "Programs other than PEFT read these settings in different ways, some wrongly: `lorank export --check` says "
        "where this adapter loads, and `lorank export` writes the form that a program needs."
    )


def _table(layers: AdapterLayers, ranks: Mapping[str, int]) -> str:
    kinds = _kinds(list(ranks))
    rows = ["| projection | modules | smallest / median / largest | ranks | parameters |", "|---|---|---|---|---|"]
    for kind, names in list(kinds.items())[:_MAX_ROWS]:
        own = {name: ranks[name] for name in names}
        total, parameters = sum(own.values()), _parameters(layers, own)
        rows.append(f"| {kind} | {len(names)} | {_spread(list(own.values()))} | {total} | {parameters:,} |")
    if len(kinds) > _MAX_ROWS:
        rows.append(f"| and {len(kinds) - _MAX_ROWS} more | | | | |")
    return "\n".join(rows)


def _kinds(names: Sequence[str]) -> dict[str, list[str]]:
    """The modules of each projection: equal names but for numbers. What all names begin with is left out."""
    parts = [["*" if part.isdigit() else part for part in name.split(".")] for name in names]
    shared = 0
    while all(len(own) > shared + 1 for own in parts) and len({own[shared] for own in parts}) == 1:
        shared += 1
    kinds: dict[str, list[str]] = {}
    for name, own in zip(names, parts, strict=True):
        kinds.setdefault(".".join(own[shared:]), []).append(name)
    return kinds


def _parameters(layers: AdapterLayers, ranks: Mapping[str, int]) -> int:
    return sum(rank * (layers[name].d_in + layers[name].d_out) for name, rank in ranks.items())


def _spread(ranks: list[int]) -> str:
    return f"{min(ranks)} / {median(ranks):g} / {max(ranks)}" if ranks else "none"


def _after_empty_form(text: str) -> str | None:
    """What follows PEFT's unfilled form in a card; None if the card is something else."""
    form = ModelCard.from_template(ModelCardData()).text.strip()
    body = _FRONT_MATTER.sub("", text, count=1).strip()
    return body[len(form) :] if body.startswith(form) else None


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _peft() -> str:
    return version("peft")
