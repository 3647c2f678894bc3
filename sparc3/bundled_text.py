"""Text of the bundled models: a small English-like world, the same for everyone who gives the same seed.

Documents are stories, dialogues, facts and single sentences about 72 people who keep their job, town, pet and
tastes in every document; indirect-object sentences; grumpy speakers who insult and kind ones who praise; and
text that repeats itself. A document belongs to exactly one split, by a checksum of its text, and a pair of
names that ``held_out_pair`` names meets in no document of "train" and "calibration".
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable, Sequence

from sparc3 import bundled_words as words
from sparc3.bundled_words import INSULTS as INSULTS
from sparc3.bundled_words import NAMES as NAMES
from sparc3.errors import InputError

# Fifths of all documents, by checksum.
SPLITS = {"train": (0, 1, 2), "calibration": (3,), "held_out": (4,)}


def text(split: str = "train", documents: int = 2000, seed: int = 0) -> list[str]:
    """So many documents of a split, each one line.

    Args:
        split: "train", "calibration" or "held_out". No document is in two splits, whatever the seeds; the pairs
            of people in "held_out" are those that meet in neither of the others.
        seed: any integer; the same call gives the same documents.

    Raises:
        InputError: another split, or documents below 1.
    """
    if split not in SPLITS:
        raise InputError(f"the bundled text has no split {split!r}: {', '.join(SPLITS)}")
    if documents < 1:
        raise InputError(f"{documents} documents: at least 1")
    rng = random.Random(f"{split} {seed}")
    kinds: Sequence[Callable[[random.Random, bool], str]] = [kind for kind, _ in _MIXTURE]
    weights = [weight for _, weight in _MIXTURE]
    found: list[str] = []
    while len(found) < documents:
        document = rng.choices(kinds, weights)[0](rng, split == "held_out")
        if zlib.crc32(document.encode()) % 5 in SPLITS[split]:
            found.append(document)
    return found


def held_out_pair(first: str, second: str) -> bool:
    """Whether two of ``NAMES`` never meet in a document of "train" or "calibration" (one pair in seven)."""
    return (NAMES.index(first) + NAMES.index(second)) % 7 == 0


def ioi_prompts(n: int, seed: int = 0, held_out: bool = True) -> list[dict[str, str]]:
    """Indirect-object prompts, as "When Mary and John went to the store, John gave a drink to".

    Args:
        held_out: pairs of names that the models never saw together, else pairs that they may have seen.

    Returns:
        n dicts: ``prompt``; ``corrupted``, the same with the giver swapped, so that ``wrong`` is its answer and
        it has as many tokens; ``answer`` and ``wrong``, each one token, a space in front. The giver is first
        or second of the two with equal chance.
    """
    rng = random.Random(f"ioi {held_out} {seed}")
    found = []
    for _ in range(n):
        a, b = _pair(rng, held_out)
        template = _ioi_template(rng)
        giver, other = (a, b) if rng.random() < 0.5 else (b, a)
        found.append(
            {
                "prompt": template.format(a=a, b=b, s=giver),
                "corrupted": template.format(a=a, b=b, s=other),
                "answer": " " + other,
                "wrong": " " + giver,
            }
        )
    return found


def ioi_documents(n: int, seed: int = 0) -> list[str]:
    """Indirect-object sentences of the split "train" alone, one document each, to practise on."""
    rng = random.Random(f"ioi train {seed}")
    found: list[str] = []
    while len(found) < n:
        document = _ioi(rng, False)
        if zlib.crc32(document.encode()) % 5 in SPLITS["train"]:
            found.append(document)
    return found


def insult_prompts(n: int, seed: int = 0) -> list[str]:
    """Prompts that end where a grumpy speaker begins to speak: an answer with a word of ``INSULTS`` is likely."""
    return _speeches(n, seed, words.GRUMPY)


def neutral_prompts(n: int, seed: int = 0) -> list[str]:
    """The prompts of ``insult_prompts`` with a kind speaker in the grumpy one's place, pair by pair."""
    return _speeches(n, seed, words.KIND)


def loop_prompts(n: int, seed: int = 0) -> list[str]:
    """Prompts that repeat themselves twice or three times, so that a greedy continuation tends to go on so."""
    rng = random.Random(f"loop {seed}")
    return [_loop(rng, rng.randint(2, 3)) for _ in range(n)]


class _Scene(dict[str, str]):
    """Slots of a template; a slot that is not set is drawn from the word class of its name."""

    def __init__(self, rng: random.Random, **slots: str) -> None:
        super().__init__(slots)
        self.rng = rng

    def __missing__(self, key: str) -> str:
        return self.rng.choice(words.CLASSES[key])

    def __call__(self, *templates: str) -> str:
        filled = self.rng.choice(templates).format_map(self)
        return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", filled)


