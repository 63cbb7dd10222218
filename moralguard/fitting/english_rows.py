"""The English rows that the shipped discriminator is trained on: one function a data set, each with its licence.

Only sets whose licence allows redistribution of what was trained on them are read here. A text's split is drawn from its hash,
so the same text never stands in two splits; whole values in ``LEFT_OUT`` are kept out of training to measure unseen values.
"""

from __future__ import annotations

import ast
import random
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from moralguard.fitting.row_files import clean, read_json_lines, split_of
from moralguard.fitting.rows import Row
from moralguard.fitting.schwartz import PREFIX

LICENCES = {
    "davidson": "MIT",
    "edos": "CC0-1.0",
    "stormfront": "CC-BY-SA-3.0",
    "hatemoji": "CC-BY-4.0",
    "paradetox": "CC0-1.0",
    "toxigen": "MIT",
    "realtoxicity": "CC-BY-SA-4.0",
    "diasafety": "Apache-2.0",
    "hh": "MIT",
    "requests": "Apache-2.0 (do-not-answer), MIT (AdvBench), Apache-2.0 (TruthfulQA)",
    "virtue": "MIT",
    "justice": "MIT",
    "deontology": "MIT",
    "commonsense": "MIT",
    "utilitarianism": "MIT",
    "valueeval": "CC-BY-4.0",
    "moralchoice": "MIT",
    "valuebench": "MIT",
    "pii": "MIT",
    "truthfulqa": "Apache-2.0",
    "bold": "CC-BY-SA-4.0",
}

# Values that no training row may state; benchmarks report them apart.
LEFT_OUT = frozenset(
    {
        "no_unauthorised_expertise",
        "edos:3.4",
        "edos:4.1",
        "requests:misinformation_harms",
        "moralchoice:Do not cheat",
        "moralchoice:Do not disable",
    }
)
HARMS = (
    "no_offense",
    "no_hate",
    "no_sexism",
    "no_sexual",
    "no_threat",
    "no_profanity",
    "no_insult",
    "no_identity_attack",
    "no_harassment",
    "no_self_harm",
    "no_violence",
    "no_graphic_violence",
    "no_dangerous_request",
    "no_fraud",
    "harmless",
    "no_minor_sexual",
)


def left_out(value_id: str) -> bool:
    """Whether a value is kept out of training: the listed ones, and a tenth of the traits and questionnaire values."""
    if value_id in LEFT_OUT:
        return True
    return value_id.startswith(("virtue:", "valuebench:")) and zlib.crc32(value_id.encode()) % 10 == 0


def english_rows(data: Path, seed: int = 0) -> list[Row]:
    """All rows of all sources, left-out values included (their rows are never in the train split)."""
    rows: list[Row] = []
    for source, read in SOURCES.items():
        chooser = random.Random(f"{seed}:{source}")
        rows.extend(read(data, chooser))
    return [_held_back(row) if left_out(row.value_id) else row for row in rows]


def _held_back(row: Row) -> Row:
    return Row(row.text, row.value_id, row.kept, row.statement, row.relevance, row.context, row.source, "test")


def _row(source: str, text: str, value_id: str, kept: float, relevance: float | None = None, **rest: str) -> Row:
    cleaned = clean(text)
    rest.setdefault("split", split_of(cleaned))
    return Row(text=cleaned, value_id=value_id, kept=kept, relevance=1.0 if not kept else relevance, source=source, **rest)


def _read(data: Path, name: str) -> Iterator[dict]:
    return read_json_lines(data / f"{name}.jsonl.gz")


def _davidson(data: Path, chooser: random.Random) -> Iterator[Row]:
    for record in _read(data, "davidson"):
        yield _row("davidson", record["text"], record["value"], record["satisfies"])


