import os
import time

import pytest
from transformers import PreTrainedTokenizerFast

from runtime.engine.template import ChatTemplate, TemplateInvalid, TemplateLimits, TemplateRefused
from runtime.engine.tokenizer import Tokenizer
from tests.engine.models import CHATML, byte_level, files_of

LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = "
    "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ "
    "message['content'] | trim + "
    "'<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant"
    "<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != "
    "(loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}{% endif %}"
    "{% endfor %}"
)
QWEN3_LIKE = """
{%- if tools %}
    {{- 'tools' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1, self=3) %}
{%- for m in messages[::-1] %}
    {%- if m.role == "user" %}
        {%- set ns.last = messages|length - 1 - loop.index0 %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- if loop.first and not m.content %}{%- continue %}{%- endif %}
    {{- '<|im_start|>' + m.role + '\\n' + (m | tojson) }}
    {{- m.content.split('</think>')[-1].lstrip('\\n') }}
    {%- if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% endif %}
{%- endfor %}
{{- ns.last }}{{ dict(a=1)['a'] }}{{ {'z': '<é>', 'b': [1, none]} | tojson(indent=2) }}
{%- if enable_thinking is defined and enable_thinking is false %}
    {{- '<think>\\n\\n</think>' }}
{%- endif %}
{{ strftime_now('%Y') }}
"""
CHATS = [
    [{"role": "user", "content": "Hi <b>'you'</b> & co"}],
    [
        {"role": "user", "content": "你好 🙂"},
        {"role": "assistant", "content": "<think>x</think>\nyes"},
        {"role": "user", "content": "  spaced \n"},
    ],
]


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("arguments", [{}, {"enable_thinking": False}])
@pytest.mark.parametrize("source", [CHATML, LLAMA3, MISTRAL, QWEN3_LIKE])
def test_renders_what_transformers_renders(source, chat, arguments, tmp_path):
    tokenizer: PreTrainedTokenizerFast = byte_level()
    tokenizer.chat_template = source
    ours = Tokenizer(files_of(tokenizer, tmp_path))
    try:
        expected = tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True, **arguments
        )
        text = ours.render(chat, arguments)
        assert text == expected
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, **arguments)
        assert ours.encode(text, 10_000, special_tokens=False) == ids["input_ids"]
    finally:
        ours.close()


SMALL = TemplateLimits(deadline_s=0.5, max_characters=10_000, memory_bytes=512 * 1024 * 1024)
RANGE = "{% for i in range(99999) %}"


@pytest.mark.parametrize(
    "source",
    [
        RANGE * 4 + "{% endfor %}" * 4,
        # One call in C that no check between bytecodes would interrupt.
        "{{ ('a' * 3000000).replace('a', 'b' * 3000000)|length }}",
        "{{ ((10 + messages|length - 1) ** 30000000) % 7 }}",
        "{{ 'a' * 10000000000 }}",
        "{% set ns = namespace(x='a') %}" + RANGE + "{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        RANGE + "0123456789{% endfor %}",
        "{{ 'x' * 10001 }}",
    ],
)
def test_hostile_templates_end_within_the_bound(source):
    template = ChatTemplate(source, {}, SMALL)
    try:
        started = time.monotonic()
        with pytest.raises(TemplateRefused):
            template.render(CHATS[0])
        assert time.monotonic() - started < 3
    finally:
        template.close()


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__ }}x{{ cycler.__init__.__globals__ }}",
        "{{ lipsum.__globals__['os'].environ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ namespace(__class__=1) }}",
        "{{ dict.__call__.__globals__ }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)
def test_hostile_templates_reach_nothing(source):
    template = ChatTemplate(source, {}, SMALL)
    try:
        try:
            text = template.render([dict(CHATS[0][0])])
        except TemplateRefused:
            return
        # Jinja renders some refused attributes as nothing.
        assert text.strip("x") == ""
    finally:
        template.close()


def test_the_next_rendering_works_after_a_child_died():
    source = (
        "{% if messages[0].content == 'loop' %}" + RANGE * 3 + "{% endfor %}" * 3 + "{% endif %}ok"
    )
    template = ChatTemplate(source, {}, SMALL)
    try:
        assert template.render(CHATS[0]) == "ok"
        first = template._child.pid
        with pytest.raises(TemplateRefused):
            template.render([{"role": "user", "content": "loop"}])
        assert template.render(CHATS[0]) == "ok"
        assert template._child.pid != first
        with pytest.raises(ProcessLookupError):
            os.kill(first, 0)
    finally:
        template.close()


def test_the_child_inherits_nothing(monkeypatch):
    monkeypatch.setenv("SOME_SECRET", "1")
    template = ChatTemplate("x", {})
    try:
        with open(f"/proc/{template._child.pid}/environ", "rb") as environment:
            assert b"SOME_SECRET" not in environment.read()
    except PermissionError:
        pass  # Not even readable: the child is not dumpable.
    finally:
        template.close()


def test_templates_that_do_not_compile():
    with pytest.raises(TemplateInvalid, match="TemplateSyntaxError"):
        ChatTemplate("{% for %}", {})
    # Jinja computes constants while it compiles.
    started = time.monotonic()
    with pytest.raises(TemplateInvalid, match="within its limits"):
        ChatTemplate("{{ (10 ** 30000000) % 7 }}", {}, SMALL)
    assert time.monotonic() - started < 3


def test_messages_are_quoted_in_no_error():
    template = ChatTemplate(
        "{% if messages[0].content == 'a' %}{{ raise_exception('Roles must alternate') }}"
        "{% else %}{{ raise_exception('no ' + messages[0].content) }}{% endif %}",
        {},
    )
    try:
        with pytest.raises(TemplateRefused, match="Roles must alternate"):
            template.render([{"role": "user", "content": "a"}])
        with pytest.raises(TemplateRefused) as caught:
            template.render([{"role": "user", "content": "secret"}])
        assert "secret" not in str(caught.value)
    finally:
        template.close()


def test_a_model_without_a_template(tmp_path):
    tokenizer = byte_level()
    tokenizer.chat_template = None
    with pytest.raises(TemplateRefused, match="no chat template"):
        Tokenizer(files_of(tokenizer, tmp_path)).render(CHATS[0])


def test_long_conversations_pass_the_pipes():
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}", {})
    try:
        text = "é🙂" * 500_000
        assert template.render([{"role": "user", "content": text}] * 2) == text * 2
    finally:
        template.close()
