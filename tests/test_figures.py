"""How figures look: colours, markers, ticks, titles and text, read from the figures themselves."""

import math
import xml.etree.ElementTree as ET

import pytest
from matplotlib.colors import to_hex

from pref.analysis import curve_figures, figures, frontier_figures, pair_figures, score_figures
from pref.analysis.figure_parts import Look, styles_of
from pref.files import drawing

BETAS, TAUS = (0.01, 0.05, 0.5, 2.5), (0.5, 1.0, 2.0)
COLOURS = {"dpo": "#0072b2", "discopop": "#e69f00", "td_dpo": "#009e73", "base": "#777777"}
MARKERS = {None: "o", 0.5: "s", 1.0: "^", 2.0: "D"}
JUDGE = "80 questions, judge " + "a-name-that-is-long " * 5


def cell(loss, beta, tau=None, score=6.0):
    label = " ".join(filter(None, (loss, beta and f"β={beta:g}", tau and f"τ={tau:g}")))
    row = {"label": label, "loss": loss, "beta": beta, "tau": tau, "settings": None}
    row |= {"untrained": beta is None, "n_seeds": 3, "n_diverged": 0, "score": score}
    row |= {"score_sd": 0.2, "low": score - 0.5, "high": score + 0.5, "kl": 0.1 if beta else 0.0}
    return row | {"kl_sd": 0.1, "kl_answers": "mt_bench", "se_over_questions": None}


CELLS = [cell("base", None, score=4.0)]
CELLS += [cell(loss, beta, score=6 - beta) for loss in ("discopop", "dpo") for beta in BETAS]
CELLS += [cell("td_dpo", beta, tau, 6.5 - beta + tau) for beta in BETAS for tau in TAUS]
for i, one in enumerate(CELLS[1:]):
    one |= {"kl": 0.2 * 1.3**i, "curve": f"{one['loss']} {one['tau']}"}
STYLES = styles_of(CELLS, "dpo")
LOOK = Look("MT-Bench", "MT-Bench score (1-10)", (0, 10), 2, "questions", "score", (JUDGE,), STYLES)


@pytest.fixture(scope="module")
def drawn():
    """Figures by name, drawn once and not written."""
    by_name, patch = {}, pytest.MonkeyPatch()
    patch.setattr(drawing, "save_figure", lambda figure, name, **_: by_name.update({name: figure}))
    row = {"comparison": "matched beta", "paired": "paired", "estimate": 0.5, "low": 0.1}
    row |= {"high": 0.9, "p_adjusted": 0.02}
    pairs = [
        row | {"loss": c["loss"], "tau": c["tau"], "proposed": c["label"], "baseline": f"dpo {i}"}
        for i, c in enumerate(CELLS)
        if c["loss"] in ("td_dpo", "discopop")
    ]
    runs = [{"loss": one["loss"], "value": one["score"]} for one in CELLS]
    moved = [one | {"accuracy": 0.6, "anchor": None, "run_id": one["label"]} for one in CELLS]
    panels = curve_figures.find_movement_panels(moved)
    of_category = [one | {"category": name} for one in CELLS for name in ("math", "writing")]
    part = {"cells": CELLS, "categories": of_category}
    part["selection"] = [{"selected": one["label"]} for one in CELLS if one["beta"] == 0.5]
    series = curve_figures.find_series(CELLS, "score")
    grids = curve_figures.find_grids(CELLS, "score")
    with drawing.own_style():
        score_figures.draw_bars("bars", CELLS, LOOK, {"untrained": 4.0})
        score_figures.draw_boxes("boxes", runs, LOOK)
        score_figures.draw_categories("categories", part, LOOK)
        pair_figures.draw_differences("differences", pairs, LOOK)
        curve_figures.draw_beta_curves("over_beta", series, [4.0], LOOK)
        curve_figures.draw_heatmaps("heatmap", grids, LOOK)
        curve_figures.draw_movement("movement", moved, panels, STYLES)
        distances = {"frontier": CELLS, "frontier_runs": CELLS[1:]}
        frontier_figures.draw_frontier("frontier", distances, LOOK)
        for figure in by_name.values():
            figure.get_layout_engine().execute(figure)
    patch.undo()
    return by_name


