"""A small English-French grammar: words in, phrases and clauses that agree in gender and number out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Noun(NamedTuple):
    """A noun; ``kind`` is p(erson), a(nimal), o(bject), f(ood), g (large thing) or l(ocation)."""

    singular: str
    plural: str
    french_singular: str
    french_plural: str
    feminine: bool
    kind: str


class Adjective(NamedTuple):
    """An adjective; ``forms`` are French m. sg., f. sg., m. pl., f. pl.; ``kinds`` the nouns that it suits."""

    english: str
    forms: tuple[str, ...]
    kinds: str
    before: bool
    before_vowel: str


class Verb(NamedTuple):
    """A present tense; ``forms`` are French je, il, nous, ils; ``objects`` the kinds of its object, empty if none."""

    base: str
    third: str
    forms: tuple[str, ...]
    subjects: str
    objects: str


class Phrase(NamedTuple):
    """A noun phrase in both languages, with the held-out pairs that it uses."""

    english: str
    french: str
    plural: bool
    feminine: bool
    noun: Noun
    pairs: tuple[str, ...]


_NOUNS = """man men homme hommes m p|woman women femme femmes f p|child children enfant enfants m p
boy boys garçon garçons m p|girl girls fille filles f p|friend friends ami amis m p|king kings roi rois m p
queen queens reine reines f p|cat cats chat chats m a|dog dogs chien chiens m a|horse horses cheval chevaux m a
bird birds oiseau oiseaux m a|cow cows vache vaches f a|mouse mice souris souris f a|fox foxes renard renards m a
hen hens poule poules f a|book books livre livres m o|key keys clé clés f o|cup cups tasse tasses f o
box boxes boîte boîtes f o|bag bags sac sacs m o|hat hats chapeau chapeaux m o|coat coats manteau manteaux m o
letter letters lettre lettres f o|lamp lamps lampe lampes f o|plate plates assiette assiettes f o
flower flowers fleur fleurs f o|apple apples pomme pommes f f|orange oranges orange oranges f f
carrot carrots carotte carottes f f|cake cakes gâteau gâteaux m f|cheese cheeses fromage fromages m f
table tables table tables f g|chair chairs chaise chaises f g|car cars voiture voitures f g|bed beds lit lits m g
boat boats bateau bateaux m g|tree trees arbre arbres m g|house houses maison maisons f l
kitchen kitchens cuisine cuisines f l|school schools école écoles f l|library libraries bibliothèque bibliothèques f l
church churches église églises f l|garden gardens jardin jardins m l|park parks parc parcs m l
market markets marché marchés m l|castle castles château châteaux m l"""
_ADJECTIVES_BEFORE = """small petit petite petits petites paofgl petit|big grand grande grands grandes paofgl grand
beautiful beau belle beaux belles paofgl bel|old vieux vieille vieux vieilles paogl vieil
new nouveau nouvelle nouveaux nouvelles ogl nouvel|good bon bonne bons bonnes pf bon
young jeune jeune jeunes jeunes pa jeune"""
_ADJECTIVES_AFTER = """happy heureux heureuse heureux heureuses pa|tired fatigué fatiguée fatigués fatiguées pa
sad triste triste tristes tristes pa|strong fort forte forts fortes pa|calm calme calme calmes calmes pal
heavy lourd lourde lourds lourdes og|clean propre propre propres propres ogl|round rond ronde ronds rondes of
red rouge rouge rouges rouges ofg|blue bleu bleue bleus bleues og|green vert verte verts vertes ofg
yellow jaune jaune jaunes jaunes ofg|black noir noire noirs noires aogl|white blanc blanche blancs blanches aogl
grey gris grise gris grises aogl"""
_VERBS = """sleep,sleeps,dors,dort,dormons,dorment,pa,|sing,sings,chante,chante,chantons,chantent,pa,
dance,dances,danse,danse,dansons,dansent,p,|walk,walks,marche,marche,marchons,marchent,pa,
work,works,travaille,travaille,travaillons,travaillent,p,|play,plays,joue,joue,jouons,jouent,pa,
arrive,arrives,arrive,arrive,arrivons,arrivent,pa,|wait,waits,attends,attend,attendons,attendent,pa,
see,sees,vois,voit,voyons,voient,pa,paofgl|love,loves,aime,aime,aimons,aiment,pa,paofgl
look for,looks for,cherche,cherche,cherchons,cherchent,pa,paofgl|find,finds,trouve,trouve,trouvons,trouvent,pa,paofg
watch,watches,regarde,regarde,regardons,regardent,pa,pagl|eat,eats,mange,mange,mangeons,mangent,pa,f
buy,buys,achète,achète,achetons,achètent,p,aofg|want,wants,veux,veut,voulons,veulent,p,aofg
carry,carries,porte,porte,portons,portent,p,of|have,has,ai,a,avons,ont,p,aofg"""


def _entries(table: str) -> list[str]:
    return table.replace("\n", "|").split("|")


def _noun(entry: str) -> Noun:
    singular, plural, french_singular, french_plural, gender, kind = entry.split()
    return Noun(singular, plural, french_singular, french_plural, gender == "f", kind)


def _verb(entry: str) -> Verb:
    base, third, *forms, subjects, objects = entry.split(",")
    return Verb(base, third, tuple(forms), subjects, objects)


def _adjective(entry: str, *, before: bool) -> Adjective:
    english, *forms = entry.split()
    return Adjective(english, tuple(forms[:4]), forms[4], before, forms[5] if before else forms[0])


NOUNS = tuple(_noun(entry) for entry in _entries(_NOUNS))
ADJECTIVES = tuple(_adjective(entry, before=True) for entry in _entries(_ADJECTIVES_BEFORE)) + tuple(
    _adjective(entry, before=False) for entry in _entries(_ADJECTIVES_AFTER)
)
VERBS = tuple(_verb(entry) for entry in _entries(_VERBS))
BE = Verb("be", "is", ("suis", "est", "sommes", "sont"), "paofgl", "")
PRONOUNS = {"I": ("je", 0), "he": ("il", 1), "she": ("elle", 1), "we": ("nous", 2), "they": ("ils", 3)}
# Pairs whose literal French means something else ("petit ami" is a boyfriend) or that make no sense.
UNSUITED = {"friend+small", "girl+old", "boy+old", "child+old", "boy+young", "child+young", "girl+young"}

_FRENCH_DETERMINERS = {  # m. sg., f. sg., pl.; then m. sg. and f. sg. before a vowel
    "the": ("le", "la", "les", "l'", "l'"),
    "a": ("un", "une", "", "un", "une"),
    "some": ("", "", "des", "", ""),
    "this": ("ce", "cette", "", "cet", "cette"),
    "these": ("", "", "ces", "", ""),
    "my": ("mon", "ma", "mes", "mon", "mon"),
}
_PREPOSITIONS = {
    "in": "dans",
    "on": "sur",
    "under": "sous",
    "at": "à",
    "near": "près de",
    "behind": "derrière",
    "in front of": "devant",
}
# Who or what (kinds) can be in, on, under or at an anchor; near, behind and in front of suit every anchor.
ANCHORS = {
    "box": (("in", "of"),),
    "bag": (("in", "of"),),
    "table": (("on", "aof"), ("under", "aof")),
    "chair": (("on", "aof"), ("under", "aof")),
    "bed": (("on", "aof"), ("under", "aof")),
    "tree": (("under", "paof"),),
    "car": (("in", "paof"),),
    "house": (("in", "paofg"),),
    "kitchen": (("in", "paof"),),
    "garden": (("in", "paofg"),),
    "park": (("in", "pag"),),
    "castle": (("in", "paofg"),),
    "school": (("at", "p"),),
    "library": (("at", "p"),),
    "church": (("at", "p"),),
    "market": (("at", "paofg"),),
}
VOWELS = frozenset("aàâeéèêiîoôuh")  # no noun, verb or adjective here starts with an aspirated h


def prepositions_for(noun: Noun, anchor: Noun) -> tuple[str, ...]:
    """How ``noun`` can stand to ``anchor``; empty when it cannot."""
    if noun is anchor or noun.kind == "l":
        return ()
    own = tuple(preposition for preposition, kinds in ANCHORS[anchor.singular] if noun.kind in kinds)
    if anchor.kind == "o":
        return own
    return own * 2 + ("near", "behind", "in front of")


def noun_phrase(determiner: str, noun: Noun, adjective: Adjective | None, *, plural: bool) -> Phrase:
    """Determiner, noun and adjective, agreeing in both languages (``des`` is ``de`` before an adjective)."""
    english = noun.plural if plural else noun.singular
    french = noun.french_plural if plural else noun.french_singular
    pairs: tuple[str, ...] = ()
    partitive = False
    if adjective is not None:
        pairs = (f"{noun.singular}+{adjective.english}",)
        english = f"{adjective.english} {english}"
        form = adjective.forms[noun.feminine + 2 * plural]
        if adjective.before:
            if not plural and not noun.feminine and french[0] in VOWELS:
                form = adjective.before_vowel
            french = f"{form} {french}"
            partitive = determiner == "some"
        else:
            french = f"{french} {form}"
    elided = 0 if plural or french[0] not in VOWELS else 3
    article = "de" if partitive else _FRENCH_DETERMINERS[determiner][2 if plural else noun.feminine + elided]
    french = article + french if article == "l'" else f"{article} {french}"
    if determiner == "a" and english[0] in "aeiou":
        determiner = "an"
    return Phrase(f"{determiner} {english}", french, plural, noun.feminine, noun, pairs)


def prepositional(preposition: str, phrase: Phrase) -> tuple[str, str]:
    """A place in English and French, with the contractions au, du, des and d'."""
    french, word = phrase.french, _PREPOSITIONS[preposition]
    if word == "à" and french.startswith("le "):
        return f"{preposition} {phrase.english}", f"au {french[3:]}"
    if word == "près de":
        if french.startswith("le "):
            word, french = "près du", french[3:]
        elif french.startswith("les "):
            word, french = "près des", french[4:]
        elif french[0] in VOWELS:
            return f"{preposition} {phrase.english}", f"près d'{french}"
    return f"{preposition} {phrase.english}", f"{word} {french}"


