"""The measures: what a study measures of its runs, each in one place.

A `Measure` says what it is called, in which unit a difference is, on what runs are compared, how
numbers are written, and where it comes from: `find` makes its `Part`s from the runs. A part is one
measure by one judge against one baseline; parts are never averaged together. Each part has, for
every run, the numbers of the whole run and its `Values`, whose means the toolkit's statistics
compare; everything behind that (cells, best of grid, differences, tables, figures, claims, answer)
is the same for all measures.

To add a measure, write a `find` (part_sources.py and arena_sources.py have those there are) and add
a line to MEASURES.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from pref.analysis import arena_sources, length_control, part_sources, task_sources
from pref.analysis.parts import Part, Sources
from pref.analysis.runs import MT_BENCH, Run, Scores

TASK = "task:"  # begins the name of an imported task as a metric of a claim


class Measure(NamedTuple):
    name: str  # the metric of a claim
    key: str  # its part or list of parts in aggregated_metrics.json, and of its files' names
    title: str  # of its tables
    short: str  # of its figures in the report
    label: str  # of its axis
    unit: str  # of a difference: "+0.98 MT-Bench points"
    claim_unit: str  # the same beside a claim, after a space
    units: str  # on what runs are compared
    digits: int  # after the decimal point
    columns: dict[str, str]  # of a cell's row: field -> header; the first one is compared
    limits: tuple[float, float] | None  # of its axis; None: those of the data
    missing: str  # why a claim is not measured where no run has it
    find: Callable[[list[Run], Sources], list[Part]]
    se: str = "se_over_questions"  # field with the standard error of a single run
    has_rate: bool = True  # whether a difference relative to the baseline means something
    proportion: bool = False  # whether a value is right or wrong, 1 or 0

    @property
    def value(self) -> str:
        """The field of a cell's row that is compared."""
        return next(iter(self.columns))

    def digits_of(self, column: str) -> int:
        """Digits after the decimal point in a column of a cell's row."""
        return 0 if column == "length" else self.digits

    @property
    def judged(self) -> bool:
        """Whether a judge gave it."""
        return self.name != "acc_ref" and not self.name.startswith(TASK)

    def heading(self, part: dict) -> str:
        """What the titles of a part's tables begin with."""
        named = part.get("heading") or self.title
        return f"{named}, {part['title']}" if part.get("title") else named

    def of_part(self, part: dict) -> "Measure":
        """The measure as a part's tables and figures call it: without AlpacaEval's df_gamed.csv
        there is no length-controlled win rate, and what there is must not pass for one. A task may
        read its answers in other ways too, each of which is a column.
        """
        if part.get("readings"):
            first, *rest = self.columns.items()
            others = {f"{task_sources.READING}{name}": name for name in part["readings"]}
            return self._replace(columns=dict([first, *others.items(), *rest]))
        name = length_control.UNREGULARISED
        if part.get("definition") != name:
            return self
        return self._replace(
            short=f"AlpacaEval 2, {name}",
            label=f"AlpacaEval 2, {name} (%)",
            unit=f"points of {name}",
            columns=self.columns | {"score": f"{name} %"},
        )

    def metric(self, part: dict) -> str:
        """The metric of a claim on this part."""
        return f"{TASK}{part['task']}" if self.name == TASK else self.name


