"""Short reviews whose verdict is decided by composition (sentiment), and prose about what reviewers did next.

A review is ``[opener] core [closer]``. The core is one or two clauses joined by a connector; a clause is a frame ("I
found it"), a kind of predicate ("far from {a}") and its adjectives. A clause is worth +1, -1 or 0: a negation flips its
adjective, and a pair of adjectives that disagree is worth 0. The clause that the connector stresses decides;
what other people say, a question or an expectation never decides. The *combination* is the core's frames, kinds and
connector without the adjectives and nouns: the same skeleton appears with every label, and no two parts share one.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scripts.tiny_corpus.holdout import Part, Row, part_of
from scripts.tiny_corpus.words import FIRST_NAMES, NUMBERS

LABELS = {1: "positive", -1: "negative", 0: "neutral"}

GOOD = "good great lovely wonderful excellent pleasant charming splendid nice superb delightful brilliant".split()
BAD = "bad awful terrible horrible dreadful poor dull ugly nasty boring useless annoying".split()

DIRECT = {"plain": "{a}", "very": "very {a}", "really": "really {a}", "truly": "truly {a}"}
NEGATED = {
    "not": "not {a}",
    "never": "never {a}",
    "hardly": "hardly {a}",
    "far": "far from {a}",
    "anything": "anything but {a}",
    "at_all": "not at all {a}",
    "no_means": "by no means {a}",
}
PAIRED = {
    "both": "both {a} and {b}",
    "half": "half {a} and half {b}",
    "neither": "neither {a} nor {b}",
}
NEEDS_BE = ("not", "never")  # "it was never dull", but not "I found it never dull"

VERDICT_FRAMES = {
    "was": "it was",
    "is": "the {item} is",
    "itself": "the {item} itself was",
    "found": "I found it",
    "all_in_all": "all in all it was",
    "in_the_end": "in the end it was",
    "to_me": "to me it is",
    "for_us": "for us it was",
    "turned_out": "it turned out to be",
}
IMPRESSION_FRAMES = {
    "aspect": "the {aspect} was",
    "at_first": "at first it seemed",
    "looked": "it looked",
    "first_day": "on the first day it was",
    "last_year": "last year it was",
}
HEARSAY_FRAMES = {
    "people": "people say it is",
    "others": "others say it was",
    "called": "my {relative} called it",
    "finds": "{name} finds it",
    "expected": "I had expected it to be",
    "hoped": "my {relative} thought it would be",
    "paper": "the paper says it is",
    "says": "{name} says it is",
}
BE_FRAMES = frozenset(
    "was is itself all_in_all in_the_end to_me for_us aspect first_day last_year people others paper says".split()
)
OPEN_CLAUSES = {
    "not_yet": "I have not {used} it yet",
    "cannot_say": "I cannot say yet",
    "find_out": "I will find out on {day}",
    "shall_see": "we shall see on {day}",
    "do_not_know": "I do not know it myself",
    "waits": "I must wait for my turn",
}
CONTRASTS = {
    "but": "{first}, but {last}",
    "although": "although {first}, {last}",
    "even_though": "{last}, even though {first}",
    "though": "{last}, though {first}",
    "still": "{first}. Still, {last}",
    "however": "{first}. However, {last}",
}
ADDITIONS = {"and": "{first}, and {last}", "indeed": "{first}. Indeed, {last}"}

OPENERS = (
    "This is about the {item}.",
    "A word about the {item}.",
    "You asked me about the {item}.",
    "My {relative} told me about the {item}.",
    "We chose the {item} on {day}.",
    "On {day} it was time for the {item}.",
    "I have not written about a {item} before.",
    "I had never thought much about a {item}.",
    "The {item} was the idea of my {relative}.",
    "We talked about the {item} for {number} days.",
)
CLOSERS = (
    "I have not {used} any other {item} yet.",
    "I cannot say yet what the others are like.",
    "I will find out about the others on {day}.",
    "We shall see the others on {day}.",
    "I do not know the others myself.",
    "I must wait for the others.",
    "My {relative} must wait for a turn.",
    "My {relative} was there too.",
    "It rained on {day}.",
    "We went home at {number}.",
    "That is all for today.",
)
RELATIVES = "mother father sister brother friend aunt uncle neighbour".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
# item, its aspects, and the participle of what one does with it
ITEM_GROUPS: tuple[tuple[Sequence[str], Sequence[str], str], ...] = (
    ("lamp clock hat coat bag mirror basket cup".split(), ("colour", "shape", "price"), "used"),
    ("soup cake bread cheese salad".split(), ("smell", "colour", "price"), "tasted"),
    ("film play show dance".split(), ("start", "title", "music"), "seen"),
    ("hotel garden park market library".split(), ("view", "name", "light"), "visited"),
)

CONSEQUENCES: Mapping[int, Sequence[str]] = {
    1: (
        "So {n} wanted the same {item} again.",
        "{n} smiled and asked for more.",
        "{n} would choose this {item} again.",
        "{n} liked it and told every friend to try it.",
        "That made {n} happy.",
    ),
    -1: (
        "So {n} never wanted the same {item} again.",
        "{n} frowned and asked for nothing more.",
        "{n} would choose another {item} next time.",
        "{n} did not like it and told every friend to stay away.",
        "That made {n} sad.",
    ),
    0: (
        "So {n} could not decide about the {item}.",
        "{n} shrugged and asked for more time.",
        "{n} may or may not choose this {item} again.",
        "{n} had no strong feeling and told every friend to wait.",
        "That left {n} calm.",
    ),
}
FEELINGS: Mapping[int, Sequence[str]] = {
    1: ("{n} liked {it}", "{n} was happy about {it}", "{n} wanted {it} again"),
    -1: ("{n} did not like {it}", "{n} was sad about {it}", "{n} never wanted {it} again"),
    0: ("{n} could not decide about {it}", "{n} was calm about {it}", "{n} wanted to wait with {it}"),
}


@dataclass(frozen=True)
class Clause:
    """One clause without its subject's words filled in.

    Attributes:
        skeleton: Frame and kind, without adjectives and nouns.
        value: +1, -1 or 0 (no verdict, or adjectives that disagree).
        text: The clause with its adjectives; nouns are still slots.
    """

    skeleton: str
    value: int
    text: str


@dataclass(frozen=True)
class Review:
    """A generated review.

    Attributes:
        text: The whole review.
        value: +1, -1 or 0.
        combination: The core's skeleton.
        item: What is reviewed.
    """

    text: str
    value: int
    combination: str
    item: str


def rows(part: Part, count: int, seed: int) -> list[Row]:
    """Rows ``text``, ``label`` of one part, with the three labels equally often and distinct texts.

    Args:
        part: The part that every row's combination belongs to.
        count: How many rows.
        seed: Seed of the generator; the same arguments give the same rows.
    """
    rng = random.Random(f"reviews/{part}/{seed}")
    values = [(1, -1, 0)[index % 3] for index in range(count)]
    rng.shuffle(values)
    seen: set[str] = set()
    result: list[Row] = []
    for value in values:
        review = draw_review(rng, part=part, value=value)
        while review.text in seen or not 10 <= len(review.text.split()) <= 35:
            review = draw_review(rng, part=part, value=value)
        seen.add(review.text)
        result.append(Row({"text": review.text, "label": LABELS[value]}, review.combination))
    return result


def passage(rng: random.Random) -> str:
    """One pretraining passage: reviews of the train part with what their writers felt or did, in prose."""
    pieces: list[str] = []
    words = 0
    while words < 40:
        form = rng.choice((_report, _report, _reason, _panel, _word_sense, _short_verdicts))
        pieces.append(form(rng))
        words += len(pieces[-1].split())
    return " ".join(pieces)


def draw_review(rng: random.Random, *, part: Part, value: int) -> Review:
    """A random review of the given part and value, drawn until its core's skeleton belongs to the part."""
    while True:
        combination, core, needs_opener = _draw_core(rng, value)
        if part_of(combination) == part:
            break
    slots = _draw_slots(rng)
    sentences = [_capital(core) + "."]
    if needs_opener or rng.random() < 0.6:
        sentences.insert(0, rng.choice(OPENERS))
    if rng.random() < 0.4:
        sentences.append(rng.choice(CLOSERS))
    text = " ".join(_capital(sentence.format_map(slots)) for sentence in sentences)
    return Review(text=text, value=value, combination=combination, item=slots["item"])


