"""The translation generator: hand-written French, agreement rules checked by hand lists, and held-out pairs."""

from __future__ import annotations

import random
import re
from itertools import pairwise

import pytest

from scripts.tiny_corpus import french
from scripts.tiny_corpus.french_grammar import (
    ADJECTIVES,
    BE,
    NOUNS,
    PRONOUNS,
    VERBS,
    Phrase,
    agree,
    as_sentence,
    clause,
    noun_phrase,
    predicate,
    prepositional,
    there_is,
)
from scripts.tiny_corpus.french_sentences import sentence
from scripts.tiny_corpus.holdout import PARTS, Part, part_of

# Written by hand, not by the grammar. Square brackets mark noun phrases, round ones places.
HAND_WRITTEN = [
    ("[the small cat] sleeps", "Le petit chat dort."),
    ("[the friend] does not dance", "L'ami ne danse pas."),
    ("[this man] works (in [the old house])", "Cet homme travaille dans la vieille maison."),
    ("[some small birds] sing", "De petits oiseaux chantent."),
    ("[some red apples] are (under [the tree])", "Des pommes rouges sont sous l'arbre."),
    ("[my school] is big", "Mon école est grande."),
    ("[my old school] is not big", "Ma vieille école n'est pas grande."),
    ("[the old tree] is beautiful", "Le vieil arbre est beau."),
    ("[the beautiful trees] are old", "Les beaux arbres sont vieux."),
    ("[a beautiful tree] is (near [the castle])", "Un bel arbre est près du château."),
    ("[these women] are happy", "Ces femmes sont heureuses."),
    ("[the cow] and [the hen] are white", "La vache et la poule sont blanches."),
    ("[the cow] and [the horse] are white", "La vache et le cheval sont blancs."),
    ("[the horses] are not tired", "Les chevaux ne sont pas fatigués."),
    ("[this mouse] is grey", "Cette souris est grise."),
    ("[these mice] are (behind [the chairs])", "Ces souris sont derrière les chaises."),
    ("I love [this orange]", "J'aime cette orange."),
    ("I do not love [this orange]", "Je n'aime pas cette orange."),
    ("I have [an old coat]", "J'ai un vieux manteau."),
    ("I do not have [the key]", "Je n'ai pas la clé."),
    ("she buys [some new hats]", "Elle achète de nouveaux chapeaux."),
    ("we eat [the good cakes]", "Nous mangeons les bons gâteaux."),
    ("they want [some green carrots]", "Ils veulent des carottes vertes."),
    ("he looks for [my blue letter] (in [this bag])", "Il cherche ma lettre bleue dans ce sac."),
    ("we wait", "Nous attendons."),
    ("[the children] arrive (at [the market])", "Les enfants arrivent au marché."),
    ("[the queen] waits (at [the church])", "La reine attend à l'église."),
    ("[my friends] do not wait (near [the trees])", "Mes amis n'attendent pas près des arbres."),
    ("[a fox] sleeps (near [a new boat])", "Un renard dort près d'un nouveau bateau."),
    ("[the dog] walks (in front of [the library])", "Le chien marche devant la bibliothèque."),
    ("[the girl] sings but does not play", "La fille chante mais ne joue pas."),
    ("there is [a black cat] (on [the bed])", "Il y a un chat noir sur le lit."),
    ("there are [some beautiful flowers] (near [the table])", "Il y a de belles fleurs près de la table."),
    ("they see [the young kings]", "Ils voient les jeunes rois."),
]
MASCULINE = """homme enfant garçon ami roi chat chien cheval oiseau renard livre sac chapeau manteau gâteau fromage lit
bateau arbre jardin parc marché château""".split()
FEMININE = """femme fille reine vache souris poule clé tasse boîte lettre lampe assiette fleur pomme orange carotte
table chaise voiture maison cuisine école bibliothèque église""".split()


def _phrase(text: str) -> Phrase:
    """Look the words of an English noun phrase up and build it."""
    determiner, *middle, last = text.split()
    noun = next(noun for noun in NOUNS if last in (noun.singular, noun.plural))
    adjective = next((a for a in ADJECTIVES if [a.english] == middle), None)
    return noun_phrase("a" if determiner == "an" else determiner, noun, adjective, plural=last == noun.plural)


