"""The scorecard of a real engine with real adapters, and everything that is refused before a base is loaded."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from qlora_kit.adapters import AdapterContract, AdapterStore, BaseIdentity
from qlora_kit.config import RunConfig, load_config
from qlora_kit.errors import AdapterError, ConfigError, DataError
from qlora_kit.evaluation import Scorecard, ScoredPair, evaluate, plan_evaluation, run_evaluation
from qlora_kit.evaluation_plan import EvaluationPlan, task_config
from qlora_kit.metrics import Score
from qlora_kit.scoring import TaskScores

if TYPE_CHECKING:
    from qlora_kit.engine import Engine

REVIEWS = [("The soup was good.", "positive"), ("Cold and slow.", "negative"), ("It is a soup.", "neutral")]
STORIES = [("Hello world", "this is the answer"), ("The weather", "is nice today, is it not")]
TINY_LIMITS = "eval: {batch_size: 2, max_new_tokens: 3}\n"


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_config(path: Path, task: str, *, extra: str = TINY_LIMITS, test: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    test = f"datasets/{task}/test.jsonl" if test is None else test
    data = f"data: {{train: missing.jsonl, test: {test}}}\n"
    path.write_text(f"name: {task.replace('_', '-')}\ntask: {task}\n{data}{extra}", encoding="utf-8")
    return path


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with configs and test data of two tasks; there is no training data."""
    monkeypatch.chdir(tmp_path)
    for task, columns, rows in (
        ("sentiment", ("text", "label"), REVIEWS),
        ("text_generation", ("opening", "story"), STORIES),
    ):
        write_config(tmp_path / "configs" / f"{task}.yaml", task)
        write_rows(tmp_path / "datasets" / task / "test.jsonl", [dict(zip(columns, row, strict=True)) for row in rows])
    return tmp_path


def contract(task: str, **changes: Any) -> AdapterContract:
    values: dict[str, Any] = {
        "base": BaseIdentity("elsewhere", None, "sampled-1:11"),
        "quantization": {"load_in_4bit": True},
        "chat_template_sha256": None,
        "system_prompt": None,
        "stop_token_ids": (2,),
        "generation": {},
        "task": task,
        "metric_names": (),
        "data": (),
        "config_sha256": "0",
        "versions": {},
        "created": "2026-01-02T03:04:05+00:00",
        "kit_version": "0.1.0",
    }
    return AdapterContract(**{**values, **changes})


def make_adapter(folder: Path, *, terms: AdapterContract | None, seed: int = 0) -> Path:
    """An adapter of ``random_base`` in PEFT's format, with random weights that change every output."""
    import numpy as np
    from safetensors.numpy import save_file

    generator = np.random.default_rng(seed)
    tensors = {}
    for layer in (0, 1):
        prefix = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{prefix}.lora_A.weight"] = generator.normal(size=(2, 64)).astype(np.float32)
        tensors[f"{prefix}.lora_B.weight"] = generator.normal(size=(64, 2)).astype(np.float32)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    if terms is not None:
        terms.save(folder)
    return folder


def plan(store: Path, **options: Any) -> EvaluationPlan:
    asked: dict[str, Any] = {
        "adapters": (),
        "tasks": None,
        "split": "test",
        "matrix": False,
        "limit": None,
        "allow_code_execution": False,
        "configs": {},
        "include_base": True,
    }
    return plan_evaluation(AdapterStore(store), **{**asked, **options})


def asked_pairs(made: EvaluationPlan) -> list[tuple[str, str | None]]:
    return [(task.task.name, None if adapter is None else adapter.name) for task, adapter in made.pairs]


# --- what is scored ---


def test_each_adapter_is_scored_on_its_own_task_and_the_base_on_the_same(workplace: Path) -> None:
    make_adapter(workplace / "store" / "reviews", terms=contract("sentiment"))
    make_adapter(workplace / "store" / "stories", terms=contract("text_generation"))
    make_adapter(workplace / "store" / "reviews2", terms=contract("sentiment"))
    names = ["reviews", "stories", "reviews2"]

    assert asked_pairs(plan(workplace / "store", adapters=names)) == [
        ("sentiment", None),
        ("sentiment", "reviews"),
        ("sentiment", "reviews2"),
        ("text_generation", None),
        ("text_generation", "stories"),
    ]
    assert asked_pairs(plan(workplace / "store", adapters=["stories"], matrix=True, tasks=["sentiment"])) == [
        ("sentiment", None),
        ("sentiment", "stories"),
    ]
    assert len(plan(workplace / "store", adapters=names, matrix=True).pairs) == 2 * (1 + 3)
    assert asked_pairs(plan(workplace / "store", adapters=["stories", "stories"], include_base=False)) == [
        ("text_generation", "stories")
    ]
    assert asked_pairs(plan(workplace / "store", tasks=["sentiment"])) == [("sentiment", None)]


