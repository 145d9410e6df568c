"""Words that several generators share. Few and common, so that a vocabulary of 2,048 holds most of them whole."""

from __future__ import annotations

FIRST_NAMES = (
    "Anna Ben Clara David Emma Felix Grace Hugo Iris Jack Kate Leo Mia Noah Olga Paul Rosa Sam Tara Victor"
).split()
COLOURS = "red blue green yellow black white brown grey pink silver".split()
SIZES = "big small long short old new heavy light round flat".split()
OBJECTS = (
    "box key cup book lamp ball hat coat bag map coin rope clock plate spoon letter basket bottle mirror candle"
).split()
PLACES = "kitchen garden school market library station park office river forest tower harbour".split()
ANIMALS = "cat dog horse bird fish mouse cow duck fox bear".split()
FOODS = "bread cheese soup apple cake rice honey milk egg salad".split()
NUMBERS = "two three four five six seven eight nine ten twelve".split()
