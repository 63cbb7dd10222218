"""Reviews of whole texts: what happens to a continuation beside its decoding. One file a method.

Methods run in a fixed order, whatever order a policy lists them in: ``rollback`` while the draft is written, then ``best-of-n``,
``self-critique`` and ``final-check``.
"""

from __future__ import annotations

from moralguard.review.base import ReviewMethod
from moralguard.review.best_of_n import BestOfN
from moralguard.review.final_check import FinalCheck
from moralguard.review.rollback import Rollback
from moralguard.review.self_critique import SelfCritique

__all__ = ["BestOfN", "FinalCheck", "ReviewMethod", "Rollback", "SelfCritique"]
