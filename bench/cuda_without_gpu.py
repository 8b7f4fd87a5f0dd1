"""What can be run of CUDA on a machine without a GPU: training's kernels and memory, as fakes.

    python bench/cuda_without_gpu.py [--layers 32] [--only "1 nf4" "8 full"]

Needs the CUDA build of torch (PyPI's wheel for Linux), gcc, and neither a GPU nor a driver. A
training micro-batch of the real code (packing, LoRA, FSDP2, bitsandbytes' four bits, the output
head, DPO's loss, backward) runs on the device cuda under FakeTensorMode: shapes without values.
Whatever would read a value there, and so make the host wait for a GPU, is an error. torch's
MemTracker counts the bytes that are alive, and the plan of --dry_run (pref/training/memory.py) is
compared with its peak, but for what no tensor holds: CUDA's context and cuBLAS's workspace. Ranks
are a fake process group, of which this process is rank 0.

Two things are stood in for: FlexAttention by flash attention, which keeps the same tensors (query,
key, value, output, normaliser) but is no template to compile, and CUDA's streams and events by
nothing. Layers are not compiled. Prints a table and one JSON object as the last line; the exit code
is 1 if a plan is off by more than 10 %.
"""

import argparse
import contextlib
import ctypes
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
TOLERANCE = 0.1
GIB = 2**30


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=4096, help="of the micro-batch")
    parser.add_argument("--only", nargs="+", help="rows of the table by name")
    return parser.parse_args()


# ---- a CUDA build of torch without a driver -----------------------------------------------------


def torch_with_cuda() -> Path | None:
    """The folder of this Python's torch, if that is a CUDA build."""
    folders = (Path(path) / "torch" for path in sys.path)
    first = next((folder for folder in folders if (folder / "lib").is_dir()), None)
    return first if first and (first / "lib" / "libc10_cuda.so").is_file() else None


