"""The card of a saved adapter says what is in it, and what a user writes into a README stays."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from lorank.lora import AdapterLayers, LayerPlan, find_layers, resize_, save_adapter
from lorank.lora.io import adapter_folder
from lorank.lora.io.model_card import BEGIN, END, README
from tests.models import adapted, tiny_llama

QUANTISED = (
    "## Training procedure\n\nThe following `bitsandbytes` quantization config was used during training:\n"
    "- quant_method: QuantizationMethod.BITS_AND_BYTES\n- load_in_4bit: True\n- bnb_4bit_compute_dtype: float32"
)


@pytest.fixture
def layers() -> AdapterLayers:
    found = find_layers(adapted(tiny_llama(2), r=4, target_modules=["q_proj", "down_proj"]))
    names = list(found)
    resize_(found, {names[0]: LayerPlan((0,)), names[1]: LayerPlan(())})
    return found


def readme(folder: Path) -> str:
    return (folder / README).read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore:Could not find a config file in owner/base-model")
def test_a_card_names_the_run_and_the_ranks(
    layers: AdapterLayers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # PEFT would look for the model's vocabulary there
    layers.config.base_model_name_or_path = "owner/base-model"
    save_adapter(layers, tmp_path / "out", {"Method": "ALoRA(k1=2)", "Data": "a|b\nc"})
    text, card = readme(tmp_path / "out"), ModelCard.load(tmp_path / "out" / README)
    assert "| Base model | owner/base-model |" in text
    assert "| Method | ALoRA(k1=2) |" in text
    assert "| Data | a\\|b c |" in text
    ranks = layers.ranks
    alive = [rank for rank in ranks.values() if rank]
    assert f"| Modules | {len(alive)} with a LoRA; 1 at rank 0, not in the file |" in text
    assert f"| Ranks | {sum(alive)} in all; 1 / 4 / 4 (smallest / median / largest) |" in text
    queries = [rank for name, rank in ranks.items() if name.endswith("q_proj")]
    assert f"| self_attn.q_proj | {len(queries)} |" in text
    assert "[More Information Needed]" not in text
    assert card.data.library_name == "peft"
    assert "lorank" in card.data.tags


@pytest.mark.parametrize("exchange", [True, False])
def test_a_later_save_writes_only_its_own_lines_anew(
    layers: AdapterLayers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(adapter_folder, "swap_names", lambda *_: False)
    folder = tmp_path / "out"
    save_adapter(layers, folder, {"Data": "the first"})
    body = readme(folder).split("---\n", 2)[2]
    (folder / README).write_text(f"---\nlicense: mit\n---\nmine\n{body}\nmine too\n")
    (folder / README).chmod(0o640)
    name = next(iter(layers))
    resize_(layers, {name: LayerPlan((0,), 2)})
    save_adapter(layers, folder, {"Data": "the second"})
    text = readme(folder)
    assert text.startswith("---\nlicense: mit\n---\nmine\n")
    assert text.endswith("mine too\n")
    assert "the second" in text
    assert "the first" not in text
    assert text.count(BEGIN) == text.count(END) == 1
    assert f"| {sum(layers.ranks.values())} in all" in text
    assert (folder / README).stat().st_mode & 0o777 == 0o640
    assert not [path for path in folder.iterdir() if path.suffix in (".part", ".old")]


@pytest.mark.parametrize("theirs", ["my own words", f"{BEGIN} without an end", b"\xff\xfe not text"])
@pytest.mark.parametrize("shared", [True, False])
def test_a_readme_of_others_stays_byte_for_byte(
    layers: AdapterLayers, tmp_path: Path, theirs: str | bytes, shared: bool
) -> None:
    folder = tmp_path / "out"
    save_adapter(layers, folder)
    written = theirs.encode() if isinstance(theirs, str) else theirs
    (folder / README).write_bytes(written)
    if shared:
        (folder / "notes.txt").write_text("theirs")
    before = (folder / README).stat()
    save_adapter(layers, folder)
    assert (folder / README).read_bytes() == written
    assert (folder / README).stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize("tail", ["", f"\n{QUANTISED}"])
def test_the_unfilled_form_of_peft_is_replaced_and_a_filled_one_stays(
    layers: AdapterLayers, tmp_path: Path, tail: str
) -> None:
    folder = tmp_path / "out"
    layers.model.save_pretrained(str(folder))
    (folder / README).write_text(readme(folder) + tail)
    (folder / "notes.txt").write_text("theirs")
    form = readme(folder)
    assert "[More Information Needed]" in form
    save_adapter(layers, folder)
    assert BEGIN in readme(folder)
    filled = form.replace("[More Information Needed]", "my team", 1)
    (folder / README).write_text(filled)
    save_adapter(layers, folder)
    assert readme(folder) == filled


def test_peft_keeps_the_card_and_what_it_says_of_quantisation_stays(layers: AdapterLayers, tmp_path: Path) -> None:
    from lorank.lora import write_card

    folder = tmp_path / "checkpoint"
    layers.model.save_pretrained(str(folder))
    (folder / README).write_text(f"{readme(folder)}\n{QUANTISED}\n")
    write_card(folder, layers)
    assert QUANTISED in readme(folder)
    layers.model.save_pretrained(str(folder))  # PEFT writes its part into a card that is there
    assert BEGIN in readme(folder)
    assert readme(folder).count("- PEFT ") == 1
