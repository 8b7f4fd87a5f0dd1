"""Axes of a grid whose values are drawn."""

import math
import os
import random

import pytest

from pref.files.console import UserError
from pref.sweeping import __main__ as sweeping
from pref.sweeping import draws, grid


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for key in [key for key in os.environ if grid.is_setting(key)]:
        monkeypatch.delenv(key)


def points_of(tmp_path, text: str) -> list[grid.Point]:
    (tmp_path / "mine").write_text(text)
    return grid.expand(grid.settings_of(tmp_path / "mine")[0])


def argument(point: grid.Point, name: str) -> str:
    return point.arguments[point.arguments.index(name) + 1]


def test_a_draw_is_the_inverse_of_its_distribution():
    """Six rates and four offsets, by hand: LOW (HIGH / LOW)^u, and LOW + (HIGH - LOW) u."""
    uniform = random.Random("42 LRS")
    by_hand = [5e-6 * 10 ** uniform.random() for _ in range(6)]
    drawn = draws.values("loguniform 5e-6 5e-5 x 6", "LRS", whole=False, seed="42")
    assert [float(value) for value in drawn] == pytest.approx(by_hand, rel=5e-3)
    uniform = random.Random("42 AXIS_offset")
    by_hand = [-1 + 3 * uniform.random() for _ in range(4)]
    drawn = draws.values("uniform -1 2 x 4", "AXIS_offset", whole=False, seed="42")
    assert [float(value) for value in drawn] == pytest.approx(by_hand, rel=5e-3, abs=5e-4)


def test_draws_are_spread_as_their_distribution_says():
    """Half of a loguniform draw lies below the geometric mean of its bounds."""
    drawn = draws.values("loguniform 1e-6 1e-2 x 800", "LRS", whole=False, seed="1")
    share = sum(float(value) < 1e-4 for value in drawn) / 800
    assert abs(share - 0.5) < 4 * math.sqrt(0.25 / 800)
    assert len(set(drawn)) == 800 and all(1e-6 <= float(value) <= 1e-2 for value in drawn)


def test_more_draws_add_to_those_that_are_there():
    six = draws.values("loguniform 5e-6 5e-5 x 6", "LRS", whole=False, seed="42")
    assert draws.values("loguniform 5e-6 5e-5 x 9", "LRS", whole=False, seed="42")[:6] == six
    assert draws.values("loguniform 5e-6 5e-5 x 6", "LRS", whole=False, seed="43") != six
    assert draws.values("loguniform 5e-6 5e-5 x 6", "BETAS", whole=False, seed="42") != six


def test_a_narrow_range_gives_different_values_of_three_digits():
    drawn = draws.values("uniform 1 1.04 x 5", "BETAS", whole=False, seed="42")
    assert sorted(drawn) == ["1", "1.01", "1.02", "1.03", "1.04"]
    assert sorted(draws.values("uniform 3 5 x 3", "AXIS_lora_r", True, "42")) == ["3", "4", "5"]
    # Each as likely as the others: of 300 first draws 100 (SD 8) are at the lower end.
    firsts = [draws.values("uniform 3 5 x 1", "AXIS_lora_r", True, str(n))[0] for n in range(300)]
    assert all(70 < firsts.count(value) < 130 for value in "345")


def test_every_loss_gets_the_same_draws(tmp_path, monkeypatch):
    text = "LOSSES dpo td_dpo\nBETAS 0.1\nTAUS 1 2\nLRS loguniform 5e-6 5e-5 x 6\n"
    points = points_of(tmp_path, text)
    rates = {
        loss: {argument(p, "--learning_rate") for p in points if argument(p, "--loss") == loss}
        for loss in ("dpo", "td_dpo")
    }
    assert len(rates["dpo"]) == 6 and rates["dpo"] == rates["td_dpo"]
    assert len(points) == 6 * (1 + 2)
    alone = points_of(tmp_path, text.replace("dpo td_dpo", "simpo"))  # other losses, other axes
    assert {argument(p, "--learning_rate") for p in alone} == rates["dpo"]
    monkeypatch.setenv("DRAW_SEED", "7")
    again = {argument(p, "--learning_rate") for p in points_of(tmp_path, text)}
    assert len(again) == 6 and not again & rates["dpo"]
    monkeypatch.setenv("LRS", "loguniform 1e-3 2e-3 x 2")
    assert len(points_of(tmp_path, text)) == 2 * (1 + 2)


def test_drawn_axes_are_combined_and_listed(tmp_path, capsys):
    """One loss' own range too, at the same points of it: u is that of the axis."""
    (tmp_path / "mine").write_text(
        "LOSSES dpo dlrml\nBETAS loguniform 0.1 10 x 2\nBETAS_dlrml loguniform 0.001 0.1 x 2\n"
        "BETA_MIXES 0.5\nAXIS lora_r uniform 8 64 x 3 # whole numbers\n"
    )
    assert sweeping.main([str(tmp_path / "mine"), "--list"]) == 0
    *drawn, first = capsys.readouterr().out.splitlines()[:4]
    values = {
        line.partition(" drawn: ")[0]: line.partition(" drawn: ")[2].split() for line in drawn
    }
    assert list(values) == ["# BETAS", "# BETAS_dlrml", "# AXIS lora_r"] and first[:2] == "0\t"
    for of_all, of_one in zip(values["# BETAS"], values["# BETAS_dlrml"]):
        assert float(of_one) == pytest.approx(float(of_all) / 100, rel=1e-2)
    assert all(value.isdigit() and 8 <= int(value) <= 64 for value in values["# AXIS lora_r"])
    points = grid.expand(grid.settings_of(tmp_path / "mine")[0])
    assert len(points) == 2 * 2 * 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("LRS loguniform 5e-6 5e-5 6", "LRS loguniform LOW HIGH x NUMBER"),
        ("LRS 1e-5 loguniform 5e-6 5e-5 x 6", "a drawn axis is written LRS loguniform"),
        ("LRS uniform low 5e-5 x 6", "must be numbers, not low and 5e-5"),
        ("LRS uniform 5e-5 5e-6 x 6", "LOW must be below HIGH"),
        ("LRS uniform 0 inf x 6", "LOW must be below HIGH, and both finite"),
        ("LRS loguniform 0 5e-5 x 6", "LOW must be above 0 for loguniform; use uniform"),
        ("LRS loguniform -1 5e-5 x 6", "LOW must be above 0"),
        ("LRS uniform -1 1 x 6", "--learning_rate -"),
        ("LRS uniform 1e-6 1e-5 x 0", "NUMBER must be a whole number from 1 to 1000, not 0"),
        ("LRS uniform 1e-6 1e-5 x 2.5", "NUMBER must be a whole number"),
        ("BETAS uniform 1 1.01 x 5", "only 2 different numbers of 3 digits were found"),
        ("AXIS lora_r uniform 1 3 x 4", "only 3 different whole numbers were found"),
        ("AXIS lora_r uniform 0.5 3 x 2", "takes whole numbers"),
        ("LOGP uniform 0 1 x 2", "LOGP uniform 0 1 x 2: --logp takes no numbers"),
        ("LRS uniform 1e-6 1e-5 x 2\nDRAW_SEED one", "DRAW_SEED=one: must be a whole number"),
    ],
)
def test_what_cannot_be_drawn_is_named(tmp_path, line, message):
    with pytest.raises(UserError, match=message):
        points_of(tmp_path, f"LOSSES dpo\n{line}\n")
