"""Adoption measures what plain PEFT and transformers measure, claims no more than that, and publishes whole or not."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

from qlora_kit.adapters import AdapterContract, AdapterStore, base_fingerprint, check_adapter_folder
from qlora_kit.adoption import Adoption, Claims, adopt_adapter
from qlora_kit.adoption.planning import AdoptionPlan, plan_adoption
from qlora_kit.cli import main
from qlora_kit.errors import AdapterError, ConfigError, GuardError, OutputError, QloraKitError
from qlora_kit.likelihood import MIN_ROWS, Loss, loss_difference
from qlora_kit.merging.probes import PROBES

SYSTEM = "Is this review positive, negative or neutral?"
WEIGHTS = "adapter_model.safetensors"
CONTRACT = "qlora_kit.json"
THINGS = ("soup", "room", "film", "walk", "game", "town", "book", "lamp")
WORDS = {"good": "positive", "bad": "negative", "red": "neutral"}
ROWS = [{"text": f"The {thing} is {word}.", "label": label} for thing in THINGS for word, label in WORDS.items()]
STEPS = 40


def plain_base(folder: Path, *, four_bit: bool) -> PreTrainedModel:
    """The base as transformers and bitsandbytes alone load it, NF4 with double quantization or fp32."""
    settings = None
    if four_bit:
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, dtype=torch.float32, device_map={"": "cpu"}
    )
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False  # it rounds the block scales in place
    return model.eval()


def plain_prompt(tokenizer: Any, user: str, system: str | None) -> list[int]:
    """A prompt as transformers' own chat template renders and tokenises it."""
    turns = [{"role": "user", "content": user}]
    opening = [] if system is None else [{"role": "system", "content": system}]
    ids = tokenizer.apply_chat_template([*opening, *turns], add_generation_prompt=True, return_dict=False)
    return [int(token) for token in ids]


def plain_rows(folder: Path, system: str | None) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and labels of ``ROWS``: the answer and its stop token are supervised.  # (1, T) each"""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pairs = []
    for row in ROWS:
        prompt = plain_prompt(tokenizer, row["text"], system)
        answer = tokenizer(f"{row['label']}<|im_end|>", add_special_tokens=False)["input_ids"]
        pairs.append((torch.tensor([prompt + answer]), torch.tensor([[-100] * len(prompt) + answer])))
    return pairs


