"""The values that `doctor --train` compares with, as `scripts/build_doctor_references.py` computed them in fp64."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

VALUES_FILE = Path(__file__).with_name("references.json")
TENSORS_FILE = Path(__file__).with_name("references.safetensors")


@dataclass(frozen=True)
class Reference:
    """What three correct steps give.

    Attributes:
        inputs_sha256: Of the inputs that they were computed from (``subject.inputs_sha256``).
        made_with: Library name to version.
        losses: Mean cross-entropy over the supervised tokens, before each step, in nats.
        codebook: The 16 values of NF4, ascending.
        codes: Module to its 4-bit codes, (out_features, in_features), 0 to 15.
        scales: Module to the dequantized scale of each block of 64 weights, (out_features · in_features / 64,).
        gradients: ``<module>.lora_A`` or ``.lora_B`` to its gradient at the first step.
        adapter: The same names to the adapter after the last step.
    """

    inputs_sha256: str
    made_with: Mapping[str, str]
    losses: tuple[float, ...]
    codebook: NDArray[np.float64]
    codes: Mapping[str, NDArray[np.uint8]]
    scales: Mapping[str, NDArray[np.float64]]
    gradients: Mapping[str, NDArray[np.float64]]
    adapter: Mapping[str, NDArray[np.float64]]

    def dequantized(self, module: str) -> NDArray[np.float64]:
        """The weight that the 4-bit layer computes with, (out_features, in_features)."""
        codes = self.codes[module]
        values = self.codebook[codes].reshape(len(self.scales[module]), -1)  # (blocks, 64)
        return (values * self.scales[module][:, None]).reshape(codes.shape)


def load_reference(values: Path = VALUES_FILE, tensors: Path = TENSORS_FILE) -> Reference:
    """Read the references."""
    from safetensors.numpy import load_file

    content: dict[str, Any] = json.loads(values.read_text(encoding="utf-8"))
    groups: dict[str, dict[str, NDArray[Any]]] = {name: {} for name in ("codes", "scales", "gradients", "adapter")}
    loaded = load_file(tensors)
    for name, array in loaded.items():
        group, _, rest = name.partition("/")
        if group in groups:
            groups[group][rest] = _unpacked(array) if group == "codes" else array.astype(np.float64)
    shapes = {module: (len(groups["gradients"][f"{module}.lora_B"]), -1) for module in groups["codes"]}
    return Reference(
        inputs_sha256=content["inputs_sha256"],
        made_with=content["made_with"],
        losses=tuple(content["losses"]),
        codebook=loaded["codebook"].astype(np.float64),
        codes={module: codes.reshape(shapes[module]) for module, codes in groups["codes"].items()},
        scales=groups["scales"],
        gradients=groups["gradients"],
        adapter=groups["adapter"],
    )


def save_reference(reference: Reference, *, values: Path = VALUES_FILE, tensors: Path = TENSORS_FILE) -> None:
    """Write the references: two codes to a byte, gradients and adapter rounded to fp32."""
    from safetensors.numpy import save_file

    content = {
        "made_with": dict(reference.made_with),
        "inputs_sha256": reference.inputs_sha256,
        "losses": list(reference.losses),
    }
    values.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    arrays: dict[str, NDArray[Any]] = {"codebook": reference.codebook}
    arrays |= {f"codes/{name}": _packed(codes) for name, codes in reference.codes.items()}
    arrays |= {f"scales/{name}": scales for name, scales in reference.scales.items()}
    for group, tensors_of_group in (("gradients", reference.gradients), ("adapter", reference.adapter)):
        arrays |= {f"{group}/{name}": np.ascontiguousarray(t, np.float32) for name, t in tensors_of_group.items()}
    save_file(arrays, tensors)


def _packed(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    pairs = codes.reshape(-1, 2)
    return (pairs[:, 0] << 4 | pairs[:, 1]).astype(np.uint8)


def _unpacked(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The codes of a byte are its high and then its low half, as bitsandbytes stores them too."""
    return np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1)
