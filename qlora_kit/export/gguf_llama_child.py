"""llama.cpp in a process of its own: a request as JSON on stdin in, an answer as JSON and logits in a file out.

It runs as a plain script, with nothing of the kit but this file: llama.cpp ends its process at what it does not like.
The request names the ``model``, a ``lora`` or null, ``conversations`` (messages), ``texts``, ``plain`` texts that get
the tokens around them, ``prompts`` of token ids with the number of last positions ``kept`` of each, how many
``answer_tokens`` to add to each greedily, and where the ``logits`` go: one fp32 array (numpy's own
format) of all kept positions and of those that the answers were chosen at.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from typing import Any

import numpy as np

KEY_BYTES = 1 << 22
F32 = 0


def main() -> None:
    """Answer one request."""
    request = json.load(sys.stdin)
    answers = sys.stdout
    sys.stdout = sys.stderr  # the binding prints
    from llama_cpp import llama_cpp as lib

    lib.llama_backend_init()
    parameters = lib.llama_model_default_params()
    parameters.n_gpu_layers = 0
    parameters.check_tensors = True
    parameters.use_extra_bufts = False
    model = lib.llama_model_load_from_file(request["model"].encode(), parameters)
    if not model:
        raise SystemExit("llama.cpp cannot load the file")
    vocabulary = lib.llama_model_get_vocab(model)
    size = lib.llama_vocab_n_tokens(vocabulary)
    template = metadata(lib, model, "tokenizer.chat_template")
    names = {
        kind: lib.llama_vocab_get_text(vocabulary, number).decode()
        for kind, number in (("bos", lib.llama_vocab_bos(vocabulary)), ("eos", lib.llama_vocab_eos(vocabulary)))
    }
    answer = {
        "rendered": [rendered(template, names, messages) for messages in request["conversations"]],
        "ids": [token_ids(lib, vocabulary, text, around=False) for text in request["texts"]],
        "plain_ids": [token_ids(lib, vocabulary, text, around=True) for text in request["plain"]],
        "ends": [number for number in range(size) if lib.llama_vocab_is_eog(vocabulary, number)],
        "eos": lib.llama_vocab_eos(vocabulary),
    }
    logits, answer["answers"] = logits_of(lib, model, request, set(answer["ends"]))
    np.save(request["logits"], logits)
    json.dump(answer, answers)


def metadata(lib: Any, model: Any, key: str) -> str:
    """A text of the file's header."""
    buffer = ctypes.create_string_buffer(KEY_BYTES)
    if lib.llama_model_meta_val_str(model, key.encode(), buffer, KEY_BYTES) < 0:
        raise SystemExit(f"the file has no {key}")
    return buffer.value.decode()


def rendered(template: str, names: dict[str, str], messages: list[dict[str, str]]) -> str | None:
    """The conversation as the binding renders it, with an assistant turn opened; None where the template refuses it."""
    import jinja2
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    formatter = Jinja2ChatFormatter(template=template, eos_token=names["eos"], bos_token=names["bos"])
    try:
        return formatter(messages=messages).prompt
    except (ValueError, jinja2.TemplateError):
        return None


def token_ids(lib: Any, vocabulary: Any, text: str, *, around: bool) -> list[int]:
    """Token ids of a text, control tokens in it as such; ``around``: with BOS and EOS as the file says."""
    content = text.encode()
    room = len(content) + 8
    buffer = (lib.llama_token * room)()
    count = lib.llama_tokenize(vocabulary, content, len(content), buffer, room, around, True)
    if count < 0:
        raise SystemExit("llama.cpp cannot tokenise a text")
    return list(buffer[:count])


def logits_of(lib: Any, model: Any, request: dict[str, Any], ends: set[int]) -> tuple[np.ndarray, list[list[int]]]:
    """The logits of the wanted positions, one prompt after the other, (positions, vocabulary); and the answers."""
    longest = max(len(ids) for ids in request["prompts"]) + request["answer_tokens"]
    parameters = lib.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = longest
    parameters.n_seq_max = 1
    parameters.n_threads = parameters.n_threads_batch = max(1, (os.cpu_count() or 1) // 2)  # real cores
    parameters.type_k = parameters.type_v = F32  # by default fp16, which is llama.cpp's choice and not the file's
    parameters.flash_attn_type = 0
    parameters.offload_kqv = False
    context = lib.llama_init_from_model(model, parameters)
    if not context:
        raise SystemExit("llama.cpp cannot make a context")
    if request["lora"] is not None:
        add_adapter(lib, model, context, request["lora"])
    size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    parts: list[np.ndarray] = []
    answers: list[list[int]] = []
    for ids, kept in zip(request["prompts"], request["kept"], strict=True):
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        parts.append(decode(lib, context, ids, 0, kept, size))
        answers.append([])
        while True:
            answers[-1].append(int(parts[-1][-1].argmax()))
            if answers[-1][-1] in ends or len(answers[-1]) == request["answer_tokens"]:
                break
            parts.append(decode(lib, context, answers[-1][-1:], len(ids) + len(answers[-1]) - 1, 1, size))
    return np.concatenate(parts), answers


def add_adapter(lib: Any, model: Any, context: Any, path: str) -> None:
    """Put an adapter on the context, as it is."""
    adapter = lib.llama_adapter_lora_init(model, path.encode())
    if not adapter:
        raise SystemExit("llama.cpp cannot load the adapter")
    adapters = (lib.llama_adapter_lora_p_ctypes * 1)(adapter)
    if lib.llama_set_adapters_lora(context, adapters, 1, (ctypes.c_float * 1)(1.0)) != 0:
        raise SystemExit("llama.cpp cannot use the adapter")


def decode(lib: Any, context: Any, ids: list[int], start: int, kept: int, size: int) -> np.ndarray:
    """Put tokens behind the ``start`` that the context holds; the logits of the last ``kept`` of them: (kept, size)."""
    batch = lib.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for place, number in enumerate(ids):
        batch.token[place], batch.pos[place] = number, start + place
        batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
        batch.logits[place] = place >= len(ids) - kept
    if lib.llama_decode(context, batch) != 0:
        raise SystemExit("llama.cpp cannot compute a sequence")
    rows = [
        np.ctypeslib.as_array(lib.llama_get_logits_ith(context, place), (size,)).copy()
        for place in range(len(ids) - kept, len(ids))
    ]
    lib.llama_batch_free(batch)
    return np.stack(rows)


if __name__ == "__main__":
    main()