def plain_loss(model: torch.nn.Module, rows: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """transformers' own loss, in nats a supervised token."""
    total = count = 0.0
    with torch.no_grad():
        for ids, labels in rows:
            tokens = int((labels != -100).sum())
            total += float(model(input_ids=ids, labels=labels).loss) * tokens
            count += tokens
    return total / count


def train_adapter(folder: Path, base: Path, *, four_bit: bool, bias: Literal["none", "all"] = "none") -> Path:
    """A LoRA adapter that plain PEFT and torch train on ``ROWS`` behind ``SYSTEM``."""
    torch.manual_seed(0)
    settings = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", bias=bias)
    adapted = get_peft_model(plain_base(base, four_bit=four_bit), settings)
    rows = plain_rows(base, SYSTEM)
    longest = max(ids.shape[1] for ids, _ in rows)
    ids = torch.cat([torch.nn.functional.pad(ids, (0, longest - ids.shape[1])) for ids, _ in rows])
    labels = torch.cat([torch.nn.functional.pad(row, (0, longest - row.shape[1]), value=-100) for _, row in rows])
    optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=5e-3)
    for _ in range(STEPS):
        optimizer.zero_grad()
        adapted(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder


@dataclass(frozen=True)
class Trained:
    """Two adapters of ``base`` that plain PEFT trained, their data, and a store that nothing was added to."""

    base: Path
    in_4bit: Path
    in_16bit: Path
    rows: Path


@pytest.fixture(scope="module")
def trained(random_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp("elsewhere")
    rows = root / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    in_4bit = train_adapter(root / "four", random_base, four_bit=True)
    in_16bit = train_adapter(root / "sixteen", random_base, four_bit=False)
    return Trained(random_base, in_4bit, in_16bit, rows)


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "adapters")


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may load a model."""

    def loaded(*args: object, **kwargs: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loaded)


def claims(trained: Trained, **changes: Any) -> Claims:
    values = {"base": str(trained.base), "task": "sentiment", "trained_in": "4bit", "max_new_tokens": 4}
    return Claims(**{**values, **changes})


def tree(folder: Path) -> dict[str, str]:
    """Every file of a folder by its hash."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# --- what is measured ---


@pytest.fixture(scope="module")
def measured(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Adoption:
    """The 4-bit adapter, adopted with all that is known of it."""
    said = claims(trained, system_prompt=SYSTEM, validation=(str(trained.rows),))
    return adopt_adapter(str(trained.in_4bit), AdapterStore(tmp_path_factory.mktemp("store")), said)


def test_losses_and_effect_are_those_of_plain_peft(trained: Trained, measured: Adoption) -> None:
    found = measured.contract.metrics
    rows = plain_rows(trained.base, SYSTEM)
    tokenizer = AutoTokenizer.from_pretrained(trained.base)
    prompts = [torch.tensor([plain_prompt(tokenizer, text, SYSTEM)]) for text in PROBES]
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model: Any = plain_base(trained.base, four_bit=True)
    with torch.no_grad():
        before = [model(input_ids=ids).logits for ids in prompts]
    assert found["base_eval_loss"] == pytest.approx(plain_loss(model, rows), rel=1e-4)
    model = PeftModel.from_pretrained(model, trained.in_4bit).eval()
    assert found["eval_loss"] == pytest.approx(plain_loss(model, rows), rel=1e-4)
    bare = plain_loss(model, plain_rows(trained.base, None))
    assert found["eval_loss_without_system_prompt"] == pytest.approx(bare, rel=1e-4)
    with torch.no_grad():
        after = [model(input_ids=ids).logits for ids in prompts]
        answers = [
            model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, eos_token_id=stop) for ids in prompts
        ]
    largest = max(float((b - a).abs().max()) for a, b in zip(before, after, strict=True))
    assert found["max_abs_logit_diff"] == pytest.approx(largest, rel=1e-3)
    assert largest > 0.1
    ended = [stop in answer[0, ids.shape[1] :] for ids, answer in zip(prompts, answers, strict=True)]
    assert found["stop_rate"] == sum(ended) / len(PROBES)
    assert (found["eval_rows"], found["eval_tokens"]) == (len(ROWS), sum(int((r != -100).sum()) for _, r in rows))


def test_trained_biases_count_too(trained: Trained, store: AdapterStore, tmp_path: Path) -> None:
    folder = train_adapter(tmp_path / "biased", trained.base, four_bit=True, bias="all")
    said = claims(trained, system_prompt=SYSTEM, validation=(str(trained.rows),))
    found = adopt_adapter(str(folder), store, said).contract.metrics
    rows = plain_rows(trained.base, SYSTEM)
    model: Any = plain_base(trained.base, four_bit=True)
    own = {name: bias.clone() for name, bias in model.named_parameters() if name.endswith(".bias")}
    model = PeftModel.from_pretrained(model, folder).eval()  # which writes them over the base's
    assert found["eval_loss"] == pytest.approx(plain_loss(model, rows), rel=1e-4)
    for name, bias in own.items():
        module = model.get_base_model().get_submodule(name.removesuffix(".bias"))
        module.bias.data.copy_(bias)
    assert found["eval_loss"] != pytest.approx(plain_loss(model, rows), rel=1e-2)


def test_the_contract_says_what_was_measured_and_what_was_not(trained: Trained, measured: Adoption) -> None:
    contract = AdapterContract.load(measured.card.path)
    assert contract == measured.contract
    assert contract.base.fingerprint == base_fingerprint(trained.base)
    assert (contract.origin, contract.config_sha256, contract.name) == ("adopted", None, "four")
    assert (contract.task, contract.metric_names) == ("sentiment", ("accuracy", "macro_f1"))
    assert contract.generation == {"max_new_tokens": 4, "do_sample": False}
    assert contract.quantization["load_in_4bit"] is True
    assert len(contract.quantization["nf4_codes"]) == 14
    (file,) = contract.data
    assert (file.split, file.name, file.rows) == ("validation", "rows.jsonl", len(ROWS))
    assert file.sha256 == hashlib.sha256(trained.rows.read_bytes()).hexdigest()
    settings = json.loads((trained.in_4bit / "adapter_config.json").read_text())
    assert contract.versions["peft_of_training"] == settings["peft_version"]
    # The loss fell: base, template and stop token are not mere words.
    words = "quantization system_prompt generation task data config_sha256 versions"
    assert contract.not_measured == tuple(words.split())


def test_without_rows_everything_is_the_adopters_word(trained: Trained, store: AdapterStore) -> None:
    adoption = adopt_adapter(str(trained.in_4bit), store, claims(trained, task="sentimant"), name="bare")
    words = {"base", "chat_template_sha256", "stop_token_ids", "quantization", "system_prompt", "task", "data"}
    assert words <= set(adoption.contract.not_measured)
    assert "eval_loss" not in adoption.contract.metrics
    assert adoption.contract.system_prompt is None
    assert adoption.contract.metric_names == ()
    notes = " ".join(adoption.notes)
    assert "no system prompt is assumed" in notes
    assert "did you mean sentiment?" in notes


def test_a_prompt_that_does_nothing_is_told(trained: Trained, measured: Adoption, store: AdapterStore) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained.base)
    rendered = tokenizer.decode(plain_prompt(tokenizer, "Hello", None))
    default = rendered.removeprefix("<|im_start|>system\n").partition("<|im_end|>")[0]  # Qwen's template brings one
    assert plain_prompt(tokenizer, "Hello", default) == plain_prompt(tokenizer, "Hello", None)
    said = claims(trained, system_prompt=default, validation=(str(trained.rows),))
    adoption = adopt_adapter(str(trained.in_4bit), store, said)
    found = adoption.contract.metrics
    assert found["eval_loss"] == found["eval_loss_without_system_prompt"]
    assert "do not show that the system prompt is of any use" in " ".join(adoption.notes)
    assert "system prompt" not in " ".join(measured.notes)


