"""Whether the toolkit computes the right numbers on this device. A part of bench/gpu.sh; prints
rows (gpu_rows.py) with `value`, `tolerance` and `holds`.

    python bench/gpu_correct.py [--seconds 115]

On small random models, in fp32 where rounding would hide a mistake:

1. Log-probs and gradients of packed rows with shared prompts, eager and compiled, against the plain
   padded batch with the model's own eager attention.
2. A 4-bit layer's output and gradient against a dense layer of its dequantised weights, for a few
   rows and for many: bitsandbytes has a kernel for each.
3. Answers: the engine with two adapters in one batch against PEFT's `generate`, token by token.
4. train_pref.py in NF4: the policy equals its reference at step 0; and a run that is killed and
   continued gives the adapter of one that is not.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from gpu_rows import ROOT, attempt
from peft import LoraConfig, PeftModel, get_peft_model
from random_pairs import make_pairs
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from pref.answering.generation import Engine, Request
from pref.model.chat import TokenPair
from pref.model.logps import ResponseLogps, trainable
from pref.model.lora import add_lora
from pref.model.packing import Packing, make_batch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCABULARY = 512
STEPS, KILLED_AFTER = 12, 2  # a step takes a GPU a moment: the kill must come before the end


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=115)
    parser.add_argument("--hidden", type=int, default=256, help="size of the small models")
    parser.add_argument("--no_compile", action="store_true", help="for a rehearsal")
    return parser.parse_args()


def check(row: str, tolerance: float, work) -> dict:
    """A row that holds if what `work` returns, a distance, is within the tolerance."""

    def values() -> dict:
        value = work()
        return {"value": value, "tolerance": tolerance, "holds": bool(value <= tolerance)}

    return attempt(row, values)


def distance(one: Tensor, other: Tensor) -> float:
    """|one - other| relative to |other|, both as vectors, in fp64."""
    difference = (one.double() - other.double()).norm() / other.double().norm()
    return difference.item()


def small_llama(hidden: int, seed: int = 0) -> LlamaForCausalLM:
    """A random Llama in fp32 whose answers are far from uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
        max_position_embeddings=2048,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).to(DEVICE)
    model.requires_grad_(False)
    return model


# ---- log-probs and gradients --------------------------------------------------------------------


def some_pairs(count: int = 6) -> list[TokenPair]:
    generator = torch.Generator().manual_seed(1)

    def tokens(longest: int) -> list[int]:
        length = int(torch.randint(3, longest, (), generator=generator))
        return torch.randint(5, VOCABULARY, (length,), generator=generator).tolist()

    return [TokenPair(tokens(150), tokens(90), tokens(120)) for _ in range(count)]


class Policy:
    """A policy with a trained-looking adapter, and what it computes of the same pairs."""

    def __init__(self, hidden: int):
        tuned = add_lora(small_llama(hidden), 8, 16, 0.0, "all-linear", seed=2)
        torch.manual_seed(3)
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter.data, std=0.02)
        self.policy, self.pairs = ResponseLogps(tuned), some_pairs()

    def values(self, own: bool) -> tuple[Tensor, Tensor]:
        """(N,) log-probs, and the gradient of a weighted sum of them as one vector. own: by the
        model's own forward on a plain batch.
        """
        batch = make_batch(self.pairs, Packing(0, padded=own, shared=not own), DEVICE)
        logps = self.policy(batch, own_attention="eager" if own else None).logps
        weights = torch.linspace(-1, 1, len(logps), device=DEVICE)
        parameters = trainable(self.policy).values()
        gradients = torch.autograd.grad((weights * logps).sum(), list(parameters))
        return logps.detach(), torch.cat([gradient.flatten() for gradient in gradients])


