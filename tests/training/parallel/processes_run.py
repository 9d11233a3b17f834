"""Several processes that train together:  python -m tests.training.parallel.processes_run FOLDER COUNT

Reads ``FOLDER/cases.json``, a list of cases (:class:`Case`). Each process writes ``FOLDER/INDEX.json``: for each case
what it saw. They are forked from one that has imported everything, and meet in a file, so that no port is needed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import warnings
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import lorank
from lorank.lora import find_layers
from lorank.training.parallel.ddp import DdpBackend
from tests.models import adapted, tiny_llama, token_batch

STEPS = 14
ROWS = 4  # of a global micro-batch
LIMIT = 400  # seconds; a hang fails

ROUNDS = {"k1": 2, "k2": 2, "rounds": 5, "unit": "steps", "per_round": 5}
OPTIONS: dict[str, Any] = {
    "terms": "without",
    "rotate": True,
    "per_parameter": True,
    "new_ranks": "gradient",
    "second_moments": "mean",
}
SEARCH = {"alpha_lr": 0.05, "l1": 0.05, "resize_every": 2, "hold": 1}
METHODS = {
    "static": lorank.StaticLoRA,
    "alora": lambda: lorank.ALoRA(**ROUNDS, scores="exact"),
    "alora-first-order": lambda: lorank.ALoRA(**ROUNDS),
    "alora-alone": lambda: lorank.ALoRA(**ROUNDS, scores="exact", terms="alone", engine="reference"),
    "alora-options": lambda: lorank.ALoRA(**ROUNDS, **OPTIONS),
    "alora-sensi": lambda: lorank.ALoRASensi(**ROUNDS),
    "alora-dnas": lambda: lorank.ALoRADNAS(**ROUNDS, search_rows=2),
    "balanced": lambda: lorank.BalancedLoRA(wide=2, cuts=4, until=0.7),
    "balanced-default": lambda: lorank.BalancedLoRA(wide=2, cuts=4, until=0.7, init="default"),
    "adalora": lambda: lorank.AdaLoRA(t_init=2, t_final=3, delta_t=1),
    "sora": lambda: lorank.SoRA(prune_every=1, until=0.8),
    "ard": lambda: lorank.ARDLoRA(**SEARCH, heads="module"),
    "ard-heads": lambda: lorank.ARDLoRA(**SEARCH, min_rank=0),
}


@dataclass(frozen=True)
class Case:
    """A run of a tiny Llama, with micro-batches of ROWS rows over all processes.

    Args:
        method: which of METHODS.
        wrap: ``ddp``, ``fsdp2``, ``zero1``, ``zero2``, ``zero3``, or ``none``: each process for itself, which must be
            noticed.
        options: of DistributedDataParallel.
        attach_to: whether ``attach`` gets the model inside or what is around it.
        dora: whether the adapter is DoRA.
        accumulate: micro-batches per step, all but the last without synchronisation.
        layers: blocks of the model.
        dropout: with it, processes draw different masks.
        dtype: of the model. DeepSpeed's copies are in float32, whatever the model is in.
        clip: the largest norm of a step's gradient; 0: any.
        stop: steps after which the run stops; its weights and optimiser are saved.
        resume: goes on from the run that was stopped.
        file: where that is saved, in the folder.
        changes: what is made wrong on purpose, see the code.
    """

    method: str = "alora"
    wrap: str = "ddp"
    options: dict[str, Any] = field(default_factory=dict)
    attach_to: str = "inner"
    dora: bool = False
    accumulate: int = 2
    checkpointing: bool = True
    layers: int = 1
    dropout: float = 0.0
    dtype: str = "float64"
    clip: float = 1.0
    stop: int = STEPS
    resume: bool = False
    file: str = "ddp.pt"
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def zero(self) -> bool:
        return self.wrap.startswith("zero")


@dataclass
class Seen:
    """What one process saw.

    Args:
        losses: of each step, the mean over micro-batches and processes.
        hashes: of weights and optimiser state, after each step.
        ranks: after each step.
        scores: of the allocations.
        allocations: how many.
        error: the message of the error that ended the run.
    """

    losses: list[float] = field(default_factory=list)
    hashes: list[str] = field(default_factory=list)
    ranks: list[list[int]] = field(default_factory=list)
    scores: list[list[float]] = field(default_factory=list)
    allocations: int = 0
    error: str = ""


def run(case: Case, folder: Path, index: int, count: int) -> Seen:
    seen = Seen()
    try:
        if case.changes.get("old_reducer"):
            with patch.object(DdpBackend, "after_resize", lambda self, run: None):
                _train(case, folder, index, count, seen)
            return seen
        _train(case, folder, index, count, seen)
    except lorank.LorankError as error:
        seen.error = f"{type(error).__name__}: {error}"
    return seen


def _train(case: Case, folder: Path, index: int, count: int, seen: Seen) -> None:
    # ALoRA gets fewer ranks than the others, which only take away.
    model = adapted(tiny_llama(case.layers), random_B=False, r=4, lora_dropout=case.dropout, use_dora=case.dora).train()
    model.to(getattr(torch, case.dtype))
    if case.checkpointing:
        base = model.base_model.model
        # transformers renamed it on the way to version 6
        enable = getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    outer: nn.Module = model
    if count > 1 and case.wrap == "ddp":
        outer = DistributedDataParallel(model, **case.options)
    elif count > 1 and case.wrap == "fsdp2":
        outer = lorank.shard_base_(model)
    if case.zero and case.changes.get("room", 16):
        lorank.reserve_(model, max_rank=16)
    optimizer: Any = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    path = folder / case.file
    if case.zero:
        outer, optimizer = deepspeed_engine(case, model, optimizer)
    elif case.resume:
        saved = torch.load(path, weights_only=True)
        optimizer.load_state_dict(saved["optimizer"])
    ranks = lorank.attach(
        model if case.attach_to == "inner" else outer,
        optimizer,
        METHODS[case.method](),
        validation_batch=token_batch(
            4, seed=case.changes.get("batch_seed", 99) + index * case.changes.get("uneven", 0)
        ),
        train_batches=lambda: [own_rows(token_batch(ROWS, seed=seed), index, count) for seed in (50, 51)],
        total_steps=STEPS,
        seed=7 + index * case.changes.get("seed", 0),
    )
    if case.resume and case.zero:
        outer.load_checkpoint(str(path))
    elif case.resume:
        model.load_state_dict(saved["model"], strict=False)
    torch.manual_seed(index)  # of dropout
    while ranks.step < case.stop:
        loss = _step(case, ranks.step, outer, optimizer, index, count)
        seen.losses.append(loss)
        now = list(ranks.layers.ranks.values())
        if case.zero and (not ranks.step % (STEPS // 2) or [now] != seen.ranks[-1:]):  # it costs messages
            ranks.optimizer.fetch()
        seen.hashes.append(fingerprint(model, ranks.optimizer))
        seen.ranks.append(now)
    seen.allocations = len(ranks.history.allocations)
    seen.scores = [[x for s in record.scores.values() for x in s] for record in ranks.history.allocations]
    if case.stop < STEPS and case.zero:
        outer.save_checkpoint(str(path))
    elif case.stop < STEPS and index == 0:
        weights = {k: v for k, v in model.state_dict().items() if "lora_" in k}
        torch.save({"model": weights, "optimizer": optimizer.state_dict()}, path)
    if case.resume:
        ranks.save_adapter(folder / f"{case.file}.adapter")
    ranks.detach()
    if count > 1:
        dist.barrier()


def deepspeed_engine(case: Case, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
    import deepspeed

    # DeepSpeed would compile an operator for messages in shared memory, which takes a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    zero = {"stage": int(case.wrap[-1]), "stage3_param_persistence_threshold": 0}
    config = {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed only counts with it
        "gradient_accumulation_steps": case.accumulate,
        "gradient_clipping": case.clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
    }
    engine, inner, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine, inner


def _step(case: Case, step: int, model: Any, optimizer: Any, index: int, count: int) -> float:
    total = torch.zeros((), dtype=torch.float64)
    for micro in range(case.accumulate):
        batch = token_batch(ROWS, seed=100 * step + micro)
        own = own_rows(batch, index, count)
        last = micro == case.accumulate - 1
        if case.zero:
            loss = model(**own).loss
            model.backward(loss)  # which divides by the micro-batches
            model.step()
            total += loss.detach().double() / case.accumulate
            continue
        if hasattr(model, "set_requires_gradient_sync"):  # FSDP2
            model.set_requires_gradient_sync(last)
        with nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync():
            loss = model(**own).loss / case.accumulate
            loss.backward()
        total += loss.detach().double()
    if not case.zero:
        if case.clip:
            torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], case.clip)
        optimizer.step()
        optimizer.zero_grad()
    if count > 1:
        dist.all_reduce(total)
    return float(total) / count


def own_rows(batch: dict[str, Tensor], index: int, count: int) -> dict[str, Tensor]:
    """This process's part of a global batch."""
    return {key: value[index::count] for key, value in batch.items()}


