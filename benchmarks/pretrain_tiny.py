"""Pretrain the packaged tiny Llama (`src/lorank/assets/tiny_llama/`) from random weights, on two CPU cores.

It trains a byte-level BPE of 4096 tokens and a Llama of 3.2 M parameters, both on one corpus of public-domain English
books. Two whole books are held out: neither the tokeniser nor the model sees them.

    export LORANK_DATA=...                                   # the folder that holds classics/corpus.txt.gz
    nice -n 12 python benchmarks/pretrain_tiny.py train --minutes 55
    python benchmarks/pretrain_tiny.py export                   # checkpoint -> fp16 assets and model card

`train` writes `log.jsonl`, `tokenizer.json` and `checkpoint.pt` into the run folder every few minutes, and continues
from there when it is called again. The learning rate follows the clock (`--minutes`), so a busy machine takes fewer
steps but still finishes the schedule. With `--steps` it follows the step count, and a run can be repeated exactly on
the same machine. On a shared machine, set `GOMP_SPINCOUNT=2000` in the environment: then two threads do not wait for
each other in busy loops.
"""

import ctypes
import gzip
import json
import math
import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HELD_OUT = ("Through the Looking-Glass", "The Happy Prince & Other Tales")
BOS, EOS, PAD = SPECIALS = ("<|bos|>", "<|eos|>", "<|pad|>")
VOCAB, CONTEXT = 4096, 256
ROOT = Path(__file__).resolve().parents[1]

CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# tiny_llama

A Llama of {parameters:,} parameters, pretrained from random weights for the tests and demos of `lorank`. Weights and
tokeniser are the project's own work, under Apache-2.0. The script that made the model, `benchmarks/pretrain_tiny.py`,
also measured its losses and wrote this page.

## Use

