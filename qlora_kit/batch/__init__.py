"""A file of prompts answered in one go: rows in, answers out in the rows' order, across adapters, resumable."""

from qlora_kit.batch.answer_log import AnswerLog, require_new_file
from qlora_kit.batch.answering import AnsweredRow, Question, answer_all, questions_of, require_prompts, run_key

__all__ = [
    "AnswerLog",
    "AnsweredRow",
    "Question",
    "answer_all",
    "questions_of",
    "require_new_file",
    "require_prompts",
    "run_key",
]
