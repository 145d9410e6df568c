"""Code generation: chains of operations, told in words, written as one short Python function, checked by assertions."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from scripts.tiny_corpus.holdout import Part, Row, part_of
from scripts.tiny_corpus.operations import (
    FIXED_RESULT,
    LETTERS,
    MERGING_MAPS,
    NUMBER_FILTERS,
    NUMBER_MAPS,
    PASSAGE_NAMES,
    REDUCTIONS,
    TASK_NAMES,
    TEXT_ENDS,
    TEXT_STEPS,
    WORD_FILTERS,
    WORD_MAPS,
    Names,
    Operation,
)
from scripts.tiny_corpus.words import ANIMALS, COLOURS, FOODS, OBJECTS, PLACES

NAME_VERBS = "find make take get show pick keep read send build call hold".split()
PASSAGE_VERBS = "do run try use turn move hand test note add work start".split()
NAME_NOUNS = OBJECTS + ANIMALS + PLACES
WORD_POOL = OBJECTS + ANIMALS + FOODS + COLOURS
INPUTS_PER_ROW = 3
CANDIDATE_INPUTS = 10
MUTANTS = 9


@dataclass(frozen=True)
class Chain:
    """Operations of one function with their constants (one for each of ``filters + steps``, "" where there is none)."""

    family: str
    joiner: str
    filters: tuple[Operation, ...]
    steps: tuple[Operation, ...]
    constants: tuple[str, ...]

    @property
    def combination(self) -> str:
        """The chain without constants and names; the order of two joined filters does not count.

        Values and words share a label, so that chains that are written alike (``[v * 2 for ...]``) are one combination.
        """
        label = "list" if self.family in ("values", "words") else self.family
        filters = f" {self.joiner} ".join(sorted(operation.key for operation in self.filters))
        return f"{label}|{filters}|{'>'.join(operation.key for operation in self.steps)}"


FAMILIES = ("values", "words", "number", "text")
FAMILY_WEIGHTS = (40, 25, 20, 15)


def _draw_filters(rng: random.Random, choices: Sequence[Operation], count: int) -> tuple[Operation, ...]:
    while True:
        filters = tuple(rng.choice(choices) for _ in range(count))
        if len({operation.group for operation in filters}) == count:
            return filters


def _draw_text_steps(rng: random.Random) -> tuple[Operation, ...]:
    steps = rng.sample(TEXT_STEPS, rng.choice((1, 2, 2, 3)))
    if len(steps) == 1 or (len(steps) == 2 and rng.random() < 0.6):
        steps.append(rng.choice(TEXT_ENDS))
    return tuple(steps)


def _draw_operations(rng: random.Random) -> tuple[str, tuple[Operation, ...], tuple[Operation, ...]]:
    """A family with its filters and steps, not yet checked for sense."""
    family = rng.choices(FAMILIES, FAMILY_WEIGHTS)[0]
    if family == "text":
        return family, (), _draw_text_steps(rng)
    if family == "number":
        filters = _draw_filters(rng, NUMBER_FILTERS, 1 if rng.random() < 0.7 else 2)
        first, second = rng.sample((*NUMBER_MAPS, FIXED_RESULT), 2)
        return family, filters, (first, second)
    choices, maps = (NUMBER_FILTERS, NUMBER_MAPS) if family == "values" else (WORD_FILTERS, WORD_MAPS)
    filters = _draw_filters(rng, choices, rng.choices((0, 1, 2), (10, 45, 45))[0])
    return family, filters, (rng.choice(maps), rng.choice(REDUCTIONS))


def _bounds_make_sense(chain: Chain) -> bool:
    """Whether two joined filters leave something in and something out."""
    if len(chain.filters) < 2:
        return True
    keys = {operation.key for operation in chain.filters}
    if chain.joiner == "or" and keys & {"different", "indivisible", "lacks"}:
        return False
    bound = {
        operation.group: int(constant or 0)
        for operation, constant in zip(chain.filters, chain.constants, strict=False)
        if operation.group in ("lower", "upper")
    }
    if len(bound) < 2:
        return True
    gap = bound["upper"] - bound["lower"]
    return gap >= 4 if chain.joiner == "and" else gap <= -4


def _steps_make_sense(chain: Chain) -> bool:
    """Whether the types fit, and no step undoes or hides another."""
    keys = [operation.key for operation in chain.steps]
    if chain.family == "text":
        lettered = [index for index, operation in enumerate(chain.steps) if operation.constants == LETTERS]
        letters = [chain.constants[index] for index in lettered]
        after_capitals = "upper" in keys and any(index > keys.index("upper") for index in lettered)
        return not after_capitals and len(set(letters)) == len(letters)
    if chain.family == "number":
        return True
    mapped, reduction = chain.steps
    if reduction.key == "count":
        return mapped.key == "same"
    if reduction.key == "distinct":
        return mapped.key in MERGING_MAPS
    return reduction.kind in ("any", mapped.kind)


def draw_chain(rng: random.Random, part: Part) -> Chain:
    """A sensible chain of ``part`` with its constants."""
    while True:
        family, filters, steps = _draw_operations(rng)
        joiner = rng.choice(("and", "or")) if len(filters) == 2 else ""
        constants = tuple(rng.choice(op.constants) if op.constants else "" for op in (*filters, *steps))
        chain = Chain(family, joiner, filters, steps, constants)
        if _steps_make_sense(chain) and _bounds_make_sense(chain) and part_of(chain.combination) == part:
            return chain


def _filled(template: str, constant: str, **slots: str) -> str:
    text = template.replace("{k}", constant)
    for slot, value in slots.items():
        text = text.replace("{" + slot + "}", value)
    return text


def condition_words(chain: Chain) -> str:
    """The filters in words: ``is even and is greater than 3``."""
    words = [_filled(op.words, k) for op, k in zip(chain.filters, chain.constants, strict=False)]
    return f" {chain.joiner} ".join(words)


def _condition_code(chain: Chain, variable: str) -> str:
    codes = [_filled(op.code, k, x=variable) for op, k in zip(chain.filters, chain.constants, strict=False)]
    return f" {chain.joiner} ".join(codes)


def body(chain: Chain, names: Names) -> str:
    """The function's body, indented, without a final line end."""
    constants = chain.constants[len(chain.filters) :]
    steps = [_filled(op.code, k, x=names.variable) for op, k in zip(chain.steps, constants, strict=True)]
    if chain.family == "text":
        return f"    return {names.parameter}{''.join(steps)}"
    condition = _condition_code(chain, names.variable)
    if chain.family == "number":
        return f"    if {condition}:\n        return {steps[0]}\n    return {steps[1]}"
    only_if = f" if {condition}" if condition else ""
    comprehension = f"[{steps[0]} for {names.variable} in {names.parameter}{only_if}]"
    return f"    return {steps[1].replace('{e}', comprehension)}"


