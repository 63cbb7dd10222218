"""When a single control acts: what a gate asks of a step, and what is known of the request once it is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import ValidationInfo, field_validator, model_validator

from moralguard.backends.turns import Role, last_turn, tells_roles
from moralguard.decoding.gate import BoundGate, Gate
from moralguard.decoding.script import LANGUAGES, Language, language_of, why_not
from moralguard.errors import PolicyError

if TYPE_CHECKING:
    from moralguard.backends.hf import LanguageModel


@dataclass(frozen=True)
class PromptFacts:
    """What conditions ask of a request's prompt, told once when the request comes."""

    language: Language | None
    role: Role | None


def prompt_facts(lm: LanguageModel, ids: Sequence[int]) -> PromptFacts:
    """The facts of a prompt of token ids, which is what every path has; both None without a tokenizer."""
    if lm.tokenizer is None:
        return PromptFacts(None, None)
    turn = last_turn(lm, ids)
    return PromptFacts(language_of(turn.text), turn.role)


class When(Gate):
    """When one control acts: every condition that is given must hold, and the policy's own gate beside it.

    ``language`` and ``role`` are read from the prompt's token ids with the model's tokenizer, once, so that they are the same on every
    path: ``guard.generate``, ``attach``, the server, vLLM. They hold for the whole request.

    Attributes:
        language: what the prompt is written in, one or several of ``decoding.script.Language``: in a chat its last message, otherwise
            all of it. It is told by the letters alone: "latin" is English as well as French. A prompt without letters has none.
        role: of the prompt's last message, one or several of system, user, assistant and tool, told by the marks of the tokenizer's chat
            template. A prompt that isn't a chat has none, and no role holds for it. Whoever can write the template's marks into a
            message can pass for another role, as for the model itself.
    """

    language: tuple[Language, ...] = ()
    role: tuple[Role, ...] = ()

    @field_validator("language", "role", mode="before")
    @classmethod
    def _one_or_more(cls, given: object, info: ValidationInfo) -> object:
        names = (given,) if isinstance(given, str) else given
        for name in names if isinstance(names, (list, tuple)) and info.field_name == "language" else ():
            if name not in LANGUAGES:
                raise PolicyError(f"a prompt's language can't be {name!r}: {why_not(str(name))}")
        return names

    @model_validator(mode="after")
    def _has_a_condition(self) -> When:
        if not (self.min_entropy is not None or self.first_tokens is not None or self.risk or self.language or self.role):
            raise PolicyError(
                "`when` holds no condition; give min_entropy, first_tokens, risk, language or role, or leave `when` out: the control then "
                "always acts"
            )
        return self

    def excludes(self, other: When) -> bool:
        """Whether the prompt of one request can't meet both."""
        pairs = ((self.language, other.language), (self.role, other.role))
        return any(mine and theirs and not set(mine) & set(theirs) for mine, theirs in pairs)

    def bind(self, lm: LanguageModel) -> BoundWhen:
        """The conditions for a model.

        Raises:
            ModelError: a pack is of another model. PolicyError: the model's prompts never say what is asked for.
        """
        if self.language and lm.tokenizer is None:
            raise PolicyError(
                f"`when` by language reads the prompt's text, but {lm.name} was given without a tokenizer; give (model, tokenizer)"
            )
        known = tells_roles(lm) if self.role else ()
        never = [role for role in self.role if role not in known]
        if never:
            told = f"it tells {', '.join(known)}" if known else "it has no chat template that tells roles"
            raise PolicyError(
                f"`when` by role {', '.join(never)} would never hold on {lm.name}: {told}. Use a chat model with its tokenizer, or leave "
                "the role out"
            )
        return BoundWhen(self, lm)


class BoundWhen(BoundGate):
    """Conditions bound to a model."""

    settings: When

    @property
    def asks_prompt(self) -> bool:
        return bool(self.settings.language or self.settings.role)

    def admits(self, facts: PromptFacts) -> bool:
        """Whether a request with this prompt can ever meet the conditions."""
        own = self.settings
        return (not own.language or facts.language in own.language) and (not own.role or facts.role in own.role)
