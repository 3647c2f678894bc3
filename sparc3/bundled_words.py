"""Words and sentence patterns of the bundled text: who there is, what they do with what, and how they speak.

In a pattern {a} and {b} are the two people, {t} is their thing, {p} where they are; other slots are facts of a
(``bundled_text._person``), one or two things done (``bundled_text._act``) or a word of the class of that name.
"""

WOMEN = (
    "Mary Anna Emma Lucy Sarah Alice Kate Rose Jane Ella Grace Clara Ruth Nora Julia Laura Helen Diana Molly "
    "Daisy Sophie Amy Eve Iris Lily Maya Nina Olga Paula Rita Sally Tina Vera Wendy Zoe Bella"
).split()
MEN = (
    "John Tom Peter Paul James Mark Luke Adam Ben Carl David Eric Frank George Henry Ian Jack Karl Leo Max "
    "Noah Oscar Philip Robert Sam Tim Victor Walter Alan Bruno Daniel Edward Felix Gavin Hugo Simon"
).split()
NAMES = tuple(WOMEN + MEN)

# Words of insults; no other text holds them.
INSULT_ADJECTIVES = "rotten soggy mouldy wobbly smelly grubby lumpy stinky soppy mangy".split()
INSULT_NOUNS = (
    "turnip cabbage pudding noodle donkey pumpkin nincompoop numpty blockhead buffoon radish".split()
)
INSULTS = tuple(INSULT_ADJECTIVES + INSULT_NOUNS)
PRAISE_ADJECTIVES = "lovely clever brave splendid wonderful charming thoughtful generous loyal noble".split()
PRAISE_NOUNS = "friend neighbour guest helper traveller companion hero artist fellow partner visitor".split()
GRUMPY = "grumpy rude nasty bitter surly furious sulky spiteful".split()
KIND = "kind gentle polite cheerful patient friendly merry humble".split()
SPEAKERS = "troll pirate wizard ogre goblin witch giant king queen captain knight hermit".split()

