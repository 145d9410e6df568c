"""The chat: what a line means, what the conversation holds after each turn, and the loop as a user meets it."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora_kit.chat import COMMANDS, ChatSession, Command, help_lines, parse_line
from qlora_kit.cli import chat as chat_verb
from qlora_kit.conversation import Message
from qlora_kit.engine import Engine
from qlora_kit.errors import AdapterError, ConfigError, OutputError
from qlora_kit.formats import to_example
from qlora_kit.generation import Sampling
from qlora_kit.tasks import get_task

STORE = Path(__file__).parents[1] / "adapters"
REVIEW = "The soup was far from bad."
OPENING = "One day Olga went to the garden."


@pytest.mark.parametrize(
    ("line", "parsed"),
    [
        ("Hello there", "Hello there"),
        ("  padded  ", "padded"),
        ("//etc/hosts is a file", "/etc/hosts is a file"),
        ("/adapter sentiment", Command("adapter", ("sentiment",))),
        ("/ADAPTER sentiment:0.5", Command("adapter", ("sentiment:0.5",))),
        ('/adapter "my runs/a"', Command("adapter", ("my runs/a",))),
        ("/base", Command("base")),
        ("/compare a b base", Command("compare", ("a", "b", "base"))),
        ("/system You're brief.  Really.", Command("system", ("You're brief.  Really.",))),
        ("/system", Command("system")),
        ("/exit", Command("quit")),
        ("/?", Command("help")),
    ],
)
def test_a_line_is_a_text_or_a_command(line: str, parsed: str | Command) -> None:
    assert parse_line(line) == parsed


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/adaptor x", "did you mean /adapter"),
        ("/zzz", "begins with / is typed with //"),
        ("/", "is no command"),
        ("/adapter", "got 0 arguments"),
        ("/adapter a b", "got 2 arguments"),
        ("/compare a", "got 1 arguments"),
        ("/base now", "got 1 arguments"),
        ('/save "half', "quotation"),
    ],
)
def test_a_wrong_command_is_told(line: str, told: str) -> None:
    with pytest.raises(ConfigError, match="expected: /") as error:
        parse_line(line)
    assert told in str(error.value)


def test_every_command_is_in_the_help_and_fits_a_terminal() -> None:
    assert [usage.split()[0] for usage, _ in help_lines()] == [f"/{name}" for name in COMMANDS]
    width = max(len(usage) for usage, _ in help_lines())
    assert all(width + len(meaning) + 4 <= 80 for _, meaning in help_lines())


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine("tiny", store=STORE) as engine:
        yield engine


@pytest.fixture
def session(engine: Engine) -> ChatSession:
    return ChatSession(engine, sampling=Sampling(max_new_tokens=12), fixed_limit=True)


def say(session: ChatSession, text: str) -> str:
    return "".join(session.answer(text))


def test_each_answer_is_the_engines_own_for_the_whole_conversation(session: ChatSession, engine: Engine) -> None:
    first = say(session, REVIEW)
    session.use("sentiment")
    session.system = "Is this review positive, negative or neutral?"
    second = say(session, REVIEW)
    turns = [Message("user", REVIEW), Message("assistant", first), Message("user", REVIEW)]
    assert session.turns == [*turns, Message("assistant", second)]
    alone = engine.generate(
        [[Message("system", session.system), *turns]], adapter="sentiment", sampling=Sampling(max_new_tokens=12)
    )
    assert second == alone[0].text
    assert session.last == alone[0]


def test_an_answer_that_is_stopped_is_kept_as_far_as_it_came(session: ChatSession, engine: Engine) -> None:
    session = ChatSession(engine, sampling=Sampling(max_new_tokens=300), fixed_limit=True)
    session.use("text_generation")
    pieces = session.answer(OPENING)
    shown = "".join(next(pieces) for _ in range(6))
    pieces.close()  # type: ignore[attr-defined]
    assert [turn.role for turn in session.turns] == ["user", "assistant"]
    assert session.turns[1].content == shown
    assert session.last is not None
    assert session.last.finish_reason == "cancelled"
    assert session.last.completion_tokens < 60  # far from the limit


def test_a_choice_that_cannot_be_loaded_changes_nothing(session: ChatSession) -> None:
    session.use("sentiment:0.5")
    with pytest.raises(AdapterError, match="sentimend"):
        session.use("sentimend")
    assert session.name == "sentiment:0.5"
    session.use(None)
    assert session.name == "base"


def test_compare_leaves_the_conversation_alone(session: ChatSession, engine: Engine) -> None:
    with pytest.raises(ConfigError, match="nothing was asked"):
        session.compare(["sentiment", "base"])
    say(session, REVIEW)
    before = list(session.turns)
    found = {name: "".join(pieces) for name, pieces in session.compare(["sentiment", "translation", "base"])}
    assert session.turns == before
    asked = [[Message("user", REVIEW)]]
    for name in ("sentiment", "translation", None):
        (alone,) = engine.generate(asked, adapter=name, sampling=Sampling(max_new_tokens=12))
        assert found[name or "base"] == alone.text


def test_a_prompt_that_does_not_fit_is_refused_and_forgotten(session: ChatSession) -> None:
    say(session, REVIEW)
    with pytest.raises(ConfigError, match="tokens long"):
        say(session, "soup " * 5000)
    assert len(session.turns) == 2
    session.undo()
    assert session.turns == []
    with pytest.raises(ConfigError, match="empty"):
        session.undo()


def test_save_adds_rows_that_are_data(session: ChatSession, tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    with pytest.raises(ConfigError, match="empty"):
        session.save(file)
    session.system = "Kürze dich."
    say(session, REVIEW)
    assert session.save(file) == 1
    file.write_bytes(file.read_bytes().rstrip())  # as an editor may leave it
    assert session.save(file) == 2
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert rows[0] == rows[1]
    example = to_example(rows[0], format="messages", task=get_task("text_generation"), source="chat.jsonl:1")
    assert list(example.messages) == [Message("system", "Kürze dich."), *session.turns]
    with pytest.raises(ConfigError, match="ends with"):
        session.save(tmp_path / "notes.txt")
    with pytest.raises(OutputError, match="can be written to"):
        session.save(tmp_path / "nowhere" / "chat.jsonl")


def chat(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    chat_verb.chat(adapter="sentiment", max_new_tokens=12, store=STORE)


def test_the_loop_answers_commands_and_mistakes_until_it_is_told_to_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (
        "",
        "  ",
        REVIEW,
        "/adaptor x",
        "/adapter nope",
        "Good <|im_end|>",
        "/system <|im_start|>",
        "/base",
        "/help",
    )
    chat(monkeypatch, "\n".join((*lines, "/quit", REVIEW)))
    out, err = capsys.readouterr()
    assert out == "positive\n"  # what is refused leaves no line
    for told in ("did you mean /adapter?", "'nope': no adapter of this name", "the base answers now", "/compare A B"):
        assert told in err
    for told in ("turn 3 (user) holds the control token <|im_end|>", "(system) holds the control token <|im_start|>"):
        assert told in err
    assert "system prompt is set" not in err


def test_ctrl_c_in_an_answer_goes_back_to_the_prompt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = ChatSession.answer

    def interrupted(self: ChatSession, text: str) -> Iterator[str]:
        pieces = whole(self, text)
        yield next(pieces)
        if text == OPENING:
            pieces.close()  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        yield from pieces

    monkeypatch.setattr(ChatSession, "answer", interrupted)
    chat(monkeypatch, f"{OPENING}\n/clear\n{REVIEW}\n")
    out, err = capsys.readouterr()
    assert "(stopped; what was said so far stays" in err
    assert out.splitlines()[-1] == "positive"
