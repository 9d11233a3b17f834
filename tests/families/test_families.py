"""One family of each kind, with the methods in turn; all of them: python -m tests.families."""

from __future__ import annotations

import pytest

from tests.families.cell import METHODS, TOLERANCE, try_cell
from tests.families.table import FAMILIES, PAGE, on_the_page, row

# Each has something that no other one has: fused projections, Conv1D, a parallel block, a state space, two towers, …
ONE_OF_EACH_KIND = [
    "Llama",
    "Gemma 3",
    "Phi-3",
    "GPT-2",
    "GPT-NeoX",
    "BLOOM",
    "Falcon",
    "OPT",
    "MPT",
    "Mamba",
    "Jamba",
    "T5",
    "BART",
    "Whisper",
    "BERT, pairs",
    "BERT, tokens",
    "BERT, spans",
    "BERT, several labels",
    "BERT, choices",
    "DeBERTa-v2",
    "DistilBERT",
    "ViT",
    "Swin",
    "CLIP",
    "LLaVA",
    "Qwen2-VL",
    "wav2vec2",
    "nn.Module with attention",
    "Sentence-Transformers",
]


@pytest.mark.filterwarnings("ignore")  # of transformers and PEFT about sizes and tokens of tiny models
@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_a_family_trains_moves_ranks_and_reloads_in_plain_peft(name: str) -> None:
    if name == "Sentence-Transformers":
        pytest.importorskip("sentence_transformers")
    method = list(METHODS)[ONE_OF_EACH_KIND.index(name) % len(METHODS)]
    result = try_cell(FAMILIES[name], method)
    assert result.says == on_the_page()[name][method]
    assert result.difference < TOLERANCE


def test_the_page_has_a_row_for_each_family_and_an_answer_in_each_cell() -> None:
    page = on_the_page()
    assert list(page) == list(FAMILIES), "python -m tests.families writes the table anew"
    for name, cells in page.items():
        assert all(cell == "yes" or cell.startswith("refused: ") for cell in cells.values()), name
        assert row(name, cells) in PAGE.read_text(encoding="utf-8")
