"""Tries the fused path beside the libraries' own on one batch of a run: the same loss and gradients, in which time."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from qlora_kit.fast.unpadding import IGNORED
from qlora_kit.training.batch_rows import halved
from qlora_kit.training.position import RandomState
from qlora_kit.training.run_facts import StopRequested

if TYPE_CHECKING:
    from peft import PeftModel

    from qlora_kit.training.fast_switch import FastSwitch

Batch = Mapping[str, Any]
TIMED_PASSES = 2
MOST_TIME = 1.02
"""The fused path may take so much of the other's time, beyond which it is not used; two measurements differ by less."""


@dataclass(frozen=True)
class Limits:
    """How far the two paths may be apart, relatively.

    Attributes:
        loss: Of the losses.
        kind: Of the gradients of all layers' pairs of one kind, as one vector.
        whole: The same of modules that are trained whole.
        single: Of one weight's gradient, in which rounding counts more; of one much smaller than others of its kind,
            relatively to those.
    """

    loss: float
    kind: float
    whole: float
    single: float

    def of_kind(self, kind: str) -> float:
        """The limit of a kind of weights, by its name (``q_proj.lora_A``, ``norm.modules_to_save``)."""
        return self.kind if ".lora_" in kind else self.whole


IN_FP32 = Limits(loss=1e-4, kind=1e-3, whole=1e-3, single=1e-2)
"""Both paths agree to some 1e-6."""
IN_16_BITS = Limits(loss=1e-2, kind=0.1, whole=0.3, single=0.6)
"""In 28 random layers in bf16, over 72 settings and seeds, kinds are 2 to 6 % apart and single weights up to 43 %; from
fp32, either path 5 to 32 % and up to 43 %. The last norm of `tiny`, trained whole, is 11 % apart, since TRL's head sums
what it gets in 16 bits: 8.5 % off fp32, where the fused path is 1.7 % off. A gradient that is doubled or left out is
100 % off."""
_LEAST_NORM = 0.25
"""Of the root mean square of a kind's norms: what is smaller is mostly rounding, and was up to 61 % apart."""
_B_SHARE = 0.1
"""What a pair that begins at zero adds for the trial, beside its input; with as much as that, random pairs of a high
scaling would drown the base, and the two paths would be apart by their rounding alone."""
_B_SCALE = 0.01
_SEED = 0
_LEAST_TOKENS = 16


@dataclass(frozen=True)
class Passes:
    """A path's passes over one batch.

    Attributes:
        loss: Of the last one.
        gradients: Of each trained weight in it, in host memory.
        seconds: Of the fastest one, forward and backward.
        peak_bytes: What torch had allocated at most, of GPU memory; None on a CPU.
    """

    loss: float
    gradients: Mapping[str, torch.Tensor]
    seconds: float
    peak_bytes: int | None


@dataclass(frozen=True)
class Trial:
    """What came of it.

    Attributes:
        tokens: Rows and length of the batch that both were tried on.
        refusal: Why the fused path is not to be used; None where it is.
        found: How the two compare, in words.
    """

    tokens: tuple[int, int]
    refusal: str | None
    found: str

    def __str__(self) -> str:
        rows, length = self.tokens
        return f"tried on {rows} x {length} tokens: {self.found}"


def try_both(fast: FastSwitch, model: PeftModel, batch: Batch, one_pass: Callable[[Batch], torch.Tensor]) -> Trial:
    """Compare the two paths on a batch like ``batch``, or on as much of it as there is memory for.

    Its tokens are random: of answers that are learned already, rounding decides the 16-bit gradients. Dropout is off
    meanwhile, since its masks are others on each path, and pairs that begin at zero are not zero, so that every
    gradient counts. All this is put back, and the path in use; random states and gradients are the caller's.

    Args:
        fast: Of the model.
        model: The one that is trained, in train mode.
        batch: On the model's device; its rows, padding and supervised tokens are those of the trial.
        one_pass: The loss of a batch, after its forward and backward pass.

    Raises:
        StopRequested: ``one_pass`` did.
    """
    used, base = fast.used, model.get_base_model()
    if not _supervised(batch):
        return Trial(tuple(batch["input_ids"].shape), "no token of the batch is supervised", "not compared")
    if base.config.to_dict().get("attention_dropout"):
        return Trial(tuple(batch["input_ids"].shape), "attention_dropout draws other masks on it", "not compared")
    try:
        with _without_dropout(model), _no_zeros(model):
            return _tried(fast, model, _with_random_tokens(batch, base.config.vocab_size), one_pass)
    finally:
        fast.use(used)


