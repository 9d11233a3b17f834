"""The process that knows PEFT and not lorank."""

from __future__ import annotations

from pathlib import Path

import pytest

import lorank
from lorank.testing import TINY_LLAMA, PlainPeft, plain_peft
from tests.models import adapted


def test_it_says_why_an_adapter_cannot_be_loaded_and_goes_on(tmp_path: Path) -> None:
    base = TINY_LLAMA.make()
    base.save_pretrained(tmp_path / "base")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter_config.json").write_text("{}")
    batch = TINY_LLAMA.batch(0)
    with pytest.raises(AssertionError, match=r"(?s)cannot load the adapter in .*broken.*Traceback"):
        plain_peft().logits(tmp_path / "base", tmp_path / "broken", batch)
    model = adapted(base)
    lorank.save_adapter(lorank.find_layers(model), tmp_path / "good")
    assert plain_peft().logits(tmp_path / "base", tmp_path / "good", batch)["logits"].shape == (4, 10, 64)


def test_a_process_that_has_ended_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    process = PlainPeft()
    process._process.kill()
    process._process.wait()
    with pytest.raises(AssertionError, match="the process with plain PEFT has ended"):
        process.logits(tmp_path, tmp_path, TINY_LLAMA.batch(0))
    process.close()
