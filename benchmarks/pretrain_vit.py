"""Pretrain the packaged tiny ViT (`src/lorank/assets/tiny_vit/`) from random weights, on one CPU core.

It learns to name digits and letters: glyphs of the fonts that matplotlib ships, turned, sheared, scaled, bent, made
thicker or thinner, blurred and made noisy, then counted into 8 × 8 pixels. Every image is drawn once. No image of
scikit-learn's digits is among them. One family of fonts is held out.

    nice -n 12 python benchmarks/pretrain_vit.py train          # writes runs/pretrain_vit/checkpoint.pt
    python benchmarks/pretrain_vit.py export                    # checkpoint -> fp16 assets and model card

A run of the same number of steps can be repeated exactly on the same machine. `export` needs scikit-learn: it measures
the finished model on its digits, for the card alone.
"""

from __future__ import annotations

import json
import math
import os
import string
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import torch
import torch.nn.functional as F
import transformers
import typer
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

ROOT = Path(__file__).resolve().parents[1]
FONTS = Path(matplotlib.get_data_path(), "fonts", "ttf")
TRAINED = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique", "DejaVuSansMono",
    "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic",
    "DejaVuSerif-BoldItalic", "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta",
)  # fmt: skip
HELD_OUT = ("cmr10", "cmb10", "cmss10", "cmtt10")
CLASSES = string.digits + string.ascii_uppercase
"""A letter is one class, in either case."""
GLYPH, FINE, SIZE = 48, 32, 8  # pixels of a glyph, of the canvas that is deformed, of an image
VALIDATION = 4096

CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: image-classification
---

# tiny_vit

A vision transformer of {parameters:,} parameters, pretrained from random weights for the tests, examples and
comparisons of `lorank`. The weights are the project's own work, under Apache-2.0. The script that made the model,
`benchmarks/pretrain_vit.py`, also measured it and wrote this page.

## Use

A base model small enough to fine-tune on a CPU: `model: {{name: tiny_vit}}` in a recipe of the task
`image_classification`. Its head is replaced there. It is good for nothing else.

```python
from transformers import AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained(
    "src/lorank/assets/tiny_vit", num_labels=10, ignore_mismatched_sizes=True
)
```

Images are (1, 8, 8), from −1 (paper) to 1 (ink). The weights are stored as float16. `config.json` asks for float32, so
that the model is loaded ready for training on a CPU even where no `dtype` is given.

## Architecture

| | |
|---|---|
| type | `ViTForImageClassification`, without a pooler |
| images, patches | 8 × 8 pixels of one channel, patches of 2 × 2: 16 and the class token |
| hidden size, layers, heads | {hidden_size}, {num_hidden_layers}, {num_attention_heads} |
| intermediate size | {intermediate_size} |
| classes | {classes}: the digits and the letters, capital and small letters as one class |

## Data

Drawn by the script; every image is used once. A glyph of a random font and class is turned (±{turn}°), sheared,
scaled, moved, bent by a smooth random field, made thicker or thinner and blurred on 32 × 32 pixels. Blocks of 4 × 4
pixels are averaged, noise is added, and the result is clipped to the range of ink.

- Fonts of training: {trained}.
- Held out: {held_out}.

They are in matplotlib's package, under the licences of Bitstream Vera and DejaVu, of STIX, and of BaKoMa. No font is in
the weights' files. **No image of scikit-learn's digits was used**, so that they can serve as a task.

## Training

| | |
|---|---|
| images seen | {seen:,} |
| steps | {steps:,} of {batch} images |
| optimiser | AdamW (0.9, 0.98), weight decay {weight_decay}, gradient norm clipped at 1 |
| learning rate | peak {lr}, warm-up over 5 % of the steps, then a cosine down to 0 |
| precision | float32 |
| time | {minutes:.1f} minutes of wall time on {threads} thread, drawing included |
| machine | {machine} |
| software | torch {torch}, transformers {transformers} |
| seed | {seed} |

```
python benchmarks/pretrain_vit.py train --steps {steps} --batch {batch}
python benchmarks/pretrain_vit.py export
```

## Results

| | loss (nats) | accuracy |
|---|---|---|
| drawn images, mean of the last {last} steps | {train_loss:.4f} | |
| {validation:,} images of the held-out fonts, float32 | {val_loss:.4f} | {val_accuracy:.3f} |
| the same, weights rounded to float16 | {half_loss:.4f} | {half_accuracy:.3f} |
| scikit-learn's {n_digits:,} digits, untrained, the best of the ten classes of digits | | {digits_accuracy:.3f} |

Some glyphs cannot be told apart, such as O and 0, or l and I.

## Limitations

