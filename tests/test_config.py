"""Configs: what loads, and every fault with its file, line and fix."""

from __future__ import annotations

import ast
import inspect
import itertools
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from pydantic import BaseModel

from qlora_kit.config import RunConfig, load_config, synonyms
from qlora_kit.config.sections import DataSection, LoraSection, ModelSection, QuantizationSection
from qlora_kit.config.train_section import _BOUNDS, CONTROLLED, TrainSection, kit_fields, settable_fields
from qlora_kit.errors import ConfigError

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
SMALL = "name: run\ntask: sentiment\ndata:\n  train: rows.csv\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def faults_of(folder: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(write(folder, text), overrides)
    assert all(fault.expected and fault.fix for fault in caught.value.faults)
    return [str(fault).replace(str(folder) + "/", "") for fault in caught.value.faults]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_load_and_round_trip(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    again = load_config(write(tmp_path, config.to_yaml()))
    assert again.model_dump() == config.model_dump()
    assert again.sha256() == config.sha256()


def test_there_is_a_config_for_each_task_and_card() -> None:
    names = {path.stem for path in CONFIGS}
    tasks = {"sentiment", "translation", "question_answering", "text_generation", "code_generation"}
    assert names >= tasks | {"qwen2.5-7b-24gb", "qwen2.5-7b-12gb"}


def test_defaults(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, SMALL + "lora:\n"))  # an empty section is all defaults
    assert config.output_dir == "runs/run"
    assert config.model.base == "tiny"
    assert config.data.train == ("rows.csv",)
    assert config.data.test == ()
    assert config.lora.r == 16
    assert config.train.learning_rate == 2e-4
    assert config.train.max_length == 1024


def test_numbers_written_with_an_exponent(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL + "train:\n  learning_rate: 1e-4\n  weight_decay: 1e-2\n")
    arguments = load_config(path).sft_arguments()
    assert arguments["learning_rate"] == 0.0001
    assert arguments["weight_decay"] == 0.01
    assert load_config(path, ["train.learning_rate=5e-5"]).train.learning_rate == 0.00005


def test_patterns_and_the_largest_rank_are_taken(tmp_path: Path) -> None:
    text = (
        "lora:\n  target_modules: '.*\\.(q|v)_proj'\n  exclude_modules: '.*\\.1\\..*'\n  rank_pattern: {q_proj: 1024}\n"
    )
    lora = load_config(write(tmp_path, SMALL + text + "train: {packing_strategy: bfd_split}\n")).lora
    assert lora.target_modules == r".*\.(q|v)_proj"
    assert lora.exclude_modules == r".*\.1\..*"
    assert lora.rank_pattern == {"q_proj": 1024}


def test_no_stays_a_word(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, SMALL + "train:\n  save_strategy: no\n")).train.save_strategy == "no"


def test_overrides(tmp_path: Path) -> None:
    overrides = [
        "data.train=[a.csv, b.csv]",
        "lora.rank_pattern.q_proj=4",
        "name=other",
        "train.packing=true",
        "lora.r=8",
    ]
    config = load_config(write(tmp_path, SMALL), [*overrides, "lora.r=32"])
    assert config.data.train == ("a.csv", "b.csv")
    assert config.lora.rank_pattern == {"q_proj": 4}
    assert config.name == "other"
    assert config.output_dir == "runs/other"
    assert config.train.packing
    assert config.lora.r == 32


def test_all_faults_at_once_with_their_lines(tmp_path: Path) -> None:
    text = (
        SMALL
        + "lora:\n  r: 0\n  lora_alfa: 3\n"
        + "train:\n  learning_rate: -1e-4\n  wieght_decay: 0\n  bf16: true\nlernrate: 1\n"
    )
    faults = faults_of(tmp_path, text, "train.max_length=long")
    expected = [
        ("run.yaml:6: lora.r is 0", "greater than or equal to 1"),
        ("run.yaml:7: lora.lora_alfa is an unknown key", "did you mean 'lora_alpha'?"),
        ("run.yaml:9: train.learning_rate is -0.0001", "greater than 0"),
        ("run.yaml:10: train.wieght_decay is an unknown key", "did you mean 'weight_decay'?"),
        ("run.yaml:11: train.bf16 cannot be set", "set quantization.bnb_4bit_compute_dtype"),
        ("run.yaml:12: lernrate is an unknown key", "one of name, task"),
        ("override 'train.max_length=long': train.max_length is 'long'", "a whole number"),
    ]
    for what, detail in expected:
        assert any(what in fault and detail in fault for fault in faults), (what, faults)
    assert len(faults) == len(expected)