A base model small enough to fine-tune on a CPU, so that tests and demos need no download. It is good for nothing else.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("src/lorank/assets/tiny_llama", dtype="float32")
tokenizer = AutoTokenizer.from_pretrained("src/lorank/assets/tiny_llama")
```

The weights are stored as float16. `config.json` asks for float32, so that the model is loaded ready for training on a
CPU even where no `dtype` is given.

## Architecture and tokeniser

| | |
|---|---|
| type | `LlamaForCausalLM`: RMSNorm, SwiGLU, rotary positions, no biases, input and output embeddings tied |
| hidden size, layers | {hidden_size}, {num_hidden_layers} |
| heads | {num_attention_heads} for queries, {num_key_value_heads} for keys and values, {head_dim} wide |
| intermediate size | {intermediate_size} |
| context | {max_position_embeddings} tokens |
| tokeniser | byte-level BPE, {vocab_size} tokens, each digit a token of its own, trained on the training books only |
| special tokens | `<|bos|>` 0, `<|eos|>` 1, `<|pad|>` 2; none is added to a text unasked |

The tokeniser has all 256 bytes, so that any text round-trips.

## Data

{n_books} public-domain English books, {train_bytes:,} bytes, {train_tokens:,} tokens: the repository
`mlschmitt/classic-books-markdown` at commit 94488272, as one plain text. Nothing else was used.

Held out as whole books, from the model and from the tokeniser:
{held_out}
({val_bytes:,} bytes, {val_tokens:,} tokens, {val_share:.1%} of the text). Another book by the first one's author is
among the training books; the second one's author is not.

## Training

| | |
|---|---|
| tokens seen | {seen:,} ({epochs:.2f} epochs) |
| steps | {step:,}, on windows of {max_position_embeddings} tokens: {batches} |
| optimiser | AdamW (0.9, 0.98), weight decay {weight_decay} on matrices, gradient norm clipped at 1 |
| learning rate | peak {lr}, warm-up over 3 % of the time, then a cosine down to 2 % of the peak |
| precision | float32 |
| time | {minutes_spent:.1f} minutes of wall time, validation included |
| machine | {machine} |
| software | torch {torch_version}, transformers {transformers_version} |
| seed | {seed} |

```
{commands}
python benchmarks/pretrain_tiny.py export
```

The learning rate follows the clock, so another machine makes another number of steps and other weights.

## Results

| | nats per token | bits per byte |
|---|---|---|
| training books, mean of the last {last_steps} steps | {train_loss:.4f} | |
| held-out books, float32 | {val_loss:.4f} | {val_bits:.4f} |
| held-out books, weights rounded to float16 | {half_loss:.4f} | {half_bits:.4f} |

Rounding to float16 changes the held-out loss by {rounding:+.1e}. Held-out loss is over all tokens, in windows of
{max_position_embeddings} that begin with no context.

| minutes | held-out loss |
|---|---|
{curve}

A sample (seed 0, temperature 0.8, top-k 40, prompt "Once upon a time"):

> {sample}

## Limitations

It writes in the manner of old children's books and loses the thread within a sentence or two. It knows no facts,
follows no instructions, has seen next to no digits and no code, and nothing longer than {max_position_embeddings}
tokens. In training `<|bos|>` and `<|eos|>` only mark the ends of whole books, so that `<|eos|>` means little to it
before it is fine-tuned. Most of the books are of the 19th and early 20th century and carry the attitudes of their
time; nothing was filtered.
"""

Data = Annotated[Path | None, typer.Option(help="Corpus, gzipped text. Default: $LORANK_DATA/classics/corpus.txt.gz")]
Run = Annotated[Path, typer.Option(help="Run folder: checkpoint, tokeniser and loss curve.")]
app = typer.Typer(help="Pretrain and export the tiny Llama of lorank's tests and demos.", add_completion=False)


def read_books(data: Path | None) -> tuple[list[str], list[str]]:
    """The training books and the held-out books; the text of each book begins with its 'Title:' line."""
    if data is None:
        if "LORANK_DATA" not in os.environ:
            raise typer.BadParameter("give --data, or set LORANK_DATA to the folder that holds classics/corpus.txt.gz")
        data = Path(os.environ["LORANK_DATA"]) / "classics" / "corpus.txt.gz"
    text = gzip.decompress(data.read_bytes()).decode()
    books = [b.strip() + "\n" for b in re.split(r"(?m)^(?=Title: .*\n\nAuthor: )", text) if b.strip()]
    held = [b for b in books if b.startswith(tuple(f"Title: {title}\n" for title in HELD_OUT))]
    if len(held) != len(HELD_OUT):
        raise typer.BadParameter(f"{data} lacks some of the held-out books {HELD_OUT}")
    return [b for b in books if b not in held], held


def train_tokenizer(books: list[str]) -> Tokenizer:
    """Trains a byte-level BPE: decoding restores any text exactly, and each digit is one token."""
    tok = Tokenizer(models.BPE())
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tok.pre_tokenizer = pre_tokenizers.Sequence(split)
    tok.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=list(SPECIALS), initial_alphabet=alphabet, show_progress=False
    )
    tok.train_from_iterator(books, trainer)
    return tok


def encode(tok: Tokenizer, books: list[str]) -> Tensor:
    """All books as one sequence of token ids, each book between <|bos|> and <|eos|>."""
    bos, eos = tok.token_to_id(BOS), tok.token_to_id(EOS)
    return torch.tensor([i for e in tok.encode_batch_fast(books) for i in (bos, *e.ids, eos)])


def build_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=192, intermediate_size=512, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=4, head_dim=24, max_position_embeddings=CONTEXT, rms_norm_eps=1e-5,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:  # smaller initial weights for the maps that write into the residual stream
        for out in (layer.self_attn.o_proj, layer.mlp.down_proj):
            out.weight.data /= math.sqrt(2 * config.num_hidden_layers)
    return model


def token_loss(model: LlamaForCausalLM, window: Tensor, reduction: str = "mean") -> Tensor:
    """Next-token cross-entropy in nats of windows [batch, length + 1]."""
    hidden = model.model(input_ids=window[:, :-1], use_cache=False).last_hidden_state  # [batch, length, 192]
    logits = model.lm_head(hidden).flatten(0, 1)  # [batch * length, 4096]
    return F.cross_entropy(logits.float(), window[:, 1:].flatten(), reduction=reduction)


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, ids: Tensor) -> float:
    """Loss per token over all of `ids`. Neighbouring windows share one token, so each token except the first is
    predicted once."""
    total, last = 0.0, len(ids) - 1
    full = last // CONTEXT
    windows = ids[: full * CONTEXT + 1].unfold(0, CONTEXT + 1, CONTEXT)  # [full, context + 1]
    for batch in [*windows.split(16), ids[None, full * CONTEXT :]]:
        if batch.shape[1] > 1:
            total += token_loss(model, batch, "sum").item()
    return total / last


def batches(ids: Tensor, size: int, seed: int, seen: int) -> Iterator[Tensor]:
    """Batches [size, context + 1] after `seen` windows. Every epoch cuts the text at a new offset and shuffles it."""
    per_epoch, epoch, order = (len(ids) - 1 - CONTEXT) // CONTEXT, -1, torch.empty(0)
    while True:
        if epoch != seen // per_epoch:
            epoch = seen // per_epoch
            gen = torch.Generator().manual_seed(seed * 1000 + epoch)
            shift = int(torch.randint(CONTEXT, (1,), generator=gen))
            windows = ids[shift:].unfold(0, CONTEXT + 1, CONTEXT)  # [windows, context + 1]
            order = torch.randperm(len(windows), generator=gen)[:per_epoch]
        start = seen % per_epoch
        batch = windows[order[start : start + size]]
        seen += len(batch)
        yield batch


def schedule(progress: float, warmup: float = 0.03, floor: float = 0.02) -> float:
    """The learning rate after the fraction `progress` of the run, as a fraction of its peak: linear warm-up, then a
    cosine down to `floor`."""
    if progress < warmup:
        return max(progress, 1e-4) / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (min(progress, 1.0) - warmup) / (1 - warmup)))


def keep_freed_memory() -> None:
    """Tells glibc to reuse large memory blocks instead of returning them (measured: about a fifth faster)."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no separate mapping for a block
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep the top of the heap


def save_atomically(state: dict[str, Any], path: Path) -> None:
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


@app.command()
def train(
    *,
    data: Data = None,
    run: Run = Path("runs/pretrain_tiny"),
    minutes: Annotated[float, typer.Option(help="Wall-clock time of training; the learning rate follows it.")] = 55.0,
    steps: Annotated[int, typer.Option(help="Number of steps, instead of --minutes (0: use --minutes).")] = 0,
    batch: Annotated[int, typer.Option(help="Windows of 256 tokens per step.")] = 8,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 2.5e-3,
    weight_decay: Annotated[float, typer.Option(help="AdamW's weight decay, on matrices only.")] = 0.1,
    save_minutes: Annotated[float, typer.Option(help="Minutes between validations and checkpoints.")] = 4.0,
    seed: Annotated[int, typer.Option(help="Seed of the initial weights and of the order of the data.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
) -> None:
    """Train, or continue training, until the time or the number of steps is reached."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    keep_freed_memory()
    run.mkdir(parents=True, exist_ok=True)
    books, held = read_books(data)
    if not (run / "tokenizer.json").exists():
        train_tokenizer(books).save(str(run / "tokenizer.json"))
    tok = Tokenizer.from_file(str(run / "tokenizer.json"))
    train_ids, val_ids = encode(tok, books), encode(tok, held)

    model = build_model()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)
    settings = {"minutes": minutes, "steps": steps, "batch": batch, "lr": lr, "weight_decay": weight_decay,
                "seed": seed, "threads": threads}  # fmt: skip
    step, seen, spent = 0, 0, 0.0  # steps, windows, seconds
    calls: list[dict[str, Any]] = []
    if (run / "checkpoint.pt").exists():
        state = torch.load(run / "checkpoint.pt")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, seen, spent, calls = state["step"], state["seen"], state["seconds"], state["calls"]
        rows = (run / "log.jsonl").read_text().splitlines(keepends=True)  # drop lines written after the checkpoint
        (run / "log.jsonl").write_text("".join(row for row in rows if json.loads(row)["step"] <= step))
    calls.append({"from_step": step, **settings})

    def progress_now() -> float:
        return step / steps if steps else spent / (60 * minutes)

    if progress_now() >= 1.0:
        raise typer.BadParameter(f"{run} holds a run that has spent this budget: export it, or name another --run")
    columns = (BarColumn(), TextColumn("{task.percentage:.1f}% {task.description}"), TimeElapsedColumn())
    with Progress(*columns) as bar, (run / "log.jsonl").open("a", buffering=1) as log:
        task = bar.add_task("", total=1.0)
        before, saved, recent = time.monotonic(), spent, []
        for windows in batches(train_ids, batch, seed, seen):
            share = schedule(progress_now())
            for group in optimizer.param_groups:
                group["lr"] = lr * share
            loss = token_loss(model, windows)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            recent.append(loss.item())
            step, seen = step + 1, seen + len(windows)
            spent, before = spent + time.monotonic() - before, time.monotonic()
            done = progress_now() >= 1.0
            if step % 50 == 0 or done:
                row = {"step": step, "tokens": seen * CONTEXT, "seconds": round(spent, 1),
                       "lr": lr * share, "train_loss": sum(recent) / len(recent), "grad_norm": norm.item()}  # fmt: skip
                log.write(json.dumps(row) + "\n")
                bar.update(task, completed=progress_now(), description=f"step {step}  loss {row['train_loss']:.3f}")
                recent = []
            if done or spent - saved >= 60 * save_minutes:
                val = mean_loss(model, val_ids)
                log.write(json.dumps({"step": step, "seconds": round(spent, 1), "val_loss": val}) + "\n")
                bar.console.print(f"step {step}  {spent / 60:.1f} min  validation loss {val:.4f}")
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seen": seen,
                         "seconds": spent, "done": done, "calls": calls}  # fmt: skip
                save_atomically(state, run / "checkpoint.pt")
                saved = spent
            if done:
                break


@app.command()
def export(
    *,
    data: Data = None,
    run: Run = Path("runs/pretrain_tiny"),
    out: Annotated[Path, typer.Option(help="Folder to write.")] = ROOT / "src/lorank/assets/tiny_llama",
    machine: Annotated[str, typer.Option(help="The machine, in words, for the card.")] = f"{os.cpu_count()} CPU cores",
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
) -> None:
    """Write the last checkpoint as fp16 weights, tokeniser and model card; all losses are measured again."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    state = torch.load(run / "checkpoint.pt")
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    books, held = read_books(data)
    core = Tokenizer.from_file(str(run / "tokenizer.json"))
    train_ids, val_ids = encode(core, books), encode(core, held)
    train_bytes, val_bytes = (sum(len(b.encode()) for b in part) for part in (books, held))

    model = build_model()
    model.load_state_dict(state["model"])
    val_loss = mean_loss(model, val_ids)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=BOS, eos_token=EOS, pad_token=PAD, model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:  # moved file by file: no reader sees half a file
        model.half().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        config = Path(folder, "config.json")
        config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
        for file in Path(folder).iterdir():
            file.chmod(0o644)
            os.replace(file, out / file.name)

    shipped: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    loaded: Any = AutoTokenizer.from_pretrained(out)
    half_loss = mean_loss(shipped, val_ids)
    torch.manual_seed(0)
    prompt = loaded("Once upon a time", return_tensors="pt", return_token_type_ids=False)
    ids = shipped.generate(**prompt, max_new_tokens=120, do_sample=True, temperature=0.8, top_k=40)
    last = [row["train_loss"] for row in rows if "train_loss" in row and row["step"] <= state["step"]][-4:]
    to_bits = (len(val_ids) - 1) / val_bytes / math.log(2)  # nats per token -> bits per byte
    card = CARD.format(
        **{**shipped.config.to_dict(), **state["calls"][-1]},
        parameters=shipped.num_parameters(), n_books=len(books), train_bytes=train_bytes, train_tokens=len(train_ids),
        held_out=" and ".join(f"*{title}*" for title in HELD_OUT), val_bytes=val_bytes, val_tokens=len(val_ids),
        val_share=val_bytes / (train_bytes + val_bytes), step=state["step"], minutes_spent=state["seconds"] / 60,
        seen=(seen := state["seen"] * CONTEXT), epochs=seen / len(train_ids),
        commands="\n".join(
            f"python benchmarks/pretrain_tiny.py train --minutes {c['minutes']:g} --batch {c['batch']}"
            + (f"  # goes on from step {c['from_step']}" if c["from_step"] else "") for c in state["calls"]
        ),
        batches=", then ".join(f"{c['batch']} at once from step {c['from_step']}" for c in state["calls"]),
        machine=machine, torch_version=torch.__version__,
        last_steps=50 * len(last), train_loss=sum(last) / len(last), val_loss=val_loss, val_bits=val_loss * to_bits,
        half_loss=half_loss, half_bits=half_loss * to_bits, rounding=half_loss - val_loss,
        curve="\n".join(f"| {row['seconds'] / 60:.1f} | {row['val_loss']:.4f} |" for row in rows if "val_loss" in row),
        sample=loaded.decode(ids[0]).strip().replace("\n", "\n> "),
    )  # fmt: skip
    if not state["done"]:
        card = card.replace("# tiny_llama\n", "# tiny_llama\n\n**An unfinished run: an early checkpoint.**\n", 1)
    (out / "MODEL_CARD.md").write_text(card)
    typer.echo(card[card.index("## Training") : card.index("## Limitations")])


if __name__ == "__main__":
    app()
