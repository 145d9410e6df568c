"""What a run shows while it goes on: speed and time left from made-up progress, in a terminal and in a log file."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from qlora_kit.cli.training_progress import Pace, PlainLines, progress_line, training_display
from qlora_kit.training import TrainingProgress

START = TrainingProgress(
    step=0, total_steps=100, loss=None, eval_loss=None, learning_rate=None, tokens=0, seconds=0.0, peak_bytes=3 * 2**29
)


def at(step: int, **changes: object) -> TrainingProgress:
    """A run of 100 steps that takes 2 s and 500 tokens for each."""
    return replace(START, **{"step": step, "tokens": 500 * step, "seconds": 2.0 * step, **changes})  # type: ignore[arg-type]


def pace_of(*news: TrainingProgress) -> Pace:
    pace = Pace()
    for progress in news:
        pace.add(progress)
    return pace


def test_speed_is_that_of_the_last_steps_and_time_left_that_of_the_whole_run() -> None:
    assert pace_of(START).tokens_per_second is None
    assert pace_of(START).seconds_left is None
    steady = [at(step) for step in range(51)]
    assert pace_of(*steady).tokens_per_second == 250
    assert pace_of(*steady).seconds_left == 100
    slower = [at(50 + step, seconds=100.0 + 10 * step) for step in range(1, 21)]
    assert pace_of(*steady, *slower).tokens_per_second == 50
    assert pace_of(*steady, *slower).seconds_left == pytest.approx(300 / 70 * 30)


def test_news_of_the_same_step_do_not_count_as_steps() -> None:
    """A log line and an evaluation tell of a step again, later."""
    news = [START, at(1), at(1, loss=1.0, seconds=2.5), at(1, eval_loss=1.0, seconds=9.0), at(2)]
    assert pace_of(*news).tokens_per_second == 250


def test_a_resumed_run_is_as_fast_as_its_own_steps() -> None:
    first = at(60, tokens=0, seconds=0.0)
    pace = pace_of(first, at(70, tokens=5000, seconds=10.0))
    assert (pace.tokens_per_second, pace.seconds_left) == (500, 30)


def test_a_full_line_fits_80_columns() -> None:
    large = at(
        1234,
        total_steps=5678,
        tokens=2_345 * 7200,
        seconds=7200.0,
        loss=0.12345,
        eval_loss=0.23456,
        learning_rate=1.87e-4,
        peak_bytes=int(12.34 * 2**30),
    )
    line = progress_line(large, pace_of(replace(START, total_steps=5678), large), width=79)
    assert line == "1234/5678  7:12:09 left  loss 0.123  val 0.235  2.3k tok/s  lr 1.9e-4  12.3 GiB"
    assert len(line) == 79
    for width in range(9, 200):
        assert len(progress_line(large, pace_of(large), width=width)) <= width


def test_what_is_not_known_yet_is_left_out() -> None:
    assert progress_line(START, pace_of(START), width=30) == "╌" * 14 + "  0/100  1.5 GiB"
    line = progress_line(at(50), pace_of(START, at(50)), width=79)
    assert line == "━" * 15 + "╌" * 15 + "  50/100  1:40 left  250 tok/s  1.5 GiB"
    assert "left" not in progress_line(at(100), pace_of(START, at(100)), width=79)


def test_a_log_file_gets_a_line_for_each_tenth() -> None:
    written: list[str] = []
    lines = PlainLines(written.append)
    for step in range(101):
        lines.show(at(step, seconds=step / 10))
        lines.show(at(step, seconds=step / 10, loss=1 / (step + 1)))
    lines.end()
    assert [line.split()[1] for line in written] == [f"{step}/100" for step in range(10, 101, 10)]
    assert written[-1] == "step 100/100 (100%)  loss 0.00990  5.0k tok/s  1.5 GiB"


def test_a_slow_run_is_told_of_every_half_minute() -> None:
    written: list[str] = []
    lines = PlainLines(written.append)
    for step in range(6):
        lines.show(at(step, total_steps=1000, seconds=11.0 * step))
    lines.end()
    assert [line.split()[1] for line in written] == ["3/1000", "5/1000"]


def test_what_broke_off_is_told_to_its_last_step() -> None:
    written: list[str] = []
    stream = io.StringIO()
    lines = PlainLines(written.append)
    lines.end()
    assert written == []

    def broken_off() -> None:
        with training_display(Console(file=stream, width=80)) as show:
            show(START)
            show(at(3))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken_off()
    assert stream.getvalue() == "step 3/100 (3%)  3:14 left  250 tok/s  1.5 GiB\n"


def test_without_a_terminal_nothing_but_text_is_written() -> None:
    stream = io.StringIO()
    with training_display(Console(file=stream, width=40)) as show:
        for step in range(101):
            show(at(step, loss=0.5, eval_loss=0.25, learning_rate=2e-4))
    lines = stream.getvalue().splitlines()
    assert len(lines) > 9
    assert all(line.startswith("step ") and line.isprintable() for line in lines)


def test_in_a_terminal_one_line_is_drawn_again() -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=80, force_terminal=True, color_system=None, legacy_windows=False, _environ={})
    with training_display(console) as show:
        for step in range(101):
            show(at(step, loss=0.5))
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert text.count("\n") == 1
    frames = [frame for frame in re.split(r"[\r\n]+", text) if frame]
    assert frames[-1] == "━" * 30 + "  100/100  loss 0.500  250 tok/s  1.5 GiB"
    assert all(len(frame) <= 80 for frame in frames)
