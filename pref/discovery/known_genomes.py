"""Losses of losses.py as genomes, so that evolution can breed from their parts.

Each is equal to its loss at the defaults, in value and gradient, up to a factor. What has no genome
(exo_pair, orpo, dpo_kl) takes part as an opaque leaf.
"""

from pref.discovery.genome import Genome, Node


def _node(op: str, *parts: float | Node) -> Node:
    """A node from its constants and its children, in any order among themselves."""
    genes = tuple(part for part in parts if isinstance(part, float))
    return Node(op, genes, tuple(part for part in parts if isinstance(part, Node)))


def _scaled(nats: str | Node, k: float = 1.0) -> Node:
    return _node("scaled", k, _node(nats) if isinstance(nats, str) else nats)


def _sum(first: Node, second: Node, coefficient: float = 1.0) -> Node:
    return _node("plus", coefficient, first, second)


def _scored(preference: Node, coefficient: float) -> Node:
    return _node("anchored", coefficient, preference, _node("chosen_score"))


_Z = _scaled("rho")
_DPO = _node("logistic", _Z)
_EXPONENTIAL = _node("exponential", _Z)
_CHOSEN, _REJECTED = _scaled("chosen"), _scaled("rejected")
_HALF = -0.5  # x - 0.5 x

KNOWN_GENOMES: dict[str, Genome] = {
    "dpo": Genome(0.1, _DPO),
    "hinge": Genome(0.05, _node("hinge", _Z)),
    # (rho - t)^2 = t^2 (1 - rho / t)^2 with t = 5 on means, which are multiplied by 50 here
    "ipo": Genome(0.004, _node("square", _scaled("mean_rho"))),
    "td_dpo": Genome(
        1.0, _node("anchored", 0.05, _node("logistic", _scaled("delta")), _node("squares"))
    ),
    "discopop": Genome(0.05, _node("mix", _node("rising", 0.05, _Z), _EXPONENTIAL, _DPO)),
    "dlrml": Genome(
        0.05, _node("mix", _node("rising", 0.05, _scaled("rho", 4.0)), _EXPONENTIAL, _DPO)
    ),
    "robust": Genome(0.1, _sum(_DPO, _node("logistic_up", _Z), -0.1 / 0.9)),
    "slic": Genome(1.0, _scored(_node("hinge", _scaled("delta")), 0.1)),
    "simpo": Genome(0.04, _node("logistic", _node("shifted", -1.0, _scaled("mean_delta")))),
    "cpo": Genome(0.1, _scored(_node("logistic", _scaled("delta")), 1.0)),
    "nca_pair": Genome(
        0.01,
        _sum(
            _sum(_node("logistic", _CHOSEN), _node("logistic_up", _CHOSEN), 0.5),
            _node("logistic", _REJECTED),
            0.5,
        ),
    ),
    "bco_pair": Genome(0.1, _sum(_node("logistic", _CHOSEN), _node("logistic", _REJECTED))),
    "sppo_hard": Genome(0.002, _sum(_node("square", _CHOSEN), _node("square", _REJECTED))),
    "apo_zero": Genome(0.1, _sum(_node("sigmoid", _CHOSEN), _node("sigmoid", _REJECTED))),
    "apo_down": Genome(0.1, _sum(_node("sigmoid_up", _CHOSEN), _node("sigmoid", _Z))),
    "rpo": Genome(0.1, _scored(_DPO, 1.0)),
    "dpop": Genome(0.1, _node("logistic", _scaled(_node("penalised", 50.0, _node("rho"))))),
    "padll": Genome(0.05, _node("where", _Z, _DPO, _sum(_DPO, _DPO, _HALF))),
    "cell": Genome(0.05, _sum(_EXPONENTIAL, _DPO)),
    # At delta = 0 exactly, pfl takes the other branch.
    "pfl": Genome(
        0.05,
        _node(
            "where",
            _scaled("delta"),
            _sum(_DPO, _DPO, _HALF),
            _sum(_node("hinge", _Z), _node("hinge", _Z)),
        ),
    ),
    "sft": Genome(0.1, _node("score")),
}
