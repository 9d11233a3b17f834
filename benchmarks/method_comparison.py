"""Lorank in the form of PEFT's own comparison of methods (method_comparison/MetaMathQA in PEFT's repository).

    python -m benchmarks.method_comparison curve --experiments experiments
    python -m benchmarks.method_comparison run experiments/lora/tiny-rank2-lorank-curve
    python -m benchmarks.method_comparison run experiments/lora/tiny-rank2-lorank-balanced

The comparison has a folder per experiment, with ``adapter_config.json`` and ``training_params.json``. ``curve`` makes
the two folders of lorank, and one of plain LoRA:

- ``…-lorank-curve``: a static ``rank_pattern``, found by :func:`lorank.rank_curve` from a short, wide run. It needs
  nothing of lorank to be trained, so it could be added to the comparison as it is.
- ``…-lorank-balanced``: the same LoRA with even ranks, and ``lorank.json`` with a method, which moves ranks through
  hooks of the optimiser. In the comparison's own ``run.py`` this is one call after the optimiser is made:
  ``lorank.attach(model, optimizer, …)``.

``run`` trains one of them, and writes a result with the same keys as theirs (``run_info``, ``train_info``,
``meta_info``). Differences, all of them named in the result: by default the packaged tiny Llama stands in for
Llama-3.2-3B, GSM8K's training questions for MetaMathQA, and a part of Python's manual for the text by which forgetting
is measured. ``--model meta-llama/Llama-3.2-3B --train-data meta-math/MetaMathQA --steps 5000`` are the comparison's own
settings. Without an accelerator there is no accelerator memory, and the fields hold 0.

GSM8K is read from the folder ``LORANK_DATA`` if it is set, else from the Hugging Face hub.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import random
import re
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")

import numpy as np  # noqa: E402  # after the warnings of the libraries that are imported
import torch  # noqa: E402
from peft import LoraConfig, PeftConfig, get_peft_model  # noqa: E402
from torch import nn  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

import lorank  # noqa: E402
from lorank.config.settings import METHODS  # noqa: E402
from lorank.experiments.models import resolve  # noqa: E402
from lorank.tasks.sources import load_rows  # noqa: E402

DEFAULTS: dict[str, Any] = {
    "model_id": "tiny",
    "dtype": "float32",
    "max_seq_length": 256,
    "batch_size": 4,
    "batch_size_eval": 25,
    "max_steps": 200,
    "eval_steps": 100,
    "compile": False,
    "use_gc": False,
    "seed": 0,
    "grad_norm_clip": 1.0,
    "optimizer_type": "AdamW",
    "optimizer_kwargs": {"lr": 1e-2, "weight_decay": 0.0},
    "lr_scheduler": "cosine",
    "use_amp": False,
    "autocast_adapter_dtype": True,
    "attn_implementation": None,
    "generation_kwargs": {"max_new_tokens": 64},
    "query_template": "Question: {query} Think step by step.\nAnswer:",
    "init_kv_cache_prefix": None,
}
"""The names are those of the comparison's default_training_params.json; the values fit the packaged model."""
WARMUP, VALIDATION, BUCKET = 0.1, 50, 20
START_BATCHES = 4
COLUMNS = ({"query": "query", "answer": "response"}, {"query": "question", "answer": "answer"})
"""Columns of MetaMathQA and of GSM8K."""
FORGETTING_ROWS = 20


def questions(data: str, split: str) -> list[tuple[str, str]]:
    """Pairs of question and answer."""
    rows = load_rows(data, split, subset="main" if data.endswith("gsm8k") and "/" in data else None)
    for columns in COLUMNS:
        if set(columns.values()) <= set(rows[0]):
            return [(str(row[columns["query"]]), str(row[columns["answer"]])) for row in rows]
    raise SystemExit(
        f"{data} has the columns {', '.join(rows[0])}: expected query and response, or question and answer"
    )


