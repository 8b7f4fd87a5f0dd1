"""Pages for report.py: an example with something in each part, and the same with hostile text."""

import html
from pathlib import Path

HOSTILE = (
    "<script>window.hacked = 1; alert(1)</script>",
    "</script><script>window.hacked = 1</script>",
    "javascript:alert(1)",
    "{{constructor.constructor('alert(1)')()}}",
    '"><img src=x onerror=alert(1)>',
    "{{data}} {{title}} {{script_hash}} \\1 \\g<1> & &lt;b&gt;",
    "' onmouseover='window.hacked=1' <!-- <style>*{display:none}</style> ]]> \ud800 \u2028",
)
EVERYTHING = " ".join(HOSTILE)


def tiny_svg(notes: str = "One line a run.", width: float = 400.5) -> str:
    """A white SVG of `width` x 216 points with a title and notes, as drawing.py writes them."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}pt" height="216pt" role="img">'
        f"<title>A title</title><desc>{html.escape(notes)}</desc>"
        '<text style="font-size: 9px" x="5" y="9">100 % of #1</text></svg>'
    )


def judgement(run: str, question: int, turn: int, score: float | None, **fields) -> dict:
    """A row of judgements.csv by judge-1; a score of None is a judgement without a rating."""
    row = {
        "bench": "mt_bench",
        "run_id": run,
        "question_id": question,
        "turn": turn,
        "choice": 0,
        "repeat": 0,
    }
    row |= {"judge": "judge-1", "grading": "single", "score": score}
    row |= dict.fromkeys(("winner", "baseline", "order", "preference", "label"))
    row |= {"status": "ok" if score is not None else "no rating"}
    return row | {"judgement": f"Reasons for {run} {question}.{turn}"} | fields


def example_page(folder: Path) -> dict:
    """Three runs and five questions. Scores of judge-1 for A = base and B = dpo:

    question 1    5 and 8
    question 2    8 and 5
    question 3    6 and 6
    question 4    7 and 7.5; turn 2 of dpo has no score
    question 5    9 and 1; the first answer of dpo is empty
    """
    (folder / "figure.svg").write_text(tiny_svg())
    runs = ["base", "dpo", "td_dpo"]
    scores = {1: (5, 8), 2: (8, 5), 3: (6, 6), 4: (7, 7.5), 5: (9, 1)}
    judged = [
        judgement(run, q, turn, None if (run, q, turn) == ("dpo", 4, 2) else float(value))
        for q, both in scores.items()
        for run, value in zip(runs, both)
        for turn in (1, 2)
    ]
    pair = {"grading": "pair", "baseline": "base", "status": "ok", "judgement": "B is nicer."}
    judged.append(judgement("dpo", 1, 1, None, winner="dpo", order="2", **pair))
    judged.append(judgement("dpo", 1, 1, 4.0, judge="judge-2", repeat=1))
    answers = [
        {
            "bench": "mt_bench",
            "run_id": run,
            "question_id": q,
            "choice": choice,
            "turns": [f"{run} {q}.1 choice {choice}", f"{run} {q}.2"],
        }
        for run in runs
        for q in scores
        for choice in ((0, 1) if run == "td_dpo" else (0,))
    ]
    for row in answers:
        if (row["run_id"], row["question_id"]) == ("dpo", 5):
            row["turns"] = ["  ", "dpo 5.2"]
    verdict = {
        "judge": None,
        "estimate": "+0.4",
        "interval": "0.1 to 0.7",
        "test": "p = 0.01",
        "why": "Because.",
    }
    return {
        "title": "Three runs",
        "facts": [["model", "tiny"], ["runs", 3], ["share", 0.25]],
        "opening": {"sentences": ["dpo is better.", "A run took a minute."], "verdict": "decided"},
        "answer": [
            {
                "score": "Score by judge-1",
                "verdict": "decided",
                "lead": "dpo is better than base.",
                "rows": [{"verdict": "better", "text": "dpo against base", "detail": "3 seeds"}],
            }
        ],
        "caveats": ["left out: old scores"],
        "folded": {"title": "1 more claim", "verdicts": [{"id": "e", "claim": "Claim e"}]},
        "verdicts": [
            {"id": name, "claim": f"Claim {name}", "verdict": outcome, **verdict}
            for name, outcome in zip(
                "abcd", ("supported", "contradicted", "undecided", "not measured")
            )
        ],
        "notes": ["a note"],
        "missing": ["something"],
        "tables": [
            {
                "id": "t",
                "title": "Numbers",
                "note": "A note.",
                "headers": ["cell", "value", "mixed", "count"],
                "rows": [
                    ["x10", 9.5, "7.10 ±0.2", 2],
                    ["x9", 10.25, "-", 10],
                    ["x1", None, "12 ±1", 1],
                    ["x2", -0.001, "-3", 100],
                ],
            },
        ],
        "figures": [{"title": "A figure", "svg": folder / "figure.svg", "alt": "white"}],
        "runs": [
            {
                "run_id": run,
                "status": "finished",
                "numbers": {"score": 6.5 + i, "acc": None},
                "arguments": {
                    "loss": run,
                    "lr": 5e-7,
                    "layers": ["q", "v"],
                    "versions": {"torch": f"2.{i}"},
                },
            }
            for i, run in enumerate(runs)
        ],
        "benches": [{"name": "mt_bench", "title": "MT-Bench", "left_out": 0}],
        "questions": {
            "mt_bench": {
                q: {
                    "category": "math" if q < 4 else "writing",
                    "turns": [f"Ask {q}.1", f"Ask {q}.2"],
                }
                for q in scores
            }
        },
        "answers": answers,
        "judgements": judged,
    }


def hostile_page(folder: Path) -> dict:
    """The example with hostile text appended to every value that is text."""
    page = example_page(folder)

    def spoil(value):
        if isinstance(value, dict):
            return {key: spoil(item) for key, item in value.items()}
        if isinstance(value, list):
            return [spoil(item) for item in value]
        return f"{value} {EVERYTHING}" if isinstance(value, str) else value

    spoiled = spoil(page)
    for row in spoiled["judgements"]:
        row["grading"] = row["grading"].split()[0]
    spoiled["questions"] = {spoil(bench): rows for bench, rows in spoiled["questions"].items()}
    spoiled["runs"][0]["arguments"] |= {
        EVERYTHING: EVERYTHING,
        "__proto__": EVERYTHING,
        "constructor": "one",
    }
    spoiled["runs"][0]["numbers"] |= {EVERYTHING: 1.0}
    return spoiled
