"""What an engine does now and did so far, in numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineStats:
    """What the engine does now, and what it did since it was made.

    Attributes:
        running: Requests in the batch.
        waiting: Requests that have not joined it.
        slots_used: Slots of device memory that hold an adapter, a scaled one, or a sum.
        adapters_loaded: Adapters in host memory, those that go through PEFT included.
        requests_done: Requests that ended, well or not.
        tokens_generated: Without stop tokens.
        prompt_tokens: Of all requests that joined.
        prompt_tokens_reused: Those of them whose keys and values were there already.
        prefix_bytes: What is kept for that.
        kv_bytes: Memory of the keys and values of requests under way.
        kv_budget_bytes: What those two may come to; requests that would exceed it wait.
        bank_bytes: Device memory of the slots.
    """

    running: int
    waiting: int
    slots_used: int
    adapters_loaded: int
    requests_done: int
    tokens_generated: int
    prompt_tokens: int
    prompt_tokens_reused: int
    prefix_bytes: int
    kv_bytes: int
    kv_budget_bytes: int
    bank_bytes: int