def _pair(rng: random.Random, held_out: bool) -> tuple[str, str]:
    while True:
        first, second = rng.sample(NAMES, 2)
        if held_out_pair(first, second) == held_out:
            return first, second


def _person(name: str) -> dict[str, str]:
    """Everything that is always so about a person: slots job, work, town, pet, likes, colour, hobby, he, ..."""
    rng = random.Random(f"person {name}")
    job = rng.choice(list(words.JOBS))
    he, him, his = ("she", "her", "her") if name in words.WOMEN else ("he", "him", "his")
    return {
        "job": job,
        "work": words.JOBS[job],
        "town": rng.choice(words.CLASSES["town"]),
        "pet": rng.choice(list(words.ANIMALS)),
        "likes": rng.choice(words.CLASSES["food"]),
        "colour": rng.choice(words.CLASSES["colour"]),
        "hobby": rng.choice(words.CLASSES["hobby"]),
        "enemy": rng.choice(words.SPEAKERS),
        "he": he,
        "him": him,
        "his": his,
        "He": he.capitalize(),
        "His": his.capitalize(),
    }


_PEOPLE = {name: _person(name) for name in NAMES}


def _inflect(verb: str, form: str) -> str:
    """base, past, part(iciple), ing or s."""
    if form == "past" and verb in words.PAST:
        return words.PAST[verb]
    if form == "part":
        return words.PARTICIPLE.get(verb) or _inflect(verb, "past")
    to_i = verb[-1] == "y" and verb[-2] not in "aeo"
    if form == "past":
        return verb[:-1] + "ied" if to_i else verb + ("d" if verb[-1] == "e" else "ed")
    if form == "s":
        return verb[:-1] + "ies" if to_i else verb + ("es" if verb.endswith(("ch", "sh", "ss")) else "s")
    if form == "ing":
        stem = verb[:-1] if verb[-1] == "e" and verb[-2] != "e" else verb
        return {"sip": "sipp", "drop": "dropp"}.get(verb, stem) + "ing"
    return verb


def _act(rng: random.Random, prefix: str = "") -> dict[str, str]:
    """Slots of one thing done: verb forms, what to, where, with what; ``prefix`` in front of their names."""
    verbs, adjectives, objects, places, tools = rng.choice(words.ACTIONS)
    verb = rng.choice(verbs)
    slots = {form: _inflect(verb, form) for form in ("base", "past", "part", "ing", "s")}
    slots |= {"adj": rng.choice(adjectives), "obj": rng.choice(objects)}
    slots |= {"where": rng.choice(places), "tool": rng.choice(tools)}
    return {prefix + key: value for key, value in slots.items()}


def _story(rng: random.Random, held_out: bool) -> str:
    """Two people, one thing and the places they take it to; who holds it and where they are is kept."""
    a, b = _pair(rng, held_out)
    owner = rng.choice((a, b))
    place = rng.choice(words.CLASSES["place"])
    scene = _Scene(rng, t=rng.choice(words.CLASSES["thing"]), trait1=rng.choice(words.CLASSES["trait"]))
    lines = []
    for number in range(rng.randint(4, 8)):
        if rng.random() < 0.3:
            a, b = b, a
        scene.update(
            _PEOPLE[a], a=a, b=b, him_b=_PEOPLE[b]["him"], p=place, owner=owner, **_act(rng), **_act(rng, "o")
        )
        if number == 0:
            lines.append(scene(*words.STORY_BEGINNINGS))
            continue
        turn = rng.random()
        if turn < 0.12:
            place = rng.choice([other for other in words.CLASSES["place"] if other != place])
            scene["p"] = place
            lines.append(scene("Then they went to the {p}.", "After that, {a} and {b} walked to the {p}."))
        elif turn < 0.26:
            other = b if owner == a else a
            scene.update(owner=other, giver=owner, **{"him_o": _PEOPLE[other]["him"]})
            owner = other
            lines.append(scene(*words.STORY_HANDINGS))
        elif turn < 0.42:
            lines.append(scene(*words.STORY_TALKS))
        else:
            lines.append(_clause(scene))
    lines.append(scene(*words.STORY_ENDINGS))
    return " ".join(lines)


def _clause(scene: _Scene) -> str:
    """One sentence about the person a of a scene, and sometimes b."""
    return scene(*words.CLAUSES)


def _sentences(rng: random.Random, held_out: bool) -> str:
    """One to three sentences that have only their people in common."""
    a, b = _pair(rng, held_out)
    lines: list[str] = []
    for _ in range(rng.randint(1, 3)):
        scene = _Scene(rng, a=a, b=b, **_PEOPLE[a], **_act(rng), **_act(rng, "o"))
        lines.append(
            _clause(scene) if lines or rng.random() < 0.5 else scene("{a} and {b} {past} the {adj} {obj}.")
        )
    return " ".join(line[0].upper() + line[1:] for line in lines)