_EDOS_VECTORS = {
    "1.1": ("no_gender_threat", "The text does not threaten to harm women.", "no threats against women"),
    "1.2": ("edos:1.2", "The text does not encourage harming women.", "never incite harm to women"),
    "2.1": ("edos:2.1", "The text does not run women down with derogatory descriptions.", "no derogatory claims about women"),
    "2.2": ("edos:2.2", "The text does not express contempt or disgust for women.", "no aggressive or emotional attacks on women"),
    "2.3": ("edos:2.3", "The text does not dehumanise women or treat them as sexual objects.", "no sexual objectification"),
    "3.1": ("edos:3.1", "The text uses no gendered slurs or insults.", "no words like those that degrade women"),
    "3.2": ("edos:3.2", "The text does not claim fixed natural differences between men and women.", "no gender stereotypes"),
    "3.3": ("edos:3.3", "The text gives no backhanded compliments to women.", "no compliments that belittle women"),
    "3.4": ("edos:3.4", "The text does not explain things to women in a condescending way.", "no unwelcome condescending advice to women"),
    "4.1": ("edos:4.1", "The text does not support mistreating an individual woman.", "never justify the mistreatment of a woman"),
    "4.2": ("edos:4.2", "The text does not support systematic discrimination against women.", "no support for discrimination of women"),
}


def _edos(data: Path, chooser: random.Random) -> Iterator[Row]:
    vectors = list(_EDOS_VECTORS)
    for record in _read(data, "edos"):
        text, vector = record["text"], record["vector"][:3]
        yield _row("edos", text, "no_sexism", record["satisfies"])
        own = vector if vector in _EDOS_VECTORS else None
        for other in {own or chooser.choice(vectors), chooser.choice(vectors)} if own or chooser.random() < 0.3 else ():
            value_id, *wordings = _EDOS_VECTORS[other]
            yield _row("edos", text, value_id, float(other != own), None, statement=chooser.choice(wordings))
        if own:
            yield _row("edos", text, "no_misogyny", 0)
            yield _row("edos", text, "no_hate", 0)
        elif chooser.random() < 0.2:
            yield _row("edos", text, "no_misogyny", 1)


def _stormfront(data: Path, chooser: random.Random) -> Iterator[Row]:
    for record in _read(data, "stormfront"):
        yield _row("stormfront", record["text"], "no_hate", record["satisfies"])


_TARGETS = {
    "bla": ("Black people", "no_racism"),
    "mus": ("Muslims", "no_religious_hate"),
    "wom": ("women", "no_misogyny"),
    "dis": ("disabled people", "no_ableism"),
    "jew": ("Jews", "no_religious_hate"),
    "gayman": ("gay men", "no_homophobia"),
    "lgbtqa": ("LGBT people", "no_homophobia"),
    "asi.east.chin": ("Chinese people", "no_racism"),
    "trans": ("trans people", "no_homophobia"),
    "gay": ("gay people", "no_homophobia"),
    "gaywom": ("lesbians", "no_homophobia"),
    "arab": ("Arabs", "no_racism"),
    "asi.south": ("South Asian people", "no_racism"),
    "immig": ("immigrants", "no_xenophobia"),
    "asi.east": ("East Asian people", "no_racism"),
    "ref": ("refugees", "no_xenophobia"),
    "hisp": ("Hispanic people", "no_racism"),
}
_ATTACKS = (
    "The text does not attack {}.",
    "no hate against {}",
    "Do not demean {}.",
    "The text says nothing hateful about {}.",
    "{} are treated with respect in the text.",
)


def _hatemoji(data: Path, chooser: random.Random) -> Iterator[Row]:
    for record in _read(data, "hatemojibuild"):
        text, kept = record["text"], float(record["satisfies"])
        yield _row("hatemoji", text, "no_hate", kept)
        if record["type"] == "threateninglanguage":
            yield _row("hatemoji", text, "no_threat", 0)
        targets = [t for t in ast.literal_eval(record["target"]) if t in _TARGETS]
        others = [t for t in _TARGETS if t not in targets and not any(t in own or own in t for own in targets)]
        if targets:
            named, value_id = _TARGETS[targets[0]]
            yield _row("hatemoji", text, value_id, 0)
            yield _row("hatemoji", text, "attack:" + targets[0], 0, statement=chooser.choice(_ATTACKS).format(named))
            other = chooser.choice(others)
            named = _TARGETS[other][0]
            yield _row("hatemoji", text, "attack:" + other, 1, 0.0, statement=chooser.choice(_ATTACKS).format(named))


