"""Continuous batching: requests join and leave between steps, each row with its own adapter, settings and length.

transformers' own continuous batching packs rows without telling modules which token belongs to which request, and knows
neither top-p, min-p, penalty nor stop strings for each request (5.23); so the loop is the kit's.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import TYPE_CHECKING

from qlora_kit.engine.compiled_decode import CompiledDecode
from qlora_kit.engine.failures import no_memory, not_finite, out_of_memory
from qlora_kit.engine.fair_lock import FairLock
from qlora_kit.engine.kv_budget import KvBudget, automatic_kv_bytes
from qlora_kit.engine.lane import Lane
from qlora_kit.engine.loaded import LoadedAdapter
from qlora_kit.engine.peft_path import PeftPath
from qlora_kit.engine.prefix_cache import PrefixCache
from qlora_kit.engine.row import Parts, Row
from qlora_kit.engine.slots import SlotTable
from qlora_kit.errors import AdapterError, GuardError, QloraKitError
from qlora_kit.generation import greedy_tokens
from qlora_kit.lora_bank import LoraBank

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Scheduler:
    """The batch: who waits, who is under way, and the steps that bring each of them one token further.

    Whoever touches the model holds ``lock``; ``submit`` needs none.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stop_token_ids: tuple[int, ...],
        max_batch: int,
        slots: int,
        kv_bytes: int | None,
        compile_backend: str | None,
    ) -> None:
        """Put the bank on the base.

        Args:
            model: The base, without adapters.
            tokenizer: Decodes answers.
            stop_token_ids: Tokens that end an answer.
            max_batch: Rows under way at most.
            slots: Adapters in device memory at most.
            kv_bytes: Memory for keys and values at most; None for a share of what is free now.
            compile_backend: As of ``Engine``.

        Raises:
            ConfigError: ``kv_bytes`` has no room for any request, or there is no such backend.
            BaseModelError: The base cannot carry a bank, or is no plain attention model.
        """
        self.lock = FairLock()
        self.prefixes = PrefixCache()
        self.bank = LoraBank(model, slots=slots)
        self.peft = PeftPath(model)
        self.tokens_generated = 0
        self.prompt_tokens = 0
        self.prompt_tokens_reused = 0
        self.requests_done = 0
        self._slots = SlotTable(self.bank)
        self._compiled = None if compile_backend is None else CompiledDecode(model, self.bank, compile_backend)
        self._model = model
        self._tokenizer = tokenizer
        self._stops = frozenset(stop_token_ids)
        self._max_batch = max_batch
        self._waiting: deque[Row] = deque()
        bank_lane = Lane(model, None)
        self._lanes: dict[str | None, Lane] = {None: bank_lane}
        most_bytes = automatic_kv_bytes(model.device) if kv_bytes is None else kv_bytes
        self._budget = KvBudget(most_bytes, bank_lane.kv.token_bytes, self.prefixes)
        self._peft_users: Counter[str] = Counter()
        self._dropped: set[str] = set()  # PEFT's names of adapters that go with their last row

    # --- what others see ---

    @property
    def waiting(self) -> int:
        """Requests that have not joined the batch."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests in the batch."""
        return sum(lane.count for lane in list(self._lanes.values()))

    @property
    def slots_used(self) -> int:
        """Slots of the bank that hold an adapter, a scaled one, or a sum."""
        return self._slots.used

    @property
    def kv_bytes(self) -> int:
        """Memory of the keys and values of rows under way."""
        return sum(lane.kv.bytes for lane in list(self._lanes.values()))

    @property
    def kv_budget_bytes(self) -> int:
        """What they and the stored prefixes may take together."""
        return self._budget.most_bytes

    def submit(self, row: Row) -> None:
        """Let a row wait for its turn.

        Raises:
            AdapterError: Its adapter goes through PEFT, and was unloaded meanwhile.
            ConfigError: Its keys and values can never fit.
        """
        self._budget.require_possible(row)
        name = row.parts.peft_slot
        if name is not None:
            with self.lock:
                if name not in self.peft.slots:
                    what = f"the adapter {row.adapter!r} was unloaded meanwhile"
                    raise AdapterError(what, expected="a loaded adapter", fix="send the request again")
                self._peft_users[name] += 1
        self._waiting.append(row)

    def drop(self, adapter: LoadedAdapter) -> None:
        """No new request gets this version: it goes once its rows are done."""
        with self.lock:
            self._slots.forget(adapter.name, adapter.version)
            if adapter.peft_slot is not None:
                self._dropped.add(adapter.peft_slot)
                self._detach_if_done(adapter.peft_slot)

    def use(self, parts: Parts) -> None:
        """Let the whole model use one adapter, for passes outside the loop; the caller holds ``lock``.

        Raises:
            GuardError: Every slot is in use.
        """
        if not parts.adapters or parts.peft_slot is not None:
            self.bank.choose(None)
            self.peft.activate(parts.peft_slot)
            return
        slot = self._slots.acquire(parts.key, parts.factors)
        if slot is None:
            raise GuardError(
                f"all {self.bank.slots} slots are in use by requests under way",
                expected="a free slot",
                fix="wait for them, or open the engine with more slots",
            )
        self.peft.activate(None)
        self.bank.choose(slot)
        self._slots.release(parts.key)

    # --- the loop ---

    def step(self, at_most: int | None = None) -> bool:
        """One token for every row, after those that wait have joined; False where there was nothing to do.

        Args:
            at_most: Rows under way at most, if less than ``max_batch``.
        """
        import torch

        with self.lock, torch.inference_mode():
            self._drop_cancelled()
            self._admit(self._max_batch if at_most is None else min(at_most, self._max_batch))
            busy = [lane for lane in self._lanes.values() if lane.count]
            for lane in busy:
                self.peft.activate(lane.peft_slot)
                self._read_prompts(lane)
                self._decode(lane)
            for lane in [lane for lane in self._lanes.values() if not lane.count]:
                lane.kv.release()
                if lane.peft_slot is not None:
                    del self._lanes[lane.peft_slot]
            return bool(busy)

    def fail_all(self, error: QloraKitError) -> None:
        """End every request with ``error``."""
        with self.lock:
            for lane in self._lanes.values():
                for row in lane.all_rows():
                    self._fail(row, error)
                lane.rows, lane.entering, lane.reading = [], [], None
                lane.kv.release()
            while self._waiting:
                self._fail(self._waiting.popleft(), error)

    def _admit(self, at_most: int) -> None:
        """Rows join in the order in which they came; one that finds no slot or memory keeps the others behind it."""
        while self._waiting and self.running < at_most:
            row = self._waiting[0]
            name = row.parts.peft_slot
            lane = self._lanes[name] if name in self._lanes else Lane(self._model, name)
            if not self._budget.admits(row, lane, self._lanes.values()):
                return
            if row.parts.adapters and row.parts.peft_slot is None:
                try:
                    slot = self._slots.acquire(row.parts.key, row.parts.factors)
                except out_of_memory() as error:  # the bank has to grow for it
                    self._fail(self._waiting.popleft(), no_memory(row, error))
                    continue
                if slot is None:
                    return
                row.slot = slot
            self._waiting.popleft()
            row.begin(self._tokenizer, self._model.device)
            row.prefix = self.prefixes.longest(row.parts.key, row.prompt_ids)
            self.prompt_tokens += len(row.prompt_ids)
            self.prompt_tokens_reused += 0 if row.prefix is None else row.prefix[1]
            self._lanes[name] = lane
            lane.entering.append(row)

    def _read_prompts(self, lane: Lane) -> None:
        group = lane.next_group()
        if not group:
            return
        first = len(lane.rows)
        try:
            tokens = lane.prepare(group, self._budget.room(lane, self._lanes.values()))
            self._choose(group, keep=False)
            logits = lane.kv.forward(first, tokens, [row.length for row in group])
        except out_of_memory() as error:
            lane.stop_reading()
            for row in group:
                self._fail(row, no_memory(row, error))
            return
        except BaseException:  # whoever ends all requests for it has to find these too
            lane.entering = [*(row for row in group if row is not lane.reading), *lane.entering]
            raise
        for row, fed in zip(group, tokens, strict=True):
            row.length += len(fed)
        if lane.entered(group):
            self._accept(lane, first, logits)

    def _decode(self, lane: Lane) -> None:
        if not lane.rows:
            return
        rows = lane.rows
        try:
            lane.make_room(self._budget.room(lane, self._lanes.values()))
            logits = self._next_logits(lane)
        except out_of_memory() as error:  # the newest row makes room for the others
            row = lane.remove(len(rows) - 1)
            self._fail(row, no_memory(row, error))
            return
        for row in rows:
            row.length += 1
        self._accept(lane, 0, logits)

    def _next_logits(self, lane: Lane) -> torch.Tensor:
        """What follows the last token of each row under way.  # (n, V)"""
        tokens, starts = [row.token_ids[-1] for row in lane.rows], [row.length for row in lane.rows]
        if self._compiled is not None and lane.peft_slot is None:
            return self._compiled.logits(lane.kv, tokens, starts, slots=[row.slot for row in lane.rows])
        self._choose(lane.rows, keep=True)
        return lane.kv.forward(0, [[token] for token in tokens], starts)

    def _choose(self, rows: list[Row], *, keep: bool) -> None:
        slots = [row.slot for row in rows]
        self.bank.choose(slots if any(slots) else None, keep=keep)

    def _accept(self, lane: Lane, first: int, logits: torch.Tensor) -> None:
        """Choose the next token of the rows from ``first`` on; those that end make room."""
        finite = logits.amax(-1).isfinite().tolist()
        likeliest = greedy_tokens(logits)
        for place in reversed(range(first, len(lane.rows))):
            row, at = lane.rows[place], place - first
            if not finite[at]:
                lane.kv.clear(place)
                self._fail(lane.remove(place), not_finite(row))
                continue
            token, logprobs = row.next_token(logits[at], likeliest[at])
            is_stop = token in self._stops
            self.tokens_generated += not is_stop
            if row.take(token, logprobs, is_stop=is_stop) is not None:
                self._finished(lane, place)

    def _finished(self, lane: Lane, place: int) -> None:
        row = lane.rows[place]
        if self.prefixes.wants(row.length):
            self._keep_prefix(lane, place)
        lane.remove(place)
        self._release(row)
        self._budget.keep_prefixes(self._lanes.values())

    def _keep_prefix(self, lane: Lane, place: int) -> None:
        row = lane.rows[place]
        try:
            stored = lane.kv.store(place, row.length)
        except out_of_memory():  # the answer is whole: only the next one like it would have been sooner
            return
        self.prefixes.put(row.parts.key, row.all_ids[: row.length], stored)

    def _drop_cancelled(self) -> None:
        waiting = list(self._waiting)  # at once: others append to it meanwhile
        for row in [row for row in waiting if row.handle.is_cancelled]:
            self._waiting.remove(row)
            self._release(row)
            row.end("cancelled")
        for lane in self._lanes.values():
            for place in reversed(range(len(lane.rows))):
                if lane.rows[place].handle.is_cancelled:
                    lane.rows[place].end("cancelled")
                    self._finished(lane, place)
            for row in [row for row in lane.entering if row.handle.is_cancelled]:
                lane.entering.remove(row)
                row.end("cancelled")
                self._release(row)
            if lane.reading is not None and lane.reading.handle.is_cancelled:
                lane.reading.end("cancelled")
                self._release(lane.reading)
                lane.stop_reading()

    # --- what rows hold ---

    def _fail(self, row: Row, error: QloraKitError) -> None:
        self._release(row)
        row.handle.fail(error)

    def _release(self, row: Row) -> None:
        self.requests_done += 1
        if row.slot:
            self._slots.release(row.parts.key)
            row.slot = 0
        name = row.parts.peft_slot
        if name is not None:
            self._peft_users[name] -= 1
            self._detach_if_done(name)

    def _detach_if_done(self, name: str) -> None:
        if name in self._dropped and self._peft_users[name] <= 0:
            self._dropped.discard(name)
            del self._peft_users[name]
            self.peft.detach(name)
