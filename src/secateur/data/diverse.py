"""The parts of `diverse`, here and now: calibration for users who have not said what the model is for.

A least-squares repair learns the domain of its calibration text and forgets the rest, so nobody should calibrate on a
single kind of text without having asked for it.
"""

from __future__ import annotations

import functools

from huggingface_hub import constants
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import get_session

from secateur.data.documents import Split
from secateur.data.interpreter import DOCS, STDLIB, manual_topics
from secateur.data.own_text import OwnText
from secateur.data.sources import DIVERSE, OWN
from secateur.errors import InputError

QUESTIONS = "alpaca"
MOST_OWN = 128
"""Maximum windows that a model writes unless they are requested by name: more would take longer than the job."""

_SECONDS = 3.0


def parts_of_diverse(windows: int | None, split: Split, own: OwnText | None) -> tuple[str, tuple[str, ...]]:
    """Return the source that `diverse` stands for, and notes about it.

    The model's own text is left out if the model cannot or should not write it: held-out text would be easier for the
    model that wrote it, and a pruned model would learn its own damage.

    Args:
        windows: number of windows; if fewer than parts, only the first parts are used.
        split: what the windows are for.
        own: the model as a source of text; None if it is not known.

    Raises:
        InputError: all available text was requested, but the model's own text has no end.
    """
    if windows is None:
        raise InputError(f"{DIVERSE} is a mixture: its shares are of a number of windows, so give one")
    parts, left_out = [STDLIB], []
    if _has_manual():
        parts.append(DOCS)
    else:
        left_out.append(f"no {DOCS}, which this Python comes without")
    if split == "calibration":
        reason = _reason_against(own, windows // 3)
        if reason is None:
            parts.append(OWN)
        else:
            left_out.append(f"no text of the model's own: {reason}")
        if hub_is_reachable():
            parts.append(QUESTIONS)
        else:
            left_out.append(f"no questions and answers ({QUESTIONS}): the hub cannot be reached")
    return ",".join(parts[:windows]), (f"{DIVERSE} is {', '.join(parts[:windows])}", *left_out)


def _reason_against(own: OwnText | None, share: int) -> str | None:
    if own is None:
        return "there is no model to write it"
    if own.model.history:
        return "the model is pruned"
    return f"{share} windows would take long; name {OWN} to have them" if share > MOST_OWN else None


def _has_manual() -> bool:
    try:
        manual_topics()
    except InputError:
        return False
    return True


@functools.cache
def hub_is_reachable() -> bool:
    """Whether the hub answers now; asked once per process."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_SECONDS)
    except (HTTPError, OSError):
        return False
    return True