def colours_of(figure) -> set[str]:
    """Of lines with markers, and of points: what stands for a loss."""
    lines = [line for axis in figure.axes for line in axis.get_lines()]
    return {
        to_hex(line.get_color()) for line in lines if line.get_marker() not in ("", "None", "|")
    }


def test_a_loss_has_one_colour_in_all_figures(drawn):
    every = set(COLOURS.values())
    for name in ("bars", "boxes", "categories", "over_beta", "movement", "frontier"):
        assert every - {COLOURS["base"]} <= colours_of(drawn[name]) <= every, name
    # A figure that shows some of the losses alone does not begin at the first colour.
    assert colours_of(drawn["differences"]) == {COLOURS["td_dpo"], COLOURS["discopop"]}
    for axis in drawn["over_beta"].axes:
        colours = {to_hex(line.get_color()) for line in axis.get_lines()} - {COLOURS["base"]}
        assert colours == {COLOURS[axis.get_title()]}


def test_the_baseline_has_the_first_colour_and_a_study_of_many_losses_hollow_markers():
    names = [f"loss{i:02}" for i in range(12)]
    styles = styles_of([{"loss": name} for name in names], names[7])
    looks = [styles.series(name) for name in (names[7], *names[:7], *names[8:])]
    assert [look["color"] for look in looks[:9]] == list(drawing.COLOURS)
    assert len({(look["color"], look["markerfacecolor"]) for look in looks}) == 12


def test_every_tau_has_a_marker_of_its_own(drawn):
    (axis,) = [axis for axis in drawn["over_beta"].axes if axis.get_title() == "td_dpo"]
    lines = [line for line in axis.get_lines() if line.get_marker() not in ("None", "")]
    assert [line.get_marker() for line in lines] == [MARKERS[tau] for tau in TAUS]
    assert len({line.get_linestyle() for line in lines}) == 3
    labels = [text.get_text() for text in drawn["over_beta"].legends[0].get_texts()]
    assert labels == ["no τ", "τ=0.5", "τ=1", "τ=2", "untrained model"]
    keys = drawn["over_beta"].legends[0].legend_handles[:4]
    assert [key.get_marker() for key in keys] == list(MARKERS.values())


def test_every_beta_has_a_tick_with_a_plain_number(drawn):
    for axis in drawn["over_beta"].axes:
        assert axis.get_xscale() == "log" and axis.get_xticks().tolist() == list(BETAS)
        labels = [label.get_text() for label in axis.get_xticklabels()]
        assert labels == ["0.01", "0.05", "0.5", "2.5"]
        assert axis.xaxis.get_minorticklocs().size == 0


def test_numbers_of_betas_that_would_touch_are_turned_and_none_is_lost():
    from pref.analysis.figure_parts import scale_beta

    with drawing.own_style():
        axis = drawing.new_figure(3, 2, "").subplots()
        scale_beta(axis, [0.1, 0.11, 0.2, 0.3, 0.5], 1.5)
    assert axis.get_xticks().tolist() == [0.1, 0.11, 0.2, 0.3, 0.5]
    labels = axis.get_xticklabels()
    assert [label.get_text() for label in labels] == ["0.1", "", "0.2", "0.3", "0.5"]
    assert {label.get_rotation() for label in labels} == {90.0}


def test_no_axis_has_a_kink_or_a_power_of_ten(drawn):
    for name, figure in drawn.items():
        for axis in figure.axes:
            assert axis.get_xscale() in ("linear", "log"), name
            texts = [text.get_text() for text in axis.get_xticklabels() + axis.get_yticklabels()]
            assert not any("^" in text or "\\" in text for text in texts), name
    ticks = {text.get_text() for text in drawn["movement"].axes[0].get_xticklabels()}
    assert drawn["movement"].axes[0].get_xscale() == "log" and {"1", "10"} <= ticks


