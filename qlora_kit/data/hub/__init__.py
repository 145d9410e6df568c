"""Data sets of the Hugging Face Hub: what a user names, the commit that it stands for, and its rows.

Rows come from the repository's own data files only: never from a local folder of the same name, and no code is run.
"""

from qlora_kit.data.hub.rows import read_hub_rows, resolve
from qlora_kit.data.hub.source import HubSource, ResolvedHubSource

__all__ = ["HubSource", "ResolvedHubSource", "read_hub_rows", "resolve"]
