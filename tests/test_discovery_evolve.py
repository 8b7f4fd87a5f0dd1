"""Genomes, what is bred from them, and the two proposers that need no model."""

import json
import math
import random
import re

import pytest
import torch

import losses
from pref.discovery import breeding, form, printing, seeds
from pref.discovery.evolve import POPULATION, TIE, Evolve, RandomSearch, best, draw_parent
from pref.discovery.genome import MAX_NODES, OPERATIONS, Genome, Node, from_json, grow, places
from pref.discovery.known_genomes import KNOWN_GENOMES
from pref.discovery.opaque import Unreadable, opaque
from pref.discovery.proposals import Known, View
from pref.discovery.writing import describe, operations, write
from pref.files.console import UserError

# losses.py's value over the genome's.
FACTORS = {"ipo": 25, "robust": 0.9 / 0.8, "sppo_hard": 250_000, "padll": 0.9, "cell": 0.5}
LOG_RATIOS = (0, 0.3, 1, 3, 10, 30, 100, 300)


def grid(dtype):
    """Pairs at all combinations of log-ratios, for references and lengths near and far apart."""
    sides = torch.tensor([s * x for x in LOG_RATIOS for s in (1, -1)][1:], dtype=dtype)
    a, b = (side.flatten() for side in torch.meshgrid(sides, sides, indexing="ij"))
    parts = []
    for ref_chosen, ref_rejected, tokens in ((-40, -41, (20, 20)), (-300, -9, (150, 3))):
        parts.append(
            losses.PairLogps(
                chosen=(ref_chosen + a),
                rejected=(ref_rejected + b),
                ref_chosen=torch.full_like(a, ref_chosen),
                ref_rejected=torch.full_like(a, ref_rejected),
                chosen_tokens=torch.full_like(a, tokens[0]),
                rejected_tokens=torch.full_like(a, tokens[1]),
            )
        )
    columns = (torch.cat(column) for column in zip(*(part[:6] for part in parts)))
    return losses.PairLogps(*columns)


def value_and_gradient(loss, pairs):
    """(3, B): value, d/d chosen, d/d rejected."""
    chosen = pairs.chosen.clone().requires_grad_()
    rejected = pairs.rejected.clone().requires_grad_()
    values, _ = loss(pairs._replace(chosen=chosen, rejected=rejected))
    assert values.shape == chosen.shape
    gradients = torch.autograd.grad(
        values.sum(), (chosen, rejected), allow_unused=True, materialize_grads=True
    )
    return torch.stack([values.detach(), *gradients])


def executed(text):
    """The function of a text of our own."""
    space = {}
    exec(text, space)
    name = re.search(r"^def (\w+)", text, re.MULTILINE)[1]
    return space[name]


def of_genome(genome, pairs):
    return value_and_gradient(executed(write(genome, "loss_of_genome")), pairs)


@pytest.mark.parametrize("name", KNOWN_GENOMES)
def test_known_genomes_equal_losses(name):
    pairs = grid(torch.float64)
    # The two that are equal but for: delta = 0 exactly; and the genome's exp, which ends at 20.
    kept = {"pfl": pairs.delta != 0, "cell": pairs.rho > -400}.get(name, pairs.rho < torch.inf)
    pairs = losses.PairLogps(*(column[kept] for column in pairs[:6]))
    ours = FACTORS.get(name, 1) * of_genome(KNOWN_GENOMES[name], pairs)
    theirs = value_and_gradient(losses.LOSSES[name], pairs)
    assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.fixture(scope="module")
def bred():
    """521 genomes: the 21 known ones, and what was grown, mutated and crossed from them."""
    rng = random.Random(20)
    pool = list(KNOWN_GENOMES.values())
    while len(pool) < 521:
        if rng.random() < 0.2:
            pool.append(grow(rng))
            continue
        child, _ = breeding.offspring(rng.choices(pool, k=rng.choice((1, 2))), rng)
        if child is not None:
            pool.append(child)
    return pool


def test_whatever_is_bred_is_finite_everywhere_and_small(bred):
    """In fp32, as in training."""
    pairs = grid(torch.float32)
    assert max(genome.size for genome in bred) <= MAX_NODES
    assert sum(genome.size > 12 for genome in bred) > 30  # and not all of them are trivial
    used = {node.op for genome in bred for _, node in places(genome.tree)}
    assert used == OPERATIONS.keys()
    for genome in bred:
        assert of_genome(genome, pairs).isfinite().all(), write(genome, "loss")