def _tried(fast: FastSwitch, model: PeftModel, batch: Batch, one_pass: Callable[[Batch], torch.Tensor]) -> Trial:
    while True:
        rows, length = batch["input_ids"].shape
        try:
            plain, fused = _both(fast, model, batch, one_pass)
        except torch.OutOfMemoryError:
            if fast.used:  # the other one has been through the same batch already
                return Trial((rows, length), "it takes more memory here than the libraries' own path", "out of memory")
            less = halved(batch)
            enough = (rows > 1 or length >= 2 * _LEAST_TOKENS) and _supervised(less)
        except StopRequested:
            raise
        except Exception as error:  # whatever it is, the libraries' own path may do without it
            if not fast.used:
                raise
            what = (str(error) or "no message").splitlines()[0]
            return Trial((rows, length), f"it fails here ({type(error).__name__}: {what})", "it failed")
        else:
            return _compared(plain, fused, (rows, length), dtype=model.get_base_model().dtype)
        model.zero_grad()  # out here, where no traceback holds the tensors of the attempt
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if not enough:
            return Trial((rows, length), "there is no memory to try it", "out of memory")
        batch = less


def _supervised(batch: Mapping[str, Any]) -> bool:
    """Whether anything of it counts: without that both paths give zeros, which are always alike."""
    return bool((batch["labels"] != IGNORED).any())


def _both(
    fast: FastSwitch, model: PeftModel, batch: Batch, one_pass: Callable[[Batch], torch.Tensor]
) -> tuple[Passes, Passes]:
    """Passes of the libraries' path and of the fused one, in turns; the first of each is slow and does not count."""
    random = RandomState.current()
    best: dict[bool, Passes] = {}
    for turn in range(1 + TIMED_PASSES):
        for fused in (False, True):
            fast.use(fused)
            random.restore()
            now = _measured(model, batch, one_pass)
            before = best.get(fused)
            if before is None or turn == 1 or now.seconds < before.seconds:
                best[fused] = now
    return best[False], best[True]


def _measured(model: PeftModel, batch: Batch, one_pass: Callable[[Batch], torch.Tensor]) -> Passes:
    model.zero_grad()
    device = batch["input_ids"].device
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    loss = one_pass(dict(batch))
    if on_gpu:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - began
    gradients = {
        name: weight.grad.detach().to("cpu", copy=True)
        for name, weight in model.named_parameters()
        if weight.grad is not None
    }
    return Passes(float(loss), gradients, seconds, torch.cuda.max_memory_allocated(device) if on_gpu else None)


def _compared(plain: Passes, fused: Passes, tokens: tuple[int, int], *, dtype: torch.dtype) -> Trial:
    limits = _limits(dtype)
    loss_distance = abs(fused.loss - plain.loss) / (abs(plain.loss) or 1.0)
    kind, of_kind, limit = _farthest(plain.gradients, fused.gradients, limits.of_kind, by=_kind)
    name, of_single, _ = _farthest(
        plain.gradients, fused.gradients, lambda _: limits.single, by=str, least=_least_norms(plain.gradients)
    )
    time_ratio = fused.seconds / plain.seconds
    found = f"gradients {of_kind:.1g} apart (at most {limit:g}), {time_ratio:.2f} of the time"
    if plain.peak_bytes is not None and fused.peak_bytes is not None:
        found += f", peak {fused.peak_bytes / 1e9:.2f} GB instead of {plain.peak_bytes / 1e9:.2f}"
    refusal = None
    if not loss_distance <= limits.loss:  # so that NaN is refused too
        refusal = f"its loss is {fused.loss:.6g} and should be {plain.loss:.6g}"
    elif not of_kind <= limit:
        refusal = f"its gradients of {kind} are too far off"
    elif not of_single <= limits.single:
        refusal = f"its gradient of {name} is too far off"
    elif time_ratio > MOST_TIME:
        refusal = "it is slower here"
    return Trial(tokens, refusal, found)


