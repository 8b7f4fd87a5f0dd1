"""Arena-Hard's labels as the parts of its two measures, by version (v2.0: by category), judge and
baseline.

find_arena_hard          win rates, and how much of them the judge decided by position
find_style_controlled    the same with length and markdown held constant
"""

from typing import NamedTuple

from pref.analysis import arena_hard, judge_identity, part_sources, parts
from pref.analysis.parts import Common, Part, Source, Sources
from pref.analysis.runs import Run
from pref.files import run_folders

GAMES = {"arena_hard_v0.1": False}  # whether a question counts only if both games have a verdict
BY_CATEGORY = ("arena_hard_v2.0",)  # each category has a baseline of its own
MOST_BY_POSITION = 30  # percent; the same as of a judge's flips in its validation


class ArenaPart(NamedTuple):
    """The games of one part."""

    source: Source
    judged: dict[str, list[dict]]
    common: Common
    games: dict[str, list[arena_hard.Game]]
    facts: dict
    win_rates: dict[str, arena_hard.ArenaScore | None]
    both_games: bool


def arena_parts(runs: list[Run]) -> list[ArenaPart]:
    found = []
    for bench in parts.other_benches(runs):
        if not bench.startswith(part_sources.ARENA_HARD):
            continue

        def key_of(row: dict, bench: str = bench) -> Source | None:
            if row["grading"] != "pair":
                return None
            category = row["category"] if bench in BY_CATEGORY else None
            judge = judge_identity.key_of(row)
            return Source(bench, judge, row["grading"], row["baseline"], category)

        groups = parts.group_rows(runs, bench, lambda files: files.pairs, key_of)
        for source, judged in groups.items():
            common = parts.keep_common(judged)
            games = {
                run_id: [arena_hard.as_game(row) for row in rows]
                for run_id, rows in common.rows.items()
            }
            both_games = GAMES.get(bench, True)
            scores = {run: arena_hard.win_rate(of, both_games) for run, of in games.items()}
            facts = parts.describe_source(source, [row for rows in judged.values() for row in rows])
            facts |= position_facts(scores, facts["agreement_text"])
            found.append(ArenaPart(source, judged, common, games, facts, scores, both_games))
    return found


def position_facts(scores: dict[str, arena_hard.ArenaScore | None], agreement: str) -> dict:
    """How much of what a judge decided was decided by position, in all runs together.

    A judge that goes by position alone gives every run 50 % with an error of 0.
    """
    known = [score for score in scores.values() if score]
    n_pairs = sum(score.n_pairs for score in known)
    share = 100 * sum(score.disagree for score in known) / n_pairs if n_pairs else None
    facts = {"by_position": share, "position_warning": None}
    if share is not None and share > MOST_BY_POSITION:
        warning = (
            f"it decided {share:.0f} % of the questions by position (another answer won when the "
            f"two changed places; more than {MOST_BY_POSITION} %): scores are pulled towards 50"
        )
        facts |= {"position_warning": warning, "agreement_text": f"{agreement}; {warning}"}
    return facts


def arena_heading(source: Source, what: str) -> str:
    category = f", {source.category}" if source.category else ""
    return f"{parts.bench_title(source.bench)}{category}, {what}"


def arena_numbers(arena: ArenaPart, score, run_id: str, runs: list[Run], sources: Sources) -> dict:
    """The numbers of one run. score: an ArenaScore, or None."""
    rows = arena.common.rows[run_id]
    answers = next(run.bench(arena.source.bench).answers for run in runs if run.run_id == run_id)
    plain = arena.win_rates[run_id]  # a fit of all runs has values of other questions as well
    return {
        "score": score and score.score,
        "se_over_questions": score and score.se,
        "win_rate": plain and plain.score,
        "by_position": plain and plain.by_position,
        "length": parts.mean_length(parts.answer_lengths(rows, answers, {})),
        "n_rows": score and score.n_rows,
        **part_sources.counted(
            arena.source, rows, plain.values if plain else (), arena.common, sources
        ),
    }


def find_arena_hard(runs: list[Run], sources: Sources) -> list[Part]:
    """Win rates, by version, judge and baseline; of v2.0 by category too."""
    return [
        arena_part(arena, "win rate", arena.win_rates, runs, sources) for arena in arena_parts(runs)
    ]


def find_style_controlled(runs: list[Run], sources: Sources) -> list[Part]:
    """The same with length and markdown held constant: one fit over all runs of a part.

    Against a published baseline as arena-hard-auto does it, at the mean style of all judgements;
    against a run at equal style, so that a further run in the study does not move the others.
    """
    found = []
    for arena in arena_parts(runs):
        of_run = is_run(arena.source.baseline, runs)
        at = arena_hard.EQUAL if of_run else arena_hard.MEAN
        controlled = arena_hard.style_control(arena.games, arena.both_games, at=at)
        what = "style-controlled" + (" (at equal style)" if of_run else "")
        part = arena_part(arena, what, controlled.scores, runs, sources)
        part.extra["style_coefficients"] = controlled.coefficients
        if controlled.reason:
            part.notes.append(f"no style-controlled scores: {controlled.reason}")
        found.append(part)
    return found


def is_run(name: str, runs: list[Run]) -> bool:
    """Whether a baseline is a run of the results folder, also one that is not analysed now."""
    if not run_folders.is_run_id(name):
        return False
    return any((run.path.parent / name / "args.json").is_file() for run in runs)


def arena_part(
    arena: ArenaPart, what: str, scores: dict, runs: list[Run], sources: Sources
) -> Part:
    """scores: run id -> ArenaScore, or None; runs may be missing."""
    return Part(
        facts=arena.facts | {"heading": arena_heading(arena.source, what)},
        numbers={
            run_id: arena_numbers(arena, scores.get(run_id), run_id, runs, sources)
            for run_id in arena.common.rows
        },
        values={
            run_id: part_sources.as_values(score.values)
            for run_id, score in scores.items()
            if score
        },
        judged=arena.judged,
        questions=arena.common.questions,
    )
