"""References: resolved with their kind, by name only, all mistakes told at once, and bounded before anything grows."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lorank.config import ConfigError, load_config, make_config, to_yaml
from lorank.config.references import MAX_CHAIN, escape_references, resolve_references, wrong_references
from lorank.config.yaml_files import apply_overrides, dump_yaml, parse_yaml

RECIPE = r"""
model: {name: tiny}
lora:
  r: 6
  alpha: ${lora.r}
task:
  name: generation
  data: e2e_nlg
  prompt: "{meaning_representation} \\${price} $5 {{x}}\n"
allocator: {name: alora, per_round: "${lora.r}"}
training:
  lr: 2.0e-3
  batch_size: 8
  eval_batch_size: ${training.batch_size}
output_dir: runs/${model.name}_r${lora.r}_lr${training.lr}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def test_a_reference_takes_the_other_value_with_its_kind_and_text_takes_it_written_out(recipe: Path) -> None:
    config = load_config(recipe)
    assert (config.lora.alpha, config.training.eval_batch_size) == (6.0, 8)
    assert config.allocator.build().per_round == 6  # type: ignore[attr-defined]  # ALoRA's
    assert config.output_dir == "runs/tiny_r6_lr0.002"


def test_overrides_come_before_references_and_may_hold_some(recipe: Path) -> None:
    config = load_config(recipe, ["lora.r=3", "training.eval_steps=${training.batch_size}", "training.batch_size=5"])
    assert (config.lora.alpha, config.training.eval_steps, config.training.eval_batch_size) == (3.0, 5, 5)
    assert config.output_dir == "runs/tiny_r3_lr0.002"


