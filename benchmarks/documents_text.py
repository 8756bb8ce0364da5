"""
The document of benchmarks/documents.py: the handbook of a ferry service that does not exist, and questions about it.

No model can know it: names and customs are invented, and the facts of its last part are dealt out by a generator with a fixed
seed. `python benchmarks/documents_text.py` prints it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """
    A question about the document.

    Attributes:
        question: What is asked.
        answer: The answer, one sentence in the document's words.
        fact: The part of the answer that only the document tells, whatever its case.
    """

    question: str
    answer: str
    fact: str


@dataclass(frozen=True)
class Section:
    """A part of the document, and the questions that it answers."""

    title: str
    text: str
    questions: tuple[Question, ...]


WHOLE, FIRST, SECOND = slice(None), slice(0, 6), slice(6, 12)
"""The whole handbook, and two parts of it that share no section: two short documents."""


def document(part: slice = WHOLE) -> str:
    """Return the handbook, or the sections of a part of it."""
    sections = list(enumerate(_sections(), start=1))[part]
    parts = [f"{number}. {section.title}\n{section.text}" for number, section in sections]
    return "\n\n".join(["Handbook of the Orvane Ferry Service", *parts])


def held_out_questions(part: slice = WHOLE) -> list[Question]:
    """Return the questions that are asked about the handbook, or about a part of it, in a fixed random order."""
    questions = [question for section in _sections()[part] for question in section.questions]
    random.Random(2).shuffle(questions)
    return questions


def user_turn(question: str) -> str:
    """Return what comes after the document: a question as SmolLM2's chat template puts it, up to where the answer begins."""
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


END_OF_ANSWER = "<|im_end|>"


# ------------------------------------------------------------------------------------------------------------ the ports

PORTS = ("Brackwater", "Ennisholm", "Lindmoor", "Saltry", "Quillhaven", "Dunmarrow")
WARDENS = ("Petra Vance", "Aldo Merrin", "Mirela Stroud", "Davit Penhallow", "Oona Lysander", "Ruben Castellane")
INNS = ("Three Anchors", "Drowned Bishop", "Golden Oar", "Lazy Gull", "Silver Whelk", "Last Candle")
TRADES = ("dried kelp", "glass bottles", "beeswax", "printing ink", "apple saplings", "clay pipes")
HAZARDS = ("a sunken mill", "a sandbank", "an old chain", "a whirlpool", "a wreck", "a reef of oysters")


def _port_sections() -> list[Section]:
    """A short section for each port; which facts are whose is drawn."""
    draw = random.Random(1)
    dealt = [draw.sample(each, len(each)) for each in (WARDENS, INNS, TRADES, HAZARDS)]
    berths = draw.sample(range(3, 40), len(PORTS))
    return [_port_section(draw, *facts) for facts in zip(PORTS, *dealt, berths, strict=True)]


def _port_section(
    draw: random.Random, port: str, warden: str, inn: str, trade: str, hazard: str, berths: int
) -> Section:
    sentences = [
        f"The warden of {port} is {warden}.",
        f"Crews who stay at {port} sleep at the {inn}.",
        f"Most of the freight that leaves {port} is {trade}.",
        f"Skippers who enter {port} must look out for {hazard}.",
        f"There are {berths} berths at {port}.",
    ]
    questions = (
        Question(f"Who is the warden of {port}?", sentences[0], warden),
        Question(f"Where do crews who stay at {port} sleep?", sentences[1], inn),
        Question(f"What is most of the freight that leaves {port}?", sentences[2], trade),
        Question(f"What must skippers who enter {port} look out for?", sentences[3], hazard),
        Question(f"How many berths are there at {port}?", sentences[4], f"{berths} berths"),
    )
    return Section(f"The port of {port}", " ".join(draw.sample(sentences, len(sentences))), questions)


def _sections() -> list[Section]:
    return [*SECTIONS, *_port_sections()]


