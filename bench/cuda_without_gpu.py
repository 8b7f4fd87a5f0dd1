"""What can be run of CUDA on a machine without a GPU: training's kernels and memory, as fakes.

    python bench/cuda_without_gpu.py [--only "1 nf4" "8 full"]       Llama-2-7B
    python bench/cuda_without_gpu.py --only "1 nf4" --tokens 2048 --layers 80 --hidden 8192 \\
        --intermediate 28672 --heads 64 --kv_heads 8                 Llama-2-70B

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
    parser.add_argument("--kv_heads", type=int, default=0, help="0: as --heads")
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
    torch.cuda.get_device_capability = lambda *_: (8, 0)
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


def to_fake_cuda(policy, quant: str, fake) -> list:
    """Move the policy's tensors from meta to fake cuda, inside the fake mode; four bits in place of
    the layers' linear weights. Returns tensors that no module holds.
    """
    import bitsandbytes
    import torch
    from bitsandbytes import functional
    from peft.tuners.lora import LoraLayer
    from torch import nn
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    class FourBits(nn.Linear):
        """bitsandbytes' product; its own layer's weight is no tensor that can be fake."""

        def forward(self, x):
            return bitsandbytes.matmul_4bit(x, self.weight, quant_state=self.state)

    loose = []
    for module in policy.modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None:
                continue
            moved = torch.empty_like(tensor, device="cuda")
            if isinstance(tensor, nn.Parameter):
                module._parameters[name] = nn.Parameter(moved, requires_grad=tensor.requires_grad)
            else:
                module._buffers[name] = moved
    if quant == "nf4":
        with unset_fake_temporarily():
            table = functional.create_dynamic_map()  # of which bitsandbytes reads the values
        functional.name2qmap["dynamic"] = fake.from_tensor(table).to("cuda")
        for layer in [m for m in policy.modules() if isinstance(m, LoraLayer)]:
            linear = layer.get_base_layer()
            linear.__class__ = FourBits
            packed, linear.state = functional.quantize_4bit(
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


def batch_on_cuda(pairs: list, fake):
    """The batch that `make_batch` makes for CUDA, its tensors fake. What the host reads stays
    real.
    """
    import torch

    from pref.model.packing import FLEX_BLOCK, Packing, lay_out

    batch = lay_out(pairs, Packing(pad_id=0), FLEX_BLOCK)._replace(mask=None)
    moved = {
        key: fake.from_tensor(value).to("cuda")
        for key, value in batch._asdict().items()
        if isinstance(value, torch.Tensor)
    }
    return batch._replace(**moved)


def flash_attention(query, key, value, mask, scale):
    """In FlexAttention's place."""
    import torch

    return torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, 0.0, True, scale=scale
    )[0]


