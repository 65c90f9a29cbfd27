"""Prompts of four kinds for SmolLM2's draft heads: chat, code, prose and lists.

Those to measure on share no subject with those to train on.
"""

from __future__ import annotations

import random

from transformers import PreTrainedTokenizerBase

KINDS = ("chat", "code", "prose", "lists")

SUBJECTS = """photosynthesis; the water cycle; gravity; the moon landing; volcanoes; earthquakes; the human heart;
vaccines; antibiotics; the immune system; sleep; nutrition; vitamins; exercise; yoga; meditation; stress; anxiety;
time management; public speaking; job interviews; budgeting; credit cards; inflation; interest rates; the stock
market; insurance; taxes; renting a flat; buying a car; bicycles; electric cars; trains; aeroplanes; skyscrapers; the
internet; email; passwords; computer viruses; smartphones; batteries; solar power; wind turbines; nuclear energy;
recycling; climate change; rainforests; coral reefs; deserts; glaciers; rivers; tides; hurricanes; rainbows;
lightning; black holes; comets; telescopes; microscopes; atoms; molecules; chemical reactions; acids and bases;
metals; diamonds; fossils; dinosaurs; whales; elephants; bees; ants; spiders; cats; horses; gardening; compost; roses;
tomatoes; baking bread; coffee; tea; chocolate; cheese; pasta; rice; salad; soup; breakfast; the Roman Empire; ancient
Egypt; the Middle Ages; the Renaissance; the printing press; the steam engine; the French Revolution; democracy;
voting; courts; human rights; the United Nations; languages; spelling; poetry; novels; theatre; painting; sculpture;
photography; music; the piano; the guitar; dancing; football; tennis; running; camping; hiking; maps; museums;
libraries; schools; homework; friendship; families; weddings; birthdays; fractions; percentages; triangles; prime
numbers; probability; averages; algebra; logic; databases; operating systems; machine learning"""

QUESTIONS = """What is the most important thing to know about {}?; Explain {} to a child of ten.; How did people learn
about {}?; Give me a short summary of {}.; Why does {} matter?; I have to give a talk about {}. How should I begin?;
Write a short paragraph about {}.; What do people often get wrong about {}?; Tell me an interesting fact about {}.;
Can you help me understand {} better?"""

TASKS = """returns the sum of a list of numbers; reverses a string; counts the vowels in a text; checks whether a word
is a palindrome; finds the largest number in a list; sorts a list of names; removes duplicates from a list; computes
the factorial of n; returns the nth Fibonacci number; checks whether a number is prime; converts Celsius to
Fahrenheit; merges two dictionaries; reads a file and counts its lines; writes a list to a file; computes the distance
between two points; finds common elements of two lists; flattens a nested list; counts words in a sentence;
capitalises each word; returns the average of a list; computes the median; finds the longest word; checks whether two
words are anagrams; generates a random password; validates an email address; rolls two dice; multiplies two matrices;
transposes a matrix; does a binary search; implements bubble sort; implements quick sort; implements a stack;
implements a queue; implements a linked list; inverts a binary tree; finds the greatest common divisor; converts a
number to binary; converts Roman numerals to numbers; computes compound interest; calculates the area of a circle;
prints a multiplication table; filters even numbers; groups words by their first letter; counts how often each
character occurs; rotates a list; splits a list into chunks; zips two lists; computes a running total; finds missing
numbers; replaces spaces by underscores; encrypts a text with a Caesar cipher; downloads a web page; parses a CSV
line; formats a price; draws a triangle of stars; simulates a coin toss; checks balanced brackets; compares two
version numbers; computes a moving average; finds all pairs with a given sum; returns the power set"""

ORDERS = """Write a Python function that {}.; Write a short program in Python that {}. Add comments.; Show me how to
write code that {}.; Write JavaScript code that {}.; Write a class with a method that {}, and an example of how to use
it."""

HEADERS = """def {}(values):\\n    ""\"Return ; import math\\n\\n\\ndef {}(x, y):\\n    ; class {}:\\n    def
__init__(self, ; # {}\\n\\nimport os\\nimport sys\\n\\n; function {}(items) {{\\n  ; public class {} {{\\n    private
; SELECT {} FROM ; <html>\\n<head>\\n<title>{}</title>\\n; def test_{}():\\n    assert ; #include <stdio.h>\\n\\nint
{}(int n) {{\\n"""

NAMES = """total; account; inventory; schedule; invoice; customer; vehicle; matrix; counter; parser; logger; window;
player; score; library; recipe; sensor; message; queue; image; student; ticket; route; robot; garden"""

HEROES = """an old fisherman; a young doctor; two brothers; a lost kitten; a shy teacher; the queen; a travelling
singer; a clever fox; a tired soldier; a little girl named Lily; a baker; a gardener; a detective; a clockmaker; a
poor farmer; an astronaut; a painter; a blind musician; a ship's captain; a lonely robot"""

SCENES = """Once upon a time there was {} who; It was a cold morning in November, and {}; Nobody in the village
believed that {}; When the storm was over, {}; On the last day of summer, {}; The letter arrived on a Tuesday. {};
Deep in the forest lived {}, and; The train was late again, and {}"""

ESSAYS = """The history of {} begins; Many people believe that {}; In recent years, {}; A new report about {} says
that; One of the main reasons for {} is; Our understanding of {} has changed because"""

