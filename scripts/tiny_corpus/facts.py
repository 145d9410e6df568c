"""Question answering: texts of facts, questions answered by a phrase of the text, and prose that teaches look-up."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import product

from scripts.tiny_corpus.holdout import Part, Row, part_of
from scripts.tiny_corpus.words import ANIMALS, COLOURS, FIRST_NAMES, FOODS, NUMBERS, OBJECTS, PLACES

LAST_NAMES = (
    "Hill Stone Wood Baker Miller Cole Bell King Cross West North Lane Marsh Page Reed Rose Frost Ward Wells Fisher"
).split()
OBJECT_SIZES = "big small long short old new heavy round flat".split()
ANIMAL_KINDS = "big small old young quick slow".split()
PLACE_MOODS = "quiet busy dark bright cold warm".split()
PLACE_AGES = "old new big small long empty".split()
FOOD_STATES = "warm cold fresh dry hot".split()
FOOD_TASTES = "sweet soft plain salty brown white".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
HOURS = {
    "morning": "five six seven eight nine ten eleven".split(),
    "afternoon": "one two three four five".split(),
    "evening": "five six seven eight nine".split(),
    "night": "nine ten eleven twelve".split(),
}
CONTAINERS = "box bag basket bottle cup hat coat".split()
BUILDINGS = "kitchen garden school market library station park office tower".split()
PLURALS = [f"{noun}es" if noun.endswith("x") else f"{noun}s" for noun in OBJECTS]

PHRASES: dict[str, tuple[list[str], ...]] = {
    "object": (OBJECT_SIZES, COLOURS, OBJECTS),
    "count": (NUMBERS, COLOURS, PLURALS),
    "place": (PLACE_MOODS, PLACE_AGES, PLACES),
    "animal": (ANIMAL_KINDS, COLOURS, ANIMALS),
    "food": (FOOD_STATES, FOOD_TASTES, FOODS),
    "time": (DAYS, [f"{half} at {hour}" for half, hours in HOURS.items() for hour in hours]),
    "person": (FIRST_NAMES, LAST_NAMES),
}
KEYS: dict[str, list[str]] = {
    "name": FIRST_NAMES,
    "object": OBJECTS,
    "container": CONTAINERS,
    "building": BUILDINGS,
    "animal": ANIMALS,
}
ARTICLES = {"object": "a", "animal": "a", "place": "the"}


@dataclass(frozen=True)
class Relation:
    """One kind of fact; its templates hold ``{k}`` key, ``{v}`` value, ``{o}`` a second name, ``{n}`` the value's noun.

    Attributes:
        key: Kind of the key, one of ``KEYS``.
        value: Kind of the value, one of ``PHRASES``.
        forms: Ways to state the fact; the first is the plain one, the last puts the value first.
        questions: Ways to ask for the value.
    """

    key: str
    value: str
    forms: tuple[str, ...]
    questions: tuple[str, ...]


RELATIONS: dict[str, Relation] = {
    "lives": Relation(
        "name", "place",
        ("{k} lives near {v}.", "the home of {k} is near {v}.", "{v} is where {k} lives."),
        ("Where does {k} live?", "Where is the home of {k}?"),
    ),
    "works": Relation(
        "name", "place",
        ("{k} works at {v}.", "every day {k} works at {v}.", "{v} is where {k} works."),
        ("Where does {k} work?", "At which place does {k} work?"),
    ),
    "lies": Relation(
        "object", "place",
        ("{k} is in {v}.", "somebody left {k} in {v}.", "{v} is where {k} is now."),
        ("Where is {k}?", "In which place is {k}?"),
    ),
    "bought": Relation(
        "name", "object",
        ("{k} bought {v}.", "last week {k} bought {v}.", "{v} was bought by {k}."),
        ("What did {k} buy?", "Which thing did {k} buy?"),
    ),
    "found": Relation(
        "name", "object",
        ("{k} found {v}.", "this morning {k} found {v}.", "{v} was found by {k}."),
        ("What did {k} find?", "Which thing did {k} find?"),
    ),
    "gave": Relation(
        "name", "object",
        ("{k} gave {v} to {o}.", "{k} gave {o} {v}.", "{v} was given to {o} by {k}."),
        ("What did {k} give to {o}?", "What did {o} get from {k}?"),
    ),
    "holds": Relation(
        "container", "object",
        ("{k} holds {v}.", "inside {k} there is {v}.", "{v} is inside {k}."),
        ("What is inside {k}?", "What does {k} hold?"),
    ),
    "counted": Relation(
        "name", "count",
        ("{k} counted {v}.", "yesterday {k} counted {v}.", "{v} were counted by {k}."),
        ("What did {k} count?", "How many {n} did {k} count?"),
    ),
    "has": Relation(
        "building", "count",
        ("{k} has {v}.", "in {k} there are {v}.", "{v} are in {k}."),
        ("What does {k} have?", "How many {n} are in {k}?"),
    ),
    "opens": Relation(
        "building", "time",
        ("{k} opens on {v}.", "people say that {k} opens on {v}.", "{v} is when {k} opens."),
        ("When does {k} open?", "On which day does {k} open, and at what hour?"),
    ),
    "arrives": Relation(
        "name", "time",
        ("{k} arrives on {v}.", "people say that {k} arrives on {v}.", "{v} is when {k} arrives."),
        ("When does {k} arrive?", "On which day does {k} arrive, and at what hour?"),
    ),
    "likes": Relation(
        "animal", "food",
        ("{k} likes {v}.", "the food of {k} is {v}.", "{v} is the food that {k} likes."),
        ("What does {k} like?", "Which food does {k} like?"),
    ),
    "cooked": Relation(
        "name", "food",
        ("{k} cooked {v}.", "last night {k} cooked {v}.", "{v} was cooked by {k}."),
        ("What did {k} cook?", "Which food did {k} cook?"),
    ),
    "feeds": Relation(
        "name", "animal",
        ("{k} feeds {v}.", "every day {k} feeds {v}.", "{v} is fed by {k}."),
        ("What does {k} feed?", "Which animal does {k} feed?"),
    ),
    "owns": Relation(
        "object", "person",
        ("{k} belongs to {v}.", "the owner of {k} is {v}.", "{v} owns {k}."),
        ("Who owns {k}?", "Who is the owner of {k}?"),
    ),
    "runs": Relation(
        "building", "person",
        ("{k} is run by {v}.", "the work in {k} is done by {v}.", "{v} runs {k}."),
        ("Who runs {k}?", "Who does the work in {k}?"),
    ),
}  # fmt: skip
VALUE_FIRST_SHARE = 0.2
SHARED_KEY_SHARE = 0.2


@dataclass(frozen=True)
class _Fact:
    relation: str
    key: str
    value: str
    other: str  # the second name, "" where the relation has none

    def value_with_article(self) -> str:
        article = ARTICLES.get(RELATIONS[self.relation].value, "")
        if article == "a" and self.value[0] in "aeiou":
            article = "an"
        return f"{article} {self.value}".lstrip()

    def clause(self, template: str) -> str:
        key = self.key if RELATIONS[self.relation].key == "name" else f"the {self.key}"
        noun = self.value.rsplit(" ", 1)[-1]
        return template.format(k=key, v=self.value_with_article(), o=self.other, n=noun)

    def fill(self, template: str) -> str:
        text = self.clause(template)
        return text[0].upper() + text[1:]

    def plain(self) -> str:
        return self.fill(RELATIONS[self.relation].forms[0])

    def told(self, rng: random.Random) -> str:
        forms = RELATIONS[self.relation].forms
        return self.fill(forms[-1] if rng.random() < VALUE_FIRST_SHARE else rng.choice(forms[:-1]))

    def question(self, rng: random.Random) -> str:
        return self.fill(rng.choice(RELATIONS[self.relation].questions))


@cache
def phrases(kind: str, part: Part) -> tuple[str, ...]:
    """All answer phrases of a kind (one of ``PHRASES``) that belong to ``part``, in a fixed order."""
    every = (" ".join(words) for words in product(*PHRASES[kind]))
    return tuple(phrase for phrase in every if part_of(phrase) == part)


@cache
def held_out_phrases() -> frozenset[str]:
    """Every answer phrase of the validation and test parts; none may stand in pretraining text or in a train row."""
    return frozenset(phrase for kind in PHRASES for part in ("validation", "test") for phrase in phrases(kind, part))


def held_out_in(text: str) -> list[str]:
    """The held-out answer phrases that stand in ``text`` as whole words, in order; case and punctuation are ignored."""
    words = re.findall(r"\w+", text.lower())
    runs = (" ".join(words[i : i + n]) for i in range(len(words)) for n in (2, 3, 4))
    held_out = _held_out_lower()
    return [run for run in runs if run in held_out]


@cache
def _held_out_lower() -> frozenset[str]:
    return frozenset(phrase.lower() for phrase in held_out_phrases())


def _content_words(phrase: str) -> set[str]:
    return set(phrase.split()) - {"at"}


def _new_fact(rng: random.Random, relation: str, part: Part, used: set[str], key: str | None = None) -> _Fact | None:
    """A fact that shares no word with ``used`` (which grows by its words), or None where no free phrase was met."""
    kind = RELATIONS[relation]
    taken = set(used)
    if key is None:
        free = [word for word in KEYS[kind.key] if word not in taken]
        if not free:
            return None
        key = rng.choice(free)
    taken.add(key)
    other = ""
    if relation == "gave":
        other = rng.choice([name for name in FIRST_NAMES if name not in taken])
        taken.add(other)
    pool = phrases(kind.value, part)
    for _ in range(40):
        value = rng.choice(pool)
        words = _content_words(value)
        if taken.isdisjoint(words):
            used |= taken | words
            return _Fact(relation, key, value, other)
    return None


def draw_facts(rng: random.Random, relation: str, part: Part) -> list[_Fact]:
    """3-6 facts: two or more of ``relation`` (the first is the one asked for), then one or two of others."""
    while True:
        facts = _try_facts(rng, relation, part)
        if len(facts) >= 3 and facts[1].relation == relation:
            return facts


def _try_facts(rng: random.Random, relation: str, part: Part) -> list[_Fact]:
    """Facts drawn at random, fewer than wished where the part's phrases run out.

    No two share a word, but that one of the others may have the first fact's key: then the relation decides.
    """
    used: set[str] = set()
    found = [_new_fact(rng, relation, part, used) for _ in range(rng.randint(2, 4))]
    facts = [fact for fact in found if fact is not None]
    if not facts:
        return facts
    others = rng.sample([name for name in RELATIONS if name != relation], rng.randint(1, 2))
    if rng.random() < SHARED_KEY_SHARE:
        same_kind = [name for name in RELATIONS if name != relation and RELATIONS[name].key == RELATIONS[relation].key]
        if same_kind:
            name = rng.choice(same_kind)
            shared = _new_fact(rng, name, part, used, facts[0].key)
            facts += [shared] if shared is not None else []
            others = [other for other in others[1:] if other != name]
    for name in others:
        extra = _new_fact(rng, name, part, used)
        facts += [extra] if extra is not None else []
    return facts


def rows(part: Part, count: int, seed: int) -> list[Row]:
    """Distinct rows of a part: a context of 3-6 facts, a question about one of them, its answer as a bare phrase.

    Args:
        part: All phrases of the context, not the answer alone, belong to it.
        count: Number of rows; the relations take turns.
        seed: Same part, count and seed give the same rows.
    """
    rng = random.Random(f"facts/{part}/{seed}")
    names = list(RELATIONS)
    result: list[Row] = []
    seen: set[tuple[str, str]] = set()
    while len(result) < count:
        relation = names[len(result) % len(names)]
        facts = draw_facts(rng, relation, part)
        asked = facts[0]
        question = asked.question(rng)
        rng.shuffle(facts)
        context = " ".join(fact.told(rng) for fact in facts)
        if (context, question) in seen:
            continue
        seen.add((context, question))
        result.append(Row({"context": context, "question": question, "answer": asked.value}, asked.value))
    rng.shuffle(result)
    return result


def passage(rng: random.Random) -> str:
    """One pretraining passage of 30-150 words: facts told, then looked up, listed or told again in whole sentences.

    It draws train phrases only and never answers a question by a bare phrase.
    """
    return rng.choice(_PASSAGES)(rng, draw_facts(rng, rng.choice(list(RELATIONS)), "train"))


def tell(rng: random.Random, facts: list[_Fact]) -> str:
    order = rng.sample(facts, len(facts))
    return " ".join(fact.told(rng) for fact in order)


def _asked(rng: random.Random, facts: list[_Fact]) -> str:
    """The text, then questions with answers in whole sentences."""
    ending = rng.choice((" That is what the text says.", " So the text says.", ""))
    asked = rng.sample(facts, min(len(facts), rng.randint(3, 4)))
    return f"{tell(rng, facts)} " + " ".join(f"{fact.question(rng)} {fact.plain()}{ending}" for fact in asked)


def _told_again(rng: random.Random, facts: list[_Fact]) -> str:
    """The text, then the same facts in another order and other words."""
    opening = rng.choice(("Now the same in another order.", "Let us say it again.", "Told once more:"))
    return f"{tell(rng, facts)} {opening} {tell(rng, facts)}"


def _dialogue(rng: random.Random, facts: list[_Fact]) -> str:
    """The text, then two people who remember it."""
    names = {fact.key for fact in facts} | {word for fact in facts for word in (fact.other, *fact.value.split())}
    first, second = rng.sample([name for name in FIRST_NAMES if name not in names], 2)
    lines = [tell(rng, facts)]
    for fact in rng.sample(facts, min(len(facts), 3)):
        lines.append(f'"{fact.question(rng)}" asked {first}. "{fact.plain()[:-1]}," said {second}.')
    return "\n".join(lines)


def _key_list(rng: random.Random, facts: list[_Fact]) -> str:
    """A list of keys and values, then single lines of it again and as sentences."""
    sign = rng.choice((" : ", " = ", " - "))
    by_key = {fact.key: fact for fact in facts}  # a key that two facts share is listed once
    listed = list(by_key.values())
    lines = [f"{fact.key}{sign}{fact.value}" for fact in listed]
    again = rng.sample(listed, len(listed))
    repeated = [f"{fact.key}{sign}{fact.value}" for fact in again[:3]]
    separator = rng.choice(("\n", " ; "))
    sentences = " ".join(fact.plain() for fact in again)
    return f"{separator.join(lines)}\n{separator.join(repeated)}\n{sentences}"


def _not_that_one(rng: random.Random, facts: list[_Fact]) -> str:
    """The text, then a question whose wrong answer is corrected: 'it is not this, because that is another key's'."""
    asked, wrong = facts[0], facts[1]
    because = wrong.clause(RELATIONS[wrong.relation].forms[0])
    rest = " ".join(fact.plain() for fact in rng.sample(facts[1:], len(facts) - 1))
    correction = f"It is not {wrong.value_with_article()}, because {because} {asked.plain()}"
    return f"{tell(rng, facts)} {asked.question(rng)} {correction} {rest}"


_PASSAGES: tuple[Callable[[random.Random, list[_Fact]], str], ...] = (
    _asked,
    _asked,
    _told_again,
    _dialogue,
    _key_list,
    _not_that_one,
)
