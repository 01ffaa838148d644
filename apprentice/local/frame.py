"""The chat template, cut open around the request.

A fine-tuned model must be served in the very frame it was trained in; a template applied here and another applied
by a server is the classic way for a model to look right in training and wrong in production. So the frame is
computed once, saved beside the adapter, and every engine sends the finished text: nobody else applies a template.

A template's default system prompt is left out. It says nothing about the task and costs tokens in every request.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from apprentice.errors import VersionError

__all__ = ["Frame"]

_FILE = "frame.json"
# Words that no template treats specially and that cannot occur in one.
_USER, _SYSTEM = "apprenticeuserturn", "apprenticesystemturn"


@dataclass(frozen=True, slots=True)
class Frame:
    """What stands before and after the request, and the text that ends a turn."""

    prefix: str
    suffix: str
    stop: str

    @classmethod
    def of_tokenizer(cls, tokenizer: Any) -> Frame:
        """Cut the frame out of a tokenizer's chat template; a base model without one gets a line break."""
        stop = str(tokenizer.eos_token or "")
        if not tokenizer.chat_template:
            return cls("", "\n", stop)

        def render(*turns: tuple[str, str], answer: bool) -> str:
            messages = [{"role": role, "content": content} for role, content in turns]
            return str(tokenizer.apply_chat_template(messages, add_generation_prompt=answer, tokenize=False))

        head, _, suffix = render(("user", _USER), answer=True).partition(_USER)
        end = render(("user", _USER), answer=False).partition(_USER)[2]
        try:
            with_system = render(("system", _SYSTEM), ("user", _USER), answer=True)
        except Exception:  # noqa: BLE001  # jinja: the template knows no system turn, so it has no default one
            return cls(head, suffix, stop)
        before, _, rest = with_system.partition(_SYSTEM)
        between = rest.partition(_USER)[0]
        has_default = before and head.startswith(before) and head.endswith(between)
        if has_default and end and between.startswith(end):
            start = str(tokenizer.bos_token or "")
            # ChatML names its turn marker as the start token: it must not be doubled.
            turn = between.removeprefix(end)
            head = start + turn if before.startswith(start) and not turn.startswith(start) else turn
        return cls(head, suffix, stop)

    def render(self, prompt: str) -> str:
        """The text an engine sends."""
        return f"{self.prefix}{prompt}{self.suffix}"

    def encode(self, tokenizer: Any, prompt: str) -> list[int]:
        """The tokens of `render`, part by part. A request that spells a special token means its letters."""
        ids: list[int] = []
        for part, plain in ((self.prefix, False), (prompt, True), (self.suffix, False)):
            ids += tokenizer(part, add_special_tokens=False, split_special_tokens=plain).input_ids if part else []
        return ids

    def save(self, folder: Path) -> None:
        """Write frame.json into an adapter folder."""
        (folder / _FILE).write_text(json.dumps(asdict(self), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Frame:
        """Read frame.json. Raises `VersionError` where it is missing or is no frame."""
        path = folder / _FILE
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            return cls(str(stored["prefix"]), str(stored["suffix"]), str(stored["stop"]))
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise VersionError(
                f"{path} cannot be read ({error}); nobody knows what the adapter was trained in: train it again"
            ) from None