def test_rows_come_from_the_asked_split_and_limit(workplace: Path) -> None:
    made = plan(workplace / "store", tasks=["sentiment"])
    assert [example.messages[-1].content for example in made.tasks[0].examples] == [label for _, label in REVIEWS]
    assert made.tasks[0].batch_size == 2
    assert made.tasks[0].task.max_new_tokens == 3
    assert len(plan(workplace / "store", tasks=["sentiment"], limit=2).tasks[0].examples) == 2
    write_config(workplace / "configs" / "sentiment.yaml", "sentiment", extra="eval: {limit: 1}\n")
    assert len(plan(workplace / "store", tasks=["sentiment"]).tasks[0].examples) == 1
    assert len(plan(workplace / "store", tasks=["sentiment"], limit=2).tasks[0].examples) == 2
    with pytest.raises(ConfigError, match=r"no validation data(.|\n)*data\.validation(.|\n)*--split test"):
        plan(workplace / "store", tasks=["sentiment"], split="validation")


def test_rows_left_out_are_told(workplace: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"text": "Good.", "label": "positive"}] * 2 + [{"text": "Bad.", "label": "negative"}]
    write_rows(workplace / "datasets" / "sentiment" / "test.jsonl", rows)
    assert len(plan(workplace / "store", tasks=["sentiment"]).tasks[0].examples) == 2
    assert "2 of 3 test rows are scored" in caplog.text


def test_the_config_beside_the_adapter_comes_first(workplace: Path) -> None:
    folder = make_adapter(workplace / "store" / "reviews", terms=contract("sentiment"))
    assert task_config("sentiment", folder).eval.max_new_tokens == 3
    write_config(folder / "config.yaml", "sentiment", extra="eval: {max_new_tokens: 5}\n")
    assert task_config("sentiment", folder).eval.max_new_tokens == 5
    assert task_config("sentiment").eval.max_new_tokens == 3
    assert plan(workplace / "store", adapters=["reviews"]).tasks[0].task.max_new_tokens == 5
    given = load_config(workplace / "configs" / "sentiment.yaml", ["eval.max_new_tokens=7"])
    made = plan(workplace / "store", adapters=["reviews"], configs={"sentiment": given})
    assert made.tasks[0].task.max_new_tokens == 7


def test_adapters_of_one_task_are_scored_alike_or_not_at_all(workplace: Path) -> None:
    for name in ("one", "two"):
        folder = make_adapter(workplace / "store" / name, terms=contract("sentiment"))
        write_config(folder / "config.yaml", "sentiment")
    plan(workplace / "store", adapters=["one", "two"])
    write_config(workplace / "store" / "two" / "config.yaml", "sentiment", extra="")
    with pytest.raises(ConfigError, match=r"one and two(.|\n)*eval\.max_new_tokens"):
        plan(workplace / "store", adapters=["one", "two"])
    own: RunConfig = task_config("sentiment")
    plan(workplace / "store", adapters=["one", "two"], configs={"sentiment": own})


# --- what is refused, without torch ---


def test_an_adapter_off_its_task_needs_the_matrix(workplace: Path) -> None:
    make_adapter(workplace / "store" / "stories", terms=contract("text_generation"))
    with pytest.raises(ConfigError, match=r"stories was trained for text_generation(.|\n)*--matrix"):
        plan(workplace / "store", adapters=["stories"], tasks=["sentiment"])


def test_an_adapter_without_contract_needs_a_task(workplace: Path) -> None:
    make_adapter(workplace / "store" / "plain", terms=None)
    with pytest.raises(ConfigError, match=r"plain(.|\n)*--task"):
        plan(workplace / "store", adapters=["plain"])
    made = plan(workplace / "store", adapters=["plain"], tasks=["sentiment"])
    assert asked_pairs(made) == [("sentiment", None), ("sentiment", "plain")]


def test_what_cannot_be_found_is_refused_in_three_parts(workplace: Path) -> None:
    make_adapter(workplace / "store" / "reviews", terms=contract("sentiment"))
    with pytest.raises(ConfigError, match=r"nothing to score(.|\n)*--adapter"):
        plan(workplace / "store")
    with pytest.raises(ConfigError, match="nothing to score"):
        plan(workplace / "store", tasks=["sentiment"], include_base=False)
    with pytest.raises(ConfigError, match=r"limit is 0"):
        plan(workplace / "store", tasks=["sentiment"], limit=0)
    with pytest.raises(ConfigError, match=r"'sentimant'(.|\n)*configs/sentimant\.yaml(.|\n)*'sentiment'"):
        plan(workplace / "store", tasks=["sentimant"])
    with pytest.raises(AdapterError, match=r"reviewz(.|\n)*reviews"):
        plan(workplace / "store", adapters=["reviewz"])
    write_config(workplace / "configs" / "translation.yaml", "sentiment")
    with pytest.raises(ConfigError, match=r"translation\.yaml: is a config of the task 'sentiment'"):
        task_config("translation")