def _draw_core(rng: random.Random, value: int) -> tuple[str, str, bool]:
    """Skeleton and text of a core worth ``value``, and whether it needs an opener (it is a single clause)."""
    if value == 0 and rng.random() < 0.4:
        name = rng.choice(list(OPEN_CLAUSES))
        last = Clause(f"open/{name}", 0, OPEN_CLAUSES[name])
        first, from_others = _draw_clause(rng, HEARSAY_FRAMES, rng.choice((1, -1, 1, -1, 0))), True
        connectors = CONTRASTS
    else:
        last = _draw_clause(rng, VERDICT_FRAMES, value)
        if rng.random() < 0.3:
            return last.skeleton, last.text, True
        from_others = rng.random() < (0.35 if value == 0 else 0.6)
        agrees = rng.random() < 0.4
        first_value = value if agrees else rng.choice([other for other in (1, -1, 1, -1, 0) if other != value])
        first = _draw_clause(rng, HEARSAY_FRAMES if from_others else IMPRESSION_FRAMES, first_value)
        connectors = ADDITIONS if agrees else CONTRASTS
    if from_others and rng.random() < 0.1:
        kind, predicate = draw_predicate(rng, first.value, after_be=True)
        while kind in NEGATED or kind == "neither":  # nobody asks "is it far from good?"
            kind, predicate = draw_predicate(rng, first.value, after_be=True)
        return f"question/{kind}|{last.skeleton}", f"is it {predicate}? {_capital(last.text)}", False
    connector = rng.choice(list(connectors))
    core = connectors[connector].format(first=first.text, last=last.text)
    return f"{first.skeleton}|{connector}|{last.skeleton}", core, False