class Data:
    """Tokens of all parts.

    Args:
        tokenizer: the model's.
        settings: see :data:`DEFAULTS`.
        train: the data set to train on. If it is GSM8K, the validation questions are not among its rows.
        test_rows: at most so many test questions.
    """

    def __init__(self, tokenizer: Any, settings: Mapping[str, Any], train: str, test_rows: int | None) -> None:
        self.tokenizer, self.settings = tokenizer, settings
        gsm8k = train if train.endswith("gsm8k") else "gsm8k"
        gsm8k_train = questions(gsm8k, "train")
        chosen = np.random.default_rng(0).permutation(len(gsm8k_train))[:VALIDATION].tolist()
        self.validation = [gsm8k_train[i] for i in chosen]
        if train == gsm8k:
            self.train = [pair for i, pair in enumerate(gsm8k_train) if i not in set(chosen)]
        else:
            self.train = questions(train, "train")
        self.test = questions(gsm8k, "test")[:test_rows]
        self.general = [str(row["text"])[:2000] for row in load_rows("python_reference", "test")][:FORGETTING_ROWS]

    def tokens(self, pair: tuple[str, str]) -> list[int]:
        text = self.settings["query_template"].format(query=pair[0]) + pair[1]
        ids: list[int] = self.tokenizer(text)["input_ids"][: self.settings["max_seq_length"] - 1]
        return [*ids, self.tokenizer.eos_token_id]

    def batches(self, steps: int, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
        """Training batches: rows in order, sorted by length within buckets of 20 batches, the longest first."""
        size = self.settings["batch_size"]
        made, start = 0, 0
        while made < steps:
            bucket = [self.tokens(pair) for pair in self.train[start : start + BUCKET * size]]
            bucket.sort(key=len, reverse=True)
            for first in range(0, len(bucket) - size + 1, size):
                if made == steps:
                    return
                yield self.collate(bucket[first : first + size], device)
                made += 1
            start = 0 if start + 2 * BUCKET * size > len(self.train) else start + BUCKET * size

    def collate(self, rows: Sequence[Sequence[int]], device: torch.device) -> dict[str, torch.Tensor]:
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), self.tokenizer.eos_token_id)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
        labels = ids.masked_fill(mask == 0, -100)
        return {
            key: value.to(device) for key, value in (("input_ids", ids), ("attention_mask", mask), ("labels", labels))
        }


def answer_of(text: str) -> str | None:
    """The final answer of a solution, as a number in its shortest form where it is one; None: the text has none."""
    found = re.split(r"####|[Tt]he (?:final )?answer is:?", text)
    if len(found) < 2:
        return None
    answer = found[-1].strip().split("\n")[0].strip(" .!?$%").replace(",", "")
    try:
        return f"{float(answer):g}"
    except ValueError:
        return answer or None


@torch.inference_mode()
def accuracy(model: nn.Module, data: Data, pairs: Sequence[tuple[str, str]], *, progress: bool = False) -> float:
    """The fraction of questions whose generated solution ends with the right answer."""
    tokenizer, settings, right = data.tokenizer, data.settings, 0
    model.eval()
    for start in tqdm(range(0, len(pairs), settings["batch_size_eval"]), disable=not progress, desc="test"):
        some = pairs[start : start + settings["batch_size_eval"]]
        prompts = [settings["query_template"].format(query=query) for query, _ in some]
        batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(device_of(model))
        kwargs = dict(settings["generation_kwargs"])
        length = batch["input_ids"].shape[1]
        if {"max_length", "max_new_tokens"} <= set(kwargs):  # the shorter one, as in the comparison
            kwargs["max_new_tokens"] = max(1, min(kwargs["max_new_tokens"], kwargs.pop("max_length") - length))
        output = model.generate(**batch, pad_token_id=tokenizer.eos_token_id, **kwargs)  # type: ignore[operator]
        texts = tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)
        right += sum(
            answer_of(text) is not None and answer_of(text) == answer_of(answer)
            for text, (_, answer) in zip(texts, some, strict=True)
        )
    model.train()
    return right / len(pairs)


