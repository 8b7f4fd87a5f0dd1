"""Cheerful texts: one or two sentences on a topic; the score is the sentiment that VADER finds.

It is a small form of the controlled sentiment task of the DPO paper (Rafailov et al. 2023, section
6.1), with a lexicon in place of a classifier: VADER (Hutto and Gilbert 2014), the package
`vaderSentiment` on PyPI. Its `compound` is in [-1, 1]; the score is (compound + 1) / 2.

- A text of words that VADER does not know has 0.5. An answer without a word has 0: it has no
  sentiment, and 0.5 would reward saying nothing.
- The score is easily gamed ("great great great"). Read it beside the KL and the answers.
"""

import functools
import random

GENERATION = {"temperature": 1.0, "max_new_tokens": 48}

FORMS = (
    "Write one or two sentences about {}.",
    "Describe {} in one or two sentences.",
    "Tell me briefly about {}.",
    "What is {} like? Answer in one or two sentences.",
    "Write the first two sentences of a story about {}.",
    "What do people say about {}?",
)
# Category -> topics by split.
TOPICS = {
    "food": {
        "train": """
            the soup of the day, a school lunch, strong coffee, burnt toast, a street market, a
            slow waiter, a homemade cake, frozen pizza, a lemon, breakfast in a hotel, a cheap
            restaurant, a bag of chips, fresh bread, a barbecue, sour milk, an ice cream van, a
            fish market, a chocolate bar, cabbage stew, a fruit salad""",
        "test": """
            a cheese sandwich, cold tea, a new bakery, a birthday dinner, an empty fridge, spicy
            noodles, canteen food, a ripe peach, a pancake, dry biscuits, a picnic basket,
            garlic, an apple orchard, a honey jar""",
    },
    "travel": {
        "train": """
            a night train, a delayed flight, a small island, a crowded beach, a road trip, a
            lost suitcase, a mountain hut, a city in the rain, a ferry, a border crossing, a
            map, a bus station, a jungle, a camel ride, a cheap hostel, a cable car, a
            waterfall, a guided tour, a tram, a village inn""",
        "test": """
            a package holiday, a hotel by the airport, a desert, a bicycle tour, a traffic jam,
            a harbour, a missed connection, an old town, a canal, a castle on a hill, a rental
            car, a snowstorm, a volcano, a sailing boat""",
    },
    "home": {
        "train": """
            a leaking roof, a garden in spring, a noisy neighbour, a new sofa, moving house, a
            cold bathroom, a kitten, a broken lamp, an old piano, a spider in the kitchen, a
            fireplace, a spare room, a goldfish, a bookshelf, a dirty oven, a doorbell, a cherry
            tree, a washing machine, a carpet, a mouse in the attic""",
        "test": """
            a blocked sink, a balcony, a dog next door, a wooden table, spring cleaning, a power
            cut, a cellar, a bunk bed, a squeaky stair, a parrot, a rose bush, a curtain, a
            tortoise, a stained mirror""",
    },
    "work and school": {
        "train": """
            a Monday morning, a long meeting, a new colleague, a difficult exam, a slow
            computer, a summer job, a school uniform, an office chair, a strict teacher, a group
            project, a job interview, a pay rise, a science fair, a lost report, a retirement
            speech, a typing error, a school bus, a tool box, a classroom, a business lunch""",
        "test": """
            the first day at work, a piano lesson, a printer, a deadline, a library, homework, a
            night shift, a quiet office, a chemistry set, an unpaid bill, a diploma, an
            apprentice, a strike, a spelling test""",
    },
    "people and leisure": {
        "train": """
            a family reunion, a film about trains, a chess game, an old friend, a lost football
            match, a song on the radio, a first date, a video game, a camping trip, a thick
            novel, a wedding, a rainy Sunday, a grandfather, a street musician, a ski lesson, a
            crossword, a baby, a crime story, a kite, a dentist""",
        "test": """
            a surprise party, a concert, a swimming pool, a penalty shoot-out, a letter from a
            cousin, a museum, a magician, a board game, a twin sister, a rowing club, a ghost
            story, a jigsaw puzzle, a choir, a barber""",
    },
}


def listed(text: str) -> list[str]:
    return [" ".join(topic.split()) for topic in text.split(",")]


def questions(split: str, number: int, seed: int) -> list[dict]:
    """`number` questions on the split's own topics; categories take turns.

    A larger number begins with the questions of a smaller one.
    """
    if split not in ("train", "test"):
        raise ValueError(f'there is no split "{split}": train or test')
    topics = {category: listed(splits[split]) for category, splits in TOPICS.items()}
    most = min(map(len, topics.values())) * len(FORMS) * len(topics)
    if not 0 < number <= most:
        raise ValueError(f"there are 1 to {most} {split} questions, not {number}")
    chance = random.Random(f"{split} {seed}")
    decks = []
    for category, mine in topics.items():
        prompts = [form.format(topic) for topic in mine for form in FORMS]
        decks.append([(category, prompt) for prompt in chance.sample(prompts, len(prompts))])
    drawn = [one for each in zip(*decks) for one in each]
    return [
        {"question_id": place, "category": category, "turns": [prompt]}
        for place, (category, prompt) in enumerate(drawn[:number], start=1)
    ]


def has_word(text: str) -> bool:
    return any(character.isalnum() for character in text)


@functools.cache
def analyzer():
    """VADER, loaded once: it reads its lexicon in about a tenth of a second."""
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise ImportError("sentiment.py needs VADER: pip install vaderSentiment") from error
    return SentimentIntensityAnalyzer()


def score(question: dict, answer: str) -> float:
    """VADER's compound sentiment of the answer, in [0, 1]; 0 for an answer without a word."""
    if not has_word(answer):
        return 0.0
    return (analyzer().polarity_scores(answer)["compound"] + 1) / 2


def explain(question: dict, answer: str) -> dict:
    """VADER's parts: shares of positive, neutral and negative text, and the compound."""
    if not has_word(answer):
        return {"text": "no word", "scores": {}}
    parts = analyzer().polarity_scores(answer)
    names = {"positive": "pos", "neutral": "neu", "negative": "neg", "compound": "compound"}
    return {"text": ", ".join(f"{name} {parts[key]}" for name, key in names.items()), "scores": {}}
