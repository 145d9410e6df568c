"""Near duplicates against brute force: all that are similar are found, none that is not, the same in each process."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_kit.data.near_duplicates import NearDuplicates
from qlora_kit.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY = [first + second for first, second in itertools.product("bdfgklmnprst", "aeiou")]
WORDS = ["".join(pair) for pair in itertools.product(VOCABULARY, repeat=2)]  # 3,600 words of two syllables
STANDARD_ERRORS = 4.5  # of an estimate; one in 150,000 lies farther off


def exact_similarity(first: str, second: str) -> float:
    """Jaccard similarity of the sets of three words in a row, of plain lower-case texts."""
    sets = []
    for text in (first, second):
        words = text.split()
        sets.append({tuple(words[start : start + 3]) for start in range(len(words) - 2)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def standard_error(similarity: float, permutations: int) -> float:
    return (similarity * (1 - similarity) / permutations) ** 0.5


@pytest.fixture(scope="module")
def pairs() -> list[tuple[str, str, float]]:
    """400 texts of 40 to 120 words, an edited copy of each, and their exact similarity: from 0 to 1."""
    generator = random.Random(0)
    made = []
    for _ in range(400):
        words = generator.choices(WORDS, k=generator.randint(40, 120))
        edited = list(words)
        for _ in range(int(17 * generator.random() ** 2)):
            place = generator.randrange(len(edited))
            edited[place : place + generator.randint(0, 1)] = generator.choices(WORDS, k=generator.randint(0, 2))
        made.append((" ".join(words), " ".join(edited)))
    return [(first, second, exact_similarity(first, second)) for first, second in made]


def test_similar_texts_are_found_and_others_are_not(pairs: list[tuple[str, str, float]]) -> None:
    seen = NearDuplicates()
    for number, (first, _, _) in enumerate(pairs):
        assert seen.add(first, f"train.jsonl:{number}") is None
    found = [seen.find(second) for _, second, _ in pairs]
    similar = [number for number, (_, _, exact) in enumerate(pairs) if exact >= 0.9]
    different = [number for number, (_, _, exact) in enumerate(pairs) if exact < 0.6]
    assert len(similar) > 80
    assert len(different) > 80
    assert [number for number in similar if found[number] is None] == []
    assert [number for number in different if found[number] is not None] == []
    for number, match in enumerate(found):
        if match is not None:
            exact = pairs[number][2]
            assert match[0] == f"train.jsonl:{number}"
            assert abs(match[1] - exact) <= STANDARD_ERRORS * standard_error(min(exact, 0.99), 128)
    assert len(seen) == len(pairs)


def test_estimates_have_no_bias(pairs: list[tuple[str, str, float]]) -> None:
    """With the lowest threshold every estimate is seen, and the errors cancel out."""
    errors = []
    for first, second, exact in pairs:
        if exact > 0.2:
            seen = NearDuplicates(threshold=0.05)
            seen.add(first, "first")
            match = seen.find(second)
            assert match is not None
            errors.append(match[1] - exact)
    assert len(errors) > 300
    assert abs(sum(errors) / len(errors)) < STANDARD_ERRORS * standard_error(0.5, 128) / len(errors) ** 0.5


@pytest.mark.parametrize(("threshold", "permutations"), [(0.5, 128), (0.7, 64), (0.8, 128), (0.9, 256), (1.0, 128)])
def test_the_index_finds_what_comparing_all_signatures_finds(
    pairs: list[tuple[str, str, float]], threshold: float, permutations: int
) -> None:
    """`datasketch`'s own estimate for each pair, without any index, is the reference."""
    from datasketch import MinHash

    seen = NearDuplicates(threshold=threshold, permutations=permutations)
    signatures = []
    for number, (first, _, _) in enumerate(pairs[:200]):
        seen.add(first, str(number))
        signatures.append(MinHash(hashvalues=seen._signature(first), scheme="affine32"))
    expected = []
    for _, second, _ in pairs[:200]:
        signature = MinHash(hashvalues=seen._signature(second), scheme="affine32")
        similarities = [signature.jaccard(other) for other in signatures]
        best = max(range(200), key=similarities.__getitem__)
        expected.append((str(best), similarities[best]) if similarities[best] >= threshold else None)
    found = [seen.find(second) for _, second, _ in pairs[:200]]
    wrong = [pair for pair in zip(found, expected, strict=True) if pair[0] != pair[1]]
    at_threshold = sum(match is not None and match[1] < threshold + 0.05 for match in expected)
    assert all(match is None for match, _ in wrong)  # only missed, and only as often as allowed
    assert len(wrong) <= max(1, at_threshold * 0.05)
    assert sum(match is not None for match in expected) > 10