@torch.inference_mode()
def general_loss(model: nn.Module, data: Data) -> float:
    """Mean loss per token of text that has nothing to do with the task."""
    model.eval()
    total, count = 0.0, 0
    for text in data.general:
        ids = data.tokenizer(text, return_tensors="pt")["input_ids"][:, : data.settings["max_seq_length"]]
        ids = ids.to(device_of(model))
        labels = ids.shape[1] - 1
        total += float(model(input_ids=ids, labels=ids).loss) * labels
        count += labels
    model.train()
    return total / count


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def load(settings: Mapping[str, Any]) -> tuple[nn.Module, Any]:
    """The base model and its tokenizer."""
    path = resolve(settings["model_id"])
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.pad_token = tokenizer.eos_token
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=getattr(torch, settings["dtype"]), attn_implementation=settings["attn_implementation"]
    ).to(device)
    if settings["use_gc"]:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
    return model, tokenizer


def train(
    model: nn.Module, data: Data, method: lorank.Allocator | None, *, evaluate: bool = True
) -> tuple[list[dict[str, Any]], list[int], float]:
    """Trains the model as the comparison does.

    Args:
        model: a PEFT model.
        data: the data, with the settings.
        method: a method of lorank; None: plain LoRA.
        evaluate: whether to measure accuracy and forgetting.

    Returns:
        Metrics, reserved accelerator memory of every step in bytes, and seconds of training without evaluations.
    """
    settings, steps, device = data.settings, data.settings["max_steps"], device_of(model)
    optimizer = getattr(torch.optim, settings["optimizer_type"])(
        [p for p in model.parameters() if p.requires_grad], **settings["optimizer_kwargs"]
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, int(WARMUP * steps), steps)
    run = None
    if method is not None:
        run = lorank.attach(
            model,
            optimizer,
            method,
            total_steps=steps,
            steps_per_epoch=max(1, len(data.train) // settings["batch_size"]),
            train_batches=list(data.batches(START_BATCHES, device)),
            validation_batch=data.collate([data.tokens(pair) for pair in data.validation[:16]], device),
            progress=False,
        )
    before = math.nan
    if evaluate:
        with without_adapter(model):
            before = general_loss(model, data)
    metrics: list[dict[str, Any]] = []
    losses, memory, tokens, samples = [], [], [], 0
    began, evaluating, since = time.perf_counter(), 0.0, time.perf_counter()
    for step, batch in enumerate(tqdm(data.batches(steps, device), total=steps, desc="train"), 1):
        loss = model(**batch).loss
        loss.backward()
        if settings["grad_norm_clip"]:
            norm = settings["grad_norm_clip"]
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], norm)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(float(loss.detach()))
        tokens.append(int(batch["attention_mask"].sum()))
        samples += len(batch["input_ids"])
        memory.append(torch.cuda.memory_reserved() if torch.cuda.is_available() else 0)
        if evaluate and step % settings["eval_steps"] == 0:
            part = slice(-settings["eval_steps"], None)
            trained = time.perf_counter() - since
            measured = accuracy(model, data, data.validation)
            evaluation = time.perf_counter() - since - trained
            evaluating += evaluation
            metrics.append(
                {
                    "step": step,
                    "valid accuracy": measured,
                    "train loss": sum(losses[part]) / settings["eval_steps"],
                    "train samples": samples,
                    "train time": trained,
                    "eval time": evaluation,
                    "tokens / sec": sum(tokens[part]) / trained,
                    "mem allocated avg": torch.cuda.memory_allocated() if torch.cuda.is_available() else 0,
                    "mem reserved avg": sum(memory[part]) / len(memory[part]),
                    "elapsed time": time.perf_counter() - began,
                }
            )
            since = time.perf_counter()
    seconds = time.perf_counter() - began - evaluating
    if run is not None:
        run.detach()
    if evaluate:
        metrics.append(
            {
                "step": steps,
                "test accuracy": accuracy(model, data, data.test, progress=True),
                "train loss": sum(losses[-settings["eval_steps"] :]) / settings["eval_steps"],
                "train samples": samples,
                "train total tokens": sum(tokens),
                "forgetting": general_loss(model, data) - before,
            }
        )
    return metrics, memory, seconds


def without_adapter(model: nn.Module) -> AbstractContextManager[Any]:
    return model.disable_adapter()  # type: ignore[operator, no-any-return]  # PEFT's context manager


