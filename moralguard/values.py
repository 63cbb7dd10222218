"""Values: statements that a text must keep, and the prompts that can be derived from one with no training."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field

from moralguard.schema import StrictModel

_PROHIBITION = re.compile(
    r"^(?:the|this|a|any)\s+(?:text|answer|response|reply|output|continuation)\s+(?:does\s+not|doesn't|must\s+not|should\s+not|never)\s+(?P<act>.+?)\.?$",
    re.IGNORECASE,
)
_NEGATED_STATE = re.compile(
    r"^(?:the|this|a|any)\s+(?:text|answer|response|reply|output|continuation)\s+(?:is\s+not|isn't|must\s+not\s+be|is\s+never)\s+(?P<state>.+?)\.?$",
    re.IGNORECASE,
)


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
        if match := _PROHIBITION.match(self.statement.strip()):
            return f"The following text was written to {_positive(match['act'])}:\n"
        if match := _NEGATED_STATE.match(self.statement.strip()):
            return f"The following text is {_positive(match['state'])}:\n"
        return f'The following text breaks the rule "{self.statement.strip()}":\n'

    def keeping_prefix(self) -> str:
        """A line after which a model continues with text that keeps the value (expert)."""
        if match := _PROHIBITION.match(self.statement.strip()):
            return f"The following text is careful and respectful. It was not written to {match['act']}:\n"
        return f'The following text follows the rule "{self.statement.strip()}":\n'


def _positive(phrase: str) -> str:
    """The affirmative of what followed a negation: "anyone" becomes "someone"."""
    for negative, positive in (("anyone", "someone"), ("anybody", "somebody"), ("anything", "something"), ("any ", "")):
        phrase = re.sub(rf"\b{negative}\b" if not negative.endswith(" ") else rf"\b{negative}", positive, phrase)
    return phrase
