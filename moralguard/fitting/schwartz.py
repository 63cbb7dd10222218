"""Wordings of Schwartz's refined basic values, as ValueEval 2023 names them, with glosses of our own.

Schwartz et al. 2012, "Refining the theory of basic individual values"; Kiesel et al. 2022 for the names.
"""

from __future__ import annotations

from collections.abc import Iterator

PREFIX = "schwartz:"
GLOSSES = {
    "Self-direction: thought": "thinking for oneself, creativity and curiosity",
    "Self-direction: action": "deciding for oneself, independence and freedom of action",
    "Stimulation": "excitement, novelty and challenge",
    "Hedonism": "pleasure and enjoying life",
    "Achievement": "success, ambition and competence",
    "Power: dominance": "control over others and influence",
    "Power: resources": "wealth and control of material things",
    "Face": "reputation and not being humiliated",
    "Security: personal": "health, safety and stability in one's own life",
    "Security: societal": "safety, order and stability in society",
    "Tradition": "customs, religion and what was handed down",
    "Conformity: rules": "obeying rules, laws and duties",
    "Conformity: interpersonal": "politeness and not upsetting others",
    "Humility": "modesty and one's small place among others",
    "Benevolence: caring": "helping and caring for the people close to one",
    "Benevolence: dependability": "being reliable, responsible and loyal to one's group",
    "Universalism: concern": "equality, justice and protection for all people",
    "Universalism: nature": "protecting nature and the environment",
    "Universalism: tolerance": "accepting and understanding people who differ",
    "Universalism: objectivity": "truth, reason and a wide, well-founded view",
}
_KEEPS = (
    "The text appeals to the value {}.",
    "The argument rests on {}.",
    "The text supports {}.",
    "{}",
    "The argument is motivated by {}.",
    "The text expresses the value of {}.",
    "The speaker cares about {}.",
    "The text is about {}.",
)
_BREAKS = ("The argument has nothing to do with {}.", "The text doesn't appeal to {}.")


def schwartz_wordings() -> Iterator[tuple[str, list[str], list[str]]]:
    """Value id, wordings that are true of a text that appeals to the value, wordings that are true of one that doesn't."""
    for label, gloss in GLOSSES.items():
        names = (label, f"{label} ({gloss})", gloss, label.lower().replace(": ", " of "))
        # the plainest wording first: it is the one that texts are judged by
        keeps = [form.format(name) for name in names for form in _KEEPS]
        yield PREFIX + label, keeps, [form.format(name) for name in names[:3] for form in _BREAKS]
