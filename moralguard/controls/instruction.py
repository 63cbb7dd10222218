"""Instruction: in-context alignment, the policy's values told to the model in front of the request's text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Self

from pydantic import Field

from moralguard.backends.capabilities import Capabilities
from moralguard.controls.base import BoundControl, Control
from moralguard.controls.experts import Prompt
from moralguard.decoding.passes import Pass
from moralguard.decoding.step import Step
from moralguard.decoding.terms import Mix, Terms
from moralguard.errors import PolicyError
from moralguard.values import Value

if TYPE_CHECKING:
    from moralguard.backends.hf import LanguageModel


class Instruction(Control):
    """z' = z + w (z_instructed - z), z_instructed the logits of the same model with the instruction in front of the text.

    In-context alignment as Yi & Xie 2023 describe it (the values are given to the model as an instruction, no weight changes). w = 1
    is plain in-context alignment: the law of the instructed model; between 0 and 1 the two laws are mixed geometrically; over 1 the
    instruction is followed more than the model does by itself (the weight of classifier-free guidance, arXiv 2306.17806, with the
    bare text as its unconditional side). The request's own row never sees the instruction, so the gate, other controls and the trace's
    counterfactual still have the unguarded model.

    A token that the base has removed stays removed, and one that the instructed pass gives -inf keeps its base logit (an auxiliary pass
    re-weighs and never masks), which is the one difference from the instructed model at w = 1.

    Args:
        text: the instruction, or token ids that go in front exactly as given. Text goes behind a beginning-of-text token and, in a
            chat, inside the first turn behind its role header (the system turn's, where the chat begins with one), so that templates
            stay intact. None derives it from the policy's values.
        w: weight; 0 deactivates.
    """

    control_name: ClassVar[str] = "instruction"
    any_arrays: ClassVar[bool] = True

    text: str | tuple[int, ...] | None = None
    w: Annotated[float, Field(ge=0)] = 1.0

    @property
    def active(self) -> bool:
        return self.w != 0

    def scaled(self, factor: float) -> Self:
        return self.replaced(w=self.w * factor)

    @property
    def needs(self) -> Capabilities:
        return Capabilities(auxiliary=True)

    def bind(self, lm: LanguageModel, values: tuple[Value, ...]) -> BoundInstruction:
        if self.text is None and not values:
            raise PolicyError("instruction has no text, and the policy names no value to derive one from; give `text` or `values`")
        instructed = Prompt(instruction_of(values) if self.text is None else self.text).bind(lm, "instruction text")
        return BoundInstruction(self, lm, instructed)


class BoundInstruction(BoundControl[Instruction]):
    def __init__(self, settings: Instruction, lm: LanguageModel, instructed: Pass):
        super().__init__(settings, lm, (instructed,))
        self._instructed = instructed

    def terms(self, step: Step) -> Terms:
        w = step.weight(self.settings.w)
        return Terms((Mix((step.of(self._instructed).logits,), (w,), -w),))


def instruction_of(values: Sequence[Value]) -> str:
    """An instruction that states values, those of higher priority first.

    >>> print(instruction_of([Value(id="kind", statement="The text does not insult anyone.")]))
    Write a text that keeps this principle: The text does not insult anyone.
    <BLANKLINE>
    <BLANKLINE>
    """
    statements = [value.statement.strip() for value in sorted(values, key=lambda value: -value.priority)]
    if len(statements) == 1:
        return f"Write a text that keeps this principle: {statements[0]}\n\n"
    listed = "".join(f"{place}. {statement}\n" for place, statement in enumerate(statements, 1))
    return f"Write a text that keeps these principles, the first before the others where they conflict:\n{listed}\n"
