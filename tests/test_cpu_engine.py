"""The engine on a CPU: its heap, and attention's gradients by matrix products."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from test_engine import ROWS, TOKENS, visible

from pref.model import attention
from pref.model.attention import branch_attention
from pref.model.packing import layout_rows

# Page faults of filling 64 MiB, for the second time, before and after the heap is set up.
FAULTS = """
import ctypes, resource
from pref.training import cpu_memory

libc, size = ctypes.CDLL(None), 64 * 2**20
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
libc.free.argtypes = (ctypes.c_void_p,)

def faults():
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        block = libc.malloc(size)
        ctypes.memset(block, 1, size)
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10
print(faults())
resident = peak()
print(cpu_memory.keep_freed_memory(2**30), peak() - resident, faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_freed_memory_is_used_again_without_asking_the_system():
    """And reserving the heap takes no memory."""
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    before, after = done.stdout.splitlines()
    if after.startswith("False"):
        pytest.skip("a C library other than glibc")
    _, resident, faults = after.split()
    assert int(before) > 1000 and int(faults) < 10 and int(resident) < 2**20, done.stderr


def heads(count: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(1, TOKENS, count, 16, dtype=torch.float32).to(dtype).transpose(1, 2)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("queries", [256, 11])
def test_gradients_by_products_against_masked_attention(kv_heads, queries, monkeypatch):
    """In fp32, with the queries of a response at once and in chunks."""
    monkeypatch.setattr(attention, "CHUNK_QUERIES", queries)
    torch.manual_seed(0)
    q, k, v, upstream = heads(4), heads(kv_heads), heads(kv_heads), heads(4)
    output, lse = branch_attention(q, k, v, ROWS, 0.3)
    ours = tuple(torch.zeros_like(t) for t in (q, k, v))
    delta = (upstream * output).sum(-1)
    given = attention.Backward(upstream, q, k, v, output, lse, delta)
    attention._set_by_products(ours, given, layout_rows(ROWS), 0.3)
    inputs = [t.requires_grad_() for t in (q, k, v)]
    masked = F.scaled_dot_product_attention(
        *inputs, attn_mask=visible(), scale=0.3, enable_gqa=True
    )
    for gradient, expected in zip(ours, torch.autograd.grad(masked, inputs, upstream)):
        assert torch.allclose(gradient, expected, atol=2e-5)


def test_in_bf16_products_are_as_exact_as_flash_attention(monkeypatch):
    """For some rows and for all, against fp32 from the same bf16 inputs. The attention weights are
    far from even.
    """
    torch.manual_seed(0)
    q, k, v, upstream = (heads(n, torch.bfloat16) for n in (4, 2, 2, 4))
    q = q * 4

    def gradients(dtype) -> list[torch.Tensor]:
        inputs = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        output, _ = branch_attention(*inputs, ROWS, 0.25)
        return torch.autograd.grad(output, inputs, upstream.to(dtype))

    def errors(longest: int) -> list[float]:
        monkeypatch.setattr(attention, "LONGEST_BY_PRODUCTS", longest)
        pairs = zip(gradients(torch.bfloat16), exact)
        return [((ours - right).norm() / right.norm()).item() for ours, right in pairs]

    exact = gradients(torch.float32)
    flash, both = errors(0), errors(20)  # prompt and response: 12, 7 and 49 tokens
    monkeypatch.setattr(attention, "_gradients_by_flash", None)
    for errors_of_ours in (both, errors(49)):
        assert errors_of_ours != flash
        assert all(e < max(2 * f, 0.01) for e, f in zip(errors_of_ours, flash))
    backward = torch.ops.pref.branch_attention_2_backward
    output, lse = branch_attention(q, k, v, ROWS, 0.25)
    delta = (upstream.float() * output.float()).sum(-1)
    arguments = (upstream, q, k, v, output, lse, delta, ROWS, 0.25)
    torch.library.opcheck(backward, arguments, test_utils=("test_schema", "test_faketensor"))
