"""Peak memory of the chunked log-probs and scores: 4,096 response tokens x 49,152 vocabulary,
forward and backward.

    python bench/score_memory.py

Prints, for log-probs alone, each scoring rule and the vocabulary KL, the peak resident memory above
that before the pass, in a process of its own each. A plain fp32 [tokens, vocabulary] tensor would
be 0.75 GiB; autograd keeps several.
"""

import resource
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
TOKENS, VOCABULARY, HIDDEN = 4096, 49152, 576
CASES = (
    "log-probs",
    "log",
    "brier",
    "spherical",
    "alpha_power",
    "pseudo_spherical",
    "masked_log",
    "full_sym",
)


def measure(case: str) -> float:
    """GiB that forward and backward of `case` need above the model and its inputs."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from pref.model.logps import ResponseLogps
    from pref.model.packing import Batch

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=9,
    )
    policy = ResponseLogps(LlamaForCausalLM(config).requires_grad_(False).train())
    hidden = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    policy.hidden = lambda batch: hidden  # the body of the model is not what is measured
    index = torch.arange(TOKENS)
    ids = torch.zeros(1, 8, dtype=torch.long)
    batch = Batch(
        input_ids=ids,
        position_ids=None,
        mask=ids,
        spans=None,
        positions=index,
        targets=index * 7,
        segments=torch.zeros_like(index),
        lengths=torch.tensor([TOKENS]),
        layout=(),
        response_lengths=(TOKENS,),
        tokens=TOKENS,
        chosen_tokens=TOKENS,
    )
    scores = {
        "masked_log": {"score": "brier", "score_masked_log": 0.1, "score_smoothing": 0.1},
        "log-probs": None,
    }
    kl = case if case.startswith("full") else None
    score = (
        None
        if kl
        else scores.get(case, {"score": case, "score_alpha": 1.5, "score_smoothing": 0.1})
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    logps, divergence, values = policy(batch, kl, score)
    sum(x.sum() for x in (logps, divergence, values) if x is not None).backward()
    assert hidden.grad.isfinite().all()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(measure(sys.argv[1]))
    else:
        for case in CASES:
            done = subprocess.run(
                [sys.executable, __file__, case], capture_output=True, text=True, check=True
            )
            print(f"{case:<18}{float(done.stdout.splitlines()[-1]):.2f} GiB")
