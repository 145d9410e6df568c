"""Adapters on disk: their contract, the gate that checks them, the store that holds them; no torch."""

from qlora_kit.adapters.base_fit import pair_faults, require_shareable, token_row_faults
from qlora_kit.adapters.card import AdapterCard, AdapterDetails, no_base_given
from qlora_kit.adapters.contract import (
    AdapterContract,
    BaseFacts,
    BaseIdentity,
    CombinedFrom,
    CombinedPart,
    ContinuedFrom,
    DataFile,
    library_versions,
)
from qlora_kit.adapters.contract_file import CONTRACT_FILE
from qlora_kit.adapters.fingerprint import base_fingerprint, weights_sha256
from qlora_kit.adapters.gate import AdapterFiles, LoraPair, check_adapter_folder
from qlora_kit.adapters.names import check_name
from qlora_kit.adapters.snapshot import AdapterSnapshot, read_adapter
from qlora_kit.adapters.store import AdapterStore, StoreListing

__all__ = [
    "CONTRACT_FILE",
    "AdapterCard",
    "AdapterContract",
    "AdapterDetails",
    "AdapterFiles",
    "AdapterSnapshot",
    "AdapterStore",
    "BaseFacts",
    "BaseIdentity",
    "CombinedFrom",
    "CombinedPart",
    "ContinuedFrom",
    "DataFile",
    "LoraPair",
    "StoreListing",
    "base_fingerprint",
    "check_adapter_folder",
    "check_name",
    "library_versions",
    "no_base_given",
    "pair_faults",
    "read_adapter",
    "require_shareable",
    "token_row_faults",
    "weights_sha256",
]
