"""``check_gguf``: a file that was just written in, how llama.cpp and transformers agree on it out."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.architecture import read_architecture
from qlora_kit.base_files import BaseRef, read_model_config
from qlora_kit.conversation import Message
from qlora_kit.data.chat import render_prompts
from qlora_kit.data.rendering import render_texts
from qlora_kit.errors import ConfigError, DataError, GuardError
from qlora_kit.export.gguf_lora import AdaptedWeights
from qlora_kit.export.gguf_results import GgufCheck, GgufFile
from qlora_kit.export.gguf_weights import GgufWeights
from qlora_kit.merging.layerwise import Sequences, Weights, layerwise_logits
from qlora_kit.merging.probes import PROBES, compare_logits
from qlora_kit.merging.results import LogitDifference
from qlora_kit.merging.tensor_check import WrittenTensors
from qlora_kit.models import load_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

BINDING = "llama_cpp"
MAX_F32, MAX_F16, MIN_TOP1, MAX_KL = 1e-3, 2e-3, 0.95, 0.01
ANSWER_TOKENS = 24
_CHILD = Path(__file__).with_name("gguf_llama_child.py")
_LOGITS_BYTES = 128 * 2**20
_TIMEOUT_SECONDS = 3600
_FIX = "do not ship the file; report it with the base's name: the kit should have refused the export"
_TURNS = (
    (Message("user", "One?"), Message("assistant", "1"), Message("user", "Two?")),
    (Message("system", "Answer in one word."), Message("user", "  Spaces at both ends.  ")),
    (Message("user", "Write `f`.\n\n```python\ndef f(x):\n\treturn x**2  # 12345\n```"),),
    (Message("user", "Où est l'été ? Ça va, naïve Zoë ; 東京は 3 月。 Привет, it's WE'LL 👩‍💻🚀 ½"),),
)
TEXTS = (
    "Hello world",
    " a leading space, and  two",
    "line\n\nbreaks \n \t and\r\ntabs\t\t",
    "numbers 1 22 333 4444 55555 3.14 1,000,000",
    "I'VE you'd We'll they're IT'S 'tis",
    "snake_case CamelCase a+b==c; /* x */ <div class='a'>{}</div>",
    "éèêëçñüß 中文字符 русский العربية हिन्दी 🦙🦙 e\u200db",
)


@dataclass(frozen=True)
class _Probes:
    """What both sides are given, and what transformers makes of it."""

    conversations: list[list[Message]]
    rendered: list[str]
    texts: list[str]
    ids: list[list[int]]
    plain_ids: list[list[int]]
    sequences: Sequences

    def with_answers(self, answers: Sequence[Sequence[int]]) -> Sequences:
        """Prompts and answers, without the last token of each answer: nothing was chosen behind it."""
        return Sequences(
            [[*prompt, *ids[:-1]] for prompt, ids in zip(self.sequences.ids, answers, strict=True)],
            [kept + len(ids) - 1 for kept, ids in zip(self.sequences.kept, answers, strict=True)],
        )


def is_binding_installed() -> bool:
    """Whether llama-cpp-python is there, without which nothing is checked."""
    return find_spec(BINDING) is not None


def check_gguf(
    file: GgufFile,
    model_dir: Path,
    *,
    system_prompt: str | None = None,
    lora: GgufFile | None = None,
    adapter_dir: Path | None = None,
) -> GgufCheck:
    """Compare llama.cpp on a written file with transformers on what it was written from.

    - The file's own template, rendered by llama-cpp-python, gives the text that the model's tokenizer renders.
    - llama.cpp's token ids are the tokenizer's, for those texts (as the kit tokenises a prompt) and for others.
    - llama.cpp ends generation at each of the model's stop tokens, and its EOS ends a turn of the template.
    - The logits of conversations, against transformers' in fp32, which are computed a layer at a time: F32 within 1e-3;
      F16 within 2e-3 by its weights, and by llama.cpp's arithmetic within 2e-3 of the largest logit; Q8_0 with 95 % of
      the tokens of its greedy answers as transformers chooses them; other formats within 0.01 nats of transformers
      with the file's own weights.
      llama.cpp computes on the CPU here, and keeps keys and values in fp32.

    llama.cpp runs in a process of its own, and is given nothing but files of this process.

    Args:
        file: From ``write_gguf``.
        model_dir: What it was written from.
        system_prompt: What the model was trained with; the conversations begin with it.
        lora: From ``write_gguf_lora``, to be put on ``file``.
        adapter_dir: The adapter that ``lora`` was written from.

    Raises:
        ConfigError: llama-cpp-python is not installed, or does not start.
        GuardError: llama.cpp cannot load or compute what was written, or it is no longer what was written.
    """
    require_binding()
    tokenizer = load_tokenizer(BaseRef(str(model_dir), model_dir))
    probes = _probes(tokenizer, system_prompt)
    answer, output = _ask_llama(file, lora, probes)
    sequences = probes.with_answers(answer["answers"])
    found = list(output.split(list(sequences.kept)))
    expected, of_file = _reference_logits(file, model_dir, sequences, adapter_dir)
    logits, arithmetic = compare_logits(expected, found), compare_logits(of_file, found)
    lost = compare_logits(expected, of_file)
    largest = max(1.0, *(float(values.abs().max()) for values in of_file))
    stops, ends = set(file.stop_token_ids), set(answer["ends"])
    holds = {
        "the chat template renders otherwise": answer["rendered"] == probes.rendered,
        "token ids differ": answer["ids"] == probes.ids and answer["plain_ids"] == probes.plain_ids,
        "a stop token does not end generation": stops <= ends and answer["eos"] == file.stop_token_ids[0],
    }
    same_template, same_ids, same_stops = holds.values()
    agreeing = _agreeing_answers(answer["answers"], expected)
    bound, within = _judged(file.quant, (logits, lost, arithmetic), largest=largest, agreeing=agreeing)
    problems = [text for text, does in holds.items() if not does]
    problems += [] if within else [f"logits are outside their bound: {bound}"]
    return GgufCheck(
        passed=not problems,
        prompts=len(probes.texts) + len(probes.plain_ids),
        same_template=same_template,
        same_token_ids=same_ids,
        same_stop_tokens=same_stops,
        further_stop_ids=tuple(sorted(ends - stops)),
        answer_agreement=agreeing,
        logits=logits,
        weights=lost,
        arithmetic=arithmetic,
        bound=bound,
        problems=tuple(problems),
    )


def format_loss(file: GgufFile, model_dir: Path, *, system_prompt: str | None = None) -> LogitDifference:
    """What the file's format loses, without llama.cpp: transformers on its weights against transformers on the model.

    Args:
        file: From ``write_gguf``.
        model_dir: What it was written from.
        system_prompt: What the model was trained with; the conversations begin with it.

    Raises:
        GuardError: The file is no longer what was written.
    """
    file.require_unchanged()
    probes = _probes(load_tokenizer(BaseRef(str(model_dir), model_dir)), system_prompt)
    return compare_logits(*_reference_logits(file, model_dir, probes.sequences, None))


def require_binding() -> None:
    """Refuse a check that cannot be made.

    Raises:
        ConfigError: llama-cpp-python is not installed, or does not start.
    """
    if not is_binding_installed():
        raise ConfigError(
            "--check: llama-cpp-python is not installed, so llama.cpp cannot be asked",
            expected="the package llama-cpp-python",
            fix="pip install 'qlora-kit[gguf-test]', or export without --check",
        )
    started = subprocess.run(
        [sys.executable, "-P", "-c", f"import {BINDING}"], capture_output=True, text=True, errors="replace"
    )
    if started.returncode != 0:
        raise ConfigError(
            f"--check: llama-cpp-python does not start: {_last_lines(started.stderr)}",
            expected="a binding with its library",
            fix="pip install --force-reinstall llama-cpp-python, or set LLAMA_CPP_LIB_PATH to the library's folder",
        )


def require_agreement(check: GgufCheck, file: GgufFile) -> None:
    """Stop an export whose file is not the model.

    Raises:
        GuardError: With what does not hold.
    """
    if check.passed:
        return
    raise GuardError(
        f"{file.path.name}: llama.cpp and transformers disagree: {'; '.join(check.problems)} (largest logit difference "
        f"{check.logits.max_abs:.3g}, likeliest token the same at {check.logits.top1_agreement:.1%} of positions)",
        expected="the same template, token ids and stop tokens, and logits within the format's bound",
        fix=_FIX,
    )


def _agreeing_answers(answers: Sequence[Sequence[int]], expected: Sequence[torch.Tensor]) -> float:
    """The share of llama.cpp's answer tokens that transformers would have chosen, too."""
    same = sum(
        sum(int(found == number) for found, number in zip(logits[-len(ids) :].argmax(-1).tolist(), ids, strict=True))
        for ids, logits in zip(answers, expected, strict=True)
    )
    return same / sum(map(len, answers))


