"""Verifies a written merge from its files: every tensor against PEFT's live model, then the logits of whole models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.base_files import BaseRef
from qlora_kit.checkpoint import TensorSource, torch_dtype
from qlora_kit.config import QuantizationSection
from qlora_kit.errors import BaseModelError, Fault, GuardError
from qlora_kit.merging.arithmetic import half_ulp, rounding_bound
from qlora_kit.merging.planning import MergePlan
from qlora_kit.merging.probes import compare_logits, probe_logits, probe_prompts
from qlora_kit.merging.reference import Reference
from qlora_kit.merging.results import LogitDifference, TensorCheck, Verification
from qlora_kit.merging.token_rows import TrainedRows
from qlora_kit.merging.writing import LoraFactors, changes_nothing
from qlora_kit.models import load_base_model, load_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

MAX_SHOWN = 10
# The noise is one draw of rounding errors, the merge another: maxima of two draws differ more than their means.
MAX_FACTOR = 3.0
MEAN_FACTOR = 2.0
ARITHMETIC_FLOOR = 2.0**-20  # of the largest logit: fp32 sums in another order
_NOISE_SEED = 0
_FIX = "merge again; if it fails again, the disk, the memory or a library version is at fault: nothing was kept"


def verify_merge(plan: MergePlan, folder: Path, *, factors: dict[str, LoraFactors]) -> Verification:
    """Measure the checkpoint in ``folder`` against the base it was merged onto + the adapter.

    The gate, both parts of it:

    - Tensors. A targeted weight w is right if ``|w - (base used + Δ)| <= half a unit in the last place of its dtype +
      2 (r + 2) 2^-24 (|base used| + scaling |B| |A|)``, with base used and Δ taken from the model that PEFT holds: one
      rounding, and what two fp32 evaluations of the sum may differ by. A weight that is only quantized must equal its
      round trip (or the dequantized weight of the base's 4-bit file), rounded once, bit by bit; an embedding or head
      with trained rows its source with these rows, rounded once; every other tensor its source, byte by byte.
    - Logits, on fixed conversations, of the written model in fp32 against the unmerged fp32 reference. The limits come
      from the same run: each adapted weight of the written model is shifted by a random half unit in the last place at
      most, which is what one rounding does. Three times the maximum and twice the mean difference that this makes are
      allowed, plus 2^-20 of the largest logit for fp32 sums in another order. The written tokenizer must give the same
      prompts.

    Drift is the same distance to the model as trained. For ``dequantized`` that model is the reference itself (4-bit
    base + adapter), so the gate covers it; for ``original`` it is reported.

    Args:
        plan: The merge.
        folder: The written checkpoint.
        factors: The adapter's pairs by module, for the bound of the sum.

    Returns:
        What was measured; ``passed`` says whether the gate holds.

    Raises:
        GuardError: The written files cannot be read back.
        AdapterError: The 4-bit codes at hand are not those of training, or the adapter changes no logit.
    """
    prompts = probe_prompts(load_tokenizer(plan.base), _system_prompt(plan))
    reference = Reference(plan, four_bit=plan.onto == "dequantized")
    with _damaged_output(folder):
        tensors = _check_tensors(plan, folder, reference, factors)
    expected = probe_logits(reference.model, prompts)
    with reference.model.disable_adapter():
        effect = compare_logits(expected, probe_logits(reference.model, prompts))
    floor = ARITHMETIC_FLOOR * max(float(values.abs().max()) for values in expected)
    if effect.max_abs <= floor:
        raise changes_nothing(plan, f"no logit of the probe conversations moves by more than {floor:.1g}")
    del reference
    with _damaged_output(folder):
        same_prompts = prompts == probe_prompts(load_tokenizer(BaseRef("merged", folder)), _system_prompt(plan))
        model = _load_fp32(folder)
    written = probe_logits(model, prompts)
    _shift_by_rounding(model, plan)
    noise = compare_logits(written, probe_logits(model, prompts))
    del model
    logits = compare_logits(expected, written)
    max_limit = MAX_FACTOR * noise.max_abs + floor
    mean_limit = MEAN_FACTOR * noise.mean_abs + floor
    within = isfinite(logits.max_abs) and logits.max_abs <= max_limit and logits.mean_abs <= mean_limit
    return Verification(
        passed=not tensors.violations and within and same_prompts,
        tensors=tensors,
        logits=logits,
        noise=noise,
        effect=effect,
        max_limit=max_limit,
        mean_limit=mean_limit,
        drift=_drift(plan, prompts, logits, written),
    )


def require_passed(verification: Verification, plan: MergePlan) -> None:
    """Stop a merge that failed.

    Raises:
        GuardError: With every tensor that is wrong (at most 10), else with the logits.
    """
    if verification.passed:
        return
    wrong = verification.tensors.violations
    faults = [Fault(text, "what base and adapter make", _FIX) for text in wrong[:MAX_SHOWN]]
    if len(wrong) > MAX_SHOWN:
        faults.append(Fault(f"... and {len(wrong) - MAX_SHOWN} more tensors", "none", _FIX))
    if not wrong:
        logits = verification.logits
        what = (
            f"the written model is not {plan.base.id} + the adapter: logits differ by {logits.max_abs:.3g} at most and "
            f"{logits.mean_abs:.3g} in the mean, or its tokenizer renders the probes otherwise"
        )
        expected = f"at most {verification.max_limit:.3g} and {verification.mean_limit:.3g}, and equal prompts"
        faults.append(Fault(what, expected, _FIX))
    raise GuardError.of(faults)


@contextmanager
def _damaged_output(folder: Path) -> Iterator[None]:
    """What was just written and cannot be read back is a failed verification, not the user's mistake."""
    try:
        yield
    except BaseModelError as error:
        what = f"{folder.name}: what was written cannot be read back: {error.faults[0].what}"
        raise GuardError(what, expected="a complete checkpoint", fix=_FIX) from error


def _check_tensors(plan: MergePlan, folder: Path, reference: Reference, factors: dict[str, LoraFactors]) -> TensorCheck:
    counts = {"merged": 0, "round_trips": 0, "trained_rows": 0, "copied": 0}
    violations = []
    with TensorSource(plan.base.path) as source, TensorSource(folder) as written:
        violations += [f"{name}: is in one of base and output only" for name in plan.specs.keys() ^ set(written.names)]
        for name, spec in plan.specs.items():
            if name not in written:
                continue
            if spec != written.spec(name):
                violations.append(f"{name}: is {written.spec(name)}, the base's is {spec}")
                continue
            found, target = written.get(name), plan.target(name)
            if target is not None:
                kind, fault = "merged", _merged_fault(found, target, reference, factors[target])
            elif plan.round_trips(name):
                trip = reference.base_used(name.removesuffix(".weight")).to(found.dtype)  # its own, or the file's
                kind, fault = "round_trips", _bytes_fault(found, trip, "its 4-bit round trip")
            elif name in plan.token_rows:
                kind, fault = "trained_rows", _rows_fault(found, source.get(name), plan.token_rows[name], reference)
            else:
                kind, fault = "copied", _bytes_fault(found, source.get(name), "the base's")
            counts[kind] += 1
            if fault is not None:
                violations.append(f"{name}: {fault}")
    return TensorCheck(**counts, violations=tuple(violations))


def _merged_fault(found: torch.Tensor, module: str, reference: Reference, factors: LoraFactors) -> str | None:
    base_used = reference.base_used(module)
    expected = base_used + reference.delta(module)
    bound = rounding_bound(expected, base_used, factors.a, factors.b, scaling=factors.scaling, dtype=found.dtype)
    wrong = ~((found.float() - expected).abs() <= bound)  # written so that NaN is wrong
    count = int(wrong.sum())
    if not count:
        return None
    return f"{count} of {found.numel()} weights are further than one rounding from base + adapter"


def _rows_fault(found: torch.Tensor, source: torch.Tensor, rows: TrainedRows, reference: Reference) -> str | None:
    expected = source.clone()
    expected[list(rows.ids)] = reference.trained_rows(rows.module).to(source.dtype)
    return _bytes_fault(found, expected, "the base's with the rows that PEFT holds")


def _bytes_fault(found: torch.Tensor, expected: torch.Tensor, name: str) -> str | None:
    import torch

    if torch.equal(found.reshape(-1).view(torch.uint8), expected.contiguous().reshape(-1).view(torch.uint8)):
        return None
    return f"the bytes are not {name}"


def _load_fp32(folder: Path) -> PreTrainedModel:
    import torch

    plain = QuantizationSection(load_in_4bit=False, bnb_4bit_compute_dtype="float32")
    return load_base_model(BaseRef("merged", folder), plain, device=torch.device("cpu"))


def _shift_by_rounding(model: PreTrainedModel, plan: MergePlan) -> None:
    """Shift each weight that the merge rounded by a random half unit, at most, in the last place of its file."""
    import torch

    generator = torch.Generator().manual_seed(_NOISE_SEED)
    rounded = set(plan.adapter.pairs) | (set(plan.layout.quantized) if plan.onto == "dequantized" else set())
    with torch.no_grad():
        for module in sorted(rounded):
            weight = model.get_submodule(module).weight
            dtype = torch_dtype(plan.specs[f"{module}.weight"].dtype)
            weight += _rounding(weight, dtype, generator)
        for name, rows in sorted(plan.token_rows.items()):
            weight, ids = model.get_submodule(name.removesuffix(".weight")).weight, list(rows.ids)
            weight[ids] += _rounding(weight[ids], torch_dtype(plan.specs[name].dtype), generator)


def _rounding(weight: torch.Tensor, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """A random half unit in the last place of ``dtype``, at most, for each number of ``weight``."""
    import torch

    share = torch.rand(weight.shape, generator=generator) * 2 - 1
    # Less than a whole unit of fp32, the model's own dtype, would be lost in the addition.
    return share * torch.maximum(half_ulp(weight, dtype), 2 * half_ulp(weight, torch.float32))


def _drift(
    plan: MergePlan, prompts: list[list[int]], logits: LogitDifference, written: list[torch.Tensor]
) -> LogitDifference | None:
    if plan.onto == "dequantized":
        return logits
    if plan.contract is None:
        return None
    if not plan.quantization.load_in_4bit:
        return logits
    return compare_logits(probe_logits(Reference(plan, four_bit=True).model, prompts), written)


def _system_prompt(plan: MergePlan) -> str | None:
    return None if plan.contract is None else plan.contract.system_prompt