ACCURACY = Measure(
    name="acc_ref",
    key="accuracy",
    title="Validation accuracy",
    short="accuracy",
    label="validation accuracy (best acc_ref)",
    unit="of pairs",
    claim_unit="of pairs",
    units="validation pairs",
    digits=3,
    columns={
        "best_acc_ref": "best acc_ref",
        "final_acc_ref": "final acc_ref",
        "final_acc_sum": "final acc_sum",
        "final_acc_mean": "final acc_mean",
        "margin_rho_first": "rho, first",
        "margin_rho_best": "rho, best",
    },
    limits=(0, 1),
    missing="No val_pairs.jsonl.",
    find=part_sources.find_accuracy,
    se="se_over_pairs",
    proportion=True,
)
MT = Measure(
    name="mt_bench",
    key=MT_BENCH,
    title="MT-Bench",
    short="MT-Bench",
    label="MT-Bench score (1-10, mean of both turns)",
    unit="MT-Bench points",
    claim_unit="MT-Bench",
    units="questions",
    digits=2,
    columns={
        "score": "score",
        "turn_1": "turn 1",
        "turn_2": "turn 2",
        "score_without_wrong_references": "without wrong refs",
    },
    limits=(0, 10),
    missing="No judgements.",
    find=part_sources.find_mt_bench,
)
PERCENT = (0.0, 100.0)
WINS = {"score": "win rate %", "discrete": "discrete %", "length": "characters per answer"}
ALPACA_EVAL = Measure(
    name="alpaca_eval",
    key="alpaca_eval",
    title="AlpacaEval 2 win rate",
    short="AlpacaEval 2 win rate",
    label="AlpacaEval 2 win rate (%)",
    unit="points of win rate",
    claim_unit="points of win rate",
    units="instructions",
    digits=2,
    columns=WINS,
    limits=PERCENT,
    missing="No AlpacaEval judgements (judge.py --bench alpaca_eval).",
    find=part_sources.find_alpaca_eval,
)
ALPACA_EVAL_LC = ALPACA_EVAL._replace(
    name="alpaca_eval_lc",
    key="alpaca_eval_lc",
    title="AlpacaEval 2 length-controlled win rate",
    short="AlpacaEval 2 length-controlled win rate",
    label="AlpacaEval 2 length-controlled win rate (%)",
    unit="points of length-controlled win rate",
    claim_unit="points of length-controlled win rate",
    columns={"score": "LC win rate %", "win_rate": "win rate %", "length": WINS["length"]},
    find=part_sources.find_length_controlled,
)
ARENA_HARD = Measure(
    name="arena_hard",
    key="arena_hard",
    title="Arena-Hard win rate",
    short="Arena-Hard win rate",
    label="Arena-Hard win rate (%)",
    unit="points of win rate",
    claim_unit="points of win rate",
    units="questions",
    digits=2,
    columns={"score": "win rate %", "by_position": "by position %", "length": WINS["length"]},
    limits=PERCENT,
    missing="No Arena-Hard judgements (judge.py --bench arena_hard_v0.1, or arena_hard_v2.0).",
    find=arena_sources.find_arena_hard,
)
ARENA_HARD_STYLE = ARENA_HARD._replace(
    name="arena_hard_style",
    key="arena_hard_style",
    title="Arena-Hard style-controlled",
    short="Arena-Hard, style-controlled",
    label="Arena-Hard style-controlled win rate (%)",
    unit="points of style-controlled win rate",
    claim_unit="points of style-controlled win rate",
    columns={"score": "style-controlled %", "win_rate": "win rate %", "length": WINS["length"]},
    find=arena_sources.find_style_controlled,
)
WIN_RATE = ALPACA_EVAL._replace(
    name="win_rate",
    key="win_rate",
    title="Win rate",
    short="Win rate",
    label="win rate (%)",
    units="questions",
    missing="No comparisons with a preference (judge.py --bench NAME --baseline RUN).",
    find=part_sources.find_win_rates,
)
REWARD = Measure(
    name="reward",
    key="reward",
    title="Reward",
    short="Reward",
    label="mean reward",
    unit="of reward",
    claim_unit="of reward",
    units="questions",
    digits=3,
    columns={"score": "reward", "length": WINS["length"]},
    limits=None,
    missing="No rewards (judge.py --judge rm:PATH).",
    find=part_sources.find_rewards,
    has_rate=False,  # a reward's zero means nothing
)
RATING = Measure(
    name="rating",
    key="rating",
    title="Rating",
    short="Rating",
    label="rating (1-10)",
    unit="points",
    claim_unit="points",
    units="questions",
    digits=2,
    columns={"score": "score", "length": WINS["length"]},
    limits=(0, 10),
    missing="No ratings on benchmarks other than MT-Bench (judge.py --bench NAME).",
    find=part_sources.find_ratings,
)
TASKS = Measure(
    name=TASK,
    key="tasks",
    title="Imported task",
    short="Imported task",
    label="score (%)",
    unit="points",
    claim_unit="points",
    units="questions",
    digits=2,
    columns={"score": "score %"},
    limits=PERCENT,
    missing="No scores on this task, by its program (judge.py --judge py:FILE) or imported "
    "(results/<run>/lm_eval/).",
    find=part_sources.find_tasks,
)

TASK_SCORE = Measure(
    name="task",
    key="task",
    title="Task",
    short="Task score",
    label="score by the task's program (0 to 1)",
    unit="of score",
    claim_unit="of score",
    units="questions",
    digits=3,
    columns={
        "score": "score",
        "length": WINS["length"],
        "distinct_2": "distinct-2",
        "cut_off": "cut off",
    },
    limits=(0, 1),
    missing="No scores by a task's program (judge.py --bench NAME --judge py:FILE).",
    find=task_sources.find_task,
)

# In the order of the report. The answer begins with the first that was measured.
MEASURES = (
    TASK_SCORE,
    *(MT, ALPACA_EVAL_LC, ALPACA_EVAL, ARENA_HARD_STYLE, ARENA_HARD),
    *(WIN_RATE, RATING, REWARD, TASKS),
)
BY_NAME = {measure.name: measure for measure in (*MEASURES, ACCURACY)}


def of_metric(metric: str) -> Measure | None:
    """The measure of a claim's metric; None if there is none of this name. task:NAME may also be
    TASK_SCORE on one benchmark: see `fits`.
    """
    if metric.startswith(TASK):
        return TASKS if metric != TASK else None
    return BY_NAME.get(metric)


def fits(metric: str, scores: Scores) -> bool:
    """Whether a claim on `metric` is about these scores: task:NAME is one task, be it imported or
    scored by a program here.
    """
    if scores.metric == TASK_SCORE.name and metric.startswith(TASK):
        return metric == f"{TASK}{scores.results['bench']}"
    return scores.metric == metric


def metric_names() -> list[str]:
    """What a claim's metric may be."""
    return [f"{TASK}NAME" if name == TASK else name for name in BY_NAME]


def run_scores(run: Run, sources: Sources) -> list[dict]:
    """What metrics.json of one run holds besides accuracy and MT-Bench: its numbers by every
    measure, over all questions that it was judged on. Style control needs all runs.
    """
    own = (one for one in MEASURES if one not in (MT, ARENA_HARD_STYLE))
    return [
        {"metric": measure.metric(part.facts), **part.facts, **part.numbers[run.run_id]}
        for measure in own
        for part in measure.find([run], sources)
    ]


def parts_of(comparison: dict) -> Iterable[tuple[Measure, dict]]:
    """Every part of aggregated_metrics.json that a judge or a task gave, with its measure."""
    for measure in MEASURES:
        for part in comparison.get(measure.key, []):
            yield measure.of_part(part), part
