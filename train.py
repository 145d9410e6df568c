"""`python train.py CONFIG [key=value ...]` is `qlora-kit train CONFIG [key=value ...]`."""

import sys

from qlora_kit.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
