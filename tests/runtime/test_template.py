"""Templates: what families of them do with messages, and that none can hang or fill the memory."""

import sys
import threading
import time
from datetime import datetime

import pytest

from localreason.runtime.errors import TemplateError
from localreason.runtime.template import Message, Part, render

TALK = [Message("system", "S"), Message("user", "U"), Message("assistant", "A"), Message("user", "V")]


def text_of(parts):
    return "".join(part.text for part in parts)


def test_a_template_that_splits_thinking_off_and_writes_bos_renders_like_its_family():
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}{% endif %}"
        "{%- if m['role'] == 'user' %}{{ '<U>' + m['content'] }}{% endif %}"
        "{%- if m['role'] == 'assistant' and m['content'] is not none %}{% set content = m['content'] %}"
        "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
        "{{ '<A>' + content.strip() + '<E>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<A><think>\\n' }}{% endif %}"
    )
    parts = render(template, TALK, {"bos_token": "<B>"})
    assert text_of(parts) == "<B>S<U>U<A>A<E><U>V<A><think>\n"
    assert [part.text for part in parts if not part.is_trusted] == ["S", "U", "A", "V"]
    assert parts[-1] == Part("<A><think>\n", True)


@pytest.mark.parametrize(("is_thinking", "tail"), [(True, "<A>\n"), (False, "<A>\n<think>\n\n</think>\n\n")])
def test_a_switch_for_thinking_is_passed_on(is_thinking, tail):
    template = (
        "{%- set ns = namespace(last=0) %}\n{%- for m in messages[::-1] %}\n"
        "    {%- if m.role == 'user' and m.content is string and not m.content.startswith('<tool>') %}"
        "{% set ns.last = loop.index0 %}{% break %}{% endif %}\n{%- endfor %}\n"
        "{%- for m in messages %}{{- '<' + m.role + '>' + m.content.lstrip('\\n') }}{% endfor %}"
        "{%- if add_generation_prompt %}{{- '<A>\\n' }}"
        "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}"
        "{%- endif %}{%- endif %}"
    )
    parts = render(template, [Message("user", "U")], is_thinking=is_thinking)
    assert text_of(parts) == "<user>U" + tail


def test_a_message_that_the_template_moves_stays_untrusted():
    parts = render("{{ messages[1].content }}\n\n{{ messages[0].content }}", TALK[:2])
    assert parts == [Part("U", False), Part("\n\n", True), Part("S", False)]


def test_a_message_cannot_pass_for_another_or_for_the_template():
    parts = render("[{{ messages[0].content }}]", [Message("user", "\ue0000000:0\ue001 {{ 7 * 7 }}")])
    assert parts == [Part("[", True), Part("\ue0000000:0\ue001 {{ 7 * 7 }}", False), Part("]", True)]


def test_a_message_that_is_cut_into_pieces_is_an_error():
    with pytest.raises(TemplateError):
        render("{{ messages[0].content }}{{ messages[0].content[:5] }}", [Message("user", "U")])


def test_json_is_written_without_escapes_for_html_and_takes_the_usual_arguments():
    template = "{{ {'b': '<é>', 'a': 1} | tojson(ensure_ascii=False, sort_keys=True) }}{{ messages[0].content }}"
    assert render(template, [Message("user", "U")])[0].text == '{"a": 1, "b": "<é>"}'


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% for m in messages %}{{ m.role.replace('user', 'U') }}:{{ m.content }}{% endfor %}", "U:hi"),
        ("{% block b %}{{ '-'.join(['a', 'b']) }}{{ messages[0].content }}{% endblock %}", "a-bhi"),
        ("{% for m in messages %}{% generation %}<{{ m.content }}>{% endgeneration %}{% endfor %}", "<hi>"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join }}", "hi"),
        ("{{ {'a': {1: 'hi'}}['a'][1] }}{{ {'a': 2}.get('b', 'x') }}{{ messages[0]['content'][0:] }}", "hixhi"),
        ("{{ [1, 2] | sum }}{{ [{'n': 3}] | sum('n') }}{{ messages[0].content }}", "33hi"),
        (
            "{% if messages[0].role == 'user' and 'u' in ['u'] and 1 < 2 <= 2 %}{{ messages[0].content }}{% endif %}",
            "hi",
        ),
    ],
)
def test_what_templates_use_is_there(template, text):
    assert "".join(part.text for part in render(template, [Message("user", "hi")])) == text


def test_today_can_be_asked_for():
    template = "{{ strftime_now('%Y') }}{{ messages[0].content }}"
    parts = render(template, [Message("user", "U")], now=datetime(2031, 5, 1))
    assert parts[0].text == "2031"


