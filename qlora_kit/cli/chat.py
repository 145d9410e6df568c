"""`qlora-kit chat`: a conversation in the terminal, with adapters swapped and compared as it goes on."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.adapters.store import DEFAULT_STORE
from qlora_kit.cli.adapters import StoreOption
from qlora_kit.cli.engine import plan_engine
from qlora_kit.cli.output import say
from qlora_kit.cli.sampling import (
    AdapterOption,
    BaseOption,
    MaxNewTokensOption,
    MinPOption,
    RepetitionPenaltyOption,
    SeedOption,
    SystemOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    sampling_of,
)
from qlora_kit.errors import ConfigError, QloraKitError

if TYPE_CHECKING:
    from qlora_kit.chat import ChatSession, Command
    from qlora_kit.cli.engine import EnginePlan


def chat(
    *,
    base: BaseOption = None,
    adapter: AdapterOption = None,
    system: SystemOption = None,
    max_new_tokens: MaxNewTokensOption = None,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    top_k: TopKOption = 0,
    min_p: MinPOption = 0.0,
    repetition_penalty: RepetitionPenaltyOption = 1.0,
    seed: SeedOption = None,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Talk with the base or an adapter; /help lists the commands."""
    sampling = sampling_of(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    plan = plan_engine(base, (adapter,) if adapter else (), store)
    if system is not None:
        _require_text(system, plan)
    say("loading the base")
    from qlora_kit.chat import ChatSession

    with plan.open() as engine:
        session = ChatSession(engine, sampling=sampling, fixed_limit=max_new_tokens is not None)
        if adapter is not None:
            session.use(adapter)
        session.system = system
        if sys.stdin.isatty():
            answering = engine.ref.id if adapter is None else f"{engine.ref.id} with {session.name}"
            say(f"{answering}; /help lists the commands, Ctrl-D ends")
        for line in _lines(session):
            if not _heed(session, line):
                break


def _require_text(system: str, plan: EnginePlan) -> None:
    from qlora_kit.conversation import Message, control_pattern, turn_faults
    from qlora_kit.data.chat import control_tokens
    from qlora_kit.models import load_tokenizer

    faults = turn_faults([Message("system", system)], control_pattern(control_tokens(load_tokenizer(plan.ref))))
    if faults:
        raise ConfigError.of(faults)


def _lines(session: ChatSession) -> Iterator[str]:
    """What is typed, or piped in, without empty lines; Ctrl-C forgets the line, Ctrl-D ends."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin if line.strip())
        return
    _edit_lines(session)
    while True:
        try:
            line = input(f"{session.name}> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        if line.strip():
            yield line


def _edit_lines(session: ChatSession) -> None:
    """Arrow keys, history, and Tab for commands and adapters, where Python was built with them."""
    try:
        import readline
    except ImportError:
        say("this Python has no readline: lines cannot be edited")
        return
    from qlora_kit.chat import COMMANDS

    def complete(text: str, state: int) -> str | None:
        line = readline.get_line_buffer()
        words = [f"/{name}" for name in COMMANDS] if " " not in line else ["base", *session.engine.available()]
        found = [word for word in words if word.startswith(text)] if line.startswith("/") else []
        return found[state] if state < len(found) else None

    readline.set_completer_delims(" ")
    readline.set_completer(complete)
    readline.parse_and_bind("tab: complete")


def _heed(session: ChatSession, line: str) -> bool:
    """Answer a line or do what it commands; False ends the chat. A mistake is told and changes nothing."""
    from qlora_kit.chat import parse_line

    try:
        parsed = parse_line(line)
        if isinstance(parsed, str):
            _show(session.answer(parsed))
            if session.last is not None and session.last.finish_reason == "length":
                say(f"(cut at {session.last.completion_tokens} tokens; --max-new-tokens raises the limit)")
            return True
        return _do(session, parsed)
    except QloraKitError as error:
        for fault in error.faults:
            say(f"{fault}")
    except KeyboardInterrupt:
        say("(stopped; what was said so far stays in the conversation)")
    return True


def _show(pieces: Iterator[str]) -> None:
    """Print an answer as it comes, with the end of its line; nothing where it is refused before it begins."""
    refused = False
    with closing(pieces) as answer:  # type: ignore[type-var]
        try:
            first = next(answer, "")
        except QloraKitError:
            refused = True
            raise
        else:
            print(first, end="", flush=True)
            for piece in answer:
                print(piece, end="", flush=True)
        finally:
            if not refused:
                print(flush=True)


def _do(session: ChatSession, command: Command) -> bool:
    match command.name, command.arguments:
        case "adapter", (name,):
            say(f"{session.use(name)} answers now")
        case "base", ():
            session.use(None)
            say("the base answers now")
        case "adapters", ():
            _list_adapters(session)
        case "compare", names:
            _compare(session, names)
        case "system", texts:
            session.system = texts[0] if texts else None
            say("the system prompt is set" if texts else "the adapter's own system prompt holds again")
        case "clear", ():
            session.turns.clear()
            say("the conversation is forgotten")
        case "undo", ():
            session.undo()
            say("the last question and its answer are forgotten")
        case "save", (file,):
            say(f"{file}:{session.save(Path(file))}: the conversation is written")
        case "help", ():
            _help()
        case _:
            return False
    return True


def _list_adapters(session: ChatSession) -> None:
    names = session.engine.available()
    for name in names:
        say(f"* {name}" if name == session.adapter else f"  {name}")
    if not names:
        say("the store holds no adapters")


def _compare(session: ChatSession, names: Sequence[str]) -> None:
    for name, pieces in session.compare(names):
        print(f"--- {name}")
        _show(pieces)


def _help() -> None:
    from qlora_kit.chat import help_lines

    lines = help_lines()
    width = max(len(usage) for usage, _ in lines)
    for usage, meaning in lines:
        say(f"  {usage:<{width}}  {meaning}")
