"""Each program's own loading code reads lorank's exports, and its results are compared with PEFT's (docs/serving.md).

One script for each program. They need packages that lorank does not need, and several of them other versions of what
lorank needs, so each is run in an environment of its own:

    python -m benchmarks.servers.mlx_lm               # pip install "mlx[cpu]" mlx-lm
    python -m benchmarks.servers.diffusers            # pip install diffusers
    python -m benchmarks.servers.vllm                 # pip install --no-deps vllm
    python -m benchmarks.servers.sglang               # pip install --no-deps sglang
    python -m benchmarks.servers.llama_cpp CHECKOUT   # pip install gguf xllamacpp, and a checkout of llama.cpp

Without the package, a script says so and exits with status 77.
"""
