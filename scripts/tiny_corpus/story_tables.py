"""The words and sentences that stories.py builds its stories and its pretraining prose from."""

from __future__ import annotations

from dataclasses import dataclass

from scripts.tiny_corpus.words import FIRST_NAMES, FOODS

# Names alternate between women's and men's in the shared list.
PRONOUNS = {
    name: ("she", "her", "her") if index % 2 == 0 else ("he", "his", "him") for index, name in enumerate(FIRST_NAMES)
}
# Outdoors, so that any weather can be the obstacle.
PLACES = {
    "kitchen": "behind", "garden": "in", "school": "behind", "market": "near", "library": "behind", "station": "near",
    "park": "in", "office": "behind", "river": "by", "forest": "in", "tower": "near", "harbour": "near",
}  # fmt: skip
JOBS = ["farmer", "baker", "sailor", "painter", "teacher", "doctor"]
RELATIVES = ["mother", "father", "sister", "brother", "friend", "neighbour"]
PORTIONS = [food for food in FOODS if food not in ("apple", "egg")]  # what one can have "some" of


@dataclass(frozen=True)
class Obstacle:
    """What a kind of weather does to the thing, which animals can help, and what they do."""

    problems: tuple[str, str]
    helpers: tuple[str, str, str]
    solutions: tuple[str, str]
    times: tuple[str, ...] = ("morning", "afternoon", "evening")