def launches():
    """A mode that counts what the host starts, and the copies that it waits for."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Launches(TorchDispatchMode):
        kernels = blocking = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.kernels += not func.is_view
            target = (kwargs or {}).get("device")
            if func.overloadpacket.__name__ == "_to_copy" and target not in (None, args[0].device):
                self.blocking += not kwargs.get("non_blocking")
            return func(*args, **(kwargs or {}))

    return Launches()


@contextlib.contextmanager
def ranks_of(row: Row):
    """This process as rank 0 of `row.ranks`, whose collectives are not carried out."""
    import torch
    import torch.distributed as dist
    import torch.distributed._tools.fake_collectives  # noqa: F401  shapes of collectives
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from pref.model import sharding
    from pref.model.ranks import Ranks

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=row.ranks)
    mesh = init_device_mesh("cuda", (row.ranks,))  # of values, so not under the fake mode
    sharding.init_device_mesh = lambda *_: mesh
    sharding.check_gradient_sum = lambda *_: None  # reads values
    try:
        yield Ranks(0, row.ranks, torch.device("cuda", 0))
    finally:
        dist.destroy_process_group()


def policy_on_meta(args: argparse.Namespace):
    """The policy that a run would have, before it is sharded."""
    import torch

    from pref.model import flex
    from pref.model.logps import ResponseLogps
    from pref.training import memory

    flex.attend = flash_attention
    policy = ResponseLogps(memory.with_lora(memory.shapes_of(args.model, torch.bfloat16), args))
    policy.prepare_layers(compiled=False, checkpointed=args.checkpointing == "on")
    return policy


def train(policy, batch, shard: str, reference, tracker) -> None:
    """Forward and backward of two micro-batches of one optimiser step."""
    import losses
    from pref.model import sharding
    from pref.model.logps import sum_by_row

    for last in (False, True):
        sharding.prepare_backward(policy, shard, is_last=last)
        chosen, rejected = sum_by_row(policy(batch).logps, batch).chunk(2)
        lengths = batch.lengths.float().chunk(2)
        inputs = losses.PairLogps(chosen, rejected, reference, reference, *lengths)
        losses.dpo(inputs)[0].sum().backward()
        tracker.reset_mod_stats()  # it takes a module's second forward pass for a mistake


def measure(row: Row, folder: Path, tokens: int, fake) -> Found:
    """Two micro-batches of a step on rank 0 of `row.ranks`, planned and tracked."""
    import torch
    from torch.distributed._tools.mem_tracker import MemTracker

    from pref.model import sharding
    from pref.model.logps import trainable
    from pref.training import memory

    # 1) The plan. The tracker knows of tensors alone.
    args, pairs = arguments_of(row, folder, tokens), make_pairs(tokens)
    batch = batch_on_cuda(pairs, fake)
    sizes = memory.sizes_of(args, on_cuda=True)
    plan = memory.memory_of(args, sizes, batch.tokens, len(batch.targets), row.ranks, on_cuda=True)
    planned = plan.total - plan.process - memory.CUBLAS / GIB

    # 2) The run. AdamW's moments are there from the first step on.
    policy, counts = policy_on_meta(args), launches()
    tracker = MemTracker()
    # It would hook the gradient of every parameter, and frozen ones have none.
    track = tracker._track_module_params_and_buffers
    tracker._track_module_params_and_buffers = lambda module, **_: track(module, False)
    with ranks_of(row) as ranks, fake:
        loose = to_fake_cuda(policy, row.quant, fake)
        sharding.shard(policy, row.shard, torch.bfloat16, ranks)
        local = [sharding.local(parameter) for parameter in trainable(policy).values()]
        moments = [torch.zeros_like(tensor) for tensor in local for _ in range(2)]
        reference = torch.zeros(len(pairs), device="cuda")
        tracker.track_external(policy, *loose, *moments)
        with tracker, counts:
            train(policy, batch, row.shard, reference, tracker)
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cuda", 0)]
    return Found(
        planned=planned,
        tracked=peak["Total"] / GIB,
        parts_planned=plan._asdict(),
        parts_tracked={str(part): size / GIB for part, size in peak.items()},
        kernels=counts.kernels // 2,
        blocking=counts.blocking // 2,
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
        num_key_value_heads=args.kv_heads or args.heads,
    ).save_pretrained(folder)


def main() -> int:
    args = parse_args()
    folder = torch_with_cuda()
    if folder is None:
        print("error: needs the CUDA build of torch; it may be used without a GPU", file=sys.stderr)
        return 2
    without_driver(load_stand_in(folder))
    from torch._subclasses.fake_tensor import FakeTensorMode

    fake, results = FakeTensorMode(allow_non_fake_inputs=True), {}
    print("| ranks, weights | planned GiB | tracked GiB | ratio | kernels | blocking copies | s |")
    print("|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        write_model(args, Path(temporary))
        for row in ROWS:
            if args.only and row.name not in args.only:
                continue
            begun = time.monotonic()
            found = measure(row, Path(temporary), args.tokens, fake)
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
