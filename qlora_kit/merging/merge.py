"""``merge_adapter`` and ``write_trained_base``: a merged, or the trained, checkpoint, verified, or nothing at all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qlora_kit.adapters import AdapterContract, base_fingerprint, check_adapter_folder, library_versions
from qlora_kit.adapters.card import CARD_FILE
from qlora_kit.adapters.trained_base import REPORT_FILE, TRAINED_BASE
from qlora_kit.atomic import atomic_directory, require_own_folder
from qlora_kit.base_files import TINY, resolve_base
from qlora_kit.host_memory import peak_rss_bytes
from qlora_kit.merging.card import model_card
from qlora_kit.merging.finished import REPORT_VERSION, describe_files, describe_inputs, finished_result, has_report
from qlora_kit.merging.onto import Onto
from qlora_kit.merging.planning import MergePlan, find_base, plan_merge, plan_trained_base
from qlora_kit.merging.results import MergeResult, OntoChoice, Verification
from qlora_kit.merging.rows import ValidationRows, validation_rows
from qlora_kit.merging.writing import copy_small_files, require_effect, write_json, write_weights
from qlora_kit.models import default_device, quantization_facts
from qlora_kit.shard_writer import DEFAULT_SHARD_BYTES

MERGE = "merge"

Progress = Callable[[int, int], None]
"""Called with the bytes written and the bytes in all."""


def merge_adapter(
    adapter: Path,
    out: Path,
    *,
    base: str | None = None,
    revision: str | None = None,
    onto: Onto = "auto",
    verify: bool = True,
    overwrite: bool = False,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    device: str | None = None,
    progress: Progress | None = None,
) -> MergeResult:
    """Merge an adapter into its base: W + scaling · B·A in fp32, rounded once to the base's dtype, and verify it.

    Onto ``dequantized``, each linear weight that bitsandbytes quantizes, adapted or not, first becomes what the 4-bit
    layers computed with in training. Onto ``original`` the base's own weights are used; an adapter that was trained
    in 4 bits was not trained on them, and the drift is reported. A base of 4-bit files is dequantized to the dtype of
    its other tensors; ``original`` then takes the 16-bit model that it was quantized from. ``verifying.verify_merge``
    says what is verified. Where ``out`` holds the finished result of the same inputs, that is returned at once.

    Args:
        adapter: The adapter's folder.
        out: The folder to write: a checkpoint for ``AutoModelForCausalLM.from_pretrained``, with ``merge_report.json``.
        base: ``tiny``, a folder or a Hub id; the contract's by default.
        revision: Of a Hub id.
        onto: ``dequantized``, ``original``, or ``auto``: as the contract says the adapter was trained, unless its
            validation rows show that ``original`` is better (``choosing.choose_onto_by_rows``).
        verify: Measure: verify what was written, and for ``auto`` both ways of merging; a layer at a time.
        overwrite: Replace ``out`` if it is occupied, by an earlier output alone.
        max_shard_bytes: Files hold at most so many bytes of tensors.
        device: Where products are computed, ``cpu`` or ``cuda``; None for the GPU where there is one.
        progress: Called while weights are written.

    Raises:
        AdapterError: The adapter is unsound, is for another base, changes nothing, or cannot be merged.
        BaseModelError: The base is missing, damaged, a merge itself, or for ``original`` quantized already.
        OutputError: ``out`` is occupied (with ``overwrite``: by other files) or does not fit, or memory does not
            suffice for verifying.
        GuardError: The written files are not base + adapter; nothing is left of them.
    """
    order = _Order(
        kind=MERGE,
        adapter=adapter,
        base=base,
        revision=revision,
        onto=onto,
        verify=verify,
        overwrite=overwrite,
        max_shard_bytes=max_shard_bytes,
        device=device,
        progress=progress,
    )
    return _carry_out(order, out)


def write_trained_base(
    out: Path,
    *,
    base: str | None = None,
    revision: str | None = None,
    adapter: Path | None = None,
    verify: bool = True,
    overwrite: bool = False,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    device: str | None = None,
    progress: Progress | None = None,
) -> MergeResult:
    """Write the base that adapters were trained on, as the 4-bit layers compute with it, in 16 bits, and verify it.

    Many adapters share it: a server that loads 16-bit weights serves them on what they were trained on
    (``adapters.trained_base`` recognises it). It is no base to train on or to merge onto.

    Args:
        out: The folder to write.
        base: ``tiny``, a folder or a Hub id; by default the adapter's, or ``tiny``.
        revision: Of a Hub id.
        adapter: An adapter that was trained on it, whose contract says how the base is quantized; None for NF4 with
            double quantization (a base of 4-bit files: as its files say).
        verify: Verify the written files.
        overwrite: Replace ``out`` if it is occupied, by an earlier output alone.
        max_shard_bytes: Files hold at most so many bytes of tensors.
        device: Where logits are computed; None for the GPU where there is one.
        progress: Called while weights are written.

    Raises:
        AdapterError: The adapter is unsound, has no contract, or was trained on another base or in 16 bits.
        BaseModelError: The base is missing, damaged, or a merge itself.
        OutputError: As for ``merge_adapter``.
        GuardError: The written files are not the base in 4 bits; nothing is left of them.
    """
    order = _Order(
        kind=TRAINED_BASE,
        adapter=adapter,
        base=base,
        revision=revision,
        onto="dequantized",
        verify=verify,
        overwrite=overwrite,
        max_shard_bytes=max_shard_bytes,
        device=device,
        progress=progress,
    )
    return _carry_out(order, out)


@dataclass(frozen=True)
class _Order:
    """What is asked for; the fields are arguments of the two public functions."""

    kind: str
    adapter: Path | None
    base: str | None
    revision: str | None
    onto: Onto
    verify: bool
    overwrite: bool
    max_shard_bytes: int
    device: str | None
    progress: Progress | None

    def plan(self, out: Path) -> MergePlan:
        """Everything that is checked before the first weight is read."""
        device = default_device().type if self.device is None else self.device
        if self.kind == MERGE and self.adapter is not None:
            return plan_merge(
                self.adapter,
                out,
                base=self.base,
                revision=self.revision,
                onto=self.onto,
                verify=self.verify,
                device=device,
            )
        return plan_trained_base(
            out, base=self.base, revision=self.revision, adapter=self.adapter, verify=self.verify, device=device
        )

    def inputs(self) -> dict[str, Any]:
        """What the output will be made of, as far as its report records it."""
        files = None if self.adapter is None else check_adapter_folder(self.adapter)
        if files is None:
            ref = resolve_base(TINY if self.base is None else self.base, self.revision)
        else:
            contract = None if files.contract is None else AdapterContract.load(files.contract)
            ref = find_base(files, contract, self.base, self.revision)
        return describe_inputs(files, ref.path, kind=self.kind, onto=self.onto, max_shard_bytes=self.max_shard_bytes)


def _carry_out(order: _Order, out: Path) -> MergeResult:
    started = time.perf_counter()
    if not order.overwrite and has_report(out):
        found = finished_result(out, order.inputs(), verify=order.verify)
        if found is not None:
            return _with_costs(found, started)
    with atomic_directory(out, overwrite=order.overwrite) as folder:
        plan = order.plan(out)
        if order.overwrite:
            require_own_folder(out, (REPORT_FILE,))
        inputs = order.inputs()
        require_effect(plan)
        rows = validation_rows(plan) if order.verify else "nothing was to be measured"
        choice = None
        if order.onto == "auto":
            plan, choice = _choose(plan, rows, verify=order.verify)
        copy_small_files(plan, folder)
        weights = write_weights(plan, folder, max_shard_bytes=order.max_shard_bytes, progress=order.progress)
        result = MergeResult(
            output_dir=out,
            kind=order.kind,
            adapter=None if plan.adapter is None else _adapter_name(plan),
            base=plan.base.id,
            revision=plan.base.revision,
            onto=plan.onto,
            choice=choice,
            base_match=plan.base_match,
            already_there=False,
            seconds=0.0,
            peak_rss_bytes=0,
            weight_bytes=weights.weight_bytes,
            adapted_weights=weights.adapted_weights,
            changed_weights=weights.changed_weights,
            verification=_verify(plan, folder, rows) if order.verify else None,
        )
        result = _with_costs(result, started)
        _write_report(result, plan, folder, inputs)
    return result


def _verify(plan: MergePlan, folder: Path, rows: ValidationRows | str) -> Verification:
    from qlora_kit.merging.answering import check_answers
    from qlora_kit.merging.verifying import require_passed, verify_merge

    verification = verify_merge(plan, folder, rows)
    require_passed(verification, plan)
    return replace(verification, answers=check_answers(plan, folder, rows))


def _choose(plan: MergePlan, rows: ValidationRows | str, *, verify: bool) -> tuple[MergePlan, OntoChoice]:
    if not verify:
        return plan, OntoChoice.unmeasured("as trained: nothing was to be measured")
    from qlora_kit.merging.choosing import choose_onto_by_rows

    return choose_onto_by_rows(plan, rows)


def _with_costs(result: MergeResult, started: float) -> MergeResult:
    return replace(result, seconds=time.perf_counter() - started, peak_rss_bytes=peak_rss_bytes())


def _adapter_name(plan: MergePlan) -> str:
    if plan.contract is not None and plan.contract.name is not None:
        return plan.contract.name
    return plan.files.folder.resolve().name


def _write_report(result: MergeResult, plan: MergePlan, folder: Path, inputs: Mapping[str, Any]) -> None:
    left_out = ("output_dir", "already_there")
    content = {key: value for key, value in result.to_json().items() if key not in left_out}
    contract = plan.contract
    trained = (
        {}
        if contract is None
        else {
            "task": contract.task,
            "system_prompt": contract.system_prompt,
            "stop_token_ids": list(contract.stop_token_ids),
            "generation": dict(contract.generation),
        }
    )
    report = {
        "format_version": REPORT_VERSION,
        **content,
        **trained,
        "base_fingerprint": inputs["base_fingerprint"],
        "output_fingerprint": base_fingerprint(folder),
        "quantization": quantization_facts(plan.quantization),
        "device": plan.device,
        "inputs": dict(inputs),
        "files": describe_files(folder),
        "versions": library_versions(),
    }
    write_json(folder / REPORT_FILE, report)
    (folder / CARD_FILE).write_text(model_card(result, plan), encoding="utf-8")