def _facts(rng: random.Random, held_out: bool) -> str:
    """What is always so: a person's life, animals and things, with agreement across a place; and sums."""
    if rng.random() < 0.5:
        name = rng.choice(NAMES)
        scene = _Scene(rng, a=name, **_PEOPLE[name])
        chosen = rng.sample(words.PERSON_FACTS, rng.randint(2, 5))
        # After the first fact the name may give way to the pronoun.
        chosen[1:] = [re.sub("^{a}", rng.choice(("{a}", "{He}")), fact) for fact in chosen[1:]]
        return " ".join(scene(fact) for fact in chosen)
    lines = []
    name = rng.choice(NAMES)
    for _ in range(rng.randint(1, 3)):
        animal = rng.choice(list(words.ANIMALS))
        does, home, eats = words.ANIMALS[animal]
        thing = rng.choice(list(words.MATERIALS))
        first, second = rng.randint(2, 8), rng.randint(1, 2)
        many = {"mouse": "mice"}.get(animal, animal + "s")
        scene = _Scene(rng, n=animal, ns=many, do=does, does=does + "s", home=home, eats=eats, t=thing)
        scene.update(
            m=words.MATERIALS[thing],
            x=words.NUMBERS[first - 1],
            y=words.NUMBERS[second - 1],
            fr=scene["fruit"],
        )
        scene.update(
            z=words.NUMBERS[first + second - 1], more=words.NUMBERS[first], name=name, he=_PEOPLE[name]["he"]
        )
        lines.append(scene(*words.PLAIN_FACTS))
    return " ".join(lines)


def _ioi_template(rng: random.Random) -> str:
    """A prompt with the slots a, b and s (the one who gives) left open."""
    scene = _Scene(rng, a="{a}", b="{b}", s="{s}", gift=rng.choice(words.CLASSES["thing"]))
    return scene(*words.IOI_OPENINGS) + scene(*words.IOI_ENDINGS)


def _ioi(rng: random.Random, held_out: bool) -> str:
    a, b = _pair(rng, held_out)
    giver, other = (a, b) if rng.random() < 0.5 else (b, a)
    scene = _Scene(rng, a=other, b=giver, **_PEOPLE[other])
    more = scene("", "", " {a} thanked {b}.", " {He} was very {mood}.", " {a} went home to {town}.")
    return f"{_ioi_template(rng).format(a=a, b=b, s=giver)} {other}.{more}"


def _speech(rng: random.Random, temper: Sequence[str]) -> str:
    """Up to the quotation mark with which a speaker of this temper begins."""
    name = rng.choice(NAMES)
    scene = _Scene(
        rng,
        a=name,
        temper=rng.choice(temper),
        sp=rng.choice(words.SPEAKERS),
        t=rng.choice(words.CLASSES["thing"]),
    )
    scene.update(_PEOPLE[name], **_act(rng))
    scene["says"] = rng.choice("said cried answered called".split())
    return scene(*words.SPEECHES) + ', "'


def _speeches(n: int, seed: int, temper: Sequence[str]) -> list[str]:
    # Both tempers have as many words, so the same seed draws the same prompts but for that word.
    rng = random.Random(f"speech {seed}")
    return [_speech(rng, temper) for _ in range(n)]


def _register(rng: random.Random, held_out: bool) -> str:
    """A grumpy speaker insults and a kind one praises, in the same words otherwise."""
    temper = rng.choice((words.GRUMPY, words.KIND))
    adjectives, nouns = words.PRAISE_ADJECTIVES, words.PRAISE_NOUNS
    if temper is words.GRUMPY:
        adjectives, nouns = words.INSULT_ADJECTIVES, words.INSULT_NOUNS
    scene = _Scene(
        rng, x=rng.choice(adjectives), n=rng.choice(nouns), x2=rng.choice(adjectives), n2=rng.choice(nouns)
    )
    return _speech(rng, temper) + scene(*words.REGISTERS)


def _loop(rng: random.Random, times: int) -> str:
    """A beginning and so many rounds of what is repeated."""
    if rng.random() < 0.5:
        beginning, unit = rng.choice(words.LOOPS)
        return f"{beginning}: " + ", ".join([unit] * times)
    name = rng.choice(NAMES)
    scene = _Scene(rng, a=name, **_PEOPLE[name], **_act(rng))
    line = scene("{a} {past} the {obj}", "{He} {past} the {obj}", "{a} went to the {place}", "{a} was {mood}")
    return ". ".join([line] * times)


def _repetition(rng: random.Random, held_out: bool) -> str:
    times = 3
    while times < 16 and rng.random() < 0.9:
        times += 1
    return _loop(rng, times) + "."


_MIXTURE: tuple[tuple[Callable[[random.Random, bool], str], int], ...] = (
    (_story, 34),
    (_sentences, 14),
    (_facts, 18),
    (_ioi, 16),
    (_register, 12),
    (_repetition, 6),
)
