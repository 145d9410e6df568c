"""An engine that follows a script, for tests of what is above it: it echoes, a word a token, at a set pace."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path

from qlora_kit.adapters import check_adapter_folder
from qlora_kit.engine import Answer, Delta, Request
from qlora_kit.generation import Sampling, TokenLogprob
from qlora_kit.server.protocol import Load

VOCABULARY = 1000


class ScriptedAnswer:
    """One answer: a thread makes its tokens at the engine's pace."""

    def __init__(self, engine: ScriptedEngine, request: Request, notify: Callable[[], None]) -> None:
        self.request = request
        self._notify = notify
        self.made = 0
        self.cancelled_after: int | None = None
        self._engine = engine
        self._deltas: queue.Queue[Delta] = queue.Queue()
        self._cancelled = threading.Event()
        self._ended = threading.Event()
        self._answer: Answer | None = None
        self._thread = threading.Thread(target=self._make, daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        return self._ended.is_set()

    def poll(self) -> Delta | None:
        try:
            return self._deltas.get_nowait()
        except queue.Empty:
            return None

    def cancel(self) -> None:
        if not self._cancelled.is_set():
            self.cancelled_after = self.made
            self._cancelled.set()

    def result(self) -> Answer:
        self._ended.wait()
        assert self._answer is not None
        return self._answer

    def _make(self) -> None:
        sampling = self.request.sampling or Sampling()
        words = self._engine.reply(self.request).split(" ")
        pieces = [word if index == 0 else f" {word}" for index, word in enumerate(words)]
        finish = "stop" if len(pieces) <= sampling.max_new_tokens else "length"
        text = ""
        told: tuple[TokenLogprob, ...] = ()
        with self._engine.places:
            for index, piece in enumerate(pieces[: sampling.max_new_tokens]):
                self._cancelled.wait(self._engine.seconds_per_token)
                if self._cancelled.is_set():
                    finish = "cancelled"
                    break
                whole = text + piece
                cuts = [whole.index(stop) for stop in sampling.stop if stop in whole]
                if cuts:
                    piece, finish = whole[len(text) : max(min(cuts), len(text))], "stop"
                self.made += 1
                text += piece
                alternatives = tuple((index + k, -1.0 - k) for k in range(sampling.logprobs or 0))
                logprobs = () if sampling.logprobs is None else (TokenLogprob(index, -1.0, alternatives),)
                told += logprobs
                self._deltas.put(Delta(piece, (index,), logprobs))
                self._notify()
                if cuts:
                    break
        prompt_tokens = len(self.request.prompt_ids) or sum(
            len(turn.content.split()) for turn in self.request.conversation
        )
        self._answer = Answer(text, self.request.adapter, finish, self.made, prompt_tokens, told)  # type: ignore[arg-type]
        self._deltas.put(Delta("", (), (), finish))  # type: ignore[arg-type]
        self._ended.set()
        self._notify()


class ScriptedEngine:
    """Answers ``NAME: LAST TURN`` (and the system turn in brackets); adapters of ``store`` go through the gate."""

    base = "base"
    context_tokens = 512
    vocabulary_tokens = VOCABULARY
    control_tokens = ("<|im_start|>", "<|im_end|>")

    def __init__(self, store: Path | None = None, *, seconds_per_token: float = 0.0, places: int = 32) -> None:
        self.store = store
        self.seconds_per_token = seconds_per_token
        self.places = threading.BoundedSemaphore(places)
        self.failure: BaseException | None = None
        self.loaded: list[str] = []
        self.versions: dict[str, int] = {}
        self.requests: list[Request] = []
        self.answers: list[ScriptedAnswer] = []
        self.reply: Callable[[Request], str] = echo
        self._lock = threading.Lock()

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(range(len(text.split())))

    def decode(self, token_id: int) -> str:
        return f"t{token_id}"

    def default_sampling(self, adapter: str | None) -> Sampling:
        return Sampling(max_new_tokens=64)

    def submit(self, request: Request, *, notify: Callable[[], None]) -> ScriptedAnswer:
        if self.failure is not None:
            raise self.failure
        with self._lock:
            self.requests.append(request)
            self.answers.append(ScriptedAnswer(self, request, notify))
            return self.answers[-1]

    def load(self, name: str) -> None:
        if self.store is not None:
            check_adapter_folder(self.store / name)
        self.loaded.append(name)
        self.versions[name] = self.versions.get(name, 0) + 1

    def unload(self, name: str) -> None:
        self.loaded = [other for other in self.loaded if other != name]

    def load_now(self) -> Load:
        return Load(running=sum(answer._answer is None for answer in self.answers), waiting=0)


def echo(request: Request) -> str:
    """The name of who answers, the system turn in brackets, the last turn, and the seed where there is one."""
    who = request.adapter or ScriptedEngine.base
    if request.prompt_ids:
        return f"{who}: {' '.join(map(str, request.prompt_ids))}"
    system = "".join(f"[{turn.content}] " for turn in request.conversation if turn.role == "system")
    seed = "" if request.sampling is None or request.sampling.seed is None else f" #{request.sampling.seed}"
    return f"{who}: {system}{request.conversation[-1].content}{seed}"


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 20.0) -> None:
    """Wait for something that another thread does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"never happened: {what}"
        time.sleep(0.005)