def test_a_near_duplicate_is_not_kept() -> None:
    words = random.Random(1).choices(WORDS, k=80)
    seen = NearDuplicates()
    assert seen.find(" ".join(words)) is None
    assert seen.add(" ".join(words), "a:1") is None
    assert seen.find(" ".join(words)) == ("a:1", 1.0)
    edited = [*words[:-6], *"six other words stand here now".split()]
    match = seen.add(" ".join(edited), "a:2")
    assert match is not None
    assert match[0] == "a:1"
    assert len(seen) == 1
    assert exact_similarity(" ".join(edited[9:]), " ".join(edited)) > 0.85
    assert seen.find(" ".join(edited[9:])) is None


def test_the_most_similar_text_is_named() -> None:
    """Two texts differ from a common one in six places each; a third has five changes of one and two of the other."""
    common = random.Random(1).choices(WORDS, k=80)
    places = range(4, 76, 6)

    def changed(chosen: list[int]) -> str:
        return " ".join(f"new{place}" if place in chosen else word for place, word in enumerate(common))

    first, second = changed(list(places[:6])), changed(list(places[6:]))
    third = changed([*places[:5], *places[6:8]])
    assert exact_similarity(first, second) < 0.37
    assert 0.48 < exact_similarity(second, third) < exact_similarity(first, third)
    for order in ((first, second), (second, first)):
        seen = NearDuplicates(threshold=0.42)
        for text in order:
            assert seen.add(text, "first" if text == first else "second") is None
        match = seen.find(third)
        assert match is not None
        assert match[0] == "first"


def test_different_short_texts_are_never_near_duplicates() -> None:
    texts = ["", "?", "!", "🙂", "c", "c++", "c#", "3 + 4", "3 - 4", "3 * 4", "3 / 4", "3 = 4", "-5", "5", "x-1", "x1"]
    texts += ["你好", "你好吗", "ありがとう", "naïve", "naive", "1.5", "15", "a b", "b a", "a b c", "a b c d"]
    words = VOCABULARY[:12]
    texts += [" ".join(chosen) for length in (1, 2, 3) for chosen in itertools.product(words, repeat=length)]
    texts += [f"order number {number}" for number in range(2000)]
    seen = NearDuplicates()
    hits = {text: match for number, text in enumerate(texts) if (match := seen.add(text, f"{number}")) is not None}
    assert hits == {}
    assert len(seen) == len(texts) == len(set(texts))
    for number, text in enumerate(texts):
        assert seen.find(text) == (str(number), 1.0)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("What is the capital of France?", "what is  the capital of france"),
        ("Yes.", "yes"),
        ("It's well-known", "it s well known"),
        ("ﬁne ①", "fine 1"),
        ("a\tb\n\nc  d", 'A, b; (c) "d"!'),
        ("你好，世界", "你好世界"),
    ],
)
def test_case_spacing_and_punctuation_do_not_count(first: str, second: str) -> None:
    seen = NearDuplicates()
    seen.add(first, "a:1")
    assert seen.find(second) == ("a:1", 1.0)


PROGRAM = """
import random
from qlora_kit.data.near_duplicates import NearDuplicates
generator = random.Random(2)
words = [f"word{n}" for n in range(300)]
seen = NearDuplicates(threshold=0.5)
texts = [" ".join(generator.choices(words, k=30)) for _ in range(40)]
texts += [" ".join(text.split()[:-k]) for k in (1, 4, 7) for text in texts[:40]]
print([seen.add(text, str(n)) for n, text in enumerate(texts)], seen._signature("one two three four").tolist())
"""


def test_another_process_finds_the_same() -> None:
    outputs = []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", PROGRAM]
        outputs.append(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert outputs[0] == outputs[1]
    assert outputs[0].count("('") > 40


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"threshold": 0.0}, "the threshold of near duplicates is 0.0"),
        ({"threshold": 1.1}, "the threshold of near duplicates is 1.1"),
        ({"permutations": 8}, "near duplicates by 8 permutations"),
        ({"shingle_words": 0}, "shingles of 0 words"),
    ],
)
def test_settings_out_of_range(settings: dict[str, float], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        NearDuplicates(**settings)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(ConfigError, match=r"pip install 'qlora-kit\[near-duplicates\]'"):
        NearDuplicates()
