"""The benchmarks' commands at toy size: they run, and what does not depend on the clock is as they say."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import experts, growth, measuring, options, pretrain_vit, run, scaling, scores, step, truncation
from benchmarks.gate_derivatives import hessian_diagonal
from benchmarks.quality import Results, Run
from benchmarks.shapes import SHAPES
from lorank.lora import find_layers
from tests.models import adapted, tiny_llama, token_batch

pytestmark = pytest.mark.filterwarnings("ignore")
OURS = {"static", "… with Gramians", "ALoRA", "ARD-LoRA", "AdaLoRA", "SoRA", "DoRA"}


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """The commands set threads and the log's level for their process."""
    threads, level = torch.get_num_threads(), logging.getLogger("lorank").level
    yield
    torch.set_num_threads(threads)
    logging.getLogger("lorank").setLevel(level)


def test_step(capsys: pytest.CaptureFixture[str]) -> None:
    found = step.main(["--shapes", "tiny", "--turns", "1", "--dropouts", "0.05"])
    one = found["tiny", 0.05]
    assert set(one.seconds) == OURS | {"floor", "PEFT LoRA", "PEFT DoRA", "PEFT AdaLoRA"}
    assert all(len(times) == 1 and times[0] > 0 for times in one.seconds.values())
    assert one.parameters["static"] == one.parameters["PEFT LoRA"]
    assert one.parameters["ARD-LoRA"] == pytest.approx(one.parameters["PEFT LoRA"], rel=0.1)
    assert all(0 < one.saved[name] < one.peak[name] for name in one.saved)
    # Bytes are the same on every machine: docs/performance.md.
    assert one.saved_ratio("static", "PEFT LoRA") <= 0.72
    printed = capsys.readouterr().out
    assert "| tiny | 0.05 | DoRA |" in printed
    assert "| saved: static / PEFT LoRA | yes | 0.7 |" in printed


def test_step_on_a_4_bit_base() -> None:
    pytest.importorskip("bitsandbytes")
    found = step.main(["--shapes", "tiny", "--turns", "1", "--dropouts", "0", "--base", "nf4"])
    assert set(found["tiny", 0.0].seconds) > OURS
    assert found["tiny", 0.0].saved_ratio("static", "PEFT LoRA") <= 1.0005


def test_the_shape_for_a_gpu_has_8_billion_parameters() -> None:
    with torch.device("meta"):
        model = SHAPES["8B"].make()
    assert sum(parameter.numel() for parameter in model.parameters()) == 8_030_261_248


def test_growth(capsys: pytest.CaptureFixture[str]) -> None:
    found, hooks, engine = growth.main(["--smallest", "--turns", "2"])
    assert len(found) == 1
    assert {name for _, name in hooks} == {"static", "ALoRA", "ARD-LoRA", "AdaLoRA", "SoRA"}
    assert {what for _, what in engine} == {"an eighth", "all"}
    assert "| layers = 1 | 7 | 14 |" in capsys.readouterr().out


def test_run() -> None:
    results = run.main(["--model", "tiny", "--steps", "20", "--rank", "2"])
    assert len(results["ALoRA"].allocating) == len(results["ALoRA exact"].allocating) == 8
    assert results["ALoRA"].round is not None
    assert not results["PEFT LoRA"].allocating
    assert len(results["AdaLoRA"].plain) + len(results["AdaLoRA"].allocating) == 19
    few = run.main(["--model", "tiny", "--steps", "20", "--rank", "2", "--runs", "static"])
    assert list(few) == ["PEFT LoRA", "static"]
    with pytest.raises(SystemExit, match="unknown runs: other; there are PEFT LoRA, PEFT AdaLoRA, static"):
        run.main(["--model", "tiny", "--runs", "other"])


def test_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = scores.main(["--out", str(tmp_path), "--toy"])
    printed = capsys.readouterr().out
    assert list(found) == ["toy, early"]
    for state in found.values():
        assert (state["ranks"], state["modules"]) == (12, 6)
        assert state["screen"]["alike"] == [1.0, 1.0]
        assert all(-1 <= way["spearman"] <= 1 and way["cost"] > 0 for way in state["ways"].values())
        assert 0 <= state["ways"]["exact on 2"]["lowest"] <= 1
    assert "| first order on 8 |" in printed
    assert scores.main(["--out", str(tmp_path), "--toy"]) == found, "what was measured is read again"


