"""`qlora-kit info` tells what transformers would, from the small files alone and without importing a heavy library."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from qlora_kit.cli import main
from qlora_kit.data.chat import read_turn_format
from qlora_kit.data.template_file import StopFacts, read_stop_facts
from qlora_kit.errors import BaseModelError

DESIGN_KEYS = {
    "architecture", "parameters", "layers", "hidden_size", "heads", "kv_heads", "head_dim", "vocab_size", "tied",
    "lora_targets",
}  # fmt: skip
TEMPLATES = [
    ("qwen", "qwen2_5", "<|im_end|>"),
    ("qwen", "qwen2_5_training", "<|im_end|>"),  # with generation marks
    ("qwen", "qwen3", "<|im_end|>"),
    ("llama3", "llama3", "<|eot_id|>"),
]


@pytest.fixture
def info(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """The JSON object that `qlora-kit info` prints for arguments."""

    def run(*arguments: str) -> dict[str, Any]:
        capsys.readouterr()
        main_without_exit(["info", *arguments, "--json"])
        return json.loads(capsys.readouterr().out)

    return run


def main_without_exit(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code in (None, 0)


@pytest.fixture
def base(random_base: Path, tmp_path: Path) -> Path:
    """A copy of ``random_base`` to change."""
    return Path(shutil.copytree(random_base, tmp_path / "base"))


def test_json_tells_what_transformers_would(random_base: Path, info: Callable[..., dict[str, Any]]) -> None:
    content = info(str(random_base), "--r", "4")
    config = AutoConfig.from_pretrained(random_base)
    model = AutoModelForCausalLM.from_pretrained(random_base)
    assert set(content) >= DESIGN_KEYS
    assert content["parameters"] == model.num_parameters() == sum(content["parameters_by_part"].values())
    assert content["architecture"] == type(model).__name__
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
    keys = ("layers", "hidden_size", "heads", "kv_heads", "vocab_size")
    assert [content[key] for key in keys] == [vars(config)[name] for name in names]
    assert content["tied"] is config.tie_word_embeddings
    for name, target in content["lora_targets"].items():
        modules = [module for path, module in model.named_modules() if path.endswith(f".{name}")]
        assert target["layers"] == len(modules)
        assert {tuple(module.weight.shape) for module in modules} == {(target["out"], target["in"])}
        assert target["trainable"] == 4 * (target["out"] + target["in"]) * target["layers"]
    assert content["weights_agree"] is True


def test_stop_token_is_the_tokenizers(random_base: Path, info: Callable[..., dict[str, Any]]) -> None:
    turn = read_turn_format(AutoTokenizer.from_pretrained(random_base))
    content = info(str(random_base))
    assert (content["stop_tokens"], content["stop_token_ids"]) == ([turn.stop], [turn.stop_id])


def test_config_alone_is_enough(base: Path, info: Callable[..., dict[str, Any]]) -> None:
    parameters = info(str(base))["parameters"]
    for path in base.iterdir():
        if path.name != "config.json":
            path.unlink()
    content = info(str(base))
    assert content["parameters"] == parameters
    assert content["weights_agree"] is None
    assert content["chat_template"] is False
    assert content["stop_token_ids"] == []


def test_weights_of_another_shape_and_broken_weights_are_told(
    base: Path, info: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3, "layer_types": None}))
    content = info(str(base))
    assert content["weights_agree"] is False
    assert "model.layers.2" in content["weight_differences"][0]
    (base / "model.safetensors").write_bytes(b"12")
    assert "2 bytes are too few" in info(str(base))["weight_differences"][0]
    main_without_exit(["info", str(base)])
    assert "do NOT agree with config.json" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("stops", "agree"), [([151], False), (["stop"], True), (["stop", 151], True), (None, None)], ids=str
)
def test_disagreement_with_the_generation_config_is_told(
    stops: list[Any] | None, agree: bool | None, base: Path, info: Callable[..., dict[str, Any]]
) -> None:
    stop_id = info(str(base))["stop_token_ids"][0]
    ids = None if stops is None else [stop_id if stop == "stop" else stop for stop in stops]
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    content = info(str(base))
    assert content["stops_agree"] is agree
    assert content["generation_stop_ids"] == (ids or [])


def test_the_tree_fits_80_columns(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main_without_exit(["info", str(base)])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    for part in ("parameters", "<|im_end|>", "down_proj", "agree with config.json", "2 layers"):
        assert part in text


def test_nothing_heavy_is_imported(random_base: Path) -> None:
    program = (
        "import sys\nfrom qlora_kit.cli import main\n"
        f"try:\n    main(['info', {str(random_base)!r}, '--json'])\n"
        "except SystemExit:\n    pass\n"
        "print(*sorted({'torch', 'transformers', 'peft', 'tokenizers', 'datasets'} & set(sys.modules)))"
    )
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    first, second = process.stdout.splitlines()
    assert json.loads(first)["layers"] == 2
    assert second == ""


@pytest.mark.parametrize("arguments", [["no-such-model"], ["some/where"]])
def test_a_model_that_cannot_be_had_ends_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["info", *arguments])
    assert ended.value.code == 2
    assert "do: " in capsys.readouterr().err


# --- templates from files ---


@pytest.mark.parametrize(("family", "template", "stop"), TEMPLATES, ids=[name for _, name, _ in TEMPLATES])
def test_files_and_tokenizer_find_the_same_stop(
    family: str, template: str, stop: str, make_tokenizer: Callable[..., PreTrainedTokenizerFast], tmp_path: Path
) -> None:
    tokenizer = make_tokenizer(family, template, eos_token=stop)
    tokenizer.save_pretrained(tmp_path)
    facts = read_stop_facts(tmp_path, {"eos_token_id": tokenizer.eos_token_id})
    turn = read_turn_format(tokenizer)
    assert (facts.token, facts.token_id, facts.agree) == (turn.stop, turn.stop_id, True)
    assert turn.stop == stop


def write_tokenizer(folder: Path, template: Any, **more: Any) -> Path:
    content = {"chat_template": template, "added_tokens_decoder": {"5": {"content": "</s>"}}, **more}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    return folder


def test_a_template_in_the_tokenizers_config_may_use_its_special_tokens(tmp_path: Path) -> None:
    template = "{% set ns = namespace(n=0) %}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    named = [{"name": "tools", "template": "x"}, {"name": "default", "template": template}]
    for given in (template, named):
        write_tokenizer(tmp_path, given, eos_token={"content": "</s>"})
        assert read_stop_facts(tmp_path, {"eos_token_id": 5}) == StopFacts(True, "</s>", 5, (5,))


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (None, "no chat template"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "no control token"),
        ("{{ raise_exception('only for tools') }}", "only for tools"),
        ("{{ messages[0].content }}", "leaves the answer out"),
        ("{% if %}", "the template fails"),
        ("{{ 1 // 0 }}", "the template fails"),
        ("{% set ns = namespace() %}{% set ns.__init__ = 1 %}", "may not store '__init__'"),
        ("{{ messages.__class__.__base__.__subclasses__() }}", "unsafe"),
    ],
)
def test_a_template_that_shows_no_stop_is_told(template: str | None, problem: str, tmp_path: Path) -> None:
    facts = read_stop_facts(write_tokenizer(tmp_path, template), {})
    assert facts.has_template is (template is not None)
    assert facts.token is None
    assert facts.agree is None
    assert problem in str(facts.problem)


@pytest.mark.parametrize("decoder", [{"x": {"content": "a"}}, {"1": 3}, [1]], ids=str)
def test_tokenizer_files_that_make_no_sense_are_refused(decoder: Any, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "{{ messages[1].content }}", added_tokens_decoder=decoder)
    with pytest.raises(BaseModelError, match="added tokens"):
        read_stop_facts(tmp_path, {})