OBSTACLES = {
    "windy": Obstacle(
        ("the wind had blown it up to a high branch", "the wind had carried it to the top of a tree"),
        ("bird", "cat", "mouse"),
        ("went up and let the {object} fall into {his} hands", "was at the top in no time and threw the {object} down"),
    ),
    "rainy": Obstacle(
        ("the rain had washed it into deep water", "there was deep water all around it after the rain"),
        ("duck", "fish", "dog"),
        ("swam out and pushed the {object} to the side", "swam there and came back with the {object}"),
    ),
    "snowy": Obstacle(
        ("it was deep under the snow", "the snow had covered all but one side of it"),
        ("fox", "dog", "bear"),
        ("dug in the snow until the {object} was free", "dug a deep hole and pulled the {object} out of the snow"),
    ),
    "foggy": Obstacle(
        ("in the fog {name} could not find the way back", "the fog came down and hid the path"),
        ("horse", "cow", "dog"),
        ("knew every path and led {him} out of the fog", "walked in front with the {object} and found the way"),
    ),
    "stormy": Obstacle(
        ("the storm had thrown a heavy tree on it", "a tree had come down on it in the storm"),
        ("horse", "bear", "cow"),
        ("pushed the tree away from the {object}", "was strong and pulled the tree off the {object}"),
    ),
    "sunny": Obstacle(
        ("it had fallen between two hot stones", "it was in a narrow hole where the sun did not reach"),
        ("mouse", "cat", "fox"),
        ("was small enough and pulled the {object} out", "put a foot in and got hold of the {object}"),
    ),
    "dark": Obstacle(
        ("it was too dark to see the last steps", "the last light went out and {he} could see nothing"),
        ("cat", "fox", "mouse"),
        ("had good eyes and went first to the {object}", "could see in the dark and showed {him} the {object}"),
        times=("evening", "night"),
    ),
    "cold": Obstacle(
        ("it was frozen into the ice", "there was thick ice all over it"),
        ("horse", "bear", "cow"),
        ("broke the ice with one foot and freed the {object}", "lay down on the ice until the {object} came free"),
    ),
}
REACTIONS = {
    "brave": ("{name} was not afraid and went closer", "{name} was afraid of nothing and tried three times"),
    "shy": ("{name} did not dare to ask anyone", "{name} turned red and did not say a word"),
    "kind": ("{name} was sad but spoke softly", "{name} was sad but was angry with nobody"),
    "clever": ("{name} thought of three plans, but none was good", "{name} made a plan, but it did not work"),
    "patient": ("{name} sat down on a stone and waited", "{name} waited for an hour and then for another"),
    "careful": ("{name} tried it slowly, one step at a time", "{name} looked at it from every side first"),
    "cheerful": ("{name} only laughed and sang a song", "{name} sang, because a song always helps"),
    "lazy": ("{name} lay down and closed both eyes", "{name} was tired at once and did nothing"),
}
# The wish as the opening tells it, and the two ways in which the story's last sentence takes it up.
WISHES = {
    "wanted a {colour} {object} for {his} {relative}": (
        "that night {his} {relative} held the {colour} {object} and smiled",
        "{his} {relative} smiled, for it was the best gift of all",
    ),
    "had lost {his} {colour} {object}": (
        "from that day on {name} never lost the {colour} {object} again",
        "what had been lost was found, and {name} kept it close",
    ),
    "dreamed of a {colour} {object}": (
        "now the {colour} {object} was more than a dream",
        "that night {name} had nothing left to dream of",
    ),
    "had to bring home a {colour} {object} before the clock struck ten": (
        "when the clock struck ten, the {colour} {object} was at home",
        "{name} was home with it long before ten",
    ),
    "had promised {his} {relative} a {colour} {object}": (
        "so {name} kept the promise, and {his} {relative} was proud",
        "{his} {relative} got the {colour} {object}, as {name} had promised",
    ),
    "wanted to paint a {colour} {object}": (
        "{name} painted the {colour} {object}, and the picture was lovely",
        "the picture of the {colour} {object} is still on the wall",
    ),
    "had heard of a {colour} {object} that brings luck": (
        "and the {colour} {object} brought {name} luck all year",
        "since then {name} has had luck every day",
    ),
    "needed a {colour} {object} for the great feast": (
        "at the great feast everyone looked at the {colour} {object}",
        "so the great feast could begin, and {name} danced all night",
    ),
}
OPENINGS = (
    "{name} was a {trait} {job} who {wish}. one {weather} {time} {he} took some {food} and went to the {place}.",
    "one {weather} {time} a {trait} {job} called {name} went to the {place} with some {food}. {he} {wish}.",
    "there once was a {trait} {job} called {name}. "
    "{he} {wish}, so one {weather} {time} {he} took some {food} to the {place}.",
    "{name}, a {trait} {job}, {wish}. it was a {weather} {time}, and {he} took some {food} along to the {place}.",
    "on a {weather} {time} {name} packed some {food} and walked to the {place}. {he} was a {trait} {job} and {wish}.",
)
ARRIVALS = (
    "{at} the {place} {he} soon saw the {colour} {object}, but {problem}",
    "{name} found the {colour} {object} {at} the {place}, but {problem}",
    "the {colour} {object} was {at} the {place}, but {problem}",
)
MEETINGS = (
    "then a {animal} came along and asked what was wrong",
    "just then a {animal} stopped beside {him}",
    "a {animal} had seen it all and wanted to help",
)
THANKS = (
    "{name} thanked the {animal} and gave it all the {food}",
    "the {animal} got the {food} for its help",
    "they sat down together, and the {animal} liked the {food}",
)

