"""What `pip install lorank` is enough for, from beginning to end:  python core_alone.py FOLDER [HIDDEN …]

Trains a tiny Llama with moving ranks, in a loop of its own and under the Trainer, resumes, reads the history, saves and
reloads by plain PEFT. Modules named after the folder cannot be imported, as if their packages were not installed.
Needs neither the tests nor what they need, so that it runs in an environment with lorank alone.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any


def hide(*modules: str) -> None:
    """Makes modules impossible to find in this process."""
    find = PathFinder.find_spec

    def find_others(name: str, *where: Any) -> ModuleSpec | None:
        return None if name.partition(".")[0] in modules else find(name, *where)

    PathFinder.find_spec = staticmethod(find_others)  # type: ignore[method-assign]  # for this process alone


def main(folder: Path) -> None:
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    import lorank

    def base() -> LlamaForCausalLM:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        return LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=64, **sizes))

    def adapted() -> PeftModel:
        return get_peft_model(base(), LoraConfig(r=4, target_modules="all-linear"))

    def allocator() -> lorank.ALoRA:
        return lorank.ALoRA(unit="steps", k1=5, k2=5, rounds=3, per_round=4)

    tokens = torch.randint(0, 64, (16, 12), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    batch = {"input_ids": tokens[:4], "labels": tokens[:4]}

    model = adapted()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    ranks = lorank.attach(model, optimizer, allocator(), validation_batch=batch, total_steps=20)
    before = lorank.find_layers(model).ranks
    for _ in range(20):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = lorank.find_layers(model).ranks
    assert after != before, "no rank has moved"
    lorank.save_adapter(lorank.find_layers(model), folder / "loop")
    reloaded = PeftModel.from_pretrained(base(), folder / "loop")
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch).loss, reloaded.eval()(**batch).loss), "the saved adapter is another"
    print(f"a loop: {len(ranks.history.allocations)} allocations, ranks {min(after.values())} to {max(after.values())}")

    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=20,
        save_steps=10,
        per_device_train_batch_size=4,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    results = []
    for resumed in (False, True):
        model = adapted()
        history = folder / "history.jsonl"
        callback = lorank.RankCallback(allocator(), validation_batch=batch, history_path=history)
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[callback])
        trainer.train(resume_from_checkpoint=str(folder / "trainer" / "checkpoint-10") if resumed else None)
        records = lorank.read_history(history)
        assert len(records) == 4, "expected the beginning and three allocations"
        assert records[-1].ranks == lorank.find_layers(model).ranks
        with torch.no_grad():
            results.append((records[-1].ranks, float(model.eval()(**batch).loss)))
    assert results[0] == results[1], "a resumed run ended elsewhere"
    print(f"the Trainer: resumed after 10 of 20 steps, loss {results[1][1]:.4f} as without the interruption")


if __name__ == "__main__":
    hide(*sys.argv[2:])
    main(Path(sys.argv[1]))