def test_truncation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {
        "STEPS": 4,
        "RANK": 2,
        "WIDE": 2,
        "TRAINED": (1, 2),
        "SCORING": 8,
        "EXACT": 2,
        "REPORT": 8,
        "SHARES": (50.0,),
    }
    for name, value in small.items():
        monkeypatch.setattr(truncation, name, value)
    arguments = ["--tasks", "manual", "--ways", "path2,svd,magnitude,sensitivity", "--out", str(tmp_path)]
    found = truncation.main(arguments)
    whole = found["manual seed 0 | whole"]
    cut = {way: found[f"manual seed 0 | {way} | 50"] for way in ("path2", "svd", "magnitude", "sensitivity")}
    assert len(set(cut.values())) == 4, "every way keeps other ranks"
    assert all(loss != whole for loss in cut.values())
    curve = found["manual seed 0 | curve of 4 steps"]
    assert curve["at"]["1"] > curve["at"]["2"] == curve["loss"]
    assert truncation.main([*arguments, "--picture", str(tmp_path / "curve.png")]) == found, "it is read again"
    assert (tmp_path / "curve.png").is_file()


def test_second_derivatives_of_gates() -> None:
    """Against differences of the loss itself; with one rank random signs are exact."""
    model = adapted(tiny_llama(1), r=1, target_modules=["down_proj"]).double().eval()
    layers, batch = find_layers(model), token_batch()
    (layer,) = layers.values()
    with torch.no_grad():
        layer.B.mul_(10)
    found = hessian_diagonal(model, layers, batch, 1.0, draws=2)

    @torch.no_grad()
    def loss(gate: float) -> float:
        layer.gate = torch.tensor([gate], dtype=torch.float64)
        return float(model(**batch).loss)

    step = 0.2
    expected = (loss(1 + step) - 2 * loss(1) + loss(1 - step)) / step**2
    assert abs(expected) > 1e-3, "hardly curved: this test would pass with any"
    assert float(found) == pytest.approx(expected, rel=0.05)


def test_a_ratio_is_the_median_of_the_quotients_within_a_turn() -> None:
    seconds = {"ours": [1.0, 20.0, 3.0], "theirs": [2.0, 10.0, 4.0]}
    assert measuring.ratio(seconds, "ours", "theirs") == 0.75


def test_turns_begin_with_one_after_the_other() -> None:
    called: list[str] = []
    runs = {name: (lambda name=name: called.append(name)) for name in "abc"}
    seconds = measuring.interleaved(runs, 3, torch.device("cpu"))
    assert "".join(called) == "abc" + "abc" + "bca" + "cab"
    assert all(len(times) == 3 for times in seconds.values())


def test_saved_bytes_are_counted_once_and_without_parameters() -> None:
    linear = torch.nn.Linear(256, 256, bias=False)
    x = torch.randn(512, 256)
    # x (once, though two operations keep it), and what is squared
    assert measuring.saved_mib(linear, lambda: (linear(x) * x).square().sum()) == pytest.approx(2 * 0.5)


def test_counting_saved_bytes_frees_them_again() -> None:
    x = torch.randn(4, requires_grad=True)
    outputs: list[weakref.ref[torch.Tensor]] = []

    def forward() -> torch.Tensor:
        output = x.exp()  # saves what it returns
        outputs.append(weakref.ref(output.untyped_storage()))
        return output.sum()

    measuring.saved_mib(torch.nn.Identity(), forward)
    assert outputs[0]() is None


def test_the_peak_is_what_is_held_at_once() -> None:
    def run() -> None:
        for _ in range(3):
            a = torch.ones(2**18)  # 1 MiB
            b = a + 1
            del a, b

    assert measuring.peak_mib(run, torch.device("cpu")) == pytest.approx(2, abs=0.01)


