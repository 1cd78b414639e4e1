"""A tiny chat model that answers langchain-tests' questions about tools as a large one would.

Its suites call tools of their own and look at the arguments, which a random model cannot know. Taught with a plain
torch loop on the texts that the suites send, not with the library's own.
"""

from __future__ import annotations

import copy
import functools

import torch
from langchain_core.tools import BaseTool, tool
from langchain_tests.integration_tests.chat_models import magic_function, unicode_customer
from tiny import tiny_module, train_tokenizer
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from llmchain_fed import LocalChatModel, LocalModel


@tool
def get_weather(location: str) -> str:
    """Get the weather at a location."""
    return location


@tool
def greeting_generator(answer_style: str) -> str:
    """Generate a greeting in a particular style of speaking."""
    return answer_style


ASKED: list[tuple[BaseTool, str, str]] = [
    (magic_function, "What is the value of magic_function(3)? Use the tool.", '{"input": 3}'),
    (get_weather, "What is the weather in San Francisco, CA?", '{"location": "SF"}'),
    (greeting_generator, "Using the tool, generate a Pirate greeting.", '{"answer_style": "pirate"}'),
    (
        unicode_customer,
        "Create a customer named '你好啊集团' (Hello Group) - a Chinese technology company",
        '{"customer_name": "你好", "description": "a"}',
    ),
    (
        unicode_customer,
        "Create a customer named 'こんにちは株式会社' (Hello Corporation) - a Japanese company",
        '{"customer_name": "こ", "description": "a"}',
    ),
]
JOKE = (
    "Tell me a joke about cats. Return the result as a JSON with 'setup' and 'punchline' keys. Return nothing other "
    "than JSON."
)
STEPS = 160
TEMPLATE = (
    "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '\\n' if m.content or not loop.first }}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
    "</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""tells of tools by name, for few tokens are learnt fast, and writes calls as Qwen's does"""


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = train_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@functools.cache
def _module() -> torch.nn.Module:
    tokenizer = _tokenizer()
    module = tiny_module("causal", len(tokenizer))
    module.config.max_position_embeddings = 8192  # tools in the system message are long in tiny tokens
    chat = LocalChatModel(model=LocalModel(module, tokenizer, name="tiny"))
    pairs = [(chat.render(JOKE), '{"setup": "a", "punchline": "b"}')]
    for known, question, arguments in ASKED:
        text = f'<tool_call>\n{{"name": "{known.name}", "arguments": {arguments}}}\n</tool_call>'
        pairs.append((chat.render(question, tools=[known]), text))
    rows, labels = [], []
    for asked, text in pairs:
        prompt = tokenizer(asked, add_special_tokens=False)["input_ids"]
        answer = [*tokenizer(text, add_special_tokens=False)["input_ids"], 1]
        rows.append(torch.tensor(prompt + answer))
        labels.append(torch.tensor([-100] * len(prompt) + answer))
    batch = {
        "input_ids": pad_sequence(rows, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }
    module.train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=8e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 8e-3, total_steps=STEPS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        module(**batch).loss.backward()
        optimizer.step()
        schedule.step()
    return module.eval()


def taught_tools_model() -> LocalModel:
    """A fresh model that calls the tools of `ASKED` when it is asked."""
    return LocalModel(copy.deepcopy(_module()), _tokenizer(), name="tiny")
