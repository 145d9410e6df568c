"""The command line: parse, call one public function, print, end with the right exit code."""

from qlora_kit.cli.app import app, main

__all__ = ["app", "main"]
