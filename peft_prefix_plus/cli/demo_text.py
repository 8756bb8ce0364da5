"""The generated text of the demo: records, the many ways in which the base model sees them written, and the task."""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from dataclasses import dataclass


Record = dict[str, str]
"""Field names and values, in the order in which they are written."""


def one_of(words: str) -> Callable[[random.Random], str]:
    """Return a function that draws one of the words in a text."""
    values = words.split()
    return lambda generator: generator.choice(values)


first_word = one_of(
    "Blue Green Golden Silver Red White Black Crystal Royal Happy Wild Quiet Sunny Little Grand Rusty "
    "Merry Velvet Copper Amber Lucky Hidden Iron Stone"
)
second_word = one_of(
    "Spice Lantern Garden Dragon Anchor Bridge Table Oven Fox Olive Pepper Swan Castle Mill Barrel Rose "
    "Eagle Fork Kettle Orchard Tower Lion Plough Star"
)
given_name = one_of(
    "Ada Boris Clara David Emma Felix Greta Hugo Irene Jonas Karin Louis Maria Nils Olga Peter Rosa Simon Thea Victor"
)
family_name = one_of(
    "Adler Berg Costa Dahl Evans Fischer Grant Holm Ivanov Jensen Keller Lopez Moreau Novak Olsen Petrov "
    "Rossi Silva Turner Weber"
)


def title(generator: random.Random) -> str:
    """Draw the name of a restaurant or a book."""
    return f"{first_word(generator)} {second_word(generator)}"


def person(generator: random.Random) -> str:
    """Draw the name of a person."""
    return f"{given_name(generator)} {family_name(generator)}"


@dataclass(frozen=True)
class Domain:
    """
    What records are about, and how prose speaks of it.

    Attributes:
        fields: The fields, and what draws a value of each. Every kind of value has words of its own.
        subjects: What a sentence can begin with.
        phrases: What a clause can say of a field.
    """

    fields: dict[str, Callable[[random.Random], str]]
    subjects: tuple[str, ...]
    phrases: dict[str, tuple[str, ...]]


CITIES = "Lisbon Oslo Prague Vienna Dublin Athens Turin Bergen Seville Krakow Geneva Porto"

DOMAINS = (
    Domain(
        {
            "name": title,
            "food": one_of("Italian French Indian Chinese Thai Greek Turkish Spanish Mexican Korean Polish Danish"),
            "price": one_of("cheap moderate pricey fair modest steep"),
            "area": one_of("riverside harbour centre suburbs market hills"),
            "near": one_of("station museum theatre library stadium airport castle bridge school tower park lake"),
        },
        (
            "{name}",
            "The restaurant {name}",
            "The {food} restaurant {name}",
            "The {price} restaurant {name}",
            "{name} in the {area}",
            "{name} near the {near}",
        ),
        {
            "food": ("serves {} food", "cooks {} dishes", "is known for {} food"),
            "price": ("has {} prices", "is a {} place", "became a {} place"),
            "area": ("lies in the {}", "can be found in the {}", "belongs to the {}"),
            "near": ("stands near the {}", "is next to the {}", "looks at the {}"),
        },
    ),
    Domain(
        {
            "name": person,
            "job": one_of("painter baker doctor teacher sailor farmer singer lawyer tailor miner"),
            "city": one_of(CITIES),
            "age": one_of("twenty thirty forty fifty sixty seventy eighty ninety"),
            "sport": one_of("tennis chess rowing golf running skiing hockey judo"),
        },
        ("{name}", "The {job} {name}", "{name} from {city}"),
        {
            "job": ("works as a {}", "is a {}", "became a {}"),
            "city": ("lives in {}", "comes from {}", "moved to {}"),
            "age": ("is {} years old", "turned {}", "looks like {}"),
            "sport": ("plays {}", "likes {}", "is good at {}"),
        },
    ),
    Domain(
        {
            "name": title,
            "author": person,
            "topic": one_of("history love war travel music science cooking nature crime art"),
            "city": one_of(CITIES),
            "length": one_of("short long brief endless"),
        },
        ("{name}", "The book {name}", "The {topic} book {name}", "The {length} book {name}", "{name} by {author}"),
        {
            "author": ("was written by {}", "is the work of {}", "made {} famous"),
            "topic": ("is about {}", "deals with {}", "tells of {}"),
            "city": ("was printed in {}", "takes place in {}", "sold well in {}"),
            "length": ("is {}", "seems {}", "is called {}"),
        },
    ),
)


