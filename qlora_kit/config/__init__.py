"""The run configuration: declared sections, YAML and overrides in, one checked and frozen ``RunConfig`` out."""

from qlora_kit.config.loading import load_config
from qlora_kit.config.run_config import DataPart, RunConfig
from qlora_kit.config.sections import (
    DataSection,
    EvalSection,
    HubDataset,
    LoraSection,
    ModelSection,
    PartSection,
    QuantizationSection,
    Source,
)
from qlora_kit.config.train_section import TrainSection

__all__ = [
    "DataPart",
    "DataSection",
    "EvalSection",
    "HubDataset",
    "LoraSection",
    "ModelSection",
    "PartSection",
    "QuantizationSection",
    "RunConfig",
    "Source",
    "TrainSection",
    "load_config",
]
