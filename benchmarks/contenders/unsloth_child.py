"""The contender Unsloth of `train_gpu.py`: imported before transformers and TRL, as it asks to be."""

import importlib.util
import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

if importlib.util.find_spec("unsloth") is None:
    print(json.dumps({"not_run": "unsloth is not installed"}))
else:
    import unsloth  # noqa: F401

    from benchmarks.train_gpu import main

    main()
