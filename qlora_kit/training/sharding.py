"""A frozen base split over the processes of a run (``train.shard_base``); the adapter stays whole in each of them.

torch's FSDP2 gathers a layer's weights when it is computed. It moves them as they are, 4-bit codes too, which therefore
lie in a floating dtype (bitsandbytes' ``bnb_4bit_quant_storage``). What is trained is left to DDP: gradients, optimizer
and checkpoints are those of whole copies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_kit.base_files import BaseRef, read_model_config
from qlora_kit.config import RunConfig
from qlora_kit.config.train_section import EVAL_LOSS
from qlora_kit.errors import ConfigError
from qlora_kit.launched import process_count

if TYPE_CHECKING:
    from peft import PeftModel


def require_shardable(config: RunConfig, ref: BaseRef) -> None:
    """Look at what a split base does not go together with.

    Raises:
        ConfigError: There is one process alone, the base is quantized already, or answers would have to be generated.
    """
    if not config.train.shard_base:
        return
    if process_count() == 1:
        raise ConfigError(
            "train.shard_base is true, and there is one process",
            expected="several, each of which holds its share of the base",
            fix="start with accelerate launch --config_file configs/accelerate/fsdp_qlora.yaml, or remove it",
        )
    if "quantization_config" in read_model_config(ref):
        raise ConfigError(
            f"train.shard_base is true, and {ref.id} is quantized already: its codes lie in whole numbers",
            expected="a 16-bit base, which is quantized while it is loaded",
            fix="take the 16-bit base, or remove train.shard_base",
        )
    if config.train.metric_for_best_model != EVAL_LOSS:
        raise ConfigError(
            f"train.shard_base is true, and train.metric_for_best_model is {config.train.metric_for_best_model}: one "
            "process alone cannot answer with a part of the base",
            expected=EVAL_LOSS,
            fix=f"set train.metric_for_best_model={EVAL_LOSS}, or remove train.shard_base",
        )


def shard_base(model: PeftModel, device: torch.device) -> None:
    """Split every frozen weight over the processes, layer by layer; each process keeps its share.

    Args:
        model: The whole base with its adapter, in each process.
        device: Of this process.
    """
    mesh = init_device_mesh(device.type, (process_count(),))
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    for module in list(model.modules()):
        if isinstance(module, GradientCheckpointingLayer):
            fully_shard(module, mesh=mesh, ignored_params=trained)
    # Also the rest is given back after each forward pass: a checkpoint asks the main process alone for its weights,
    # which gives its part back, and all must go on from the same state.
    fully_shard(model, mesh=mesh, ignored_params=trained, reshard_after_forward=True)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