def test_genomes_survive_json(bred):
    leaf = Genome(0.3, opaque(EXO_PAIR))
    for genome in (*bred, leaf):
        assert from_json(json.loads(json.dumps(genome.to_json()))) == genome


@pytest.mark.parametrize(
    "tree",
    [
        ["unheard_of", [], []],
        ["logistic", [], []],  # no child
        ["logistic", [], [["rho", [], []]]],  # nats where a number belongs
        ["scaled", [1.0], [["rho", [], []]]],  # a number is no loss
        ["logistic", [], [["scaled", [], [["rho", [], []]]]]],  # no constant
        ["logistic", [], [["scaled", [float("nan")], [["rho", [], []]]]]],
        None,
        [],
    ],
)
def test_what_is_no_genome_is_named(tree):
    with pytest.raises(UserError, match="archive.jsonl"):
        from_json({"beta": 0.1, "tree": tree})


def in_other_units(node, unit):
    """A tree for log-probabilities in another unit, `unit` of which make a nat."""
    genes, children = node.genes, tuple(in_other_units(child, unit) for child in node.children)
    if node.op in ("less", "clamped"):
        genes = (genes[0] * unit,)
    elif node.op == "anchored":
        power = 2 if children[1].op in ("squares", "common_square") else 1
        genes = (genes[0] / unit**power,)
    return Node(node.op, genes, children, node.text)


def test_no_loss_depends_on_the_unit_of_log_probabilities(bred):
    """exp, sigmoid and the squares see numbers without a unit: measured in bits, with beta in
    1/bits and the constants converted, every loss is the same.
    """
    generator = torch.Generator().manual_seed(3)
    sums = -100 * torch.rand((4, 200), dtype=torch.float64, generator=generator)
    tokens = torch.randint(1, 90, (2, 200), generator=generator).double()
    pairs, unit = losses.PairLogps(*sums, *tokens), 1 / math.log(2)
    in_bits = pairs._replace(**{c: getattr(pairs, c) * unit for c in pairs._fields[:4]})
    checked = 0
    for genome in bred[::5]:
        if any(node.op == "score" for _, node in places(genome.tree)):
            continue  # a log-likelihood: its unit is the loss's
        checked += 1
        other = Genome(genome.beta / unit, in_other_units(genome.tree, unit))
        nats, bits = of_genome(genome, pairs), of_genome(other, in_bits)
        assert torch.allclose(nats[0], bits[0], rtol=1e-6, atol=1e-9), write(genome, "loss")
    assert checked > 90


def test_the_form_accepts_what_is_bred(bred):
    """And what it prints is the same loss."""
    pairs = grid(torch.float64)
    opaque_ones = [Genome(0.1, opaque(EXO_PAIR))]
    rng = random.Random(8)
    while len(opaque_ones) < 12:
        parents = [rng.choice(opaque_ones), rng.choice(bred)]
        child, _ = breeding.offspring(parents[: rng.choice((1, 2))], rng)
        opaque_ones += [child] if child else []
    largest = sorted(bred, key=lambda genome: genome.size)[-10:]
    for genome in (*opaque_ones, *bred[::40], *largest):
        text = write(genome, describe(genome))
        program = form.translate(text)
        assert program.steps <= operations(text)
        printed = value_and_gradient(printing.load(program.text), pairs)
        assert torch.allclose(printed, of_genome(genome, pairs), rtol=1e-9, atol=1e-9), text


OTHERS = sorted(seeds.SEEDS.keys() - set(seeds.COUPLED) - KNOWN_GENOMES.keys())


@pytest.mark.parametrize("name", OTHERS)
def test_losses_without_a_genome_are_leaves(name):
    """With the 21 genomes, these are all that do not couple the batch."""
    assert len(OTHERS) == 3
    leaf = Genome(0.1, opaque(form.translate(seeds.SEEDS[name]).text))
    pairs = grid(torch.float64)
    pairs = pairs._replace(chosen=pairs.chosen.clamp(max=-1), rejected=pairs.rejected.clamp(max=-1))
    theirs = value_and_gradient(losses.LOSSES[name], pairs)
    assert torch.allclose(of_genome(leaf, pairs), theirs, rtol=1e-9, atol=1e-12)


