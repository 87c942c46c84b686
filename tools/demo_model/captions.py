"""A small grammar: wishes in words, with synonyms."""

from random import Random

from tools.demo_model.wish import Asked, Wish

SYNONYMS = {
    # The word itself is as frequent as all others together; see `_say`.
    "circle": ("disc", "disk", "dot"),
    "square": ("box",),
    "ring": ("donut", "hoop"),
    "red": ("crimson", "scarlet"),
    "cyan": ("turquoise", "light blue"),
    "blue": ("dark blue",),
    "purple": ("violet",),
    "pink": ("rose",),
    "small": ("little", "tiny"),
    "large": ("big", "huge"),
    "outline": ("outlined", "hollow"),
    "striped": ("stripy",),
    "dotted": ("spotted",),
    "middle": ("center", "centre"),
    "left of": ("on the left of",),
    "right of": ("on the right of",),
    "above": ("over", "on top of"),
    "below": ("under", "beneath"),
}

_OPENINGS = ("", "", "", "a picture of ", "an image of ", "a drawing of ", "draw ", "show me ")
_NUMBERS = {2: "two", 3: "three"}


def caption(wish: Wish, random: Random) -> str:
    """A way to say it."""
    first = _thing(wish.asked[0], random)
    if len(wish.asked) == 2:
        joint = _say(wish.relation, random)
        if wish.relation in ("left of", "right of") and "on" not in joint.split():
            joint = f"to the {joint}"
        first = f"{first} {joint} {_thing(wish.asked[1], random)}"
    text = f"{random.choice(_OPENINGS)}{first} {_background(wish, random)}"
    if random.random() < 0.2:
        text = text[0].upper() + text[1:] + random.choice(["", "."])
    return text


def _thing(asked: Asked, random: Random) -> str:
    words = [asked.size, "" if asked.style == "plain" else asked.style, asked.colour]
    if random.random() < 0.3:
        words[0], words[1] = words[1], words[0]
    noun = _say(asked.shape, random)
    if asked.count > 1:
        noun += "es" if noun.endswith("x") else "s"
    said = " ".join([*(_say(word, random) for word in words if word), noun])
    if asked.count > 1:
        said = f"{_NUMBERS[asked.count]} {said}"
    else:
        said = f"{'an' if said[0] in 'aeiou' else 'a'} {said}"
    return f"{said} {_place(asked.place, random)}" if asked.place else said


def _place(place: str, random: Random) -> str:
    place = _say(place, random)
    where = "on" if place in ("left", "right") else random.choice(["at", "in"])
    if place in ("top", "bottom"):
        where = "at"
    elif place in ("middle", "center", "centre"):
        where = "in"
    corner = " corner" if " " in place and random.random() < 0.3 else ""
    return f"{where} the {place}{corner}"


def _background(wish: Wish, random: Random) -> str:
    colours = [_say(colour, random) for colour in wish.background]
    if len(colours) == 2:
        return random.choice(
            [
                "on a {} to {} gradient",
                "on a background from {} to {}",
                "on a gradient from {} to {}",
            ]
        ).format(*colours)
    return random.choice(
        ["on a {} background", "on a {} background", "on {}", "in front of a {} background"]
    ).format(*colours)


def _say(word: str, random: Random) -> str:
    others = SYNONYMS.get(word, ())
    return random.choice(others) if others and random.random() < 0.5 else word