THINGS = """fruits; vegetables; countries in Europe; capital cities; animals that live in the sea; farm animals;
trees; flowers; colours; musical instruments; sports; jobs; kitchen tools; pieces of furniture; clothes; desserts;
drinks; spices; planets; inventions; famous scientists; rivers of the world; mountains; islands; holidays; hobbies;
school subjects; programming languages; computer parts; emotions; parts of the body; insects; dinosaurs; means of
transport; ways to save money; ways to save water; ways to learn a language; habits of successful people; benefits of
reading; tips for better sleep; tips for a job interview; reasons to exercise; steps to plant a tree; steps to bake a
cake; things to pack for a trip; questions to ask a friend; gifts for a child; games for a party; healthy snacks;
breakfast ideas; names for a cat; names for a shop; synonyms of happy; verbs of motion; adjectives for a person;
months and their weather; rules for a classroom; safety rules at home; ideas for a short story; facts about the sun;
facts about bees; uses of a paper clip; tools in a garage; materials for building; metals; gemstones; famous painters;
classic novels; film genres; dances"""

ASKED = """List ten {}.; Give me a numbered list of {}.; Make a bulleted list of {} with a short explanation of each.;
Name twenty {}.; Make a table of {} with two columns."""

BEGUN = """Here is a list of {}:\\n1.; Top 10 {}:\\n\\n1.; {}:\\n-; The following are {}:\\n\\n*"""

HELD_OUT = {
    "chat": """How do submarines dive and come up again?; My neighbour plays the drums at night. What can I say to
him?; What is the difference between a crocodile and an alligator?; I spilled red wine on my carpet. What now?; Who
was Marie Curie?; Please explain how a refrigerator keeps things cold.; Should I learn to knit or to sew first?; Why
do onions make us cry?; Write an email to my landlord about a broken window.; What happened at the Battle of
Waterloo?; How can I calm a crying baby?; Is it safe to look at a solar eclipse?""",
    "code": """Write a Python function that checks the last digit of an ISBN.; Write a Python program that plays
hangman in the terminal.; Write a regular expression for phone numbers and explain it.; Write a bash script that
renames all .txt files to .md.; raw:class Elevator:\\n \"\"\"An elevator with floors and doors.\"\"\"\\n\\n    def ;
raw:def levenshtein(a: str, b: str) -> int:\\n    \"\"\"Edit distance of two strings.\"\"\"\\n; raw:import
argparse\\n\\n\\ndef main() -> None:\\n    parser = argparse.ArgumentParser(description="Resize pictures")\\n;
raw:const express = require('express');\\nconst app = express();\\n\\napp.get('/users', ; Write a Python class for a
tic-tac-toe board.; Write SQL that creates tables for a hotel with rooms, guests and bookings.; raw:def
dijkstra(graph, source):\\n    ; Write unit tests in Python for a function that adds two times of day.""",
    "prose": """raw:The old violin had hung on the wall of the tavern for forty years before; raw:Penguins are among
the strangest birds on Earth. They; raw:Grandmother put down her newspaper and looked at the goat in the kitchen.;
raw:The Great Wall of China was built; raw:At midnight the dragon landed on the roof of the town hall. ;
raw:Scientists have discovered a new species of frog in; raw:My first day as a postman did not go well.; raw:Silk was
once worth more than gold. For centuries, ; raw:The cable car stopped between the valley and the summit. Inside,;
raw:Lighthouses were; raw:Dear Martha,\\n\\nI am writing to you from Lisbon, where; raw:The committee met on Thursday
to discuss the new parking meters.""",
    "lists": """List twelve dog breeds.; What are the ten largest lakes of North America?; Make a checklist for moving
to another town.; raw:Shopping list for a barbecue:\\n- ; raw:Things every pirate needs:\\n\\n1.; Give me fifteen
ideas for a school play.; List the steps to change a flat tyre.; raw:Chess openings:\\n1.; Name ten words that rhyme
with light.; List eight constellations and what they look like.; raw:Famous bridges and where they are:\\n\\n*;
Suggest ten titles for a podcast about ghosts.""",
}


def split(text: str) -> list[str]:
    r"""The items between semicolons, on one line each; `\n` stands for a new line."""
    return [item.strip(" ").replace("\\n", "\n") for item in text.replace("\n", " ").split("; ")]


def chat(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """A user's message, as the model's own chat template has it."""
    said: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    return plain(tokenizer, said)


def plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def training_prompts(tokenizer: PreTrainedTokenizerBase, each: int, seed: int = 0) -> list[list[int]]:
    """`each` prompts of every kind, shuffled: half of the code and of the lists are asked for, half are begun."""
    rng = random.Random(seed)

    def drawn(frames: str, fillings: str, n: int) -> list[str]:
        every = [frame.format(filling) for frame in split(frames) for filling in split(fillings)]
        return rng.sample(every, min(n, len(every)))

    half = each // 2
    asked = drawn(QUESTIONS, SUBJECTS, each) + drawn(ORDERS, TASKS, half) + drawn(ASKED, THINGS, half)
    begun = drawn(HEADERS, NAMES, half) + drawn(BEGUN, THINGS, half)
    begun += drawn(SCENES, HEROES, half) + drawn(ESSAYS, SUBJECTS, each - half)
    found = [chat(tokenizer, text) for text in asked] + [plain(tokenizer, text.rstrip(" ")) for text in begun]
    rng.shuffle(found)
    return found


def held_out_prompts(tokenizer: PreTrainedTokenizerBase) -> dict[str, list[list[int]]]:
    """Twelve prompts of each kind whose subjects and wording no training prompt has."""
    return {
        kind: [
            plain(tokenizer, text.removeprefix("raw:").rstrip(" "))
            if text.startswith("raw:")
            else chat(tokenizer, text)
            for text in split(HELD_OUT[kind])
        ]
        for kind in KINDS
    }
