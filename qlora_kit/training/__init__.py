"""QLoRA training: a checked config in, a run folder with a publishable adapter out."""

from qlora_kit.training.progress import TrainingProgress
from qlora_kit.training.run import TrainResult, train

__all__ = ["TrainResult", "TrainingProgress", "train"]
