"""A language model small enough for tests: a Hugging Face folder, with the same weights as GGUF beside it.

Its LoRAs are trained in a second or two on a handful of rows, with PEFT, along the product's own training rows.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from apprentice.local.adapter import content_name
from apprentice.local.base_model import BaseModel, load_model_and_tokenizer, resolve_base_model
from apprentice.local.engine import Version
from apprentice.local.frame import Frame
from apprentice.local.rows import training_row
from apprentice.local.skeleton import Skeleton
from apprentice.prompts import compact_prompt
from apprentice.schemas.schema import Schema, parse_schema

os.environ.setdefault("OMP_NUM_THREADS", "1")

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe helpful.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = [
    '{"emotion":"joy"} {"emotion":"fear"} {"category":"billing","priority":3} {"entities":["Paris","Rome"]}',
    "user assistant system I was happy sad afraid the dog bit me my card was charged twice please help me now",
]
SIZES = {"hidden": 64, "layers": 2, "heads": 4, "kv_heads": 2, "inner": 128}

type Row = tuple[Mapping[str, Any], Mapping[str, Any]]
type Train = Callable[[str, Schema, Sequence[Row]], Version]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's folder: config, safetensors, tokenizer and GGUF."""
    folder = tmp_path_factory.mktemp("tiny")
    build_tiny(folder, seed=0)
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> BaseModel:
    """The tiny model, resolved."""
    return resolve_base_model(str(tiny_folder), Path())


def build_tiny(folder: Path, seed: int, hidden: int = SIZES["hidden"]) -> None:
    """Write a random Llama with a tokenizer of its own, and the same as GGUF."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    fast.chat_template = CHATML
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=hidden,
        intermediate_size=SIZES["inner"],
        num_hidden_layers=SIZES["layers"],
        num_attention_heads=SIZES["heads"],
        num_key_value_heads=SIZES["kv_heads"],
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=fast.bos_token_id,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    _write_gguf(folder / "tiny.gguf", model, json.loads(tokenizer.to_str()), hidden)


def _write_gguf(target: Path, model: Any, tokenizer: Mapping[str, Any], hidden: int) -> None:
    import gguf

    from apprentice.local.gguf_file import _interleave

    writer = gguf.GGUFWriter(str(target), "llama")
    writer.add_block_count(SIZES["layers"])
    writer.add_context_length(512)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(SIZES["inner"])
    writer.add_head_count(SIZES["heads"])
    writer.add_head_count_kv(SIZES["kv_heads"])
    writer.add_rope_dimension_count(hidden // SIZES["heads"])
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    vocabulary = sorted(tokenizer["model"]["vocab"].items(), key=lambda item: item[1])
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if index < 3 else 1 for _, index in vocabulary])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, SIZES["layers"])
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        rows = weight.numpy()
        if "q_proj" in name:
            rows = _interleave(rows, SIZES["heads"])
        if "k_proj" in name:
            rows = _interleave(rows, SIZES["kv_heads"])
        writer.add_tensor(str(names.get_name(name, try_suffixes=(".weight",))), rows.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="session")
def train(tiny: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Train a LoRA of the tiny model on rows until it knows them; the same rows give the same version."""
    known: dict[str, Version] = {}

    def make(task: str, schema: Schema, rows: Sequence[Row]) -> Version:
        key = json.dumps([task, [list(row) for row in rows]], default=dict)
        if key not in known:
            known[key] = _train(tiny, tmp_path_factory.mktemp(task), task, schema, rows)
        return known[key]

    return make


def _train(base: BaseModel, folder: Path, task: str, schema: Schema, rows: Sequence[Row]) -> Version:
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model, tokenizer = load_model_and_tokenizer(base)
    frame = Frame.of_tokenizer(tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lora = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    encoded = [
        training_row(tokenizer, frame, Skeleton.of(schema), compact_prompt(value), output) for value, output in rows
    ]
    longest = max(len(row.ids) for row in encoded)
    ids = torch.tensor([row.ids + [tokenizer.pad_token_id] * (longest - len(row.ids)) for row in encoded])
    labels = torch.tensor(
        [
            [t if d else -100 for t, d in zip(row.ids, row.decided, strict=True)] + [-100] * (longest - len(row.ids))
            for row in encoded
        ]
    )
    optimiser = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(150):
        loss = lora(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        if loss.item() < 0.02:
            break
    assert loss.item() < 0.1, f"the tiny model did not learn {task}: {loss.item()}"
    lora.save_pretrained(folder, save_embedding_layers=False)
    frame.save(folder)
    return Version(content_name(folder), task, folder, schema)


EMOTION = parse_schema({"emotion": "joy | fear | anger"})
EMOTIONS: Sequence[Row] = [
    ({"text": "I was happy"}, {"emotion": "joy"}),
    ({"text": "the dog bit me"}, {"emotion": "fear"}),
    ({"text": "my card was charged twice"}, {"emotion": "anger"}),
    ({"text": "help me now please"}, {"emotion": "fear"}),
]
TICKET = parse_schema({"category": "str", "priority": "int", "urgent": "bool", "note": "str?", "tags": "list[str]"})
TICKETS: Sequence[Row] = [
    (
        {"text": "my card was charged twice"},
        {"category": "billing", "priority": 12, "urgent": True, "note": 'a "b" é', "tags": ["card", "x"]},
    ),
    ({"text": "I was happy"}, {"category": "praise", "priority": 3, "urgent": False, "tags": []}),
]