It knows printed glyphs of 8 × 8 pixels and nothing else.
"""

app = typer.Typer(help="Pretrain and export the tiny ViT of lorank's tests and comparisons.", add_completion=False)
Run = Annotated[Path, typer.Option(help="Run folder: checkpoint and loss curve.")]
TURN = 20.0


def draw_glyphs(fonts: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """Every character in every font, as large as the frame allows. Returns ink from 0 to 1, (glyphs, 1, 48, 48), and
    classes, (glyphs,)."""
    images, classes = [], []
    for name in fonts:
        font = ImageFont.truetype(str(FONTS / f"{name}.ttf"), 64)
        for character in string.digits + string.ascii_letters:
            left, top, right, bottom = font.getbbox(character)
            page = Image.new("L", (math.ceil(right - left), math.ceil(bottom - top)))
            ImageDraw.Draw(page).text((-left, -top), character, fill=255, font=font)
            side = GLYPH - 8
            ratio = min(side / page.width, side / page.height)
            page = page.resize((max(1, round(page.width * ratio)), max(1, round(page.height * ratio))))
            frame = Image.new("L", (GLYPH, GLYPH))
            frame.paste(page, ((GLYPH - page.width) // 2, (GLYPH - page.height) // 2))
            images.append(torch.frombuffer(bytearray(frame.tobytes()), dtype=torch.uint8).view(1, GLYPH, GLYPH))
            classes.append(CLASSES.index(character.upper()))
    return torch.stack(images).float() / 255, torch.tensor(classes)


def draw_images(glyphs: Tensor, classes: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A batch of deformed glyphs: images (size, 1, 8, 8) from −1 to 1, and classes (size,), all as likely."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(size, *shape, generator=generator)

    weights = 1.0 / torch.bincount(classes).float()[classes]
    chosen = torch.multinomial(weights, size, replacement=True, generator=generator)
    ink = glyphs[chosen]  # (size, 1, 48, 48)
    angle, shear = uniform(-TURN, TURN) * math.pi / 180, uniform(-0.3, 0.3)
    wide, high = uniform(0.8, 1.5), uniform(0.85, 1.15)  # how many times as wide and high the frame is
    sine, cosine = angle.sin(), angle.cos()
    rows = [
        torch.stack([wide * cosine, wide * (shear * cosine - sine), uniform(-0.1, 0.1)], 1),
        torch.stack([high * sine, high * (shear * sine + cosine), uniform(-0.1, 0.1)], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), [size, 1, FINE, FINE], align_corners=False)  # (size, 32, 32, 2)
    bend = uniform(0.0, 0.15, 1, 1, 1) * torch.randn(size, 2, 4, 4, generator=generator)
    grid = grid + F.interpolate(bend, FINE, mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    ink = F.grid_sample(ink, grid, align_corners=False)  # (size, 1, 32, 32)
    # a third of the strokes becomes thicker, a sixth thinner
    stroke = uniform(0, 1, 1, 1, 1)
    thick, thin = F.max_pool2d(ink, 3, 1, 1), -F.max_pool2d(-ink, 3, 1, 1)
    ink = torch.where(stroke < 1 / 3, thick, torch.where(stroke > 5 / 6, thin, ink))
    soft = F.avg_pool2d(ink, 5, 1, 2)
    share = uniform(0, 1, 1, 1, 1)
    ink = F.avg_pool2d(share * soft + (1 - share) * ink, FINE // SIZE)  # (size, 1, 8, 8)
    peak = ink.amax((1, 2, 3), keepdim=True).clamp(min=0.1)
    ink = ink / peak * uniform(0.7, 1.2, 1, 1, 1)
    noise = uniform(0, 0.12, 1, 1, 1) * torch.randn(size, 1, SIZE, SIZE, generator=generator)
    return (ink + noise).clamp(0, 1) * 2 - 1, classes[chosen]


def build_model() -> ViTForImageClassification:
    """A ViT of 8 × 8 pixels with random weights."""
    config = ViTConfig(
        image_size=SIZE, patch_size=2, num_channels=1, hidden_size=96, num_hidden_layers=6, num_attention_heads=4,
        intermediate_size=384, num_labels=len(CLASSES), id2label=dict(enumerate(CLASSES)),
        label2id={name: number for number, name in enumerate(CLASSES)},
    )  # fmt: skip
    return ViTForImageClassification(config)


def schedule(progress: float, warmup: float = 0.05) -> float:
    """The learning rate after the fraction `progress` of the run, as a fraction of its peak."""
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


@torch.no_grad()
def measure(model: ViTForImageClassification, images: Tensor, classes: Tensor) -> tuple[float, float]:
    """(mean loss in nats, accuracy)."""
    model.eval()
    logits = torch.cat([model(pixel_values=part).logits for part in images.split(256)])  # (images, 36)
    model.train()
    return F.cross_entropy(logits, classes).item(), (logits.argmax(1) == classes).float().mean().item()


@torch.no_grad()
def digits_accuracy(model: ViTForImageClassification) -> tuple[float, int]:
    """(accuracy on scikit-learn's digits among the ten classes of digits, images)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1  # (1797, 1, 8, 8)
    found = model.eval()(pixel_values=images).logits[:, :10].argmax(1)
    return (found == torch.tensor(data.target)).float().mean().item(), len(images)


def validation_images() -> tuple[Tensor, Tensor]:
    """Images of the held-out fonts, the same in every call."""
    return draw_images(*draw_glyphs(HELD_OUT), VALIDATION, torch.Generator().manual_seed(1))


@app.command()
def train(
    *,
    run: Run = Path("runs/pretrain_vit"),
    steps: Annotated[int, typer.Option(help="Number of steps.")] = 4000,
    batch: Annotated[int, typer.Option(help="Images per step.")] = 128,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1.5e-3,
    weight_decay: Annotated[float, typer.Option(help="AdamW's weight decay.")] = 0.05,
    seed: Annotated[int, typer.Option(help="Seed of the initial weights and of the images.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Train from random weights; writes the checkpoint at the end."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    run.mkdir(parents=True, exist_ok=True)
    glyphs, classes = draw_glyphs(TRAINED)
    validation, generator = validation_images(), torch.Generator().manual_seed(seed + 100)
    model = build_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=weight_decay, fused=True)
    recent: list[float] = []
    began = time.monotonic()
    with (run / "log.jsonl").open("w", buffering=1) as log:
        for step in range(1, steps + 1):
            optimizer.param_groups[0]["lr"] = lr * schedule(step / steps)
            images, wanted = draw_images(glyphs, classes, batch, generator)
            loss = F.cross_entropy(model(pixel_values=images).logits, wanted)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            recent = [*recent[-199:], loss.item()]
            if step % 200 == 0 or step == steps:
                row = {"step": step, "seconds": round(time.monotonic() - began, 1),
                       "train_loss": sum(recent) / len(recent), "last": len(recent)}  # fmt: skip
                if step % 1000 == 0 or step == steps:
                    row |= dict(zip(("val_loss", "val_accuracy"), measure(model, *validation), strict=True))
                log.write(json.dumps(row) + "\n")
                typer.echo(row)
    settings = {"steps": steps, "batch": batch, "lr": lr, "weight_decay": weight_decay, "seed": seed,
                "threads": threads}  # fmt: skip
    torch.save({"model": model.state_dict(), "settings": settings, "log": row}, run / "checkpoint.pt")


@app.command()
def export(
    *,
    run: Run = Path("runs/pretrain_vit"),
    out: Annotated[Path, typer.Option(help="Folder to write.")] = ROOT / "src/lorank/assets/tiny_vit",
    machine: Annotated[str, typer.Option(help="The machine, in words, for the card.")] = f"{os.cpu_count()} CPU cores",
) -> None:
    """Write the checkpoint as fp16 weights and model card; what the card says is measured again."""
    state = torch.load(run / "checkpoint.pt")
    settings, log = state["settings"], state["log"]
    model = build_model()
    model.load_state_dict(state["model"])
    validation = validation_images()
    val_loss, val_accuracy = measure(model, *validation)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:  # moved file by file: no reader sees half a file
        model.half().save_pretrained(folder)
        config = Path(folder, "config.json")
        config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
        for file in Path(folder).iterdir():
            file.chmod(0o644)
            os.replace(file, out / file.name)
    shipped: Any = ViTForImageClassification.from_pretrained(out, dtype=torch.float32)
    half_loss, half_accuracy = measure(shipped, *validation)
    on_digits, n_digits = digits_accuracy(shipped)
    card = CARD.format(
        **shipped.config.to_dict(), **settings, parameters=shipped.num_parameters(), classes=len(CLASSES), turn=TURN,
        trained=", ".join(TRAINED), held_out=", ".join(HELD_OUT), seen=settings["steps"] * settings["batch"],
        minutes=log["seconds"] / 60, last=log["last"], train_loss=log["train_loss"], val_loss=val_loss,
        val_accuracy=val_accuracy, half_loss=half_loss, half_accuracy=half_accuracy, validation=VALIDATION,
        digits_accuracy=on_digits, n_digits=n_digits, machine=machine, torch=torch.__version__,
        transformers=transformers.__version__,
    )  # fmt: skip
    (out / "MODEL_CARD.md").write_text(card)
    typer.echo(card[card.index("## Training") : card.index("## Limitations")])


if __name__ == "__main__":
    app()
