"""The models that clients may name: the base and the adapters that passed the gate, with a card of each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from qlora_kit.adapters import AdapterContract, AdapterDetails
from qlora_kit.metrics import METRICS
from qlora_kit.server.errors import ApiError
from qlora_kit.server.response_schema import ModelCard
from qlora_kit.suggest import nearest
from qlora_kit.tasks import TASKS

_LOSSES = ("eval_loss", "train_loss")


class ServedModels:
    """Who is served now. Adapters are set by the store's watcher in a thread, and read by the event loop."""

    def __init__(self, base: str, *, started: int) -> None:
        self.base = base
        self._started = started
        self._adapters: Mapping[str, AdapterDetails] = {}

    @property
    def adapters(self) -> Mapping[str, AdapterDetails]:
        """Name to details of the adapters that are served, by name; never changed, only replaced."""
        return self._adapters

    def set(self, adapters: Mapping[str, AdapterDetails]) -> None:
        """Serve these adapters and no others."""
        self._adapters = dict(sorted(adapters.items()))

    def adapter_of(self, model: str) -> str | None:
        """The adapter that ``model`` names; None where it names the base.

        Raises:
            ApiError: There is no such model.
        """
        return None if self._find(model) is None else model

    def cards(self) -> list[ModelCard]:
        """The base, then the adapters by name."""
        return [self._base_card(), *(self._adapter_card(details) for details in self._adapters.values())]

    def card(self, model: str) -> ModelCard:
        """One model.

        Raises:
            ApiError: There is no such model.
        """
        details = self._find(model)
        return self._base_card() if details is None else self._adapter_card(details)

    def _find(self, model: str) -> AdapterDetails | None:
        adapters = self._adapters  # looked at once: another thread may replace them meanwhile
        if model == self.base:
            return None
        if model in adapters:
            return adapters[model]
        near = nearest(model, [self.base, *adapters])
        hint = f"Did you mean {near!r}?" if near is not None else "GET /v1/models lists what there is."
        raise ApiError(404, f"There is no model of this name. {hint}", code="model_not_found", param="model")

    def _base_card(self) -> ModelCard:
        card = {"task": None, "description": "the base model, without any adapter"}
        return ModelCard(id=self.base, created=self._started, root=self.base, parent=None, card=card)

    def _adapter_card(self, details: AdapterDetails) -> ModelCard:
        card, contract = details.card, details.contract
        facts: dict[str, Any] = {
            "task": card.task,
            "description": TASKS[card.task].description if card.task in TASKS else None,
            "rank": card.r,
            "bytes": card.bytes,
            "created": card.created,
            "origin": card.origin,
            **({} if contract is None else _contract_facts(contract)),
        }
        created = int(datetime.fromisoformat(card.created).timestamp())
        return ModelCard(id=card.name, created=created, root=self.base, parent=self.base, card=facts)


def _contract_facts(contract: AdapterContract) -> dict[str, Any]:
    return {
        "base": public_name(contract.base.id),
        "system_prompt": contract.system_prompt,
        "max_new_tokens": contract.generation.get("max_new_tokens"),
        "metrics": list(contract.metric_names),
        "data": [{"split": file.split, "name": file.name, "rows": file.rows} for file in contract.data],
        "scores": _scores(contract.metrics),
    }


def _scores(measured: Mapping[str, Any]) -> dict[str, float]:
    """Losses and the tasks' metrics among what the contract holds; finite, since JSON knows nothing else."""
    names = [*_LOSSES, *METRICS]
    return {
        name: float(value)
        for name in names
        if isinstance(value := measured.get(name), int | float) and math.isfinite(value)
    }


def public_name(base: str) -> str:
    """A base's name for clients: a Hub id as it is, a folder by its own name without the path."""
    return Path(base).name if Path(base).is_absolute() else base
