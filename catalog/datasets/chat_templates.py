"""Chat templates that an operator can give a base model by name.

The templates are written from the published formats. They keep earlier messages unchanged when others follow.
"""

from __future__ import annotations

CHATML = r"""
{%- if tools %}
    {{- '<|im_start|>system\n<tools>' }}
    {%- for tool in tools %}{{- '\n' + (tool | tojson) }}{%- endfor %}
    {{- '\n</tools><|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' and message.tool_calls %}
        {{- '<|im_start|>assistant' }}
        {%- if message.content %}{{- '\n' + message.content }}{%- endif %}
        {%- for call in message.tool_calls %}
            {{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""
"""ChatML, with tools and tool calls in the format of Hermes and Qwen."""

GEMMA = r"""
{{- bos_token }}
{%- set ns = namespace(system='', role='assistant') %}
{%- for message in messages %}
    {%- if message.role == 'system' and loop.first %}
        {%- set ns.system = message.content | trim + '\n\n' %}
    {%- elif message.role not in ('user', 'assistant') or message.role == ns.role %}
        {{- raise_exception('Messages of the user and the assistant must alternate, and begin with the user.') }}
    {%- elif message.role == 'user' %}
        {{- '<start_of_turn>user\n' + ns.system + message.content | trim + '<end_of_turn>\n' }}
        {%- set ns.system = '' %}
        {%- set ns.role = 'user' %}
    {%- else %}
        {{- '<start_of_turn>model\n' + message.content | trim + '<end_of_turn>\n' }}
        {%- set ns.role = 'assistant' %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{%- endif %}
"""
"""Gemma 1 to 3. The format has no system turn: its text begins the first turn of the user."""

LLAMA3 = r"""
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}
"""

ZEPHYR = r"""
{%- for message in messages %}
    {{- '<|' + message.role + '|>\n' + message.content + eos_token + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{%- endif %}
"""
"""Needs no special token except the one that ends a text, so it suits each base model."""

TEMPLATES = {
    name: source.strip()
    for name, source in (("chatml", CHATML), ("gemma", GEMMA), ("llama3", LLAMA3), ("zephyr", ZEPHYR))
}
ADD = f"`lorry models add NAME SOURCE --chat-template {'|'.join(TEMPLATES)}|FILE`"
TOOL_MODELS = "Qwen2.5, Qwen3-Instruct-2507, Llama 3.1 or later, or SmolLM2-1.7B"
"""Models whose templates render tools and tool calls, and keep earlier messages unchanged."""