def describe(chain: Chain, names: Names) -> str:
    """The chain in the instruction's words, in the order of the code."""
    constants = chain.constants[len(chain.filters) :]
    subject = names.noun if chain.family == "number" else f"each {names.noun}"
    steps = [_filled(op.words, k, it=subject) for op, k in zip(chain.steps, constants, strict=True)]
    if chain.family == "text":
        return f"the {names.noun} {', then '.join(steps)}"
    condition = condition_words(chain)
    if chain.family == "number":
        return f"if {names.noun} {condition} then {steps[0]}, otherwise {steps[1]}"
    where = f", where the {names.noun} {condition}" if condition else ""
    return steps[1].replace("{e}", steps[0]) + where


def _retell(chain: Chain, names: Names) -> str:
    """The chain in the words of the pretraining text."""
    constants = chain.constants[len(chain.filters) :]
    subject = names.noun if chain.family == "number" else f"each {names.noun}"
    steps = [_filled(op.words, k, it=subject) for op, k in zip(chain.steps, constants, strict=True)]
    if chain.family == "text":
        return f"gives back {names.noun} {' and next '.join(steps)}"
    condition = condition_words(chain)
    if chain.family == "number":
        return f"gives {steps[0]} when {names.noun} {condition}, else {steps[1]}"
    told = _filled(chain.steps[1].told, constants[1], e=steps[0])
    return f"{told} when the {names.noun} {condition}" if condition else told


