"""Looks at the machine for the kit, and proves the training path on each device; no torch until it is needed."""

from qlora_kit.doctor.checks import Check, Diagnosis
from qlora_kit.doctor.diagnosis import diagnose

__all__ = ["Check", "Diagnosis", "diagnose"]
