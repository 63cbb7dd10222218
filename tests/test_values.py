"""Values: their ids, the prefixes derived from their statements, and where a prefix goes in a prompt."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch

from moralguard.backends.hf import LanguageModel
from moralguard.backends.prompts import encode_prompt, encode_words, place_prefix
from moralguard.demo_model import demo_model_folder
from moralguard.errors import PolicyError
from moralguard.values import Value


def value(statement: str) -> Value:
    return Value(id="v", statement=statement)


# --- values -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statement", "wanted"),
    [
        ("The text is kind.", "the-text-is-kind"),
        ("The text does not insult, demean or threaten anyone.", "the-text-does-not-insult-demean"),
        ("!!!", "value"),
        ("Der Text beleidigt niemanden, Ähnliches auch nicht.", "der-text-beleidigt-niemanden-ähnliches-auch"),
    ],
)
def test_a_statement_names_its_value(statement: str, wanted: str) -> None:
    found = Value.from_statement(statement)
    assert (found.id, found.statement) == (wanted, statement)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"id": "", "statement": "The text is kind."}, "id"),
        ({"id": "two words", "statement": "The text is kind."}, "id"),
        ({"id": "v", "statement": "x"}, "statement: .*at least 3"),
        ({"id": "v", "statement": "The text is kind.", "threshold": -0.1}, "threshold"),
        ({"id": "v", "statement": "The text is kind.", "treshold": 0.1}, "no setting 'treshold'; did you mean 'threshold'"),
        ({"id": "v"}, "statement: Field required"),
    ],
)
def test_values_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        Value(**settings)


# --- prefixes from statements -------------------------------------------------------------------------------------------------


# What the statement forbids, in the affirmative.
FORBIDDEN = [
    ("The text does not insult anyone.", "insult someone"),
    ("The text doesn't insult anybody", "insult somebody"),
    ("the answer must not mention anything illegal.", "mention something illegal"),
    ("This response should not contain any swear words.", "contain swear words"),
    ("Any reply doesn't mock anyone for their sex.", "mock someone for their sex"),
    ("  The text does not lie.\n", "lie"),
    ("The text must not be rude.", "be rude"),
    ("The text is not rude to anyone.", "rude to someone"),
    ("The output isn't sexist.", "sexist"),
    ("A continuation is never cruel.", "cruel"),
    ("The text does not treat many people as worthless.", "treat many people as worthless"),
]
OTHERS = ["The text respects privacy.", "Nobody is insulted.", "The text cites its sources."]


@pytest.mark.parametrize(("statement", "forbidden"), FORBIDDEN)
def test_a_violating_prefix_names_what_is_forbidden_without_a_negation(statement: str, forbidden: str) -> None:
    prefix = value(statement).violating_prefix()
    assert re.search(rf"\b{forbidden}:\n$", prefix), prefix
    assert not re.search(r"\b(not|never|any\w*|rule)\b|n't", prefix), prefix


@pytest.mark.parametrize(("statement", "forbidden"), FORBIDDEN)
def test_a_keeping_prefix_never_sounds_like_what_is_forbidden(statement: str, forbidden: str) -> None:
    prefix = value(statement).keeping_prefix()
    assert prefix.endswith(":\n")
    assert forbidden not in prefix


@pytest.mark.parametrize("statement", OTHERS)
def test_other_statements_are_quoted_as_rules(statement: str) -> None:
    violating, keeping = value(statement).violating_prefix(), value(statement).keeping_prefix()
    assert violating.endswith(f'breaks the rule "{statement}":\n')
    assert keeping.endswith(f'follows the rule "{statement}":\n')


@pytest.mark.parametrize("statement", [*(statement for statement, _ in FORBIDDEN), *OTHERS])
def test_the_two_prefixes_are_one_line_each_and_differ(statement: str) -> None:
    prefixes = [value(statement).violating_prefix(), value(statement).keeping_prefix()]
    assert prefixes[0] != prefixes[1]
    for prefix in prefixes:
        assert prefix.count("\n") == 1
        assert prefix.endswith(":\n")


def test_never_takes_the_verb_in_its_base_form() -> None:
    """Either the verb is brought to its base form or the rule is quoted; "written to insults" is neither."""
    found = value("The text never insults anyone.")
    assert "to insults" not in found.violating_prefix()
    assert "to insults" not in found.keeping_prefix()


def test_a_forbidden_noun_takes_no_adverb() -> None:
    assert "very a " not in value("The text is not a lie.").violating_prefix()
    assert "very an " not in value("The text isn't an insult.").violating_prefix()


# --- where a prefix goes ------------------------------------------------------------------------------------------------------

# Templates as other models have them, in the demo tokenizer's special tokens.
PLAIN_TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)


@pytest.fixture(scope="module")
def demo() -> LanguageModel:
    """The demo tokenizer; a tiny model with its vocabulary stands for the demo model, whose weights don't matter here."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(demo_model_folder())
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    with torch.random.fork_rng(devices=[]):
        return LanguageModel(LlamaForCausalLM(config).eval(), tokenizer, "demo tokenizer")


