"""judge_identity.py: what is another judge, what it is called, and how its files are named."""

import json

from studies import compared, find_gap, flat_ratings, has_note, make_run, rating

from pref.analysis import figures, judge_identity, paper_tables


def by(judge_id, address=None, judge="gpt-5-mini", **settings):
    """The columns that say who judged."""
    own = {"judge": judge, "judge_id": judge_id, "judge_address": address}
    return own | {"judge_settings": json.dumps(settings)}


def titles(comparison):
    return [
        judge["title"].removeprefix("judge gpt-5-mini, prompts fastchat, refs original")
        for judge in comparison["mt_bench"]
    ]


def test_another_temperature_is_another_judge(tmp_path):
    make_run(tmp_path, "a", "dpo", ratings=flat_ratings(4, **by("a1", temperature=0)))
    make_run(tmp_path, "b", "dpo", seed=43, ratings=flat_ratings(8, **by("b2", temperature=1)))
    comparison = compared(tmp_path)
    assert [judge["cells"][0]["score"] for judge in comparison["mt_bench"]] == [4, 8]
    assert titles(comparison) == [", temperature 0", ", temperature 1"]
    assert has_note(comparison, "2 judges or judge settings")
    assert find_gap(comparison, "temperature 1")["runs"] == ["a"]


def test_another_server_is_another_judge_and_the_gap_names_its_address(tmp_path):
    here, there = "http://localhost:8000/v1", "https://api.example.com/v1"
    make_run(tmp_path, "a", "dpo", ratings=flat_ratings(4, **by("a1", here, top_p=1)))
    make_run(tmp_path, "b", "td_dpo", ratings=flat_ratings(8, **by("b2", there, top_p=1)))
    comparison = compared(tmp_path)
    assert titles(comparison) == [f", address {here}", f", address {there}"]
    assert comparison["mt_bench"][0]["improvement"] == []
    gap = find_gap(comparison, f"address {here}")
    settings = """ --parameters '{"top_p": 1}'"""
    assert gap["next"] == f"judge.py --judge gpt-5-mini --base_url {here}{settings}"


def test_one_judge_has_no_settings_in_its_title(tmp_path):
    for run_id, loss, score in (("a", "dpo", 4), ("b", "td_dpo", 6)):
        row = by("a1", "http://x/v1", temperature=0)
        make_run(tmp_path, run_id, loss, ratings=flat_ratings(score, **row))
    comparison = compared(tmp_path)
    assert titles(comparison) == [""] and len(comparison["mt_bench"][0]["cells"]) == 2


def test_files_of_before_are_a_group_of_their_own(tmp_path):
    make_run(tmp_path, "a", "dpo", ratings=flat_ratings(4))
    make_run(tmp_path, "b", "td_dpo", ratings=flat_ratings(6))
    make_run(tmp_path, "c", "simpo", ratings=flat_ratings(8, **by("c3", temperature=0)))
    comparison = compared(tmp_path)
    assert [[row["score"] for row in judge["cells"]] for judge in comparison["mt_bench"]] == [
        [8],
        [4, 6],
    ]
    assert titles(comparison) == ["", ", settings not recorded"]


def test_judgements_of_before_whose_parameters_are_known_are_grouped_by_them(tmp_path):
    for run_id, loss, temperature in (("a", "dpo", 0), ("b", "td_dpo", 0), ("c", "simpo", 1)):
        row = by(None, temperature=temperature, max_tokens=512)
        make_run(tmp_path, run_id, loss, ratings=flat_ratings(4 + temperature, **row))
    comparison = compared(tmp_path)
    found = {
        judge["title"][-13:]: [row["score"] for row in judge["cells"]]
        for judge in comparison["mt_bench"]
    }
    assert found == {"temperature 0": [4, 4], "temperature 1": [5]}


def test_identities_that_differ_in_nothing_that_is_recorded_are_told_apart():
    rows = [rating(81, 1, 5, **by(judge_id, temperature=0)) for judge_id in ("a1", "b2")]
    broken = rating(81, 1, 5, **by("c3") | {"judge_settings": "{torn"})
    judge_identity.add_titles([*rows, broken])
    ends = [row["title"].split("original, ")[1] for row in (*rows, broken)]
    assert ends[0] == "settings not set, temperature 0, id a1"
    assert ends[1] == "settings not set, temperature 0, id b2"
    assert ends[2] == "settings {torn, temperature not set"


def test_pairwise_judgements_of_two_servers_have_two_rows(tmp_path):
    def pairs(winner, **who):
        asked = {"grading": "pair", "status": "ok", "baseline": "base", "winner": winner}
        return [rating(81, 1, None, order=order, **asked, **who) for order in "12"]

    both = pairs("a", **by("a1", "http://x/v1")) + pairs("base", **by("b2", "http://y/v1"))
    make_run(tmp_path, "a", "dpo", ratings=both)
    comparison = compared(tmp_path)
    assert [row["win_rate"] for row in comparison["pairs"]] == [1, 0]
    (table,) = [t for t in paper_tables.list_tables(comparison) if t.id == "pairs"]
    shown = [table.values(row)[0] for row in table.rows]
    assert shown == [
        f"gpt-5-mini, prompts fastchat, refs original, address http://{host}/v1" for host in "xy"
    ]


# ---- names of files -----------------------------------------------------------------------------

CLASHING = ("org/judge", "org-judge", "org judge", "裁判", "судья", "GPT", "gpt", "x" * 300, "..")


def test_no_two_judges_share_a_file(tmp_path):
    rows = [row for name in CLASHING for row in flat_ratings(5, judge=name)]
    make_run(tmp_path, "a", "dpo", ratings=rows)
    make_run(tmp_path, "b", "td_dpo", ratings=rows)
    comparison = compared(tmp_path)
    names = [table.id for table in paper_tables.list_tables(comparison)]
    jobs = figures.comparison_jobs(tmp_path, comparison, [])
    names += [job.args[0].name for job in jobs]
    assert len({name.lower() for name in names}) == len(names)
    assert all(name.isascii() and len(name) < 150 and "/" not in name for name in names)
    suffixes = [
        judge_identity.file_suffix(judge, comparison["mt_bench"])
        for judge in comparison["mt_bench"]
    ]
    assert len({suffix.lower() for suffix in suffixes}) == len(CLASHING)
    assert "_org-judge" not in suffixes  # the name of two of them
    assert sum(suffix.startswith("_org-judge-") for suffix in suffixes) == 3


def test_a_plain_name_stays_readable(tmp_path):
    rows = flat_ratings(5, judge="gpt-5.1-mini") + flat_ratings(5, judge="qwen3")
    make_run(tmp_path, "a", ratings=rows)
    found = compared(tmp_path)["mt_bench"]
    suffixes = [judge_identity.file_suffix(judge, found) for judge in found]
    assert suffixes == ["_gpt-5.1-mini", "_qwen3"]
    assert judge_identity.file_suffix(found[0], found[:1]) == ""
