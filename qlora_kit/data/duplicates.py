"""Finds conversations seen before, by their digests, in at most 32 bytes of memory a row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from qlora_kit.conversation import Example, Message

DIGEST_BYTES = 16
BUCKET_BITS = 12


def example_digest(example: Example) -> bytes:
    """128-bit digest of what a model learns from an example; equal for exact duplicates.

    Tool calls count by name and arguments, not by their ids, which differ where nothing else does.
    """
    if example.text is not None:
        return _digest(["text", example.text])
    if example.tools or any(message.tool_calls or message.name is not None for message in example.messages):
        turns = [
            (message.role, message.content, message.name, [(call.name, call.arguments) for call in message.tool_calls])
            for message in example.messages
        ]
        return _digest([example.tools, turns])
    return conversation_digest(example.messages)


def conversation_digest(messages: Sequence[Message]) -> bytes:
    """128-bit digest of the roles and texts of all turns."""
    return _digest([(message.role, message.content) for message in messages])


def _digest(value: list[Any]) -> bytes:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=DIGEST_BYTES).digest()


class DigestSet:
    """A set of digests, packed end to end in buckets: about 18 bytes each, where a Python set needs over 80."""

    def __init__(self) -> None:
        self._buckets = [bytearray() for _ in range(1 << BUCKET_BITS)]

    def add(self, digest: bytes) -> bool:
        """Adds ``digest``; returns whether it is new."""
        if digest in self:
            return False
        self._bucket(digest).extend(digest)
        return True

    def __contains__(self, digest: bytes) -> bool:
        bucket = self._bucket(digest)
        position = bucket.find(digest)
        while position % DIGEST_BYTES and position >= 0:  # a match across two neighbours is no match
            position = bucket.find(digest, position + 1)
        return position >= 0

    def _bucket(self, digest: bytes) -> bytearray:
        return self._buckets[int.from_bytes(digest[:2], "big") >> (16 - BUCKET_BITS)]