def load_stand_in(torch_folder: Path) -> ctypes.CDLL:
    """Load a library that answers, in the driver's place, the one question that torch's backward
    pass asks without a GPU: whether a device has a context (none has). torch asks only for devices
    that it counts, so the library counts them too: as many as `set_device_count` says.

    Must be loaded before torch is imported.
    """
    linked = subprocess.run(
        ["nm", "-D", "-u", torch_folder / "lib" / "libcaffe2_nvrtc.so"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    source = """
        static int count = 0;
        void set_device_count(int n) { count = n; }
        signed char _ZN3c104cuda12device_countEv(void) { return count; }
    """
    source += "\n".join(f"int {name}(void) {{ return 0; }}" for name in linked if name[:2] == "cu")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "stand_in.so"
        command = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-xc", "-"]
        subprocess.run([*command, "-o", library], input=source, text=True, check=True)
        return ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


class NoStream:
    """Stands for CUDA's streams and events: everything happens at once and in order."""

    def __init__(self, *_, **__):
        pass

    def __getattr__(self, name):
        return lambda *_, **__: None


def without_driver(stand_in: ctypes.CDLL) -> None:
    """Let torch.cuda answer what the training code asks it."""
    import torch
    import torch.autograd
    from torch._subclasses import fake_tensor

    fake_tensor.init_gpu_context = lambda device: None
    run_backward = torch.autograd._engine_run_backward

    def backward(*args, **kwargs):
        stand_in.set_device_count(64)  # the engine looks at all devices that there could be
        try:
            return run_backward(*args, **kwargs)
        finally:
            stand_in.set_device_count(0)

    torch.autograd._engine_run_backward = backward
    torch.cuda.Stream = torch.cuda.Event = NoStream
    torch.cuda.current_stream = lambda *_: NoStream()
    torch.cuda.stream = lambda *_: contextlib.nullcontext()
    torch.cuda.current_device = lambda: 0
    torch.cuda.set_device = lambda *_: None
    torch.cuda.is_initialized = lambda: True


# ---- a policy on fake CUDA ----------------------------------------------------------------------


class Row(NamedTuple):
    """A plan to compare: what is run on how many ranks."""

    ranks: int
    quant: str = "nf4"
    shard: str = "adapters"
    checkpointing: str = "off"
    dropout: float = 0.05

    @property
    def name(self) -> str:
        parts = [str(self.ranks), self.quant if self.shard == "adapters" else "full"]
        parts += ["recomputed"] if self.checkpointing == "on" else []
        parts += ["no dropout"] if not self.dropout else []
        return " ".join(parts)


ROWS = (
    Row(1),
    Row(4),
    Row(8),
    Row(1, checkpointing="on"),
    Row(1, dropout=0.0),
    Row(8, quant="none", shard="full"),
    Row(4, quant="none", shard="full"),
    Row(1, quant="none"),
)


class Found(NamedTuple):
    """What a micro-batch took on rank 0."""

    planned: float  # GiB
    tracked: float  # GiB, at the peak
    parts_planned: dict[str, float]
    parts_tracked: dict[str, float]
    kernels: int  # operations that the host starts, forward and backward
    blocking: int  # copies to the device that the host waits for


def arguments_of(row: Row, folder: Path, tokens: int) -> argparse.Namespace:
    """The arguments of train_pref.py, settled."""
    from pref.training import arguments

    given = {
        "model": folder,
        "data": folder,
        "loss": "dpo",
        "dtype": "bfloat16",
        "quant": row.quant,
        "shard": row.shard,
        "checkpointing": row.checkpointing,
        "compile": "off",
        "lora_dropout": row.dropout,
        "tokens_per_microbatch": tokens,
    }
    argv = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    return arguments.parse_args(argv, "")


def to_fake_cuda(policy, quant: str) -> list:
    """Move the policy's tensors from meta to fake cuda, inside the fake mode; four bits in place of
    the layers' linear weights. Returns tensors that no module holds.
    """
    import bitsandbytes
    import torch
    from bitsandbytes.functional import quantize_4bit
    from peft.tuners.lora import LoraLayer
    from torch import nn

    class FourBits(nn.Linear):
        """bitsandbytes' product; its own layer's weight is no tensor that can be fake."""

        def forward(self, x):
            return bitsandbytes.matmul_4bit(x, self.weight, quant_state=self.state)

    loose = []
    for module in policy.modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None:
                continue
            fake = torch.empty_like(tensor, device="cuda")
            if isinstance(tensor, nn.Parameter):
                module._parameters[name] = nn.Parameter(fake, requires_grad=tensor.requires_grad)
            else:
                module._buffers[name] = fake
    if quant == "nf4":
        for layer in [m for m in policy.modules() if isinstance(m, LoraLayer)]:
            linear = layer.get_base_layer()
            linear.__class__ = FourBits
            packed, linear.state = quantize_4bit(
                linear.weight.data, quant_type="nf4", compress_statistics=True
            )
            linear.weight = nn.Parameter(packed, requires_grad=False)
            state = linear.state
            loose += [state.absmax, state.code, state.offset, state.state2.absmax]
    return loose


def make_pairs(tokens: int) -> list:
    """Pairs of 1,024 tokens as a shared row each."""
    from pref.model.chat import TokenPair

    pair = TokenPair([5] * 384, [6] * 320, [7] * 320)
    return [pair] * (tokens // 1024)


def batch_on_cuda(pairs: list, pad_id: int):
    """The batch that `make_batch` makes, its tensors fake. What the host reads stays real."""
    import torch

    from pref.model.packing import Packing, make_batch

    batch = make_batch(pairs, Packing(pad_id), torch.device("cpu"))
    assert batch.input_ids.shape[1] % 128 == 0  # what CUDA would pad to
    return batch


def flash_attention(query, key, value, mask, scale):
    """In FlexAttention's place."""
    import torch

    return torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, 0.0, True, scale=scale
    )[0]


def measure(row: Row, folder: Path, tokens: int) -> Found:
    """Two micro-batches of one optimiser step on rank 0 of `row.ranks`."""
    import torch
    import torch.distributed as dist
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from torch.utils._python_dispatch import TorchDispatchMode

    import losses
    from pref.model import flex, sharding
    from pref.model.logps import ResponseLogps, sum_by_row, trainable
    from pref.model.ranks import Ranks
    from pref.training import memory

    class Launches(TorchDispatchMode):
        kernels = blocking = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            Launches.kernels += not func.is_view
            target = (kwargs or {}).get("device")
            if name == "_to_copy" and target is not None and target != args[0].device:
                Launches.blocking += not kwargs.get("non_blocking")
            return func(*args, **(kwargs or {}))

    # 1) The plan, and the policy on meta.
    args, pairs = arguments_of(row, folder, tokens), make_pairs(tokens)
    batch = batch_on_cuda(pairs, 0)
    plan = memory.memory_of(
        args, memory.sizes_of(args), batch.tokens, len(batch.targets), row.ranks, on_cuda=True
    )
    # The tracker knows of tensors alone.
    planned = plan.total - plan.process - memory.CUBLAS / GIB
    dtype = torch.bfloat16
    adapted = memory.with_lora(memory.shapes_of(args.model, dtype), args)
    for name, parameter in adapted.named_parameters():
        assert parameter.dtype == (torch.float32 if "lora_" in name else dtype), name
    policy = ResponseLogps(adapted)
    policy.prepare_layers(compiled=False, checkpointed=args.checkpointing == "on")

    # 2) The ranks; their collectives are not carried out.
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=row.ranks)
    sharding.check_gradient_sum = lambda *_: None  # reads values
    flex.attend = flash_attention
    fake, tracker = FakeTensorMode(allow_non_fake_inputs=True), MemTracker()
    try:
        with fake:
            loose = to_fake_cuda(policy, row.quant)
            ranks = Ranks(0, row.ranks, torch.device("cuda", 0))
            sharding.shard(policy, row.shard, dtype, ranks)
            moments = [
                torch.zeros_like(sharding.local(parameter))
                for parameter in trainable(policy).values()
                for _ in range(2)
            ]
            moved = {
                key: fake.from_tensor(value).to("cuda")
                for key, value in batch._asdict().items()
                if isinstance(value, torch.Tensor) and key != "mask"
            }
            batch = batch._replace(**moved)
            reference = torch.zeros(len(pairs), device="cuda")
            tracker.track_external(policy, *loose, *moments)
            with tracker, Launches():
                for last in (False, True):
                    sharding.prepare_backward(policy, row.shard, is_last=last)
                    chosen, rejected = sum_by_row(policy(batch).logps, batch).chunk(2)
                    inputs = losses.PairLogps(
                        chosen, rejected, reference, reference, *batch.lengths.float().chunk(2)
                    )
                    losses.dpo(inputs)[0].sum().backward()
        peak = tracker.get_tracker_snapshot("peak")[torch.device("cuda", 0)]
    finally:
        dist.destroy_process_group()
    return Found(
        planned=planned,
        tracked=peak["Total"] / GIB,
        parts_planned=plan._asdict(),
        parts_tracked={str(part): size / GIB for part, size in peak.items()},
        kernels=Launches.kernels // 2,
        blocking=Launches.blocking // 2,
    )


def write_model(args: argparse.Namespace, folder: Path) -> None:
    """A configuration is all that a plan and a fake need."""
    from transformers import LlamaConfig

    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        num_hidden_layers=args.layers,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_attention_heads=args.heads,
    ).save_pretrained(folder)


def main() -> int:
    args = parse_args()
    folder = torch_with_cuda()
    if folder is None:
        print("error: needs the CUDA build of torch; it may be used without a GPU", file=sys.stderr)
        return 2
    without_driver(load_stand_in(folder))
    results = {}
    print("| ranks, weights | planned GiB | tracked GiB | ratio | kernels | blocking copies | s |")
    print("|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        write_model(args, Path(temporary))
        for row in ROWS:
            if args.only and row.name not in args.only:
                continue
            begun = time.monotonic()
            found = measure(row, Path(temporary), args.tokens)
            ratio = found.planned / found.tracked
            results[row.name] = found._asdict() | {"ratio": ratio}
            print(
                f"| {row.name} | {found.planned:.2f} | {found.tracked:.2f} | {ratio:.3f} | "
                f"{found.kernels} | {found.blocking} | {time.monotonic() - begun:.0f} |",
                flush=True,
            )
    print(json.dumps(results))
    return 0 if all(abs(one["ratio"] - 1) <= TOLERANCE for one in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
