"""What a base's files may not ask for is refused, and proved to be without effect; Hub ids with a revision."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_kit import Engine, load_config, merge_adapter, train
from qlora_kit.adapters import AdapterContract, base_fingerprint
from qlora_kit.base_files import BaseRef, require_supported_quantization, resolve_base, resolve_description
from qlora_kit.cli import main
from qlora_kit.config import QuantizationSection
from qlora_kit.data.chat import stop_token_ids
from qlora_kit.errors import BaseModelError, DataError
from qlora_kit.export import export_model
from qlora_kit.export.source import AnswerDefaults, ExportSource, described_base
from qlora_kit.models import load_base_model, load_tokenizer

KERNEL = "kernels-community/flash-attn2"
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("config.json", {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}}, "auto_map"),
    ("config.json", {"text_config": {"auto_map": {}}}, "auto_map"),
    ("config.json", {"_attn_implementation": KERNEL}, "'_attn_implementation' sets a private attribute"),
    ("config.json", {"_attn_implementation_internal": KERNEL}, "_attn_implementation_internal"),
    ("config.json", {"_experts_implementation": KERNEL}, "_experts_implementation"),
    ("config.json", {"text_config": {"_attn_implementation": KERNEL}}, "_attn_implementation"),
    ("config.json", {"per_layer_config": [{"0": {"_private": 1}}]}, "_private"),
    ("config.json", {"quantization_config": {"load_in_4bit": True, "_private": 1}}, "_private"),
    ("config.json", {"_name_or_path": {"a": "b"}}, "_name_or_path"),
    ("config.json", {"attn_implementation": KERNEL}, f"attn_implementation is '{KERNEL}'"),
    ("config.json", {"attn_implementation": "flash_attention_2"}, "fetch code from the Hub"),
    ("config.json", {"experts_implementation": {"": KERNEL}}, "experts_implementation"),
    ("config.json", {"configuration_files": ["config.5.0.0.json"]}, "configuration_files"),
    ("config.json", {"transformers_weights": "other.safetensors"}, "transformers_weights"),
    ("config.json", {"fusion_config": {"patch_embeddings": True}}, "fusion_config"),
    ("generation_config.json", {"auto_map": {}}, "auto_map"),
    ("generation_config.json", {"compile_config": {"_compile_all_devices": True}}, "_compile_all_devices"),
    ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["tokenizer.Mine", None]}}, "auto_map"),
    ("tokenizer_config.json", {"_tokenizer": "x"}, "_tokenizer"),
    ("special_tokens_map.json", {"auto_map": {}}, "auto_map"),
]


@pytest.fixture
def base(random_base: Path, tmp_path: Path) -> Path:
    """A copy of ``random_base`` to change."""
    return Path(shutil.copytree(random_base, tmp_path / "base"))


def add_keys(path: Path, keys: dict[str, Any]) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **keys}))


@pytest.mark.parametrize(("name", "keys", "shown"), REFUSED, ids=[f"{name}-{list(keys)}" for name, keys, _ in REFUSED])
def test_keys_that_act_on_libraries_are_refused(base: Path, name: str, keys: dict[str, Any], shown: str) -> None:
    add_keys(base / name, keys)
    for resolve in (resolve_base, resolve_description):
        with pytest.raises(BaseModelError, match=r"(?s)expected:.*do: .*delete the key") as caught:
            resolve(str(base))
        assert shown in str(caught.value)
        assert name in str(caught.value)


def test_every_refused_key_is_told_at_once(base: Path) -> None:
    add_keys(base / "config.json", {"_a": 1, "rope_parameters": {"_b": 2}, "auto_map": {}})
    with pytest.raises(BaseModelError) as caught:
        resolve_base(str(base))
    assert len(caught.value.faults) == 3


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
def test_what_is_refused_would_reach_transformers(base: Path, key: str) -> None:
    """The reason for refusing: the configuration would name a kernel, which a model fetches from the Hub and runs."""
    add_keys(base / "config.json", {key: KERNEL})
    assert AutoConfig.from_pretrained(base)._attn_implementation == KERNEL


def test_the_keys_of_honest_checkpoints_pass_and_do_nothing(base: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(base)
    notes = {"_name_or_path": "meta-llama/Llama-3.1-8B", "_commit_hash": "1" * 40, "_attn_implementation_autoset": True}
    add_keys(base / "config.json", {**notes, "attn_implementation": "sdpa", "unknown": [{"deep": 1}]})
    add_keys(base / "generation_config.json", {"_from_model_config": True})
    token = {"__type": "AddedToken", "content": "<|endoftext|>", "lstrip": False, "normalized": False, "rstrip": False}
    add_keys(base / "tokenizer_config.json", {"bos_token": {**token, "single_word": False}, "_commit_hash": None})

    ref = resolve_base(str(base))
    tokenizer = load_tokenizer(ref)
    model = load_base_model(ref, QuantizationSection(load_in_4bit=False), device=torch.device("cpu"))

    assert tokenizer.bos_token == "<|endoftext|>"
    assert model.name_or_path == model.config._name_or_path == str(base)  # PEFT and TRL look this name up
    assert model.config._attn_implementation == plain.config._attn_implementation
    ids = torch.arange(20).reshape(1, 20)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)


def test_code_that_lies_beside_a_base_is_not_run(base: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (base / "custom_generate").mkdir()
    for name in ("modeling_qwen2.py", "tokenization_qwen2.py", "custom_generate/generate.py"):
        (base / name).write_text(f"open({str(marker)!r}, 'w').close()\ndef generate(*a, **k): pass\n")
    add_keys(base / "generation_config.json", {"custom_generate": "./custom_generate"})

    engine = Engine(str(base))
    engine.ask("hello")

    assert not marker.exists()


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    ],
)
def test_a_chat_template_stays_in_its_sandbox(base: Path, attack: str) -> None:
    template = base / "chat_template.jinja"
    template.write_text(attack + template.read_text())
    tokenizer = load_tokenizer(resolve_base(str(base)))
    with pytest.raises(DataError, match="the chat template refuses"):
        stop_token_ids(tokenizer)


def test_an_adapter_beside_a_base_is_refused(base: Path) -> None:
    """transformers would load it together with the base, and nobody would see."""
    (base / "adapter_config.json").write_text("{}")
    with pytest.raises(BaseModelError, match=r"holds an adapter beside the model"):
        resolve_base(str(base))


# --- quantized bases ---


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "gptq", "load_in_4bit": True}, "gptq"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes in 8 bits"),
        ({"load_in_8bit": True, "load_in_4bit": False}, "bitsandbytes in 8 bits"),
        ("nf4", "nf4"),
    ],
    ids=str,
)
def test_other_quantizations_are_refused_by_name(base: Path, settings: Any, name: str) -> None:
    for config in ({"quantization_config": settings}, {"text_config": {"quantization_config": settings}}):
        with pytest.raises(BaseModelError, match=f"here: the base is quantized already, by '?{name}(.|\n)*bnb-4bit"):
            require_supported_quantization(config, "here")
    add_keys(base / "config.json", {"quantization_config": settings})
    with pytest.raises(BaseModelError, match=name):
        resolve_base(str(base))
    assert resolve_description(str(base)).path == base  # `info` may still describe it


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "_load_in_4bit": True, "_load_in_8bit": False},
        {"load_in_4bit": True},
        None,
        {},
    ],
    ids=str,
)
def test_4bit_weights_of_bitsandbytes_pass(base: Path, settings: Any) -> None:
    require_supported_quantization({"quantization_config": settings}, "here")
    add_keys(base / "config.json", {"quantization_config": settings})
    assert resolve_base(str(base)).path == base


# --- the Hub ---

OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture
def hub(random_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hub cache as a download leaves it, with two commits of `org/name`: the tag v1 is OLD, main is NEW.

    OLD has other weights. The value is the folder of snapshots; nothing can be downloaded.
    """
    repository = tmp_path / "hub" / "models--org--name"
    for commit in (OLD, NEW):
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for path in random_base.iterdir():
            blob = repository / "blobs" / f"{commit}-{path.name}"
            blob.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, blob)
            (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    model = AutoModelForCausalLM.from_pretrained(random_base)
    model.model.norm.weight.data += 1
    model.save_pretrained(tmp_path / "old")
    shutil.copyfile(tmp_path / "old" / "model.safetensors", repository / "blobs" / f"{OLD}-model.safetensors")
    for name, commit in (("main", NEW), ("v1", OLD), ("refs/pr/3", OLD)):
        path = repository / "refs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return repository / "snapshots"


@pytest.mark.parametrize(
    ("base", "revision", "commit"),
    [
        ("org/name", None, NEW),
        ("org/name", "main", NEW),
        ("org/name", "v1", OLD),
        ("org/name", OLD, OLD),
        ("org/name@v1", None, OLD),
        ("org/name@v1", "v1", OLD),
        (f"org/name@{OLD}", None, OLD),
        ("org/name@refs/pr/3", None, OLD),
    ],
)
def test_a_revision_is_resolved_to_its_commit(hub: Path, base: str, revision: str | None, commit: str) -> None:
    expected = BaseRef("org/name", hub / commit, revision=commit)
    assert resolve_base(base, revision) == expected
    assert resolve_description(base, revision) == expected


@pytest.mark.parametrize(
    ("base", "revision", "message"),
    [
        ("org/name", "v2", r"'org/name' at revision 'v2' cannot be had(.|\n)*hf download org/name --revision v2"),
        ("org/name@v2", None, r"at revision 'v2' cannot be had"),
        ("org/name", "c" * 40, r"at revision 'c+' cannot be had"),
        ("org/name@v1", "main", r"names a revision, and model\.revision is 'main'"),
        ("org/name@", None, "'' is no revision"),
        ("org/name@../../main", None, "is no revision"),
        ("org/name", "/etc/passwd", "is no revision"),
        ("org/na--me", None, "cannot be had from the Hub"),
        ("tiny@v1", None, "neither a folder nor a Hub id"),
        ("tiny", "v1", "is a folder here, which has no revisions"),
        (".", "v1", "is a folder here, which has no revisions"),
    ],
)
def test_revisions_that_are_not_there_are_refused(hub: Path, base: str, revision: str | None, message: str) -> None:
    with pytest.raises(BaseModelError, match=message) as caught:
        resolve_base(base, revision)
    assert caught.value.faults[0].expected
    assert caught.value.faults[0].fix


def test_the_contract_keeps_the_commit_and_every_step_goes_back_to_it(
    hub: Path, run_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    config = load_config(
        run_yaml, [f"output_dir={run}", "model.base=org/name@v1", "train.max_steps=2", "data.validation=[]"]
    )
    train(config)

    contract = AdapterContract.load(run)
    assert (contract.base.id, contract.base.revision) == ("org/name", OLD)
    settings = json.loads((run / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("org/name", OLD)
    assert merge_adapter(run, tmp_path / "merged", verify=False).revision == OLD
    for arguments, code in (([], 0), (["--base", "org/name@v1"], 0), (["--base", "org/name"], 2)):
        with pytest.raises(SystemExit) as end:
            main(["generate", "hello", "--adapter", str(run), *arguments])
        assert (end.value.code or 0) == code
    told = capsys.readouterr().err
    assert f"trained on {OLD}, at hand is {NEW}" in told


def test_an_export_is_of_the_revision_that_is_named(hub: Path, tmp_path: Path) -> None:
    export_model("org/name@v1", "base", tmp_path / "base")
    report = json.loads((tmp_path / "base" / "merge_report.json").read_text())
    assert (report["base"], report["revision"]) == ("org/name", OLD)
    assert report["base_fingerprint"] == base_fingerprint(hub / OLD)

    shutil.rmtree(hub / NEW)  # nothing asks for main
    export_model("org/name@v1", "gguf", tmp_path / "gguf", quant="f32")
    norm = GGUFReader(tmp_path / "gguf" / "name-f32.gguf").tensors
    found = next(tensor.data for tensor in norm if tensor.name == "output_norm.weight")
    model = AutoModelForCausalLM.from_pretrained(hub / OLD)
    assert found.tolist() == model.model.norm.weight.tolist()


def test_what_an_adapters_base_is_is_read_at_the_revision_of_its_training(hub: Path, tmp_path: Path) -> None:
    adapter = ExportSource("adapter", "a", tmp_path, "org/name", AnswerDefaults(), OLD)
    assert described_base(adapter, None) == BaseRef("org/name", hub / OLD, revision=OLD)
    assert described_base(adapter, "org/name@main") == BaseRef("org/name", hub / NEW, revision=NEW)


def test_a_snapshot_without_its_weights_is_seen(hub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (hub / NEW / "model.safetensors").unlink()
    with pytest.raises(BaseModelError, match="no safetensors weights"):
        resolve_base("org/name")
    assert resolve_description("org/name").revision == NEW
    assert described("org/name", capsys)["weights_agree"] is None
    assert described("org/name@v1", capsys)["weights_agree"] is True


def test_a_snapshot_without_one_of_its_shards_is_seen(hub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    snapshot = hub / NEW
    model = AutoModelForCausalLM.from_pretrained(snapshot)
    (snapshot / "model.safetensors").unlink()
    model.save_pretrained(snapshot, max_shard_size="100KB")
    assert resolve_base("org/name").revision == NEW
    shard = sorted(snapshot.glob("model-*.safetensors"))[1]
    shard.unlink()

    with pytest.raises(BaseModelError, match=rf"{shard.name}(.|\n)*download"):
        resolve_base("org/name")
    content = described("org/name", capsys)
    assert content["weights_agree"] is False
    assert shard.name in content["weight_differences"][0]


def described(base: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What `qlora-kit info` says."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(["info", base, "--json"])
    assert (end.value.code or 0) == 0
    return json.loads(capsys.readouterr().out)


def test_only_files_that_are_used_are_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a repository such as Mistral's: not the second copy of the weights, no code, no pickles, no other formats."""
    from huggingface_hub.utils import filter_repo_objects

    asked: dict[str, Any] = {}

    def remember(repo_id: str, **arguments: Any) -> str:
        asked.update(arguments)
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", remember)
    with pytest.raises(BaseModelError, match="cannot be had"):
        resolve_base("org/name")
    used = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "chat_template.jinja"]
    used += ["tokenizer.model", "tokenizer.json"]
    other = ["consolidated.safetensors", "original/consolidated.00.pth", "onnx/config.json", "modeling.py"]
    other += ["pytorch_model.bin", "custom_generate/generate.py", "gguf/model.safetensors"]
    patterns = {name: asked[name] for name in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects([*used, *other], **patterns)) == used
