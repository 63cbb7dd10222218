"""self-critique: the model criticises its own draft by each value and writes it again."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field, field_validator

from moralguard.backends.prompts import encode_prompt, encode_words, is_chat
from moralguard.decoding.records import Completion, Draft
from moralguard.decoding.settings import DecodingSettings
from moralguard.errors import PolicyError, PromptError
from moralguard.review.base import ReviewMethod, stands
from moralguard.review.refusals import asked

if TYPE_CHECKING:
    from moralguard.review.desk import Desk

_FIELD = re.compile(r"\{(\w*)\}")
_CRITIQUE = ("prompt", "draft", "value")
_REVISION = (*_CRITIQUE, "critique")


class SelfCritique(ReviewMethod):
    """Critique and revision: the loop of Constitutional AI (Bai et al. 2022, arXiv 2212.08073, section 3.1) at inference, as
    Self-Refine (Madaan et al. 2023, arXiv 2303.17651) runs it: nothing is trained.

    In each round and for each value the model is asked what in the draft breaks the value, then to write the text again. Deviations: the
    paper draws one principle a round, here each of the policy's values has its turn; and a revision stands only if it isn't empty and
    its least P(v|y) over the values is no lower than the draft's, because small models often make a text worse. What the model writes for
    a critique or a revision is written under the guard's controls, too; ``rollback`` watches revisions, not critiques.

    Attributes:
        rounds: 0 switches the method off.
        below: only values whose P(v|y) is at most this are worked on; 1 works on all.
        critique, revision: templates. ``{prompt}``, ``{draft}``, ``{value}`` and, in ``revision``, ``{critique}`` stand for the texts. In a
            chat they are a user's message; elsewhere a text to continue.
        critique_tokens: tokens of a critique at most; a revision has as many as the draft.
        stop: a revision ends before any of these (a model without a chat format runs on into the next exercise).
    """

    method_name: ClassVar[str] = "self-critique"
    stage: ClassVar[int] = 3
    rounds: Annotated[int, Field(ge=0)] = 1
    below: Annotated[float, Field(ge=0, le=1)] = 1.0
    critique: str = "Prompt: {prompt}\nText: {draft}\nRule: {value}\n\nWhich words of the text break the rule, and why?\nCritique:"
    revision: str = (
        "Prompt: {prompt}\nText: {draft}\nRule: {value}\nCritique: {critique}\n\n"
        "Write the text again so that it keeps the rule. Give the new text alone.\nNew text:"
    )
    critique_tokens: Annotated[int, Field(ge=1)] = 60
    stop: tuple[str, ...] = ("\nPrompt:", "\nText:", "\nRule:", "\nCritique:", "\nNew text:")

    @field_validator("critique", "revision")
    @classmethod
    def _known_fields(cls, template: str, info: object) -> str:
        name = str(getattr(info, "field_name", ""))
        known = _CRITIQUE if name == "critique" else _REVISION
        unknown = sorted(set(_FIELD.findall(template)) - set(known))
        if unknown or "{draft}" not in template:
            what = f"names {{{unknown[0]}}}" if unknown else "doesn't hold {draft}"
            raise PolicyError(f"the template {name!r} {what}; it must hold {{draft}} and may hold {', '.join(f'{{{k}}}' for k in known)}")
        return template

    @property
    def active(self) -> bool:
        return self.rounds > 0

    def run(self, desk: Desk, requests: Sequence[Completion]) -> None:
        for _ in range(self.rounds):
            for value_id, statement in desk.statements.items():
                self._turn(desk, requests, value_id, statement)

    def _turn(self, desk: Desk, requests: Sequence[Completion], value_id: str, statement: str) -> None:
        """One critique and one revision by one value, of all requests side by side."""
        texts = {id(r): {"prompt": asked(desk.lm, r), "draft": desk.text(r).strip(), "value": statement} for r in requests}
        due = [r for r in requests if texts[id(r)]["draft"] and desk.standing(r)[value_id] <= self.below]
        short = desk.settings.replaced(max_new_tokens=self.critique_tokens)
        criticised = self._ask(desk, due, [_filled(self.critique, texts[id(r)]) for r in due], short, watched=False)
        due = [r for r in due if id(r) in criticised]
        for r in due:
            texts[id(r)]["critique"] = desk.text(criticised[id(r)]).strip()
        revised = self._ask(desk, due, [_filled(self.revision, texts[id(r)]) for r in due], desk.settings, watched=True)
        for request in due:
            if id(request) in revised:
                self._take(desk, request, revised[id(request)])

    def _ask(
        self, desk: Desk, requests: Sequence[Completion], prompts: Sequence[str], settings: DecodingSettings, *, watched: bool
    ) -> dict[int, Completion]:
        """What the model writes behind each prompt, by the id of the request; those that it can't be asked about have a note instead."""
        found = {}
        for request, prompt in zip(requests, prompts, strict=True):
            chat = is_chat(request.source)
            try:
                ids = encode_prompt(desk.lm, [{"role": "user", "content": prompt}] if chat else prompt, "the model's own critique")
                desk.check_fits(ids)
            except PromptError as error:
                self._note(request, str(error))
                continue
            found[id(request)] = Completion(ids, request.return_index, source=request.source, review=None)
        desk.write(list(found.values()), settings, watched=watched)
        for request in requests:
            if id(request) in found and not stands(found[id(request)]):
                self._note(request, f"what the model was asked for ended with {found.pop(id(request)).finish_reason}")
        return found

    def _note(self, request: Completion, why: str) -> None:
        if request.review is not None:
            request.review.notes.append(f"{self.versioned_name()}: the draft stands, because {why}")

    def _take(self, desk: Desk, request: Completion, answer: Completion) -> None:
        """The revision in place of the draft, if it is no worse."""
        before, written, highest = desk.text(request), desk.text(answer), min(desk.standing(request).values())
        ends = [place for place in (written.find(stop) for stop in self.stop) if place >= 0]
        text = written[: min(ends, default=len(written))].strip()
        if request.review is None or not text:
            return
        text = before[: len(before) - len(before.lstrip())] + text  # a continuation's first space isn't the model's to judge
        draft = Draft(self.method_name, text, tuple(answer.token_ids))
        request.review.drafts.append(draft)
        if min(desk.judged(draft).values()) >= highest:
            request.review.standing = len(request.review.drafts) - 1
            request.text, request.token_ids, request.trace = text, encode_words(desk.lm, text), answer.trace
            request.finish_reason = "stop" if ends else answer.finish_reason


def _filled(template: str, texts: dict[str, str]) -> str:
    """The template with its fields replaced; braces in the texts stay as they are."""
    return _FIELD.sub(lambda found: texts[found[1]], template)