def conjugate(verb: Verb, person: int, *, negative: bool) -> tuple[str, str]:
    """The present tense for person 0 I, 1 he/she/singular noun, 2 we, 3 they/plural noun."""
    french = verb.forms[person]
    if negative:
        french = f"n'{french} pas" if french[0] in VOWELS else f"ne {french} pas"
    if verb is BE:
        english = ("am", "is", "are", "are")[person] + (" not" if negative else "")
    elif negative:
        english = ("does not " if person == 1 else "do not ") + verb.base
    else:
        english = verb.third if person == 1 else verb.base
    return english, french


def agree(adjective: Adjective, subjects: Sequence[Phrase]) -> tuple[str, str]:
    """The predicate adjective for ``subjects``: feminine only when all are, plural when they are more than one."""
    feminine = all(subject.feminine for subject in subjects)
    return adjective.english, adjective.forms[feminine + 2 * _is_plural(subjects)]


def _is_plural(subjects: Sequence[Phrase]) -> bool:
    return len(subjects) > 1 or subjects[0].plural


def predicate(verb: Verb, person: int, complements: Sequence[tuple[str, str]], *, negative: bool) -> tuple[str, str]:
    """The verb and what follows it, in both languages."""
    parts = (conjugate(verb, person, negative=negative), *complements)
    return " ".join(english for english, _ in parts), " ".join(french for _, french in parts)


