"""Tables and figures as files: headers, text formats, and when a figure is drawn again."""

import csv
import io

import pytest

from pref.analysis import figures, measures, paper_tables, table_files
from pref.files import drawing

JUDGE = {"judge": "judge-1", "judge_params_b": 0.1, "smoke_test": True, "prompts": "own"}
JUDGE |= {"refs": "original", "judge_id": None, "title": "judge judge-1, prompts own"}


def every_table() -> list[paper_tables.Table]:
    """All tables that there are, each with one row. Only the headers are read, so no row needs more
    than what decides in which table it is shown.
    """
    differences = [
        {"comparison": "best of grid", "sensitivity": [{"p": 0.5}]},
        {"comparison": "matched beta", "sensitivity": []},
    ]
    test = {"proposed": "a", "baseline": "b", "mcnemar": [{"seed": 1}]}
    part = {"cells": [{}], "improvement": differences, "selection": [{}], "spread": [{}]}
    by_category = {"label": "a", "category": "math", "score": 5.0, "n_judged": 2, "n_scored": 2}
    judge = {"variance": [{}], "retest": {"n_items": 2}, "length": {"n": 3}}
    judge |= {key: [{}] for key in ("frontier", "equal_kl", "rounds", "gold_selection")}
    judge["categories"] = [by_category]
    comparison = {
        "trial": False,
        "claims": [{}],
        "accuracy": {**part, "improvement": [row | test for row in differences]},
        "mt_bench": [{**part, **judge, **JUDGE}],
        "stability": [{}],
        "pairs": [{}],
        "movement": [{"run_id": "a", "score, judge-1": 5.0, "score, judge-2": 6.0}],
    }
    return paper_tables.list_tables(comparison)


TABLES = {table.id: table for table in every_table()}


def test_every_layout_has_a_table():
    shared = ("headline", "improvement", "sensitivity", "selection", "over_beta")
    assert TABLES.keys() == {
        *("verdicts", "accuracy", "accuracy_mcnemar", "stability", "pairs", "movement"),
        *(f"{name}_{kind}" for name in ("accuracy", "mt_bench") for kind in shared),
        *(
            f"mt_bench_{kind}"
            for kind in ("by_turn", "by_category", "frontier", "equal_kl", "rounds")
            + ("gold_selection", "variance", "judge")
        ),
    }


@pytest.mark.parametrize("name", TABLES)
def test_headers_are_unique_and_not_padded(name):
    headers = TABLES[name].headers()
    assert len(set(headers)) == len(headers)
    assert all(header and header == header.strip() for header in headers)


def test_records_are_no_column_of_a_csv():
    for name in ("accuracy_headline", "accuracy_improvement", "mt_bench_improvement"):
        header = table_files.csv_text(TABLES[name]).splitlines()[0]
        assert "comparison" in header and "sensitivity" not in header and "mcnemar" not in header


@pytest.mark.parametrize("name", TABLES)
def test_a_table_for_a_paper_has_at_most_five_columns_that_it_has(name):
    table = TABLES[name]
    columns = table.paper_columns()
    assert 2 <= len(columns) <= 5
    if table.paper:
        assert len(columns) >= min(4, len(table.columns))


ROWS_BY_CATEGORY = [  # label, category, score, judged without a score
    ("base", "math", 4.0, 0),
    ("base", "writing", 5.0, 0),
    ("dpo", "writing", 6.25, 1),
    ("dpo", "jokes", None, 2),
]


def test_scores_by_category_are_a_pivot_and_the_csv_has_the_rows_behind_it():
    rows = [
        {"label": label, "category": category, "score": score, "n_judged": 4, "n_scored": 4 - n}
        for label, category, score, n in ROWS_BY_CATEGORY
    ]
    part = {"cells": [], "improvement": [], "selection": [], "spread": [], "frontier": []}
    part |= {"variance": [], "equal_kl": [], "rounds": [], "categories": rows, **JUDGE}
    comparison = {"trial": False, "mt_bench": [part]}
    tables = paper_tables.measure_tables(measures.MT, part, comparison)
    (table,) = [table for table in tables if table.rows]
    page = table.page()
    # MT-Bench's order of categories, then others; a cell without a score in one is empty there.
    assert page["headers"] == ["loss β τ", "writing", "math"]
    assert page["rows"] == [["base", 5.0, 4.0], ["dpo", 6.25, None]]
    assert page["digits"] == [None, 2, 2] and page["kind"] == "by category"
    assert "3 judgements have no score" in page["note"]
    assert table_files.markdown_text(table).splitlines()[-1] == "| dpo | 6.25 |  |  |"
    long = list(csv.DictReader(io.StringIO(table_files.csv_text(table))))
    assert [(row["label"], row["category"]) for row in long] == [r[:2] for r in ROWS_BY_CATEGORY]


