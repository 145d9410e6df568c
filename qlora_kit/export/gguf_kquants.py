"""K-quants, which llama.cpp's own quantizer makes: finds it on this machine and runs it on a file that was written."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from qlora_kit.errors import ConfigError, GuardError, OutputError
from qlora_kit.export.gguf_quants import GgufQuant

QUANTIZER = "llama-quantize"
QUANTIZER_VARIABLE = "QLORA_KIT_LLAMA_QUANTIZE"
_SHOWN_LINES = 5


def find_quantizer(quant: GgufQuant) -> Path:
    """Where llama.cpp's ``llama-quantize`` is: what the environment variable names, else on the PATH.

    Raises:
        ConfigError: It is not there.
    """
    named = os.environ.get(QUANTIZER_VARIABLE)
    found = shutil.which(QUANTIZER if named is None else named)
    if found is None:
        where = "on the PATH" if named is None else f"at {named} ({QUANTIZER_VARIABLE})"
        raise ConfigError(
            f"--quant {quant.name}: there is no {QUANTIZER} {where}",
            expected="llama.cpp's quantizer, which alone makes k-quants",
            fix=f"install llama.cpp, or name its {QUANTIZER} in {QUANTIZER_VARIABLE}; q8_0, q5_1 and q4_0 need nothing",
        )
    return Path(found)


def quantize_file(quantizer: Path, source: Path, target: Path, quant: GgufQuant) -> None:
    """Run the quantizer.

    Args:
        quantizer: From ``find_quantizer``.
        source: A GGUF file of unquantized weights.
        target: The file to write; may be there, empty.
        quant: The kind of k-quants.

    Raises:
        GuardError: The quantizer failed.
        OutputError: It could not be started.
    """
    arguments = [str(quantizer), str(source), str(target), str(quant.quantizer), str(os.cpu_count() or 1)]
    try:
        done = subprocess.run(arguments, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise OutputError(
            f"{quantizer}: cannot be started: {error.strerror}", expected="llama.cpp's program", fix="install it again"
        ) from error
    if done.returncode != 0 or target.stat().st_size == 0:
        lines = (done.stdout + done.stderr).strip().splitlines()[-_SHOWN_LINES:]
        raise GuardError(
            f"{quantizer.name} ended with code {done.returncode}: {' / '.join(lines)[:600]}",
            expected=f"a file of {quant.quantizer} weights",
            fix="give --quant q8_0, or use a newer llama.cpp",
        )
