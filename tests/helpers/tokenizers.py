"""Small tokenizers built on the spot: byte-level BPE over a few lines, with the tokens and templates of chat models."""

from __future__ import annotations

from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

LINES = [
    "The sky is blue because air scatters short waves more than long ones.",
    "def multiply(a: int, b: int) -> int:\n    return a * b\n\n",
    '{"name": "multiply", "arguments": {"a": 2, "b": null}}',
    "user assistant system tool <think>\n\n</think>\n\n<tool_call>\n</tool_call>",
    "user: a b assistant: b a user: sky! assistant: Hello\n\n\n user: \n assistant:  a.",
    "Grüße aus Köln, 東京 and 🙂!",
]

CHAT_TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|end|>",
)
PLAIN_TOKENS = ("<think>", "</think>", "<tool_call>", "</tool_call>")  # added, and not special

# ChatML with everything a template does with tools: the schemas in the system turn, calls, results in one user turn.
_CHATML = """\
{%- if tools %}
{{- '<|im_start|>system\\n' }}
{%- for tool in tools %}{{- tool | tojson + '\\n' }}{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- elif message.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}
@BEGIN@
{%- if message.content is none %}{{- 'NONE' }}{%- elif message.content is string %}{{- message.content }}{%- endif %}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>\\n' + call | tojson + '\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
@END@
{%- else %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
CHATML = _CHATML.replace("@BEGIN@\n", "").replace("@END@\n", "")
CHATML_MARKED = _CHATML.replace("@BEGIN@", "{%- generation %}").replace("@END@", "{%- endgeneration %}")


@cache
def _backend(bos: bool, trim: bool, nfc: bool, whole: bool) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not whole)
    tokenizer.decoder = decoders.ByteLevel()
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    special = ["<s>", "</s>", "<pad>", *CHAT_TOKENS]
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES * 4, trainer)
    tokenizer.add_tokens(list(PLAIN_TOKENS))
    steps: list[Any] = [processors.ByteLevel(trim_offsets=trim)]
    if bos:
        steps.append(processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)]))
    tokenizer.post_processor = processors.Sequence(steps)
    return str(tokenizer.to_str())


def byte_bpe(
    *,
    bos: bool = False,
    eos: str | None = "</s>",
    template: Any = None,
    trim: bool = False,
    nfc: bool = False,
    whole: bool = False,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of about 420 tokens.

    Args:
        bos: whether it puts ``<s>`` before every text.
        eos: its EOS token, or None.
        template: its chat template.
        trim: whether the offsets it reports leave blanks out, as Llama 3's do.
        nfc: whether it normalizes to NFC, as Qwen's does.
        whole: whether tokens may span words and end in blanks, as some of Llama 3's do.
    """
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend(bos, trim, nfc, whole)),
        bos_token="<s>",
        eos_token=eos,
        pad_token="<pad>",
    )
    tokenizer.chat_template = template
    return tokenizer