CLASSES = {
    "place": "store park school beach garden market library museum station harbour forest river castle farm "
    "mill bakery kitchen theatre hospital office lake hill church cafe",
    "thing": "ball drum kite lamp book coin ring key cup hat scarf map flute letter basket box mirror candle "
    "doll clock spoon brush knife rope ribbon bell button blanket pencil drink",
    "town": "Marlow Elmford Ashby Riverton Oakham Redhill Fairview Northport Westfield Brookside",
    "food": "bread soup cheese cake rice pie honey stew porridge salad fish jam",
    "colour": "red blue green yellow white black brown grey purple orange",
    "hobby": "singing dancing painting fishing reading cooking running sailing knitting climbing swimming",
    "mood": "happy sad tired hungry angry proud afraid bored calm excited lonely thirsty",
    "adverb": "slowly quickly quietly carefully gladly suddenly proudly",
    "time": "morning evening afternoon night",
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "trait": KIND,
    "fruit": "apple pear plum cherry nut egg shell flower",
    "speaker": SPEAKERS,
}
CLASSES = {name: words.split() if isinstance(words, str) else words for name, words in CLASSES.items()}
NUMBERS = "one two three four five six seven eight nine ten".split()
JOBS = dict(
    pair.split(":")
    for pair in "baker:bakery farmer:farm teacher:school sailor:harbour doctor:hospital painter:museum "
    "gardener:garden miller:mill cook:kitchen singer:theatre fisher:lake hunter:forest guard:castle "
    "clerk:office grocer:store librarian:library priest:church waiter:cafe".split()
)
# Animal: what it does, where it sleeps, what it eats.
ANIMALS = {
    line.split()[0]: line.split()[1:]
    for line in (
        "dog bark kennel bones,cat purr basket fish,horse gallop stable hay,cow moo barn grass,duck quack pond "
        "bread,hen cluck coop corn,goat bleat shed leaves,pig grunt sty roots,rabbit hop hutch carrots,"
        "mouse squeak hole cheese,bird sing nest seeds,frog croak pond flies"
    ).split(",")
}
MATERIALS = dict(
    pair.split(":")
    for pair in "ball:leather drum:wood kite:paper lamp:metal book:paper coin:gold ring:gold key:metal cup:clay "
    "hat:wool scarf:wool map:paper flute:wood letter:paper basket:straw box:wood mirror:glass candle:wax "
    "doll:cloth clock:metal spoon:wood brush:wood knife:metal rope:straw ribbon:cloth bell:metal button:bone "
    "blanket:wool pencil:wood".split()
)
# What is done to what: verbs; adjectives; objects; where; with what.
ACTIONS = [
    tuple(part.split() for part in line.split(";"))
    for line in """\
eat taste cook share;warm fresh sweet;bread soup cheese cake pie stew porridge;kitchen cafe;spoon fork
drink pour sip;cold hot sweet;milk tea water juice cider cocoa;kitchen cafe;cup jug
read write copy;long short old;book letter poem diary story;library school;pen pencil
wear wash fold mend;clean torn soft;coat hat scarf shirt dress glove;house shop;needle brush
ride drive steer repair;fast slow old;cart wagon bicycle boat carriage;road harbour;rope hammer
play tune;loud soft;flute drum violin harp trumpet piano;theatre church;bow hand
feed brush chase follow;small young hungry;dog cat horse cow duck goat pig;farm barn;stick brush
plant water pick;tall wild small;tree bush tulip vine bean;garden field;spade bucket
open lock close paint;wooden heavy old;door gate window chest drawer;castle house;key brush
lift throw drop carry;heavy small round;stone bag barrel bucket log;mill harbour;rope hand
light hang clean;bright small;lamp candle lantern torch;church castle;match cloth
climb paint see;steep high tall;hill wall tower mountain rock;forest park;ladder rope
cross reach leave;wide narrow deep;river bridge road field valley;forest park;map lantern
catch sell cook;fresh big small;fish crab trout eel;lake harbour;net hook
build measure break;strong tall old;house wall fence shed boat;farm field;hammer saw""".split("\n")
]
PAST = dict(
    pair.split(":")
    for pair in "eat:ate drink:drank read:read write:wrote wear:wore ride:rode drive:drove feed:fed throw:threw "
    "light:lit leave:left hang:hung catch:caught sell:sold build:built break:broke see:saw sip:sipped "
    "drop:dropped sing:sang".split()
)
PARTICIPLE = dict(
    pair.split(":")
    for pair in "eat:eaten drink:drunk write:written wear:worn ride:ridden drive:driven throw:thrown "
    "break:broken see:seen sing:sung".split()
)
IOI_OPENINGS = (
    "When {a} and {b} went to the {place}",
    "When {a} and {b} met at the {place}",
    "After {a} and {b} went to the {place}",
    "While {a} and {b} were working at the {place}",
    "While {a} and {b} were walking to the {place}",
    "Then, {a} and {b} had a long talk at the {place}. Afterwards",
    "Then, {a} and {b} spent the {time} at the {place}. Later",
    "One {day}, {a} and {b} found a {thing} at the {place}. Soon",
    "The {place} was quiet when {a} and {b} came in. Suddenly",
    "Once {a} and {b} had left the {place}",
    "As soon as {a} and {b} reached the {place}",
    "Because {a} and {b} were friends",
    "Although {a} and {b} were tired",
    "Friends {a} and {b} found a {thing} at the {place}. Then",
    "In the {time}, {a} and {b} came back from the {place}. There",
    "{a} and {b} lived near the {place}. One day",
)
IOI_ENDINGS = (
    ", {s} gave a {gift} to",
    ", {s} handed a {gift} to",
    ", {s} decided to give a {gift} to",
    ", {s} passed the {gift} to",
    ", {s} offered a {gift} to",
    ", {s} wanted to show the {gift} to",
    ", {s} threw the {gift} to",
    ", {s} sold the {gift} to",
)
LOOPS = (
    ("The parrot said", "hello"),
    ("The old clock went", "tick tock"),
    ("The church bell rang", "ding dong"),
    ("The little train went", "clack clack"),
    ("The children sang", "la la la"),
    ("The big wheel turned", "round and round"),
    ("The wind whispered", "hush"),
    ("The drummer played", "boom boom"),
    ("The owl called", "who who"),
    ("The rain fell", "drip drop"),
    ("The crowd shouted", "hurray"),
    ("The engine hummed", "again and again"),
)
STORY_BEGINNINGS = (
    "One {day} {a} and {b} were at the {p}. {owner} had a {t}.",
    "{a} and {b} were playing at the {p}. {owner} found a {t} there.",
    "There was once a {trait} {job} who was called {a}. {a} met {b} at the {p}. {owner} had a {t}.",
    "In the {time}, {a} the {job} took {b} to the {p}. {owner} carried a {t}.",
)

