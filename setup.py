"""Building a wheel puts the configs, data and adapters of the clone into the package, for `qlora-kit init`.

All else is declared in pyproject.toml.
"""

import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


class BuildWithStarter(build_py):
    """Copies Python modules as ever, then the starter files; an editable install reads those from the clone."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            sys.path.insert(0, str(ROOT))  # not there when pip builds in isolation
            from qlora_kit.starter import copy_starter

            copy_starter(ROOT, Path(self.build_lib, "qlora_kit", "starter"))


setup(cmdclass={"build_py": BuildWithStarter})