@pytest.mark.parametrize("four_bit", [True, False])
def test_rows_tell_on_which_base_an_adapter_was_trained(trained: Trained, store: AdapterStore, four_bit: bool) -> None:
    folder = trained.in_4bit if four_bit else trained.in_16bit
    losses = {}
    for bits, loads_4bit in (("4bit", True), ("16bit", False)):
        model = PeftModel.from_pretrained(plain_base(trained.base, four_bit=loads_4bit), folder).eval()
        losses[bits] = plain_loss(model, plain_rows(trained.base, SYSTEM))
    said = claims(trained, trained_in=None, system_prompt=SYSTEM, validation=(str(trained.rows),))
    contract = adopt_adapter(str(folder), store, said).contract
    assert contract.quantization["load_in_4bit"] is four_bit
    for bits, loss in losses.items():
        assert contract.metrics[f"eval_loss_{bits}"] == pytest.approx(loss, rel=1e-4)
    assert contract.metrics["eval_loss"] == min(contract.metrics["eval_loss_4bit"], contract.metrics["eval_loss_16bit"])
    assert "quantization" not in contract.not_measured
    assert ("quantization.bnb_4bit_quant_type" in contract.not_measured) is four_bit


def test_too_few_rows_decide_nothing(trained: Trained, store: AdapterStore, tmp_path: Path) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps(row) + "\n" for row in ROWS[: MIN_ROWS - 1]), encoding="utf-8")
    said = claims(trained, trained_in=None, system_prompt=SYSTEM, validation=(str(few),))
    refused(
        AdapterError, r"on the 4-bit base and .* on the 16-bit one(.|\n)*--trained-in", trained.in_4bit, store, said
    )