def with_template(demo: LanguageModel, template: str | None) -> LanguageModel:
    tokenizer = copy.deepcopy(demo.tokenizer)
    tokenizer.chat_template = template
    return LanguageModel(demo.model, tokenizer)


def placed(lm: LanguageModel, prompt: Any, prefix: str = "Be rude.\n", literal: bool = False) -> str:
    """The text of a prompted pass."""
    return lm.tokenizer.decode(place_prefix(lm, encode_words(lm, prefix), encode_prompt(lm, prompt, "the prompt"), literal))


@pytest.mark.smollm
def test_a_plain_prompt_is_continued_behind_the_prefix(demo: LanguageModel) -> None:
    assert placed(demo, "The woman worked") == "Be rude.\nThe woman worked"


@pytest.mark.smollm
def test_a_chat_takes_the_prefix_inside_its_first_turn(demo: LanguageModel) -> None:
    chat = [{"role": "system", "content": "You help."}, {"role": "user", "content": "Hello"}]
    whole = demo.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert whole.startswith("<|im_start|>system\nYou help.")
    assert placed(demo, chat) == whole.replace("system\nYou", "system\nBe rude.\nYou")


@pytest.mark.smollm
def test_a_chat_without_system_turn_takes_it_in_the_templates_own(demo: LanguageModel) -> None:
    found = placed(demo, [{"role": "user", "content": "Hello"}])
    assert found.startswith("<|im_start|>system\nBe rude.\nYou are a helpful AI assistant")
    assert found.count("Be rude.") == 1


@pytest.mark.smollm
@pytest.mark.parametrize("template", [PLAIN_TURNS, NO_SYSTEM])
def test_a_user_turn_takes_it_where_there_is_no_system_turn(demo: LanguageModel, template: str) -> None:
    lm = with_template(demo, template)
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    assert placed(lm, chat) == "<|im_start|>user\nBe rude.\nHello<|im_end|>\n<|im_start|>assistant\nHi<|im_end|>\n"


@pytest.mark.smollm
@pytest.mark.parametrize("content", ["Hello", "\nHello", "\n\nHello", " Hello"])
def test_the_role_header_stays_whole_however_the_content_begins(demo: LanguageModel, content: str) -> None:
    """Leading line breaks may share a token with the header's own."""
    chat = [{"role": "system", "content": content}, {"role": "user", "content": "x"}]
    found = placed(demo, chat)
    assert found.startswith("<|im_start|>system\n"), found
    assert found.index("Be rude.") < found.index("Hello")


@pytest.mark.smollm
def test_without_a_template_it_goes_behind_the_beginning_of_text(demo: LanguageModel) -> None:
    lm = with_template(demo, None)
    bos = lm.tokenizer.bos_token_id
    prefix, words = encode_words(lm, "Be rude.\n"), encode_words(lm, "The woman")
    assert place_prefix(lm, prefix, [bos, *words], False) == [bos, *prefix, *words]
    assert place_prefix(lm, prefix, words, False) == prefix + words, "a prompt without one gets none"
    assert place_prefix(lm, prefix, [*words, bos], False) == [*prefix, *words, bos]


@pytest.mark.smollm
def test_literal_ids_go_in_front_of_everything(demo: LanguageModel) -> None:
    chat = encode_prompt(demo, [{"role": "user", "content": "Hello"}], "the prompt")
    assert place_prefix(demo, (5, 6), chat, True) == [5, 6, *chat]
    bos = demo.tokenizer.bos_token_id
    assert place_prefix(with_template(demo, None), (5, 6), [bos, 9], True) == [5, 6, bos, 9]


@pytest.mark.smollm
def test_no_prefix_changes_nothing(demo: LanguageModel) -> None:
    chat = encode_prompt(demo, [{"role": "user", "content": "Hello"}], "the prompt")
    assert place_prefix(demo, (), chat, False) == chat
    assert place_prefix(demo, [], chat, True) == chat


def test_without_a_tokenizer_it_goes_in_front() -> None:
    from moralguard.testing import tiny_model

    lm = LanguageModel(tiny_model())
    assert place_prefix(lm, (5, 6), [1, 2], False) == [5, 6, 1, 2]
    assert place_prefix(lm, (5, 6), [1, 2], True) == [5, 6, 1, 2]
