"""`lorank score` and `lorank prune` on adapters that plain PEFT trained, without lorank."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner, Result

from lorank.allocators import Budget
from lorank.cli.app import app
from lorank.experiments.adapter_session import load_finished
from lorank.experiments.posthoc import prune
from lorank.experiments.scores import score
from lorank.lora import AdapterLayers, LayerPlan, find_layers, resize_, save_adapter
from lorank.scoring import balanced_scores
from lorank.tasks import mean_loss
from tests.elsewhere import Case, reload

TEXT = "The quick brown fox jumps over the lazy dog, and the dog sleeps on. "


def lorank(*arguments: str | Path) -> Result:
    return CliRunner(env={"COLUMNS": "400", "LORANK_DATA": None}).invoke(app, [str(part) for part in arguments])


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for split, count in {"train": 20, "validation": 30}.items():
        rows = [{"text": TEXT * 3 + f"Line {index} of {split}."} for index in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def adapter(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty steps of plain PEFT; modules differ in cost per rank."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_folder),
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"),
    )
    ids = torch.tensor([tokenizer(TEXT * 2)["input_ids"]])
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    for _ in range(20):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("plain") / "adapter"
    model.save_pretrained(folder)
    return folder


def size(folder: Path) -> int:
    return sum(tensor.numel() for tensor in load_file(folder / "adapter_model.safetensors").values())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("by", ["balanced", "ablation", "first_order", "screen", "saliency"])
def test_half_of_an_adapter(adapter: Path, texts: Path, tmp_path: Path, by: str) -> None:
    before = contents(adapter)
    out = tmp_path / "half"
    result = lorank("prune", adapter, "--budget", "50%", "--data", texts, "--by", by, "--samples", 4, "--out", out,
                    "task.block_size=32")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert contents(adapter) == before
    assert 0.4 * size(adapter) < size(out) <= 0.5 * size(adapter)
    assert f"{size(adapter):,} → {size(out):,}" in result.stdout
    assert "lorank" not in (out / "adapter_config.json").read_text()

    # the loss that was reported is the loss of what is on disk, loaded without lorank, on examples held apart
    opened = load_finished(adapter, data=str(texts), overrides=["task.block_size=32"])
    held = opened.task.validation[4:]
    losses = []
    for folder in (adapter, out):
        base = AutoModelForCausalLM.from_pretrained(opened.config.model.name)
        model = PeftModel.from_pretrained(base, str(folder)).eval()
        losses.append(mean_loss(model, held, opened.task.collator, batch_size=8, progress=False))
    assert f"{losses[0]:.4f} → {losses[1]:.4f} ({len(held)} examples)" in result.stdout
    if by != "ablation":  # one fresh process is enough: they save alike
        return
    batch = dict(opened.task.collator(held[:2]))  # plain, so that torch.load reads it safely
    batch.pop("labels")
    torch.save(batch, tmp_path / "batch.pt")
    case = Case(opened.config.model.name, str(out), str(tmp_path / "batch.pt"), str(tmp_path / "out.pt"))
    (elsewhere,) = reload([case], tmp_path)
    torch.testing.assert_close(elsewhere["logits"], elsewhere["merged"], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        here = model(**batch).logits
    assert torch.equal(elsewhere["logits"], here)


@pytest.mark.parametrize(
    ("options", "met"),
    [
        (["--budget", "1"], lambda ranks, folder: sum(ranks) == 6),
        (["--budget", "7 ranks"], lambda ranks, folder: sum(ranks) == 7),
        (["--budget", "1k"], lambda ranks, folder: size(folder) <= 1000),
        (["--budget", "0.2% of base"], lambda ranks, folder: 250 < size(folder) <= 0.002 * 277_664),
        (["--budget", "4kB"], lambda ranks, folder: 4 * size(folder) <= 4000),
        (["--max-lora-rank", "2"], lambda ranks, folder: set(ranks) == {2}),
        (["--budget", "50%", "--max-lora-rank", "2"], lambda ranks, folder: max(ranks) <= 2),
    ],
)
def test_every_unit_of_a_budget(adapter: Path, texts: Path, tmp_path: Path, options: list[str], met) -> None:
    out = tmp_path / "small"
    result = lorank("prune", adapter, *options, "--data", texts, "--by", "saliency", "--samples", 4, "--out", out)
    assert result.exit_code == 0, result.output
    weights = load_file(out / "adapter_model.safetensors")
    ranks = [len(tensor) for key, tensor in weights.items() if "lora_A" in key]
    assert met(ranks, out), ranks


def test_scores_are_shown_and_written_and_change_nothing(adapter: Path, texts: Path, tmp_path: Path) -> None:
    before = contents(adapter)
    written = tmp_path / "scores.json"
    result = lorank("score", adapter, "--data", texts, "--samples", 4, "--by", "ablation", "--terms",
                    "without", "--out", written)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert contents(adapter) == before
    scores = json.loads(written.read_text())
    assert (scores["by"], scores["samples"]) == ("ablation", 4)
    assert {len(values) for values in scores["scores"].values()} == {4}
    for name, values in scores["scores"].items():
        line = next(line for line in result.stdout.splitlines() if name in line)
        assert f"{min(values):.3g}" in line
        assert f"{max(values):.3g}" in line
        lowest = sorted(range(4), key=lambda rank: values[rank])
        assert " ".join(map(str, lowest)) in line
    # the scores are what their name says: the loss without one rank, by hand
    opened = load_finished(adapter, data=str(texts))
    batch = opened.task.collator(opened.task.validation[:4])
    name, layer = next(iter(opened.layers.items()))
    with torch.no_grad():
        whole = float(opened.model(**batch).loss)
        layer.B[:, 1] = 0
        without = float(opened.model(**batch).loss)
    assert scores["loss"] == pytest.approx(whole, abs=1e-5)
    assert scores["scores"][name][1] == pytest.approx(without - whole, abs=1e-5)


def test_balanced_scores_are_of_the_balanced_basis(adapter: Path, texts: Path, tmp_path: Path) -> None:
    """They descend, say so, and predict the loss of the smallest of them exactly enough."""
    written = tmp_path / "scores.json"
    options = ["--data", texts, "--samples", 16, "task.block_size=32"]
    result = lorank("score", adapter, *options, "--by", "balanced", "--out", written)
    assert result.exit_code == 0, result.output
    assert "not of the ranks as they were trained" in " ".join(result.stdout.split())  # lines are wrapped
    scores = json.loads(written.read_text())
    assert (scores["by"], scores["basis"]) == ("balanced", "balanced")
    opened = load_finished(adapter, data=str(texts), overrides=["task.block_size=32"])
    for name, values in scores["scores"].items():
        assert values == sorted(values, reverse=True)
        line = next(line for line in result.stdout.splitlines() if name in line)
        assert f"{max(values) / 2:.3g}" in line  # Δloss
        held = next(k for k in range(1, 5) if sum(values[:k]) >= 0.95 * sum(values))
        assert line.split("│")[-2].strip() == str(held)
    found = balanced_scores(
        opened.model,
        opened.layers,
        [opened.task.collator(opened.task.validation[start : start + 8]) for start in (0, 8)],
    )
    assert scores["scores"] == {name: one.worth.tolist() for name, one in found.items()}


def test_a_balanced_cut_says_what_it_predicted(adapter: Path, texts: Path, tmp_path: Path) -> None:
    options = ["--data", texts, "--samples", 8, "--budget", "30%", "task.block_size=32"]
    predicted = {}
    for stages in (None, 1, 2):
        out = tmp_path / f"{stages}"
        given = [] if stages is None else ["--stages", stages]
        result = lorank("prune", adapter, *options, *given, "--out", out)
        assert result.exit_code == 0, result.output
        line = next(line for line in result.stdout.splitlines() if "predicted increase" in line)
        predicted[stages] = float(line.split("│")[-2])
        assert size(out) <= 0.3 * size(adapter)
    assert predicted[None] == predicted[2] != predicted[1]  # the help states the default
    assert predicted[1] > 0


def test_the_best_ranks_are_kept_value_for_value(adapter: Path, texts: Path, tmp_path: Path) -> None:
    options = ["--data", texts, "--by", "saliency", "--samples", 4]
    assert lorank("score", adapter, *options, "--out", tmp_path / "scores.json").exit_code == 0
    assert lorank("prune", adapter, *options, "--budget", "9 ranks", "--out", tmp_path / "nine").exit_code == 0
    scores = json.loads((tmp_path / "scores.json").read_text())["scores"]
    order = sorted(
        ((value, name, rank) for name, row in scores.items() for rank, value in enumerate(row)), reverse=True
    )
    old, new = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "nine"))
    for name in scores:
        kept = sorted(rank for _, owner, rank in order[:9] if owner == name)
        key = f"base_model.model.{name}.lora_A.weight"
        if kept:
            assert torch.equal(new[key], old[key][kept])
        else:
            assert key not in new


def test_a_classifier_and_the_folder_of_a_run(recipe: Path, values: dict, tmp_path: Path) -> None:
    assert lorank("train", recipe, "training.max_steps=4", "allocator={name: static}").exit_code == 0
    run = Path(values["output_dir"])
    for place in (run, run / "adapter"):
        result = lorank("prune", place, "--budget", "50%", "--samples", 8, "--out", tmp_path / f"half_{place.name}")
        assert result.exit_code == 0, result.output
        assert "16 → 8" in result.stdout
    base = AutoModelForSequenceClassification.from_pretrained(values["model"]["name"], num_labels=2)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "half_adapter"))
    trained = load_file(run / "adapter" / "adapter_model.safetensors")
    head = next(value for key, value in trained.items() if key.endswith("score.weight"))
    assert torch.equal(loaded.base_model.model.score.modules_to_save["default"].weight, head)
    again = lorank("prune", run, "--budget", "25%", "--samples", 8, "--out", tmp_path / "half_adapter")
    assert again.exit_code == 2
    assert "already exists" in again.stderr
    assert (
        lorank(
            "prune", run, "--budget", "25%", "--samples", 8, "--out", tmp_path / "half_adapter", "--overwrite"
        ).exit_code
        == 0
    )


def test_the_adapter_itself_is_never_overwritten(adapter: Path, texts: Path) -> None:
    before = contents(adapter)
    result = lorank("prune", adapter, "--budget", "50%", "--data", texts, "--out", adapter, "--overwrite")
    assert result.exit_code == 2
    assert "is the adapter itself" in result.stderr
    assert contents(adapter) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "100%"], "less than 100 per cent of the adapter"),
        (["--budget", "4"], "already fits the budget (4 of 4 ranks_per_module)"),
        (["--budget", "200 ranks"], "is more than the 160 ranks that 6 modules can hold"),
        (["--budget", "3 apples"], "'3 apples': expected"),
        (["--budget", "1 params"], "is less than the 48 parameters that 6 modules need"),
        ([], "give a budget: --budget '50% of adapter'"),
        (
            ["--budget", "50%", "--by", "magic"],
            "expected one of balanced, ablation, first_order, screen, saliency",
        ),
        (["--budget", "50%", "--by", "saliency", "--stages", "2"], "--by saliency cuts at once: leave --stages out"),
        (["--budget", "50%", "task.blok_size=3"], "did you mean task.block_size"),
        (["--budget", "50%", "--model", "./nowhere"], "'./nowhere' cannot be loaded"),
    ],
)
def test_mistakes_in_options(adapter: Path, texts: Path, tmp_path: Path, options: list[str], message: str) -> None:
    result = lorank("prune", adapter, *options, "--data", texts, "--samples", 4, "--out", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_overwriting_replaces_the_adapter_and_no_other_file(adapter: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(adapter, out)
    theirs = {"checkpoint-4/optimizer.pt": "moments", "tokenizer.json": "{}", "notes.txt": "mine"}
    for name, text in theirs.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text(text)
    (out / "README.md").write_text("my own words")
    before = {name: (out / name).stat() for name in (*theirs, "README.md")}
    options = ["--budget", "50%", "--data", texts, "--by", "saliency", "--samples", 4, "--overwrite"]
    result = lorank("prune", adapter, *options, "--out", out)
    assert result.exit_code == 0, result.output
    assert size(out) <= 0.5 * size(adapter)
    for name, stat in before.items():
        assert (out / name).stat().st_mtime_ns == stat.st_mtime_ns
        assert (out / name).stat().st_ino == stat.st_ino
        assert (out / name).read_text() == theirs.get(name, "my own words")
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    result = lorank("prune", adapter, *options, "--out", precious, "--model", "no/such/model")
    assert "exists and is not an adapter's folder" in result.stderr  # said before the model is loaded
    assert contents(precious) == {"thesis.txt": b"years of work"}


def test_scores_replace_scores_and_no_other_file(adapter: Path, texts: Path, tmp_path: Path) -> None:
    options = [adapter, "--data", texts, "--by", "saliency", "--samples", 4, "--out"]
    for _ in range(2):
        assert lorank("score", *options, tmp_path / "scores.json").exit_code == 0
    (tmp_path / "notes.json").write_text("{}")
    for out, message in ((tmp_path / "notes.json", "does not hold scores"), (tmp_path, "is a folder: name a file")):
        refused = lorank("score", *options, out, "--model", "no/such/model")
        assert refused.exit_code == 2
        assert message in refused.stderr  # before the model is loaded
    assert (tmp_path / "notes.json").read_text() == "{}"


def test_the_figures_are_those_of_the_files(
    adapter: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault of the writer shows in the figures: this one leaves a module out and writes updates of another sign."""

    def save_wrongly(layers: AdapterLayers, directory: Path) -> Path:
        resize_(layers, {next(iter(layers)): LayerPlan(())})
        for layer in layers.values():
            layer.B.data.neg_()
        written = save_adapter(layers, directory)
        for layer in layers.values():
            layer.B.data.neg_()
        return written

    monkeypatch.setattr("lorank.experiments.posthoc.save_adapter", save_wrongly)
    loaded = load_finished(adapter, data=str(texts))
    scored = score(loaded, by="saliency", samples=4)
    pruned = prune(loaded, scored, Budget(ranks=12), tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(loaded.config.model.name)
    written = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    found = mean_loss(written, loaded.held_apart(4), loaded.task.collator, batch_size=8, progress=False)
    assert pruned.loss[1] == pytest.approx(found, abs=1e-5)
    assert pruned.parameters[1] == size(tmp_path / "out")
    after = {name: rank for name, (_, rank) in pruned.ranks.items()}
    assert {name: rank for name, rank in after.items() if rank} == find_layers(written).ranks
    assert set(loaded.layers.ranks.values()) == {4}  # the model in memory is as it was, for the next budget
    assert after[next(iter(after))] == 0


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT, of bases that it changes
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_whose_initialisation_changed_the_base(
    init: str, model_folder: Path, texts: Path, tmp_path: Path
) -> None:
    """Scores are those of what PEFT loads. Pruning is refused before a model is loaded, and the remedy works."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_folder),
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=init),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(1.5)
    model.save_pretrained(tmp_path / "adapter")
    data = ["--data", texts, "--by", "saliency", "--samples", 4]
    result = lorank("score", tmp_path / "adapter", *data, "--out", tmp_path / "scores.json")
    assert result.exit_code == 0, result.output
    opened = load_finished(tmp_path / "adapter", data=str(texts))
    loss = mean_loss(model.eval(), opened.task.validation[:4], opened.task.collator, batch_size=8, progress=False)
    assert json.loads((tmp_path / "scores.json").read_text())["loss"] == pytest.approx(loss, abs=1e-4)

    refused = lorank(
        "prune", tmp_path / "adapter", "--budget", "50%", *data, "--out", tmp_path / "half", "--model", "no/such/model"
    )
    assert refused.exit_code == 2
    assert f"made with init_lora_weights='{init}'" in refused.stderr
    assert "Save the changed base as a base model of its own" in refused.stderr
    assert not (tmp_path / "half").exists()

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), tmp_path / "adapter")
    config = model.peft_config["default"]
    config.init_lora_weights, config.base_model_name_or_path = True, str(tmp_path / "base")
    model.save_pretrained(tmp_path / "plain")
    model.unload().save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path / "base")
    result = lorank("prune", tmp_path / "plain", "--budget", "50%", *data, "--out", tmp_path / "half")
    assert result.exit_code == 0, result.output
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    half = PeftModel.from_pretrained(base, tmp_path / "half").eval()
    held = opened.task.validation[4:]
    losses = [mean_loss(m, held, opened.task.collator, batch_size=8, progress=False) for m in (opened.model, half)]
    assert f"{losses[0]:.4f} → {losses[1]:.4f}" in result.stdout


def test_no_data(adapter: Path) -> None:
    result = lorank("score", adapter)
    assert result.exit_code == 2
    assert "no data to score the ranks on: give --data" in result.stderr


def test_folders_that_are_no_adapter(model_folder: Path, texts: Path, adapter: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    PeftModel.from_pretrained(base, str(adapter)).merge_and_unload().save_pretrained(merged)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    (broken / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes()[:-100])
    other = tmp_path / "other"
    other.mkdir()
    (other / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    for folder, message in (
        (tmp_path / "nowhere", "there is no such folder"),
        (texts, "has no adapter_config.json"),
        (merged, "It holds a whole model, in which no ranks are left"),
        (broken, "cannot be read"),
        (other, "has peft_type 'IA3', expected 'LORA'"),
    ):
        result = lorank("score", folder, "--data", texts)
        assert result.exit_code == 2
        assert message in result.stderr


@pytest.mark.parametrize(
    ("changes", "message"), [({"hidden_size": 16}, "size mismatch"), ({"layers": 1}, "only in the file")]
)
def test_another_model_than_the_adapters(
    changes: dict, message: str, model_folder: Path, adapter: Path, texts: Path, tmp_path: Path
) -> None:
    from tests.models import tiny_llama

    settings = {"vocab_size": 4096, "max_position_embeddings": 256, "pad_token_id": 2, "eos_token_id": 1}
    tiny_llama(**settings, **changes).save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path / "other")
    result = lorank("score", adapter, "--data", texts, "--model", tmp_path / "other", "task.block_size=32")
    assert result.exit_code == 2, result.output
    assert "does not fit this model" in result.stderr
    assert message in result.stderr


def test_an_adapter_that_names_no_model(adapter: Path, texts: Path, tmp_path: Path) -> None:
    for path in adapter.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((adapter / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    result = lorank("score", tmp_path, "--data", texts)
    assert result.exit_code == 2
    assert "does not name its base model: give --model" in result.stderr
    assert lorank("score", tmp_path, "--data", texts, "--by", "saliency", "--model",
                  config["base_model_name_or_path"]).exit_code == 0  # fmt: skip


def test_several_budgets_from_one_scoring_are_those_of_each_alone(adapter: Path, texts: Path, tmp_path: Path) -> None:
    options = ["--data", texts, "--samples", 4, "task.block_size=32"]
    result = lorank("prune", adapter, *options, "--budget", "75%,9 ranks", "--budget", "0.2% of base",
                    "--out", tmp_path / "cuts", "--json")  # fmt: skip
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    budgets = [one["budget"] for one in values["pruned"]]
    assert budgets == ["75 % of adapter", "9 ranks", "0.2 % of base"]  # a percentage says of what
    assert values["loss"] < min(one["loss"] for one in values["pruned"])
    alone = lorank("prune", adapter, *options, "--budget", "9 ranks", "--out", tmp_path / "alone")
    assert alone.exit_code == 0, alone.output
    assert "9 ranks" in alone.stdout
    assert "% of adapter)" in alone.stdout
    folder = Path(values["pruned"][1]["folder"])
    assert contents(folder)["adapter_model.safetensors"] == contents(tmp_path / "alone")["adapter_model.safetensors"]
    assert sorted(path.name for path in (tmp_path / "cuts").iterdir()) == [
        "0.2_percent_of_base", "75_percent_of_adapter", "9_ranks",
    ]  # fmt: skip


@pytest.mark.parametrize("by", ["balanced", "first_order"])
def test_scores_are_reused(
    adapter: Path, texts: Path, tmp_path: Path, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--data", texts, "--samples", 4, "task.block_size=32"]
    file = tmp_path / "scores.json"
    assert lorank("score", adapter, *options, "--by", by, "--out", file).exit_code == 0
    new = lorank("prune", adapter, *options, "--by", by, "--budget", "50%", "--out", tmp_path / "new")
    assert new.exit_code == 0, new.output
    monkeypatch.setattr("lorank.experiments.scores.score", None)  # not called again
    old = lorank("prune", adapter, *options, "--scores", file, "--budget", "50%", "--out", tmp_path / "old")
    assert old.exit_code == 0, old.output
    assert contents(tmp_path / "old") == contents(tmp_path / "new")
    # of another state of the adapter, they are refused
    changed = shutil.copytree(tmp_path / "new", tmp_path / "changed")
    refused = lorank("prune", changed, *options, "--scores", file, "--budget", "50%", "--out", tmp_path / "no")
    assert refused.exit_code == 2
    assert "whose weights are not those of" in refused.stderr
    file.write_text("{}")
    broken = lorank("prune", adapter, *options, "--scores", file, "--budget", "50%", "--out", tmp_path / "no")
    assert "cannot be read as scores" in broken.stderr
    assert not (tmp_path / "no").exists()


def test_scores_are_what_the_loss_rises_by_sorted_and_summed(adapter: Path, texts: Path, tmp_path: Path) -> None:
    """By default: fast, and it says how long the slow way takes. Both terms are what their names say."""
    options = ["--data", texts, "--samples", 4]
    fast = lorank("score", adapter, *options)
    assert fast.exit_code == 0, fast.output
    assert "exact ablation (--by ablation): 49 evaluations, up to" in " ".join(fast.stdout.split())
    assert "Δloss" in fast.stdout
    exact = lorank("score", adapter, *options, "--by", "ablation", "--json")
    values = json.loads(exact.stdout)
    first = json.loads(lorank("score", adapter, *options, "--json").stdout)
    sums = list(values["projections"].values())
    assert sums == sorted(sums, reverse=True)
    assert sum(sums) == pytest.approx(sum(map(sum, values["delta_loss"].values())))
    for name, row in values["delta_loss"].items():
        for rank, without in enumerate(row):
            alone = values["gain_alone"][name][rank]
            score = values["scores"][name][rank]
            # IS = Δloss − L(r alone) = Δloss + gain − L(no rank): the same constant for all
            assert score - without - alone == pytest.approx(
                values["scores"][next(iter(values["scores"]))][0]
                - next(iter(values["delta_loss"].values()))[0]
                - next(iter(values["gain_alone"].values()))[0],
                abs=1e-4,
            )
    assert first["by"] == "first_order"
    opened = load_finished(adapter, data=str(texts))
    batch = opened.task.collator(opened.task.validation[:4])
    name, layer = next(iter(opened.layers.items()))
    with torch.no_grad():
        whole = float(opened.model(**batch).loss)
        for other in opened.layers.values():
            if other is not layer:
                other.B.zero_()
        layer.B[:, 1:] = 0
        alone = float(opened.model(**batch).loss)
        layer.B.zero_()
        empty = float(opened.model(**batch).loss)
    assert values["loss"] == pytest.approx(whole, abs=1e-5)
    assert values["gain_alone"][name][0] == pytest.approx(empty - alone, abs=1e-5)
