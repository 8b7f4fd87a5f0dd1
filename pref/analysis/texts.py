"""Numbers and verdicts as text, the same in tables, figures, the report and on the terminal."""

import re

# Where all runs are trial runs (train_pref.py --mode trial).
TRIAL = "TRIAL RUNS: a few steps that show that the path works; these numbers measure nothing"


def number_text(x: float) -> str:
    """A setting's number: short, unless another number would then have the same text."""
    return f"{x:g}" if float(f"{x:g}") == x else repr(x)


def setting_text(value) -> str:
    """A setting's value in a label: "none" where the run has none, the start of a hash."""
    if value is None:
        return "none"
    if isinstance(value, float):
        return number_text(value)
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{40,64}", value):
        return value[:8]
    return str(value)


def show(value, digits: int | None = None) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:g}" if digits is None else f"{value:.{digits}f}"
    return str(value)


def count_text(n: int, units: str) -> str:
    """E.g. "80 questions", "1 question"; units: a plural in -s."""
    return f"{n} {units if n != 1 else units.removesuffix('s')}"


def p_text(p: float | None) -> str | None:
    if p is None:
        return None
    if p < 1e-4:
        return "< 0.0001"
    return f"{p:.4f}" if p < 0.1 else f"{p:.2f}"


def percent(value: float | None) -> str | None:
    return None if value is None else f"{value:+.1%}"


def verdict_texts(row: dict) -> dict:
    """A verdict for people to read: every value is text or None.

    row: of "claims" in aggregated_metrics.json.
    """
    low_to_high = [row["low"], row["high"]]
    if row["kind"] == "variance_reduction":
        # Shown as the change of the variance: a reduction of 0.4 is -40 %. So the ends swap places.
        unit, number, ends = " variance over beta", change_text, low_to_high[::-1]
    elif row["metric"] is None:
        unit, number, ends = " of runs", "{:.2f}".format, low_to_high
    else:
        unit = f" {row['unit']}" if row.get("unit") else ""
        number, ends = "{:+.3f}".format, low_to_high

    compared = " against ".join(filter(None, (row["a"], row["b"])))
    estimate = interval = test = None
    if row["estimate"] is not None:
        estimate = f"{number(row['estimate'])}{unit} ({compared})"
    if row["low"] is not None:
        interval = f"[{', '.join(map(number, ends))}]"
        interval += f"{unit} ({compared})" if estimate is None else ""
    if row["test"]:
        test = f"{row['test']}: p {p_text(row['p']) or 'none'}"
        if row["p_holm"] is not None:
            test += f", Holm {p_text(row['p_holm'])}"
    return {
        "id": row["id"],
        "claim": row["claim"],
        "verdict": row["verdict"],
        "judge": (row["judge"] or "").removeprefix("judge ") or None,
        "estimate": estimate,
        "interval": interval,
        "test": test,
        "why": row["why"] or None,
    }


def change_text(reduction: float) -> str:
    return "none" if reduction == float("-inf") else f"{-100 * reduction:+.0f} %"
