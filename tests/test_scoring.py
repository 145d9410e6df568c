"""Scores against hand counts, against plain transformers row by row, and with functions that really run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import sacrebleu

from qlora_kit import likelihood
from qlora_kit.code_execution import code_of
from qlora_kit.conversation import Example, Message, ToolCall
from qlora_kit.errors import ConfigError, DataError, GuardError
from qlora_kit.scoring import TaskScores, check_scorable, score_task
from qlora_kit.tasks import TASKS, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

STOP = "<|im_end|>"


def example(user: str, answer: str, *, line: int = 1, system: str | None = None, tests: Sequence[str] = ()) -> Example:
    opening = () if system is None else (Message("system", system),)
    extra = {"tests": list(tests)} if tests else {}
    return Example((*opening, Message("user", user), Message("assistant", answer)), extra, f"rows.jsonl:{line}")


def prompt_text(messages: Sequence[Message], tokenizer: PreTrainedTokenizerFast) -> str:
    plain = [{"role": message.role, "content": message.content} for message in messages]
    return tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)


def scripted_model(tokenizer: PreTrainedTokenizerFast, script: Mapping[str, str]) -> PreTrainedModel:
    """A causal LM for transformers' own ``generate``: after each rendered prompt of ``script`` it says that text.

    A text without a stop token goes on for ever. A prompt that is not in ``script`` is a KeyError: the rendering is
    checked too.
    """
    import torch
    from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutput

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    answers = {tuple(ids(prompt)): ids(answer) for prompt, answer in script.items()}
    opening = tuple(ids("<|im_start|>assistant\n"))

    class Scripted(PreTrainedModel, GenerationMixin):
        config_class = PretrainedConfig

        def __init__(self, config: PretrainedConfig) -> None:
            super().__init__(config)
            self.unused = torch.nn.Parameter(torch.zeros(1))

        def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs: Any) -> dict[str, torch.Tensor]:
            return {"input_ids": input_ids, "attention_mask": kwargs.get("attention_mask")}

        def forward(
            self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any
        ) -> CausalLMOutput:
            if attention_mask is None:  # `generate` leaves out a mask of ones
                attention_mask = torch.ones_like(input_ids)
            logits = torch.zeros(*input_ids.shape, len(tokenizer))
            for row, (said, mask) in enumerate(zip(input_ids.tolist(), attention_mask.tolist(), strict=True)):
                tokens = tuple(token for token, real in zip(said, mask, strict=True) if real)
                start = max(i for i in range(len(tokens)) if tokens[i : i + len(opening)] == opening) + len(opening)
                answer = answers[tokens[:start]]
                logits[row, -1, answer[(len(tokens) - start) % len(answer)]] = 1.0
            return CausalLMOutput(logits=logits)

    model = Scripted(PretrainedConfig(vocab_size=len(tokenizer), is_encoder_decoder=False))
    model.generation_config.use_cache = False
    return model


def score_script(
    tokenizer: PreTrainedTokenizerFast, task: Task, rows: Sequence[tuple[Example, str]], **options: Any
) -> TaskScores:
    """Score a model that answers each example with the text beside it."""
    script = {}
    for row, answer in rows:
        messages = row.messages[:-1]
        if messages[0].role != "system":
            messages = (Message("system", task.system_prompt), *messages)
        script[prompt_text(messages, tokenizer)] = answer
    options = {"batch_size": 2, "stop_token_ids": [tokenizer.convert_tokens_to_ids(STOP)], **options}
    return score_task(scripted_model(tokenizer, script), tokenizer, [row for row, _ in rows], task, **options)


SENTIMENT_ROWS = [  # reference, said
    (example("a long review " * 9, "positive", line=1), f"positive{STOP}"),
    (example("short", "positive", line=2), f"negative{STOP}"),
    (example("a middling one", "neutral", line=3, system="Judge it."), f" neutral\n{STOP}"),
    (example("very short", "negative", line=4), "no "),  # never stops
    (example("another long review " * 5, "negative", line=5), f"negative{STOP}"),
]


def test_labels_are_counted_as_by_hand_and_rows_keep_their_order(chatml_tokenizer: PreTrainedTokenizerFast) -> None:
    scores = score_script(chatml_tokenizer, TASKS["sentiment"], SENTIMENT_ROWS)

    assert [score.metric for score in scores.scores] == ["accuracy", "macro_f1", "stop_rate"]
    assert scores.score("accuracy").value == pytest.approx(3 / 5)
    # positive: 1 hit, 1 said, 2 true; negative: 1 hit, 2 said, 2 true; neutral: 1, 1, 1
    assert scores.score("macro_f1").value == pytest.approx((2 / 3 + 2 / 4 + 1) / 3)
    assert scores.stop_rate == pytest.approx(4 / 5)
    assert [row.score for row in scores.rows] == [1, 0, 1, 0, 1]
    assert [row.finish_reason for row in scores.rows] == ["stop", "stop", "stop", "length", "stop"]
    assert [row.source for row in scores.rows] == [f"rows.jsonl:{line}" for line in range(1, 6)]
    assert [row.reference for row in scores.rows] == ["positive", "positive", "neutral", "negative", "negative"]
    assert scores.rows[1].prediction == "negative"
    assert scores.rows[1].prompt == "short"
    for score in scores.scores:
        assert score.n == 5
        assert 0 <= score.ci95[0] <= score.value <= score.ci95[1] <= 1


def test_the_answer_limit_of_the_call_wins_over_the_tasks(chatml_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [(example("go on", "x"), "never stops ")]
    task = replace(TASKS["sentiment"], metrics=("stop_rate",), max_new_tokens=3)
    for limit, tokens in ((None, 3), (7, 7)):
        scores = score_script(chatml_tokenizer, task, rows, max_new_tokens=limit)
        said = chatml_tokenizer("never stops " * 3, add_special_tokens=False)["input_ids"]
        assert chatml_tokenizer(scores.rows[0].prediction, add_special_tokens=False)["input_ids"] == said[:tokens]
        assert [score.metric for score in scores.scores] == ["stop_rate"]
        assert scores.stop_rate == 0


def test_translation_is_sacrebleus_number(chatml_tokenizer: PreTrainedTokenizerFast) -> None:
    said = ["the weather is nice today", "this is not the answer", "hello world"]
    true = ["the weather was nice today", "this is the answer to your question", "hello world"]
    rows = [(example(f"row {i}", b), a + STOP) for i, (a, b) in enumerate(zip(said, true, strict=True))]
    scores = score_script(chatml_tokenizer, TASKS["translation"], rows)
    assert scores.score("chrf").value == pytest.approx(sacrebleu.corpus_chrf(said, [true]).score)
    assert scores.score("bleu").value == pytest.approx(sacrebleu.corpus_bleu(said, [true]).score)
    assert scores.rows[2].score == pytest.approx(100)


def test_code_passes_only_when_its_assertions_hold(chatml_tokenizer: PreTrainedTokenizerFast) -> None:
    tests = ["assert double(2) == 4", "assert double(0) == 0"]
    answers = [
        "def double(x):\n    return x + x",
        "def double(x):\n    return x * x + 1",
        "def double(x):\n    while True: pass",
        "Here it is:\n```python\ndef double(x):\n    return 2 * x\n```\nIt doubles.",
    ]
    rows = [(example(f"double, version {i}", "-", tests=tests), answer + STOP) for i, answer in enumerate(answers)]
    scores = score_script(chatml_tokenizer, TASKS["code_generation"], rows, allow_code_execution=True)
    assert [row.score for row in scores.rows] == [1, 0, 0, 1]
    assert scores.score("pass@1").value == pytest.approx(0.5)
    assert scores.stop_rate == 1
    assert "assert double(2) == 4" in scores.rows[1].reason
    assert "seconds" in scores.rows[2].reason
    assert scores.rows[0].reason == ""


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("x = 1", "x = 1"),
        ("```\nx = 1\n```", "x = 1"),
        ("Sure:\n```python\nx = 1\ny = 2\n```\nand\n```\nz = 3\n```", "x = 1\ny = 2"),
        ("```python\nx = 1\n", "x = 1\n"),
        ("s = '``' + `", "s = '``' + `"),
    ],
)
def test_the_first_markdown_block_is_the_code(answer: str, code: str) -> None:
    assert code_of(answer) == code


def test_code_is_not_run_without_permission(chatml_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    rows = [(example("write", "-", tests=["assert add(1, 2) == 3"]), f"open({str(trace)!r}, 'w'){STOP}")]
    with pytest.raises(ConfigError) as refusal:
        score_script(chatml_tokenizer, TASKS["code_generation"], rows)
    fault = refusal.value.faults[0]
    assert "--allow-code-execution" in fault.fix
    assert "no sandbox" in fault.expected
    assert not trace.exists()


def test_rows_that_cannot_be_scored_are_named(chatml_tokenizer: PreTrainedTokenizerFast) -> None:
    bare = [(example("write", "-", line=line), STOP) for line in (4, 7)]
    with pytest.raises(DataError) as refusal:
        score_script(chatml_tokenizer, TASKS["code_generation"], bare, allow_code_execution=True)
    assert [fault.what.split(": ")[0] for fault in refusal.value.faults] == ["rows.jsonl:4", "rows.jsonl:7"]
    with pytest.raises(DataError, match=r"rows\.jsonl:9.*<\|im_end\|>"):
        score_script(chatml_tokenizer, TASKS["sentiment"], [(example(f"bad{STOP}", "positive", line=9), STOP)])
    with pytest.raises(ValueError, match="no rows"):
        score_script(chatml_tokenizer, TASKS["sentiment"], [])


STORY_ROWS = [
    example("Hello world", "this is the answer to your question"),
    example("The weather is nice today, is it not", "No"),
    example("Hello", "system user assistant " * 6, system="You are a helpful assistant."),
    Example(
        (
            Message("user", "One?"),
            Message("assistant", "the first answer"),
            Message("user", "Two?"),
            Message("assistant", "the second"),
        ),
        {},
        "rows.jsonl:4",
    ),
]
STORY = replace(TASKS["text_generation"], max_new_tokens=2)


def plain_nll(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, row: Example) -> tuple[float, int]:
    """By transformers' own loss on one row alone: the sum over the answer and its stop token, and their number."""
    import torch

    messages = row.messages
    if messages[0].role != "system":
        messages = (Message("system", STORY.system_prompt), *messages)
    prompt = tokenizer(prompt_text(messages[:-1], tokenizer), add_special_tokens=False)["input_ids"]
    answer = tokenizer(messages[-1].content + STOP, add_special_tokens=False)["input_ids"]
    labels = torch.tensor([[-100] * len(prompt) + answer])
    with torch.no_grad():
        loss = model(input_ids=torch.tensor([prompt + answer]), labels=labels).loss
    return float(loss) * len(answer), len(answer)


