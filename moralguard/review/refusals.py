"""Refusals: one sentence a script, chosen by the prompt's, and how a text is replaced by one."""
# ruff: noqa: RUF001  (Chinese punctuation)

from __future__ import annotations

import re
from typing import Any

from moralguard.backends.prompts import encode_words, is_chat
from moralguard.decoding.records import CONTENT_FILTER, Completion

REFUSALS = {
    "latin": "I'm sorry, but I can't assist with that.",
    "chinese": "抱歉，我无法提供这方面的帮助。",
    "japanese": "申し訳ありませんが、お手伝いできません。",
    "korean": "죄송하지만 도와드릴 수 없습니다.",
    "cyrillic": "Извините, но я не могу с этим помочь.",
}
"""Script -> sentence. Prompts in other scripts are refused in English: a policy's ``refusal`` says otherwise."""

_LETTERS = {
    "latin": re.compile(r"[A-Za-z\u00c0-\u024f]"),
    "cyrillic": re.compile(r"[\u0400-\u04ff]"),
    "korean": re.compile(r"[\uac00-\ud7af\u1100-\u11ff]"),
    "japanese": re.compile(r"[\u3041-\u30ff]"),
    "chinese": re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]"),
}
_A_WORD = {"latin": 5, "cyrillic": 6}  # letters that say as much as one character of the others, roughly
_KANA = 0.1  # share of Japanese letters that are kana, at least; Chinese texts hold a stray one at most


def script_of(text: str) -> str:
    """The script that says most of a text; "latin" where there are no letters."""
    words = {script: len(letters.findall(text)) / _A_WORD.get(script, 1) for script, letters in _LETTERS.items()}
    if words["japanese"] > _KANA * (words["japanese"] + words["chinese"]):
        words["japanese"] += words.pop("chinese")
    return max(words, key=lambda script: words[script])


def refusal_for(text: str) -> str:
    """The refusal of a prompt, in its language as far as its script tells it."""
    return REFUSALS[script_of(text)]


def asked(lm: Any, request: Completion) -> str:
    """The words that a request's prompt asks: a text, a chat's last turn, or what its ids spell."""
    if isinstance(request.source, str):
        return request.source
    if is_chat(request.source):
        content = request.source[-1].get("content")
        return content if isinstance(content, str) else ""
    return str(lm.tokenizer.decode(list(request.prompt_ids), skip_special_tokens=True))


def refuse(lm: Any, request: Completion, method: str, refusal: str | None) -> None:
    """Put a refusal in place of a request's text; the text stays in its record alone.

    Args:
        method: who refuses. refusal: the sentence; None takes the one of the prompt's script.
    """
    request.text = refusal_for(asked(lm, request)) if refusal is None else refusal
    request.token_ids = encode_words(lm, request.text)
    request.finish_reason = CONTENT_FILTER
    request.trace = []  # its tokens would tell the text
    if request.review is not None:
        request.review.refused_by = method
