"""Pushing: exactly the files of an allow-list and a card, private by default; nothing here reaches for the Hub."""

from __future__ import annotations

import fnmatch
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import httpx

from qlora_kit.adapters import AdapterStore
from qlora_kit.errors import AdapterError, BaseModelError, OutputError, QloraKitError
from qlora_kit.export.push import push_folder

if TYPE_CHECKING:
    from qlora_kit.training import TrainResult

ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors", "qlora_kit.json"}


RUN_FILES = ADAPTER_FILES | {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


class FakeHub:
    """Takes down what would be sent, as ``HfApi`` would pick it."""

    def __init__(self, *existing: str, error: Exception | None = None) -> None:
        self.existing = set(existing)
        self.error = error
        self.made: dict[str, bool | None] = {}
        self.sent: dict[str, bytes] = {}

    def repo_exists(self, repo_id: str) -> bool:
        if self.error is not None:
            raise self.error
        return repo_id in self.existing

    def create_repo(self, repo_id: str, *, private: bool | None = None) -> None:
        self.made[repo_id] = private

    def upload_folder(self, *, repo_id: str, folder_path: str, allow_patterns: list[str], commit_message: str) -> None:
        root = Path(folder_path)
        for path in root.rglob("*"):
            name = path.relative_to(root).as_posix()
            if path.is_file() and any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                self.sent[name] = path.read_bytes()

    def upload_file(self, *, path_or_fileobj: bytes, path_in_repo: str, repo_id: str, commit_message: str) -> None:
        self.sent[path_in_repo] = path_or_fileobj


@pytest.fixture(scope="module")
def run(trained_run: tuple[Path, TrainResult]) -> Path:
    return trained_run[0]


@pytest.fixture(scope="module")
def merged(merged_run: Path) -> Path:
    return merged_run


def front_matter(card: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return content


def test_a_run_folder_sends_the_adapter_alone(run: Path) -> None:
    hub = FakeHub()
    result = push_folder(run, "me/reviews", api=hub)
    assert hub.made == {"me/reviews": True}
    assert hub.sent.keys() == RUN_FILES | {"README.md"}
    assert {file.path for file in result.files} == hub.sent.keys()
    for file in result.files:
        assert len(hub.sent[file.path]) == file.bytes
    left_out = set(result.left_out)
    assert {"metrics.json", "ledger.jsonl", "report.html", "config.yaml"} <= left_out
    assert any(name.startswith("checkpoint-") for name in left_out)
    assert result.sent
    assert result.url is not None
    assert result.url.endswith("/me/reviews")


def test_the_card_of_an_adapter_says_what_was_trained(run: Path) -> None:
    card = push_folder(run, "me/reviews", dry_run=True).card
    assert front_matter(card) == {
        "library_name": "peft", "pipeline_tag": "text-generation", "tags": ["qlora", "lora"],
    }  # fmt: skip
    for part in ("# reviews", "task: sentiment", "train.jsonl, 48 rows", "validation.jsonl, 9 rows", "| eval_loss |",
                 "Is this review positive, negative or neutral?", "qlora-kit generate", "PeftModel"):  # fmt: skip
        assert part in card
    assert "peak_bytes" not in card


def test_a_merged_model_and_its_reports(merged: Path, run: Path, tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "store")
    store.add(run, "reviews")
    hub = FakeHub()
    result = push_folder(merged, "me/merged", public=True, store=store.root, api=hub)
    assert hub.made == {"me/merged": False}
    expected = {path.name for path in merged.iterdir()}
    assert hub.sent.keys() == expected
    assert hub.sent["README.md"] == result.card.encode()
    found = json.loads((merged / "merge_report.json").read_text())["verification"]
    assert f"{found['top1_agreement']:.2%}" in result.card
    assert "validation.jsonl, 9 rows" in result.card  # from the contract in the store
    assert "AutoModelForCausalLM" in result.card
    assert front_matter(result.card)["library_name"] == "transformers"


def test_another_adapter_of_the_same_name_gives_no_data_to_the_card(merged: Path, run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "store" / "reviews"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("checkpoint*"))
    contract = json.loads((copy / "qlora_kit.json").read_text())
    contract["base"]["fingerprint"] = "sampled-1:" + "0" * 64
    (copy / "qlora_kit.json").write_text(json.dumps(contract))
    assert "48 rows" not in push_folder(merged, "me/merged", dry_run=True, store=tmp_path / "store").card


def test_a_dry_run_asks_nothing_of_the_hub(run: Path) -> None:
    hub = FakeHub(error=AssertionError("asked"))
    result = push_folder(run, "me/reviews", dry_run=True, api=hub)
    assert (result.sent, result.url, hub.sent) == (False, None, {})
    assert result.private
    assert any("others cannot load it" in remark for remark in result.remarks)
    assert any("LICENSE" in remark for remark in result.remarks)


def test_only_known_names_are_sent(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("checkpoint*"))
    odd = ("optimizer.pt", "events.out.tfevents.1", ".env", "secrets.json", "train.csv", "adapter_model.bin",
           "model.safetensors.bak", "x.gguf.tmp", "token", "wandb.log")  # fmt: skip
    for name in odd:
        (folder / name).write_text("private")
    (folder / "wandb").mkdir()
    (folder / "wandb" / "config.json").write_text("private")
    (folder / "base" / ".git").mkdir(parents=True)
    (folder / "base" / ".git" / "config.json").write_text("private")
    (folder / "LICENSE").symlink_to("/etc/hostname")
    hub = FakeHub()
    result = push_folder(folder, "me/reviews", api=hub)
    assert hub.sent.keys() == RUN_FILES | {"README.md"}
    assert {*odd, "wandb", "base/.git/config.json", "LICENSE"} <= set(result.left_out)


def test_an_export_keeps_its_folders(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    (folder / "adapters" / "reviews").mkdir(parents=True)
    (folder / "base").mkdir()
    for name in ("serve.sh", "base/model.safetensors", "base/config.json", "adapters/reviews/adapter_config.json",
                 "adapters/../adapters/notes.txt", "adapters/reviews/notes.txt"):  # fmt: skip
        (folder / name).write_text("x")
    report = {"target": "vllm", "sources": ["reviews"], "base": "org/base", "verification": {"reason": "was not run"}}
    (folder / "export_report.json").write_text(json.dumps(report))
    hub = FakeHub()
    result = push_folder(folder, "me/served", api=hub)
    assert hub.sent.keys() == {
        "serve.sh", "base/model.safetensors", "base/config.json", "adapters/reviews/adapter_config.json",
        "export_report.json", "README.md",
    }  # fmt: skip
    assert front_matter(result.card)["base_model"] == "org/base"
    assert "sh serve.sh" in result.card
    assert "was not run" in result.card


def test_the_card_of_a_base_is_not_about_the_adapter_that_named_it(run: Path, tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "store")
    store.add(run, "reviews")
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "model.safetensors").write_text("x")
    found = {"max_abs_logit_diff": 0.25, "top1_agreement": 0.995}
    (folder / "export_report.json").write_text(export("base", base="org/base", verification=found))
    card = push_folder(folder, "me/base", dry_run=True, store=store.root).card
    assert "`org/base` as 4-bit layers compute with it" in card
    assert (
        "against the base in 4 bits: logits differ by 0.25 at most, the likeliest token is the same at 99.50%" in card
    )
    assert "reviews" not in card
    assert "adapter:" not in card


def test_an_adapter_of_the_store_by_name(run: Path, tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "store")
    store.add(run, "mine")
    hub = FakeHub()
    assert push_folder("mine", "me/mine", store=store.root, api=hub).folder == store.root / "mine"
    assert hub.sent.keys() == ADAPTER_FILES | {"README.md"}


def test_a_repository_that_is_there_is_left_alone(run: Path) -> None:
    hub = FakeHub("me/reviews")
    with pytest.raises(OutputError, match="is there already") as caught:
        push_folder(run, "me/reviews", api=hub)
    assert "--update" in caught.value.faults[0].fix
    assert hub.sent == {}
    for public in (False, True):
        assert push_folder(run, "me/reviews", update=True, public=public, api=hub).private is None  # nothing changes it
    assert push_folder(run, "me/new", update=True, api=FakeHub()).private is True
    assert hub.made == {}
    assert hub.sent.keys() >= ADAPTER_FILES


@pytest.mark.parametrize(
    "error",
    [
        LocalTokenNotFoundError("no token"),
        OfflineModeIsEnabled("offline"),
        HFValidationError("bad"),
        OSError("down"),
        httpx.ConnectError("Name or service not known"),
        httpx.ReadTimeout("timed out"),
    ],
)
def test_what_the_hub_says_is_told_in_three_parts(error: Exception, run: Path) -> None:
    with pytest.raises(OutputError) as caught:
        push_folder(run, "me/reviews", api=FakeHub(error=error))
    assert "me/reviews: the Hub refused" in caught.value.faults[0].what
    assert "hf auth login" in caught.value.faults[0].fix


@pytest.mark.parametrize("to", ["reviews", "me/", "/reviews", "me/a/b", "me/a b", "../x", "me/..", "me/a--b", ""])
def test_names_that_are_no_repository(to: str, run: Path) -> None:
    with pytest.raises(OutputError, match="is no repository"):
        push_folder(run, to, dry_run=True)


def write(folder: Path, **files: str) -> Path:
    folder.mkdir()
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def export(target: str = "gguf", **parts: object) -> str:
    return json.dumps({"target": target, "sources": ["reviews"], **parts})


@pytest.mark.parametrize(
    ("files", "error", "match"),
    [
        ({}, AdapterError, "no merged model, no export and no adapter"),
        ({"notes__txt": "x"}, AdapterError, "no merged model"),
        ({"merge_report__json": "{"}, BaseModelError, "merge_report.json"),
        ({"export_report__json": "[]"}, BaseModelError, "export_report.json"),
        ({"export_report__json": "{}", "x__gguf": "x"}, BaseModelError, "is no report of an export"),
        ({"export_report__json": export("gguff"), "x__gguf": "x"}, BaseModelError, "is no report of an export"),
        ({"export_report__json": export(merge=[1]), "x__gguf": "x"}, BaseModelError, "merge is"),
        ({"export_report__json": export(verification={"checked": True}), "x__gguf": "x"}, BaseModelError, "top1"),
        ({"merge_report__json": '{"base": 1}', "config__json": "{}"}, BaseModelError, "base is '1'"),
        ({"merge_report__json": '{"verification": {"a": 1}}', "config__json": "{}"}, BaseModelError, "max_abs_logit"),
        ({"adapter_config__json": '{"peft_type": "IA3"}'}, AdapterError, "IA3"),
    ],
)
def test_folders_that_are_nothing_to_publish(
    files: dict[str, str], error: type[QloraKitError], match: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=match):
        push_folder(write(tmp_path / "folder", **files), "me/x", dry_run=True)


def test_a_name_that_is_nothing(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="is no folder, and no adapter"):
        push_folder("nothing", "me/x", dry_run=True, store=tmp_path)