def write_function(name: str, chain: Chain, names: Names) -> str:
    """The whole function, without a final line end."""
    return f"def {name}({names.parameter}):\n{body(chain, names)}"


def _compiled(chain: Chain) -> Callable[[Any], Any]:
    scope: dict[str, Any] = {}
    exec(write_function("reference", chain, TASK_NAMES[chain.family]), scope)
    return scope["reference"]


def _draw_number(rng: random.Random, chain: Chain) -> int:
    """A number, often one at the edge of a filter."""
    edges = [int(k) for op, k in zip(chain.filters, chain.constants, strict=False) if op.constants]
    if edges and rng.random() < 0.5:
        return rng.choice(edges) + rng.choice((-1, 0, 0, 1))
    return rng.randint(-12, 30)


def _draw_word(rng: random.Random, chain: Chain) -> str:
    """A word, often one that the letter filters ask for."""
    word = rng.choice(WORD_POOL)
    word = word[: rng.choice((2, 3, 4, 5, 6, 9, 9))]
    filtered = chain.constants[: len(chain.filters)]
    for operation, constant in zip(chain.filters, filtered, strict=True):
        if constant in LETTERS and rng.random() < 0.6:
            changed = {"start": constant + word, "end": word + constant, "inside": word[:1] + constant + word[1:]}
            word = changed[operation.group]
    letters = [k for k in chain.constants[len(filtered) :] if k in LETTERS]
    if letters and rng.random() < 0.4:
        place = rng.randint(1, len(word) - 1)
        word = word[:place] + rng.choice(letters) + word[place:]
    return word


def _draw_input(rng: random.Random, chain: Chain, longest: int = 11) -> Any:
    if chain.family == "number":
        return _draw_number(rng, chain)
    if chain.family == "values":
        return [_draw_number(rng, chain) for _ in range(rng.randint(3, longest))]
    if chain.family == "words":
        return [_draw_word(rng, chain) for _ in range(rng.randint(3, longest))]
    return " ".join(_draw_word(rng, chain) for _ in range(rng.randint(2, 4)))


def _mutant(rng: random.Random, chain: Chain) -> Chain | None:
    """The chain with one constant, filter, step or joiner changed; None where the change makes no sense."""
    operations, constants = [*chain.filters, *chain.steps], list(chain.constants)
    place, filter_count = rng.randrange(len(operations)), len(chain.filters)
    joiner = chain.joiner
    if joiner and rng.random() < 0.15:
        joiner = "or" if joiner == "and" else "and"
    elif constants[place] and rng.random() < 0.5:
        choices = operations[place].constants
        neighbours = [choices[(choices.index(constants[place]) + step) % len(choices)] for step in (-1, 1)]
        constants[place] = rng.choice(neighbours)
    else:
        tables = (NUMBER_FILTERS, NUMBER_MAPS, WORD_FILTERS, WORD_MAPS, REDUCTIONS, TEXT_STEPS, TEXT_ENDS)
        table = next((table for table in tables if operations[place] in table), NUMBER_MAPS)
        operations[place] = rng.choice(table)
        constants[place] = rng.choice(operations[place].constants) if operations[place].constants else ""
    changed = replace(
        chain,
        joiner=joiner,
        filters=tuple(operations[:filter_count]),
        steps=tuple(operations[filter_count:]),
        constants=tuple(constants),
    )
    return changed if changed != chain and _steps_make_sense(changed) else None


