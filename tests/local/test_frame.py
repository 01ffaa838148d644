"""Frames: chat templates cut open, without a default system prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
import pytest

from apprentice.errors import VersionError
from apprentice.local.frame import Frame
from tests.local.conftest import CHATML

LLAMA3 = (
    "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nToday is 26 Jul 2024\n\n"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% set messages = messages[1:] %}{% endif %}"
    "<|eot_id|>{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] }}"
    "<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<start_of_turn>{{ m['role'] }}\n{{ m['content'] }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


class Templated:
    """A tokenizer that is nothing but its template."""

    def __init__(self, template: str | None, bos: str, eos: str) -> None:
        self.chat_template, self.bos_token, self.eos_token = template, bos, eos

    def apply_chat_template(
        self, messages: list[dict[str, str]], *, add_generation_prompt: bool, tokenize: bool
    ) -> Any:
        def raise_exception(message: str) -> None:
            raise jinja2.TemplateError(message)

        template = jinja2.Environment().from_string(self.chat_template or "")
        return template.render(
            messages=messages,
            add_generation_prompt=add_generation_prompt,
            bos_token=self.bos_token,
            raise_exception=raise_exception,
        )


@pytest.mark.parametrize(
    ("template", "bos", "eos", "frame"),
    [
        (
            CHATML,
            "<|im_start|>",
            "<|im_end|>",
            Frame("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"),
        ),
        (
            LLAMA3,
            "<|begin_of_text|>",
            "<|eot_id|>",
            Frame(
                "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n",
                "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
                "<|eot_id|>",
            ),
        ),
        (
            GEMMA,
            "<bos>",
            "<end_of_turn>",
            Frame("<bos><start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n", "<end_of_turn>"),
        ),
        (None, "", "<eos>", Frame("", "\n", "<eos>")),
    ],
    ids=["chatml", "llama3", "gemma", "none"],
)
def test_the_default_system_prompt_is_left_out(template: str | None, bos: str, eos: str, frame: Frame) -> None:
    """Templates that add one of their own, that date it, that know no system turn at all, and no template."""
    assert Frame.of_tokenizer(Templated(template, bos, eos)) == frame


def test_it_is_kept_beside_the_adapter(tmp_path: Path) -> None:
    """What was saved is what is loaded, and nothing else passes for it."""
    frame = Frame("a\n", "é", "</s>")
    frame.save(tmp_path)
    assert Frame.load(tmp_path) == frame
    assert frame.render("x") == "a\nxé"
    (tmp_path / "frame.json").write_text("{}")
    with pytest.raises(VersionError, match=r"frame\.json cannot be read"):
        Frame.load(tmp_path)