@pytest.mark.parametrize(
    ("lines", "what", "detail"),
    [
        ("learning_rate: 1", "learning_rate is an unknown key", "write train.learning_rate"),
        ("train: {batch_size: 4}", "train.batch_size is an unknown key", "mean 'per_device_train_batch_size'?"),
        ("train: {epochs: 4}", "train.epochs is an unknown key", "mean 'num_train_epochs'?"),
        ("train: {num_epochs: 4}", "train.num_epochs is an unknown key", "mean 'num_train_epochs'?"),
        ("train: {lr: 1e-4}", "train.lr is an unknown key", "mean 'learning_rate'?"),
        ("train: {max_seq_length: 512}", "train.max_seq_length is an unknown key", "mean 'max_length'?"),
        ("train: {max_seq_len: 512}", "train.max_seq_len is an unknown key", "mean 'max_length'?"),
        ("train: {grad_accum: 2}", "train.grad_accum is an unknown key", "mean 'gradient_accumulation_steps'?"),
        ("train: {rank: 8}", "train.rank is an unknown key", "mean 'lora.r'? Write it there"),
        ("lora: {rank: 8}", "lora.rank is an unknown key", "did you mean 'r'?"),
        ("lora: {alpha: 8}", "lora.alpha is an unknown key", "did you mean 'lora_alpha'?"),
        ("lora: {dropout: 0.1}", "lora.dropout is an unknown key", "did you mean 'lora_dropout'?"),
        ("lora: {learning_rate: 1e-4}", "lora.learning_rate is an unknown key", "write train.learning_rate"),
        ("epochs: 3", "epochs is an unknown key", "did you mean 'train.num_train_epochs'? Write it there"),
        ("base_model: tiny", "base_model is an unknown key", "did you mean 'model.base'? Write it there"),
        ("train:\n  optim: adamw_toch", "train.optim is 'adamw_toch'", "did you mean 'adamw_torch'?"),
        ("train:\n  lr_scheduler_type: cosin", "train.lr_scheduler_type is 'cosin'", "did you mean 'cosine'?"),
        ("train:\n  loss_type: ntl", "train.loss_type is 'ntl'", "did you mean 'nll'?"),
        ("train:\n  packing: yes", "train.packing is 'yes'", "true or false"),
        ("train:\n  tf32: 1", "train.tf32 is 1", "true or false"),
        ("train:\n  weight_decay: -1", "train.weight_decay is -1", "at least 0"),
        ("train:\n  adam_beta1: 1", "train.adam_beta1 is 1", "below 1"),
        ("train:\n  max_length: 12.5", "train.max_length is 12.5", "whole number"),
        ("train:\n  max_length: true", "train.max_length is True", "whole number"),
        ("train:\n  learning_rate: .nan", "train.learning_rate is nan", "a finite number"),
        ("train: 3", "train is 3", "a section"),
        ("lora: {lora_dropout: 1}", "lora.lora_dropout is 1", "less than 1"),
        ("lora: {r: 1025}", "lora.r is 1025", "less than or equal to 1024"),
        (
            "lora: {init_lora_weights: pissa}",
            "lora.init_lora_weights is 'pissa'",
            "one of true, false, gaussian, eva, loftq; this one rewrites the weights",
        ),
        ("lora: {init_lora_weights: evva}", "lora.init_lora_weights is 'evva'", "did you mean 'eva'?"),
        ("lora: {alpha_pattern: {q_proj: 0}}", "lora.alpha_pattern is", "numbers above 0"),
        ("model: {adapter: ''}", "model.adapter is ''", "at least 1 character"),
        ("train: {metric_for_best_model: eval_acuracy}", "is 'eval_acuracy'", "one of eval_loss, accuracy"),
        ("train: {metric_for_best_model: pass@1}", "is 'pass@1'", "a metric that runs no generated code"),
        ("train: {loraplus_lr_ratio: 0.5}", "train.loraplus_lr_ratio is 0.5", "greater than or equal to 1"),
        ("train: {layerwise_lr_decay: 1.5}", "train.layerwise_lr_decay is 1.5", "less than or equal to 1"),
        ("train: {unfreeze_layer_every: 5}", "is an unknown key", "did you mean 'unfreeze_layers_every'?"),
        ("train: {loss_type: dft, label_smoothing_factor: 0.1}", "leave it out in silence", "remove it"),
        ("train: {optim: adam}", "train.optim is 'adam'", "did you mean 'adamw_torch'?"),
        ("train: {optim: AdamW}", "train.optim is 'AdamW'", "did you mean 'adamw_torch'?"),
        ("train: {optim: galore_adamw}", "train.optim is 'galore_adamw'", "an optimizer for adapters"),
        ("train: {lr_scheduler_type: constant, lr_scheduler_kwargs: {power: 2}}", "takes no arguments", "remove it"),
        ("train: {early_stopping_threshold: 0.1}", "has no effect without early_stopping_patience", "or remove it"),
        ("train: {early_stopping_patience: 2}", "is 2, and there are no validation rows", "add data.validation"),
        ("train: {checkpointed_layers: 4}", "is 4, and gradient_checkpointing is false", "gradient_checkpointing=true"),
        ("train: {metric_for_best_model: accuracy}", "there are no validation rows", "add data.validation"),
        ("lora: {init_lora_weights: loftq}\nquantization: {load_in_4bit: false}", "makes up for", "a base in 4 bits"),
        ("lora: {init_lora_weights: loftq, use_dora: true}", "together with use_dora", "one of the two"),
        ("lora: {rank_pattern: {q_proj: 0}}", "lora.rank_pattern is", "at least 1"),
        ("lora: {rank_pattern: {q_proj: 1025}}", "lora.rank_pattern is", "at most 1024"),
        ("lora: {rank_pattern: {'(q_proj': 4}}", "lora.rank_pattern is", "a regular expression ('(q_proj'"),
        ("lora: {alpha_pattern: {'*': 4}}", "lora.alpha_pattern is", "a regular expression ('*'"),
        ("lora: {target_modules: '.*(q_proj'}", "lora.target_modules is '.*(q_proj'", "a regular expression"),
        ("lora: {exclude_modules: '*q_proj'}", "lora.exclude_modules is '*q_proj'", "a regular expression"),
        ("lora: {bias: lora_only}", "lora.bias is 'lora_only'", "expected: 'none'"),
        ("train:\n  use_cpu: true", "train.use_cpu cannot be set", "CUDA_VISIBLE_DEVICES="),
        ("train:\n  disable_tqdm: true", "train.disable_tqdm cannot be set", "remove it"),
        ("train:\n  eval_packing: true", "train.eval_packing cannot be set", "set train.packing"),
        ("train:\n  deepspeed: x.json", "train.deepspeed cannot be set", "do: start with accelerate launch"),
        ("train:\n  packing_strategy: wrapped", "cuts rows in the middle", "set train.packing_strategy=bfd"),
        ("lora: {target_modules: '(?<=x)q_proj'}", "lora.target_modules is '(?<=x)q_proj'", "not understood here"),
        ("lora: {target_modules: []}", "lora.target_modules is []", "all-linear"),
        ("quantization: {bnb_4bit_quant_type: nf5}", "bnb_4bit_quant_type is 'nf5'", "did you mean 'nf4'?"),
        ("eval: {metrics: [chrff]}", "eval.metrics is ['chrff']", "one or more of accuracy"),
        ("eval: {metrics: chrff}", "eval.metrics is 'chrff'", "did you mean 'chrf'?"),
        ("eval: {limit: 0}", "eval.limit is 0", "greater than or equal to 1"),
    ],
)
def test_wrong_keys_and_values(tmp_path: Path, lines: str, what: str, detail: str) -> None:
    (fault,) = faults_of(tmp_path, SMALL + lines + "\n")
    assert fault.startswith("run.yaml:")
    assert what in fault
    assert detail in fault