# Prose for pretraining: the same words, told in the present tense or by an "I", never along the plan of a story.
WEATHER_LORE = {
    "windy": (
        "the wind blows from every side, and every branch of the tree moves",
        "what the wind has carried away can be found at the top of a tree, where a {animal} is at home",
        "a {animal} goes up a high tree and down again without a sound, and lets nothing fall",
    ),
    "rainy": (
        "rain has come down since last night, and the water is deep",
        "a {animal} can swim in deep water and push a branch to the side",
        "all around the house the rain washed the stones, and a {animal} swam past",
    ),
    "snowy": (
        "snow covers the path, the stones and half of the house",
        "a {animal} is digging a hole in the deep snow, and pulls out a branch",
        "under the snow the {animal} sleeps in a hole it dug, free and warm",
    ),
    "foggy": (
        "fog hides the path, so we find our way by the sound of the bell",
        "a {animal} knows the way home even in fog, and walks in front of us",
        "it is easy to get lost when the fog comes down, unless a {animal} leads you out",
    ),
    "stormy": (
        "a storm throws down what is not strong",
        "last year a storm broke the tree in front of our house, and a {animal} had to pull it away",
        "a heavy tree is nothing for a strong {animal}, which pushes it off the path",
    ),
    "sunny": (
        "the sun is hot, and the stones between the trees are hot too",
        "a small {animal} likes a narrow hole where it can hide from the sun",
        "the {animal} reached in with one foot and took hold of a branch, which had fallen in",
    ),
    "dark": (
        "there is no light on the steps, and nobody can see the first of them",
        "a {animal} has good eyes, so it sees in the dark what we do not",
        "the last light goes out, and the {animal} shows its eyes",
    ),
    "cold": (
        "there is thick ice on the water, and all is frozen",
        "ice breaks when a {animal} puts a foot on it, and the water comes free",
        "it was so cold that the stones froze, and a {animal} lay down on the ice",
    ),
}
TRAIT_LORE = {
    "brave": "the brave are afraid of nothing, they try two times or three and go closer each time",
    "shy": "a shy friend turns red, does not dare to speak, and says no word to anyone",
    "kind": "kind people speak softly when they are sad, and nobody makes them angry",
    "clever": "when you are clever you have three plans, and the second works when the first is not so good",
    "patient": "to be patient is to wait another hour on a stone, sitting down and thinking of something else",
    "careful": "those who are careful go slowly, step by step, and first look at every side of a thing",
    "cheerful": "cheerful people laugh and sing, for a song helps always, and I sang one too",
    "lazy": "a lazy day means that I lie down, tired, with both eyes closed, and do nothing at once",
}
WISH_LORE = (
    "a {colour} {object} is a good gift, and my {relative} smiles when I hold it up",
    "do you know who has lost this {colour} {object}? it is found now, and I keep it close to me",
    "all I have is a dream, and in my dream there is a {colour} {object}, and nothing more is left of the night",
    "the clock strikes ten, and long before it struck I had to be home and bring {name} the {colour} {object}",
    "I promised something to {name}, and a promise is a promise: now {name} has the {colour} {object} and is proud",
    "I want to paint, so I put a {colour} {object} on the wall, and the picture is done: lovely, as {name} says",
    "have you heard that luck comes with a {colour} {object}? "
    "{name} brought one home, and has it still, since last year",
    "there is a great feast every year, it begins with dances, and what it needs is a {colour} {object}, says {name}",
)
MEAL_LORE = (
    "we sat at home with {food}, and I ate it all",
    "{name} thanks me for the {food}, and there is more of it",
    "I packed {food} and gave half of it to {name}",
    "a {animal} likes {food}, but we keep it for {name}",
    "{food} is what everyone wanted, so I took it along",
    "they asked me what was in my bag, and it was {food}",
)
PLACE_LORE = (
    "{at} the {place} there is a {animal} that everyone knows",
    "my friend is called {name} and works as a {job} {at} the {place}",
    "once I walked to the {place} and stopped there, just to look at the {colour} {object}",
    "the path to the {place} is long, and the {job} sets out for it every {time}",
    "{name} went there with a {animal} beside the path and came back at last",
    "I packed a {object} and set out on foot, and soon the {place} was in front of me",
)
PAST_LORE = (
    "after a long day we laughed together, because nobody had been wrong",
    "what {name} thought then, {name} could not say",
    "I never knew why {name} hid the {object}, and never got to know",
    "once I tried to dance until I was tired, and {name} danced too",
    "{name} only turned to me and showed me both hands",
    "nobody spoke after that, and {name} thanked us for the help",
    "I waited over an hour until {name} came into the house and let me in",
    "the work was over, and we had more than enough",
    "none of us liked the plan that {name} made, and it did not reach the others",
    "{name} held what I threw, and I kept what was thrown to me",
    "some of us pushed, some pulled, and an hour after that the {animal} was freed",
    "I dreamed that I painted a house {colour}, and that {name} needed it and smiled",
    "it had blown all night and was to begin again when somebody led the {animal} home",
    "what my {relative} brings is covered, and I looked, but I did not see what it is",
)
