"""Short stories from an opening (the text_generation task), and other narrative prose for pretraining.

A story follows one plan: the hero finds the thing, the weather of the opening is the obstacle, the hero's trait shows,
an animal that can help comes and solves the problem, it gets the food of the opening, and the wish comes true.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from scripts.tiny_corpus.holdout import Part, Row, part_of
from scripts.tiny_corpus.story_tables import (
    ARRIVALS,
    JOBS,
    MEAL_LORE,
    MEETINGS,
    OBSTACLES,
    OPENINGS,
    PAST_LORE,
    PLACE_LORE,
    PLACES,
    PORTIONS,
    PRONOUNS,
    REACTIONS,
    RELATIVES,
    THANKS,
    TRAIT_LORE,
    WEATHER_LORE,
    WISH_LORE,
    WISHES,
)
from scripts.tiny_corpus.words import COLOURS, FIRST_NAMES, OBJECTS


def _opening_slots(rng: random.Random, part: Part) -> tuple[dict[str, str], str]:
    """Draw what an opening tells, with a combination of the given part."""
    while True:
        slots = {
            "trait": rng.choice(tuple(REACTIONS)),
            "colour": rng.choice(COLOURS),
            "object": rng.choice(OBJECTS),
            "place": rng.choice(tuple(PLACES)),
            "weather": rng.choice(tuple(OBSTACLES)),
        }
        combination = "story|" + "|".join(slots.values())
        if part_of(combination) == part:
            break
    name = rng.choice(FIRST_NAMES)
    he, his, him = PRONOUNS[name]
    slots |= {"name": name, "he": he, "his": his, "him": him, "at": PLACES[slots["place"]]}
    slots |= {"job": rng.choice(JOBS), "relative": rng.choice(RELATIVES), "food": rng.choice(PORTIONS)}
    slots["time"] = rng.choice(OBSTACLES[slots["weather"]].times)
    return slots, combination


def _story(rng: random.Random, slots: dict[str, str], wish: str) -> str:
    obstacle = OBSTACLES[slots["weather"]]
    slots = slots | {"animal": rng.choice(obstacle.helpers)}
    slots["problem"] = rng.choice(obstacle.problems).format(**slots)
    plan = (
        rng.choice(ARRIVALS),
        rng.choice(REACTIONS[slots["trait"]]),
        rng.choice(MEETINGS),
        "the {animal} " + rng.choice(obstacle.solutions),
        rng.choice(THANKS),
        rng.choice(WISHES[wish]),
    )
    return " ".join(sentence.format(**slots) + "." for sentence in plan)


def rows(part: Part, count: int, seed: int) -> list[Row]:
    """Make rows with distinct openings, all of one part.

    Args:
        part: The part that every row's combination (trait, colour, object, place, weather) belongs to.
        count: The number of rows.
        seed: Fixes the rows; another seed gives others of the same part.

    Returns:
        Rows with the fields ``opening`` (one or two sentences) and ``story`` (six sentences).
    """
    rng = random.Random(f"stories/{part}/{seed}")
    made: dict[str, Row] = {}
    while len(made) < count:
        slots, combination = _opening_slots(rng, part)
        wish = rng.choice(tuple(WISHES))
        opening = rng.choice(OPENINGS).format(**slots, wish=wish.format(**slots))
        if opening not in made:
            made[opening] = Row({"opening": opening, "story": _story(rng, slots, wish)}, combination)
    return list(made.values())


def _sentences(rng: random.Random, slots: dict[str, str], count: int) -> list[str]:
    """Draw sentences of mixed kinds that share the same name, thing, place and weather."""
    pool = [
        *rng.sample(WEATHER_LORE[slots["weather"]], 2),
        TRAIT_LORE[slots["trait"]],
        rng.choice(WISH_LORE),
        *rng.sample(PAST_LORE, 2),
        *rng.sample(MEAL_LORE, 2),
        *rng.sample(PLACE_LORE, 2),
    ]
    return [sentence.format(**slots) for sentence in rng.sample(pool, count)]


def _diary(rng: random.Random, slots: dict[str, str]) -> str:
    body = ". ".join(_sentences(rng, slots, rng.randint(3, 6)))
    start = rng.choice(
        (
            "dear diary, it is a {weather} {time} again",
            "today is {weather}, as it was before",
            "day {day}: {weather} {time}",
        )
    )
    return f"{start.format(**slots, day=rng.randint(1, 99))}. {body}. that is all for today."


def _dialogue(rng: random.Random, slots: dict[str, str]) -> str:
    speakers = tuple(rng.sample([name for name in FIRST_NAMES if name != slots["name"]], 2))
    spoken = [
        f'"have you seen my {slots["colour"]} {slots["object"]}?" asks {speakers[0]}.',
        f'"the {slots["object"]}? I think I saw it {slots["at"]} the {slots["place"]}," says {speakers[1]}.',
    ]
    sentences = _sentences(rng, slots, rng.randint(3, 5))
    spoken += [f'"{sentence}," says {speakers[turn % 2]}.' for turn, sentence in enumerate(sentences)]
    return " ".join(spoken)


def _portrait(rng: random.Random, slots: dict[str, str]) -> str:
    facts = [
        "{he} lives {at} the {place} with {his} {relative} and a {animal}",
        "{food} is what {he} likes best, and {his} {relative} gives {him} some every {time}",
        "on {weather} days {he} sings, and people look at {him} and laugh",
        "{his} {object} is {colour}, and so is the {object} of {his} {relative}",
        "ask {him}, and {he} will tell you of the {colour} {object}",
        "nobody sees {him} without {his} {object}",
    ]
    told = [fact.format(**slots) for fact in rng.sample(facts, rng.randint(3, 5))]
    first = rng.choice(("{name} is {trait}, and {name} is a {job}", "do you know {name}, the {trait} {job}"))
    end = rng.choice(_sentences(rng, slots, 3))
    return f"{first.format(**slots)}{'?' if first.startswith('do') else '.'} {'. '.join(told)}. {end}."


def _letter(rng: random.Random, slots: dict[str, str]) -> str:
    body = ". ".join(_sentences(rng, slots, rng.randint(3, 5)))
    place = "I write to you from the {place}, on a {weather} {time}".format(**slots)
    return f"dear {slots['relative']}, {place}. {body}. your {rng.choice(FIRST_NAMES)}"


def _who_has_what(rng: random.Random, slots: dict[str, str]) -> str:
    """A plain account of several people, told once and then again the other way round."""
    names = rng.sample(FIRST_NAMES, 3)
    things = [f"{rng.choice(COLOURS)} {thing}" for thing in rng.sample(OBJECTS, 3)]
    told = [f"{name} has a {thing}" for name, thing in zip(names, things, strict=True)]
    again = [f"the {thing} is with {name}" for name, thing in zip(names, things, strict=True)]
    rng.shuffle(again)
    extra = _sentences(rng, slots, 2)
    return ". ".join([*told, extra[0], *again, extra[1]]) + "."


FORMS: tuple[Callable[[random.Random, dict[str, str]], str], ...] = (
    _diary,
    _dialogue,
    _portrait,
    _letter,
    _who_has_what,
)


def passage(rng: random.Random) -> str:
    """One text of about 40-150 words with the words of the stories but another plan, tense and order.

    Args:
        rng: The only source of chance.
    """
    slots, _ = _opening_slots(rng, "train")
    slots["animal"] = rng.choice(OBSTACLES[slots["weather"]].helpers)
    return rng.choice(FORMS)(rng, slots)
