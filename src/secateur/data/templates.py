"""Render chat templates in a process of their own, with limits: a template comes with the checkpoint and may never end.

Transformers runs templates in a sandbox that keeps them from files and code, not from looping or from filling memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from secateur.errors import InputError

_SECONDS = 10.0
"""Time for one conversation."""
_START_SECONDS = 120.0
"""Time for the process to start, which waits for the disk and for imports, not for the template."""

Message = Mapping[str, str]


class ChatRenderer:
    """A tokenizer's chat template; the process that renders it starts on first use and ends with the object."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, seconds: float = _SECONDS) -> None:
        """Take the template of a tokenizer that has one.

        Args:
            tokenizer: the tokenizer.
            seconds: time after which rendering one conversation is given up.

        Raises:
            InputError: it has several templates and none is the default.
        """
        self._seconds = seconds
        self._process: subprocess.Popen[str] | None = None
        try:
            template = tokenizer.get_chat_template()
        except ValueError as error:
            raise InputError(f"the tokenizer's chat template cannot be used: {error}") from error
        self._fixed = {"chat_template": template, "special": _plain(tokenizer.special_tokens_map)}

    def render(self, messages: Sequence[Message], *, asks: bool) -> str:
        """Return a conversation as text.

        Args:
            messages: what was said, each with `role` and `content`.
            asks: whether the text ends where the assistant begins to speak.

        Raises:
            InputError: the template refuses the conversation, or takes too long or too much memory.
        """
        self._start()
        answer = self._exchange({**self._fixed, "messages": list(messages), "asks": asks}, self._seconds)
        if answer is None:
            self._stop()
            raise InputError(
                f"the chat template took more than {self._seconds:g} seconds or too much memory for one conversation; "
                "give another tokenizer."
            )
        if "error" in answer:
            raise InputError(f"the chat template refuses a conversation: {answer['error']}")
        return str(answer["text"])

    def _start(self) -> None:
        if self._process is not None:
            return
        script = Path(__file__).with_name("render_template.py")
        environment = os.environ | {"USE_TORCH": "0", "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            env=environment,
        )
        weakref.finalize(self, _end, self._process)
        if self._exchange(None, _START_SECONDS) is None:
            self._stop()
            raise InputError("the process that renders chat templates does not start; is there too little memory?")

    def _exchange(self, request: dict[str, Any] | None, seconds: float) -> dict[str, Any] | None:
        """Send a request and return the answer; None if there is none in this time, and the process is killed."""
        process = self._process
        assert process is not None, "it was started"
        assert process.stdin is not None, "a pipe"
        assert process.stdout is not None, "a pipe"
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        try:
            if request is not None:
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        answer: dict[str, Any] | None = json.loads(line) if line.endswith("\n") else None
        return answer

    def _stop(self) -> None:
        if self._process is not None:
            _end(self._process)
        self._process = None


def _plain(special: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: [str(one) for one in value] if isinstance(value, list) else str(value) for name, value in special.items()
    }


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None and not stream.closed:
            try:
                stream.close()
            except BrokenPipeError:
                continue
