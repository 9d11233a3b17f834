"""Patterns that match quickly are read; patterns that are not valid, or could take very long, are refused."""

from __future__ import annotations

import time

import pytest

from lorank.lora.io.safe_patterns import MAX_LENGTH, check_pattern

HARMLESS = [
    "q_proj",
    r"^model\.layers\.0\.self_attn\.q_proj",
    r".*\.(q_proj|v_proj)",
    r".*layers\.(\d+)\.mlp\..*_proj$",
    "(?:a|b)?c",
    "(ab){2}c{1,3}",
    "(?=.*attn).*proj",
    "[a-z_]+",
    ".*" * 4,
]
REFUSED = {
    "(": "cannot be read",
    "[": "cannot be read",
    "*": "cannot be read",
    "(a+)+$": "a repeat within a repeat",
    "(a*b?)*": "a repeat within a repeat",
    "(?=(a+)+)": "a repeat within a repeat",
    "(a|aa)+$": "alternatives within a repeat",
    r"(a)\1": "refers back to a group",
    "(a)?(?(1)b|c)": "refers back to a group",
    ".*" * 5: "more than 4 open-ended repeats",
    "(a*)?" * 5: "more than 4 open-ended repeats",
    "a{1,1000}" * 5: "more than 4 open-ended repeats",
    "a" * (MAX_LENGTH + 1): "100,001 characters, at most 100,000 are read",
    "(" * 10_000: "cannot be read",
}


@pytest.mark.parametrize("pattern", HARMLESS)
def test_harmless_patterns_are_read(pattern: str) -> None:
    check_pattern("target_modules", pattern)


@pytest.mark.parametrize("pattern", REFUSED, ids=lambda pattern: pattern[:20])
def test_other_patterns_are_refused_by_the_name_of_their_setting(pattern: str) -> None:
    with pytest.raises(ValueError, match=rf"^target_modules: the pattern .*{REFUSED[pattern]}"):
        check_pattern("target_modules", pattern)


def test_a_pattern_is_refused_without_being_matched() -> None:
    began = time.process_time()
    with pytest.raises(ValueError, match="a repeat within a repeat"):
        check_pattern("target_modules", "(a+)+" * 1000 + "$")
    assert time.process_time() - began < 1
