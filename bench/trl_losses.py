"""Per-pair losses of TRL 1.16, computed by TRL's own DPOTrainer code, written to
tests/trl_losses.json.

    pip install --no-deps trl==1.16.0 accelerate==1.15.0     # in addition to requirements.txt
    python bench/trl_losses.py                               # rewrites tests/trl_losses.json

`DPOTrainer._compute_loss` is called unchanged, in float64, on a stand-in for the trainer's state
whose "model" returns the log-probabilities below; none of TRL's arithmetic is repeated here. One
pair per call, so that TRL's mean over the batch is that pair's loss; all pairs in one call for the
losses that couple them. tests/test_losses.py compares losses.py with the stored values.
"""

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch
from trl import DPOConfig, DPOTrainer
from trl import __version__ as trl_version

OUT = Path(__file__).resolve().parent.parent / "tests" / "trl_losses.json"
TOKENS = (7, 11)  # response lengths, chosen and rejected
CASES = [  # TRL loss type, beta, further settings of DPOConfig
    *((name, beta, {}) for name in ("sigmoid", "discopop") for beta in (0.01, 0.05, 0.5, 2.5)),
    ("discopop", 0.1, {"discopop_tau": 0.2}),
    *(
        (name, beta, {})
        for name in (
            "hinge",
            "ipo",
            "bco_pair",
            "nca_pair",
            "apo_zero",
            "apo_down",
            "sppo_hard",
            "aot",
            "aot_unpaired",
            "sigmoid_norm",
        )
        for beta in (0.01, 0.1, 2.0)
    ),
    *(
        (name, 0.1, {"label_smoothing": eps})
        for name in ("robust", "exo_pair", "aot")
        for eps in (1e-3, 0.1)
    ),
]
WHOLE_BATCH = ("aot", "aot_unpaired")  # couple the batch: one value, the mean over all pairs


def example_pairs() -> torch.Tensor:
    """(4, 24) summed log-probs chosen, rejected, ref_chosen, ref_rejected: random ones and extreme
    ones.
    """
    random = -60 * torch.rand(
        4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(16)
    )
    extreme = torch.tensor(
        [
            [-10.0, -10.0, -10.0, -10.0],
            [-5.0, -900.0, -300.0, -300.0],
            [-900.0, -5.0, -300.0, -300.0],
            [-1e-3, -2e-3, -1e-3, -2e-3],
            [-400.0, -100.0, -350.0, -100.0],
            [-100.0, -400.0, -100.0, -350.0],
            [-2e3, -4e3, -2.5e3, -2.5e3],
            [-4e3, -2e3, -2.5e3, -2.5e3],
        ],
        dtype=torch.float64,
    ).T
    return torch.cat([random, extreme], dim=1)


def trl_loss(loss_type: str, beta: float, settings: dict, pairs: torch.Tensor) -> float:
    """TRL's loss, the mean over `pairs` (4, B) as in example_pairs."""
    size, width = pairs.shape[1], max(TOKENS)
    lengths = torch.tensor(TOKENS).repeat_interleave(size)  # (2B,)
    mask = (torch.arange(1 + width) >= 1) & (
        torch.arange(1 + width) <= lengths[:, None]
    )  # (2B, 1 + width)
    log_probs = mask[:, 1:].double() * (pairs[:2].flatten() / lengths).unsqueeze(1)
    zeros = torch.zeros(2 * size, width, dtype=torch.float64)
    outputs = SimpleNamespace(
        log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
    )
    same = lambda tensor: tensor  # noqa: E731  (one process: gathering returns what it is given)
    accelerator = SimpleNamespace(device=torch.device("cpu"), gather=same, gather_for_metrics=same)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=accelerator,
        beta=beta,
        args=DPOConfig(use_cpu=True, **settings),
        label_smoothing=settings.get("label_smoothing", 0.0),
        loss_types=[loss_type],
        loss_weights=[1.0],
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        use_weighting=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": torch.zeros(2 * size, 1 + width, dtype=torch.long),
        "attention_mask": torch.ones(2 * size, 1 + width),
        "completion_mask": mask.long(),
        "ref_chosen_logps": pairs[2],
        "ref_rejected_logps": pairs[3],
    }
    return DPOTrainer._compute_loss(
        trainer, lambda **_: outputs, inputs, return_outputs=False
    ).item()


def batches(loss_type: str, pairs: torch.Tensor) -> list[torch.Tensor]:
    return [pairs] if loss_type in WHOLE_BATCH else list(pairs.split(1, dim=1))


def main() -> None:
    torch.set_default_dtype(torch.float64)  # TRL makes tensors of its own (exo_pair's epsilon)
    pairs = example_pairs()
    cases = [
        {
            "loss": loss_type,
            "beta": beta,
            **settings,
            "values": [
                trl_loss(loss_type, beta, settings, batch) for batch in batches(loss_type, pairs)
            ],
        }
        for loss_type, beta, settings in CASES
    ]
    lines = ",\n  ".join(json.dumps(case) for case in cases)
    head = f'"trl": "{trl_version}", "tokens": {json.dumps(TOKENS)},\n'
    head += f' "pairs": {json.dumps(pairs.tolist())}'
    text = f'{{{head},\n "cases": [\n  {lines}]}}\n'
    OUT.write_text(text.replace("NaN", "null").replace("Infinity", "null"), encoding="utf-8")
    print(f"{OUT}: {len(cases)} cases x {pairs.shape[1]} pairs from TRL {trl_version}")


if __name__ == "__main__":
    main()
