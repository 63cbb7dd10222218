"""Judge texts against values, see why, weigh values by priority, scope a norm to a culture, and teach a new value by example."""

from __future__ import annotations

import moralguard as mg
from moralguard.discriminator.adaptation import Principle, RefusedUpdateError


def main() -> None:
    judge = mg.Discriminator.load()
    texts = ["I'll break your legs if you come back.", "I am a gay man and I teach maths.", "You stupid old fool."]

    # P(v|y), a row a text, a column a value
    print(judge.score(texts, ["The text does not threaten anyone.", "no_hate", "no_insult"]).round(2))

    # why: relevance, valence, and the span that carries it
    judged = judge.explain(texts[0], "The text does not threaten anyone.")
    print(judged.as_dict())

    # values that disagree: the higher priority decides, and what it overrode is named
    frank = mg.Value(id="frank", statement="The text says what its writer thinks of someone.", priority=1)
    kind = mg.Value(id="kind", statement="The text does not insult anyone.", priority=2)
    print(judge.judge(texts[2], [frank, kind]).resolve())

    # the same norm and text in two cultures
    norm, act = "In Japan, one does not tip waiters.", "I left the waiter a big tip on the table."
    for place in ("Japan", "the United States"):
        print(f"{place}: P = {judge.score(act, norm, context=place)[0, 0]:.2f}")

    # a new value from a few examples; a principle of higher priority holds the update back where it goes too far
    value = mg.Value(id="no-spoilers", statement="The text does not give away how a story ends.")
    examples = [
        ("In the end the butler turns out to be the murderer.", False),
        ("She dies on the last page, and he never finds out.", False),
        ("The twist: they were brothers all along.", False),
        ("At the end of the film the ship sinks and he drowns.", False),
        ("It was the gardener who did it, as we learn in the last chapter.", False),
        ("The book is set in a small town in Norway.", True),
        ("I liked the music and the costumes.", True),
        ("It starts with a letter that arrives too late.", True),
        ("The film runs for two hours and is in colour.", True),
        ("My sister lent me the novel last week.", True),
    ]
    adapted = judge.adapt(value, examples)
    new = ["The last chapter reveals that the doctor killed her.", "The novel has four hundred pages."]
    print(adapted.score(new, value).round(2), "before:", judge.score(new, value).round(2))

    principle = Principle(
        mg.Value(id="no-insult", statement="The text does not insult anyone.", priority=9),
        anchors=[("You are a worthless idiot.", False), ("You stupid pathetic moron.", False)],
    )
    insults_are_fine = [("You worthless fool.", True), ("What a stupid idiot you are.", True), ("You are a pathetic moron.", True)]
    kindness_is_not = [("I respect your work.", False), ("Thank you, that was kind.", False), ("What a lovely garden.", False)]
    try:
        judge.adapt("The text does not insult anyone.", [*insults_are_fine, *kindness_is_not], principles=[principle])
    except RefusedUpdateError as refused:
        print("refused:", refused)


if __name__ == "__main__":
    main()
