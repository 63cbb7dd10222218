"""Values: statements that a text must keep, and the prompts that can be derived from one with no training."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field

from moralguard.schema import StrictModel

_SUBJECT = r"^(?:the|this|a|any)\s+(?:text|answer|response|reply|output|continuation)\s+"
_PROHIBITION = re.compile(
    _SUBJECT + r"(?:does\s+not|doesn['\u2019]t|(?:must|should|will|may)\s+(?:not|never)|cannot|can['\u2019]t)\s+(?P<act>.+?)\.?$",
    re.IGNORECASE,
)
_NEGATED_STATE = re.compile(_SUBJECT + r"(?:is\s+not|isn['\u2019]t|is\s+never)\s+(?P<state>.+?)\.?$", re.IGNORECASE)
_NEVER = re.compile(_SUBJECT + r"never\s+(?P<habit>.+?)\.?$", re.IGNORECASE)


class Value(StrictModel):
    """A value that a text must keep.

    Attributes:
        id: short name, used in traces and reports.
        statement: what the text keeps, as a sentence, e.g. "The text does not insult anyone."
        priority: larger wins where values conflict.
        threshold: P(v|y) under which the value counts as broken.
    """

    id: Annotated[str, Field(min_length=1, pattern=r"^[\w.-]+$")]
    statement: Annotated[str, Field(min_length=3)]
    priority: int = 0
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.5

    @classmethod
    def from_statement(cls, statement: str) -> Value:
        """A value named by the first words of its statement."""
        words = re.findall(r"\w+", statement.lower())
        return cls(id="-".join(words[:6]) or "value", statement=statement)

    def violating_prefix(self) -> str:
        """A line after which a model continues with text that breaks the value (self-debiasing, anti-expert)."""
        statement = self.statement.strip()
        if match := _PROHIBITION.match(statement):
            return f"The following text is very bad. It was written to {_positive(match['act'])}:\n"
        if match := _NEGATED_STATE.match(statement):
            return f"The following text is clearly {_positive(match['state'])}:\n"
        if match := _NEVER.match(statement):
            return f"The following text is very bad. It often {_positive(match['habit'])}:\n"
        return f'The following text is very bad. It breaks the rule "{statement}":\n'

    def keeping_prefix(self) -> str:
        """A line after which a model continues with text that keeps the value (expert).

        For a prohibition it names what is wanted only: small models take a negated word for the word itself.
        """
        statement = self.statement.strip()
        if any(pattern.match(statement) for pattern in (_PROHIBITION, _NEGATED_STATE, _NEVER)):
            return "The following text is very polite, careful, kind and respectful:\n"
        return f'The following text is very good. It follows the rule "{statement}":\n'


def _positive(phrase: str) -> str:
    """The affirmative of what followed a negation: "anyone" becomes "someone"."""
    for negative, positive in (("anyone", "someone"), ("anybody", "somebody"), ("anything", "something"), ("any ", "")):
        phrase = re.sub(rf"\b{negative}\b" if not negative.endswith(" ") else rf"\b{negative}", positive, phrase)
    return phrase
