"""``merge_adapter``: an adapter folder in, a merged and verified checkpoint out, or nothing at all."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from qlora_kit.atomic import atomic_directory
from qlora_kit.merging.card import model_card
from qlora_kit.merging.onto import Onto
from qlora_kit.merging.planning import REPORT_FILE, MergePlan, plan_merge
from qlora_kit.merging.results import MergeResult, OntoChoice
from qlora_kit.merging.writing import copy_small_files, require_effect, write_json, write_weights

REPORT_VERSION = 1
CARD_FILE = "README.md"
_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")


def merge_adapter(
    adapter: Path,
    out: Path,
    *,
    base: str | None = None,
    revision: str | None = None,
    onto: Onto = "auto",
    verify: bool = True,
    overwrite: bool = False,
    max_shard_bytes: int = 5 * 10**9,
    progress: Callable[[int, int], None] | None = None,
) -> MergeResult:
    """Merge an adapter into its base: W + scaling · B·A in fp32, rounded once to the base's dtype, and verify it.

    Onto ``dequantized``, each linear weight that bitsandbytes quantizes, adapted or not, first becomes what the 4-bit
    layers computed with in training. Onto ``original`` the base's own weights are used; an adapter that was trained
    in 4 bits was not trained on them, and the drift is reported. A base of 4-bit files is dequantized to the dtype of
    its other tensors; ``original`` then takes the 16-bit model that it was quantized from. ``verifying.verify_merge``
    says what is verified.

    Args:
        adapter: The adapter's folder.
        out: The folder to write: a checkpoint for ``AutoModelForCausalLM.from_pretrained``, with ``merge_report.json``.
        base: ``tiny``, a folder or a Hub id; the contract's by default.
        revision: Of a Hub id.
        onto: ``dequantized``, ``original``, or ``auto``: as the contract says the adapter was trained, unless its
            validation rows show that ``original`` is better (``choosing.choose_onto_by_rows``).
        verify: Measure: verify what was written, and for ``auto`` both ways of merging; a layer at a time.
        overwrite: Replace ``out`` if it is occupied.
        max_shard_bytes: Files hold at most so many bytes of tensors.
        progress: Called with the bytes written and the bytes in all.

    Raises:
        AdapterError: The adapter is unsound, is for another base, changes nothing, or cannot be merged.
        BaseModelError: The base is missing, damaged, a merge itself, or for ``original`` quantized already.
        OutputError: ``out`` is occupied or does not fit, or memory does not suffice for verifying.
        GuardError: The written files are not base + adapter; nothing is left of them.
    """
    started = time.perf_counter()
    with atomic_directory(out, overwrite=overwrite) as folder:
        plan = plan_merge(adapter, out, base=base, revision=revision, onto=onto, verify=verify)
        require_effect(plan)
        choice = None
        if onto == "auto":
            plan, choice = _choose(plan, verify=verify)
        copy_small_files(plan, folder)
        weights = write_weights(plan, folder, max_shard_bytes=max_shard_bytes, progress=progress)
        verification = None
        if verify:
            from qlora_kit.merging.verifying import require_passed, verify_merge

            verification = verify_merge(plan, folder)
            require_passed(verification, plan)
        result = MergeResult(
            output_dir=out,
            adapter=_adapter_name(plan),
            base=plan.base.id,
            revision=plan.base.revision,
            onto=plan.onto,
            choice=choice,
            base_match=plan.base_match,
            seconds=time.perf_counter() - started,
            peak_rss_bytes=_peak_rss_bytes(),
            weight_bytes=weights.weight_bytes,
            adapted_weights=weights.adapted_weights,
            changed_weights=weights.changed_weights,
            verification=verification,
        )
        _write_report(result, plan, folder)
    return result


def _choose(plan: MergePlan, *, verify: bool) -> tuple[MergePlan, OntoChoice]:
    if not verify:
        return plan, OntoChoice.unmeasured("as trained: nothing was to be measured")
    from qlora_kit.merging.choosing import choose_onto_by_rows

    return choose_onto_by_rows(plan)


def _adapter_name(plan: MergePlan) -> str:
    if plan.contract is not None and plan.contract.name is not None:
        return plan.contract.name
    return plan.adapter.folder.resolve().name


def _write_report(result: MergeResult, plan: MergePlan, folder: Path) -> None:
    content = {key: value for key, value in result.to_json().items() if key != "output_dir"}
    contract = plan.contract
    trained = (
        {}
        if contract is None
        else {
            "task": contract.task,
            "system_prompt": contract.system_prompt,
            "stop_token_ids": list(contract.stop_token_ids),
            "base_fingerprint": contract.base.fingerprint,
        }
    )
    versions = {name: version(name) for name in _LIBRARIES}
    write_json(folder / REPORT_FILE, {"format_version": REPORT_VERSION, **content, **trained, "versions": versions})
    (folder / CARD_FILE).write_text(model_card(result, plan), encoding="utf-8")


def _peak_rss_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
