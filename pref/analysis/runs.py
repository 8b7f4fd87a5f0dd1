"""The records that the analysis passes on: a training run, and a cell of the grid.

results_folder.py reads a `Run` from each run folder, analyze.py groups runs into `Cell`s, and every
comparison is between cells. Rows of tables are plain dicts instead, because their keys are the
format of aggregated_metrics.json and of the CSV files.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from pref.analysis.lm_eval_files import Imported
from pref.files.benchmarks import MT_BENCH
from pref.files.mt_bench import AnswerKey

# Options that older runs lack, with the value that they had.
LATER_OPTIONS = {
    "append_eos": False,
    "round": 1,
    "reference_model": "start",
    "tune": "lora",
    "optim": "adamw",
    "freeze": None,
    "use_rslora": False,
    "loraplus_lr_ratio": 1.0,
}
# Settings that follow from `tune`, or that only one of its values has: between an adapter and a
# whole model they are no difference of their own.
OF_TUNE = {"lora_r", "lora_alpha", "lora_dropout", "lora_targets", "use_rslora"}
OF_TUNE |= {"loraplus_lr_ratio", "quant", "base_sha256", "optim", "freeze"}
ACCURACIES = ("best_acc_ref", "final_acc_ref", "final_acc_sum", "final_acc_mean")
TRAINING_NUMBERS = ("steps", "nonfinite_steps", "wall_s", "tokens", "peak_gib")
SUMMARY_KEYS = (*ACCURACIES, "best_step", *TRAINING_NUMBERS)  # what is read of summary.json

# run id -> unit -> part -> score. MT-Bench: question -> turn -> mean rating. Validation accuracy:
# pair id -> 0 -> 0, 0.5 or 1. Pairwise judgements: question -> (turn, choice, repeat) -> 0, 0.5, 1.
# Other measures: question -> 0 -> a number whose mean over questions is the run's score.
Values = dict[str, dict]


class Margins(NamedTuple):
    """Margins of one validation pair in nats; log-probabilities are sums over response tokens."""

    rho: float  # (policy - reference) of the chosen response, less that of the rejected one
    delta: float  # policy: chosen response less rejected one


class JudgeKey(NamedTuple):
    """What makes ratings comparable: ratings with different keys are never averaged."""

    judge: str
    prompts: str | None
    refs: str | None  # the reference answers that the judge was shown
    judge_id: str | None = None  # hash of model, parameters, server, prompts and references


@dataclass(frozen=True, eq=False)
class BenchFiles:
    """What a run folder has of one benchmark: results/<run>/<bench>/, read and checked."""

    answers: dict[AnswerKey, dict] = field(default_factory=dict)  # rows of answers.jsonl
    judged: dict[JudgeKey, list[dict]] = field(default_factory=dict)  # single-answer ratings
    pairs: list[dict] = field(default_factory=list)  # comparisons with a baseline's answers
    rewards: list[dict] = field(default_factory=list)  # scores by reward models, tasks' programs
    kl: dict | None = None  # on-policy KL to the base model, of these answers

    def judgements(self) -> list[dict]:
        """All rows of judgements.csv."""
        return [*(row for rows in self.judged.values() for row in rows), *self.pairs, *self.rewards]


class Stale(NamedTuple):
    """What of a run was taken out because it does not belong to the rest (see provenance.py)."""

    what: str
    why: str
    next: str  # what supplies it


@dataclass(frozen=True, eq=False)
class Run:
    """One run folder, read and checked. What the folder lacks is None or empty."""

    run_id: str
    path: Path
    loss: str  # an untrained model has no loss: it goes by its run id
    args: dict  # args.json; beta, tau and seed are finite or None
    settings: dict  # the arguments that make another cell if they differ (besides beta and tau)
    status: str  # of summary.json, or "untrained", "unfinished", "no training record"
    summary: dict | None = None  # SUMMARY_KEYS of summary.json, finite or None
    steps: list[dict] = field(default_factory=list)  # metrics.jsonl: optimiser steps, in order
    evals: list[dict] = field(default_factory=list)  # metrics.jsonl: evaluations, in order
    # val_pairs.jsonl: step -> pair id -> margins, None where a log-probability is not finite
    val: dict[float, dict[str, Margins | None]] = field(default_factory=dict)
    length_bias: list[dict] = field(default_factory=list)  # accuracy by length difference
    benches: dict[str, BenchFiles] = field(default_factory=dict)  # by name; see `bench`
    imported: Imported | None = None  # results of lm-evaluation-harness
    stale: list[Stale] = field(default_factory=list)

    def bench(self, name: str) -> BenchFiles:
        """What the run has of a benchmark; empty files if it has nothing."""
        return self.benches.get(name) or BenchFiles()

    def with_bench(self, name: str, files: BenchFiles, *stale: Stale) -> "Run":
        """The run with other files of a benchmark, and what was taken out of them."""
        benches = self.benches | {name: files}
        return replace(self, benches=benches, stale=[*self.stale, *stale])

    # MT-Bench's, on whose answers a run's KL, length and settings are measured.
    @property
    def judged(self) -> dict[JudgeKey, list[dict]]:
        return self.bench(MT_BENCH).judged

    @property
    def judged_pairs(self) -> list[dict]:
        return self.bench(MT_BENCH).pairs

    @property
    def answers(self) -> dict[AnswerKey, dict]:
        return self.bench(MT_BENCH).answers

    @property
    def kl(self) -> dict | None:
        return self.bench(MT_BENCH).kl

    @property
    def beta(self) -> float | None:
        return self.args["beta"]

    @property
    def tau(self) -> float | None:
        return self.args["tau"]

    @property
    def seed(self) -> float | None:
        return self.args["seed"]

    @property
    def round(self) -> int:
        """Which round of training on the model's own answers this is."""
        return self.args.get("round") or 1

    @property
    def untrained(self) -> bool:
        return self.args["loss"] is None

    @property
    def best_step(self) -> float | None:
        """Optimiser step of the best evaluation, whose adapter is kept; None if there was none."""
        return self.summary["best_step"] if self.summary else None

    @property
    def best_val(self) -> dict[str, Margins | None]:
        """Validation pairs at the best evaluation; empty for a run without one."""
        return self.val.get(self.best_step, {})


@dataclass(frozen=True, eq=False)
class Cell:
    """Runs that differ in their seed alone."""

    loss: str
    beta: float | None
    tau: float | None
    settings: dict  # those in which the runs of this loss differ, besides beta and tau
    runs: list[Run]
    label: str  # its name in tables and figures
    # Mean best_acc_ref over its runs, of a later round over those of round 1 that they come from;
    # None if none has it.
    accuracy: float | None = None

    @property
    def untrained(self) -> bool:
        return self.runs[0].untrained

    @property
    def round(self) -> int:
        return self.runs[0].round

    @property
    def rank(self) -> tuple[float, int]:
        """The best of several cells has the highest: validation accuracy, then the later round.
        For cells whose accuracy is known.
        """
        return self.accuracy, self.round


class ScoredCell(NamedTuple):
    """A cell together with its row in a table of scores."""

    cell: Cell
    row: dict


class Scores(NamedTuple):
    """One measure by one judge: validation accuracy, MT-Bench, a win rate against a baseline."""

    metric: str  # as claims name it: "acc_ref", "mt_bench", "alpaca_eval_lc", ... (measures.py)
    judge: str | None  # the judge's title; None for what nobody judges
    smoke: str  # why the scores measure nothing, or ""
    values: Values
    results: dict  # this part of aggregated_metrics.json
