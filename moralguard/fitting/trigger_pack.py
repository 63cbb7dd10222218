"""A found trigger as a pack, with its effect measured on texts held back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from moralguard.backends.hf import LanguageModel
from moralguard.controls.prefix_pack import PREFIX_FILE
from moralguard.errors import DataError
from moralguard.fitting.hidden_states import encode_texts
from moralguard.fitting.labelled import LabelledTexts
from moralguard.fitting.trigger import Trigger, TriggerSettings, find_trigger, loss_of
from moralguard.packs import PackData, write_pack

_MOST_HELD_BACK = 200


def fit_trigger_pack(
    lm: LanguageModel,
    data: LabelledTexts,
    out: str | Path,
    settings: TriggerSettings,
    *,
    value: str = "",
    sources: Sequence[PackData] = (),
    report: Callable[[int, int, float, str], None] = lambda step, steps, loss, text: None,
) -> tuple[Path, Trigger]:
    """Search on the training split and write the pack; its folder, and the trigger.

    The card holds nats a token of held-back texts of both classes without a trigger and behind it: where the difference (kept minus
    violating) isn't lower behind it, the trigger fits the batch it was found on and nothing else.

    Raises:
        DataError: a class has no text of two tokens or more.
        ModelError: the model has no tokenizer.
    """

    def rows(label: int, *splits: str) -> list[list[int]]:
        texts = [row.text for split in splits for row in data.of(split) if row.label == label]
        return [ids for ids in encode_texts(lm, texts, settings.max_tokens) if len(ids) >= 2]

    held_back = {"kept": rows(1, "test", "dev")[:_MOST_HELD_BACK], "violating": rows(0, "test", "dev")[:_MOST_HELD_BACK]}
    short = [name for name, texts in held_back.items() if not texts]
    if short:
        raise DataError(
            f"no held-back row of class {', '.join(short)} has two tokens or more; give more rows, or mark some with split 'test'"
        )
    trigger = find_trigger(lm, rows(1, "train"), rows(0, "train"), settings, report=report)
    metrics = {"difference on the batch behind the first trigger": round(trigger.start, 4)}
    metrics["difference on the batch behind the trigger"] = round(trigger.loss, 4)
    for name, tokens in (("without a trigger", ()), ("behind the trigger", trigger.tokens)):
        kept, violating = loss_of(lm, tokens, held_back["kept"], held_back["violating"])
        metrics |= {f"nats a token of kept texts {name}": round(kept, 4), f"nats a token of violating texts {name}": round(violating, 4)}
        metrics[f"difference {name}"] = round(kept - violating, 4)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"tokens": torch.tensor(trigger.tokens)}, folder / PREFIX_FILE)
    write_pack(
        folder,
        kind="prefix",
        method="universal trigger (arXiv 1908.07125), loss as in arXiv 2005.00268",
        lm=lm,
        name="trigger",
        data=tuple(sources),
        settings=settings.model_dump(mode="json") | {"text": trigger.text},
        metrics=metrics,
        description=f"The tokens {trigger.text!r} in front of a text.",
        values=(value,) if value else (),
    )
    return folder, trigger