def _judged(
    quant: str, measured: tuple[LogitDifference, LogitDifference, LogitDifference], *, largest: float, agreeing: float
) -> tuple[str, bool]:
    """What is asked of the logits, in words, and whether it holds.

    llama.cpp rounds what it multiplies with 16-bit and quantized weights to fp16, bf16 or 8 bits: that is no property
    of the file, and grows with the logits. What 4 to 6 bits lose is reported, not judged.
    """
    logits, lost, arithmetic = measured
    if not math.isfinite(logits.max_abs):
        return "finite logits", False
    if quant == "f32":
        return f"largest difference at most {MAX_F32:g}", logits.max_abs <= MAX_F32
    if quant == "f16":
        bound = f"by the weights at most {MAX_F16:g}, by arithmetic {MAX_F16:g} of the largest logit ({largest:.3g})"
        return bound, lost.max_abs <= MAX_F16 and arithmetic.max_abs <= MAX_F16 * largest
    if quant == "q8_0":
        return f"{MIN_TOP1:.0%} of the tokens of answers as transformers chooses them", agreeing >= MIN_TOP1
    bound = f"by arithmetic a divergence of at most {MAX_KL:g} nats"
    return bound, arithmetic.kl <= MAX_KL


def _reference_logits(
    file: GgufFile, model_dir: Path, sequences: Sequences, adapter_dir: Path | None
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """transformers' logits in fp32: of the model, and of the model with the file's weights."""
    config = read_model_config(BaseRef(str(model_dir), model_dir))
    stored: Weights = GgufWeights(file.path, read_architecture(config, where=str(model_dir / "config.json")))
    with WrittenTensors(model_dir) as own:
        given: Weights = own
        if adapter_dir is not None:
            given, stored = AdaptedWeights(given, adapter_dir), AdaptedWeights(stored, adapter_dir)
        return layerwise_logits(model_dir, given, sequences), layerwise_logits(model_dir, stored, sequences)


def _probes(tokenizer: PreTrainedTokenizerBase, system_prompt: str | None) -> _Probes:
    opening = [Message("system", system_prompt)] if system_prompt else []
    listed = [[*opening, Message("user", text)] for text in PROBES]
    listed += [[*turns] if turns[0].role == "system" else [*opening, *turns] for turns in _TURNS]
    conversations, rendered, prompts = [], [], []
    for messages in listed:
        try:
            rendered += render_texts([messages], tokenizer, for_generation=True)
        except DataError:  # some templates take no system turn
            continue
        conversations.append(messages)
        prompts += render_prompts([messages], tokenizer)
    plain = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    return _Probes(
        conversations=conversations,
        rendered=rendered,
        texts=[*rendered, *TEXTS],
        ids=[*prompts, *plain],
        plain_ids=[tokenizer(text)["input_ids"] for text in TEXTS],
        sequences=Sequences.within_memory(prompts, vocabulary=len(tokenizer), max_bytes=_LOGITS_BYTES),
    )


def _ask_llama(file: GgufFile, lora: GgufFile | None, probes: _Probes) -> tuple[Mapping[str, Any], torch.Tensor]:
    """llama.cpp's answer, and its logits: (positions, vocabulary)."""
    import numpy as np
    import torch

    for written in (file, lora):
        if written is not None:
            written.require_unchanged()
    with tempfile.TemporaryDirectory(prefix="qlora-kit-") as folder:
        path = Path(folder) / "logits.npy"
        request = {
            "model": str(file.path),
            "lora": None if lora is None else str(lora.path),
            "conversations": [
                [{"role": message.role, "content": message.content} for message in messages]
                for messages in probes.conversations
            ],
            "texts": probes.texts,
            "plain": TEXTS,
            "prompts": probes.sequences.ids,
            "kept": probes.sequences.kept,
            "answer_tokens": ANSWER_TOKENS,
            "logits": str(path),
        }
        output = _run_child(json.dumps(request), file.path)
        logits = torch.from_numpy(np.load(path, allow_pickle=False))
    return json.loads(output), logits


def _run_child(request: str, path: Path) -> str:
    """Run the child, which is given the environment: it tells the binding where its library is."""
    try:
        done = subprocess.run(
            [sys.executable, "-P", str(_CHILD)],
            input=request,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise GuardError(
            f"{path.name}: llama.cpp did not answer within {_TIMEOUT_SECONDS // 60} minutes",
            expected="a check of a few minutes",
            fix="export without --check, or on a larger machine",
        ) from error
    if done.returncode == 0:
        return done.stdout
    reason = _last_lines(done.stderr)
    raise GuardError(f"{path.name}: llama.cpp refuses it: {reason}", expected="a file that it computes with", fix=_FIX)


def _last_lines(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " / ".join(lines[-3:])[-600:]