def clause(
    subjects: str | Sequence[Phrase], verb: Verb, *complements: tuple[str, str], negative: bool = False
) -> tuple[str, str]:
    """Subject, verb and complements in both languages, without capital and full stop.

    Args:
        subjects: A key of ``PRONOUNS``, or the phrases that "and" joins.
        verb: The verb; its number is the subject's.
        complements: English and French of what follows: an object, an adjective, a place.
        negative: Whether the verb is denied.
    """
    if isinstance(subjects, str):
        french_subject, person = PRONOUNS[subjects]
        english, french = predicate(verb, person, complements, negative=negative)
        if french_subject == "je" and french[0] in VOWELS:
            return f"{subjects} {english}", f"j'{french}"
        return f"{subjects} {english}", f"{french_subject} {french}"
    english, french = predicate(verb, 3 if _is_plural(subjects) else 1, complements, negative=negative)
    english_subject = " and ".join(subject.english for subject in subjects)
    french_subject = " et ".join(subject.french for subject in subjects)
    return f"{english_subject} {english}", f"{french_subject} {french}"


def there_is(thing: Phrase, place: tuple[str, str]) -> tuple[str, str]:
    """What there is at a place, in both languages."""
    return f"there {'are' if thing.plural else 'is'} {thing.english} {place[0]}", f"il y a {thing.french} {place[1]}"


def as_sentence(text: str) -> str:
    """``text`` with a capital and a full stop."""
    return f"{text[0].upper()}{text[1:]}."
