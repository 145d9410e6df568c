"""`python merge.py ADAPTER --out DIR` is `qlora-kit merge ADAPTER --out DIR`."""

import sys

from qlora_kit.cli import main

if __name__ == "__main__":
    main(["merge", *sys.argv[1:]])