def _build(marked: str) -> tuple[str, str]:
    """Build a marked English sentence with the grammar's own functions."""
    place = re.search(r" \((.+) \[(.+)\]\)$", marked)
    where = [prepositional(place[1], _phrase(place[2]))] if place else []
    head = marked[: place.start()] if place else marked
    if head.startswith("there "):
        return there_is(_phrase(re.findall(r"\[(.+?)\]", head)[0]), where[0])
    start = re.findall(r"^\[.+?\](?: and \[.+?\])?|^\w+", head)[0]
    phrases = [_phrase(text) for text in re.findall(r"\[(.+?)\]", start)]
    subjects: str | list[Phrase] = phrases or start
    rest = head[len(start) + 1 :]
    target = re.search(r" ?\[(.+)\]$", rest)
    complements = [_phrase(target[1])[:2]] if target else []
    rest = rest[: target.start()] if target else rest
    rest, _, contrast = rest.partition(" but does not ")
    if contrast:
        denied = predicate(next(v for v in VERBS if v.base == contrast), 1, (), negative=True)
        complements.append((f"but {denied[0]}", f"mais {denied[1]}"))
    if re.match(r"(is|are)\b", rest):
        adjective = next((a for a in ADJECTIVES if rest.split()[-1] == a.english), None)
        complements += [agree(adjective, phrases)] if adjective else []
        return clause(subjects, BE, *complements, *where, negative=" not" in rest)
    negative = rest.startswith("do")
    rest = re.sub(r"^do(es)? not ", "", rest)
    verb = next(verb for verb in VERBS if rest in (verb.base, verb.third))
    return clause(subjects, verb, *complements, *where, negative=negative)


@pytest.fixture(scope="module")
def splits() -> dict[Part, list[dict[str, str]]]:
    return {part: [row.fields for row in french.rows(part, 8000 if part == "train" else 400, 0)] for part in PARTS}


@pytest.fixture(scope="module")
def passages() -> list[str]:
    rng = random.Random(5)
    return [french.passage(rng) for _ in range(3000)]


@pytest.mark.parametrize(("marked", "expected"), HAND_WRITTEN)
def test_grammar_gives_the_hand_written_french(marked: str, expected: str) -> None:
    english, translation = _build(marked)
    assert english == re.sub(r"[\[\]()]", "", marked)
    assert as_sentence(translation) == expected


def test_articles_agree_with_gender_and_number_by_hand_lists(splits: dict[Part, list[dict[str, str]]]) -> None:
    """Nothing of the generator's tables is used: articles directly before a noun, against lists written by hand."""
    assert not set(MASCULINE) & set(FEMININE)
    assert {noun.french_singular for noun in NOUNS} == {*MASCULINE, *FEMININE}
    seen = 0
    for fields in splits["train"]:
        text = fields["french"].lower()
        for article, noun in re.findall(r"\b(le|la|un|une|ce|cet|cette|mon|ma|au|du) (\w+)", text):
            if noun in MASCULINE:
                assert article in ("le", "un", "ce", "cet", "mon", "au", "du"), text
                assert (article == "cet") == (noun[0] in "aeohé") or article not in ("ce", "cet"), text
            elif noun in FEMININE:
                assert article in ("la", "une", "cette", "ma") or (article == "mon" and noun[0] in "aeohé"), text
            seen += noun in MASCULINE or noun in FEMININE
    assert seen > 4000


def test_elision_and_contraction_are_always_made(splits: dict[Part, list[dict[str, str]]]) -> None:
    wrong = re.compile(
        r"\b(le|la|je|ne|de|ce|ma) [aeéèêiouh]|\b[ljnd]' |\b[ljnd]'[^aeéèêiouh]|\b(de|à) les? "
        r"|(?<!près )\bdes (petit|grand|beau|belle|vieux|vieill|nouve|bon|jeune)"
        r"|\b(beau|nouveau|vieux) [aeéoh]\w*[^sx ]\b"
    )
    for part in PARTS:
        for fields in splits[part]:
            assert not wrong.search(fields["french"].lower()), fields["french"]
    assert (
        wrong.search("près de le parc")
        and wrong.search("je aime")
        and wrong.search("un vieux arbre")
        and wrong.search("il voit des petits chats")
    )


def test_rows_are_distinct_deterministic_and_short(splits: dict[Part, list[dict[str, str]]]) -> None:
    for fields in splits.values():
        assert len({row["english"] for row in fields}) == len(fields)
        assert {len(row["english"].split()) for row in fields} <= set(range(4, 13))
    again = french.rows("test", 400, 0)
    assert [row.fields for row in again] == splits["test"]
    assert [row.fields for row in french.rows("test", 400, 1)] != splits["test"]


