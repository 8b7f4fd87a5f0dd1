"""Layouts of the tables that say what a score was bought with, and what selection found: at equal
KL, from round to round, selection by validation accuracy against the true score.
"""

from pref.analysis.measures import Measure
from pref.analysis.table_parts import CELL_HEADER, Column, Layout, interval_column, p_column


def equal_kl(measure: Measure) -> Layout:
    digits = measure.digits
    return Layout(
        "at equal KL",
        [
            Column("loss τ", "curve"),
            Column("against", "baseline", context=True),
            Column("KL", "kl", 2),
            Column("score", "score", digits),
            Column("score of the baseline", "baseline_score", digits),
            Column("difference", "estimate", digits),
            interval_column("difference, 95 % interval", digits),
            p_column("p", "p"),
            p_column("p (Holm)", "p_adjusted"),
            Column("detectable difference", "detectable", digits),
            Column("seeds", "seeds_compared", context=True),
            Column(measure.units, "n_units", context=True),
            Column("differs in", "differs_in", context=True),
            Column("not compared", "why"),
        ],
        "Each loss and tau over its betas, interpolated between runs of one seed, at three KLs "
        "(nats an answer) that both reach. Test and interval are the primary ones, over questions "
        "and seeds, and count that a run's KL is an estimate too. Holm-adjusted over all rows.",
        paper=("loss τ", "KL", "difference", "difference, 95 % interval", "p (Holm)"),
    )


def gold_selection(measure: Measure) -> Layout:
    digits = measure.digits
    return Layout(
        "what validation accuracy selects",
        [
            Column("loss", "loss"),
            Column("cells", "cells"),
            Column("rank correlation", "spearman", 2),
            interval_column("rank correlation, 95 % interval", 2, "spearman_low", "spearman_high"),
            Column("selected by accuracy", "by_accuracy"),
            Column("its score", "by_accuracy_score", digits),
            Column("its rank by score", "rank_of_selected"),
            Column("best by score", "by_score"),
            Column("best score", "by_score_score", digits),
            Column("apparent cost", "apparent_cost", digits),
            Column("cost", "cost", digits),
            interval_column("cost, 95 % interval", digits),
            p_column("p", "p"),
            Column("seeds", "seeds_compared", context=True),
            Column(measure.units, "n_units", context=True),
        ],
        "Rank correlation: Spearman's, of validation accuracy and score over cells. Cost: what "
        "selecting by the score would have given above selecting by accuracy. The apparent cost is "
        "flattered, as every maximum is; the cost is measured on questions and seeds that had no "
        "part in selecting by score (with one seed, on questions alone), and can be negative.",
        paper=("loss", "rank correlation", "its score", "best score", "cost"),
    )


def rounds(measure: Measure) -> Layout:
    digits = measure.digits
    return Layout(
        "from round to round",
        [
            Column(CELL_HEADER, "chain"),
            Column("round", "round"),
            Column("seeds", "n_seeds", context=True),
            Column("score", "score", digits),
            interval_column("95 % interval", digits),
            Column("SD over seeds", "score_sd", digits),
            Column("KL", "kl", 2),
            Column("gain", "gain", digits),
            interval_column("gain, 95 % interval", digits, "gain_low", "gain_high"),
            p_column("p", "gain_p"),
            Column("over", "over"),
            Column("accuracy", "accuracy", 3),
        ],
        "Gain: over the round before, of the same seeds; of round 1, over the untrained model. KL: "
        "to the base model, in nats an answer. Accuracy: best acc_ref; above round 1 on validation "
        "pairs of each run's own, so that rounds cannot be compared by it. p is not adjusted.",
        paper=(CELL_HEADER, "round", "score", "95 % interval", "KL"),
    )
