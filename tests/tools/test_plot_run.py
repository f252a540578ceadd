"""A real PNG from a real metrics.jsonl."""

from pathlib import Path

import pytest
from matplotlib import image, pyplot

from megatron_rl.observe.run_log import RunLog
from tools.plot_run import _number_steps, main, spread, tenth

BLUE, ORANGE, RED, GREEN = (37, 99, 168), (217, 130, 43), (194, 59, 59), (47, 143, 91)
GREY, PURPLE = (95, 107, 122), (122, 79, 163)


def colors_of(path: Path) -> set[tuple[int, int, int]]:
    pixels = (image.imread(path)[..., :3] * 255).round().astype(int).reshape(-1, 3)
    return {tuple(pixel) for pixel in pixels.tolist()}


def test_every_curve_is_drawn(tmp_path, capsys):
    with RunLog(tmp_path / "metrics.jsonl", keep_through=-1) as log:
        log.write(0, {"eval/avg_at_8": 0.4})
        for step in range(1, 31):
            metrics = {"reward/mean": step / 60, "discrepancy/mean": 0.005 - step / 1e4}
            metrics |= {"constraint/tolerance": 0.0037, "constraint/lambda": 0.1}
            log.write(step, metrics | ({"eval/avg_at_8": 0.6} if step == 30 else {}))
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"picture: {tmp_path / 'curves.png'}\n"
    assert {BLUE, ORANGE, RED, GREEN} <= colors_of(tmp_path / "curves.png")


def test_every_evaluation_set_has_a_colour_of_its_own(tmp_path):
    with RunLog(tmp_path / "metrics.jsonl", keep_through=-1) as log:
        for step in (0, 1):
            log.write(step, {"eval/easy/avg_at_4": 0.5 + step / 10, "eval/hard/avg_at_4": 0.1})
    assert main([str(tmp_path)]) == 0
    assert {GREEN, PURPLE} <= colors_of(tmp_path / "curves.png")


def test_labels_that_are_near_are_moved_up():
    assert spread([0.5, 0.1, 0.11], 0.05) == [0.5, 0.1, pytest.approx(0.15)]
    assert spread([0.3, 0.3, 0.31], 0.1) == [pytest.approx(0.3 + 0.1 * n) for n in range(3)]
    assert spread([], 0.1) == []


def test_steps_are_whole_numbers():
    figure, axes = pyplot.subplots()
    axes.plot([0, 1, 2], [0.0, 1.0, 2.0])
    _number_steps(axes)
    figure.canvas.draw()
    ticks = axes.get_xticks()
    pyplot.close(figure)
    assert 1.0 in ticks and all(tick == int(tick) for tick in ticks)


def test_another_constrained_signal_has_a_panel(tmp_path):
    """Without a tolerance of the discrepancy, the red line is that of the signal."""
    with RunLog(tmp_path / "metrics.jsonl", keep_through=-1) as log:
        for step in range(1, 4):
            metrics = {"discrepancy/mean": 0.005, "constraint/signal/mean": 0.03}
            log.write(step, metrics | {"constraint/signal/tolerance": 0.02})
    assert main([str(tmp_path)]) == 0
    assert {BLUE, RED} <= colors_of(tmp_path / "curves.png")


def test_a_run_of_one_step_and_another_path(tmp_path):
    with RunLog(tmp_path / "metrics.jsonl", keep_through=-1) as log:
        log.write(1, {"reward/mean": 0.5})
    assert main([str(tmp_path), "-o", str(tmp_path / "one.png")]) == 0
    assert BLUE in colors_of(tmp_path / "one.png")


def test_the_log_odds_have_a_panel_of_their_own(tmp_path):
    quantiles = {1: -0.3, 25: -0.1, 50: 0.0, 75: 0.1, 99: 0.3}
    with RunLog(tmp_path / "metrics.jsonl", keep_through=-1) as log:
        for step in range(1, 3):
            metrics = {f"discrepancy/log_odds_0.1_to_0.5/q{q}": v for q, v in quantiles.items()}
            log.write(step, {"reward/mean": 0.5} | (metrics if step == 2 else {}))
    assert main([str(tmp_path)]) == 0
    with_panel = image.imread(tmp_path / "curves.png")
    with RunLog(tmp_path / "metrics.jsonl", keep_through=-1) as log:
        log.write(1, {"reward/mean": 0.5})
    assert main([str(tmp_path), "-o", str(tmp_path / "without.png")]) == 0
    without = image.imread(tmp_path / "without.png")
    assert with_panel.shape[0] == pytest.approx(without.shape[0] * 4.5 / 3.2, abs=2)
    added = with_panel[without.shape[0] :, :, :3]
    for color in (BLUE, GREY):  # the last and the first tenth
        assert (abs(added * 255 - color).max(-1) < 1).sum() > 100


def test_the_first_and_the_last_tenth():
    records = [{"step": step, "x": float(step)} for step in range(1, 31)] + [{"step": 31}]
    assert tenth(records, "x", False) == 2.0
    assert tenth(records, "x", True) == 29.0
    assert tenth(records[:3], "x", True) == 3.0
    assert tenth(records, "y", True) is None


def test_a_folder_without_steps_is_named(tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    message = capsys.readouterr().err.strip()
    assert message == f"plot_run: {tmp_path}/metrics.jsonl: expected steps, got none"


def test_several_runs_are_compared(tmp_path, capsys):
    for name, reward in (("first", 0.2), ("second", 0.6)):
        (tmp_path / name).mkdir()
        with RunLog(tmp_path / name / "metrics.jsonl", keep_through=-1) as log:
            for step in range(1, 4):
                log.write(step, {"reward/mean": reward, "speed/tokens_per_second": 100.0 * reward})
    folders = [str(tmp_path / name) for name in ("first", "second")]
    assert main([*folders, "-o", str(tmp_path / "compared.png")]) == 0
    assert {BLUE, ORANGE} <= colors_of(tmp_path / "compared.png")
    assert RED not in colors_of(tmp_path / "compared.png")
    (tmp_path / "second" / "metrics.jsonl").write_text("")
    assert main([*folders, "-o", str(tmp_path / "none.png")]) == 1
    assert "second" in capsys.readouterr().err