def _draw_clause(rng: random.Random, frames: Mapping[str, str], value: int) -> Clause:
    frame = rng.choice(list(frames))
    kind, predicate = draw_predicate(rng, value, after_be=frame in BE_FRAMES)
    return Clause(f"{frame}/{kind}", value, f"{frames[frame]} {predicate}")


def draw_predicate(rng: random.Random, value: int, *, after_be: bool) -> tuple[str, str]:
    """Kind and words of a predicate worth ``value``."""
    if value == 0 or rng.random() < 0.25:
        kind = rng.choice(("neither", *PAIRED))
        first_sign = rng.choice((1, -1)) if value == 0 else (-value if kind == "neither" else value)
        second_sign = -first_sign if value == 0 else first_sign
        first = rng.choice(_adjectives(first_sign))
        second = rng.choice(_adjectives(second_sign))
        while second == first:
            second = rng.choice(_adjectives(second_sign))
        return kind, PAIRED[kind].format(a=first, b=second)
    if rng.random() < 0.5:
        kind = rng.choice(list(DIRECT))
        return kind, DIRECT[kind].format(a=rng.choice(_adjectives(value)))
    kind = rng.choice([name for name in NEGATED if after_be or name not in NEEDS_BE])
    return kind, NEGATED[kind].format(a=rng.choice(_adjectives(-value)))


def _adjectives(sign: int) -> Sequence[str]:
    return GOOD if sign > 0 else BAD


def _draw_slots(rng: random.Random) -> dict[str, str]:
    items, aspects, used = rng.choice(ITEM_GROUPS)
    return {
        "item": rng.choice(items),
        "aspect": rng.choice(aspects),
        "used": used,
        "relative": rng.choice(RELATIVES),
        "name": rng.choice(FIRST_NAMES),
        "day": rng.choice(DAYS),
        "number": rng.choice(NUMBERS),
    }


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _report(rng: random.Random) -> str:
    """A review, then its verdict in plain words and what its writer did."""
    review = draw_review(rng, part="train", value=rng.choice((1, -1, 0)))
    name = rng.choice(FIRST_NAMES)
    lead = rng.choice(("{n} wrote this. ", "{n} said: ", "From {n} we heard: ", "")).format(n=name)
    endings = [_sum_up(rng, review.value, name), _reaction(rng, CONSEQUENCES, review, name)]
    rng.shuffle(endings)
    return lead + " ".join((review.text, *endings))


