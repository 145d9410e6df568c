"""Answers many questions over one engine: each with its own adapter, all in shared batches, in their order."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from qlora_kit.adapters import AdapterContract, weights_sha256
from qlora_kit.adapters.mixing import parse_adapter, shared_system_prompt
from qlora_kit.conversation import Message, control_pattern, turn_faults
from qlora_kit.data.prompt_file import Prompt
from qlora_kit.errors import ConfigError, Fault, QloraKitError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_kit.engine import Answer, Engine, Handle, Request
    from qlora_kit.generation import Sampling

BASE = "base"
_WAITING = 64  # enough to fill any batch; what waits holds little memory


@dataclass(frozen=True)
class Question:
    """One prompt with everything that its answer depends on.

    Attributes:
        prompt: The user's turn.
        adapter: As the engine takes it; None for the base.
        system: In place of the adapter's own system prompt; None for that one.
    """

    prompt: str
    adapter: str | None
    system: str | None


@dataclass(frozen=True)
class AnsweredRow:
    """A question, its number from 0, and its answer."""

    index: int
    question: Question
    answer: Answer


def questions_of(prompts: Sequence[Prompt], *, adapter: str | None, system: str | None) -> list[Question]:
    """The questions of a file; what a row does not say itself, ``adapter`` and ``system`` do."""
    return [
        Question(
            prompt=prompt.text,
            adapter=adapter if prompt.adapter is None else None if prompt.adapter == BASE else prompt.adapter,
            system=system if prompt.system is None else prompt.system,
        )
        for prompt in prompts
    ]


def require_prompts(
    questions: Sequence[Question],
    contracts: Mapping[str, AdapterContract | None],
    tokenizer: PreTrainedTokenizerBase,
    *,
    positions: int | None,
) -> None:
    """What is wrong with the text of any question, before the base is loaded.

    Args:
        questions: What will be asked.
        contracts: Of each adapter that they name; None for one without.
        tokenizer: The base's.
        positions: Of the base; None where its files do not say.

    Raises:
        ConfigError: Texts hold control tokens or what is no text, or prompts are too long; by number.
        QloraKitError: The chat template refuses a prompt; its number is told.
    """
    from qlora_kit.data.chat import control_tokens, prompt_length_fault, render_prompt

    control = control_pattern(control_tokens(tokenizer))
    faults: list[Fault] = []
    for number, question in enumerate(questions, 1):
        found = turn_faults(_turns(question), control)
        faults += [_numbered(number, fault) for fault in found]
        if found or positions is None:
            continue
        system = shared_system_prompt([contracts[name] for name, _ in parse_adapter(question.adapter)])
        trained = [Message("system", system)] if system and question.system is None else []
        try:
            tokens = len(render_prompt([*trained, *_turns(question)], tokenizer))
        except QloraKitError as error:
            raise type(error).of([_numbered(number, fault) for fault in error.faults]) from None
        fault = prompt_length_fault(tokens, positions)
        faults += [] if fault is None else [_numbered(number, fault)]
    if faults:
        raise ConfigError.of(faults, at_most=20)


def run_key(engine: Engine, questions: Sequence[Question], sampling: Sampling, limit: int | None) -> str:
    """The sha256 of all that the answers depend on: base, adapters' files, questions, sampling."""
    names = sorted({name for question in questions for name in engine.parts_of(question.adapter)})
    content = {
        "base": [engine.ref.id, engine.ref.revision],
        "adapters": {name: weights_sha256(engine.folder(name)) for name in names},
        "questions": [asdict(question) for question in questions],
        "sampling": asdict(sampling),
        "limit": limit,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def answer_all(
    engine: Engine, questions: Sequence[Question], *, sampling: Sampling, limit: int | None, first: int = 0
) -> Iterator[AnsweredRow]:
    """Answer the questions from number ``first`` on; rows come in their order while later ones are still running.

    Args:
        engine: A started engine.
        questions: All of them.
        sampling: How every answer is sampled; a seed is counted up by the question's number.
        limit: Longest answer in tokens; None takes each adapter's own.
        first: How many are answered already.

    Raises:
        QloraKitError: A question cannot be answered; the rows before it were yielded.
    """
    running: deque[tuple[int, Handle]] = deque()
    try:
        for index in range(first, len(questions)):
            if len(running) == _WAITING:
                yield _finished(*running.popleft(), questions)
            seed = None if sampling.seed is None else sampling.seed + index
            running.append(
                (index, engine.submit(_request(engine, questions[index], replace(sampling, seed=seed), limit)))
            )
        while running:
            yield _finished(*running.popleft(), questions)
    finally:
        for _, handle in running:
            handle.cancel()


def _request(engine: Engine, question: Question, sampling: Sampling, limit: int | None) -> Request:
    from qlora_kit.engine import Request

    tokens = engine.default_sampling(question.adapter).max_new_tokens if limit is None else limit
    return Request(
        conversation=_turns(question),
        adapter=question.adapter,
        sampling=replace(sampling, max_new_tokens=tokens),
    )


def _turns(question: Question) -> tuple[Message, ...]:
    system = () if question.system is None else (Message("system", question.system),)
    return (*system, Message("user", question.prompt))


def _finished(index: int, handle: Handle, questions: Sequence[Question]) -> AnsweredRow:
    try:
        answer = handle.result()
    except QloraKitError as error:
        raise type(error).of([_numbered(index + 1, fault) for fault in error.faults]) from None
    return AnsweredRow(index, questions[index], answer)


def _numbered(number: int, fault: Fault) -> Fault:
    return Fault(f"prompt {number}: {fault.what}", fault.expected, fault.fix)
