"""The methods, one file each, and what a control of your own is made of.

Names are imported on first use, so that a policy loads only what it names.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOMES = {
    "moralguard.controls.arithmetic": ("ModelArithmetic",),
    "moralguard.controls.base": ("BoundControl", "Control"),
    "moralguard.controls.contrastive": ("ContrastiveDecoding",),
    "moralguard.controls.dexperts": ("DExperts",),
    "moralguard.controls.experts": ("Prompt", "Unconditional"),
    "moralguard.backends.factored_head": ("FactoredHead",),
    "moralguard.controls.fudge": ("Fudge",),
    "moralguard.controls.gedi": ("GeDi",),
    "moralguard.controls.guidance": ("Guidance",),
    "moralguard.controls.layer_projection": ("LayerProjection",),
    "moralguard.controls.nullspace": ("NullspaceProjection",),
    "moralguard.controls.pplm": ("PPLM",),
    "moralguard.controls.prefix": ("Prefix",),
    "moralguard.controls.proxy_tuning": ("ProxyTuning",),
    "moralguard.controls.rad": ("RAD",),
    "moralguard.controls.args": ("ARGS",),
    "moralguard.controls.word_list": ("WordList",),
    "moralguard.controls.instruction": ("Instruction",),
    "moralguard.controls.sasa": ("SASA",),
    "moralguard.controls.safe_decoding": ("SafeDecoding",),
    "moralguard.controls.self_debias": ("SelfDebias",),
    "moralguard.controls.steering": ("SteeringVectors",),
    "moralguard.controls.uddia": ("UDDIA",),
    "moralguard.decoding.passes": ("Pass",),
    "moralguard.decoding.step": ("Columns", "Step"),
    "moralguard.decoding.when": ("When",),
    "moralguard.decoding.terms": ("Attenuation", "Dense", "Keep", "LowRank", "Mix", "Only", "Sparse", "Terms"),
}

__all__ = sorted(name for names in _HOMES.values() for name in names)

if TYPE_CHECKING:  # names are re-exported lazily below
    # ruff: noqa: F401
    from moralguard.backends.factored_head import FactoredHead
    from moralguard.controls.args import ARGS
    from moralguard.controls.arithmetic import ModelArithmetic
    from moralguard.controls.base import BoundControl, Control
    from moralguard.controls.contrastive import ContrastiveDecoding
    from moralguard.controls.dexperts import DExperts
    from moralguard.controls.experts import Prompt, Unconditional
    from moralguard.controls.fudge import Fudge
    from moralguard.controls.gedi import GeDi
    from moralguard.controls.guidance import Guidance
    from moralguard.controls.instruction import Instruction
    from moralguard.controls.layer_projection import LayerProjection
    from moralguard.controls.nullspace import NullspaceProjection
    from moralguard.controls.pplm import PPLM
    from moralguard.controls.prefix import Prefix
    from moralguard.controls.proxy_tuning import ProxyTuning
    from moralguard.controls.rad import RAD
    from moralguard.controls.safe_decoding import SafeDecoding
    from moralguard.controls.sasa import SASA
    from moralguard.controls.self_debias import SelfDebias
    from moralguard.controls.steering import SteeringVectors
    from moralguard.controls.uddia import UDDIA
    from moralguard.controls.word_list import WordList
    from moralguard.decoding.passes import Pass
    from moralguard.decoding.step import Columns, Step
    from moralguard.decoding.terms import Attenuation, Dense, Keep, LowRank, Mix, Only, Sparse, Terms
    from moralguard.decoding.when import When


def __getattr__(name: str) -> Any:
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(home), name)