def score_stories(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, batch_size: int) -> TaskScores:
    stops = [tokenizer.convert_tokens_to_ids(STOP)]
    return score_task(model, tokenizer, STORY_ROWS, STORY, batch_size=batch_size, stop_token_ids=stops)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("logits_bytes", [likelihood.LOGITS_BYTES, 1])
def test_perplexity_is_transformers_loss_row_by_row(
    random_model: PreTrainedModel,
    chatml_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    batch_size: int,
    logits_bytes: int,
) -> None:
    monkeypatch.setattr(likelihood, "LOGITS_BYTES", logits_bytes)
    monkeypatch.setattr(likelihood, "FLOAT_ROWS", 5)
    rows = [plain_nll(random_model, chatml_tokenizer, row) for row in STORY_ROWS]
    expected = math.exp(sum(nll for nll, _ in rows) / sum(tokens for _, tokens in rows))

    scores = score_stories(random_model, chatml_tokenizer, batch_size)

    assert scores.score("perplexity").value == pytest.approx(expected, rel=1e-4)
    assert [row.score for row in scores.rows] == pytest.approx([math.exp(n / t) for n, t in rows], rel=1e-4)
    assert scores.score("perplexity").n == len(STORY_ROWS)


def test_plain_texts_are_scored_by_the_perplexity_of_the_whole_text(
    random_model: PreTrainedModel, chatml_tokenizer: PreTrainedTokenizerFast
) -> None:
    import torch

    texts = ["Hello world", "The weather is nice today, is it not?", "x"]
    rows = [Example((), {}, f"f.txt:{line}", text=text) for line, text in enumerate(texts, start=1)]
    losses = []
    for text in texts:
        ids = chatml_tokenizer(text + STOP, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            loss = random_model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss
        losses.append((float(loss) * (len(ids) - 1), len(ids) - 1))
    task = Task("own", "", (), "", "", "", ("perplexity",), 16)
    seen: list[tuple[int, int]] = []

    scores = score_task(
        random_model,
        chatml_tokenizer,
        rows,
        task,
        batch_size=2,
        stop_token_ids=[chatml_tokenizer.convert_tokens_to_ids(STOP)],
        progress=lambda done, total: seen.append((done, total)),
    )

    assert [score.metric for score in scores.scores] == ["perplexity"]
    expected = math.exp(sum(nll for nll, _ in losses) / sum(tokens for _, tokens in losses))
    assert scores.score("perplexity").value == pytest.approx(expected, rel=1e-4)
    assert [row.score for row in scores.rows] == pytest.approx([math.exp(n / t) for n, t in losses], rel=1e-4)
    assert [row.finish_reason for row in scores.rows] == [None] * 3
    assert seen[-1] == (3, 3)
    with pytest.raises(ConfigError, match="scored by chrf, but plain texts have no answers"):
        check_scorable(rows, replace(task, metrics=("perplexity", "chrf")), allow_code_execution=False)


def test_a_tool_call_is_compared_as_the_template_writes_it(chatml_tokenizer: PreTrainedTokenizerFast) -> None:
    tools = ('{"type": "function", "function": {"name": "clock"}}',)
    messages = (Message("user", "How late is it?"), Message("assistant", "", (ToolCall("clock", '{"zone": "UTC"}'),)))
    row = Example(messages, {}, "rows.jsonl:1", tools)
    prompt = chatml_tokenizer.apply_chat_template(
        [{"role": "user", "content": "How late is it?"}],
        tools=[json.loads(tools[0])],
        tokenize=False,
        add_generation_prompt=True,
    )
    said = '<tool_call>\n{"name": "clock", "arguments": {"zone": "UTC"}}\n</tool_call>'
    model = scripted_model(chatml_tokenizer, {prompt: said + STOP})
    task = Task("own", "", (), "", "", "", ("exact_match",), 128)
    stops = [chatml_tokenizer.convert_tokens_to_ids(STOP)]
    scores = score_task(model, chatml_tokenizer, [row], task, batch_size=1, stop_token_ids=stops)
    assert (scores.score("exact_match").value, scores.stop_rate) == (1, 1)
    assert scores.rows[0].reference == said


def test_the_logits_budget_splits_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_kit.data.encoding import Encoded
    from qlora_kit.likelihood import _likelihood_batches

    rows = [Encoded([0] * length, [-100] * (length - 3) + [0] * 3) for length in (9, 10, 11, 30)]
    assert list(_likelihood_batches(rows, batch_size=4, max_logits=1000)) == [[3, 2, 1, 0]]
    assert list(_likelihood_batches(rows, batch_size=2, max_logits=1000)) == [[3, 2], [1, 0]]
    # rows 0 to 2 need positions 5 to 9 together (3 rows x 5); row 3 with any of them needs far more
    assert list(_likelihood_batches(rows, batch_size=4, max_logits=15)) == [[3], [2, 1, 0]]
    assert list(_likelihood_batches(rows, batch_size=4, max_logits=14)) == [[3], [2, 1], [0]]
    assert list(_likelihood_batches(rows, batch_size=4, max_logits=0)) == [[3], [2], [1], [0]]


def test_logits_that_are_not_finite_stop_the_scoring(
    random_model: PreTrainedModel, chatml_tokenizer: PreTrainedTokenizerFast
) -> None:
    import copy

    import torch

    broken = copy.deepcopy(random_model)
    with torch.no_grad():
        broken.lm_head.weight[0, 0] = math.nan
    with pytest.raises(GuardError, match="finite"):
        score_stories(broken, chatml_tokenizer, 4)


def test_scoring_leaves_the_models_mode_and_tells_its_progress(
    random_model: PreTrainedModel, chatml_tokenizer: PreTrainedTokenizerFast
) -> None:
    seen: list[tuple[int, int]] = []
    random_model.train()
    try:
        score_task(
            random_model,
            chatml_tokenizer,
            STORY_ROWS,
            STORY,
            batch_size=3,
            stop_token_ids=[chatml_tokenizer.convert_tokens_to_ids(STOP)],
            progress=lambda done, total: seen.append((done, total)),
        )
        assert random_model.training
    finally:
        random_model.eval()
    assert seen == [(3, 8), (4, 8), (7, 8), (8, 8)]