def test_the_faults_of_all_tasks_are_told_at_once(workplace: Path) -> None:
    write_rows(workplace / "datasets" / "sentiment" / "test.jsonl", [{"text": "Good.", "label": "fine"}])
    (workplace / "datasets" / "text_generation" / "test.jsonl").unlink()
    with pytest.raises(DataError) as refusal:
        plan(workplace / "store", tasks=["sentiment", "text_generation"])
    assert "datasets/sentiment/test.jsonl:1" in str(refusal.value)
    assert "datasets/text_generation/test.jsonl: the file does not exist" in str(refusal.value)


def test_code_needs_permission_before_its_data_are_read(workplace: Path) -> None:
    write_config(workplace / "configs" / "code_generation.yaml", "code_generation")
    with pytest.raises(ConfigError, match="--allow-code-execution"):
        plan(workplace / "store", tasks=["code_generation"])
    row = {"instruction": "add", "code": "def add(a, b): return a + b"}
    write_rows(workplace / "datasets" / "code_generation" / "test.jsonl", [{**row, "tests": ["assert add(1, 2) == 3"]}])
    assert plan(workplace / "store", tasks=["code_generation"], allow_code_execution=True).allow_code_execution
    write_rows(workplace / "datasets" / "code_generation" / "test.jsonl", [row])
    with pytest.raises(DataError, match=r"test\.jsonl:1: no assertions"):
        plan(workplace / "store", tasks=["code_generation"], allow_code_execution=True)


def test_an_unsound_adapter_and_two_of_one_name_are_refused(workplace: Path) -> None:
    make_adapter(workplace / "store" / "reviews", terms=contract("sentiment"))
    twin = make_adapter(workplace / "elsewhere" / "reviews", terms=contract("sentiment"))
    with pytest.raises(AdapterError, match=r"two adapters are named 'reviews'"):
        plan(workplace / "store", adapters=["reviews", str(twin)])
    weights = workplace / "store" / "reviews" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(AdapterError):
        plan(workplace / "store", adapters=["reviews"])


def test_planning_never_imports_torch(workplace: Path) -> None:
    make_adapter(workplace / "store" / "reviews", terms=contract("sentiment"))
    code = (
        "import sys; from pathlib import Path; from qlora_kit.adapters import AdapterStore\n"
        "from qlora_kit.evaluation import plan_evaluation\n"
        "plan_evaluation(AdapterStore(Path('store')), adapters=['reviews'], tasks=None, split='test', matrix=False,\n"
        "                limit=None, allow_code_execution=False, configs={}, include_base=True)\n"
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    )
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(root)})


# --- the scorecard of a real engine ---


@pytest.fixture
def engine(workplace: Path, random_base: Path) -> Engine:
    """The random base in 4 bits, and a store with an adapter of each task."""
    from qlora_kit.adapters import base_fingerprint
    from qlora_kit.data.chat import chat_template_sha256
    from qlora_kit.engine import Engine

    engine = Engine(str(random_base), store=workplace / "store")
    identity = BaseIdentity(str(random_base), None, base_fingerprint(random_base))
    template = chat_template_sha256(engine.tokenizer)
    for seed, (name, task) in enumerate((("reviews", "sentiment"), ("stories", "text_generation"))):
        terms = contract(task, base=identity, chat_template_sha256=template)
        make_adapter(workplace / "store" / name, terms=terms, seed=seed)
    return engine


def plain_perplexity(model: Any, tokenizer: Any) -> float:
    """Of the stories' answers and stop tokens by transformers' own loss, a row at a time."""
    import torch

    total, tokens = 0.0, 0
    for opening, story in STORIES:
        turns = [{"role": "system", "content": "Continue the story."}, {"role": "user", "content": opening}]
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        answer_ids = tokenizer(f"{story}<|im_end|>", add_special_tokens=False)["input_ids"]
        labels = torch.tensor([[-100] * len(prompt_ids) + answer_ids])
        with torch.no_grad():
            total += float(model(input_ids=torch.tensor([prompt_ids + answer_ids]), labels=labels).loss) * len(
                answer_ids
            )
        tokens += len(answer_ids)
    return math.exp(total / tokens)


def value(card: Scorecard, task: str, adapter: str | None, metric: str) -> float:
    (found,) = [r.value for r in card.results if (r.task, r.adapter, r.metric) == (task, adapter, metric)]
    return found


