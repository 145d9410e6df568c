"""The data check on its own: everything that training does to the rows before a model is loaded, as one report."""

from __future__ import annotations

from qlora_kit.base_files import resolve_description
from qlora_kit.config import RunConfig
from qlora_kit.data.tokenised_data import TokenisedData, tokenised_data
from qlora_kit.models import load_tokenizer


def check(config: RunConfig) -> TokenisedData:
    """Read, check and tokenise all splits of ``config`` with its base's tokenizer, exactly as training does."""
    return tokenised_data(config, load_tokenizer(resolve_description(config.model.base, config.model.revision)))