def assertions(name: str, chain: Chain, rng: random.Random) -> list[str]:
    """Assertion lines for ``name``: the empty input where there is one, then those that tell it from most mutants.

    Fewer than two different results mean that a constant would pass: such rows are not used.
    """
    reference = _compiled(chain)
    mutants = [_compiled(mutant) for mutant in (_mutant(rng, chain) for _ in range(MUTANTS)) if mutant is not None]
    candidates = [_draw_input(rng, chain) for _ in range(CANDIDATE_INPUTS)]
    caught = [{i for i, mutant in enumerate(mutants) if mutant(item) != reference(item)} for item in candidates]
    chosen: list[Any] = {"values": [[]], "words": [[]], "number": [], "text": []}[chain.family]
    wanted = INPUTS_PER_ROW if chosen else INPUTS_PER_ROW + 1
    known: set[int] = set()
    left = list(range(len(candidates)))
    for _ in range(wanted):
        # Ties go to the result not seen yet, so that a constant function never passes.
        results = [reference(item) for item in chosen]
        best = max(left, key=lambda i: (len(caught[i] - known), reference(candidates[i]) not in results))
        left.remove(best)
        known |= caught[best]
        chosen.append(candidates[best])
    return [f"assert {name}({item!r}) == {reference(item)!r}" for item in chosen]


def _draw_name(rng: random.Random, verbs: Sequence[str]) -> str:
    return f"{rng.choice(verbs)}_{rng.choice(NAME_NOUNS)}"


def rows(part: Part, count: int, seed: int) -> list[Row]:
    """``count`` rows of ``part`` with different instructions; fields ``instruction``, ``code`` and ``tests``."""
    rng = random.Random(f"functions {part} {seed}")
    found: dict[str, Row] = {}
    while len(found) < count:
        chain, name = draw_chain(rng, part), _draw_name(rng, NAME_VERBS)
        names = TASK_NAMES[chain.family]
        instruction = f"Write {name}({names.parameter}): {describe(chain, names)}."
        tests = assertions(name, chain, rng)
        results = {line.split(" == ", 1)[1] for line in tests if "([])" not in line}
        if instruction not in found and len(results) > 1:
            fields = {
                "instruction": instruction,
                "code": write_function(name, chain, names),
                "tests": tests,
            }
            found[instruction] = Row(fields, chain.combination)
    return list(found.values())


def _usage(rng: random.Random, name: str, chain: Chain) -> str:
    item = _draw_input(rng, chain, longest=5)
    return f"# {name}({item!r}) gives {_compiled(chain)(item)!r}"


def _told_function(rng: random.Random, name: str) -> str:
    """One function of the train part with a comment, a docstring or an explanation after it."""
    chain = draw_chain(rng, "train")
    names = rng.choice(PASSAGE_NAMES[chain.family])
    told, code = _retell(chain, names), body(chain, names)
    head = f"def {name}({names.parameter}):\n"
    form = rng.random()
    if form < 0.4:
        text = f"# {name} {told}\n{head}{code}"
    elif form < 0.8:
        text = f'{head}    """{name} {told}."""\n{code}'
    else:
        text = f"{head}{code}\n# so {name} {told}"
    return f"{text}\n{_usage(rng, name, chain)}" if rng.random() < 0.25 else text


def _notes(rng: random.Random) -> str:
    """What single pieces of code mean, in prose."""
    lines = []
    for _ in range(rng.randint(4, 7)):
        chain = draw_chain(rng, "train")
        names = rng.choice(PASSAGE_NAMES[chain.family])
        subject = names.noun if chain.family == "number" else f"each {names.noun}"
        operations = (*chain.filters, *chain.steps)
        place = rng.randrange(len(operations))
        operation, constant = operations[place], chain.constants[place]
        words = _filled(operation.words, constant, it=subject, e=f"the {names.parameter}")
        code = _filled(operation.code, constant, x=names.variable, e=names.parameter)
        if place < len(chain.filters):
            lines.append(f"the test {code} is true where the {names.noun} {words}.")
        elif chain.family == "text":
            lines.append(f"the code {names.parameter}{code} is {names.noun} {words}.")
        else:
            lines.append(rng.choice((f"we write {words} as {code} here.", f"the code {code} stands for {words}.")))
    return "\n".join(lines)


def passage(rng: random.Random) -> str:
    """One pretraining passage: a small module of train functions, or notes on single operations."""
    if rng.random() < 0.2:
        return _notes(rng)
    verbs = rng.sample(PASSAGE_VERBS, rng.randint(2, 3))
    return "\n\n".join(_told_function(rng, _draw_name(rng, [verb])) for verb in verbs)