def test_what_all_rows_share_is_said_once_and_empty_columns_are_left_out():
    column = paper_tables.Column
    columns = [column("cell", "cell"), column("score", "score", 1), column("SD", "sd", 1)]
    columns += [column("seeds", "n", context=True), column("by", "by", context=True)]
    rows = [{"cell": "a", "score": 1.0, "sd": None, "n": 3, "by": "x"}]
    rows.append({"cell": "b", "score": 1.0, "sd": None, "n": 3, "by": "y"})
    table = paper_tables.Table("t", "T", "A note.", columns, rows)
    page = table.page()
    assert page["headers"] == ["cell", "score", "by"]  # a result stays, whatever it is
    assert page["rows"] == [["a", 1.0, "x"], ["b", 1.0, "y"]]
    assert page["note"] == "A note. In all rows: seeds: 3."
    assert table_files.markdown_text(table).splitlines()[-1] == "| b | 1.0 |  | 3 | y |"
    one_row = table._replace(rows=rows[:1]).page()
    assert one_row["headers"] == ["cell", "score", "seeds", "by"]


@pytest.mark.parametrize("name", TABLES)
def test_headers_of_a_csv_are_unique_and_not_padded(name):
    rows = csv.reader(io.StringIO(table_files.csv_text(TABLES[name])))
    headers = next(rows, [])
    assert len(set(headers)) == len(headers)
    assert all(header == header.strip() for header in headers)


@pytest.mark.parametrize("name", [name for name in TABLES if name.startswith("mt_bench")])
def test_every_table_of_a_small_judge_is_marked(name):
    table = TABLES[name]
    assert table.note.startswith("SMOKE TEST")
    assert "smoke_test" in table_files.csv_text(table).partition("\n")[0].split(",")


def test_drawing_code_is_part_of_the_version(tmp_path):
    source, other = tmp_path / "source.py", tmp_path / "other.py"
    source.write_text("a = 1")
    other.write_text("a = 2")
    versions = [drawing.drawing_version(*map(str, s)) for s in ([], [source], [other])]
    assert len(set(versions)) == 3
    drawing.drawing_version.cache_clear()
    source.write_text("a = 2")
    assert drawing.drawing_version(str(source)) == versions[2]


def test_a_figure_is_the_same_bytes_and_carries_its_key(tmp_path):
    @drawing.own_style()
    def draw(name: str, key: str):
        figure = drawing.new_figure(3, 2, "A figure")
        axis = figure.subplots()
        image = axis.imshow([[0, 1]])
        figure.colorbar(image, ax=axis)  # a colour bar once left a layout engine that drew twice
        drawing.save_figure(figure, tmp_path / name, key)

    draw("a", "one")
    draw("b", "one")
    suffixes = ("pdf", "png", "svg")
    for suffix in suffixes:
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()
    names = {f"{name}.{suffix}" for name in "ab" for suffix in suffixes}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert drawing.is_drawn(tmp_path / "a", "one")
    assert not drawing.is_drawn(tmp_path / "a", "another")
    (tmp_path / "a.pdf").unlink()
    assert not drawing.is_drawn(tmp_path / "a", "one")


HOSTILE_STYLE = {"text.usetex": True, "font.family": "No Such Font", "savefig.bbox": "tight"}
HOSTILE_STYLE |= {"figure.dpi": 500, "savefig.transparent": True, "axes.grid": True}


def test_figures_do_not_depend_on_the_users_matplotlibrc(tmp_path):
    import matplotlib

    @drawing.own_style()
    def draw(name):
        figure = drawing.new_figure(3, 2, "Costs $1, $x_$ and {")
        figure.subplots().plot([0, 1], [1, 2], label="$")
        drawing.save_figure(figure, tmp_path / name, dpi=40)
        return [(tmp_path / f"{name}.{suffix}").read_bytes() for suffix in ("png", "pdf")]

    plain = draw("plain")
    with matplotlib.rc_context(HOSTILE_STYLE):
        assert draw("hostile") == plain
        assert matplotlib.rcParams["text.usetex"] is True  # the user's settings are back


def test_figures_of_before_stay_until_all_are_drawn(tmp_path, monkeypatch):
    folder = tmp_path / "figures"
    folder.mkdir()
    for name in ("comparison_old.png", "comparison_new.png", "mine.png"):
        (folder / name).write_text("before")

    def fail():
        raise OSError("no space")

    def jobs(beside, *_):
        return [lambda: (beside / "comparison_new.png").write_text("after"), *last]

    monkeypatch.setattr(figures, "comparison_jobs", jobs)
    last = [fail]
    with pytest.raises(OSError, match="no space"):
        figures.draw_all([], {}, folder)
    assert {path.name: path.read_text() for path in folder.iterdir()} == {
        "comparison_old.png": "before",
        "comparison_new.png": "before",
        "mine.png": "before",
    }
    last = []
    figures.draw_all([], {}, folder)
    assert {path.name: path.read_text() for path in folder.iterdir()} == {
        "comparison_new.png": "after",
        "mine.png": "before",
    }
    assert list(tmp_path.iterdir()) == [folder]  # nothing beside it
