"""Whether an adapter that passed the gate fits a base: its layers and rows compared with the base's, before a load."""

from __future__ import annotations

from collections.abc import Mapping

from qlora_kit.adapters.gate import CONFIG_FILE, UNTRUSTED, AdapterFiles
from qlora_kit.errors import AdapterError, Fault
from qlora_kit.safetensors_header import shown


def pair_faults(files: AdapterFiles, linear_shapes: Mapping[str, tuple[int, int]]) -> list[Fault]:
    """What keeps an adapter from fitting a base: layers the base lacks, other sizes, targeted layers without a pair.

    Args:
        files: A checked adapter.
        linear_shapes: The base's linear layers by module name, as (out_features, in_features).
    """
    fix = "load the adapter on the base it was trained on, or train an adapter for this base"
    faults = []
    for module, pair in files.pairs.items():
        shape = linear_shapes.get(module)
        if shape is None:
            faults.append(
                Fault(f"{files.weights}: adapts {shown(module)}, which the base lacks", "a layer of the base", fix)
            )
        elif shape != (pair.out_features, pair.in_features):
            what = f"{files.weights}: adapts {shown(module)} as {(pair.out_features, pair.in_features)}"
            faults.append(Fault(what, f"the base's shape {shape}", fix))
    for module in linear_shapes:
        if module not in files.pairs and files.config.targets(module):
            what = f"{files.weights}: has no tensors for {shown(module)}, though its target_modules name it"
            faults.append(Fault(what, "a pair for each targeted layer of the base", fix))
    return faults


def require_shareable(files: AdapterFiles) -> None:
    """Refuse an adapter that loading would write over the base with: other adapters share that base.

    Raises:
        AdapterError: It brings biases of the base.
    """
    if files.base_tensors:
        raise AdapterError(
            f"{files.folder}: the adapter brings tensors of the base itself: {', '.join(files.base_tensors[:3])}",
            expected="an adapter that leaves the shared base as it is",
            fix="train it without biases (bias: none)",
        )


def token_row_faults(files: AdapterFiles, matrices: Mapping[str, tuple[int, ...]]) -> list[Fault]:
    """What keeps an adapter's trained rows from fitting a base.

    Args:
        files: A checked adapter.
        matrices: Shapes of the base's embedding and head, (rows, hidden size), by module name; 4-bit ones left out.
    """
    fix = "load the adapter on the base it was trained on, or train an adapter for this base"
    faults = []
    for module, ids in files.token_rows.items():
        shape = matrices.get(module)
        found = files.tensors[files.token_tensor(module)].shape
        if shape is None or len(shape) != 2:
            what = f"{files.weights}: brings rows of {shown(module)}, which the base lacks or holds in 4 bits"
            faults.append(Fault(what, f"rows of one of {', '.join(matrices)}", fix))
        elif found[1] != shape[1] or max(ids) >= shape[0]:
            what = f"{files.weights}: brings rows up to {max(ids)} of {shown(module)}, {found[1]} numbers each"
            faults.append(Fault(what, f"rows of the base's {shape[0]} x {shape[1]} matrix", fix))
    if files.config.trainable_token_indices and not files.token_rows:
        what = f"{files.weights}: holds no trained rows, though {CONFIG_FILE} declares some"
        faults.append(Fault(what, "a tensor for the declared rows", UNTRUSTED))
    return faults
