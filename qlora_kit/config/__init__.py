"""The run configuration: declared sections, YAML and overrides in, one checked and frozen ``RunConfig`` out."""

from qlora_kit.config.run_config import RunConfig, load_config
from qlora_kit.config.sections import DataSection, EvalSection, LoraSection, ModelSection, QuantizationSection
from qlora_kit.config.train_section import TrainSection

__all__ = [
    "DataSection",
    "EvalSection",
    "LoraSection",
    "ModelSection",
    "QuantizationSection",
    "RunConfig",
    "TrainSection",
    "load_config",
]