def _reason(rng: random.Random) -> str:
    """What somebody felt, then the review that explains it."""
    review = draw_review(rng, part="train", value=rng.choice((1, -1, 0)))
    name = rng.choice(FIRST_NAMES)
    link = rng.choice(("Here is why.", "The reason was this.", "{n} told us why.")).format(n=name)
    return f"{_reaction(rng, FEELINGS, review, name)}. {link} {review.text}"


def _panel(rng: random.Random) -> str:
    """Two people's reviews, then how each of them felt, in another order."""
    names = rng.sample(FIRST_NAMES, 2)
    reviews = [draw_review(rng, part="train", value=rng.choice((1, -1, 0))) for _ in names]
    said = [f"{name} said: {review.text}" for name, review in zip(names, reviews, strict=True)]
    felt = [_reaction(rng, FEELINGS, review, name) for name, review in zip(names, reviews, strict=True)]
    rng.shuffle(felt)
    sums = [_sum_up(rng, review.value, name) for name, review in zip(names, reviews, strict=True)]
    return f"{said[0]} {sums[0]} {said[1]} {sums[1]} Afterwards {felt[0]}, and {felt[1]}."


def _word_sense(rng: random.Random) -> str:
    """What predicates amount to: the polarity of the adjectives and of their negations."""
    sentences = []
    for _ in range(3):
        sign = rng.choice((1, -1))
        kind = rng.choice(list(NEGATED))
        negated = NEGATED[kind].format(a=rng.choice(_adjectives(-sign)))
        first, second, third = rng.sample(list(_adjectives(sign)), 3)
        sentences.append(
            rng.choice(
                (
                    f"What is {negated} is {first}.",
                    f"Who hears that it is {negated} thinks that it is {first} or {second}.",
                    f"The words {first}, {second} and {third} make people {'smile' if sign > 0 else 'frown'}.",
                    f"A thing that is {first} is {second} as well, and by no means {rng.choice(_adjectives(-sign))}.",
                )
            )
        )
    return " ".join(sentences)


def _short_verdicts(rng: random.Random) -> str:
    """Feelings with a one-clause reason each."""
    item = rng.choice(rng.choice(ITEM_GROUPS)[0])
    sentences = [f"Everyone talked about the {item}."]
    for name in rng.sample(FIRST_NAMES, 3):
        value = rng.choice((1, -1, 0))
        _, predicate = draw_predicate(rng, value, after_be=True)
        feeling = rng.choice(FEELINGS[value]).format(n=name, it="it")
        template = rng.choice(("{f}, for it was {p}.", "For {n} it was {p}, so {f}.", "It was {p}, and {f}."))
        sentences.append(template.format(f=feeling, p=predicate, n=name))
    return " ".join(sentences)


def _sum_up(rng: random.Random, value: int, name: str) -> str:
    """The verdict in plain adjectives, whichever words the review chose."""
    if value == 0:
        first, second = rng.sample((rng.choice(GOOD), rng.choice(BAD)), 2)
        return rng.choice(
            (f"In short, {name} said neither {first} nor {second}.", f"So it is open what {name} thinks.")
        )
    words = _adjectives(value)
    return rng.choice(("In short, {n} said {a}.", "So {n} thinks that it is {a}.")).format(n=name, a=rng.choice(words))


def _reaction(rng: random.Random, reactions: Mapping[int, Sequence[str]], review: Review, name: str) -> str:
    """What the writer felt or did; the item is named where the review names it."""
    thing = f"the {review.item}" if review.item in review.text else "it"
    return rng.choice(reactions[review.value]).format(n=name, item=review.item, it=thing)
