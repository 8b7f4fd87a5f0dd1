"""ArmoRM's head on a plain Llama (RLHFlow/ArmoRM-Llama3-8B-v0.1), without the code it comes with.

    rewards = R h_last                               (K,) K = 19 objectives, from the last token
    gates   = scale * softmax(MLP(h_prompt) / T)     (K,) from the token that ends the prompt
    score   = sum_k gates_k (M^T rewards)_k          M (K, K) takes their length bias from rewards

h_prompt is the hidden state of the <|eot_id|> before the answer's header: it knows the prompt and
nothing of the answer. Source: Wang et al. 2024 (arXiv 2406.12845), and the checkpoint's tensors.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pref.files.console import UserError, first_line

ARCHITECTURE = "LlamaForRewardModelWithGating"  # in the checkpoint's config.json
# What Llama 3's template writes between the prompt and the answer.
BEFORE_ANSWER = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"


class Gating(nn.Module):
    """How much each of K objectives counts for a prompt: a network with ReLU, and a softmax."""

    def __init__(self, sizes: list[int], temperature: float):
        """sizes: of the layers, H first and K last."""
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in zip(sizes, sizes[1:]))
        self.logit_scale = nn.Parameter(torch.ones(1))
        self.temperature = temperature

    def forward(self, prompt: Tensor) -> Tensor:
        """(H,) -> (K,)."""
        *inner, last = self.layers
        for layer in inner:
            prompt = F.relu(layer(prompt))
        return self.logit_scale * F.softmax(last(prompt) / self.temperature, dim=-1)


class ArmoHead(nn.Module):
    """The head, in fp32. Its parameters have the names of the checkpoint's tensors."""

    def __init__(self, config: dict):
        """config: the checkpoint's config.json."""
        super().__init__()
        hidden, objectives = config["hidden_size"], config.get("num_objectives", 19)
        inner = [config.get("gating_hidden_dim", 1024)] * config.get("gating_n_hidden", 3)
        self.regression_layer = nn.Linear(hidden, objectives, bias=False)
        self.reward_transform_matrix = nn.Parameter(torch.eye(objectives))
        self.gating = Gating([hidden, *inner, objectives], config.get("gating_temperature", 10))

    def forward(self, last: Tensor, prompt: Tensor) -> Tensor:
        """(H,), (H,) -> the score."""
        rewards = self.regression_layer(last) @ self.reward_transform_matrix  # (K,)
        return (self.gating(prompt) * rewards).sum()


def find_prompt_end(ids: list[int], before_answer: list[int]) -> int | None:
    """The position at which the last `before_answer` begins, or None."""
    size = len(before_answer)
    starts = range(len(ids) - size, -1, -1)
    return next((i for i in starts if ids[i : i + size] == before_answer), None)


def fill(head: ArmoHead, files: list[Path], place: str) -> None:
    """Read the head's tensors from the checkpoint's .safetensors files. Raises UserError, beginning
    with `place`, if they are not all there in their shapes.
    """
    stored: dict[str, Tensor] = {}
    names = head.state_dict().keys()
    try:
        for path in files:
            with safe_open(path, framework="pt") as opened:
                found = names & set(opened.keys())
                stored |= {name: opened.get_tensor(name).float() for name in found}
        head.load_state_dict(stored)
    except (RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{place}: its tensors are not those of ArmoRM's head ({first_line(error)}); give "
            "RLHFlow/ArmoRM-Llama3-8B-v0.1, or a copy of it"
        ) from None
