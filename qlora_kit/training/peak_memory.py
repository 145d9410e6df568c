"""The most memory that this process has held so far, where the model lies."""

from __future__ import annotations

import torch

from qlora_kit.host_memory import peak_rss_bytes


def peak_memory_bytes() -> int:
    """Peak memory: allocated on the GPU where there is one, else resident in the process.

    A trial of the fused path begins to count anew with each pass: on a GPU it is the peak since then.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return peak_rss_bytes()
