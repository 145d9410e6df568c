"""The Ollama export: Go renders what the chat template renders, and the Modelfile says what was trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from go_templates.cases import conversations, render_with_go, tokenizers

from qlora_kit.errors import BaseModelError, ConfigError
from qlora_kit.export import export_model
from qlora_kit.export.go_template import TurnTexts, go_template, read_turn_texts
from qlora_kit.export.modelfile import Modelfile, sampling_parameters, write_modelfile

if TYPE_CHECKING:
    from qlora_kit.training import TrainResult

HERE = Path(__file__).resolve().parent
FAMILIES = ("qwen2_5", "qwen3", "llama3", "gemma3", "mistral", "odd")
CHATML = TurnTexts("", ("<s>", "</s>\n"), False, ("<u>", "</u>\n"), ("<a>", "</a>\n"), "<a>")


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    """Templates and what Go made of them (``go_templates/record.py``)."""
    content: dict[str, Any] = json.loads((HERE / "go_templates" / "rendered.json").read_text(encoding="utf-8"))
    return content


@pytest.fixture(scope="module")
def made(make_tokenizer: Callable[..., Any], make_sentencepiece_tokenizer: Callable[[str], Any]) -> dict[str, Any]:
    return tokenizers(make_tokenizer, make_sentencepiece_tokenizer)


def read_modelfile(text: str) -> dict[str, list[str]]:
    """The commands of a Modelfile by Ollama's rules: unprintable characters vanish, quoted values span lines."""
    kept = "".join(character for character in text if character.isprintable() or character in "\n\r\t")
    commands: dict[str, list[str]] = {}
    lines = iter(kept.split("\n"))
    for line in lines:
        if not line.strip() or line.startswith("#"):
            continue
        name, _, value = line.partition(" ")
        if name == "PARAMETER":
            key, _, value = value.partition(" ")
            name = f"PARAMETER {key}"
        while value.startswith('"""') and not (len(value) >= 6 and value.rstrip().endswith('"""')):
            value += "\n" + next(lines)
        value = value.rstrip()
        commands.setdefault(name, []).append(value[3:-3] if value.startswith('"""') else value)
    return commands


@pytest.mark.parametrize("family", FAMILIES)
def test_go_renders_what_the_chat_template_renders(family: str, made: dict[str, Any], recorded: dict[str, Any]) -> None:
    template = go_template(read_turn_texts(made[family]))
    assert template == recorded[family]["template"], "run tests/go_templates/record.py, where Go is installed"
    for turns, text in zip(conversations(), recorded[family]["texts"], strict=True):
        expected = made[family].apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        assert text == expected


@pytest.mark.skipif(shutil.which("go") is None, reason="Go is not installed; what it rendered is recorded")
def test_go_still_renders_what_is_recorded(recorded: dict[str, Any]) -> None:
    templates = {name: entry["template"] for name, entry in recorded.items()}
    assert render_with_go(templates) == {name: entry["texts"] for name, entry in recorded.items()}


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (
            "{% for m in messages %}<|im_start|>{{ m.role }}{{ loop.index }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
            "opens the first user turn otherwise",
        ),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}<|im_end|>{% endfor %}", "more than once"),
        ("{% for m in messages %}<|im_end|>{% endfor %}", "not at all"),
        (
            "{% for m in messages %}{% if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
            "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
            "leaves a system prompt out",
        ),
        (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | upper if loop.index > 3 else m.content }}"
            "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
            "probe conversations are rendered otherwise",
        ),
    ],
)
def test_templates_that_fixed_texts_cannot_say_are_refused(
    template: str, reason: str, make_tokenizer: Callable[..., Any]
) -> None:
    tokenizer = make_tokenizer("qwen", "qwen2_5", eos_token="<|im_end|>")
    tokenizer.chat_template = template
    with pytest.raises(BaseModelError, match=reason) as caught:
        read_turn_texts(tokenizer)
    assert "write a Modelfile by hand" in caught.value.faults[0].fix


def modelfile(prompt: str | None, texts: TurnTexts = CHATML, **changes: Any) -> Modelfile:
    given: dict[str, Any] = {
        "weights": "m.gguf", "adapter": None, "system_prompt": prompt, "stops": ["<|im_end|>"], "generation": {},
        "context_tokens": 1024,
    }  # fmt: skip
    return write_modelfile(texts, **{**given, **changes})


@pytest.mark.parametrize(
    "prompt",
    ["Plain.", 'Ends in "quotes"', '"Begins', "Two\nlines\n\n  indented ", "FROM /etc/passwd\nSYSTEM x", "# no comment",
     "é 中文 🙂", "tab\there", '""', "{{ .System }}"],
)  # fmt: skip
def test_a_system_prompt_comes_back_as_it_was(prompt: str) -> None:
    found = modelfile(prompt)
    assert read_modelfile(found.text)["SYSTEM"] == [prompt]
    assert read_modelfile(found.text)["FROM"] == ["./m.gguf"]
    assert found.remarks == ()