def test_every_name_of_other_trainers_is_unknown_here_and_leads_to_a_key() -> None:
    sections = {"model": ModelSection, "quantization": QuantizationSection, "lora": LoraSection, "data": DataSection}
    keys = {f"{section}.{name}" for section, model in sections.items() for name in model.model_fields}
    keys |= {f"train.{name}" for name in settable_fields()} | set(RunConfig.model_fields)
    assert set(synonyms.KEYS.values()) <= keys
    assert not {f"{key.rpartition('.')[0]}.{name}".lstrip(".") for name, key in synonyms.KEYS.items()} & keys


def test_strategies_must_fit_each_other_where_there_is_validation_data(tmp_path: Path) -> None:
    text = SMALL + "train:\n  save_strategy: steps\n"
    (fault,) = faults_of(tmp_path, text, "data.validation=held.jsonl")
    assert fault.startswith("run.yaml:")
    assert "train.save_strategy does not fit" in fault
    assert "the same strategy" in fault
    assert load_config(write(tmp_path, text)).sft_arguments()["eval_strategy"] == "no"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("name: a b\ntask: sentiment\ndata: {train: x}\n", "run.yaml:1: name is 'a b'"),
        ("task: sentiment\ndata: {train: x}\n", "run.yaml: name is missing"),
        ("name: a\ntask: sentiment\n", "run.yaml: data is missing"),
        ("name: a\ntask: sentiment\ndata: {test: x}\n", "run.yaml:3: data.train is missing"),
        ("name: a\ntask: sentiment\ndata: {train: []}\n", "run.yaml:3: data.train is []"),
        ("name: a\ntask: sentiment\ndata: {train: x, prompt: {text}}\n", "run.yaml:3: data.prompt is {'text': None}"),
        ("name: a\ntask: sentiment\ndata: {train: x, prompt: hello}\n", "run.yaml:3: data.prompt is 'hello'"),
        ("name: a\ntask: sentiment\ndata: {train: x, prompt: '{a.b}'}\n", "run.yaml:3: data.prompt is '{a.b}'"),
        ("name: a\ntask: sentiment\ndata: {train: x, format: csv}\n", "run.yaml:3: data.format is 'csv'"),
    ],
)
def test_wrong_top_level_and_data(tmp_path: Path, text: str, what: str) -> None:
    (fault,) = faults_of(tmp_path, text)
    assert what in fault


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("train.max_length", "has no key and value"),
        ("=3", "has no key and value"),
        ("name.x=1", "name holds no keys"),
        ("train.optim=[", "the value is not YAML"),
        ("lorra.r=3", "lorra is an unknown key"),
        ("lora.r=many", "lora.r is 'many'"),
        ("train.learning_rate=", "train.learning_rate is None"),
    ],
)
def test_wrong_overrides_are_named(tmp_path: Path, override: str, what: str) -> None:
    (fault,) = faults_of(tmp_path, SMALL, override)
    assert fault.startswith(f"override {override!r}")
    assert what in fault


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path, what in ((tmp_path / "none.yaml", "no such file"), (tmp_path, "cannot be read")):
        with pytest.raises(ConfigError, match=what):
            load_config(path)
    (tmp_path / "latin.yaml").write_bytes("name: é\n".encode("latin-1"))
    with pytest.raises(ConfigError, match="byte 6 is not UTF-8"):
        load_config(tmp_path / "latin.yaml")


