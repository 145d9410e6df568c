"""Patterns of modules match what Python's ``re`` matches, in a time that no pattern can blow up."""

from __future__ import annotations

import random
import re
import time

import pytest

from qlora_kit.adapters.module_pattern import parse_pattern, pattern_names_end_of

ATOMS = ["a", "b", ".", r"\.", "x", "[ab]", "[^a]", r"\d", r"\w", "1", "_", "[a-c]", r"\b", "^", "$", "[]a]", r"[\d_]"]
REPEATS = ["", "", "", "*", "+", "?", "*?", "{1,2}", "{2}", "{,2}", "{1,}", "??"]
REAL = [
    r".*\.self_attn\.(q|k)_proj",
    r"model\.layers\.(0|1|1[0-9])\..*_proj",
    r"^(model\.language_model(?=\.).*\.(q_proj|k_proj))$",
    r"^(?!.*lm_head).*(?:q_proj|up_proj)$",
    r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|k_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|down_proj)))",
]
HOSTILE = {
    "(a|a)(a|a)...": "(a|a)" * 120 + "b",
    "a?a?...aaa": "a?" * 300 + "a" * 120 + "b",
    ".*.*...": ".*" * 300 + "x",
    "a*a*...": "a*" * 400 + "b",
    "bounded repeats": ".{0,128}" * 110 + "b",
    "lookahead": "(?!.*.*.*b)" * 80 + "b",
}


def random_pattern(rng: random.Random, depth: int = 0) -> str:
    kind = rng.randrange(9 if depth < 3 else 5)
    if kind < 3:
        return rng.choice(ATOMS) + rng.choice(REPEATS)
    if kind < 5:
        return random_pattern(rng, depth + 1) + random_pattern(rng, depth + 1)
    if kind == 5:
        return f"({random_pattern(rng, depth + 1)}|{random_pattern(rng, depth + 1)})" + rng.choice(["", "?"])
    if kind == 6:
        return f"(?:{random_pattern(rng, depth + 1)})" + rng.choice(["", "?"])
    if kind == 7:
        return f"({rng.choice(['?=', '?!'])}{random_pattern(rng, depth + 1)})"
    return f"{random_pattern(rng, depth + 1)}|{random_pattern(rng, depth + 1)}"


def test_random_patterns_match_as_in_re() -> None:
    rng = random.Random(0)
    matches = tried = 0
    while tried < 3000:
        pattern = random_pattern(rng)
        try:
            parsed = parse_pattern(pattern)
        except ValueError:
            continue
        for _ in range(5):
            text = "".join(rng.choice("ab.1_x") for _ in range(rng.randrange(1, 7)))
            expected = re.fullmatch(pattern, text) is not None
            assert parsed.names(text) == expected, (pattern, text)
            ends = re.match(rf"(.*\.)?({pattern})$", text) is not None  # PEFT's get_pattern_key
            assert parsed.names_end_of(text) == ends, (pattern, text)
            matches += expected
            tried += 1
    assert 100 < matches < tried / 2


@pytest.mark.parametrize("pattern", REAL)
def test_patterns_that_people_use_are_understood(pattern: str) -> None:
    names = [
        f"model.{kind}layers.{layer}.{part}"
        for kind in ("", "language_model.")
        for layer in (0, 1, 12, 27)
        for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm")
    ]
    parsed = parse_pattern(pattern)
    found = [parsed.names(name) for name in names]
    assert found == [re.fullmatch(pattern, name) is not None for name in names]
    assert any(found) and not all(found)


@pytest.mark.parametrize("pattern", ["q_proj", "layers.0.self_attn.q_proj", "0.q-x", ".", "..", "model.q_proj"])
def test_plain_names_match_as_patterns(pattern: str) -> None:
    names = [
        "q_proj",
        "model.q_proj",
        "modelxq_proj",
        "xq_proj",
        "model.layers.0.self_attn.q_proj",
        "a.0xq-x",
        "a",
        "ab",
    ]
    for name in names:
        expected = re.match(rf"(.*\.)?({pattern})$", name) is not None
        assert pattern_names_end_of(pattern, name) == expected == parse_pattern(pattern).names_end_of(name)


NO_PATTERNS = ["", "(", ")", "a)", "(a", "[a", "a**", "a*+", "*a", "^*", r"\b+", "(a)*", "(a){2}", "(a+)+", "(?=a)?"]
NO_PATTERNS += ["{2}", "a{2,1}", r"(a)\1", "(?i)a", "(?P<x>a)", "(?<=a)b", "(?>a)", r"\p{L}", "a\\", "a" * 1001, "a\n"]
NO_PATTERNS += ["[[a]", "(?=(?=a)b)c", "(" * 30 + ")" * 30, "(" * 400 + ")" * 400]


@pytest.mark.parametrize("pattern", NO_PATTERNS)
def test_what_is_no_pattern_or_not_understood_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_pattern(pattern)


@pytest.mark.parametrize("kind", HOSTILE)
def test_no_pattern_takes_long(kind: str) -> None:
    """Python's ``re`` would take from minutes to the age of the universe; this takes milliseconds."""
    began = time.monotonic()
    assert not parse_pattern(HOSTILE[kind]).names("a" * 128)
    assert time.monotonic() - began < 20