def fingerprint(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """SHA-256 of the adapter's bytes and of the optimiser's; independent of the hash under test."""
    found = hashlib.sha256()
    for layer in find_layers(model).values():
        if layer.pool is not None:
            for stored in layer.stored:
                if stored.dim() == 2:  # whole in this process: ZeRO-1 and -2
                    found.update(stored.detach().numpy().tobytes())
        for weight in (layer.A, layer.B):
            tensors = [weight, *(v for v in optimizer.state.get(weight, {}).values() if isinstance(v, Tensor))]
            for tensor in tensors:
                found.update(str(tuple(tensor.shape)).encode())
                found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        if layer.gate is not None:
            found.update(layer.gate.detach().cpu().numpy().tobytes())
    return found.hexdigest()


def launch(folder: Path, cases: list[Case], count: int) -> list[list[Seen]]:
    """Runs the cases in ``count`` new processes: for each case, what each process saw."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cases.json").write_text(json.dumps([asdict(case) for case in cases]))
    (folder / "meeting").unlink(missing_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "DS_ACCELERATOR": "cpu"}
    root = Path(__file__).parents[3]
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(lorank.__file__).parents[1]), str(root)])
    command = [sys.executable, "-m", "tests.training.parallel.processes_run", str(folder), str(count)]
    with (folder / "log").open("w") as log:
        first = subprocess.Popen(
            command, cwd=root, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = first.wait(timeout=LIMIT)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(first.pid, signal.SIGKILL)  # and those that it forked
            first.wait()
    assert not code, (folder / "log").read_text()[-3000:]
    return launched(folder, count)


def launched(folder: Path, count: int) -> list[list[Seen]]:
    """What :func:`launch` returned, from its files."""
    found = [json.loads((folder / f"{index}.json").read_text()) for index in range(count)]
    return [[Seen(**one) for one in together] for together in zip(*found, strict=True)]


def one_of(folder: Path, index: int, count: int, cases: list[Case]) -> None:
    """What one process does."""
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(index)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meeting'}",
        rank=index,
        world_size=count,
        timeout=timedelta(seconds=120),
    )
    seen = [asdict(run(case, folder, index, count)) for case in cases]
    (folder / f"{index}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


def main() -> None:
    warnings.simplefilter("ignore")
    folder, count = Path(sys.argv[1]), int(sys.argv[2])
    cases = [Case(**case) for case in json.loads((folder / "cases.json").read_text())]
    if any(case.zero for case in cases):
        import deepspeed  # noqa: F401  # once, before the others are forked
    # Nothing has been computed yet, so that no thread of PyTorch's is lost by forking.
    fork = multiprocessing.get_context("fork")
    others = [fork.Process(target=one_of, args=(folder, index, count, cases)) for index in range(count)]
    for process in others:
        process.start()
    for process in others:
        process.join()
    sys.exit(any(process.exitcode for process in others))


if __name__ == "__main__":
    main()