def test_options_are_compared_with_their_own_form_seed_by_seed(tmp_path: Path) -> None:
    results = Results(tmp_path / "options.jsonl")
    losses = {"alora": (4.0, 5.0), "alora_mean": (3.5, 4.7), "ard_both": (1.0,)}
    assert all(method.allocator() for _, method in options.OPTIONS.values())  # their settings are valid
    for name, values in losses.items():
        for seed, loss in enumerate(values):
            line = Run("manual", name, options.STEPS, options.LR, seed)
            assert results.claim(line)
            results.add(line, {**vars(line), "report": loss, "parameters": 100 + seed})
    assert options.table(results).splitlines()[2:] == [
        "| ALoRA | 4.500 | – | 100 | 2 |",
        '| `second_moments="mean"` | 4.100 | -0.400 ± 0.100 | 100 | 2 |',
    ]


def test_the_tables_of_larger_models_are_those_of_the_page() -> None:
    page = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text(encoding="utf-8")
    machine, work = scaling.Machine(), scaling.Workload()
    for text in (
        scaling.methods_table(machine, work),
        scaling.gpus_table(machine, work),
        scaling.papers_table(machine),
    ):
        assert text in page


def test_the_shapes_of_larger_models_have_their_parameters() -> None:
    sizes = {name: model.parameters for name, model in scaling.MODELS.items()}
    assert sizes == {
        "Llama 3.2 1B": 1_235_814_400,
        "Llama 3.1 8B": 8_030_261_248,
        "Llama 3.1 70B": 70_553_706_496,
    }
    tiny = scaling.Model(1, 32, 16, 64, 100)
    assert tiny.adapter(4) == sum(4 * (a + b) for a, b in tiny.maps)


def test_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randint(0, 256, (24, experts.LENGTH), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(experts, "books", lambda: rows)
    monkeypatch.setattr(experts, "problems", lambda: (rows, rows[:8], rows[8:16]))
    toy = [str(tmp_path), "--steps", "7", "--pretrain", "1", "--rates", "0.01"]
    methods = ["--methods", "static", "balanced", "--seeds", "0"]
    found = experts.main([*toy, *methods])
    assert found == experts.main([*toy, *methods])  # from the file, without a further run
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2
    static, balanced = (line.split("|") for line in found.splitlines()[2:])
    assert static[3].strip() == "12,032"
    assert int(balanced[3].replace(",", "")) <= 12_032
    shown = experts.main([*toy, "--differences"])
    assert shown.count("of the mean") == 4
    assert "| 12.5 % |" in shown


def test_glyphs_are_drawn_alike_again_and_every_class_is_as_likely() -> None:
    glyphs, classes = pretrain_vit.draw_glyphs(("DejaVuSans", "cmr10"))
    assert glyphs.shape == (2 * 62, 1, 48, 48)
    assert glyphs.flatten(1).max(1).values.min() > 0.9, "every glyph has ink"
    assert torch.bincount(classes).tolist() == [2] * 10 + [4] * 26, "a letter is one class in either case"
    (images, drawn), again = (
        pretrain_vit.draw_images(glyphs, classes, 3600, torch.Generator().manual_seed(0)) for _ in range(2)
    )
    assert torch.equal(images, again[0])
    assert torch.equal(drawn, again[1])
    assert images.shape == (3600, 1, 8, 8)
    assert -1 <= images.min() < images.mean() < 0 < images.max() <= 1, "more paper than ink"
    counts = torch.bincount(drawn, minlength=36)
    assert 60 < counts.min() <= counts.max() < 145  # 100 ± 10


def test_pretraining_writes_a_model_and_its_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain_vit, "VALIDATION", 32)
    pretrain_vit.train(run=tmp_path / "run", steps=3, batch=8)
    pretrain_vit.export(run=tmp_path / "run", out=tmp_path / "model", machine="a test")
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        "config.json",
        "model.safetensors",
        "MODEL_CARD.md",
    }
    assert (tmp_path / "model" / "model.safetensors").stat().st_size < 2e6
    card = (tmp_path / "model" / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "| steps | 3 of 8 images |" in card
    assert "| machine | a test |" in card