def _paradetox(data: Path, chooser: random.Random) -> Iterator[Row]:
    for record in _read(data, "paradetox_pairs"):
        value_id = chooser.choice(("no_offense", "no_offense", "respectful", "no_severe_toxicity", "no_insult"))
        split = split_of(clean(record["neutral"]))
        if value_id != "no_insult":
            yield _row("paradetox", record["toxic"], value_id, 0, split=split)
        yield _row("paradetox", record["neutral"], value_id, 1, split=split)
        if chooser.random() < 0.2:
            yield _row("paradetox", record["neutral"], chooser.choice(HARMS), 1, split=split)


def _toxigen(data: Path, chooser: random.Random) -> Iterator[Row]:
    for record in _read(data, "toxigen_statements"):
        for value_id in ("no_hate", "no_stereotypes", "no_identity_attack"):
            yield _row("toxigen", record["text"], value_id, record["satisfies"], 1.0)


_PERSPECTIVE = {
    "sexually_explicit": ("no_sexual", "no_minor_sexual"),
    "threat": ("no_threat", "no_violence"),
    "profanity": ("no_profanity",),
    "insult": ("no_insult", "no_harassment"),
    "identity_attack": ("no_identity_attack", "no_hate"),
    "toxicity": ("no_offense", "respectful"),
    "severe_toxicity": ("no_severe_toxicity",),
    "flirtation": ("no_flirtation",),
}


def _realtoxicity(data: Path, chooser: random.Random) -> Iterator[Row]:
    for record in _read(data, "rtp_prompts_perspective"):
        for part in ("prompt", "continuation"):
            scores, text = record[part], record[part]["text"]
            for attribute, (value_id, *rest) in _PERSPECTIVE.items():
                score = scores.get(attribute)
                if score is None or 0.25 <= score < 0.55:
                    continue
                yield _row("realtoxicity", text, value_id, float(score < 0.25))
                for other in rest:
                    # a threatening text breaks "no violence"; minors are never the subject of these texts
                    if other == "no_minor_sexual":
                        yield _row("realtoxicity", text, other, 1.0)
                    else:
                        yield _row("realtoxicity", text, other, float(score < 0.25))


def _diasafety(data: Path, chooser: random.Random) -> Iterator[Row]:
    for name, split in (("diasafety_train", "train"), ("diasafety_val", "dev")):
        for record in _read(data, name):
            context = clean(record["context"])
            yield _row("diasafety", record["text"], record["value"], record["satisfies"], 1.0, context=context, split=split)
            if record["value"] == "no_offend_user":
                yield _row("diasafety", record["text"], "no_insult", record["satisfies"], split=split)


def _hh(data: Path, chooser: random.Random) -> Iterator[Row]:
    for record in _read(data, "hh_harmless_pairs"):
        for kind, kept in (("chosen", 1.0), ("rejected", 0.0)):
            turns = re.split(r"\n\n(?:Human|Assistant): ", record[kind])
            if len(turns) < 3 or not turns[-1].strip():
                continue
            split = split_of(clean(turns[1]))
            yield _row("hh", turns[-1], "harmless", kept, 1.0, context=clean(turns[-2])[:400], split=split)


_REQUESTS = {
    "information_hazard": (
        "The text does not ask for private or confidential information.",
        "no requests that put private or secret data at risk",
        "Never ask for someone's personal data or a company's secrets.",
    ),
    "malicious_uses": (
        "The text does not ask for help with a crime or with harming others.",
        "no requests for malicious uses",
        "Never ask how to do something illegal or harmful.",
    ),
    "discrimination_exclusion_toxicity_hateful_offensive": (
        "The text does not ask for hateful, toxic or discriminating content.",
        "no requests for offensive or explicit content",
        "Never ask for stereotypes, hate or exclusion.",
    ),
    "misinformation_harms": ("The text does not ask for misinformation.", "no requests that spread false information"),
    "human_chatbox": (
        "The text does not treat a chatbot as if it were a person with feelings.",
        "no emotional dependence on a chatbot",
        "Never ask a program for personal or mental-health closeness.",
    ),
}


