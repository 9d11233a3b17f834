"""A separate process with transformers and PEFT but without lorank. It loads an adapter as any user of it would."""

from __future__ import annotations

import atexit
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

# The process handles one case per line, so that the libraries, which take seconds to import, are imported only once.
SCRIPT = """
import json, os, runpy, sys, traceback, warnings
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # keeps the output of libraries apart from the answers
warnings.simplefilter("ignore")
import torch, transformers
from peft import PeftModel
torch.set_num_threads(1)
for line in sys.stdin:
    case = json.loads(line)
    try:
        file, _, name = case["auto"].rpartition(":")
        if file:
            base = runpy.run_path(file)[name].from_pretrained(case["base"])
        else:
            base = getattr(transformers, name).from_pretrained(case["base"], dtype=torch.float32)
        model = PeftModel.from_pretrained(base, case["adapter"]).eval()
        batch = torch.load(case["batch"], weights_only=True)
        with torch.no_grad():
            logits = model(**batch)[case["output"]]
            merged = model.merge_and_unload()(**batch)[case["output"]]
        assert "lorank" not in sys.modules, "something imported lorank"
        torch.save({"logits": logits, "merged": merged}, case["out"])
        problem = ""
    except Exception:
        problem = traceback.format_exc()
    print(json.dumps(problem), file=answers, flush=True)
"""


class PlainPeft:
    """A Python process that loads adapters and never imports lorank. Ended by :meth:`close`."""

    def __init__(self) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="plain-peft-")
        folder = Path(self._scratch.name)
        self._log = folder / "stderr.txt"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", SCRIPT],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=folder,
            )

    def logits(
        self,
        base: str | Path,
        adapter: str | Path,
        batch: Mapping[str, Tensor],
        auto: str = "AutoModelForCausalLM",
        output: str = "logits",
    ) -> dict[str, Tensor]:
        """The logits of the base model with the adapter.

        Args:
            base: folder of the base model.
            adapter: folder of the adapter.
            batch: the arguments of the model's forward; labels are left out.
            auto: the name of the transformers class that loads the base model with ``from_pretrained``; or
                ``FILE.py:CLASS``, a class of one's own that does.
            output: the field of the model's output to return: a mapping's key, ``logits`` by default.

        Returns:
            ``logits``, that field, and ``merged``, the same after ``merge_and_unload``.

        Raises:
            AssertionError: PEFT cannot load the adapter (the message has the traceback), or the process has ended.
        """
        folder = Path(self._scratch.name)
        inputs, out = folder / "batch.pt", folder / "out.pt"
        torch.save({key: value for key, value in batch.items() if key != "labels"}, inputs)
        places = {"base": base, "adapter": adapter, "batch": inputs, "out": out}
        case = {"auto": auto, "output": output, **{key: str(Path(path).resolve()) for key, path in places.items()}}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps(case), file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise AssertionError(f"the process with plain PEFT has ended: {self._log.read_text()[-3000:]}")
        if problem := json.loads(answer):
            raise AssertionError(f"plain PEFT, without lorank, cannot load the adapter in {adapter}:\n{problem}")
        found: dict[str, Tensor] = torch.load(out, weights_only=True)
        return found

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()
        self._scratch.cleanup()


@cache
def plain_peft() -> PlainPeft:
    """The process that all callers share. It ends when the calling process ends."""
    process = PlainPeft()
    atexit.register(process.close)
    return process