def read_settings(folder: Path, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults, changed by the folder's training_params.json and by the command line."""
    path = folder / "training_params.json"
    own = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    unknown = sorted(set(own) - set(DEFAULTS))
    if unknown:
        raise SystemExit(f"{path}: {unknown[0]!r} is not a setting of the comparison; settings: {', '.join(DEFAULTS)}")
    return {**copy.deepcopy(DEFAULTS), **own, **overrides}


def read_method(folder: Path) -> tuple[lorank.Allocator | None, dict[str, Any] | None]:
    """The method of lorank.json, and what the file says; None for plain LoRA."""
    path = folder / "lorank.json"
    if not path.exists():
        return None, None
    said = json.loads(path.read_text(encoding="utf-8"))
    name = said.get("name")
    if name not in METHODS:
        raise SystemExit(f"{path}: there is no method {name!r}; methods: {', '.join(METHODS)}")
    return METHODS[name](**{key: value for key, value in said.items() if key != "name"}), said


def run_experiment(given: argparse.Namespace) -> Path:
    """Trains one experiment and writes its result."""
    folder: Path = given.folder
    if not (folder / "adapter_config.json").exists() or folder.parent.parent.name != "experiments":
        raise SystemExit(f"{folder} is not an experiment: expected experiments/<method>/<name>/adapter_config.json")
    began, created = time.perf_counter(), datetime.now(tz=timezone.utc).isoformat(timespec="seconds")
    settings = read_settings(folder, overrides_of(given))
    method, said = read_method(folder)
    seed_everything(settings["seed"])
    base, tokenizer = load(settings)
    config = PeftConfig.from_pretrained(str(folder))
    model = get_peft_model(base, config, autocast_adapter_dtype=settings["autocast_adapter_dtype"])
    if settings["compile"]:
        model.compile(dynamic=True)
    data = Data(tokenizer, settings, given.train_data, given.test_rows)
    at_start, total = model.get_nb_trainable_parameters()
    metrics, memory, seconds = train(model, data, method)
    trained, _ = model.get_nb_trainable_parameters()
    with tempfile.TemporaryDirectory() as place:
        model.save_pretrained(place)
        size = (Path(place) / "adapter_model.safetensors").stat().st_size
    name = f"{folder.parent.name}/{folder.name}"
    result = {
        "run_info": {
            "created_at": created,
            "total_time": time.perf_counter() - began,
            "experiment_name": name,
            "peft_branch": "",  # PEFT is installed from a package
            "peft_worktree_is_dirty": False,
            "train_config": settings,
            "peft_config": plain(model.peft_config["default"].to_dict()),
            "error_msg": "",
            "lorank": said,
            "train_data": given.train_data,
        },
        "train_info": {
            "accelerator_memory_reserved_avg": int(np.mean(memory)),
            "accelerator_memory_max": torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0,
            "accelerator_memory_reserved_99th": int(np.percentile(memory, 99)),
            "train_time": seconds,
            "file_size": size,
            "num_trainable_params": trained,
            "num_trainable_params_at_start": at_start,
            "num_total_params": total,
            "status": "success",
            "metrics": metrics,
        },
        "meta_info": meta_info(),
    }
    out: Path = given.out
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name.replace('/', '--')}.json"
    path.write_text(json.dumps(result, indent=2), encoding="utf-8")
    last = metrics[-1]
    print(
        f"{name}: test accuracy {last['test accuracy']:.3f}, train loss {last['train loss']:.4f}, forgetting "
        f"{last['forgetting']:+.4f}, {trained:,} parameters, {seconds:.0f} s of training\nwritten: {path}"
    )
    return path


