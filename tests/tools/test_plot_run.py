"""A real PNG from a real metrics.jsonl."""

from pathlib import Path

from matplotlib import image

from megatron_rl.observe.run_log import RunLog
from tools.plot_run import main

BLUE, ORANGE, RED, GREEN = (37, 99, 168), (217, 130, 43), (194, 59, 59), (47, 143, 91)


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
    assert capsys.readouterr().out.strip() == str(tmp_path / "curves.png")
    assert {BLUE, ORANGE, RED, GREEN} <= colors_of(tmp_path / "curves.png")


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


def test_a_folder_without_steps_is_named(tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    message = capsys.readouterr().err.strip()
    assert message == f"plot_run: {tmp_path}/metrics.jsonl: expected steps, got none"