def test_a_difference_counts_only_beyond_its_noise() -> None:
    tokens = (3,) * 40
    base = Loss(tuple(float(i % 5) for i in range(40)), tokens)
    lower = loss_difference(Loss(tuple(nll - 0.3 for nll in base.nlls), tokens), base)
    assert lower.value == pytest.approx(-0.1)
    assert (lower.is_decided, lower.is_lower) == (True, True)
    noisy = loss_difference(Loss(tuple(nll + (-1) ** i * 3 - 0.01 for i, nll in enumerate(base.nlls)), tokens), base)
    assert noisy.value < 0
    assert (noisy.is_decided, noisy.is_lower) == (False, False)
    assert not loss_difference(base, base).is_decided


# --- what is refused ---


def refused(
    error: type[QloraKitError], pattern: str, folder: Path | str, store: AdapterStore, said: Claims, **options: Any
) -> None:
    """It raises, and neither the source nor the store has changed."""
    before = tree(store.root)
    with pytest.raises(error, match=pattern):
        adopt_adapter(str(folder), store, said, **options)
    after = {name: digest for name, digest in tree(store.root).items() if name != ".lock"}
    assert after == {name: digest for name, digest in before.items() if name != ".lock"}


@pytest.mark.usefixtures("no_model")
def test_what_is_missing_is_asked_for_before_the_base_is_loaded(
    trained: Trained, store: AdapterStore, tmp_path: Path
) -> None:
    folder = trained.in_4bit
    refused(AdapterError, r"no base was given(.|\n)*its configuration names", folder, store, claims(trained, base=None))
    unknown = claims(trained, trained_in=None)
    refused(AdapterError, r"4-bit or 16-bit(.|\n)*--trained-in(.|\n)*--validation", folder, store, unknown)
    refused(ConfigError, "kind of 4-bit", folder, store, claims(trained, trained_in="16bit", quant_type="nf4"))
    refused(ConfigError, "no name of a task", folder, store, claims(trained, task="my task"))
    refused(ConfigError, "max_new_tokens is 0", folder, store, claims(trained, max_new_tokens=0))
    refused(AdapterError, "the base lacks|the base's shape", folder, store, claims(trained, base="tiny"))
    refused(AdapterError, "cannot name an adapter", folder, store, claims(trained), name="a b")
    refused(QloraKitError, "none.jsonl", folder, store, claims(trained, validation=("none.jsonl",)))
    quantized = quantized_base(tmp_path, trained.base)
    on_it = claims(trained, base=str(quantized), trained_in="16bit")
    refused(AdapterError, "own files hold quantized weights", folder, store, on_it)


@pytest.mark.usefixtures("no_model")
def test_a_store_that_cannot_be_written_is_refused_before_the_base_is_loaded(trained: Trained) -> None:
    refused(OutputError, "cannot be written", trained.in_4bit, AdapterStore(Path("/proc/store")), claims(trained))


@pytest.mark.usefixtures("no_model")
def test_a_plan_takes_what_the_files_themselves_say(
    trained: Trained, trained_run: tuple[Path, Any], store: AdapterStore, tmp_path: Path
) -> None:
    lost = tmp_path / "lost"
    shutil.copytree(trained_run[0], lost, ignore=shutil.ignore_patterns(CONTRACT, "checkpoint-*"))
    rows = tmp_path / "doubled.jsonl"
    rows.write_text(trained.rows.read_text() * 2, encoding="utf-8")

    def plan(**changes: Any) -> AdoptionPlan:
        return plan_adoption(str(lost), store, claims(trained, **changes), name=None, replace=False)

    assert plan().omit == ()  # its config.yaml is the kit's own, and of this task
    assert plan(task="other").omit == ("config.yaml",)
    said = plan(trained_in=None, validation=(str(rows),))
    assert [one.load_in_4bit for one in said.candidates] == [True, False]
    assert f"{len(ROWS)} of {2 * len(ROWS)} validation rows" in " ".join(said.notes)
    (one,) = plan(quant_type="fp4", double_quant=False).candidates
    assert (one.bnb_4bit_quant_type, one.bnb_4bit_use_double_quant) == ("fp4", False)
    quantized = quantized_base(tmp_path, trained.base, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=False)
    (one,) = plan(base=str(quantized), trained_in=None).candidates
    assert (one.load_in_4bit, one.bnb_4bit_quant_type, one.bnb_4bit_use_double_quant) == (True, "fp4", False)