# exo_pair has no genome: it takes the logarithm of a constant. Some of its variables are called
# what the text of a tree calls its own.
EXO_PAIR = '''import torch
import torch.nn.functional as F


def p0007_exo(pairs, *, beta: float = 0.1, label_smoothing: float = 0.001, unused: float = 0.0):
    """sigma(z) [log sigma(z) - log(1 - eps)] + sigma(-z) [log sigma(-z) - log eps]"""
    a, b = pairs.log_ratios
    z = beta * (a - b)
    gene_0 = F.logsigmoid(z) - math.log1p(-label_smoothing)
    z_2 = torch.sigmoid(-z) * (F.logsigmoid(-z) - math.log(label_smoothing)) + unused
    losses = torch.sigmoid(z) * gene_0 + z_2
    return losses, {"preference": losses}
'''.replace("import torch\n", "import math\n\nimport torch\n", 1)


def test_an_opaque_leaf_is_its_program():
    pairs = grid(torch.float64)
    leaf = opaque(EXO_PAIR)
    assert leaf.genes == (0.1, 0.001) and leaf.size == 1
    exo = value_and_gradient(losses.exo_pair, pairs)
    assert torch.allclose(of_genome(Genome(7.0, leaf), pairs), exo, rtol=1e-9, atol=1e-12)
    other = leaf._replace(genes=(0.25, 0.01))
    wanted = lambda p: losses.exo_pair(p, beta=0.25, label_smoothing=0.01)  # noqa: E731
    theirs = value_and_gradient(wanted, pairs)
    assert torch.allclose(of_genome(Genome(7.0, other), pairs), theirs, rtol=1e-9, atol=1e-12)


def test_opaque_leaves_and_trees_share_no_variable():
    """exo at two betas and a tree with variables of the same names: the sum of the three."""
    pairs, leaf = grid(torch.float64), opaque(EXO_PAIR)
    dpo = KNOWN_GENOMES["dpo"].tree
    other = leaf._replace(genes=(0.5, 0.001))
    tree = Node("plus", (1.0,), (Node("plus", (1.0,), (leaf, dpo)), other))
    wanted = (
        value_and_gradient(losses.exo_pair, pairs)
        + value_and_gradient(losses.dpo, pairs)
        + value_and_gradient(lambda p: losses.exo_pair(p, beta=0.5), pairs)
    )
    assert torch.allclose(of_genome(Genome(0.1, tree), pairs), wanted, rtol=1e-9, atol=1e-12)


def test_crossover_takes_a_part_of_one_into_the_other():
    rng = random.Random(6)
    leaf, mixed = Genome(0.1, opaque(EXO_PAIR)), KNOWN_GENOMES["discopop"]
    children = [breeding.crossover(mixed, leaf, rng) for _ in range(30)]
    graft = [node for child in children if child for _, node in places(child.tree)]
    assert leaf.tree in graft
    # Only a loss can take a loss's place: a draw of another sort gives nothing.
    assert None in children
    # discopop has the only beta that means anything.
    assert {child.beta for child in children if child} == {0.05}


def test_only_constants_of_an_opaque_leaf_vary():
    rng = random.Random(3)
    genome = Genome(0.1, opaque(EXO_PAIR))
    children = [breeding.vary_constant(genome, rng) for _ in range(20)]
    assert {child.tree.text for child in children} == {genome.tree.text}
    assert len({child.tree.genes for child in children}) == 20
    assert all(min(child.tree.genes) > 0 for child in children)
    assert breeding.vary_beta(genome, rng) is None
    assert breeding.swap_operation(genome, rng) is None
    assert breeding.hoist(genome, rng) is None


@pytest.mark.parametrize(
    "text",
    [
        "def f(pairs):\n    if pairs:\n        x = 1.0\n    return x",
        "def f(pairs):\n    x = pairs.rho",
        "def f(pairs, *, beta):\n    return beta * pairs.rho",
        "def f(pairs, *, beta=0.1):\n    beta = 2.0 * beta\n    return beta * pairs.rho",
        "x = 1",
        "def f(",
    ],
)
def test_what_cannot_be_a_leaf_is_refused(text):
    with pytest.raises(Unreadable):
        opaque(text)


def known(number, gain=0.0, **more):
    """A candidate of the archive, DPO by default."""
    entry = {"name": "dpo", "text": "", "by": "seed", "parents": [], "genome": None, "round": 0}
    entry |= {"size": 4, "gradient": {}, "gain": gain, "measured": "proxy"} | more
    return Known(f"p{number:04}", **entry)


def view_of(*candidates):
    return View(list(candidates), dpo=candidates[0], visited=2.0, setting="")


SEEDS = view_of(known(1), known(2, 0.01, name="ipo"), known(3, -0.1, name="td_dpo"))


