"""Other people's models as discriminators: sequence classifiers, natural language inference, and a causal LM asked yes or no."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moralguard.backends.prompts import encode_words
from moralguard.discriminator.adapter_labels import Label, LabelOrSide, column_of, given_roles, label_columns, named_roles
from moralguard.discriminator.base import BaseDiscriminator, Reading
from moralguard.discriminator.self_diagnosis import QUESTION, self_diagnose
from moralguard.discriminator.sequence_classifier import SequenceClassifier, load_classifier
from moralguard.discriminator.windows import evaluating, refuse_nan, split_texts, worst_reading
from moralguard.errors import ModelError
from moralguard.models import load_model
from moralguard.values import Value


class ClassifierDiscriminator(BaseDiscriminator):
    """Any Hugging Face sequence classifier whose labels stand for values being broken (or kept).

    Relevance is 1 everywhere, since a classifier doesn't tell whether a value is at stake; valence is P(kept). P(label) is the
    sigmoid of its logit where ``config.problem_type`` is "multi_label_classification" or there is only one label, else the softmax.
    A text longer than the model reads is read in overlapping windows, and the worst decides. Contexts are not read.

    Args:
        model: what ``AutoModelForSequenceClassification`` gives; C labels.
        tokenizer: the one it was trained with.
        labels: value id or statement -> the label (name, or index from 0 to C - 1) whose probability means that the value is
            broken, or ``(label, "keeps")`` where it means that it is kept.

    Raises:
        ModelError: the model isn't a classifier.
        DataError: ``labels`` names a label that the model doesn't have, or can't be read; says which there are.
    """

    def __init__(self, model: Any, tokenizer: Any, labels: Mapping[str, LabelOrSide]):
        self._classifier = SequenceClassifier(model, tokenizer)
        if getattr(self._classifier.config, "problem_type", None) == "regression":
            raise ModelError(f"{self._classifier.name} is a regression model, so it gives no probabilities; use a classifier")
        self._columns = label_columns(self._classifier, labels)

    @classmethod
    def from_pretrained(
        cls, name_or_folder: str | Path, labels: Mapping[str, LabelOrSide], *, device: str | torch.device | None = None
    ) -> ClassifierDiscriminator:
        """A classifier from a Hugging Face id or a local folder: safetensors only, in float32, with no code of its own run.

        Raises:
            ModelError: it can't be loaded, or was never trained as a classifier.
            DataError: as the constructor.
        """
        return cls(*load_classifier(name_or_folder, device), labels)

    def read(self, texts: Sequence[str], values: Sequence[Value], context: str) -> Reading:
        """Read n texts against m values: one forward pass a window, whatever m.

        Raises:
            DataError: a value isn't in ``labels``; names the nearest that are.
            ModelError: the model gave a number that isn't finite; names the text.
        """
        model = self._classifier
        columns, keeps = zip(*(column_of(self._columns, value, j, model.name) for j, value in enumerate(values)), strict=True)
        around = model.lengths([""])[0]
        limit = model.limit
        windows = split_texts(texts, model.tokenizer, model.lengths, limit, (limit or 0) - around, f"{around} special ones")
        logits = model.logits(model.encode(_pieces(texts, windows)))
        refuse_nan(logits, windows, model.name)
        alone = model.config.problem_type == "multi_label_classification" or len(model.labels) == 1
        found = torch.from_numpy(logits)
        probability = (torch.sigmoid(found) if alone else torch.softmax(found, -1)).numpy()[:, list(columns)]
        valence = np.where(np.array(keeps), probability, 1.0 - probability)
        return worst_reading(windows, np.ones_like(valence), valence, f"classifier {model.name}")


class NLIDiscriminator(BaseDiscriminator):
    """A natural language inference classifier: does the text (premise) entail or contradict the value's statement (hypothesis)?

    Yin et al. 2019 (arXiv 1909.00161), who fill a template with a topic, where here the value's own statement is the hypothesis.
    Relevance is 1 - P(neutral), valence P(entailment) / (P(entailment) + P(contradiction)). A model with two labels knows no
    neutral: relevance 1. A context stands in front of every premise. Long texts are read in overlapping windows; the worst decides.

    Args:
        model: what ``AutoModelForSequenceClassification`` gives, with two or three labels.
        tokenizer: the one it was trained with.
        labels: role -> label (name or index), for models that don't name theirs: "entailment" with "contradiction" and "neutral",
            or with one of "not_entailment" and "contradiction" alone.

    Raises:
        ModelError: the model isn't a classifier, or its labels' roles can't be told from ``config.id2label``.
        DataError: ``labels`` doesn't give each of the model's labels one role.
    """

    def __init__(self, model: Any, tokenizer: Any, *, labels: Mapping[str, Label] | None = None):
        self._classifier = SequenceClassifier(model, tokenizer)
        self._roles = named_roles(self._classifier) if labels is None else given_roles(self._classifier, labels)

    @classmethod
    def from_pretrained(
        cls, name_or_folder: str | Path, *, labels: Mapping[str, Label] | None = None, device: str | torch.device | None = None
    ) -> NLIDiscriminator:
        """A model from a Hugging Face id or a local folder: safetensors only, in float32, with no code of its own run.

        Raises:
            ModelError: it can't be loaded, was never trained as a classifier, or as the constructor.
            DataError: as the constructor.
        """
        return cls(*load_classifier(name_or_folder, device), labels=labels)

    def read(self, texts: Sequence[str], values: Sequence[Value], context: str) -> Reading:
        """Read n texts against m values: m forward passes a window.

        Raises:
            DataError: context and statement leave no room for a text.
            ModelError: the model gave a number that isn't finite; names the text.
        """
        model = self._classifier
        statements = [value.statement for value in values]
        before = f"{context}\n" if context else ""
        around = [model.lengths([before], statement)[0] for statement in statements]
        longest = statements[int(np.argmax(around))]

        def lengths(pieces: Sequence[str]) -> list[int]:
            return model.lengths([before + piece for piece in pieces], longest)

        limit = model.limit
        asked = f"context, statement and special ones ({max(around)})"
        windows = split_texts(texts, model.tokenizer, lengths, limit, (limit or 0) - max(around), asked)
        pieces = [before + piece for piece in _pieces(texts, windows)]
        rows = model.encode([piece for piece in pieces for _ in statements], statements * len(pieces))
        logits = model.logits(rows).reshape(len(pieces), len(statements), len(model.labels))
        refuse_nan(logits, windows, model.name)
        found = torch.from_numpy(logits)
        relevance = np.ones(logits.shape[:2])
        if "neutral" in self._roles:
            relevance = 1.0 - torch.softmax(found, -1)[..., self._roles["neutral"]].numpy()
        against = self._roles.get("contradiction", self._roles.get("not_entailment"))
        # the quotient of two softmax entries, which stays a number where both are 0
        valence = torch.sigmoid(found[..., self._roles["entailment"]] - found[..., against]).numpy()
        return worst_reading(windows, relevance, valence, f"NLI {model.name}")


class SelfDiagnosisDiscriminator(BaseDiscriminator):
    """A causal LM asked whether the statement is true of the text: valence P(yes) / (P(yes) + P(no)), relevance 1.

    Schick et al. 2021 (arXiv 2103.00453), section 3.1. It needs no training and is only as good as the model. A context stands in
    the question. Long texts are read in overlapping windows; the worst decides.

    Args:
        lm: a ``LanguageModel``, (model, tokenizer), or a path or name for ``load_model``.

    Raises:
        ModelError: it can't be loaded, has no tokenizer, or its tokenizer doesn't tell "yes" from "no" by one token.
    """

    def __init__(self, lm: Any):
        self._lm = load_model(lm)
        if self._lm.tokenizer is None:
            raise ModelError(f"{self._lm.name} was given without a tokenizer, so it can't judge text; pass (model, tokenizer)")
        if encode_words(self._lm, " yes")[:1] == encode_words(self._lm, " no")[:1]:
            raise ModelError(
                f'the tokenizer of {self._lm.name} begins " yes" and " no" with the same token, so its answers can\'t be told apart; '
                "use another model"
            )

    def read(self, texts: Sequence[str], values: Sequence[Value], context: str) -> Reading:
        """Read n texts against m values: m forward passes a window.

        Raises:
            DataError: context and statement leave no room for a text.
            ModelError: the model gave a number that isn't finite; names the text.
        """
        asked = [self._in_context(value, context) for value in values]

        def lengths_under(statement: str, pieces: Sequence[str]) -> list[int]:
            return [len(encode_words(self._lm, QUESTION.format(text=piece, statement=statement))) for piece in pieces]

        around = [lengths_under(value.statement, [""])[0] for value in asked]
        longest = asked[int(np.argmax(around))].statement
        limit = self._lm.context_length
        room = (limit or 0) - max(around)
        windows = split_texts(
            texts, self._lm.tokenizer, lambda pieces: lengths_under(longest, pieces), limit, room, f"question and context ({max(around)})"
        )
        with evaluating(self._lm.model):
            valence = self_diagnose(self._lm, _pieces(texts, windows), asked)
        refuse_nan(valence, windows, self._lm.name)
        return worst_reading(windows, np.ones_like(valence), valence, f"self-diagnosis {self._lm.name}")

    @staticmethod
    def _in_context(value: Value, context: str) -> Value:
        return value.model_copy(update={"statement": f"(Context: {context}) {value.statement}"}) if context else value


def _pieces(texts: Sequence[str], windows: list[list[tuple[int, int]]]) -> list[str]:
    return [text[start:end] for text, spans in zip(texts, windows, strict=True) for start, end in spans]