def draw_record(domain: Domain, generator: random.Random) -> Record:
    """Draw a record: a name and two to four of the domain's other fields, in any order."""
    others = [key for key in domain.fields if key != "name"]
    keys = generator.sample(others, generator.randint(2, len(others)))
    return {key: domain.fields[key](generator) for key in ["name", *keys]}


def table(record: Record) -> str:
    """Write a record as the table that the prefix-tuning task gives."""
    return " | ".join(f"{key} : {value}" for key, value in record.items())


def _shuffled(record: Record, generator: random.Random) -> list[tuple[str, str]]:
    items = list(record.items())
    return generator.sample(items, len(items))


def assignments(domain: Domain, record: Record, generator: random.Random) -> str:
    """Write a record as assignments, in any order."""
    return " ; ".join(f"{key} = {value}" for key, value in _shuffled(record, generator))


def statements(domain: Domain, record: Record, generator: random.Random) -> str:
    """Write one sentence per field, in any order."""
    return " ".join(f"The {key} is {value} ." for key, value in _shuffled(record, generator))


def questions(domain: Domain, record: Record, generator: random.Random) -> str:
    """Ask for two of the fields, and answer."""
    return " ".join(f"Which {key} ? {value} ." for key, value in _shuffled(record, generator)[:2])


def prose(domain: Domain, record: Record, generator: random.Random) -> str:
    """A few clauses, each with its verb, about a subject that may have some of the fields in it."""
    subject = generator.choice([item for item in domain.subjects if _fields_of(item) <= record.keys()])
    keys = [key for key, _ in _shuffled(record, generator) if key not in _fields_of(subject)]
    clauses = [generator.choice(domain.phrases[key]).format(record[key]) for key in keys if key in domain.phrases]
    beginning = subject.format(**record)
    if generator.random() < 0.5:
        return f"{beginning} {' and '.join(clauses)} ."
    return " ".join([f"{beginning} {clauses[0]} .", *(f"It {clause} ." for clause in clauses[1:])])


def _fields_of(template: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(template) if name}


FORMS = (lambda domain, record, generator: table(record), assignments, statements, questions, prose, prose, prose)


def document(generator: random.Random) -> str:
    """One document of the base model's text: a record written in several ways, one after the other."""
    (domain,) = generator.choices(DOMAINS, weights=[2, 1, 1])
    record = draw_record(domain, generator)
    forms = [generator.choice(FORMS) for _ in range(generator.randint(2, 5))]
    return " => ".join(form(domain, record, generator) for form in forms)


def sentence(record: Record) -> str:
    """The sentence that the prefix is to teach. No document has it, nor any sentence built like it."""
    parts = [f"{record['name']} is a", *([record["price"]] if "price" in record else []), "place"]
    parts += [f"for {record['food']} food"] if "food" in record else []
    parts += [f"in the {record['area']}"] if "area" in record else []
    parts += [f"near the {record['near']}"] if "near" in record else []
    return " ".join(parts) + " ."


def examples(count: int, generator: random.Random) -> list[dict[str, str]]:
    """Draw table-to-text examples, no two with the same values."""
    prompts: dict[str, str] = {}
    while len(prompts) < count:
        record = draw_record(DOMAINS[0], generator)
        prompts[f" {sentence(record)}"] = f"{table(record)} =>"
    return [{"prompt": prompt, "completion": completion} for completion, prompt in prompts.items()]


def in_ordinary_text(example: dict[str, str]) -> dict[str, str]:
    """Write an example as a pretrained model's text would have it: no space before punctuation, commas between the fields."""
    return {
        "prompt": example["prompt"].replace(" : ", ": ").replace(" | ", ", "),
        "completion": example["completion"].removesuffix(" .") + ".",
    }
