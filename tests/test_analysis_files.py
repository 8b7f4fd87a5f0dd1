"""What analyze.py writes and prints: report, tables, figures, and the same bytes each time."""

import contextlib
import csv
import io
import json
import math
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
from studies import (
    DRAWS,
    coarse_figures,
    compared,
    flat_ratings,
    has_note,
    load,
    make_base,
    make_grid,
    make_run,
    make_study,
    rating,
    write_curve,
)

import analyze
from pref.analysis import figures, paper_tables, run_figures, table_files
from pref.files import drawing
from pref.files.console import UserError
from pref.files.judgements import read_judgements, write_judgements

pytestmark = pytest.mark.slow

SHOWN_RUN = "td_dpo_b0.1_s42"


@pytest.fixture(autouse=True, scope="module")
def coarse():
    with coarse_figures():
        yield


@pytest.fixture
def unsaved(monkeypatch):
    """Figures by name, not written."""
    by_name = {}
    monkeypatch.setattr(
        drawing, "save_figure", lambda figure, stem, *_, **__: by_name.update({stem.name: figure})
    )
    return by_name


# ---- a whole study ------------------------------------------------------------------------------


class Analysed(NamedTuple):
    """A results folder after analyze.py, and what that printed."""

    results: Path
    printed: str


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study that has every table and figure; of the figures of single runs, one is drawn."""
    results = tmp_path_factory.mktemp("study")
    make_study(results, seeds=(42, 43))
    asked = {"grading": "pair", "status": "ok", "winner": SHOWN_RUN, "baseline": "base"}
    pair = [rating(q, 1, None, order=order, **asked) for q in (81, 82) for order in ("1", "2")]
    judged = results / SHOWN_RUN / "mt_bench" / "judgements.csv"
    write_judgements(judged, read_judgements(judged) + pair)
    return Analysed(results, analyse_with_one_run_figure(results))


def analyse_with_one_run_figure(results):
    draw_run = run_figures.draw_run

    def draw_shown(run):
        if run.run_id == SHOWN_RUN:
            draw_run(run)

    only_shown = mock.patch.object(run_figures, "draw_run", draw_shown)
    with only_shown, contextlib.redirect_stdout(io.StringIO()) as printed:
        analyze.main([str(results), *DRAWS])
    return printed.getvalue()


def test_report_of_a_study(study):
    report = (study.results / "comparison" / "report.html").read_text()
    for text in ("SUPPORTED", "not measured", SHOWN_RUN, "Win rates", "data:image/svg+xml,"):
        assert text.lower() in report.lower(), text
    lines = study.printed.splitlines()
    assert len(lines) <= 25 and lines[2].startswith("DECIDED: td_dpo β=")
    assert str(study.results / "comparison" / "report.html") in study.printed


def test_tables_of_a_study(study):
    folder = study.results / "comparison" / "tables"
    stems = {path.stem for path in folder.iterdir()}
    assert stems >= {"verdicts", "mt_bench_headline", "accuracy_mcnemar"}
    assert stems >= {"pairs", "stability", "movement"}
    for stem in stems:
        markdown = (folder / f"{stem}.md").read_text().splitlines()
        lines = [line.replace(r"\|", "") for line in markdown if line[:1] == "|"]
        assert len(lines) > 2 and len({line.count("|") for line in lines}) == 1, stem
        latex = (folder / f"{stem}.tex").read_text()
        body = latex.split(r"\midrule")[1].split(r"\bottomrule")[0].strip().splitlines()
        n_columns = len(latex.split(r"\begin{tabular}{")[1].split("}")[0])
        assert body, stem
        assert all(line.replace(r"\&", "").count("&") == n_columns - 1 for line in body), stem


def test_figures_of_a_study(study):
    drawn = list((study.results / "comparison" / "figures").iterdir())
    stems = {path.stem for path in drawn}
    assert stems >= {"comparison_win_matrix", "comparison_movement"}
    assert stems >= {"comparison_mt_bench_over_beta", "comparison_learning_curves"}
    assert len(drawn) == 3 * len(stems)  # PDF, PNG and SVG
    drawn += (study.results / SHOWN_RUN / "figures").iterdir()
    assert len(drawn) == 3 * len(stems) + 2 and all(path.stat().st_size > 2000 for path in drawn)


def test_metrics_of_a_run(study):
    metrics = json.loads((study.results / SHOWN_RUN / "metrics.json").read_text())
    assert metrics["kl_to_base"]["kl"] == pytest.approx(1.5)
    assert metrics["length_bias"][0]["n_pairs"] == 40


def test_a_second_time_every_file_and_line_is_the_same(study):
    def contents():
        return {path: path.read_bytes() for path in study.results.rglob("*") if path.is_file()}

    before = contents()
    assert analyse_with_one_run_figure(study.results) == study.printed
    assert contents() == before


# ---- smoke tests, nothing to compare, errors ----------------------------------------------------


def test_a_small_judge_is_marked_everywhere(tmp_path, capsys, unsaved):
    small = {"judge": "SmolLM2-135M", "judge_params_b": 0.135}
    make_base(tmp_path, ratings=flat_ratings(4, **small))
    folder = make_run(tmp_path, "dpo_s42", "dpo", 0.1, summary={}, ratings=flat_ratings(5, **small))
    write_curve(folder, bad=(3,))
    make_run(tmp_path, "td_s42", "td_dpo", 0.1, 1, summary={}, ratings=flat_ratings(6, **small))
    make_run(tmp_path, "td2_s42", "td_dpo", 0.1, 2, summary={}, ratings=flat_ratings(7, **small))
    assert analyze.main([str(tmp_path), *DRAWS, "--verbose"]) is None

    # No figure over beta (one beta) and no differences of accuracy (no validation pairs).
    kinds = ["accuracy_bars", "accuracy_boxes", "accuracy_heatmap", "learning_curves"]
    kinds += [f"mt_bench_{name}" for name in ("bars", "boxes", "heatmap", "differences")]
    kinds += ["mt_bench_categories"]
    assert set(unsaved) == {f"comparison_{kind}" for kind in kinds} | {"dpo_s42_learning_curve"}
    for kind in kinds:
        if kind.startswith("mt_bench"):
            assert "SMOKE TEST" in " ".join(unsaved[f"comparison_{kind}"].heading.notes)

    comparison = tmp_path / "comparison"
    assert json.loads((folder / "metrics.json").read_text())["mt_bench"][0]["smoke_test"] is True
    numbers = json.loads((comparison / "aggregated_metrics.json").read_text())
    assert numbers["mt_bench"][0]["smoke_test"] is True
    with open(comparison / "tables" / "mt_bench_by_turn.csv", encoding="utf-8", newline="") as file:
        base, dpo, *_ = csv.DictReader(file)
    shown = ("label", "score", "smoke_test", "judge")
    assert [base[key] for key in shown] == ["base", "4.0", "True", "SmolLM2-135M"]
    assert [dpo[key] for key in shown] == ["dpo β=0.1", "5.0", "True", "SmolLM2-135M"]
    printed = capsys.readouterr().out
    assert printed.count("*** SMOKE TEST") == 3  # by turn, by category, improvement
    assert "+1.00 +20.0% (dpo β=0.1: 5.00, n=1)" in printed


def test_tables_of_judges_that_are_gone_do_not_stay(tmp_path, unsaved):
    folder = make_run(tmp_path, "a", ratings=flat_ratings(6) + flat_ratings(5, judge="other"))
    analyze.main([str(tmp_path), *DRAWS])
    assert (tmp_path / "comparison" / "tables" / "mt_bench_by_turn_other.csv").exists()
    write_judgements(folder / "mt_bench" / "judgements.csv", flat_ratings(6))
    analyze.main([str(tmp_path), *DRAWS])
    tables = {path.name for path in (tmp_path / "comparison" / "tables").iterdir()}
    assert "mt_bench_by_turn.csv" in tables and not any("other" in name for name in tables)


def test_figures_of_judges_that_are_gone_do_not_stay(tmp_path, unsaved):
    stale = tmp_path / "comparison" / "figures" / "comparison_mt_bench_bars_other.png"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"")
    make_run(tmp_path, "a", ratings=flat_ratings(6))
    analyze.main([str(tmp_path), *DRAWS])
    assert "comparison_mt_bench_bars" in unsaved and not stale.exists()


def test_no_common_question_still_gives_a_report(tmp_path):
    make_run(tmp_path, "a", "dpo", ratings=[rating(81, 1, 2)])
    make_run(tmp_path, "b", "td_dpo", tau=1, ratings=[rating(82, 1, 4)])
    analyze.main([str(tmp_path), *DRAWS])
    assert (tmp_path / "comparison" / "report.html").is_file()


def test_a_judge_that_never_gave_a_rating_still_gives_a_report(tmp_path):
    make_base(tmp_path, ratings=flat_ratings(None))
    make_run(tmp_path, "a", "dpo", ratings=flat_ratings(None))
    analyze.main([str(tmp_path), *DRAWS])
    assert (tmp_path / "comparison" / "report.html").is_file()


def test_an_error_leaves_nothing_half_written(tmp_path):
    make_run(tmp_path, "a", summary={})
    make_run(tmp_path, "b", seed=43, ratings=[rating(81, 1, 6)] * 2)
    with pytest.raises(UserError):
        analyze.main([str(tmp_path), *DRAWS])
    assert not (tmp_path / "a" / "metrics.json").exists() and not (tmp_path / "comparison").exists()


# ---- tables -------------------------------------------------------------------------------------


def test_markdown_and_latex_escape_what_they_show():
    columns = [paper_tables.Column("a_b", "text"), paper_tables.Column("β", "number", 2)]
    rows = [{"text": "x|y_{z}\n# $<script>", "number": 0.5}]
    table = paper_tables.Table("t", "50% of a_b & c", None, columns, rows)
    last = table_files.markdown_text(table).splitlines()[-1]
    assert last == r"| x\|y\_{z} # $\<script\> | 0.50 |"
    latex = table_files.latex_text(table)
    assert r"x|y\_\{z\} \# \$$<$script$>$ & 0.50 \\" in latex and r"50\% of a\_b \& c" in latex
    assert r"\begin{tabular}{lr}" in latex and r"a\_b & $\beta$" in latex


# ---- figures ------------------------------------------------------------------------------------


def draw_comparison(folder, comparison):
    for draw in figures.comparison_jobs(folder, comparison, []):
        draw()


def test_a_drawn_figure_is_not_drawn_again_until_its_numbers_change(tmp_path, monkeypatch):
    folder = make_run(tmp_path, "a", summary={"best_step": 4})
    write_curve(folder)
    png = folder / "figures" / "a_learning_curve.png"
    titles = []

    def draw_small(run, title, stem, key):
        titles.append(title)
        drawing.save_figure(drawing.new_figure(2, 2, title), stem, key)

    monkeypatch.setattr(run_figures, "draw_learning_curve", draw_small)

    def draw():
        run_figures.draw_run(load(tmp_path)[0])
        return png.read_bytes()

    first = draw()
    assert draw() == first and titles == ["a (finished)"]
    png.write_bytes(first[:200])  # torn
    assert draw() == first and len(titles) == 2
    png.with_suffix(".pdf").unlink()
    assert draw() == first and len(titles) == 3
    write_curve(folder, steps=12)
    assert draw() != first and len(titles) == 4


def test_learning_curve_marks_nonfinite_steps_and_the_best(tmp_path, unsaved):
    write_curve(make_run(tmp_path, "a", summary={"best_step": 4}), bad=(3, 6))
    run_figures.draw_run(load(tmp_path)[0])
    figure = unsaved["a_learning_curve"]
    loss = figure.axes[0]
    marks = [
        line.get_xdata()[0]
        for line in loss.get_lines()
        if len(line.get_xdata()) == 2 and line.get_label()[0] == "_"
    ]
    assert sorted(marks) == [3, 4, 6]  # and not 7 or 8, though `nonfinite` counts on
    assert math.isnan(loss.get_lines()[0].get_ydata()[2])
    labels = [text.get_text() for text in figure.subfigs[0].legends[0].get_texts()]
    assert labels == ["best checkpoint (step 4)", "non-finite step (2)"]


def test_bars_say_what_the_error_bar_is(tmp_path, unsaved):
    make_grid(tmp_path)
    draw_comparison(tmp_path, compared(tmp_path))
    bars = unsaved["comparison_mt_bench_bars"]
    assert [text.get_text() for text in bars.legends[0].get_texts()] == [
        "error bar, thin: SE over questions (one seed)",
        "error bar: SD over seeds",
        "untrained model (base): 4.00",
        "baseline (dpo β=0.5, best of 2 by validation accuracy): 5.00",
    ]
    assert "7.00 ± 1.00  n=3" in [text.get_text() for text in bars.axes[0].texts]
    assert [label.get_text() for label in bars.axes[0].get_yticklabels()][0] == "base"
    heatmap = unsaved["comparison_mt_bench_heatmap"]
    cells = [text.get_text() for axis in heatmap.axes for text in axis.texts]
    assert "7.00\n± 1.00\nn=3" in cells and "5.00\nn=1" in cells


def test_smoke_test_stands_in_figure_titles(tmp_path, unsaved):
    make_run(tmp_path, "a", ratings=flat_ratings(6, judge="SmolLM2-135M"))
    comparison = compared(tmp_path)
    draw_comparison(tmp_path, comparison)
    assert "SMOKE TEST" in " ".join(unsaved["comparison_mt_bench_bars"].heading.notes)
    assert has_note(comparison, "no heat map of MT-Bench", "no loss has two cells")