def test_unknown_task_names_the_nearest_and_the_way_to_a_new_one(tmp_path: Path) -> None:
    (fault,) = faults_of(tmp_path, SMALL.replace("sentiment", "sentimant"))
    assert "run.yaml:2: task is 'sentimant'" in fault
    assert "did you mean 'sentiment'?" in fault
    assert "a new task needs data.prompt" in fault
    (fault,) = faults_of(tmp_path, SMALL.replace("sentiment", "titles") + "  prompt: '{body}'\n")
    assert "lacks data.completion, eval.metrics" in fault


def test_a_new_task_of_a_whole_format_needs_no_templates(tmp_path: Path) -> None:
    text = SMALL.replace("sentiment", "pretraining") + "  format: text\n"
    (fault,) = faults_of(tmp_path, text)
    assert "or data.format and eval.metrics" in fault
    task = load_config(write(tmp_path, text + "eval: {metrics: [perplexity]}\n")).task_spec()
    assert (task.fields, task.system_prompt, task.metrics) == ((), "", ("perplexity",))
    for format_name in ("auto", "task"):
        (fault,) = faults_of(tmp_path, text.replace("text", format_name) + "eval: {metrics: [perplexity]}\n")
        assert "lacks data.prompt, data.completion" in fault


def test_a_new_task_from_the_yaml(tmp_path: Path) -> None:
    text = SMALL.replace("sentiment", "titles") + "  prompt: '{body}'\n  completion: '{title}'\neval: {metrics: chrf}\n"
    task = load_config(write(tmp_path, text)).task_spec()
    assert (task.name, task.fields, task.metrics) == ("titles", ("body", "title"), ("chrf",))
    assert task.system_prompt == ""
    assert task.max_new_tokens == 256