def _limits(dtype: torch.dtype) -> Limits:
    """For a base in ``dtype``; with ``train.tf32`` a GPU multiplies numbers of 32 bits with the digits of 16."""
    exact = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"
    return IN_FP32 if exact else IN_16_BITS


def _least_norms(gradients: Mapping[str, torch.Tensor]) -> Mapping[str, float]:
    """By weight, the norm that its gradient counts with at least."""
    squares: dict[str, list[float]] = defaultdict(list)
    for name, gradient in gradients.items():
        squares[_kind(name)].append(float(gradient.double().square().sum()))
    return {name: _LEAST_NORM * math.sqrt(fmean(squares[_kind(name)])) for name in gradients}


def _farthest(
    plain: Mapping[str, torch.Tensor],
    fused: Mapping[str, torch.Tensor],
    limit: Callable[[str], float],
    *,
    by: Callable[[str], str],
    least: Mapping[str, float] | None = None,
) -> tuple[str, float, float]:
    """The group of weights, by ``by`` of their names, whose gradients are nearest to their limit or beyond it most.

    Args:
        plain: Each weight's, by the libraries' own path.
        fused: By the other.
        limit: From a group's name to how far its gradients may be apart, relatively.
        by: From a weight's name to that of its group.
        least: By group, the norm that it counts with if its own is smaller.

    Returns:
        Its name, how far its gradients are apart, and its limit.
    """
    if plain.keys() != fused.keys():
        name = min(plain.keys() ^ fused.keys())
        return name, math.inf, limit(by(name))
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for name, gradient in plain.items():
        group = sums[by(name)]
        group[0] += float((fused[name] - gradient).double().square().sum())
        group[1] += float(gradient.double().square().sum())
    norms = {group: max(math.sqrt(whole), 0.0 if least is None else least[group]) for group, (_, whole) in sums.items()}
    distances = {group: math.sqrt(off) / (norms[group] or 1.0) for group, (off, _) in sums.items()}
    shares = {group: distance / limit(group) for group, distance in distances.items()}
    worst = max(shares, key=lambda group: math.inf if math.isnan(shares[group]) else shares[group])
    return worst, distances[worst], limit(worst)


def _kind(name: str) -> str:
    """``q_proj.lora_A`` of ``base_model.model.model.layers.3.self_attn.q_proj.lora_A.default.weight``."""
    return ".".join(part for part in name.split(".")[-4:] if part not in ("default", "weight"))


def _with_random_tokens(batch: Batch, vocabulary: int) -> dict[str, Any]:
    ids, labels = batch["input_ids"], batch["labels"]
    drawn = torch.randint(vocabulary, ids.shape, generator=torch.Generator().manual_seed(_SEED)).to(ids)
    return {**batch, "input_ids": drawn, "labels": torch.where(labels == IGNORED, labels, drawn)}


@contextmanager
def _without_dropout(model: torch.nn.Module) -> Iterator[None]:
    modules = [module for module in model.modules() if isinstance(module, torch.nn.Dropout) and module.training]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module in modules:
            module.train()


@contextmanager
def _no_zeros(model: torch.nn.Module) -> Iterator[None]:
    """Inside the block no trained weight is all zeros, as B is at the start: A would have no gradient."""
    source = torch.Generator().manual_seed(_SEED)
    scales = _scales_of_b(model)
    zeros = [weight for weight in model.parameters() if weight.requires_grad and not weight.any()]
    with torch.no_grad():
        for weight in zeros:
            weight.copy_(torch.randn(weight.shape, generator=source).mul_(scales.get(weight, _B_SCALE)))
    try:
        yield
    finally:
        with torch.no_grad():
            for weight in zeros:
                weight.zero_()


def _scales_of_b(model: torch.nn.Module) -> dict[torch.Tensor, float]:
    """By each pair's B, the deviation with which the pair adds ``_B_SHARE`` of its input, whatever rank and scaling.

    PEFT draws A so that A·x has 1/√3 of the deviation of x.
    """
    from peft.tuners.lora import LoraLayer

    return {
        pair.weight: _B_SHARE * math.sqrt(3 / layer.r[name]) / abs(layer.scaling[name] or 1.0)
        for layer in model.modules()
        if isinstance(layer, LoraLayer)
        for name, pair in layer.lora_B.items()
    }
