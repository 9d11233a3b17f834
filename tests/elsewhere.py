"""Adapters loaded in a new process that knows PEFT and transformers, and never imports lorank."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

SCRIPT = """
import json, sys, torch, warnings
warnings.simplefilter("ignore")
import transformers
from peft import PeftModel
for case in json.load(open(sys.argv[1])):
    base = getattr(transformers, case["auto"]).from_pretrained(case["base"], dtype=torch.float32)
    model = PeftModel.from_pretrained(base, case["adapter"]).eval()
    batch = torch.load(case["batch"], weights_only=True)
    with torch.no_grad():
        logits = model(**batch).logits
        merged = model.merge_and_unload()(**batch).logits
    torch.save({"logits": logits, "merged": merged}, case["out"])
assert "lorank" not in sys.modules
"""


@dataclass(frozen=True)
class Case:
    """A saved base model and adapter, and a file with the batch to run (as ``torch.save`` wrote it)."""

    base: str
    adapter: str
    batch: str
    out: str
    auto: str = "AutoModelForCausalLM"


def reload(cases: list[Case], scratch: Path) -> list[dict[str, Tensor]]:
    """Per case, ``logits`` of base and adapter, and ``merged``: those after ``merge_and_unload``."""
    listing = scratch / "cases.json"
    listing.write_text(json.dumps([asdict(case) for case in cases]))
    command = [sys.executable, "-c", SCRIPT, str(listing)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=scratch)
    assert done.returncode == 0, done.stderr
    return [torch.load(case.out, weights_only=True) for case in cases]
