"""Verifies a written merge from its files: every tensor, then the logits of the model, a layer at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.base_files import BaseRef
from qlora_kit.checkpoint import torch_dtype
from qlora_kit.errors import BaseModelError, Fault, GuardError
from qlora_kit.merging.arithmetic import half_ulp
from qlora_kit.merging.layerwise import Adjust, Sequences, layerwise_logits, plan_logits
from qlora_kit.merging.planning import MergePlan
from qlora_kit.merging.probes import compare_logits, probe_prompts
from qlora_kit.merging.results import LogitDifference, MetricCheck, RowsCheck, TensorCheck, Verification
from qlora_kit.merging.rows import ValidationRows, rows_loss
from qlora_kit.merging.tensor_check import WrittenTensors, check_tensors
from qlora_kit.merging.writing import changes_nothing
from qlora_kit.models import load_tokenizer

if TYPE_CHECKING:
    import torch

    from qlora_kit.data.encoding import Encoded

MAX_SHOWN = 10
# The noise is one draw of rounding errors, the merge another: maxima of two draws differ more than their means.
MAX_FACTOR = 3.0
MEAN_FACTOR = 2.0
ARITHMETIC_FLOOR = 2.0**-20  # of the largest logit: fp32 sums in another order
LOGITS_BYTES = 64 * 2**20
_NOISE_SEED = 0
_FIX = "merge again; if it fails again, the disk, the memory or a library version is at fault: nothing was kept"


def verify_merge(plan: MergePlan, folder: Path, rows: ValidationRows | str) -> Verification:
    """Measure the checkpoint in ``folder`` against the base it was merged onto + the adapter.

    The gate, both parts of it:

    - Tensors. A targeted weight w is right if ``|w - (base used + Δ)| <= half a unit in the last place of its dtype +
      2 (r + 2) 2^-24 (|base used| + scaling |B| |A|)``: one rounding, and what two fp32 evaluations of the sum may
      differ by (DoRA: the same times each row's factor, plus 2^-18 for the row's length). A weight that is only
      quantized must equal its round trip (or the dequantized weight of the base's 4-bit file), rounded once, bit by
      bit; an embedding or head with trained rows its source with these rows, rounded once; a tensor that the adapter
      brings whole the adapter's, rounded once; every other tensor its source, byte by byte.
    - Logits, on fixed conversations, of the written model against base + adapter without any rounding, both in fp32.
      The limits come from the same run: each weight that the merge rounded is shifted by a random half unit in the last
      place at most, which is what one rounding does. Three times the maximum and twice the mean difference that this
      makes are allowed, plus 2^-20 of the largest logit for fp32 sums in another order. The written tokenizer must
      give the same prompts.

    On validation rows, where there are any, the same limits hold at the positions that predict their answers.

    Models are computed a layer at a time. Where the vocabulary is so large that the logits of all positions take more
    than ``LOGITS_BYTES``, only the last positions of each conversation are compared; their number is reported.

    Drift is the same distance to the model as trained. For ``dequantized`` that model is the reference itself (4-bit
    base + adapter), so the gate covers it; for ``original`` it is reported.

    Args:
        plan: The merge.
        folder: The written checkpoint.
        rows: The adapter's validation rows, or why there are none.

    Returns:
        What was measured; ``passed`` says whether the gate holds.

    Raises:
        GuardError: A tensor is wrong, or the written files cannot be read back.
        AdapterError: The adapter changes no logit.
    """
    with _damaged_output(folder):
        tensors = check_tensors(plan, folder)
    _require_right(tensors)
    prompts = probe_prompts(load_tokenizer(plan.base), _system_prompt(plan))
    probes = Sequences.within_memory(prompts, vocabulary=plan.vocabulary, max_bytes=LOGITS_BYTES)
    encoded = () if isinstance(rows, str) else rows.encoded
    answers = Sequences.of_answers(encoded)
    sequences = Sequences([*probes.ids, *answers.ids], [*probes.kept, *answers.kept])
    expected = _Logits.of(plan_logits(plan, sequences, four_bit=plan.onto == "dequantized"), prompts)
    floor = ARITHMETIC_FLOOR * max(float(values.abs().max()) for values in (*expected.probes, *expected.rows))
    effect = _effect(plan, probes, expected, floor)
    with _damaged_output(folder):
        same_prompts = _same_prompts(plan, folder, prompts)
        with WrittenTensors(folder) as weights:
            written = _Logits.of(layerwise_logits(folder, weights, sequences, device=plan.device), prompts)
            logits = _Distance.of(expected, written, encoded)
            del expected  # of two models at a time, logits are held, no more
            shifted = layerwise_logits(folder, weights, sequences, adjust=_shifts(plan), device=plan.device)
            noise = _Distance.of(written, _Logits.of(shifted, prompts), encoded)
            del shifted
    drift = logits if _merged_as_trained(plan) else None
    if drift is None and plan.contract is not None:
        trained = _Logits.of(plan_logits(plan, sequences, four_bit=True), prompts)
        drift = _Distance.of(trained, written, encoded)
    on_rows = rows if isinstance(rows, str) else _on_rows(rows, logits, noise, drift)
    passed = same_prompts and _within(logits.probes, noise.probes, floor)
    if not isinstance(on_rows, str):
        passed = passed and _within(on_rows.logits, on_rows.noise, floor)
    max_limit, mean_limit = _limits(noise.probes, floor)
    return Verification(
        passed=passed,
        tensors=tensors,
        logits=logits.probes,
        noise=noise.probes,
        effect=effect,
        max_limit=max_limit,
        mean_limit=mean_limit,
        drift=None if drift is None else drift.probes,
        on_rows=on_rows,
        answers=MetricCheck("nothing was generated"),
    )


@dataclass(frozen=True)
class _Logits:
    """One model's logits: of the probe conversations, and of the validation rows."""

    probes: list[torch.Tensor]
    rows: list[torch.Tensor]

    @classmethod
    def of(cls, logits: list[torch.Tensor], prompts: Sequence[Sequence[int]]) -> _Logits:
        return cls(logits[: len(prompts)], logits[len(prompts) :])


@dataclass(frozen=True)
class _Distance:
    """How far one model's logits are from a reference's, and the reference's loss on the validation rows."""

    probes: LogitDifference
    rows: LogitDifference | None
    reference_loss: float | None

    @classmethod
    def of(cls, reference: _Logits, other: _Logits, rows: Sequence[Encoded]) -> _Distance:
        probes = compare_logits(reference.probes, other.probes)
        if not rows:
            return cls(probes, None, None)
        return cls(probes, compare_logits(reference.rows, other.rows), rows_loss(rows, reference.rows).mean)


def _limits(noise: LogitDifference, floor: float) -> tuple[float, float]:
    """What the largest and the mean difference may be."""
    return MAX_FACTOR * noise.max_abs + floor, MEAN_FACTOR * noise.mean_abs + floor


def _within(logits: LogitDifference, noise: LogitDifference, floor: float) -> bool:
    max_limit, mean_limit = _limits(noise, floor)
    return isfinite(logits.max_abs) and logits.max_abs <= max_limit and logits.mean_abs <= mean_limit


def _effect(plan: MergePlan, probes: Sequences, expected: _Logits, floor: float) -> LogitDifference | None:
    """What the adapter does to the logits; of a trained base, what its 4 bits do to them.

    Raises:
        AdapterError: Nothing.
    """
    if plan.adapter is None and plan.packed:
        return None
    four_bit = plan.adapter is not None and plan.onto == "dequantized"
    bare = plan_logits(plan, probes, four_bit=four_bit, with_adapter=False)
    columns = bare[0].shape[-1]  # a resized vocabulary has others
    effect = compare_logits([logits[:, :columns] for logits in expected.probes], bare)
    if plan.adapter is not None and effect.max_abs <= floor:
        raise changes_nothing(plan, f"no logit of the probe conversations moves by more than {floor:.1g}")
    return effect


def _on_rows(rows: ValidationRows, logits: _Distance, noise: _Distance, drift: _Distance | None) -> RowsCheck:
    """The three distances on rows; the reference of ``noise`` is the written model."""
    if logits.rows is None or noise.rows is None or logits.reference_loss is None or noise.reference_loss is None:
        raise ValueError("there are validation rows, but none of them was measured")
    return RowsCheck(
        rows=len(rows.encoded),
        logits=logits.rows,
        noise=noise.rows,
        drift=None if drift is None else drift.rows,
        loss=noise.reference_loss,
        expected_loss=logits.reference_loss,
        trained_loss=None if drift is None else drift.reference_loss,
    )


def require_passed(verification: Verification, plan: MergePlan) -> None:
    """Stop a merge that failed.

    Raises:
        GuardError: With what the logits differ by.
    """
    if verification.passed:
        return
    logits = verification.logits
    raise GuardError(
        f"the written model is not {_wanted(plan)}: logits differ by {logits.max_abs:.3g} at most and "
        f"{logits.mean_abs:.3g} in the mean, or its tokenizer renders the probes otherwise",
        expected=f"at most {verification.max_limit:.3g} and {verification.mean_limit:.3g}, and equal prompts",
        fix=_FIX,
    )


def _wanted(plan: MergePlan) -> str:
    return f"{plan.base.id} in 4 bits" if plan.adapter is None else f"{plan.base.id} + the adapter"


def _require_right(tensors: TensorCheck) -> None:
    wrong = tensors.violations
    faults = [Fault(text, "what base and adapter make", _FIX) for text in wrong[:MAX_SHOWN]]
    if len(wrong) > MAX_SHOWN:
        faults.append(Fault(f"... and {len(wrong) - MAX_SHOWN} more tensors", "none", _FIX))
    if faults:
        raise GuardError.of(faults)


@contextmanager
def _damaged_output(folder: Path) -> Iterator[None]:
    """What was just written and cannot be read back is a failed verification, not the user's mistake."""
    try:
        yield
    except BaseModelError as error:
        what = f"{folder.name}: what was written cannot be read back: {error.faults[0].what}"
        raise GuardError(what, expected="a complete checkpoint", fix=_FIX) from error


def _same_prompts(plan: MergePlan, folder: Path, prompts: list[list[int]]) -> bool:
    """A resized vocabulary comes with a tokenizer of its own."""
    written = probe_prompts(load_tokenizer(BaseRef("merged", folder)), _system_prompt(plan))
    return "vocab_size" in plan.config or written == prompts


def _shifts(plan: MergePlan) -> Adjust:
    """Shifts each weight that the merge rounded by a random half unit, at most, in the last place of its file."""
    import torch

    generator = torch.Generator().manual_seed(_NOISE_SEED)

    def shift(name: str, numbers: Sequence[int], rows: torch.Tensor) -> torch.Tensor:
        if name in plan.token_rows:
            trained = set(plan.token_rows[name].ids)
            inside = [place for place, number in enumerate(numbers) if number in trained]
        elif plan.target(name) is not None or plan.round_trips(name) or name in plan.replaced:
            inside = list(range(len(rows)))
        else:
            return rows
        if inside:
            chosen = rows[inside]
            rows[inside] = chosen + _rounding(chosen, torch_dtype(plan.specs[name].dtype), generator)
        return rows

    return shift


def _rounding(weight: torch.Tensor, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """A random half unit in the last place of ``dtype``, at most, for each number of ``weight``."""
    import torch

    share = torch.rand(weight.shape, generator=generator) * 2 - 1
    # Less than a whole unit of fp32, the model's own dtype, would be lost in the addition.
    return share * torch.maximum(half_ulp(weight, dtype), 2 * half_ulp(weight, torch.float32))


def _merged_as_trained(plan: MergePlan) -> bool:
    """Whether the base used is that of training: the 4-bit one, or the original one where the contract says so."""
    return plan.onto == "dequantized" or (plan.contract is not None and not plan.quantization.load_in_4bit)


def _system_prompt(plan: MergePlan) -> str | None:
    return None if plan.contract is None else plan.contract.system_prompt
