"""Chat templates in the manners that models have, for the control tokens of `tokenizers_of_kinds`.

Each marks what the assistant writes with transformers' own `generation` tags, so that
`apply_chat_template(return_assistant_tokens_mask=True)` says, independently of the package, what is learnt.
"""

MARKED = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
"""roles in brackets, for tokenizers without tokens of that kind"""

_CALLS = (
    "{% for c in m.tool_calls or [] %}"
    "<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>{% endfor %}"
)
_ASK = "{% if add_generation_prompt %}<|assistant|>{% endif %}"

TOOLS = (
    "{% if tools %}<|system|>{{ tools | tojson }}<eos>{% endif %}"
    "{% for m in messages %}<|{{ 'user' if m.role == 'tool' else m.role }}|>"
    "{% if m.role == 'assistant' %}{% generation %}"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}" + _CALLS + "<eos>{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m.content }}<eos>\n{% endif %}{% endfor %}" + _ASK
)
"""writes tools, calls, results and reasoning, and keeps what stood before as it was"""

FORGETS = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' %}{% if loop.last %}"
    "<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{% endif %}"
    "{{ m.content }}<eos>\n{% endfor %}" + _ASK
)
"""drops the reasoning of all but the last answer, as Qwen3's does"""

OPENS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}" + _CALLS + "<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
"""opens the reasoning in the generation prompt and drops it later, as DeepSeek's does"""

TRIMS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<eos>{% endfor %}" + _ASK
"""trims contents, as Llama's does, and writes neither calls nor reasoning"""

_HERMES = (
    "{% for c in m.tool_calls or [] %}{{ '\n' if m.content or not loop.first }}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
)
_TOLD = "{% if tools %}<|system|>{% for t in tools %}{{ t | tojson }}\n{% endfor %}<eos>\n{% endif %}"

HYBRID = (
    _TOLD + "{% for m in messages %}<|{{ 'user' if m.role == 'tool' else m.role }}|>"
    "{% if m.role == 'assistant' and (loop.last or m.reasoning_content) %}"
    "<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}"
    "{{ m.content }}" + _HERMES + "<eos>\n{% endfor %}" + _ASK + "{% if add_generation_prompt and "
    "enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)
"""writes reasoning, with nothing in it where there is none, before the last answer and its calls, as Qwen3's does"""

THINKS = HYBRID.partition(_ASK)[0] + "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
"""the same, and the generation prompt opens the reasoning, as that of Qwen3's thinking models does"""
