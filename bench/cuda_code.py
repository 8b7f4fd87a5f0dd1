"""The code that torch.compile makes for a GPU, on a machine that has none.

    python bench/cuda_code.py [--arch 80 90] [--out DIR]

One decoder layer of Llama-2-7B as training runs it (LoRA on four-bit weights, FlexAttention with
the packed rows' mask, forward and backward) is captured from fake tensors on the device cuda, and
given to Inductor as if an A100 (sm_80) or an H100 (sm_90) were there. Its Triton kernels are then
compiled to machine code by Triton, which needs no driver for that. Nothing is run. Needs what
cuda_without_gpu.py needs. Prints, for each kernel, the bytes of its machine code, its shared memory
and its tensor-core instructions, and one JSON object as the last line; the exit code is 1 if a
kernel has no code.

What is not shown: that the kernels are right or fast, and that a launcher finds them.
"""

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import cuda_without_gpu

CARDS = {
    80: SimpleNamespace(
        name="NVIDIA A100-SXM4-80GB",
        major=8,
        minor=0,
        multi_processor_count=108,
        shared_memory_per_block_optin=166912,
    ),
    90: SimpleNamespace(
        name="NVIDIA H100 80GB HBM3",
        major=9,
        minor=0,
        multi_processor_count=132,
        shared_memory_per_block_optin=232448,
    ),
}
for card in CARDS.values():
    card.type = "cuda"
    card.warp_size = 32
    card.regs_per_multiprocessor = 65536
    card.max_threads_per_multi_processor = 2048
    card.max_threads_per_block = 1024
    card.shared_memory_per_block = 49152
    card.shared_memory_per_multiprocessor = card.shared_memory_per_block_optin + 1024
    card.total_memory = 80 * 2**30
    card.L2_cache_size = 40 * 2**20
    card.clock_rate = 1_410_000


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", type=int, nargs="+", choices=list(CARDS), default=list(CARDS))
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--out", type=Path, help="where to write the kernels' source")
    args = parser.parse_args()
    args.layers, args.kv_heads = 1, 0
    return args


def as_if_there(card: SimpleNamespace) -> None:
    """Let torch, Inductor and Triton take `card` for the current device."""
    import torch
    from torch._dynamo import device_interface
    from torch._inductor.runtime import triton_helpers
    from torch._subclasses import FakeTensorMode
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    triton_helpers.set_driver_to_gpu = lambda: None
    capability = (card.major, card.minor)
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.get_device_properties = lambda *_: card
    torch.cuda.get_device_capability = lambda *_: capability
    torch.cuda.get_device_name = lambda *_: card.name
    torch.cuda.is_bf16_supported = lambda *_, **__: True
    torch.cuda.get_rng_state = lambda *_: torch.zeros(16, dtype=torch.uint8)
    torch.cuda.set_rng_state = lambda *_: None
    torch.cuda.synchronize = lambda *_: None
    torch.cuda._exchange_device = lambda *_: 0
    torch.cuda._maybe_exchange_device = lambda *_: 0  # another one: dynamo tells them apart
    interface = device_interface.CudaInterface
    interface.is_available = staticmethod(lambda: True)
    interface.get_compute_capability = staticmethod(lambda *_: 10 * card.major + card.minor)
    interface.Worker.get_device_properties = staticmethod(lambda *_: card)
    interface.Worker.current_device = staticmethod(lambda: 0)
    interface.get_device_properties = staticmethod(lambda *_: card)
    interface.current_device = staticmethod(lambda: 0)
    interface.device_count = staticmethod(lambda: 1)
    interface.is_bf16_supported = staticmethod(lambda *_, **__: True)
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", 10 * card.major + card.minor, 32),
            get_current_device=lambda: 0,
            get_device_interface=lambda: torch.cuda,
            get_active_torch_device=lambda: torch.device("cuda", 0),
            is_active=lambda: True,
        )
    )
    FakeTensorMode.avoid_device_init = property(lambda self: True)


def record_kernels() -> dict[str, str]:
    """Let Inductor hand over its Triton kernels, by name, instead of loading them."""
    from torch._inductor.async_compile import AsyncCompile

    kernels: dict[str, str] = {}

    def triton(self, name: str, source: str, *_, **__):
        kernels[f"{name}_{len(kernels)}"] = source
        return lambda *_, **__: None

    AsyncCompile.triton = triton
    return kernels