@pytest.mark.parametrize("prompt", ['three """ quotes', "narrow\u202fspace", "zero\u200bwidth", "bell\x07", 'end"""'])
def test_a_system_prompt_that_a_modelfile_would_change_goes_into_the_template(prompt: str) -> None:
    """Ollama's parser drops unprintable characters in silence, and three quotes end a value."""
    found = modelfile(prompt)
    commands = read_modelfile(found.text)
    assert "SYSTEM" not in commands
    assert "stands in TEMPLATE" in found.remarks[0]
    template = commands["TEMPLATE"][0]
    assert prompt not in template
    own = template.split("{{ else }}")[1].split("{{ end }}")[0]
    assert go_unescaped(own) == f"<s>{prompt}</s>\n"


def go_unescaped(text: str) -> str:
    """Text of a template whose actions are all plain strings; Go writes ``\\U0000200b``, JSON ``\\u200b``."""
    parts = text.split("{{ ")
    return parts[0] + "".join(
        json.loads(string.replace("\\U0000", "\\u")) + rest
        for string, _, rest in (part.partition(" }}") for part in parts[1:])
    )


def test_remarks_on_what_cannot_be_said() -> None:
    without = TurnTexts("", None, False, ("<u>", "</u>"), ("<a>", "</a>"), "<a>", strips=True)
    found = modelfile("Be kind.", without, generation={"num_beams": 4, "do_sample": False})
    assert [
        "system prompt" in found.remarks[0],
        "white space" in found.remarks[1],
        "num_beams" in found.remarks[2],
    ] == [True] * 3
    assert "SYSTEM" not in read_modelfile(found.text)


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({}, {"temperature": 0, "repeat_penalty": 1.0}),
        ({"do_sample": False, "temperature": 0.7, "max_new_tokens": 8},
         {"temperature": 0, "repeat_penalty": 1.0, "num_predict": 8}),
        ({"do_sample": True},
         {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0, "repeat_penalty": 1.0}),
        ({"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05},
         {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0, "repeat_penalty": 1.05, "repeat_last_n": -1}),
        ({"do_sample": True, "temperature": 0.0, "top_k": 0},
         {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0, "repeat_penalty": 1.0}),
    ],
)  # fmt: skip
def test_sampling_is_that_of_transformers(generation: dict[str, Any], expected: dict[str, Any]) -> None:
    assert sampling_parameters(generation) == expected


@pytest.mark.parametrize("value", ["0.7\nADAPTER /etc/passwd", "0.7", [0.7], True, float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["temperature", "repetition_penalty", "max_new_tokens"])
def test_a_generation_default_that_is_no_number_is_refused(key: str, value: object) -> None:
    with pytest.raises(BaseModelError, match=f"{key} is (.|\n)*expected: a finite number"):
        sampling_parameters({"do_sample": True, key: value})


def test_a_generation_default_that_is_no_number_is_refused_before_anything_is_written(
    random_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = shutil.copytree(random_base, tmp_path / "base")
    (base / "generation_config.json").write_text('{"do_sample": true, "top_p": "1\\nSYSTEM x"}')
    monkeypatch.setattr("qlora_kit.export.ollama.write_model_file", None)
    with pytest.raises(BaseModelError, match="top_p is"):
        export_model(base, "ollama", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_merged_model_with_its_modelfile(trained_run: tuple[Path, TrainResult], tmp_path: Path) -> None:
    result = export_model(trained_run[0], "ollama", tmp_path / "out", quant="f16", onto="dequantized")
    commands = read_modelfile((tmp_path / "out" / "Modelfile").read_text(encoding="utf-8"))
    assert {file.path for file in result.files} == {"Modelfile", "README.md", "model-f16.gguf", "export_report.json"}
    assert commands["FROM"] == ["./model-f16.gguf"]
    assert commands["SYSTEM"] == ["Is this review positive, negative or neutral?"]
    assert commands["PARAMETER stop"] == ["<|im_end|>"]
    assert commands["PARAMETER temperature"] == ["0"]
    assert commands["PARAMETER num_predict"] == ["4"]
    assert commands["PARAMETER num_ctx"] == ["512"]
    assert result.verification == {"checked": False, "reason": "not checked in llama.cpp: --check was not given"}
    assert result.details["merge"]["verification"]["passed"] is True


def test_a_merged_folder_still_knows_how_it_was_trained(merged_run: Path, tmp_path: Path) -> None:
    export_model(merged_run, "ollama", tmp_path / "out", quant="f16")
    commands = read_modelfile((tmp_path / "out" / "Modelfile").read_text(encoding="utf-8"))
    assert commands["SYSTEM"] == ["Is this review positive, negative or neutral?"]
    assert commands["PARAMETER num_predict"] == ["4"]
    assert commands["PARAMETER temperature"] == ["0"]


def test_base_and_adapter_apart(trained_run: tuple[Path, TrainResult], tmp_path: Path) -> None:
    export_model(trained_run[0], "ollama", tmp_path / "out", quant="f32", separate=True)
    commands = read_modelfile((tmp_path / "out" / "Modelfile").read_text(encoding="utf-8"))
    assert (commands["FROM"], commands["ADAPTER"]) == (["./base-f32.gguf"], ["./adapter.gguf"])
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"Modelfile", "README.md", "base-f32.gguf", "adapter.gguf", "export_report.json"}


def test_only_an_adapter_can_be_apart(random_base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--separate"):
        export_model(random_base, "ollama", tmp_path / "out", separate=True)
    assert not (tmp_path / "out").exists()