BIG = "{% set b = 'b' * 900000 %}"
GROWING = "{% set ns = namespace(a='aaaaaaaa', n=9, l=['a']) %}{% for i in range(60) %}{% set WHAT %}{% endfor %}"


@pytest.mark.parametrize(
    "template",
    [
        GROWING.replace("WHAT", "ns.a = ns.a ~ ns.a"),
        GROWING.replace("WHAT", "ns.a = ns.a + ns.a"),
        GROWING.replace("WHAT", "ns.n = ns.n * ns.n"),
        GROWING.replace("WHAT", "ns.l = [ns.l, ns.l]") + "{{ ns.l }}",
        GROWING.replace("WHAT", "ns.l = [ns.l, ns.l]") + "{{ ns.l ~ 'x' }}",
        GROWING.replace("WHAT", "ns.l = [ns.l, ns.l]") + "{{ ns.l | tojson }}",
        GROWING.replace("WHAT", "ns.l = {'a': ns.l, 'b': ns.l}") + "{{ ns.l | upper }}",
        GROWING.replace("WHAT", "ns.l, ns.a = [ns.l, ns.l], [ns.a, ns.a]") + "{{ ns.l == ns.a }}",
        GROWING.replace("WHAT", "ns.l, ns.a = [ns.l, ns.l], [ns.a, ns.a]") + "{{ ns.l is eq ns.a }}",
        GROWING.replace("WHAT", "ns.l, ns.a = [ns.l, ns.l], [ns.a, ns.a]") + "{{ [ns.l, ns.a] | sort | length }}",
        GROWING.replace("WHAT", "ns.l, ns.a = [ns.l, ns.l], [ns.a, ns.a]") + "{{ [ns.l].count(ns.a) }}",
        GROWING.replace("WHAT", "ns.l, ns.a = (ns.l, ns.l), (ns.a, ns.a)") + "{{ {ns.l: 1} | length }}",
        GROWING.replace("WHAT", "ns.l, ns.a = (ns.l, ns.l), (ns.a, ns.a)") + "{{ {1: 2}[ns.l] }}",
        GROWING.replace("WHAT", "ns.l, ns.a = [ns.l, ns.l], [ns.a, ns.a]")
        + "{% for i in [ns.l, ns.a] %}{{ loop.changed(i) }}{% endfor %}",
        "{% set a = range(20000) | list %}{{ a * a }}",
        "{{ ([[0] * 900000] * 1000) | sum(start=[]) | length }}",
        "{% set n = ('f' * 900000) | int(base=16) %}{{ n // (n // 3) }}",
        "{{ 'a' | center(2000000000) }}",
        "{{ 'a'.ljust(2000000000) }}",
        "{{ '{:2000000000d}'.format(1) }}",
        "{{ '%2000000000d' | format(1) }}",
        "{{ 'a\nb' | indent(2000000000) }}",
        "{{ [1] | tojson(indent=2000000000) }}",
        "{{ [1] | batch(1000000000, 0) | list | length }}",
        "{{ 1.5 | round(99999999, 'ceil') }}",
        "{{ (1).to_bytes(2000000000, 'big') | length }}",
        BIG + "{{ ('a' * 2000).replace('a', b) | length }}",
        BIG + "{{ ('a' * 2000) | replace('a', b) | length }}",
        BIG + "{{ ([b] * 2000) | join }}",
        BIG + "{{ b.join(['', ''] * 2000) | length }}",
        BIG + "{% set x %}{% for i in range(2000) %}{{ b }}{% endfor %}{% endset %}",
        BIG + "{% macro m() %}{% for i in range(2000) %}{{ b }}{% endfor %}{% endmacro %}{% set x = m() %}",
        "{% for i in range(2) %}" * 60 + "{% endfor %}" * 60,
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{{ lipsum(n=100000) }}",
        "{{ range(999999999) | list | length }}",
        "{{ messages.append(1) }}",
        "{% set ns = namespace() %}{% for i in range(9) %}{% set ns.a = ns %}{% endfor %}{{ ns }}",
    ],
)
def test_a_template_cannot_hang_or_fill_the_memory(template):
    started = time.monotonic()
    with pytest.raises(TemplateError):
        render(template + "{{ messages[0].content }}", [Message("user", "U")])
    assert time.monotonic() - started < 4


def test_a_trace_function_that_was_set_before_is_set_again_after_an_error_on_any_thread():
    found = []

    def trace(frame, event, argument):
        return None

    def work():
        sys.settrace(trace)
        try:
            with pytest.raises(TemplateError):
                render("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", TALK)
            found.append(sys.gettrace())
        finally:
            sys.settrace(None)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(20)
    assert found == [trace]
