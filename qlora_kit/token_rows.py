"""What PEFT's trained rows of embedding and head need beside PEFT, in training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_kit.errors import BaseModelError

if TYPE_CHECKING:
    from peft import PeftModel


def show_bias_of_head(adapted: PeftModel) -> None:
    """TRL's loss asks the head for its bias; PEFT's wrapper around trained rows shows no bias, and adds none.

    Raises:
        BaseModelError: The head has a bias.
    """
    from peft.utils import AuxiliaryTrainingWrapper

    head = adapted.get_output_embeddings()
    if not isinstance(head, AuxiliaryTrainingWrapper):
        return
    if head.original_module.bias is not None:
        raise BaseModelError(
            "lora.trainable_token_indices: the base's head has a bias, which PEFT would leave out",
            expected="a head without bias",
            fix="set lora.trainable_token_indices to null",
        )
    head.bias = None