@pytest.mark.parametrize("proposer", [Evolve(), RandomSearch()])
def test_proposals_follow_from_the_archive_and_the_seed(proposer):
    first, again, other = (
        [
            proposer.propose(SEEDS, round=1, number=k, rng=random.Random(f"{seed}:1:{k}"))
            for k in range(12)
        ]
        for seed in (7, 7, 8)
    )
    assert first == again
    assert len({p.text for p in first} & {p.text for p in other}) < 6
    for proposal in first:
        assert proposal.by == proposer.name and not proposal.stopped
        assert re.fullmatch(r"[a-z0-9_]{1,24}", proposal.name)
        genome = from_json(json.loads(json.dumps(proposal.genome)))
        assert write(genome, proposal.name) == proposal.text
        assert proposal.name == describe(genome)
        assert set(proposal.parents) <= {"p0001", "p0002", "p0003"}
        assert bool(proposal.parents) == (proposer.name == "evolve")


def test_the_same_genome_is_not_proposed_again():
    draw = lambda view: Evolve().propose(view, round=1, number=0, rng=random.Random(5))  # noqa: E731
    first = draw(SEEDS)
    stopped = {"at": "duplicate", "why": ""}
    seen = known(4, None, by="evolve", genome=first.genome, stopped=stopped)
    second = draw(view_of(*SEEDS.known, seen))
    assert second.genome != first.genome


def test_best_is_by_gain_then_bits_then_size():
    a, b = known(1, 0.05, bits=0.1, size=9), known(2, 0.05 + 2 * TIE, bits=0.0, size=30)
    assert best([a, b]) is b  # not a tie
    b.gain = a.gain + 0.9 * TIE
    assert best([a, b]) is a  # tied in gain; bits decide
    b.bits = a.bits - 0.9 * TIE
    assert best([a, b]) is a  # tied in bits; size decides
    b.size = 4
    assert best([b, a]) is b
    b.size = a.size
    assert best([b, a]) is a  # the earlier one


def parents_of(view, draws=400):
    """How often each candidate is a parent."""
    rng = random.Random(1)
    drawn = [Evolve().propose(view, round=9, number=0, rng=rng).parents for _ in range(draws)]
    return {known.id: sum(known.id in ids for ids in drawn) / draws for known in view.known}


def test_refused_and_unscored_candidates_are_no_parents():
    view = view_of(
        known(1),
        known(2, None),
        known(3, 0.5, stopped={"at": "proxy", "why": ""}),
        known(4, 0.1, stopped={"at": "rung1", "why": ""}),
    )
    shares = parents_of(view, 50)
    assert shares["p0002"] == shares["p0003"] == 0 and shares["p0004"] > 0.5


def test_the_oldest_leave_the_population_and_live_on_as_the_best_of_their_cell():
    old = known(1, 0.3, name="ipo", cell="old")
    newer = [known(i + 2, 0.0, size=3 + i, cell="new") for i in range(POPULATION)]
    rng = random.Random(2)
    drawn = [draw_parent(newer, [old, newer[0]], rng) for _ in range(2000)]
    assert sum(parent is old for parent in drawn) / 2000 == pytest.approx(0.125, abs=0.03)
    # The tournament prefers the best: 6 of 40, so the best one is in, and wins, 15 % of them.
    share = sum(parent is newer[0] for parent in drawn) / 2000
    assert share == pytest.approx(0.125 + 0.75 * 6 / 40, abs=0.04)
    assert parents_of(view_of(old, *newer), 40)["p0001"] > 0
    old.cell = None  # out of the population, and the best of no cell
    assert parents_of(view_of(old, *newer), 40)["p0001"] == 0


def test_before_anything_has_a_score_dpo_is_the_parent():
    assert parents_of(view_of(known(1, None), known(2, None, name="ipo")), 5)["p0001"] == 1


def test_a_models_loss_is_bred_from_as_a_leaf():
    rng = random.Random(4)
    model = known(2, 0.2, by="some-model", name="exo", text=EXO_PAIR)
    view = view_of(known(1), model)
    proposals = [Evolve().propose(view, round=1, number=0, rng=rng) for _ in range(40)]
    kinds = {proposal.operator for proposal in proposals if "p0002" in proposal.parents}
    assert {"vary constant", "wrap"} <= kinds
    for proposal in proposals:
        values = value_and_gradient(executed(proposal.text), grid(torch.float64))
        assert values.isfinite().all(), proposal.text
    model.text = "def f(pairs):\n    return"
    assert parents_of(view, 20) == {"p0001": 1, "p0002": 0}
