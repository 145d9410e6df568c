"""The report of a run: it shows what the run's files say, loads nothing, and no text of theirs becomes HTML."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from fnmatch import fnmatch
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlora_kit.cli import main
from qlora_kit.config import load_config
from qlora_kit.errors import AdapterError, ConfigError
from qlora_kit.report import charts, write_plots, write_report
from qlora_kit.report.png import write_png
from qlora_kit.training import TrainingProgress, TrainResult, train

ROOT = Path(__file__).parents[1]
FILES = ("metrics.json", "qlora_kit.json", "config.yaml", "ledger.jsonl")
VOID = {"meta"}


class Page(HTMLParser):
    """The elements, attributes and texts of a page, whose tags must be balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.text += " "  # two elements are two words
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def having(self, **attributes: str) -> list[dict[str, str | None]]:
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}
        return [found for _, found in self.tags if found.items() >= wanted.items()]


def read(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def short(value: float) -> str:
    """Four significant digits."""
    return f"{float(f'{value:.4g}'):g}"


def flat(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture
def folder(trained_run: tuple[Path, TrainResult], tmp_path: Path) -> Path:
    """A copy of the files that a report is made of."""
    target = tmp_path / "run"
    target.mkdir()
    for name in FILES:
        shutil.copy(trained_run[0] / name, target)
    return target


def change(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    edit(content)
    path.write_text(json.dumps(content), encoding="utf-8")


# --- what it shows ---


def test_the_figures_are_those_of_the_run(trained_run: tuple[Path, TrainResult]) -> None:
    folder, result = trained_run
    shown = flat(read(folder).text)
    assert result.eval_loss is not None
    assert (
        f"validation loss {short(result.eval_loss)} of the adapter that was kept, step {result.kept_step} of 12"
        in shown
    )
    assert f"training loss {short(result.train_loss)} of the last log interval" in shown
    assert f"speed {result.tokens_per_second:,.0f} tokens a second" in shown
    memory = {f"{result.peak_bytes / size:.2f} {unit}" for unit, size in (("MiB", 2**20), ("GiB", 2**30))}
    assert any(f"peak memory {size} resident in the process" in shown for size in memory)
    assert f"trained parameters {result.trainable_parameters:,}" in shown
    assert "rows 48 9 6 kept 48 9 6 dropped 0 0 0" in shown
    supervised = json.loads((folder / "metrics.json").read_text())["data"]["train"]
    assert supervised["supervised_tokens"] == result.supervised_tokens
    share = supervised["supervised_tokens"] / supervised["total_tokens"]
    assert f"supervised share {share:.1%}" in shown
    config = (folder / "config.yaml").read_text()
    assert flat(config) in shown
    for library, version in json.loads((folder / "qlora_kit.json").read_text())["versions"].items():
        assert f"{library} {version}" in shown


def test_the_kept_step_is_that_of_the_best_validation_loss(trained_run: tuple[Path, TrainResult]) -> None:
    folder, result = trained_run
    validation = {line["step"]: line["eval_loss"] for line in result.history if "eval_loss" in line}
    assert result.kept_step == min(validation, key=validation.__getitem__)
    assert len(read(folder).having(class_="kept")) == 2  # in the chart and in its legend
    assert f"kept: step {result.kept_step}" in read(folder).text


def test_the_curve_has_the_shape_of_the_losses(trained_run: tuple[Path, TrainResult]) -> None:
    """Heights in the picture are a straight line, or that of the logarithm, of the values."""
    folder, result = trained_run
    losses = np.array([line["loss"] for line in result.history if "loss" in line])
    path = next(found["points"] for found in read(folder).having(class_="line") if "points" in found)
    assert path is not None
    x, y = np.array([point.split(",") for point in path.split()], dtype=float).T
    assert len(losses) == len(x) == 12
    assert np.allclose(np.diff(x), np.diff(x)[0], atol=0.02)
    fits = [abs(np.corrcoef(scale, y)[0, 1]) for scale in (losses, np.log(losses))]
    assert max(fits) > 0.99999
    assert y[losses.argmax()] < y[losses.argmin()]  # a picture's y grows downward


def test_samples_are_the_answers_of_base_and_adapter(
    trained_run: tuple[Path, TrainResult], random_base: Path, run_yaml: Path, chatml_tokenizer: Any
) -> None:
    """Each prompt by itself, through the chat template and PEFT's own loading."""
    import torch
    from peft import PeftModel

    from qlora_kit.base_files import resolve_base
    from qlora_kit.models import load_base_model

    folder = trained_run[0]
    samples = json.loads((folder / "metrics.json").read_text())["samples"]
    rows = [json.loads(line) for line in (run_yaml.parent / "validation.jsonl").read_text().splitlines()]
    assert [sample["expected"] for sample in samples] == [rows[index]["label"] for index in (0, 2, 4, 6)]
    base = load_base_model(resolve_base(str(random_base)), load_config(folder / "config.yaml").quantization)

    def answer(model: torch.nn.Module, text: str) -> tuple[str, str]:
        system = {"role": "system", "content": "Is this review positive, negative or neutral?"}
        prompt = chatml_tokenizer.apply_chat_template(
            [system, {"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt"
        )["input_ids"]
        stop = chatml_tokenizer.convert_tokens_to_ids("<|im_end|>")
        written = model.generate(prompt, max_new_tokens=4, do_sample=False, eos_token_id=stop)[0, prompt.shape[1] :]
        ids = written.tolist()
        return chatml_tokenizer.decode(ids).removesuffix("<|im_end|>"), "stop" if ids[-1] == stop else "length"

    shown = read(folder).text
    before = [answer(base, rows[index]["text"]) for index in (0, 2, 4, 6)]
    adapted = PeftModel.from_pretrained(base, folder).eval()
    after = [answer(adapted, rows[index]["text"]) for index in (0, 2, 4, 6)]
    assert before != after
    for sample, told_before, told_after in zip(samples, before, after, strict=True):
        assert (sample["base"]["text"], sample["base"]["finish_reason"]) == told_before
        assert (sample["adapter"]["text"], sample["adapter"]["finish_reason"]) == told_after
        assert sample["prompt"] in shown


def test_a_run_of_one_step_without_validation(run_yaml: Path, tmp_path: Path) -> None:
    news: list[TrainingProgress] = []
    short = ("train.max_steps=1", "train.save_strategy=no", "data.validation=[]")
    result = train(load_config(run_yaml, [f"output_dir={tmp_path}/run", *short]), progress=news.append)
    shown = flat(read(tmp_path / "run").text)
    assert result.kept_step == 1
    assert "validation loss none no validation loss was measured" in shown
    assert "None: the run has no validation rows" in shown
    assert "stop rate" not in shown
    circles = read(tmp_path / "run").having(class_="line dot")
    assert len(circles) == 3  # loss, learning rate, gradient norm: one point each
    began, last = news[0], news[-1]
    assert (began.step, began.tokens, began.loss) == (0, 0, None)
    assert (last.step, last.loss) == (1, result.train_loss)
    assert last.tokens == next(line["num_tokens"] for line in result.history if "num_tokens" in line)
    assert last.peak_bytes > 0
    assert [item.seconds for item in news] == sorted(item.seconds for item in news)
    change(tmp_path / "run" / "metrics.json", lambda record: record.update(history=[]))
    write_report(tmp_path / "run")
    assert "Nothing was logged" in read(tmp_path / "run").text


def test_samples_leave_the_adapter_as_it_was_trained(
    trained_run: tuple[Path, TrainResult], run_yaml: Path, tmp_path: Path
) -> None:
    train(load_config(run_yaml, [f"output_dir={tmp_path}/run", "eval.report_samples=0"]))
    records, weights = zip(
        *(
            (json.loads((folder / "metrics.json").read_text()), (folder / "adapter_model.safetensors").read_bytes())
            for folder in (trained_run[0], tmp_path / "run")
        ),
        strict=True,
    )
    assert [len(record["samples"]) for record in records] == [4, 0]
    assert weights[0] == weights[1]


def test_a_metric_of_the_task_that_was_logged_is_shown(folder: Path) -> None:
    kept = json.loads((folder / "metrics.json").read_text())["kept_step"]
    change(folder / "metrics.json", lambda record: record["history"].append({"step": kept, "eval_accuracy": 0.8125}))
    shown = flat(read(write_report(folder).parent).text)
    assert "validation accuracy 0.8125 of the adapter that was kept" in shown
    assert "Validation accuracy" in shown


def test_gradient_norms_that_are_not_finite_are_counted(folder: Path) -> None:
    change(folder / "metrics.json", lambda record: record["history"][0].update(grad_norm=None))
    assert "Gradient norm 1 values that are not finite are left out." in flat(read(write_report(folder).parent).text)


# --- safe to open ---


def test_nothing_is_loaded_and_nothing_runs(trained_run: tuple[Path, TrainResult]) -> None:
    text = (trained_run[0] / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {
        "script",
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "form",
        "base",
        "a",
    }
    for _, attributes in page.tags:
        assert not {"src", "href", "xlink:href", "srcset", "style", "action", "data", "xmlns"} & attributes.keys()
        assert not any(name.startswith("on") for name in attributes)
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    assert "url(" not in style and "@import" not in style
    assert not re.search(r"https?://", text)
    (policy,) = (found["content"] for found in page.having(**{"http-equiv": "Content-Security-Policy"}))
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


EVIL = "</pre></style><script>alert(1)</script><img src=x onerror=alert(1)>\"'&amp;{{ 7*7 }}"


def test_texts_of_the_run_are_only_text(folder: Path) -> None:
    def spoil(record: dict[str, Any]) -> None:
        answer = {"text": EVIL + "answer", "finish_reason": "stop"}
        sample = {"prompt": EVIL + "prompt", "expected": EVIL + "expected", "base": answer, "adapter": answer}
        record.update(samples=[sample], device=EVIL + "device")

    change(folder / "metrics.json", spoil)
    change(
        folder / "qlora_kit.json", lambda contract: contract.update(task=EVIL + "task", system_prompt=EVIL + "system")
    )
    change(folder / "qlora_kit.json", lambda contract: contract["base"].update(id=EVIL + "base"))
    change(folder / "qlora_kit.json", lambda contract: contract["data"][0].update(name=EVIL + "file"))
    (folder / "config.yaml").write_text(f"name: |\n  {EVIL}config\n")
    entry = {"split": "train", "file": EVIL + "place", "line": 3, "action": "dropped", "reason": EVIL + "reason"}
    (folder / "ledger.jsonl").write_text(json.dumps(entry) + "\n")
    page = read(write_report(folder).parent)
    assert not {tag for tag, _ in page.tags} & {"script", "img"}
    words = "prompt answer expected device system base file config place reason"
    for word in words.split():
        assert EVIL + word in page.text, word


def luminance(colour: str) -> float:
    """WCAG 2.2's relative luminance."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_light_and_dark_have_contrast_enough() -> None:
    """WCAG AA: 4.5 for text, 3 for what is drawn, on page and cards alike."""
    style = (ROOT / "qlora_kit" / "report" / "page.css").read_text()
    light, dark = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    assert "prefers-color-scheme: dark" in style
    for scheme in (light, dark):
        colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", scheme))
        for ground in ("page", "card"):
            for name, least in (("text", 7.0), ("quiet", 4.5), ("first", 4.5), ("second", 4.5)):
                bright, dim = sorted((luminance(colours[name]), luminance(colours[ground])), reverse=True)
                assert (bright + 0.05) / (dim + 0.05) >= least, (name, ground)


# --- written again, and from what ---


def test_the_verb_writes_the_same_bytes_from_the_files_alone(
    trained_run: tuple[Path, TrainResult], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["report", str(folder), "--json"])
    assert not end.value.code
    assert json.loads(capsys.readouterr().out) == {"report": str(folder / "report.html"), "plots": []}
    assert (folder / "report.html").read_bytes() == (trained_run[0] / "report.html").read_bytes()
    assert {path.name for path in folder.iterdir()} == {*FILES, "report.html"}


def test_the_verb_needs_no_heavy_library(folder: Path) -> None:
    code = (
        "import sys\nfrom qlora_kit.cli import main\n"
        f"try:\n    main(['report', {str(folder)!r}])\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_told(folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / name).unlink()
    with pytest.raises(SystemExit) as end:
        main(["report", str(folder)])
    assert end.value.code == 2
    told = capsys.readouterr().err
    assert re.search(rf"error: .*{name}.*\n  expected: .+\n  do: .+", told)
    assert not (folder / "report.html").exists()


def test_all_faults_are_told_at_once(folder: Path) -> None:
    change(folder / "metrics.json", lambda record: record.pop("data"))
    (folder / "ledger.jsonl").write_text('{"split": "train"}\n')
    (folder / "config.yaml").write_bytes(b"\xff")
    with pytest.raises(AdapterError) as refused:
        write_report(folder)
    told = [fault.what for fault in refused.value.faults]
    assert [what.split(": ")[0].rpartition("/")[2] for what in told] == [
        "metrics.json",
        "config.yaml",
        "ledger.jsonl:1",
    ]
    assert "data: field required" in told[0]
    with pytest.raises(AdapterError, match="no such folder"):
        write_report(folder / "nowhere")


def test_many_rows_left_out_are_counted_and_the_first_shown(folder: Path) -> None:
    entry = {"split": "train", "file": "a.csv", "action": "duplicate", "reason": "is row 1 again"}
    lines = [json.dumps({**entry, "line": line}) for line in range(2, 1502)]
    (folder / "ledger.jsonl").write_text("\n".join(lines) + "\n")
    shown = read(write_report(folder).parent).text
    assert "1,500 rows dropped, cut, double or leaked" in shown
    assert shown.count("is row 1 again") == 12


# --- plots ---


def test_plots_are_png_files_of_every_chart(folder: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra report is not installed")
    written = write_plots(folder)
    assert [path.name for path in written] == ["loss.png", "learning_rate.png", "grad_norm.png", "row_lengths.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") for path in written)
    bars = charts.Bars("lengths", "Rows", ("1-2", "3"), (4, 5))
    for name in ("one", "two"):
        write_png(bars, folder / name)
    assert (folder / "one").read_bytes() == (folder / "two").read_bytes()


def test_plots_without_matplotlib_name_the_line_that_installs_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'qlora-kit\[report\]'"):
        write_plots(folder)
    assert {path.name for path in folder.iterdir()} == set(FILES)


# --- charts ---


def test_the_smoothed_curve_is_the_mean_of_the_neighbours() -> None:
    values = np.random.default_rng(0).normal(size=200)
    smooth = np.array(charts.smoothed(tuple(enumerate(values.tolist()))))
    assert np.allclose(smooth[5:-5, 1], np.convolve(values, np.ones(11) / 11, mode="valid"))
    assert np.allclose(smooth[[0, -1], 1], values[[0, -1]])
    line = tuple((float(step), 3.0 * step) for step in range(100))
    assert np.allclose(charts.smoothed(line), line)  # a slope is not bent, also at its ends


def test_long_curves_lose_no_extreme() -> None:
    history = [{"step": step, "learning_rate": 1.0, "grad_norm": 1.0 + step % 7} for step in range(20_000)]
    history[12_345]["grad_norm"], history[777]["grad_norm"] = 500.0, 0.5

    class Logged:
        def __init__(self) -> None:
            self.history = history

        def logged(self, name: str) -> tuple[tuple[float, float], ...]:
            return tuple((line["step"], line[name]) for line in history if name in line)

    (norms,) = (chart for chart in charts.curves(Logged(), ()) if chart.key == "grad_norm")  # type: ignore[arg-type]
    points = norms.series[0].points
    assert len(points) <= charts.MAX_POINTS + 2
    assert {(12_345, 500.0), (777, 0.5), (0, 1.0), (19_999, 1.0)} <= set(points)
    assert list(points) == sorted(points)


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.1, 9.03), (2.5, 2.5), (0, 3e-4), (-3, 4), (17, 123_456), (1e-9, 1e-8), (0, 0)]
)
def test_ticks_are_few_round_numbers_around_the_values(low: float, high: float) -> None:
    ticks = charts.linear_ticks(low, high)
    assert 2 <= len(ticks) <= 7
    assert ticks[0] <= low and ticks[-1] >= high
    assert np.allclose(np.diff(ticks), ticks[1] - ticks[0])
    if low > 0 and high >= 2 * low:
        powers = charts.log_ticks(low, high)
        assert 2 <= len(powers) <= 8
        assert powers[0] <= low * 1.000001 and powers[-1] >= high * 0.999999


def test_numbers_are_short() -> None:
    values = {0.17324: "0.1732", 12.0: "12", 0: "0", 3e-5: "3e-5", 1234.5: "1,234", 0.003: "0.003", 2.5e9: "2.5e9"}
    assert {value: charts.number(value) for value in values} == values


def test_a_wheel_and_a_source_archive_carry_the_template() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["qlora_kit"]
    manifest = (ROOT / "MANIFEST.in").read_text()
    for name in ("report/page.html", "report/page.css"):
        assert any(fnmatch(name, pattern) for pattern in patterns)
        assert f"qlora_kit/{name}" in manifest