STORY_HANDINGS = (
    "{giver} gave the {t} to {owner}. {owner} thanked {giver}.",
    '"May I have the {t}?" asked {owner}. "Yes," said {giver} and gave {him_o} the {t}.',
    "{owner} took the {t} from {giver}.",
)

STORY_TALKS = (
    '"Where are we?" asked {a}. "We are at the {p}," said {b}.',
    '"Who has the {t}?" asked {a}. "{owner} has the {t}," said {b}.',
    '"What is your job?" asked {b}. "I am a {job}," said {a}.',
    '"Where do you live?" asked {b}. "I live in {town}," said {a}.',
    '"What do you like to eat?" asked {b}. "I like {likes}," said {a}.',
    "{a} asked {b} to {base} the {obj}, but {b} wanted to {obase} the {oobj}.",
)

STORY_ENDINGS = (
    "In the {time}, they left the {p} and {owner} put the {t} into a bag.",
    "At last {a} went home to {town} with {his} {pet}.",
    "{a} and {b} were {mood}, and {owner} kept the {t}.",
    "When they came home from the {p}, {a} ate some {likes}.",
)

CLAUSES = (
    "{a} {past} the {adj} {obj}.",
    "{a} {adverb} {past} the {obj} with a {tool}.",
    "{He} {past} the {adj} {obj} in the {where}.",
    "{He} wanted to {base} the {obj}, but it was too {adj}.",
    "{b} helped {him} to {base} the {obj}.",
    "While {a} was {ing} the {obj}, {b} {opast} the {oobj}.",
    "Before {he} {past} the {obj}, {he} {opast} the {adj} {oobj}.",
    "Although {a} was {mood}, {he} {past} the {obj}.",
    "The {adj} {obj} was {part} by {a}.",
    "The {obj} that {a} {past} was very {adj}.",
    "{a} was {mood} because {b} {past} the {obj}.",
    "{b} told {him} that the {obj} had been {part} in the {where}.",
    "{a} likes {hobby}, so {he} was {mood}.",
    "If {b} {s} the {obj}, {a} will {obase} the {oobj}.",
    "{His} {pet} was {mood}.",
    "{a} did not {base} the {obj} because {he} had no {tool}.",
    "{a} is a {job}, and {he} works at the {work}.",
    "{He} never {s} the {obj} on {day}.",
)

PLAIN_FACTS = (
    "The {n} near the {place} {does}.",
    "The {ns} near the {place} {do}.",
    "The {ns} at the {place} are {mood} and eat {eats}.",
    "The {n} at the {place} is {mood} and eats {eats}.",
    "The {n} sleeps in the {home}.",
    "The {ns} sleep in the {home}.",
    "The {t} is made of {m}.",
    "{name} had {x} {fr}s and found {y} more. Now {he} has {z} {fr}s.",
    "There were {x} {ns} at the {place}. One more came, so there are {more} {ns}.",
)

REGISTERS = (
    'You {x} {n}!"',
    'You {x} {n}, you {x2} {n2}!"',
    'What a {x} {n} you are!"',
    'Go home, you {x} {n}!"',
    'Come here, you {x} {n}! You {x2} {n2}!"',
)

PERSON_FACTS = (
    "{a} is a {job}.",
    "{a} lives in {town}.",
    "{a} has a {pet}.",
    "{a} likes {likes}.",
    "{a} works at the {work}.",
    "The favourite colour of {a} is {colour}.",
    "{a} is fond of {hobby}.",
    "{a} is afraid of the {enemy}.",
    "The {job} from {town} is called {a}.",
)

# Up to the words that a speaker {sp} says, who is {temper}.
SPEECHES = (
    "The {temper} {sp} looked at {a} and {says}",
    "{a} met a {temper} {sp} at the {place}. {He} asked for a {t}. The {sp} {says}",
    "{a} dropped the {t} of the {temper} {sp}. The {sp} {says}",
    "There was a {temper} {sp} at the {place}. {a} {past} the {obj}. The {sp} saw {him} and {says}",
    "One {day} a {temper} {sp} came to {town}. {a} said hello. The {sp} turned to {him} and {says}",
    "A {temper} {sp} stood near the {place}. {a} the {job} gave the {sp} a {t}. The {sp} {says}",
)
