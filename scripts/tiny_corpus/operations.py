"""The operations that generated functions are chained from: each one in words and in Python."""

from __future__ import annotations

from dataclasses import dataclass

LETTERS = tuple("aeioutrslnbc")
BOUNDS = tuple(str(number) for number in range(1, 21))
DIGITS = tuple("23456789")
SHORT = tuple("234")
LENGTHS = tuple("345")


@dataclass(frozen=True)
class Operation:
    """One link of a chain.

    Attributes:
        key: Its name inside a combination.
        words: What it does, in the instruction's words; ``{it}`` subject, ``{k}`` constant, ``{e}`` inner phrase.
        code: Its Python; ``{x}`` the variable, ``{k}`` the constant, ``{e}`` the list comprehension.
        constants: What ``{k}`` may be; empty without a constant.
        group: Two filters of one group are never joined.
        kind: Of a map, what it gives; of a reduction, what it takes: number, text or any.
        told: A reduction in the words of the pretraining text.
    """

    key: str
    words: str
    code: str
    constants: tuple[str, ...] = ()
    group: str = ""
    kind: str = "any"
    told: str = ""


@dataclass(frozen=True)
class Names:
    """How one function calls its parameter, the loop variable and the thing that this variable stands for."""

    parameter: str
    variable: str
    noun: str