def log_probs(hidden: int, kinds: list[str]) -> None:
    """Rows of each kind of computation: packed, compiled."""
    state: dict[str, tuple[Tensor, Tensor]] = {}

    def setup() -> dict:
        policy = Policy(hidden)
        state["plain"] = policy.values(own=True)
        state["packed"] = policy.values(own=False)
        if "compiled" in kinds:
            policy.policy.prepare_layers(compiled=True, checkpointed=False)
            state["compiled"] = policy.values(own=False)
        return {"tokens": len(state["plain"][0])}

    attempt("log-probs and gradients computed", setup)
    for kind in kinds:
        for place, what in enumerate(("log-probs", "gradients")):
            check(
                f"{what}: {kind} = plain",
                1e-4,
                lambda k=kind, p=place: distance(state[k][p], state["plain"][p]),
            )


# ---- four bits ----------------------------------------------------------------------------------


def nf4_distance(rows: int, dtype: torch.dtype, hidden: int) -> float:
    """The larger of the distances of output and input gradient."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    torch.manual_seed(4)
    options = {"compute_dtype": dtype, "compress_statistics": True, "quant_type": "nf4"}
    layer = Linear4bit(hidden, 2 * hidden, bias=False, **options)
    layer.weight.data = layer.weight.data.to(dtype)  # as a checkpoint's weights are
    layer = layer.to(DEVICE)
    dense = dequantize_4bit(layer.weight.data, layer.weight.quant_state).double()
    x = torch.randn(rows, hidden, device=DEVICE, dtype=dtype, requires_grad=True)
    incoming = torch.randn(rows, 2 * hidden, device=DEVICE, dtype=dtype)
    output = layer(x)
    (gradient,) = torch.autograd.grad(output, x, incoming)
    expected = x.detach().double() @ dense.t()
    return max(distance(output, expected), distance(gradient, incoming.double() @ dense))


def four_bits(hidden: int) -> None:
    for rows in (4, 2048):
        for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 1e-2)):
            check(
                f"NF4 layer, {rows} rows, {str(dtype).removeprefix('torch.')}: output, gradient",
                tolerance,
                lambda r=rows, d=dtype: nf4_distance(r, d, hidden),
            )


# ---- answers ------------------------------------------------------------------------------------


def peft_answer(model: PeftModel, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
    """Greedy tokens, and at each the distance between the two largest logits."""
    ids = torch.tensor([prompt], device=DEVICE)
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = [step[0].float().topk(2).values for step in output.logits]
    return output.sequences[0, len(prompt) :].tolist(), [(b[0] - b[1]).item() for b in best]


def wrong_answers(hidden: int, folder: Path, count: int = 24) -> float:
    """How many answers differ from PEFT's at a token that is no tie."""
    names = ("one", "two")
    prompts = [pair.prompt for pair in some_pairs()]
    asked = [(prompt, name) for prompt in prompts for name in names]
    expected = {}
    for number, name in enumerate(names):
        config = LoraConfig(
            r=8, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
        )
        torch.manual_seed(10 + number)
        tuned = get_peft_model(small_llama(hidden), config)
        tuned.save_pretrained(folder / name)
        for prompt in prompts:
            expected[tuple(prompt), name] = peft_answer(tuned, prompt, count)
    engine = Engine(
        small_llama(hidden).eval(), {name: folder / name for name in names}, 4, 256, ends=[]
    )
    wrong = 0

    def finished(request: Request) -> None:
        nonlocal wrong
        tokens, gaps = expected[tuple(request.prompt), request.adapter]
        first = next(
            (i for i, pair in enumerate(zip(tokens, request.tokens)) if pair[0] != pair[1]), None
        )
        wrong += first is not None and gaps[first] > 1e-3

    engine.run((Request(prompt, name, 0.0, 0, count) for prompt, name in asked), finished)
    return float(wrong)


# ---- a run, and a run that is killed ------------------------------------------------------------