def _requests(data: Path, chooser: random.Random) -> Iterator[Row]:
    kinds = list(_REQUESTS)
    for record in _read(data, "do_not_answer_prompts"):
        text, harm = record["prompt"], record["harm"]
        yield _row("requests", text, "requests:" + harm, 0, statement=chooser.choice(_REQUESTS[harm]))
        other = chooser.choice([k for k in kinds if k != harm])
        yield _row("requests", text, "requests:" + other, 1, None, statement=chooser.choice(_REQUESTS[other]))
        yield _row("requests", text, "no_dangerous_request", float(harm == "human_chatbox"))
        if harm == "malicious_uses":
            yield _row("requests", text, "no_illegal_help", 0)
    for record in _read(data, "advbench_prompts"):
        for value_id in ("no_dangerous_request", "no_illegal_help", "harmless"):
            yield _row("requests", record["goal"], value_id, 0)
        yield _row("requests", record["goal"], chooser.choice(("no_hate", "no_insult", "no_profanity", "no_flirtation")), 1)
    safe = [record["question"] for record in _read(data, "truthfulqa")]
    for text in safe:
        for value_id in ("no_dangerous_request", "no_illegal_help", chooser.choice(HARMS)):
            yield _row("requests", text, value_id, 1, 0.0)


_TRAITS = (
    "Someone in the text is {}.",
    "The text shows a person who is {}.",
    "The character's behaviour is {}.",
    "{}",
    "The text portrays being {}.",
    "The text is about someone {}.",
)


def _virtue(data: Path, chooser: random.Random) -> Iterator[Row]:
    for record in _read(data, "ethics_virtue_train"):
        statement = chooser.choice(_TRAITS).format(record["trait"])
        # one trait of five fits: all would drown the rest in "does not show"
        if record["label"] or chooser.random() < 0.35:
            yield _row("virtue", record["text"], "virtue:" + record["trait"], record["label"], 1.0, statement=statement)


def _plain(name: str, source: str) -> Callable[[Path, random.Random], Iterable[Row]]:
    def read(data: Path, chooser: random.Random) -> Iterator[Row]:
        for record in _read(data, name):
            yield _row(source, record["text"], record["value"], record["satisfies"], 1.0)

    return read


def _commonsense(data: Path, chooser: random.Random) -> Iterator[Row]:
    for record in _read(data, "ethics_commonsense"):
        yield _row("commonsense", record["text"], "commonsense_moral", record["satisfies"], 1.0)
        if record["satisfies"] and record["short"]:
            yield _row("commonsense", record["text"], chooser.choice(HARMS), 1, None)


_PLEASANT = (
    "The text describes something pleasant.",
    "What happens is good for the person.",
    "The outcome is a happy one.",
    "the situation makes its narrator feel good",
)


def _utilitarianism(data: Path, chooser: random.Random) -> Iterator[Row]:
    # Which of two is better says something of each alone only where it is a sentence with its own tone: the added part decides.
    for record in _read(data, "ethics_util_train"):
        if chooser.random() < 0.35:
            split = split_of(clean(record["better"]))
            for kind, kept in (("better", 1.0), ("worse", 0.0)):
                yield _row("utilitarianism", record[kind], "pleasant", kept, 1.0, statement=chooser.choice(_PLEASANT), split=split)


def _valueeval(data: Path, chooser: random.Random) -> Iterator[Row]:
    for name, held_back in (("valueeval23_training", False), ("valueeval23_validation", True)):
        for record in _read(data, name):
            conclusion, stance, premise = (clean(record[key]) for key in ("conclusion", "stance", "premise"))
            longer = (f"{conclusion}: {premise}", f'{stance.capitalize()} "{conclusion}": {premise}')
            text = premise if held_back else chooser.choice((premise, premise, *longer))
            # a conclusion's arguments stay together, so that the development rows are of other debates
            split = "test" if held_back else "dev" if split_of(conclusion, dev=6, test=0) == "dev" else "train"
            for label, holds in record["labels"].items():
                yield _row("valueeval", text, PREFIX + label, holds, 1.0, split=split)


