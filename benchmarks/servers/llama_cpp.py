"""llama.cpp's converter and its runtime: python -m benchmarks.servers.llama_cpp CHECKOUT [--converter-only]

CHECKOUT is a folder with llama.cpp's convert_lora_to_gguf.py and convert_hf_to_gguf.py (the source package of
llama-cpp-python has them in vendor/llama.cpp).

For every architecture that lorank's form `gguf` knows, the tensors of lorank's file are compared with those that
convert_lora_to_gguf.py makes of the form `tight`. Then, if xllamacpp is installed, llama.cpp runs the packaged tiny
Llama with lorank's file, and its log-probabilities are compared with PEFT's.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model

from benchmarks.servers.example import BASE, need, peft_logits, report, save_example, tokens

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
VOCABULARY = 4096
LENGTHS = (5, 17, 48)


def converter_agrees(checkout: Path, kind: str, folder: Path) -> str:
    """What convert_lora_to_gguf.py makes of an adapter, beside what lorank makes: "equal", or what differs."""
    import gguf

    from lorank import export_adapter

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZES)
    base = transformers.AutoModelForCausalLM.from_config(config)
    base.save_pretrained(folder / "base")
    model: Any = get_peft_model(
        base, LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", init_lora_weights=False)
    )
    model.save_pretrained(folder / "adapter")
    export_adapter(folder / "adapter", folder / "gguf", "gguf", base=folder / "base")
    export_adapter(folder / "adapter", folder / "tight", "tight")
    done = convert_lora(checkout, folder / "base", folder / "tight", folder / "theirs.gguf")
    if done.returncode:
        return f"their converter failed: {done.stderr.strip().splitlines()[-1]}"

    def read(path: Path) -> tuple[dict[str, Any], str, float]:
        reader = gguf.GGUFReader(path)
        fields = reader.fields
        tensors = {one.name: torch.from_numpy(one.data.copy()) for one in reader.tensors}
        return tensors, fields["general.architecture"].contents(), fields["adapter.lora.alpha"].contents()

    ours, theirs = read(folder / "gguf" / "adapter.gguf"), read(folder / "theirs.gguf")
    if ours[1:] != theirs[1:] or ours[0].keys() != theirs[0].keys():
        return f"differ: {ours[1:]}, {theirs[1:]}, {sorted(ours[0].keys() ^ theirs[0].keys())[:4]}"
    unequal = [name for name, value in ours[0].items() if not torch.equal(value, theirs[0][name])]
    return f"differ: {unequal[:4]}" if unequal else f"equal, {len(ours[0])} tensors"


def convert_lora(checkout: Path, base: Path, adapter: Path, outfile: Path) -> subprocess.CompletedProcess[str]:
    """llama.cpp's own conversion of an adapter in PEFT's format."""
    script = [sys.executable, str(checkout / "convert_lora_to_gguf.py"), "--base", str(base)]
    return subprocess.run(
        [*script, "--outfile", str(outfile), str(adapter)], capture_output=True, text=True, check=False
    )


def convert_base(checkout: Path, outfile: Path) -> None:
    """The tiny Llama as GGUF, float32. llama.cpp does not know its tokenizer, and is given numbers of tokens."""
    patched = (
        "import sys, runpy; sys.path.insert(0, sys.argv[1]); sys.argv = sys.argv[1:]; import conversion.base as base; "
        "base.TextModel.get_vocab_base_pre = lambda self, tokenizer: 'default'; "
        "sys.argv[0] += '/convert_hf_to_gguf.py'; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    options = [BASE, "--outtype", "f32", "--outfile", str(outfile)]
    subprocess.run([sys.executable, "-c", patched, str(checkout), *options], check=True, capture_output=True)


def log_probabilities(base: Path, adapter: Path | None) -> torch.Tensor:
    """llama.cpp's log-probabilities of the next token, after prompts of several lengths, (lengths, vocabulary)."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(base)
    params.n_ctx, params.warmup = 256, False
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32  # float16 otherwise
    if adapter is not None:
        lora = xllamacpp.CommonAdapterLoraInfo()
        lora.path, lora.scale = str(adapter), 1.0
        params.lora_adapters = [lora]
    server, rows = xllamacpp.Server(params), []
    for length in LENGTHS:
        prompt = tokens()[0, :length].tolist()
        wanted = {"prompt": prompt, "max_tokens": 1, "logprobs": 1, "n_probs": VOCABULARY, "temperature": 1.0}
        answer = server.handle_completions({**wanted, "samplers": [], "cache_prompt": False})
        row = torch.full((VOCABULARY,), float("nan"))
        for one in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            row[one["id"]] = one["logprob"]
        rows.append(row)
    return torch.stack(rows)


def pefts_log_probabilities(adapter: Path | None) -> torch.Tensor:
    return peft_logits(adapter).double().log_softmax(-1)[[length - 1 for length in LENGTHS]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--converter-only", action="store_true")
    arguments = parser.parse_args()
    need("gguf")
    from lorank import export_adapter
    from lorank.lora.export.gguf_file import ARCHITECTURES

    passed = True
    for kind in ARCHITECTURES:
        with tempfile.TemporaryDirectory() as temporary:
            found = converter_agrees(arguments.checkout, kind, Path(temporary))
        passed &= found.startswith("equal")
        print(f"convert_lora_to_gguf.py, {kind}: {found}", flush=True)
    if arguments.converter_only:
        return 0 if passed else 1
    need("xllamacpp")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        adapter = save_example(folder / "adapter")
        convert_base(arguments.checkout, folder / "base.gguf")
        export_adapter(adapter, folder / "gguf", "gguf")
        for form, own, peft in (("base model", None, None), ("gguf", folder / "gguf" / "adapter.gguf", adapter)):
            found = log_probabilities(folder / "base.gguf", own)
            what = "log-probabilities"
            passed &= report("llama.cpp", "xllamacpp", form, found, pefts_log_probabilities(peft), what)
        convert_lora(arguments.checkout, Path(BASE), adapter, folder / "wrong.gguf").check_returncode()
        found, wanted = log_probabilities(folder / "base.gguf", folder / "wrong.gguf"), pefts_log_probabilities(adapter)
        report("llama.cpp", "xllamacpp", "its own conversion of what lorank saves", found, wanted, what)
        report("llama.cpp", "xllamacpp", "PEFT without the adapter", pefts_log_probabilities(None), wanted, what)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