# ----------------------------------------------------------------------------------------------------------- the service

SECTIONS = (
    Section(
        "The service",
        "The Orvane Ferry Service was founded in 1887 by Ilse Torvald, a widow who sold her orchard to buy "
        "the first boat. It joins the twelve islands of the Orvane archipelago and carries people, letters, "
        'animals and freight. Its head office is in the old salt house at Brackwater, and its motto is "Late '
        'but dry". This handbook is for its crews. Everyone must have read it before the first passage.',
        (
            Question(
                "Who founded the Orvane Ferry Service?",
                "The Orvane Ferry Service was founded by Ilse Torvald.",
                "Ilse Torvald",
            ),
            Question(
                "What did Ilse Torvald sell to buy the first boat?",
                "Ilse Torvald sold her orchard to buy the first boat.",
                "orchard",
            ),
            Question(
                "Where is the head office of the Orvane Ferry Service?",
                "The head office is in the old salt house at Brackwater.",
                "salt house at Brackwater",
            ),
            Question(
                "What is the motto of the Orvane Ferry Service?",
                'The motto of the service is "Late but dry".',
                "Late but dry",
            ),
        ),
    ),
    Section(
        "The fleet",
        "There are five boats. The Grey Heron is the largest and takes 140 passengers. The Patient Anna "
        "carries no passengers, only cattle and hay. The Copper Jack runs on wood gas and is used between "
        "Lindmoor and Saltry. The Second Lantern sails at night. The Halfpenny is a rowing boat for the "
        "channel at Wyke, which is too shallow for any other. All hulls are painted dark green, and a hull is "
        "painted anew every third spring.",
        (
            Question("Which boat of the service is the largest?", "The Grey Heron is the largest.", "Grey Heron"),
            Question(
                "What does the Patient Anna carry?", "The Patient Anna carries only cattle and hay.", "cattle and hay"
            ),
            Question("What does the Copper Jack run on?", "The Copper Jack runs on wood gas.", "wood gas"),
            Question("Which boat sails at night?", "The Second Lantern sails at night.", "Second Lantern"),
            Question(
                "What colour are the hulls of the boats painted?", "All hulls are painted dark green.", "dark green"
            ),
        ),
    ),
    Section(
        "Tickets and fares",
        "A single passage costs 14 pence, whatever its length. Children under nine and beekeepers travel free "
        "of charge. A ticket is a brass token with a hole in it; it is given back to the mate at the gangway. "
        "Whoever loses the token pays with an hour of work on deck. Tickets are sold by the baker of each "
        "island, who keeps one penny in ten.",
        (
            Question("How much does a single passage cost?", "A single passage costs 14 pence.", "14 pence"),
            Question(
                "Who travels free of charge, besides children under nine?",
                "Beekeepers travel free of charge.",
                "beekeepers",
            ),
            Question(
                "What is a ticket of the service?", "A ticket is a brass token with a hole in it.", "brass token"
            ),
            Question(
                "Who sells the tickets on each island?", "Tickets are sold by the baker of each island.", "baker"
            ),
        ),
    ),
    Section(
        "The crew",
        "Every boat has a skipper, a mate, a stoker and a listener. The listener stands at the bow in fog and "
        "listens for the breakers; no one may talk to him on duty. A skipper must have served for eleven "
        "years. Crews wear a grey jersey, and the skipper a red cap besides. Wages are paid on the last "
        "Thursday of the month, half in coin and half in coal.",
        (
            Question(
                "What does the listener do in fog?",
                "The listener stands at the bow and listens for the breakers.",
                "breakers",
            ),
            Question(
                "How long must a skipper have served?", "A skipper must have served for eleven years.", "eleven years"
            ),
            Question("What does the skipper wear besides the grey jersey?", "The skipper wears a red cap.", "red cap"),
            Question("When are wages paid?", "Wages are paid on the last Thursday of the month.", "last Thursday"),
        ),
    ),
    Section(
        "Weather",
        "The harbour master at Quillhaven, Nerys Dahl, decides whether boats sail. If they may not, she "
        "hoists a black basket. In a storm from the north-east all boats shelter behind Marrick Head. Fog is "
        "announced by a slow drum. When the thermometer falls below minus six, the deck is strewn with ashes, "
        "never with salt, because salt makes the cattle ill.",
        (
            Question(
                "Who decides whether boats sail?",
                "The harbour master at Quillhaven, Nerys Dahl, decides whether boats sail.",
                "Nerys Dahl",
            ),
            Question(
                "What is hoisted if boats may not sail?",
                "If boats may not sail, a black basket is hoisted.",
                "black basket",
            ),
            Question(
                "Where do boats shelter in a storm from the north-east?",
                "In a storm from the north-east all boats shelter behind Marrick Head.",
                "Marrick Head",
            ),
            Question("How is fog announced?", "Fog is announced by a slow drum.", "slow drum"),
            Question("What is the deck strewn with when it freezes?", "The deck is strewn with ashes.", "ashes"),
        ),
    ),
    Section(
        "Freight",
        "Freight is weighed on the quay in stones. The rate is three pence a stone, and double for anything "
        "that smells. Church bells must be wrapped in wool. Live eels travel in barrels of wet moss, and the "
        "barrel is opened once an hour. Gunpowder is never carried on a Friday. Roof slates are the most "
        "common freight; they come from the quarry at Ennisholm.",
        (
            Question("What is the rate for freight?", "The rate is three pence a stone.", "three pence"),
            Question("What must church bells be wrapped in?", "Church bells must be wrapped in wool.", "wool"),
            Question("What do live eels travel in?", "Live eels travel in barrels of wet moss.", "wet moss"),
            Question("On which day is gunpowder never carried?", "Gunpowder is never carried on a Friday.", "Friday"),
            Question(
                "Where do the roof slates come from?",
                "The roof slates come from the quarry at Ennisholm.",
                "Ennisholm",
            ),
        ),
    ),
    Section(
        "Animals",
        "Dogs travel in the bow, cats in the wheelhouse. A goat counts as half a passenger. Bulls are led on "
        "board backwards, so that they do not see the water. Every boat keeps a hen, for hens fall silent "
        "before a squall; the hen of the Grey Heron is called Duchess. Swans that rest on the landing stage "
        "must not be driven off.",
        (
            Question("Where do cats travel?", "Cats travel in the wheelhouse.", "wheelhouse"),
            Question("What does a goat count as?", "A goat counts as half a passenger.", "half a passenger"),
            Question("How are bulls led on board?", "Bulls are led on board backwards.", "backwards"),
            Question(
                "What is the hen of the Grey Heron called?", "The hen of the Grey Heron is called Duchess.", "Duchess"
            ),
        ),
    ),
    Section(
        "Food and health",
        "The galley serves barley soup at noon and nothing else. Passengers who are seasick get hot plum "
        "cordial; the bottle stands in the locker under the chart table. Doctor Corin Hoyle comes on board at "
        "Saltry every second Tuesday. Burns are treated with honey. Smoking is allowed at the stern only, and "
        "only pipes.",
        (
            Question("What does the galley serve at noon?", "The galley serves barley soup at noon.", "barley soup"),
            Question(
                "What do passengers who are seasick get?",
                "Passengers who are seasick get hot plum cordial.",
                "plum cordial",
            ),
            Question(
                "Which doctor comes on board at Saltry?", "Doctor Corin Hoyle comes on board at Saltry.", "Corin Hoyle"
            ),
            Question("What are burns treated with?", "Burns are treated with honey.", "honey"),
        ),
    ),
    Section(
        "Accidents",
        "If someone falls overboard, the mate throws the cork ladder and the stoker stops the engine. The "
        "skipper stays at the wheel. A boat that has run aground shows two red lanterns, one above the other, "
        "and fires a green rocket every ten minutes. The lifeboat lies at Hallow Ness and is rowed by the "
        "seven sisters Castellane. After every accident a report goes to the inspector, Bram Okonski, within "
        "three days.",
        (
            Question(
                "What does the mate throw if someone falls overboard?",
                "The mate throws the cork ladder.",
                "cork ladder",
            ),
            Question(
                "What does a boat that has run aground show?",
                "A boat that has run aground shows two red lanterns.",
                "two red lanterns",
            ),
            Question("Where does the lifeboat lie?", "The lifeboat lies at Hallow Ness.", "Hallow Ness"),
            Question(
                "Who rows the lifeboat?",
                "The lifeboat is rowed by the seven sisters Castellane.",
                "sisters Castellane",
            ),
            Question(
                "To whom does a report go after every accident?",
                "A report goes to the inspector, Bram Okonski.",
                "Bram Okonski",
            ),
        ),
    ),
    Section(
        "Letters",
        "The mail bag is yellow and hangs in the wheelhouse. Letters with a black seal are carried before all "
        "other freight. A letter that cannot be delivered is kept for forty days in the chapel of Lindmoor "
        "and then read aloud there. The stamp of the service shows a heron with a key in its beak. Parcels of "
        "cheese are carried free in December.",
        (
            Question("What colour is the mail bag?", "The mail bag is yellow.", "yellow"),
            Question(
                "Where is a letter that cannot be delivered kept?",
                "A letter that cannot be delivered is kept in the chapel of Lindmoor.",
                "chapel of Lindmoor",
            ),
            Question(
                "What does the stamp of the service show?",
                "The stamp of the service shows a heron with a key in its beak.",
                "heron with a key",
            ),
            Question(
                "When are parcels of cheese carried free?",
                "Parcels of cheese are carried free in December.",
                "December",
            ),
        ),
    ),
    Section(
        "Night passages",
        "At night the boat goes at four knots. The lamp at the mast burns walnut oil from Tarn Quay, and it "
        "is trimmed at midnight. The helmsman steers by the lighthouse of Dunmarrow, which flashes five times "
        "and rests. Singing is forbidden, for it covers the bell buoy off Feolin Rock. Passengers sleep in "
        "hammocks, and a hammock costs two pence.",
        (
            Question("How fast does the boat go at night?", "At night the boat goes at four knots.", "four knots"),
            Question(
                "Which lighthouse does the helmsman steer by?",
                "The helmsman steers by the lighthouse of Dunmarrow.",
                "Dunmarrow",
            ),
            Question("What is forbidden on night passages?", "Singing is forbidden on night passages.", "singing"),
            Question("Where does the bell buoy lie?", "The bell buoy lies off Feolin Rock.", "Feolin Rock"),
        ),
    ),
    Section(
        "Holidays and customs",
        "No boat sails on Torvald's Day, the ninth of May, when the founder is remembered with a regatta of "
        "washtubs. The winner gets a ham. A bride is carried over without a ticket, but must throw a coin "
        "into the wake. New members of the crew are baptised with cold tea. The oldest skipper, Jonna Skeld, "
        "rings the year out with the ship's bell of the first boat, the Merrow.",
        (
            Question("When is Torvald's Day?", "Torvald's Day is the ninth of May.", "ninth of May"),
            Question("What does the winner of the regatta get?", "The winner of the regatta gets a ham.", "ham"),
            Question(
                "What are new members of the crew baptised with?",
                "New members of the crew are baptised with cold tea.",
                "cold tea",
            ),
            Question("Who is the oldest skipper?", "The oldest skipper is Jonna Skeld.", "Jonna Skeld"),
            Question("What was the name of the first boat?", "The first boat was the Merrow.", "Merrow"),
        ),
    ),
)


if __name__ == "__main__":
    print(document())
    for each in held_out_questions():
        print(f"\n{each.question}\n{each.answer}")