def make_experiments(given: argparse.Namespace) -> None:
    """Finds a static ``rank_pattern`` from a short, wide run, and writes the folders of both experiments."""
    settings = {**copy.deepcopy(DEFAULTS), **overrides_of(given)}
    seed_everything(settings["seed"])
    base, tokenizer = load(settings)
    targets = {"target_modules": given.targets, "task_type": "CAUSAL_LM"}
    wide = LoraConfig(r=given.wide * given.rank, lora_alpha=2 * given.wide * given.rank, **targets)
    model = get_peft_model(base, wide, autocast_adapter_dtype=settings["autocast_adapter_dtype"])
    data = Data(tokenizer, settings, given.train_data, None)
    train(model, data, None, evaluate=False)
    device = device_of(model)
    rows = [data.tokens(pair) for pair in data.validation]
    batches = [data.collate(rows[i : i + 8], device) for i in range(0, len(rows), 8)]
    curve = lorank.rank_curve(model, batches)
    even = LoraConfig(r=given.rank, lora_alpha=2 * given.rank, **targets)
    static = LoraConfig(**{**targets, **curve.lora_config(f"{100 / given.wide:g}%")})
    stem = f"{settings['model_id'].rpartition('/')[2]}-rank{given.rank}"
    changed = {key: value for key, value in settings.items() if value != DEFAULTS[key]}
    for kind, config, method in (
        ("lora", even, None),
        ("curve", static, None),
        ("balanced", even, {"name": "balanced"}),
    ):
        folder = given.experiments / "lora" / (stem if kind == "lora" else f"{stem}-lorank-{kind}")
        folder.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(str(folder))
        if changed:
            (folder / "training_params.json").write_text(json.dumps(changed, indent=2), encoding="utf-8")
        if method is not None:
            (folder / "lorank.json").write_text(json.dumps(method, indent=2), encoding="utf-8")
        print(f"written: {folder}")


def overrides_of(given: argparse.Namespace) -> dict[str, Any]:
    """Settings that the command line changes."""
    found: dict[str, Any] = {}
    if given.model is not None:
        found["model_id"] = given.model
    if given.steps is not None:
        found |= {"max_steps": given.steps, "eval_steps": min(given.steps, DEFAULTS["eval_steps"])}
    return found


def meta_info() -> dict[str, Any]:
    """Versions and the machine, with the comparison's keys."""
    packages: dict[str, str | None] = {}
    for name in ("transformers", "peft", "datasets", "bitsandbytes", "torch", "lorank"):
        try:
            packages[f"{name}-version"] = version(name)
        except PackageNotFoundError:
            packages[f"{name}-version"] = None
        packages[f"{name}-commit-hash"] = commit() if name == "lorank" else None
    accelerator = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    return {
        "model_info": {"sha": None, "created_at": None},
        "dataset_info": {name: {"sha": None, "created_at": None} for name in ("metamath", "gsm8k")},
        "package_info": packages,
        "system_info": {
            "system": platform.system(),
            "release": platform.release(),
            "version": platform.version(),
            "machine": platform.machine(),
            "processor": platform.processor(),
            "accelerator": accelerator,
        },
        "pytorch_info": torch.__config__.show(),
    }


def commit() -> str | None:
    """The commit of lorank's checkout; None for an installed package."""
    command = ["git", "rev-parse", "HEAD"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def plain(value: Any) -> Any:
    """Sets become sorted lists, and enumerations their values, so that JSON can hold them."""
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, set):
        return sorted(map(str, value))
    return getattr(value, "value", value)


def seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(required=True)
    curve = commands.add_parser("curve", help="find a static rank_pattern, and write the folders of the experiments")
    curve.add_argument("--experiments", type=Path, default=Path("experiments"), help="where the folders go")
    curve.add_argument("--rank", type=int, default=2, help="ranks per module")
    curve.add_argument("--wide", type=int, default=4, help="how many times as wide the short run is")
    curve.add_argument("--targets", default="all-linear", help="target_modules of the LoraConfig")
    curve.set_defaults(do=make_experiments)
    run = commands.add_parser("run", help="train one experiment, and write its result")
    run.add_argument("folder", type=Path, help="experiments/<method>/<name>")
    run.add_argument("--out", type=Path, default=Path("results"), help="the folder for results")
    run.add_argument("--test-rows", type=int, help="only the first so many test questions")
    run.set_defaults(do=run_experiment)
    for one in (curve, run):
        one.add_argument("--model", help="a model of the hub or a folder, in place of the one in the settings")
        one.add_argument("--steps", type=int, help="training steps, in place of the settings'")
        one.add_argument("--train-data", default="gsm8k", help="gsm8k, or meta-math/MetaMathQA as in the comparison")
    return top


def main() -> None:
    transformers_logging.set_verbosity_error()
    given = parser().parse_args()
    given.do(given)


if __name__ == "__main__":
    main()