class Runs:
    """train_pref.py twice on the same small model: undisturbed, and killed and continued."""

    def __init__(self, folder: Path, hidden: int):
        self.folder = folder
        rows = make_pairs(48, median=60, longest=200)
        for split, part in (("train", rows[:40]), ("val", rows[40:])):
            path = folder / "data" / f"{split}.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
        subprocess.run(
            [
                *(sys.executable, ROOT / "bench" / "random_llama.py", folder / "model"),
                *("--pairs", folder / "data" / "train.jsonl", "--vocabulary", "600"),
                *("--hidden", str(hidden), "--intermediate", str(2 * hidden)),
                *("--layers", "3", "--heads", "4", "--initializer_range", "0.1"),
            ],
            check=True,
            capture_output=True,
        )
        self.undisturbed, self.killed = self.start("undisturbed"), self.start("killed")

    def start(self, name: str) -> subprocess.Popen:
        command = [
            *(sys.executable, ROOT / "train_pref.py", "--model", self.folder / "model"),
            *("--data", self.folder / "data", "--results_dir", self.folder, "--run_id", name),
            *("--loss", "dpo", "--beta", 0.1, "--quant", "nf4", "--compile", "off"),
            *("--global_batch", 8, "--max_steps", STEPS, "--save_steps", 1, "--eval_steps", 6),
            *("--max_length", 512, "--lora_r", 8, "--learning_rate", 1e-3),
        ]
        return subprocess.Popen(
            [str(part) for part in command],
            stdout=open(self.folder / f"{name}.log", "a"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def stop(self) -> None:
        for process in (self.undisturbed, self.killed):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def steps(self, name: str) -> int:
        path = self.folder / name / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        return sum('"grad_norm"' in line for line in lines)

    def kill_and_continue(self, end: float) -> dict:
        while self.steps("killed") < KILLED_AFTER and self.killed.poll() is None:
            if time.monotonic() > end:
                raise TimeoutError("no step was taken in time")
            time.sleep(0.02)
        os.killpg(self.killed.pid, signal.SIGKILL)
        self.killed.wait()
        taken = self.steps("killed")
        if taken >= STEPS:
            raise RuntimeError("the run ended before it was killed")
        self.killed = self.start("killed")
        return {"killed_after_step": taken}

    def wait(self, name: str, end: float) -> dict:
        """The summary of a run that ended well."""
        process = getattr(self, name)
        try:
            code = process.wait(timeout=max(1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"the {name} run did not end in time") from None
        if code:
            raise RuntimeError((self.folder / f"{name}.log").read_text()[-2000:])
        return json.loads((self.folder / name / "summary.json").read_text())

    def step0(self, end: float) -> float:
        return self.wait("undisturbed", end)["step0_difference"]

    def resumed(self, end: float) -> float:
        """The distance of the two adapters' B, which start at zero."""
        self.wait("killed", end)
        matrices = []
        for name in ("killed", "undisturbed"):
            weights = load_file(self.folder / name / "adapter" / "adapter_model.safetensors")
            matrices.append(
                torch.cat([w.flatten() for key, w in weights.items() if "lora_B" in key])
            )
        return distance(*matrices)


def runs(folder: Path, hidden: int, end: float) -> Runs | None:
    started: list[Runs] = []
    attempt("two runs started", lambda: started.append(Runs(folder, hidden)) or {})
    if started:
        attempt("one of them killed", lambda: started[0].kill_and_continue(end))
    return started[0] if started else None


def main() -> None:
    args = parse_args()
    end = time.monotonic() + args.seconds
    torch.backends.cuda.matmul.allow_tf32 = False
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pair = runs(folder, args.hidden, end)  # they train while the rest is checked
        try:
            four_bits(args.hidden)
            check("answers that are not PEFT's", 0, lambda: wrong_answers(args.hidden, folder))
            log_probs(args.hidden, ["packed"] if args.no_compile else ["packed", "compiled"])
            if pair is not None:
                check("step 0: policy = reference, nats a token", 5e-2, lambda: pair.step0(end))
                # On a GPU the order of additions may differ between two runs.
                tolerance = 1e-2 if DEVICE.type == "cuda" else 0
                check("killed and continued = undisturbed", tolerance, lambda: pair.resumed(end))
        finally:
            if pair is not None:
                pair.stop()


if __name__ == "__main__":
    main()
