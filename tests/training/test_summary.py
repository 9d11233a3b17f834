"""The summary of a run: what it counts, how it names modules, and that every way to it says the same."""

from __future__ import annotations

import json
from typing import Any

import pytest

import lorank
from lorank.training import HistoryError, RankHistory, Record, read_history
from lorank.training.summary import by_projection, projections, short_names, summarise
from tests.models import adapted, tiny_llama, token_batch
from tests.training.loops import adamw

Q, K, V = (f"model.layers.0.self_attn.{letter}_proj" for letter in "qkv")
SHAPES = {Q: (10, 10), K: (10, 5), V: (10, 5)}


def record(step: int, ranks: tuple[int, int, int], **fields: Any) -> Record:
    return Record(step, "ALoRA", dict(zip((Q, K, V), ranks, strict=True)), shapes=SHAPES, **fields)


def history() -> list[Record]:
    budget = {"parameters": {"used": 110, "limit": 140}}
    return [
        record(0, (4, 4, 4), details={"begins": True, "total_steps": 100, "made": {Q: 2, K: 2, V: 2}}),
        record(30, (2, 3, 4), pruned={Q: [0, 1], K: [3]}, seconds=1.5),
        record(40, (2, 3, 4), seconds=0.5),
        record(60, (1, 5, 1), pruned={Q: [0], V: [0, 1, 2]}, added={K: 2}, seconds=1.0, budget=budget),
    ]


def test_eight_lines_say_what_moved_where_to_and_what_it_cost() -> None:
    lines = str(summarise(history())).splitlines()
    assert [line.split("  ")[0].strip() for line in lines] == [
        "ALoRA", "ranks", "parameters", "budget", "gained", "lost", "by projection", "cost",
    ]  # fmt: skip
    assert "moved 9 ranks in 2 allocations, in a run of 100 steps" in lines[0]
    assert "12 → 7 in 3 of 3 modules, the highest 5" in lines[1]
    assert "200 → 110" in lines[2]
    assert "110 of 140 parameters (78.6 % used)" in lines[3]
    assert "k_proj +3 (against rank 2 as made)" in lines[4]  # not against the wide beginning
    assert "q_proj −1, self_attn.v_proj −1" in lines[5]
    assert "q_proj 2 → 1, k_proj 2 → 5, v_proj 2 → 1" in lines[6]
    assert "3.0 s for 3 allocations, 1 s each" in lines[7]


def test_the_numbers_are_json_and_count_what_went_and_came() -> None:
    data = json.loads(json.dumps(dict(summarise(history()).data)))
    assert data["modules"][K] == {"made": 2, "rank": 5, "pruned": 1, "added": 2}
    assert (data["ranks_moved"], data["allocations"], data["seconds"]) == (9, 3, 3.0)


@pytest.mark.parametrize(
    ("unit", "text"),
    [("percent", "0.3 of 0.32 % of base"), ("percent_of_adapter", "0.3 of 0.32 % of adapter")],
)
def test_a_percentage_says_of_what(unit: str, text: str) -> None:
    last = record(60, (1, 1, 1), budget={unit: {"used": 0.3, "limit": 0.32}})
    assert text in str(summarise([record(0, (4, 4, 4)), last]))


def test_the_result_may_be_an_earlier_checkpoint() -> None:
    found = summarise(history(), history()[1])
    assert "the result is an earlier checkpoint" in str(found)
    assert found.data["final"]["ranks"] == 9


def test_a_projection_is_the_last_name_unless_that_has_several_meanings() -> None:
    names = [f"encoder.layer.{i}.{end}" for i in (0, 1) for end in ("attention.output.dense", "output.dense", "query")]
    assert list(dict.fromkeys(projections(names).values())) == ["attention.output.dense", "output.dense", "query"]
    assert projections([Q, K])[Q] == "q_proj"
    assert by_projection({Q: {"by": 1}, Q.replace("0", "1"): {"by": 2}}) == {"q_proj": {"by": 3}}
    assert list(short_names([Q, Q.replace("0", "1")]).values()) == [
        "layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj",
    ]  # fmt: skip


def test_a_history_without_a_record_is_refused() -> None:
    with pytest.raises(HistoryError, match="the run has not begun"):
        summarise([])


def test_a_run_its_file_and_a_notebook_say_the_same(tmp_path: Any) -> None:
    model = adapted(tiny_llama(), random_B=False)
    optimizer = adamw(model)
    ranks = lorank.attach(
        model,
        optimizer,
        lorank.ALoRA(k1=1, k2=1, rounds=2, unit="steps", budget="100% of adapter"),
        validation_batch=token_batch(seed=9),
        total_steps=4,
        history_path=tmp_path / "history.jsonl",
    )
    assert "step 0 of 4, attached; 56 ranks" in repr(ranks)
    for step in range(4):
        model(**token_batch(seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    text = str(ranks.summary())
    assert text == str(summarise(read_history(tmp_path / "history.jsonl")))
    assert "% of adapter" in text
    assert len(text.splitlines()) == 8
    assert ranks._repr_html_().count("<tr>") == 8
    assert ranks.by_module == ranks.layers.ranks
    assert "finished" in repr(ranks)
    assert RankHistory()._records == []