NUMBER_FILTERS = (
    Operation("even", "is even", "{x} % 2 == 0", group="parity"),
    Operation("odd", "is odd", "{x} % 2 == 1", group="parity"),
    Operation("greater", "is greater than {k}", "{x} > {k}", BOUNDS, "lower"),
    Operation("least", "is at least {k}", "{x} >= {k}", BOUNDS, "lower"),
    Operation("above_zero", "is above zero", "{x} > 0", group="lower"),
    Operation("less", "is less than {k}", "{x} < {k}", BOUNDS, "upper"),
    Operation("most", "is at most {k}", "{x} <= {k}", BOUNDS, "upper"),
    Operation("below_zero", "is below zero", "{x} < 0", group="upper"),
    Operation("divisible", "is divisible by {k}", "{x} % {k} == 0", tuple("3579"), "division"),
    Operation("indivisible", "is not divisible by {k}", "{x} % {k} != 0", tuple("3579"), "division"),
    Operation("different", "is different from {k}", "{x} != {k}", BOUNDS, "equality"),
)
NUMBER_MAPS = (
    Operation("same", "{it}", "{x}", kind="number"),
    Operation("square", "{it} squared", "{x} * {x}", kind="number"),
    Operation("cube", "{it} cubed", "{x} * {x} * {x}", kind="number"),
    Operation("times", "{it} times {k}", "{x} * {k}", DIGITS, kind="number"),
    Operation("plus", "{it} plus {k}", "{x} + {k}", BOUNDS, kind="number"),
    Operation("minus", "{it} minus {k}", "{x} - {k}", BOUNDS, kind="number"),
    Operation("modulo", "{it} modulo {k}", "{x} % {k}", DIGITS, kind="number"),
    Operation("half", "half of {it} rounded down", "{x} // 2", kind="number"),
    Operation("absolute", "the absolute value of {it}", "abs({x})", kind="number"),
    Operation("opposite", "the opposite of {it}", "-{x}", kind="number"),
)
FIXED_RESULT = Operation("fixed", "{k}", "{k}", BOUNDS, kind="number")
WORD_FILTERS = (
    Operation("starts", 'starts with "{k}"', '{x}.startswith("{k}")', LETTERS, "start"),
    Operation("ends", 'ends with "{k}"', '{x}.endswith("{k}")', LETTERS, "end"),
    Operation("contains", 'contains "{k}"', '"{k}" in {x}', LETTERS, "inside"),
    Operation("lacks", 'does not contain "{k}"', '"{k}" not in {x}', LETTERS, "inside"),
    Operation("longer", "has more than {k} letters", "len({x}) > {k}", LENGTHS, "length"),
    Operation("shorter", "has fewer than {k} letters", "len({x}) < {k}", ("4", "5", "6"), "length"),
    Operation("long", "has exactly {k} letters", "len({x}) == {k}", LENGTHS, "length"),
)
WORD_MAPS = (
    Operation("same", "{it}", "{x}", kind="text"),
    Operation("upper", "{it} in capitals", "{x}.upper()", kind="text"),
    Operation("reverse", "{it} reversed", "{x}[::-1]", kind="text"),
    Operation("first", "the first {k} letters of {it}", "{x}[:{k}]", SHORT, kind="text"),
    Operation("last", "the last {k} letters of {it}", "{x}[-{k}:]", SHORT, kind="text"),
    Operation("times", "{it} repeated {k} times", "{x} * {k}", SHORT, kind="text"),
    Operation("add", '{it} with "{k}" added', '{x} + "{k}"', LETTERS, kind="text"),
    Operation("remove", '{it} without "{k}"', '{x}.replace("{k}", "")', LETTERS, kind="text"),
    Operation("length", "the length of {it}", "len({x})", kind="number"),
    Operation("letters", 'the count of "{k}" in {it}', '{x}.count("{k}")', LETTERS, kind="number"),
)
REDUCTIONS = (
    Operation("sum", "the sum of {e}", "sum({e})", kind="number", told="adds up {e}"),
    Operation(
        "max", "the largest of {e} or 0", "max({e}, default=0)", kind="number", told="finds the largest of {e} or 0"
    ),
    Operation(
        "min", "the smallest of {e} or 0", "min({e}, default=0)", kind="number", told="finds the smallest of {e} or 0"
    ),
    Operation("count", "how many of {e} there are", "len({e})", told="counts {e}"),
    Operation("list", "the list of {e}", "{e}", told="collects {e} in a list"),
    Operation("sorted", "the sorted list of {e}", "sorted({e})", told="sorts a list of {e}"),
    Operation("falling", "the falling list of {e}", "sorted({e}, reverse=True)", told="sorts a falling list of {e}"),
    Operation("backwards", "the backwards list of {e}", "{e}[::-1]", told="turns a list of {e} backwards"),
    Operation(
        "head", "the first {k} in the list of {e}", "{e}[:{k}]", SHORT, told="keeps the first {k} in a list of {e}"
    ),
    Operation(
        "tail", "the last {k} in the list of {e}", "{e}[-{k}:]", SHORT, told="keeps the last {k} in a list of {e}"
    ),
    Operation(
        "distinct", "the number of distinct results of {e}", "len(set({e}))", told="counts the distinct results of {e}"
    ),
    Operation("unique", "the sorted set of {e}", "sorted(set({e}))", told="sorts a set of {e}"),
    Operation(
        "join",
        'the text of {e} joined with "{k}"',
        '"{k}".join({e})',
        tuple("-+*/"),
        kind="text",
        told='joins the text of {e} with "{k}"',
    ),
)
TEXT_STEPS = (
    Operation("upper", "in capitals", ".upper()"),
    Operation("reverse", "reversed", "[::-1]"),
    Operation("first", "cut to its first {k} letters", "[:{k}]", tuple("4567")),
    Operation("last", "cut to its last {k} letters", "[-{k}:]", tuple("4567")),
    Operation("drop_first", "without the first {k} letters", "[{k}:]", tuple("23")),
    Operation("drop_last", "without the last {k} letters", "[:-{k}]", tuple("23")),
    Operation("remove", 'without "{k}"', '.replace("{k}", "")', LETTERS),
    Operation("mark", 'with "-" in place of "{k}"', '.replace("{k}", "-")', LETTERS),
)
TEXT_ENDS = (
    Operation("count", 'the count of "{k}"', '.count("{k}")', LETTERS),
    Operation("find", 'the place of "{k}"', '.find("{k}")', LETTERS),
    Operation("parts", 'split at "{k}"', '.split("{k}")', LETTERS),
)
# Maps that can give two inputs one result: elsewhere the number of distinct results would hide the map.
MERGING_MAPS = frozenset({"square", "modulo", "half", "absolute", "first", "last", "length", "letters"})
TASK_NAMES = {
    "values": Names("values", "v", "value"),
    "words": Names("words", "w", "word"),
    "number": Names("n", "n", "n"),
    "text": Names("text", "text", "text"),
}
PASSAGE_NAMES = {
    "values": (Names("values", "v", "value"), Names("items", "x", "item"), Names("numbers", "a", "number")),
    "words": (Names("words", "w", "word"), Names("names", "s", "name"), Names("lines", "x", "line")),
    "number": (Names("n", "n", "n"), Names("x", "x", "x"), Names("a", "a", "a")),
    "text": (Names("text", "text", "text"), Names("line", "line", "line"), Names("s", "s", "s")),
}
