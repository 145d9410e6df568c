"""What a merge may be handed in wrongly: each case is refused with file or tensor named, and touches nothing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen2ForCausalLM

from qlora_kit.errors import AdapterError, BaseModelError, OutputError, QloraKitError
from qlora_kit.merging import merge_adapter, write_trained_base

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
UNTARGETED = "model.layers.1.self_attn.v_proj.weight"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
LORA_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
LORA_B = LORA_A.replace("lora_A", "lora_B")


@dataclass
class Inputs:
    """Copies of a sound base, in one file and sharded, and of an adapter for them; a case spoils one of them."""

    root: Path
    base: Path
    adapter: Path
    out: Path
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def weights(self) -> Path:
        return self.base / WEIGHTS

    def shard(self) -> Path:
        """The base becomes the sharded one; its second shard."""
        shutil.rmtree(self.base)
        shutil.copytree(self.root.parent / "sound" / "sharded", self.base)
        return sorted(self.base.glob("*.safetensors"))[1]

    def edit_json(self, path: Path, change: Callable[[dict[str, Any]], object]) -> None:
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    def edit_index(self, change: Callable[[dict[str, str]], object]) -> None:
        self.shard()
        self.edit_json(self.base / INDEX, lambda content: change(content["weight_map"]))

    def edit_config(self, **keys: Any) -> None:
        self.edit_json(self.base / "config.json", lambda content: content.update(keys))

    def edit_adapter_config(self, **keys: Any) -> None:
        self.edit_json(self.adapter / "adapter_config.json", lambda content: content.update(keys))

    def edit_tensors(self, path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    def fill(self, path: Path, name: str, value: float) -> None:
        self.edit_tensors(path, lambda tensors: tensors[name].view(-1)[3:4].fill_(value))

    def edit_header(self, change: Callable[[dict[str, Any]], object]) -> None:
        whole = self.weights.read_bytes()
        (size,) = struct.unpack("<Q", whole[:8])
        header = json.loads(whole[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        self.weights.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + size :])


@pytest.fixture(scope="module")
def sound(
    random_model: PreTrainedModel, chatml_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    root = tmp_path_factory.mktemp("bad-input") / "sound"
    for name, size in (("base", "1GB"), ("sharded", "100KB")):
        random_model.save_pretrained(root / name, max_shard_size=size)
        chatml_tokenizer.save_pretrained(root / name)
    model = Qwen2ForCausalLM.from_pretrained(root / "base")
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.05)
    adapted.save_pretrained(root / "adapter", save_embedding_layers=False)
    return root


@pytest.fixture
def inputs(sound: Path, request: pytest.FixtureRequest) -> Inputs:
    root = sound.parent / f"case-{len(list(sound.parent.iterdir()))}"
    for name in ("base", "adapter"):
        shutil.copytree(sound / name, root / name)
    (root / "outputs").mkdir()
    return Inputs(root, root / "base", root / "adapter", root / "outputs" / "merged")


def cut(path: Path, count: int) -> None:
    os.truncate(path, path.stat().st_size - count if count > 0 else -count)


def rename_key(content: dict[str, Any], old: str, new: str) -> None:
    content[new] = content.pop(old)


def swap_shards(inputs: Inputs) -> None:
    inputs.shard()
    first, second = sorted(inputs.base.glob("*.safetensors"))[:2]
    held = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(held)


def duplicate_key(inputs: Inputs) -> None:
    whole = inputs.weights.read_bytes()
    (size,) = struct.unpack("<Q", whole[:8])
    text = whole[8 : 8 + size].rstrip()
    entry = json.dumps(json.loads(text)["model.norm.weight"])
    text = text[:-1] + f', "model.norm.weight": {entry}}}'.encode()
    inputs.weights.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + size :])


def twice(inputs: Inputs) -> None:
    shard = inputs.shard()
    other = sorted(inputs.base.glob("*.safetensors"))[0]
    name = next(iter(load_file(shard)))
    inputs.edit_tensors(other, lambda tensors: tensors.update({name: load_file(shard)[name]}))


def link_to_nowhere(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.parent.parent / "nowhere")


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def only_pickle(inputs: Inputs) -> None:
    torch.save(load_file(inputs.weights), inputs.base / "pytorch_model.bin")
    inputs.weights.unlink()


def a_merge_as_base(inputs: Inputs) -> None:
    merged = inputs.root / "merged-once"
    merge_adapter(inputs.adapter, merged, base=str(inputs.base), onto="original", verify=False)
    inputs.base = merged


def a_trained_base_as_base(inputs: Inputs) -> None:
    trained = inputs.root / "trained-base"
    write_trained_base(trained, base=str(inputs.base), verify=False)
    inputs.base = trained


def other_shape(inputs: Inputs) -> None:
    def narrow(tensors: dict[str, torch.Tensor]) -> None:
        tensors[LORA_A] = tensors[LORA_A][:, :32].contiguous()

    inputs.edit_tensors(inputs.adapter / ADAPTER_WEIGHTS, narrow)


def on_the_tied_head(inputs: Inputs) -> None:
    inputs.edit_config(tie_word_embeddings=True)
    inputs.edit_tensors(inputs.weights, lambda tensors: tensors.pop("lm_head.weight"))
    model = Qwen2ForCausalLM.from_pretrained(inputs.base)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["lm_head", "q_proj"], init_lora_weights=False))
    shutil.rmtree(inputs.adapter)
    adapted.save_pretrained(inputs.adapter, save_embedding_layers=False)


def nothing_trained(inputs: Inputs) -> None:
    def zero(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            tensor.mul_(0.0 if "lora_B" in name else 1.0)

    inputs.edit_tensors(inputs.adapter / ADAPTER_WEIGHTS, zero)


def occupied(inputs: Inputs) -> None:
    inputs.out.mkdir()
    (inputs.out / "mine.txt").write_text("keep")


def other_merge(inputs: Inputs) -> None:
    merge_adapter(inputs.adapter, inputs.out, base=str(inputs.base), onto="original", verify=False)
    inputs.settings["onto"] = "dequantized"


def changed_merge(inputs: Inputs) -> None:
    merge_adapter(inputs.adapter, inputs.out, base=str(inputs.base), onto="original", verify=False)
    inputs.settings |= {"onto": "original", "verify": False}
    (inputs.out / "config.json").write_text("{}")


def changed_merged_weights(inputs: Inputs) -> None:
    merge_adapter(inputs.adapter, inputs.out, base=str(inputs.base), onto="original", verify=False)
    inputs.settings |= {"onto": "original", "verify": False}
    inputs.fill(inputs.out / WEIGHTS, "model.norm.weight", 3.0)


def unverified_merge(inputs: Inputs) -> None:
    merge_adapter(inputs.adapter, inputs.out, base=str(inputs.base), onto="original", verify=False)
    inputs.settings |= {"onto": "original", "verify": True}


def place(inputs: Inputs, out: Path) -> None:
    inputs.out = out
    inputs.settings["overwrite"] = True


def a_contract(inputs: Inputs, **keys: Any) -> None:
    (inputs.adapter / "qlora_kit.json").write_text(json.dumps({"format_version": 2, **keys}))


BASE_CASES: dict[str, tuple[Callable[[Inputs], object], str]] = {
    "weights-empty": (lambda i: i.weights.write_bytes(b""), r"model\.safetensors: 0 bytes"),
    "weights-cut": (lambda i: cut(i.weights, 100), r"model\.safetensors: the tensors end"),
    "weights-cut-in-header": (lambda i: cut(i.weights, -50), r"model\.safetensors: the header claims"),
    "weights-too-long": (lambda i: i.weights.write_bytes(i.weights.read_bytes() + b"x"), r"the tensors end at byte"),
    "header-huge": (
        lambda i: i.weights.write_bytes(struct.pack("<Q", 1 << 50) + i.weights.read_bytes()[8:]),
        r"the header claims 1125899906842624 bytes",
    ),
    "header-no-json": (lambda i: i.weights.write_bytes(struct.pack("<Q", 4) + b"{{{{"), r"not usable JSON"),
    "header-overlap": (
        lambda i: i.edit_header(lambda h: h["model.norm.weight"].update(data_offsets=h[Q_PROJ]["data_offsets"])),
        r"model\.norm\.weight' ?: dtype and shape do not agree",
    ),
    "header-same-place": (
        lambda i: i.edit_header(lambda h: h.update({UNTARGETED: {**h[UNTARGETED.replace("v_", "k_")]}})),
        r"starts at byte",
    ),
    "header-unknown-dtype": (lambda i: i.edit_header(lambda h: h[Q_PROJ].update(dtype="F12")), rf"{Q_PROJ}.*F12"),
    "header-other-shape": (lambda i: i.edit_header(lambda h: h[Q_PROJ].update(shape=[64, 63])), rf"{Q_PROJ}.*agree"),
    "header-negative": (lambda i: i.edit_header(lambda h: h[Q_PROJ].update(shape=[-64, -64])), rf"{Q_PROJ}.*shape"),
    "header-extra-key": (lambda i: i.edit_header(lambda h: h[Q_PROJ].update(extra=1)), rf"{Q_PROJ}.*exactly"),
    "header-twice": (duplicate_key, r"model\.norm\.weight"),
    "header-renamed": (
        lambda i: i.edit_header(lambda h: rename_key(h, Q_PROJ, "model.layers.0.self_attn.q.weight")),
        rf"no tensor '{Q_PROJ}'",
    ),
    "tensor-missing": (lambda i: i.edit_tensors(i.weights, lambda t: t.pop(Q_PROJ)), rf"no tensor '{Q_PROJ}'"),
    "untargeted-missing": (lambda i: i.edit_tensors(i.weights, lambda t: t.pop(UNTARGETED)), rf"'{UNTARGETED}'"),
    "norm-missing": (lambda i: i.edit_tensors(i.weights, lambda t: t.pop("model.norm.weight")), r"model\.norm\.weight"),
    "tensor-narrow": (
        lambda i: i.edit_tensors(i.weights, lambda t: t.update({Q_PROJ: t[Q_PROJ][:32].clone()})),
        rf"{Q_PROJ}' has shape \(32, 64\)",
    ),
    "tensor-int8": (
        lambda i: i.edit_tensors(i.weights, lambda t: t.update({Q_PROJ: t[Q_PROJ].to(torch.int8)})),
        rf"model\.safetensors: tensor '{Q_PROJ}' has dtype I8",
    ),
    "tensor-fp64": (
        lambda i: i.edit_tensors(i.weights, lambda t: t.update({UNTARGETED: t[UNTARGETED].double()})),
        rf"{UNTARGETED}' has dtype F64",
    ),
    "nan-in-target": (lambda i: i.fill(i.weights, Q_PROJ, torch.nan), rf"model\.safetensors: tensor '{Q_PROJ}'.*NaN"),
    "inf-in-target": (lambda i: i.fill(i.weights, Q_PROJ, torch.inf), rf"{Q_PROJ}'.*infinite"),
    "nan-in-quantized": (lambda i: i.fill(i.weights, UNTARGETED, torch.nan), rf"{UNTARGETED}'.*NaN"),
    "nan-in-norm": (lambda i: i.fill(i.weights, "model.norm.weight", torch.nan), r"model\.norm\.weight'.*NaN"),
    "inf-in-embedding": (
        lambda i: i.fill(i.weights, "model.embed_tokens.weight", -torch.inf),
        r"model\.embed_tokens\.weight'.*infinite",
    ),
    "shard-missing": (lambda i: i.shard().unlink(), r"model-00002-of-\d+\.safetensors: there is no such file"),
    "shard-cut": (lambda i: cut(i.shard(), 64), r"model-00002-of-\d+\.safetensors: the tensors end"),
    "shard-empty": (lambda i: i.shard().write_bytes(b""), r"model-00002-of-\d+\.safetensors: 0 bytes"),
    "shard-link-to-nowhere": (lambda i: link_to_nowhere(i.shard()), r"model-00002-of-\d+\.safetensors"),
    "shard-a-folder": (lambda i: folder_instead(i.shard()), r"model-00002-of-\d+\.safetensors"),
    "shards-swapped": (swap_shards, r"is missing from the file"),
    "tensor-in-two-shards": (twice, r"is also in"),
    "index-entry-missing": (lambda i: i.edit_index(lambda m: m.pop(Q_PROJ)), rf"{Q_PROJ}' is missing from {INDEX}"),
    "index-entry-too-many": (
        lambda i: i.edit_index(lambda m: m.update(ghost=m[Q_PROJ])),
        r"'ghost' is missing from the file",
    ),
    "index-up": (lambda i: i.edit_index(lambda m: m.update({Q_PROJ: "../base.safetensors"})), r"'\.\./base"),
    "index-absolute": (lambda i: i.edit_index(lambda m: m.update({Q_PROJ: "/etc/x.safetensors"})), r"'/etc/x"),
    "index-backslash": (lambda i: i.edit_index(lambda m: m.update({Q_PROJ: "..\\x.safetensors"})), rf"{Q_PROJ}"),
    "index-hidden": (lambda i: i.edit_index(lambda m: m.update({Q_PROJ: ".x.safetensors"})), rf"{Q_PROJ}"),
    "index-pickle": (lambda i: i.edit_index(lambda m: m.update({Q_PROJ: "pytorch_model.bin"})), r"pytorch_model"),
    "index-no-json": (lambda i: (i.shard(), (i.base / INDEX).write_text("{")), rf"{INDEX}"),
    "index-a-list": (
        lambda i: (i.shard(), i.edit_json(i.base / INDEX, lambda c: c.update(weight_map=[]))),
        r"no usable weight_map",
    ),
    "only-pickle": (only_pickle, r"no safetensors weights"),
    "no-config": (lambda i: (i.base / "config.json").unlink(), r"config\.json"),
    "config-no-json": (lambda i: (i.base / "config.json").write_text("[]"), r"config\.json"),
    "config-unknown-family": (lambda i: i.edit_config(model_type="nonesuch"), r"config\.json"),
    "config-runs-code": (lambda i: i.edit_config(auto_map={"AutoModel": "x.Y"}), r"auto_map"),
    "config-gptq": (lambda i: i.edit_config(quantization_config={"quant_method": "gptq"}), r"gptq"),
    "config-says-4-bit": (
        lambda i: i.edit_config(quantization_config={"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
        r"not quantized as config\.json says",
    ),
    "no-tokenizer": (lambda i: (i.base / "tokenizer.json").unlink(), r"the tokenizer has no vocabulary"),
    "no-chat-template": (lambda i: (i.base / "chat_template.jinja").unlink(), r"no chat template"),
    "an-adapter-beside": (
        lambda i: shutil.copyfile(i.adapter / "adapter_config.json", i.base / "adapter_config.json"),
        r"holds an adapter beside the model",
    ),
    "a-merge": (a_merge_as_base, r"is a merge itself"),
    "a-trained-base": (a_trained_base_as_base, r"is the trained base of"),
    "nowhere": (lambda i: shutil.rmtree(i.base), r"neither a folder nor a Hub id"),
}
ADAPTER_CASES: dict[str, tuple[Callable[[Inputs], object], str]] = {
    "nan": (lambda i: i.fill(i.adapter / ADAPTER_WEIGHTS, LORA_A, torch.nan), rf"{LORA_A}' holds 1 values"),
    "inf": (lambda i: i.fill(i.adapter / ADAPTER_WEIGHTS, LORA_B, torch.inf), rf"{LORA_B}' holds 1 values"),
    "cut": (lambda i: cut(i.adapter / ADAPTER_WEIGHTS, 40), rf"{ADAPTER_WEIGHTS}: the tensors end"),
    "empty": (lambda i: (i.adapter / ADAPTER_WEIGHTS).write_bytes(b""), rf"{ADAPTER_WEIGHTS}: 0 bytes"),
    "gone": (lambda i: (i.adapter / ADAPTER_WEIGHTS).unlink(), rf"{ADAPTER_WEIGHTS}: there is no such file"),
    "half-a-pair": (
        lambda i: i.edit_tensors(i.adapter / ADAPTER_WEIGHTS, lambda t: t.pop(LORA_B)),
        rf"{LORA_B}' is missing",
    ),
    "base-tensor": (
        lambda i: i.edit_tensors(
            i.adapter / ADAPTER_WEIGHTS, lambda t: t.update({f"base_model.model.{Q_PROJ}": torch.zeros(64, 64)})
        ),
        rf"{Q_PROJ}' is not declared",
    ),
    "integers": (
        lambda i: i.edit_tensors(i.adapter / ADAPTER_WEIGHTS, lambda t: t.update({LORA_A: t[LORA_A].int()})),
        rf"{LORA_A}' has dtype I32",
    ),
    "other-shape": (other_shape, r"adapts 'model\.layers\.0\.self_attn\.q_proj'"),
    "other-rank": (lambda i: i.edit_adapter_config(r=8), r"the rank that adapter_config|has shape"),
    "no-config": (lambda i: (i.adapter / "adapter_config.json").unlink(), r"adapter_config\.json"),
    "config-no-json": (lambda i: (i.adapter / "adapter_config.json").write_text("{"), r"adapter_config\.json"),
    "other-method": (lambda i: i.edit_adapter_config(peft_type="IA3"), r"peft_type"),
    "lora-bias": (lambda i: i.edit_adapter_config(lora_bias=True), r"lora_bias"),
    "pickle-beside": (lambda i: (i.adapter / "adapter_model.bin").write_bytes(b"x"), r"pickle"),
    "linked-weights": (
        lambda i: (
            (i.adapter / ADAPTER_WEIGHTS).rename(i.root / "w"),
            (i.adapter / ADAPTER_WEIGHTS).symlink_to(i.root / "w"),
        ),
        rf"{ADAPTER_WEIGHTS}: is a symbolic link",
    ),
    "on-the-tied-head": (on_the_tied_head, r"'lm_head', which shares its weight"),
    "changes-nothing": (nothing_trained, r"changes nothing"),
    "config-more-layers": (lambda i: i.edit_config(num_hidden_layers=3, layer_types=None), r"model\.layers\.2"),
    "config-wider": (lambda i: i.edit_config(intermediate_size=256), r"shape|has no tensors|adapts"),
    "nowhere": (lambda i: shutil.rmtree(i.adapter), r"there is no such folder"),
    "contract-damaged": (lambda i: (i.adapter / "qlora_kit.json").write_text("{"), r"qlora_kit\.json"),
    "contract-empty": (a_contract, r"qlora_kit\.json: .* is missing"),
    "contract-newer": (lambda i: a_contract(i, format_version=99), r"format_version is 99"),
}
OUTPUT_CASES: dict[str, tuple[Callable[[Inputs], object], str]] = {
    "occupied": (occupied, r"the folder is not empty"),
    "a-file": (lambda i: i.out.write_text("mine"), r"is not a folder"),
    "is-the-base": (lambda i: place(i, i.base), r"of the base"),
    "in-the-base": (lambda i: place(i, i.base / "x"), r"of the base"),
    "is-the-adapter": (lambda i: place(i, i.adapter), r"of the adapter"),
    "in-the-adapter": (lambda i: place(i, i.adapter / "x"), r"of the adapter"),
    "holds-both": (lambda i: place(i, i.root), r"lies in, or holds"),
    "other-merge": (other_merge, r"the folder is not empty"),
    "unverified-merge": (unverified_merge, r"the folder is not empty"),
    "changed-merge": (changed_merge, r"config\.json: was changed since the merge"),
    "changed-weights": (changed_merged_weights, r"the weights were changed since the merge"),
}
CASES = [
    *(pytest.param(BaseModelError, *case, id=f"base-{name}") for name, case in BASE_CASES.items()),
    *(pytest.param(AdapterError, *case, id=f"adapter-{name}") for name, case in ADAPTER_CASES.items()),
    *(pytest.param(OutputError, *case, id=f"output-{name}") for name, case in OUTPUT_CASES.items()),
]


def state(folder: Path) -> dict[str, str]:
    """Every file below ``folder`` with its hash; folders and links by name."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no file"
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize(("error", "spoil", "message"), CASES)
def test_it_is_refused_by_name_and_nothing_is_touched(
    inputs: Inputs, error: type[QloraKitError], spoil: Callable[[Inputs], object], message: str
) -> None:
    spoil(inputs)
    before = state(inputs.root)
    settings: dict[str, Any] = {"onto": "dequantized", **inputs.settings}

    with pytest.raises(error, match=message) as caught:
        merge_adapter(inputs.adapter, inputs.out, base=str(inputs.base), **settings)

    assert caught.value.exit_code == 2
    assert all(fault.what and fault.expected and fault.fix for fault in caught.value.faults)
    assert state(inputs.root) == before


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 40


def test_the_inputs_are_sound_before_they_are_spoilt(inputs: Inputs) -> None:
    """Else every case would be refused for another reason; shards that are links are those of the Hub's cache."""
    before = state(inputs.root / "base")
    merge_adapter(inputs.adapter, inputs.out, base=str(inputs.base), onto="dequantized")
    assert state(inputs.root / "base") == before
    shard = inputs.shard()
    shard.rename(inputs.root / "blob")
    shard.symlink_to(inputs.root / "blob")
    merge_adapter(inputs.adapter, inputs.root / "outputs" / "other", base=str(inputs.base), onto="dequantized")