def test_titles_are_one_line_and_fit_and_small_print_is_not_too_small(drawn):
    for name, figure in drawn.items():
        width = figure.get_window_extent().width
        for text in (figure._suptitle, *figure.texts):
            assert text.get_window_extent().x1 <= width, name
        assert figure.get_suptitle() and "\n" not in figure.get_suptitle()
        sizes = [text.get_fontsize() for text in figure.findobj(match=is_text) if text.get_text()]
        assert min(sizes) >= 8, name
        assert figure.get_figwidth() in (drawing.HALF, drawing.WIDE), name
    with drawing.own_style():
        title = drawing.new_figure(3, 2, "A title, " * 9).get_suptitle()
        assert title.startswith("A title, A title") and title.endswith("…") and len(title) < 60


def is_text(artist) -> bool:
    return hasattr(artist, "get_fontsize") and hasattr(artist, "get_text")


def test_labels_with_settings_make_a_figure_wide_rather_than_its_panel_narrow():
    label = "dpo β=0.1 learning_rate=5e-06"
    assert figures.score_figures.width_for([label]) == drawing.WIDE
    assert figures.score_figures.width_for([one["label"] for one in CELLS]) == drawing.HALF


def test_a_difference_is_written_beside_its_row():
    row = {"estimate": 0.5, "low": 0.1, "high": None, "p_adjusted": 0.0234}
    assert pair_figures.difference_text(row, 2) == "+0.50 [+0.10, ?]  p 0.023"
    assert pair_figures.difference_text(row | {"p_adjusted": 3e-7}, 1).endswith("  p < 0.0001")
    assert pair_figures.difference_text(row | {"p_adjusted": None}, 1).endswith("  no test")


def test_shades_of_a_loss_go_from_light_to_dark():
    def light(colour):
        return sum(int(colour[i : i + 2], 16) for i in (1, 3, 5))

    shades = [light(STYLES.shade("dpo", k, 4)) for k in range(4)]
    assert shades == sorted(shades, reverse=True) and len(set(shades)) == 4
    assert STYLES.shade("dpo", 0, 1) == COLOURS["dpo"]


def test_long_training_curves_are_means_of_equal_parts():
    curve = curve_figures.Points(list(range(1, 601)), [float(i) for i in range(600)])
    steps, values = curve_figures.thinned(curve)
    assert len(steps) == 60 and steps[0] == 5.5 and values[:2] == [4.5, 14.5]
    curve.values[3] = math.nan
    assert math.isnan(curve_figures.thinned(curve).values[0])  # a gap stays a gap
    short = curve_figures.Points([1, 2], [3.0, 4.0])
    assert curve_figures.thinned(short) == short


@pytest.mark.filterwarnings("ignore:Glyph 27")
def test_an_svg_has_its_text_as_text_and_its_title_as_a_title(tmp_path):
    name = 'org/<judge> & "x"\x1b'
    with drawing.own_style():
        figure = drawing.new_figure(4, 2, "Scores", [name, "0.123456"])
        axis = figure.subplots()
        axis.plot([0, 1], [0.123456, 1 / 3], label="0.123456 of <dpo>")
        axis.legend()
        drawing.save_figure(figure, tmp_path / "a", suffixes=["svg"])
    svg = (tmp_path / "a.svg").read_text(encoding="utf-8")
    root = ET.fromstring(svg)
    ns = "{http://www.w3.org/2000/svg}"
    assert root.find(f"{ns}title").text == "Scores" and root.get("role") == "img"
    assert root.find(f"{ns}desc").text == name.replace("\x1b", "?") + "\n0.123456"
    texts = [element.text for element in root.iter(f"{ns}text")]
    assert "0.123456 of <dpo>" in texts and "0.2" in texts
    # What is seen begins below title and notes, and is as high as was asked for.
    _, top, width, height = map(float, root.get("viewBox").split())
    assert width == 288 and height == pytest.approx(144, abs=3) and top > 30
    assert "metadata" not in svg and "DOCTYPE" not in svg and "date" not in svg.lower()
    paths = " ".join(element.get("d") for element in root.iter(f"{ns}path"))
    assert "." in paths and max(len(n.partition(".")[2]) for n in paths.split()) <= 2
