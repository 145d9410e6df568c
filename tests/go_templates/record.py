"""Writes rendered.json again: what Go itself makes of the templates. Needs Go; run it from the repository's root."""

from __future__ import annotations

import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Write the file."""
    sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]
    from conftest import byte_level_tokenizer, sentencepiece_tokenizer
    from go_templates.cases import render_with_go, tokenizers

    from qlora_kit.export.go_template import go_template, read_turn_texts

    made = tokenizers(byte_level_tokenizer, sentencepiece_tokenizer)
    templates = {name: go_template(read_turn_texts(tokenizer)) for name, tokenizer in made.items()}
    rendered = render_with_go(templates)
    content = {name: {"template": templates[name], "texts": rendered[name]} for name in templates}
    (HERE / "rendered.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
