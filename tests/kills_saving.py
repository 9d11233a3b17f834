"""A save that is killed at any of its steps touches no file of others and never leaves a mixture of two adapters.

    python -m tests.kills_saving

One process imports everything. For every folder below and every n, it forks a child that saves an adapter over an
older one of other ranks and is killed (SIGKILL, by itself, from an audit hook) just before the n-th time that it opens
a file for writing, renames, links, removes or makes a folder; and once with the weights half written. Then:

- every other file has its bytes, its time and its inode, also a README of the user's own;
- PEFT loads the old adapter or the new one, or refuses the folder;
- lorank loads the old adapter or the new one;
- the next save succeeds, PEFT loads it, and no temporary file is left.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import peft.peft_model
import torch
from peft import PeftModel
from torch import Tensor

from lorank.errors import AdapterError
from lorank.lora import AdapterLayers, LayerPlan, find_layers, load_adapter, resize_, save_adapter
from lorank.lora.io import adapter_folder
from tests.models import adapted, tiny_llama, token_batch

WRITES = {"os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.copyfile"}
FLAGS = os.O_WRONLY | os.O_RDWR
THEIRS = {
    "checkpoint-4/optimizer.pt": b"moments",
    "checkpoint-4/adapter_config.json": b"{}",
    "other/adapter_model.safetensors": b"another adapter",
    "tokenizer.json": b"{}",
    "adapter_notes.txt": b"years of work",
    "README.md": b"my own words",
    ".hidden.part": b"mine",
    ".download.17.part": b"mine too",
}
SCENARIOS = ("shared", "alone", "alone, without exchange", "new")


def adapter(seed: int, ranks: int) -> AdapterLayers:
    """A trained adapter on the tiny Llama; its ranks differ by module."""
    layers = find_layers(adapted(tiny_llama(1), target_modules=["q_proj", "v_proj", "down_proj"]).eval())
    names = list(layers)
    resize_(layers, {names[0]: LayerPlan((0,), ranks), names[1]: LayerPlan(())}, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in layers.values():
            layer.B.copy_(torch.randn(layer.B.shape, generator=generator))
    return layers


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    batch = token_batch()
    return model.eval()(input_ids=batch["input_ids"]).logits


def with_plain_peft(folder: Path) -> Tensor | None:
    """The logits of the adapter in the folder; None if PEFT refuses the folder."""
    try:
        return logits(PeftModel.from_pretrained(tiny_llama(1), folder))
    except ValueError as error:
        if "Can't find 'adapter_config.json'" not in str(error):
            raise
        return None


def prepare(folder: Path, scenario: str, old: AdapterLayers) -> None:
    if scenario == "new":
        return
    save_adapter(old, folder)
    if scenario == "shared":
        (folder / "README.md").unlink()
        (folder / "adapter_model.bin").write_bytes(b"old weights")
        (folder / "adapter_model-00001-of-00002.safetensors").write_bytes(b"old weights")
        for name, content in THEIRS.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)


def content(folder: Path, names: Iterable[str]) -> dict[str, tuple[bytes, int, int]]:
    """Every file of others: its content, its time of change and its inode."""
    return {
        name: ((folder / name).read_bytes(), (folder / name).stat().st_mtime_ns, (folder / name).stat().st_ino)
        for name in names
    }


def killed(save: Callable[[], object], at: int) -> bool:
    """Saves in a child that is killed before its ``at``-th write (0: with half of the weights). False: it was done."""
    child = os.fork()
    if child == 0:
        seen = 0

        def die() -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        def before_a_write(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal seen
            if event in WRITES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & FLAGS):
                seen += 1
                if seen == at:
                    die()

        def half(tensors: dict[str, Tensor], path: str, **_: object) -> None:
            Path(path).write_bytes(b"half of the weights")
            die()

        code = 1
        try:
            if at:
                sys.addaudithook(before_a_write)
            else:
                peft.peft_model.safe_save_file = half
            save()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, f"the save that should be killed at {at} ended with an error"
    return False


def moments(scenario: str, place: Path, every: int = 1) -> Iterator[str]:
    """Kills a save at each of its steps, or at every so many, checks what it leaves, and yields what PEFT found."""
    old, new = adapter(1, 1), adapter(2, 5)
    expected = {"old": logits(old.model), "new": logits(new.model)}
    swap = adapter_folder.swap_names
    if scenario == "alone, without exchange":
        adapter_folder.swap_names = lambda *_: False
    try:
        at, going_on = 0, True
        while going_on:
            folder = place / f"{scenario.replace(' ', '-').replace(',', '')}-{at}" / "out"
            prepare(folder, scenario, old)
            before = content(folder, THEIRS if scenario == "shared" else ())
            assert scenario != "shared" or len(before) == len(THEIRS)
            going_on = killed(lambda folder=folder: save_adapter(new, folder), at)
            assert content(folder, before) == before
            yield which(with_plain_peft(folder), expected, f"{scenario}, write {at}")
            try:
                loaded: Tensor | None = logits(load_adapter(tiny_llama(1), folder))
            except AdapterError:
                loaded = None
            found = which(loaded, expected, f"{scenario}, write {at}, by lorank")
            assert found != "refused" or scenario == "new"
            save_adapter(new, folder)
            assert content(folder, before) == before
            assert which(with_plain_peft(folder), expected, "after the next save") == "new"
            left = {path.name for path in folder.iterdir()}
            assert left == {
                *(name.partition("/")[0] for name in before),
                *("adapter_config.json", "adapter_model.safetensors", "README.md"),
            }
            if "README.md" not in before:  # it is lorank's own card, and of the adapter beside it
                card = (folder / "README.md").read_text(encoding="utf-8")
                assert f"| Ranks | {new.total_rank} in all" in card
            assert [path.name for path in folder.parent.iterdir()] == ["out"]
            at += every
    finally:
        adapter_folder.swap_names = swap


def which(found: Tensor | None, expected: dict[str, Tensor], when: str) -> str:
    if found is None:
        return "refused"
    for name, values in expected.items():
        if torch.allclose(found, values, rtol=1e-6, atol=1e-6):
            return name
    raise AssertionError(f"{when}: a mixture of two adapters was loaded")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--every", type=int, default=1, help="kill at every so many writes only")
    every = parser.parse_args().every
    torch.set_num_threads(1)
    began = time.monotonic()
    with TemporaryDirectory() as place:
        for scenario in SCENARIOS:
            found = Counter(moments(scenario, Path(place), every))
            print(f"{scenario}: {found.total()} moments, PEFT: {dict(found)}", flush=True)
    print(f"{time.monotonic() - began:.0f} seconds")


if __name__ == "__main__":
    main()