def test_task_spec_takes_the_configs_own_words(tmp_path: Path) -> None:
    text = SMALL + "  system_prompt: ''\n  completion: '{stars}'\neval: {max_new_tokens: 3}\n"
    task = load_config(write(tmp_path, text)).task_spec()
    assert task.system_prompt == ""
    assert task.fields == ("text", "stars")
    assert task.labels == ()
    assert task.max_new_tokens == 3


def test_paths_are_found_here_or_beside_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "project").mkdir()
    config = load_config(write(tmp_path / "project", SMALL))
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert config.resolve("rows.csv") == Path("rows.csv")  # nowhere: named as the user wrote it
    (tmp_path / "project" / "rows.csv").touch()
    assert config.resolve("rows.csv") == tmp_path / "project" / "rows.csv"
    (here / "rows.csv").touch()
    assert config.resolve("rows.csv") == Path("rows.csv")


def test_hash_ignores_order_and_comments_only(tmp_path: Path) -> None:
    one = load_config(write(tmp_path, SMALL))
    two = load_config(write(tmp_path, "# a comment\ndata: {train: [rows.csv]}\ntask: sentiment\nname: run\n"))
    assert one.sha256() == two.sha256() != load_config(write(tmp_path, SMALL), ["lora.r=8"]).sha256()


def test_sft_arguments_without_validation_data(tmp_path: Path) -> None:
    arguments = load_config(write(tmp_path, SMALL)).sft_arguments()
    assert arguments["eval_strategy"] == "no"
    assert arguments["load_best_model_at_end"] is False
    arguments = load_config(write(tmp_path, SMALL), ["data.validation=v.csv"]).sft_arguments()
    assert arguments["eval_strategy"] == "epoch"
    assert arguments["load_best_model_at_end"] is True


def test_sft_arguments_know_the_metrics_direction_and_none_of_the_kits_own_keys(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL + "  validation: v.csv\ntrain: {loraplus_lr_ratio: 4, early_stopping_patience: 2}\n")
    arguments = load_config(path).sft_arguments()
    assert not set(kit_fields()) & set(arguments)
    assert (arguments["metric_for_best_model"], arguments["greater_is_better"]) == ("eval_loss", False)
    plateau = "train.lr_scheduler_type=reduce_lr_on_plateau"
    for metric, higher in (("accuracy", True), ("perplexity", False)):
        arguments = load_config(path, [f"train.metric_for_best_model={metric}", plateau]).sft_arguments()
        assert (arguments["metric_for_best_model"], arguments["greater_is_better"]) == (f"eval_{metric}", higher)
        assert arguments.get("lr_scheduler_kwargs") == ({"mode": "max"} if higher else None)


def test_a_metric_needs_evaluations(tmp_path: Path) -> None:
    text = SMALL + "  validation: v.csv\ntrain:\n  metric_for_best_model: accuracy\n  eval_strategy: no\n"
    (fault,) = faults_of(tmp_path, text)
    assert fault.startswith("run.yaml:7: train.metric_for_best_model is 'accuracy', and eval_strategy is 'no'")


def test_the_plan_of_memory_has_three_ways(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, SMALL), ["train.memory=auto"]).train.memory == "auto"
    with pytest.raises(ConfigError, match=r"train\.memory(.|\n)*check(.|\n)*auto(.|\n)*ignore"):
        load_config(write(tmp_path, SMALL), ["train.memory=never"])


def test_config_is_frozen(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, SMALL))
    with pytest.raises(ValueError, match="frozen"):
        config.lora.r = 3


