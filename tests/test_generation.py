"""Batched decoding gives each row what plain transformers gives it alone, ends where it should, and repeats by seed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

from qlora_kit.errors import ConfigError
from qlora_kit.generation import Completion, Sampling, generate

PAD = 0
NEVER = 1  # a stop token that the tests' answers do not hold
PROMPTS = [[40, 41, 42], [50], [60, 61, 62, 63, 64, 65, 66], [70, 71], [80, 81, 82, 83, 84]]
NEW = 8


def decode(model: PreTrainedModel, prompts: list[list[int]] = PROMPTS, **options: Any) -> list[Completion]:
    settings = {"sampling": Sampling(max_new_tokens=NEW), "stop_token_ids": (NEVER,), "pad_token_id": PAD, **options}
    return generate(model, prompts, **settings)


def alone(model: PreTrainedModel, prompt: list[int], **settings: Any) -> list[int]:
    """One row by transformers itself: no padding, nothing to stop at."""
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=PAD, **settings)
    ids = torch.tensor([prompt])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return output[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def answers(random_model: PreTrainedModel) -> list[list[int]]:
    """The greedy answer to each prompt."""
    found = [alone(random_model, prompt) for prompt in PROMPTS]
    assert len({tuple(answer) for answer in found}) == len(PROMPTS)  # else a mixed-up order would not show
    assert not any(NEVER in answer for answer in found)
    return found


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_greedy_rows_are_those_of_plain_transformers(
    random_model: PreTrainedModel, answers: list[list[int]], batch_size: int
) -> None:
    found = decode(random_model, batch_size=batch_size)
    assert [list(completion.token_ids) for completion in found] == answers
    assert {completion.finish_reason for completion in found} == {"length"}


def test_an_answer_ends_before_its_first_stop_token(random_model: PreTrainedModel, answers: list[list[int]]) -> None:
    stop = answers[2][3]
    expected = [answer[: answer.index(stop)] if stop in answer else answer for answer in answers]
    found = decode(random_model, stop_token_ids=(NEVER, stop))
    assert [list(completion.token_ids) for completion in found] == expected
    reasons = ["stop" if stop in answer else "length" for answer in answers]
    assert [completion.finish_reason for completion in found] == reasons
    assert {"stop", "length"} == set(reasons)


def test_a_stop_token_as_the_last_allowed_one_still_ends_the_answer(
    random_model: PreTrainedModel, answers: list[list[int]]
) -> None:
    stop = answers[0][0]
    found = decode(random_model, [PROMPTS[0]], sampling=Sampling(max_new_tokens=1), stop_token_ids=(stop,))
    assert found == [Completion((), "stop")]


def test_a_pad_token_that_is_the_stop_token_does_no_harm(
    random_model: PreTrainedModel, answers: list[list[int]]
) -> None:
    found = decode(random_model, stop_token_ids=(PAD,))
    assert [list(c.token_ids) for c in found] == [a[: a.index(PAD)] if PAD in a else a for a in answers]


def test_no_prompts_no_answers_and_progress_counts_rows(random_model: PreTrainedModel) -> None:
    assert decode(random_model, []) == []
    done: list[int] = []
    decode(random_model, batch_size=2, progress=done.append, sampling=Sampling(max_new_tokens=1))
    assert done == [2, 4, 5]


def test_the_mode_of_the_model_is_given_back(random_model: PreTrainedModel) -> None:
    random_model.train()
    try:
        decode(random_model, [[40]], sampling=Sampling(max_new_tokens=1))
        assert random_model.training
    finally:
        random_model.eval()
    decode(random_model, [[40]], sampling=Sampling(max_new_tokens=1))
    assert not random_model.training


def test_sampling_repeats_by_its_seed(random_model: PreTrainedModel, answers: list[list[int]]) -> None:
    hot = {seed: decode(random_model, sampling=Sampling(NEW, temperature=3.0, seed=seed)) for seed in (1, 2)}
    assert decode(random_model, sampling=Sampling(NEW, temperature=3.0, seed=1)) == hot[1]
    assert hot[1] != hot[2]
    assert [list(completion.token_ids) for completion in hot[1]] != answers
    torch.manual_seed(1)
    assert decode(random_model, sampling=Sampling(NEW, temperature=3.0)) == hot[1]  # no seed: torch's own state


def test_sampling_from_one_token_is_greedy(random_model: PreTrainedModel, answers: list[list[int]]) -> None:
    for narrow in (Sampling(NEW, temperature=5.0, top_k=1), Sampling(NEW, temperature=5.0, top_p=1e-6)):
        assert [list(completion.token_ids) for completion in decode(random_model, sampling=narrow)] == answers


def test_a_repetition_penalty_is_transformers_own(random_model: PreTrainedModel, answers: list[list[int]]) -> None:
    found = decode(random_model, sampling=Sampling(NEW, repetition_penalty=3.0), batch_size=1)
    expected = [alone(random_model, prompt, repetition_penalty=3.0) for prompt in PROMPTS]
    assert [list(completion.token_ids) for completion in found] == expected
    assert expected != answers


def test_sampling_arguments_leave_greedy_without_a_temperature() -> None:
    assert Sampling(3).as_generate_arguments() == {
        "max_new_tokens": 3,
        "repetition_penalty": 1.0,
        "do_sample": False,
    }
    assert Sampling(temperature=0.5, top_p=0.9, top_k=7).as_generate_arguments() == {
        "max_new_tokens": 256,
        "repetition_penalty": 1.0,
        "do_sample": True,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 131_073),
        ("temperature", -0.1),
        ("temperature", 10.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("inf")),
        ("seed", -1),
        ("seed", 2**32),
    ],
)
def test_values_out_of_bounds_are_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"{name} is (.|\n)*expected: (.|\n)*do: "):
        Sampling(**{name: value})


def test_what_needs_the_engine_is_refused_and_min_p_is_not(random_model: PreTrainedModel) -> None:
    for sampling in (Sampling(NEW, stop=("x",)), Sampling(NEW, logprobs=0)):
        with pytest.raises(ConfigError, match=r"plain batches(.|\n)*use Engine\.generate"):
            decode(random_model, sampling=sampling)
    narrow = Sampling(NEW, temperature=5.0, min_p=1.0)  # the likeliest token alone
    assert decode(random_model, sampling=narrow) == decode(random_model)