def compile_layer(args: argparse.Namespace, folder: Path) -> None:
    """Give Inductor the first layer, forward and backward."""
    import torch
    from torch._functorch import config as functorch_config
    from torch._inductor import compile as inductor
    from torch._inductor import config as inductor_config
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    from pref.model import flex, logps
    from pref.model.logps import ResponseLogps
    from pref.training import memory

    functorch_config.force_non_lazy_backward_lowering = True
    inductor_config.joint_graph_constant_folding = False  # it computes constants, on the device
    row = cuda_without_gpu.Row(1)
    given = cuda_without_gpu.arguments_of(row, folder, args.tokens)
    policy = ResponseLogps(memory.with_lora(memory.shapes_of(given.model, torch.bfloat16), given))
    layer = logps.decoder_layers(policy)[0]
    fake = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(), static_shapes=True)
    batch = cuda_without_gpu.batch_on_cuda(cuda_without_gpu.make_pairs(args.tokens), fake)
    with fake:
        cuda_without_gpu.to_fake_cuda(policy, row.quant, fake)
        mask = flex.block_mask(batch)
        shape = (1, args.tokens, args.hidden)
        x = torch.empty(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        width = args.hidden // args.heads
        rotary = [
            torch.empty(1, args.tokens, width, device="cuda", dtype=torch.bfloat16)
            for _ in range(2)
        ]

    def forward(x, cos, sin):
        return layer(x, attention_mask=mask, position_embeddings=(cos, sin), use_cache=False)

    graph = torch._dynamo.export(forward)(x, *rotary).graph_module
    inductor(graph, [x, *rotary])


def machine_code(name: str, source: str, arch: int) -> dict:
    """Compile a kernel as Inductor wrote it, in the first of its configurations."""
    import triton
    from torch._inductor.codecache import PyCodeCache
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel_name = re.search(r"^def (triton_\w+)\(", source, re.MULTILINE).group(1)
    kernel = getattr(PyCodeCache.load(source), kernel_name)
    config = kernel.configs[0]
    meta = kernel._create_compile_meta(config)
    binary = triton.compile(
        ASTSource(kernel.fn, meta["signature"], meta["constants"], meta["configs"][0]),
        target=GPUTarget("cuda", arch, 32),
        options=kernel._create_compile_options(config, meta),
    )
    return {
        "kernel": name,
        "cubin_bytes": len(binary.asm["cubin"]),
        "shared_bytes": binary.metadata.shared,
        "arch": re.search(r"\.target (sm_\w+)", binary.asm["ptx"]).group(1),
        "tensor_cores": "wgmma"
        if "wgmma" in binary.asm["ptx"]
        else "mma" * ("mma.sync" in binary.asm["ptx"]),
    }


def main() -> int:
    args = parse_args()
    folder = cuda_without_gpu.torch_with_cuda()
    if folder is None:
        print("error: needs the CUDA build of torch; it may be used without a GPU", file=sys.stderr)
        return 2
    cuda_without_gpu.without_driver(cuda_without_gpu.load_stand_in(folder))
    if len(args.arch) > 1:  # what a process has seen of one card it keeps
        import subprocess

        codes = [
            subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--arch", str(arch)]
            ).returncode
            for arch in args.arch
        ]
        return max(codes)
    (arch,) = args.arch
    as_if_there(CARDS[arch])
    kernels = record_kernels()
    with tempfile.TemporaryDirectory() as temporary:
        cuda_without_gpu.write_model(args, Path(temporary))
        compile_layer(args, Path(temporary))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        for name, source in kernels.items():
            (args.out / f"sm_{arch}_{name}.py").write_text(source)
    rows, failed = [], 0
    for name, source in kernels.items():
        try:
            rows.append(machine_code(name, source, arch))
        except Exception as error:
            failed += 1
            rows.append({"kernel": name, "failed": f"{type(error).__name__}: {error}"[:300]})
        print(rows[-1], flush=True)
    print(json.dumps({"arch": arch, "kernels": len(rows), "failed": failed}))
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
