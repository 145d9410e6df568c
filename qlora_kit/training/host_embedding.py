"""The frozen input embedding in host memory (``train.embedding_on_host``): looked up there, its rows go to the device.

Saves vocabulary x hidden size numbers of the device's memory, and costs sending the rows of a micro-batch to it.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from qlora_kit.architecture import FAMILIES, read_architecture
from qlora_kit.base_files import BaseRef, read_model_config
from qlora_kit.config import RunConfig
from qlora_kit.errors import ConfigError
from qlora_kit.memory.workload import trains_embedding

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_FIX = "remove train.embedding_on_host"


class HostEmbedding(torch.nn.Module):
    """In the place of an embedding. The rows of its weight lie on the host; what it returns is on the model's device.

    The weight is no parameter, so that nothing that moves, shards, casts or saves the model's parameters meets it. An
    empty one stands in its place: transformers asks a model's first parameter for its device and dtype.
    """

    def __init__(self, embedding: torch.nn.Embedding) -> None:
        super().__init__()
        rows = embedding.weight.detach()
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.device_of_rows = torch.nn.Parameter(rows.new_empty(0, self.embedding_dim), requires_grad=False)
        self._rows = (rows.to("cpu"),)  # in a tuple, where torch does not look
        self.train(embedding.training)

    @property
    def rows(self) -> torch.Tensor:
        """The weight, on the host: (V, H)."""
        return self._rows[0]

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """The rows of ``token_ids`` (B, T), on the device of the model: (B, T, H)."""
        found = torch.nn.functional.embedding(token_ids.to(self.rows.device), self.rows)
        return found.to(self.device_of_rows.device)


def require_host_embedding_possible(config: RunConfig, ref: BaseRef) -> None:
    """Look at what an embedding on the host does not go together with, before the base is loaded.

    Raises:
        ConfigError: The embedding is the head as well, is trained, or is split over processes.
    """
    if not config.train.embedding_on_host:
        return
    base_config = read_model_config(ref)
    known = base_config.get("model_type") in FAMILIES
    if known and read_architecture(base_config, where=str(ref.path / "config.json")).tied:
        raise _tied(ref.id)
    if trains_embedding(config.lora):
        raise ConfigError(
            "train.embedding_on_host: the lora section trains it",
            expected="a frozen embedding: what is trained stays on the device",
            fix=f"{_FIX}, or train the linear layers alone",
        )
    if config.train.shard_base:
        raise ConfigError(
            "train.embedding_on_host: train.shard_base splits the embedding over the processes already",
            expected="one of the two",
            fix=_FIX,
        )


def require_frozen_rows(config: RunConfig, modules: object) -> None:
    """Compare it with the rows of tokens that are trained (``choose_token_rows``); ``modules`` holds their modules.

    Raises:
        ConfigError: Rows of the embedding are trained.
    """
    if config.train.embedding_on_host and modules:
        chosen = ", which train.memory=auto may have chosen" if config.train.memory == "auto" else ""
        raise ConfigError(
            f"train.embedding_on_host{chosen}: rows of the embedding are trained (lora.trainable_token_indices)",
            expected="a frozen embedding: what is trained stays on the device",
            fix=f"{'set train.memory=check' if chosen else _FIX}, or set lora.trainable_token_indices=null",
        )


def put_embedding_on_host(model: PreTrainedModel) -> None:
    """Replace the input embedding of a loaded base, before an adapter is attached.

    Raises:
        ConfigError: The head has the same weight, or it is no plain embedding.
    """
    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()
    if head is not None and head.weight is embedding.weight:
        raise _tied(type(model).__name__)
    if type(embedding) is not torch.nn.Embedding:  # some families scale the rows
        raise ConfigError(
            f"train.embedding_on_host: the embedding of {type(model).__name__} is a {type(embedding).__name__}",
            expected="torch's own embedding, which looks rows up and does nothing else",
            fix=_FIX,
        )
    on_gpu = embedding.weight.is_cuda
    model.set_input_embeddings(HostEmbedding(embedding))
    del embedding
    if on_gpu:
        torch.cuda.empty_cache()
    else:
        logger.warning("train.embedding_on_host saves nothing here: the model itself is in host memory")


def _tied(base: str) -> ConfigError:
    return ConfigError(
        f"train.embedding_on_host: the head of {base} is its embedding, which the device needs for the logits",
        expected="a base whose head has weights of its own",
        fix=f"{_FIX}: it would save nothing",
    )