def test_base_and_adapters_get_their_own_scores(engine: Engine, workplace: Path, random_base: Path) -> None:
    from peft import PeftModel

    from qlora_kit.models import load_base_model

    base = plain_perplexity(engine.model, engine.tokenizer)
    seen: list[tuple[str, int, int]] = []

    card = evaluate(engine, adapters=["reviews", "stories"], matrix=True, progress=lambda *step: seen.append(step))

    assert value(card, "text_generation", None, "perplexity") == pytest.approx(base, rel=1e-4)
    with engine.using(None) as model:
        assert plain_perplexity(model, engine.tokenizer) == base
    for name in ("reviews", "stories"):
        fresh = load_base_model(engine.ref, engine.quantization)
        alone = PeftModel.from_pretrained(fresh, workplace / "store" / name).eval()
        expected = plain_perplexity(alone, engine.tokenizer)
        assert abs(math.log(expected / base)) > 0.01  # else the adapter would be invisible to this test
        assert value(card, "text_generation", name, "perplexity") == pytest.approx(expected, rel=1e-4)
    marked = {(pair.task, pair.adapter) for pair in card.pairs if pair.off_task}
    assert marked == {("sentiment", "stories"), ("text_generation", "reviews")}
    assert [(gain.task, gain.adapter) for gain in card.headline()] == [
        ("sentiment", "reviews"),
        ("text_generation", "stories"),
    ]
    assert {label for label, _, _ in seen} >= {"sentiment: the base", "text_generation: stories"}
    assert all(0 < done <= total for _, done, total in seen)


def test_the_json_has_a_line_for_every_metric(engine: Engine) -> None:
    made = plan(engine.store.root, adapters=["reviews"])
    report = json.loads(json.dumps(run_evaluation(engine, made).to_json(), allow_nan=False))
    rows = [(row["task"], row["adapter"], row["metric"]) for row in report["results"]]
    metrics = ("accuracy", "macro_f1", "stop_rate")
    assert rows == [("sentiment", adapter, metric) for adapter in (None, "reviews") for metric in metrics]
    for row in report["results"]:
        assert set(row) == {"task", "adapter", "metric", "value", "ci95", "n", "off_task"}
        assert row["n"] == len(REVIEWS)
        assert row["ci95"][0] <= row["value"] <= row["ci95"][1]
    assert report["split"] == "test"
    assert report["base"] == engine.ref.id
    assert set(report["headline"][0]) == {"task", "metric", "adapter", "base_value", "adapter_value", "gain"}


def test_another_system_prompt_than_the_trained_one_is_told(
    engine: Engine, workplace: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained = AdapterContract.load(workplace / "store" / "reviews")
    own = plan(engine.store.root, adapters=["reviews"]).tasks[0].task.system_prompt
    replace(trained, system_prompt=own).save(workplace / "store" / "reviews")
    evaluate(engine, adapters=["reviews", "stories"], matrix=True)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1  # stories was trained with none; off its task it is not compared
    assert told[0].startswith("stories: system prompt: 'Continue the story.'")


def test_every_adapter_is_loaded_before_anything_is_scored(engine: Engine, workplace: Path) -> None:
    make_adapter(workplace / "store" / "foreign", terms=contract("sentiment"))  # of another base
    seen: list[tuple[str, int, int]] = []
    with pytest.raises(AdapterError, match="elsewhere"):
        evaluate(engine, adapters=["reviews", "foreign"], progress=lambda *step: seen.append(step))
    assert seen == []


# --- the headline's arithmetic ---


def pair(task: str, adapter: str | None, metric: str, number: float, *, off_task: bool = False) -> ScoredPair:
    score = Score(metric, number, (number, number), 10)
    return ScoredPair(task, adapter, off_task, TaskScores((score, replace(score, metric="stop_rate")), ()))


def test_a_gain_is_positive_where_the_adapter_is_better() -> None:
    card = Scorecard(
        "tiny",
        "test",
        (
            pair("sentiment", None, "accuracy", 0.25),
            pair("sentiment", "good", "accuracy", 0.75),
            pair("sentiment", "other", "accuracy", 1.0, off_task=True),
            pair("text_generation", None, "perplexity", 50.0),
            pair("text_generation", "better", "perplexity", 20.0),
            pair("translation", "alone", "chrf", 60.0),
        ),
    )
    assert [(gain.adapter, gain.base_value, gain.adapter_value, gain.gain) for gain in card.headline()] == [
        ("good", 0.25, 0.75, 0.5),
        ("better", 50.0, 20.0, 30.0),
        ("alone", None, 60.0, None),
    ]


def test_a_number_that_is_not_finite_is_null_in_json() -> None:
    card = Scorecard("tiny", "test", (pair("text_generation", "broken", "perplexity", math.inf),))
    report = json.loads(json.dumps(card.to_json(), allow_nan=False))
    assert report["results"][0]["value"] is None
    assert report["results"][0]["ci95"] == [None, None]