def test_the_configuration_is_written_resolved_and_reads_the_same(recipe: Path, tmp_path: Path) -> None:
    config = load_config(recipe)
    assert config.task.prompt == "{meaning_representation} ${price} $5 {{x}}\n"  # type: ignore[union-attr]  # generation
    (tmp_path / "written.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "written.yaml") == config
    assert "${lora" not in to_yaml(config)
    assert r"\${price}" in yaml.safe_load(to_yaml(config))["task"]["prompt"]


@pytest.mark.parametrize(
    "written",
    [
        "${oc.env:HOME}",
        "${oc.decode:x}",
        "${oc.create:x}",
        "x ${oc.env:HOME,none}",
        "$${oc.env:HOME}",
        r"\\${oc.env:HOME}",
        "${${lora.r}}",
        "${.r}",
        "${",
        "${}",
        "${lora.r",
        "${ lora.r }",
        "${lora[r]}",
        "${a..b}",
    ],
)
@pytest.mark.parametrize("place", ["file", "override"])
def test_only_keys_can_be_referred_to(written: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/secret")
    values: dict[str, Any] = {"lora": {"r": 1}, "x": [written] if place == "file" else 1}
    overrides = [] if place == "file" else [f"x=['{written}']"]
    with pytest.raises(ConfigError, match=r"x\.0: .*only a key can be referred to, as in \$\{training\.lr\}") as caught:
        apply_overrides(values, overrides)
    assert "secret" not in str(caught.value)


def test_the_example_in_the_documentation_does_what_is_said_there() -> None:
    text = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
    values = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    values |= {"task": {"name": "classification", "data": "rotten_tomatoes"}, "allocator": {"name": "static"}}
    config = make_config(values, ["lora.r=4"])
    assert config.output_dir == "runs/tiny_r4_lr0.002"
    assert (config.lora.alpha, config.training.eval_batch_size) == (4, 16)


def test_all_mistakes_are_told_at_once() -> None:
    values = {
        "lora": {"r": 8, "alpha": "${lora.rr}"},
        "a": "${lora}",
        "b": "${c}",
        "c": "${b}",
        "d": ["${oc.env:HOME}"],
        "e": "${e}",
    }
    with pytest.raises(ConfigError) as caught:
        apply_overrides(values, ["training.lr", "lora.r.x=1"])
    lines = [line.strip() for line in str(caught.value).splitlines()]
    assert lines == [
        "Wrong overrides:",
        "'training.lr': expected key=value, as in training.lr=3e-4",
        "'lora.r.x=1': lora.r is 8 and has no keys below it",
        "Wrong references:",
        "lora.alpha: ${lora.rr}: there is no such key; did you mean lora.r?",
        "a: ${lora}: lora is a section; refer to one of its keys: r, alpha",
        "b: ${c}: the reference leads back to itself: c → b → c",
        "c: ${b}: the reference leads back to itself: b → c → b",
        "d.0: ${oc.env:HOME}: only a key can be referred to, as in ${training.lr}; write a plain ${ as \\${",
        "e: ${e}: the reference leads back to itself: e → e",
    ]


def test_a_key_that_only_has_a_default_must_be_set() -> None:
    (line,) = wrong_references({"a": "${zzz.qqq}"})
    assert line == "a: ${zzz.qqq}: there is no such key; name a key that the file or KEY=VALUE sets"


@pytest.mark.parametrize("order", [1, -1])
def test_a_chain_has_a_bound_whichever_end_comes_first(order: int) -> None:
    def chain(length: int) -> dict[str, Any]:
        links: list[tuple[str, Any]] = [(f"k{i}", f"${{k{i + 1}}}") for i in range(length)]
        return dict([*links, (f"k{length}", 5)][::order])

    assert resolve_references(chain(MAX_CHAIN))["k0"] == 5
    assert not wrong_references(chain(MAX_CHAIN))
    assert f"k0: ${{k1}}: the reference leads through more than {MAX_CHAIN} keys" in wrong_references(
        chain(MAX_CHAIN + 1)
    )
    assert wrong_references(chain(19_000))


@pytest.mark.parametrize(
    "bomb",
    [
        {f"k{i}": f"${{k{i + 1}}}" * 10 for i in range(9)} | {"k9": ""},
        {f"k{i}": [f"${{k{i + 1}}}"] * 10 for i in range(9)} | {"k9": [{}]},
        {"a": "x" * 10_000, "b": "${a}${a}${a}"},
        {"a": "${b}" * 30_000, "b": 1},
        {"a": "\\${" * 300_000},
        {"a": "${" * 300_000},
        {"a": "${none}" * 100_000, **{f"nine{i}": 1 for i in range(10_000)}},
    ],
    ids=lambda bomb: str(bomb)[:25],
)
def test_what_grows_without_end_is_refused_in_no_time(bomb: dict[str, Any]) -> None:
    began = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        apply_overrides(bomb, [])
    assert time.monotonic() - began < 10
    assert len(str(caught.value)) < 20_000


def test_what_omegaconf_does_not_take_is_one_error() -> None:
    with pytest.raises(ConfigError, match="The references cannot be resolved: Incompatible key type"):
        apply_overrides({None: 1, "a": 1, "b": "${a}"}, [])  # type: ignore[dict-item]  # YAML's null as a key
    assert apply_overrides({None: 1}, []) == {None: 1}  # type: ignore[dict-item]  # told by what reads the values


PIECES = st.lists(
    st.sampled_from(["${", "}", "a", "${a}", "\\", "\\\\", "{", "[", ":", ".", "'", '"', "$", "\n", "???"])
)


@given(PIECES.map("".join))
def test_what_is_written_reads_the_same(text: str) -> None:
    values = {"a": text, "b": {"c": [text, 1, None]}}
    assert apply_overrides(parse_yaml(dump_yaml(values)), []) == values
    assert resolve_references(escape_references(values)) == values


@given(PIECES.map("".join))
def test_any_text_is_resolved_or_refused(text: str) -> None:
    try:
        result = apply_overrides({"a": 1, "text": text}, [])
    except ConfigError:
        return
    # without escapes and other braces this is what a plain replacement gives
    if "\\" not in text:
        expected: Any = 1 if text == "${a}" else text.replace("${a}", "1")
        assert result["text"] == expected