def test_too_many_rows_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    only = sentence(random.Random(0), "test")
    monkeypatch.setattr(french, "sentence", lambda rng, part: only)
    assert len(french.rows("test", 1, 0)) == 1
    with pytest.raises(ValueError, match="1 distinct sentences found, 2 wanted"):
        french.rows("test", 2, 0)


@pytest.mark.parametrize("part", PARTS)
def test_every_pair_of_a_sentence_lies_in_its_part(part: Part) -> None:
    rng = random.Random(3)
    for _ in range(3000):
        drawn = sentence(rng, part)
        assert drawn.pairs and all(part_of(pair) == part for pair in drawn.pairs)
    for row in french.rows(part, 300, 2):
        assert part_of(row.combination) == part
        words = re.split(r"[+@>]", row.combination)
        nouns = {noun.singular: noun.plural for noun in NOUNS}
        text = f" {row.fields['english'].lower()[:-1]} "
        for word in words:
            forms = {word, nouns.get(word, word)} | {verb.third for verb in VERBS if verb.base == word}
            assert any(f" {form} " in text for form in forms), (row.combination, text)


def _adjacent(texts: list[str]) -> set[tuple[str, str]]:
    """English adjective and noun (as a singular) side by side, read from the text alone."""
    singular = {form: noun.singular for noun in NOUNS for form in (noun.singular, noun.plural)}
    adjectives = {adjective.english for adjective in ADJECTIVES}
    found = set()
    for text in texts:
        words = re.findall(r"[^\W\d_]+", text.lower())
        found |= {(a, singular[b]) for a, b in pairwise(words) if a in adjectives and b in singular}
    return found


def test_held_out_pairs_are_new(splits: dict[Part, list[dict[str, str]]], passages: list[str]) -> None:
    shown = _adjacent([row["english"] for row in splits["train"]]) | _adjacent(
        # "orange" is the same word in both languages, and "table" too: keep the English side of each entry.
        [piece for text in passages for piece in re.split(r" ; |\n| = | -> | : |[.,()]", text)]
    )
    test = _adjacent([row["english"] for row in splits["test"]])
    assert len(shown) > 300 and len(test) > 30
    assert not shown & test
    assert not shown & _adjacent([row["english"] for row in splits["validation"]])


def test_passages_hold_no_held_out_sentence(splits: dict[Part, list[dict[str, str]]], passages: list[str]) -> None:
    text = "\n".join(passages).lower()
    for part in ("validation", "test"):
        for row in splits[part]:
            for field in ("english", "french"):
                bare = row[field].lower()[:-1]
                assert bare not in text or not re.search(rf"(?<!\w){re.escape(bare)}(?!\w)", text), bare


def test_train_and_passages_cover_every_word(splits: dict[Part, list[dict[str, str]]], passages: list[str]) -> None:
    """Each word of a held-out row occurs often in train rows and in passages: only the pairing is new."""

    def counts(text: str) -> dict[str, int]:
        words = re.findall(r"[^\W\d_]+", text.lower())
        found: dict[str, int] = {}
        for word in words:
            found[word] = found.get(word, 0) + 1
        return found

    train, prose = counts(" ".join(" ".join(row.values()) for row in splits["train"])), counts(" ".join(passages))
    for part in ("validation", "test"):
        for word in counts(" ".join(" ".join(row.values()) for row in splits[part])):
            assert train.get(word, 0) >= 10 and prose.get(word, 0) >= 20, (word, train.get(word), prose.get(word))


def test_passages_are_prose_of_the_right_length_without_task_wording(passages: list[str]) -> None:
    lengths = sorted(len(text.split()) for text in passages)
    assert lengths[0] >= 25 and lengths[-1] <= 170 and len(set(passages)) > 2990
    forbidden = re.compile(r"translat|english|french|positive|negative|neutral|<\||\|>", re.IGNORECASE)
    assert not any(forbidden.search(text) for text in passages)
    assert french.passage(random.Random(9)) == french.passage(random.Random(9))


def test_pronouns_are_unambiguous() -> None:
    """One English pronoun, one French: "you" and "it" are left out."""
    assert {english: french_word for english, (french_word, _) in PRONOUNS.items()} == {
        "I": "je",
        "he": "il",
        "she": "elle",
        "we": "nous",
        "they": "ils",
    }


def test_one_english_sentence_has_one_translation() -> None:
    """The same sentence drawn again, from other seeds, has the same French."""
    seen: dict[str, str] = {}
    repeated = 0
    for seed in range(3):
        for row in french.rows("train", 3000, seed):
            repeated += row.fields["english"] in seen
            assert seen.setdefault(row.fields["english"], row.fields["french"]) == row.fields["french"]
    assert repeated > 20
