"""A row's own answer: behind its system turn, refused where it cannot be one, as token ids and as a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qlora_kit.conversation import DataFault, Example, Message, check_texts, control_pattern
from qlora_kit.data.chat import control_tokens
from qlora_kit.data.encoding import IGNORED_LABEL, Encoded, Unencodable, encode_batch
from qlora_kit.data.ledger import Problem, data_error, split_source
from qlora_kit.data.tokenising import BATCH_ROWS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def with_system(messages: Sequence[Message], system_prompt: str) -> tuple[Message, ...]:
    """The conversation behind ``system_prompt``, unless that is empty or the conversation brings its own."""
    if not system_prompt or messages[0].role == "system":
        return tuple(messages)
    return (Message("system", system_prompt), *messages)


def require_no_control_tokens(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse texts that hold the end of a turn: they would be another conversation than the row says.

    Raises:
        DataError: With every such row.
    """
    control = control_pattern(control_tokens(tokenizer))
    problems = []
    for example in examples:
        try:
            check_texts(example, control)
        except DataFault as fault:
            problems.append(Problem(*split_source(example.source), fault.what, fault.expected, fault.fix))
    if problems:
        raise data_error(problems)


def encode_answers(
    examples: Sequence[Example], conversations: Sequence[Sequence[Message]], tokenizer: PreTrainedTokenizerBase
) -> list[Encoded]:
    """Token ids of each conversation, its last answer supervised.

    Args:
        examples: Where the conversations come from, for messages.
        conversations: One for each example, ending with the answer.
        tokenizer: The base's.

    Raises:
        DataError: With every row that cannot be encoded.
    """
    encoded: list[Encoded] = []
    problems: list[Problem] = []
    for start in range(0, len(examples), BATCH_ROWS):
        rows = examples[start : start + BATCH_ROWS]
        tools = [example.tools for example in rows]
        batch = encode_batch(conversations[start : start + BATCH_ROWS], tokenizer, loss_on="last", tools=tools)
        for example, row in zip(rows, batch, strict=True):
            if isinstance(row, Unencodable):
                problems.append(Problem(*split_source(example.source), row.reason, row.expected, row.fix))
            else:
                encoded.append(row)
    if problems:
        raise data_error(problems)
    return encoded


def answer_texts(
    examples: Sequence[Example], conversations: Sequence[Sequence[Message]], tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """The text of each row's own answer; tool calls as the chat template writes them.

    Arguments and errors are those of ``encode_answers``.
    """
    references = [messages[-1].content for messages in conversations]
    calling = [index for index, messages in enumerate(conversations) if messages[-1].tool_calls]
    encoded = encode_answers(
        [examples[index] for index in calling], [conversations[index] for index in calling], tokenizer
    )
    for index, row in zip(calling, encoded, strict=True):
        answer = [label for label in row.labels if label != IGNORED_LABEL][:-1]  # without the stop token
        references[index] = tokenizer.decode(answer, skip_special_tokens=False)
    return references