def quantized_base(folder: Path, base: Path, **settings: object) -> Path:
    """A base whose config.json says that its files are quantized already."""
    quantized = folder / "quantized"
    shutil.copytree(base, quantized)
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True, **settings}
    rewrite(quantized / "config.json", quantization_config=stored)
    return quantized


@pytest.mark.usefixtures("no_model")
def test_the_name_of_an_unsloth_base_is_a_hint(trained: Trained, store: AdapterStore, tmp_path: Path) -> None:
    folder = tmp_path / "unsloth"
    shutil.copytree(trained.in_4bit, folder)
    rewrite(folder / "adapter_config.json", base_model_name_or_path="unsloth/qwen2.5-7b-bnb-4bit")
    refused(AdapterError, r"bnb-4bit'?: 4bit", folder, store, claims(trained, trained_in=None))


def rewrite(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def with_factor(folder: Path, source: Path, factor: float) -> Path:
    """A copy whose lora_B are multiplied."""
    shutil.copytree(source, folder)
    tensors = load_file(source / WEIGHTS)
    save_file({name: t * factor if "lora_B" in name else t for name, t in tensors.items()}, folder / WEIGHTS)
    return folder


def test_an_adapter_without_effect_or_with_too_much_is_refused(
    trained: Trained, store: AdapterStore, tmp_path: Path
) -> None:
    nothing = with_factor(tmp_path / "nothing", trained.in_4bit, 0.0)
    refused(AdapterError, "changes nothing", nothing, store, claims(trained))
    overflow = with_factor(tmp_path / "overflow", trained.in_4bit, 1e38)
    check_adapter_folder(overflow)
    refused(GuardError, "not finite", overflow, store, claims(trained))


@pytest.mark.usefixtures("no_model")
def test_a_contract_is_not_replaced_unasked(
    trained: Trained, measured: Adoption, trained_run: tuple[Path, Any], store: AdapterStore
) -> None:
    for options in ({}, {"replace": True}):
        refused(AdapterError, "its training wrote", trained_run[0], store, claims(trained), **options)
    refused(AdapterError, r"adopted already(.|\n)*--replace", measured.card.path, store, claims(trained))
    store.add(trained.in_16bit, "four")
    refused(AdapterError, r"name is taken(.|\n)*--replace", trained.in_4bit, store, claims(trained))


# --- publishing ---


def test_a_folder_outside_stays_as_it_is(trained: Trained, store: AdapterStore, tmp_path: Path) -> None:
    source = tmp_path / "mine"
    shutil.copytree(trained.in_4bit, source)
    (source / "config.yaml").write_text("base_model: of another program\n")
    before = tree(source)
    adoption = adopt_adapter(str(source), store, claims(trained, task=None))
    assert tree(source) == before
    assert adoption.card.name == adoption.contract.task == "mine"
    published = tree(store.root / "mine")
    assert published.keys() == {"README.md", "adapter_config.json", WEIGHTS, CONTRACT}
    assert all(published[name] == before[name] for name in published.keys() - {CONTRACT})
    assert "config.yaml is no config of the task mine" in " ".join(adoption.notes)


def test_an_adapter_of_the_store_replaces_itself_in_one_step(
    trained: Trained, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.add(trained.in_4bit, "a")
    before = tree(store.root / "a")
    monkeypatch.setattr(AdapterContract, "save", _failing_save)
    with pytest.raises(ZeroDivisionError):
        adopt_adapter("a", store, claims(trained))
    assert tree(store.root / "a") == before
    assert {path.name for path in store.root.iterdir()} == {".lock", "a"}
    monkeypatch.undo()
    adopt_adapter("a", store, claims(trained))
    after = tree(store.root / "a")
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {CONTRACT}
    adopt_adapter("a", store, claims(trained, system_prompt=SYSTEM), replace=True)
    contract = store.show("a").contract
    assert contract is not None
    assert contract.system_prompt == SYSTEM


def _failing_save(self: AdapterContract, path: Path) -> Path:
    raise ZeroDivisionError


def test_an_adapter_that_changes_meanwhile_is_refused(trained: Trained, store: AdapterStore, tmp_path: Path) -> None:
    source = tmp_path / "moving"
    shutil.copytree(trained.in_4bit, source)

    def change(text: str) -> None:
        if text.startswith("measuring"):
            shutil.copy(trained.in_16bit / WEIGHTS, source / WEIGHTS)

    with pytest.raises(AdapterError, match="changed while it was measured"):
        adopt_adapter(str(source), store, claims(trained), progress=change)
    assert store.list() == []


# --- the command line ---


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[str, str]]:
    """Runs `qlora-kit ARGUMENTS` in an empty folder, 80 columns wide; it must end well."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def call(*arguments: object) -> tuple[str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert not end.value.code, err
        return out, err

    return call


def test_an_adopted_adapter_needs_no_base_any_more(
    command: Callable[..., tuple[str, str]], trained: Trained, tmp_path: Path
) -> None:
    known = ("--base", trained.base, "--trained-in", "4bit", "--task", "sentiment", "--max-new-tokens", 12)
    out, _ = command(
        "adapters", "adopt", trained.in_4bit, *known, "--system-prompt", SYSTEM, "--validation", trained.rows, "--json"
    )
    content = json.loads(out)
    assert content.keys() >= {"name", "task", "base_model", "r", "bytes", "created", "measured", "not_measured"}
    assert content["measured"]["eval_loss"] < content["measured"]["base_eval_loss"]
    assert "quantization" in content["not_measured"]
    listed = json.loads(command("adapters", "list", "--json")[0])["adapters"]
    assert [(card["name"], card["origin"]) for card in listed] == [("four", "adopted")]
    assert "adopted, trained elsewhere: four" in command("adapters", "list")[0]
    shown = command("adapters", "show", "four")[0]
    assert max(map(len, shown.splitlines())) <= 80
    for text in (
        "adopted, contract of",
        SYSTEM,
        "<|im_end|>",
        "nf4, double quantization",
        "rows.jsonl",
        "config_sha256",
    ):
        assert text in shown
    assert json.loads(command("adapters", "show", "four", "--json")[0])["contract"]["origin"] == "adopted"
    answer = json.loads(command("generate", "The soup is good.", "--adapter", "four", "--json")[0])
    assert (answer["text"], answer["finish_reason"]) == ("positive", "stop")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "sentiment.yaml").write_text(
        f"name: x\ntask: sentiment\ndata: {{train: {trained.rows}, test: {trained.rows}}}\n"
    )
    results = json.loads(command("eval", "--adapter", "four", "--json")[0])["results"]
    values = {row["metric"]: row["value"] for row in results if row["adapter"] == "four"}
    assert values["accuracy"] == 1.0
    merged = json.loads(command("merge", "four", "--out", "merged", "--json")[0])
    assert (merged["onto"], merged["verification"]["passed"]) == ("dequantized", True)


def test_people_see_a_table_and_what_to_do_about_a_missing_contract(
    command: Callable[..., tuple[str, str]], trained: Trained
) -> None:
    assert "`qlora-kit adapters adopt`" in command("adapters", "add", trained.in_16bit, "--name", "plain")[1]
    for verb in (("list",), ("show", "plain")):
        assert "`qlora-kit adapters adopt` writes one" in " ".join(command("adapters", *verb)[0].split())
    _, err = command("generate", "Hello", "--adapter", "plain", "--base", trained.base, "--max-new-tokens", 1)
    assert "`qlora-kit adapters adopt`" in err
    known = ("--base", trained.base, "--trained-in", "16bit", "--max-new-tokens", 4)
    out, err = command("adapters", "adopt", "plain", *known)
    assert max(map(len, out.splitlines())) <= 80
    assert out.index("measured") < out.index("all 14 pairs fit") < out.index("your word") < out.index("16 bits")
    assert "plain: adopted into adapters" in out
    assert "note: no system prompt is assumed" in err