def test_declared_train_fields_are_sft_fields_and_free() -> None:
    from qlora_kit.config.sft_fields import sft_fields

    own = {"metric_rows", "loraplus_lr_ratio", "layerwise_lr_decay", "unfreeze_layers_every"}
    own |= {
        "early_stopping_patience",
        "early_stopping_threshold",
        "memory",
        "checkpointed_layers",
        "shard_base",
        "embedding_on_host",
        "fast",
    }
    assert set(kit_fields()) == own
    assert set(TrainSection.model_fields) <= set(sft_fields()) | {"gradient_checkpointing"} | own
    assert not set(CONTROLLED) & set(TrainSection.model_fields)
    assert not set(_BOUNDS) & set(TrainSection.model_fields)
    assert set(_BOUNDS) <= set(sft_fields())


def explained_keys(section: type) -> set[str]:
    """The fields of a section whose declaration is followed by a text in the source."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(section))).body
    assert isinstance(tree, ast.ClassDef)
    return {
        declared.target.id
        for declared, text in itertools.pairwise(tree.body)
        if isinstance(declared, ast.AnnAssign)
        and isinstance(declared.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
    }


def test_every_key_says_what_it_means() -> None:
    annotations = {key: field.annotation for key, field in RunConfig.model_fields.items()}
    sections = {
        key: kind for key, kind in annotations.items() if isinstance(kind, type) and issubclass(kind, BaseModel)
    }
    assert len(sections) > 5
    assert explained_keys(RunConfig) >= annotations.keys() - sections.keys()
    for section in sections.values():
        own = [kind for kind in section.__mro__ if issubclass(kind, BaseModel) and kind is not BaseModel]
        assert set().union(*map(explained_keys, own)) == set(section.model_fields), section


def test_import_and_load_leave_torch_out() -> None:
    code = (
        "import sys; from qlora_kit.config import load_config\n"
        f"load_config({str(CONFIGS[0])!r}).sft_arguments()\n"
        "print(sorted({'torch', 'transformers', 'trl', 'peft'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("data", "what"),
    [
        ("{train: {hub: org/name, splt: x}}", "run.yaml:3: data.train.0.splt is an unknown key"),
        ("{train: [a.csv, {hub: ../x}]}", "data.train.1.hub is '../x'"),
        ("{train: {split: x}}", "data.train.0.hub is missing"),
        ("{train: {hub: a/b, rows: 0}}", "data.train.0.rows is 0"),
        ("{train: [3]}", "data.train is [3]"),
        ("{train: x, weight: 0}", "data.weight is 0"),
        ("{train: x, near_duplicates: 1.0}", "data.near_duplicates is 1.0"),
        ("{train: x, mix: [{train: y}]}", "data.mix.0.task is missing"),
        ("{train: x, mix: [{task: translation}]}", "data.mix.0.train is missing"),
        ("{train: x, mix: [{task: translation, train: y, weigt: 2}]}", "data.mix.0.weigt is an unknown key"),
        ("{train: x, mix: [{task: translatoin, train: y}]}", "data.mix.0.task is the new task 'translatoin'"),
        ("{train: x, mix: 3}", "data.mix is 3"),
    ],
)
def test_wrong_sources_and_parts(tmp_path: Path, data: str, what: str) -> None:
    (fault,) = faults_of(tmp_path, f"name: a\ntask: sentiment\ndata: {data}\n")
    assert what in fault
    assert "<" not in fault.split("expected:")[0]


def test_parts_have_their_own_words(tmp_path: Path) -> None:
    text = (
        "name: a\ntask: sentiment\ndata:\n  train: [x.csv, {hub: org/name, split: test}]\n  mix:\n"
        "    - {task: translation, train: y.csv, system_prompt: Übersetze., weight: 0.5}\n"
    )
    config = load_config(write(tmp_path, text))
    own, mixed = config.parts()
    assert (own.task.name, mixed.task.name) == ("sentiment", "translation")
    assert (mixed.task.system_prompt, mixed.section.weight) == ("Übersetze.", 0.5)
    assert [getattr(source, "hub", source) for source in config.sources("train")] == ["x.csv", "org/name", "y.csv"]
    assert load_config(write(tmp_path, config.to_yaml())) == config