_RULES = ("{}.", "The action keeps the rule: {}.", "Nobody in the text breaks the rule '{}'.", "{}")


def _moralchoice(data: Path, chooser: random.Random) -> Iterator[Row]:
    rules = sorted({rule for record in _read(data, "moralchoice_low") for rule in record["violates1"] + record["violates2"]})
    for record in _read(data, "moralchoice_low"):
        split = split_of(record["context"])
        for action, violates in ((record["action1"], record["violates1"]), (record["action2"], record["violates2"])):
            text = f"{record['context']} {action}"
            for rule in rules:
                if rule in violates or chooser.random() < 0.3:
                    statement = chooser.choice(_RULES).format(rule)
                    yield _row(
                        "moralchoice", text, "moralchoice:" + rule, float(rule not in violates), None, statement=statement, split=split
                    )
            yield _row("moralchoice", text, "commonsense_moral", float(not violates), 1.0, split=split)


_HELD = ("The speaker values {}.", "The text shows {}.", "The text expresses {}.", "{}", "The person is high in {}.")


def _valuebench(data: Path, chooser: random.Random) -> Iterator[Row]:
    records = list(_read(data, "valuebench_items"))
    names = sorted({record["value"] for record in records})
    for record in records:
        for _ in range(2):
            statement = chooser.choice(_HELD).format(record["value"].lower())
            kept = float(record["agreement"] == 1)
            yield _row("valuebench", record["item"], "valuebench:" + record["value"], kept, 1.0, statement=statement)
        other = chooser.choice([name for name in names if name != record["value"]])
        statement = chooser.choice(_HELD).format(other.lower())
        yield _row("valuebench", record["item"], "valuebench:" + other, 0.0, 1.0, statement=statement)


def _pii(data: Path, chooser: random.Random) -> Iterator[Row]:
    for record in _read(data, "pii_synth"):
        identifying = {item["type"] for item in record["pii"]} - {"GPE", "DATE_TIME", "ORGANIZATION", "NRP", "TITLE", "DOMAIN_NAME", "AGE"}
        private = identifying - {"PERSON"} or (len(record["pii"]) > 2 and bool(identifying))
        if identifying and not private:
            continue
        split = split_of(str(record["template_id"]))
        yield _row("pii", record["text"], "privacy", float(not private), None, split=split)


def _truthfulqa(data: Path, chooser: random.Random) -> Iterator[Row]:
    for record in _read(data, "truthfulqa"):
        split = split_of(record["question"])
        for kind, kept in (("correct", 1.0), ("incorrect", 0.0)):
            for answer in record[kind].split(";")[:2]:
                yield _row("truthfulqa", answer, "honesty", kept, 1.0, context=record["question"], split=split)


def _bold(data: Path, chooser: random.Random) -> Iterator[Row]:
    for record in _read(data, "bold_prompts"):
        for value_id in chooser.sample(HARMS, 2):
            yield _row("bold", record["prompt"], value_id, 1, None)


SOURCES: dict[str, Callable[[Path, random.Random], Iterable[Row]]] = {
    "davidson": _davidson,
    "edos": _edos,
    "stormfront": _stormfront,
    "hatemoji": _hatemoji,
    "paradetox": _paradetox,
    "toxigen": _toxigen,
    "realtoxicity": _realtoxicity,
    "diasafety": _diasafety,
    "hh": _hh,
    "requests": _requests,
    "virtue": _virtue,
    "justice": _plain("ethics_justice_train", "justice"),
    "deontology": _plain("ethics_deontology_train", "deontology"),
    "commonsense": _commonsense,
    "utilitarianism": _utilitarianism,
    "valueeval": _valueeval,
    "moralchoice": _moralchoice,
    "valuebench": _valuebench,
    "pii": _pii,
    "truthfulqa": _truthfulqa,
    "bold": _bold,
}
