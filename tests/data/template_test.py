import time

import pytest

from ftjax.data import CHATML, ChatTemplate, TemplateError
from ftjax.data.template import with_variables
from tests.data.families import FAMILIES, byte_tokenizer

MESSAGES = [{"role": "user", "content": "Hi & <bye>"}, {"role": "assistant", "content": "Ho"}]

DOUBLE = "{%% set n = namespace(x='aa') %%}{%% for i in range(90) %%}%s{%% endfor %%}"
NEST = (
    "{%% set n = namespace(x=[], y=[]) %%}{%% for i in range(90) %%}{%% set n.x = %s %%}{%% set n.y = %s %%}{%% endfor %%}{{ n.x == n.y }}"
)
BOMBS = {
    "endless loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "wide loops": "{% for i in range(999) %}{% for j in range(999) %}" + "x" * 1000 + "{% endfor %}{% endfor %}",
    "one string": "{{ 'x' * 10**9 }}",
    "one list": "{{ ((range(9999) | list) * 99999) | length }}",
    "doubling with ~": DOUBLE % "{% set n.x = n.x ~ n.x %}",
    "doubling with +": DOUBLE % "{% set n.x = n.x + n.x %}",
    "doubling by capture": DOUBLE % "{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}",
    "doubling by replace": DOUBLE % "{% set n.x = n.x.replace('a', 'aa') %}",
    "doubling by filter": DOUBLE % "{% set n.x = n.x | replace('a', 'aa') %}",
    "doubling by join": DOUBLE % "{% set n.x = [n.x, n.x] | join(n.x) %}",
    "doubling by a method": DOUBLE % "{% set n.x = n.x.join([n.x, n.x]) %}",
    "lists of lists": NEST % ("[n.x, n.x]", "[n.y, n.y]"),
    "tuples of tuples": NEST % ("(n.x, n.x)", "(n.y, n.y)"),
    "dicts of dicts": NEST % ("{'a': n.x, 'b': n.x}", "{'a': n.y, 'b': n.y}"),
    "dicts by dict": NEST % ("dict(a=n.x, b=n.x)", "dict(a=n.y, b=n.y)"),
    "calls of calls": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "indenting": "{{ ('a\n' * 9999) | indent(9999999) }}{{ messages | tojson(indent=999999) | indent(' ' * 99999) }}",
}
FORBIDDEN = {
    "class": "{{ ''.__class__.__mro__ }}",
    "format": "{{ '{0.__class__}'.format(1) }}",
    "format_map": "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "padding by format": "{{ '%9d' % 1 }}",
    "padding by str.format": "{{ '{:9}'.format(1) }}",
    "padding by filter": "{{ 'x' | center(9) }}",
    "padding by method": "{{ 'x'.ljust(9) }}",
    "padding by zfill": "{{ 'x'.zfill(9) }}",
    "padding by tabs": "{{ 'x'.expandtabs(9) }}",
    "padding by date": "{{ strftime_now('%9d') }}",
    "attr": "{{ messages | attr('append') }}",
    "mutation of a list": "{{ messages.append(1) }}",
    "mutation of a dict": "{{ messages[0].update({'a': 1}) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "power": "{{ 10 ** 10 ** 10 }}",
    "recursion": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "recursive loop": "{% for i in range(999) recursive %}{{ loop(range(999)) }}{% endfor %}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_runs_out_of_budget(name):
    with pytest.raises(TemplateError, match="more than 131,072 characters and loop turns"):
        ChatTemplate(BOMBS[name], max_work=2**17, max_seconds=60).render(MESSAGES)


def test_a_slow_template_meets_its_deadline():
    begin = time.monotonic()
    with pytest.raises(TemplateError, match="took more than 0.2 seconds"):
        ChatTemplate(BOMBS["endless loops"], max_work=2**40, max_seconds=0.2).render(MESSAGES)
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize("name", FORBIDDEN)
def test_what_could_make_much_of_little_or_reach_python_is_refused(name):
    with pytest.raises(TemplateError):
        ChatTemplate(FORBIDDEN[name]).render(MESSAGES)


WALKS = (
    "''.__class__",
    "raise_exception.__globals__",
    "range.__self__",
    "messages | map(attribute='__class__') | first",
    "cycler",
    "self._",
)


@pytest.mark.parametrize("walk", WALKS)
def test_there_is_nothing_to_walk_to(walk):
    assert ChatTemplate("{{ " + walk + " }}").render(MESSAGES) == ""


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"llama3"}))
def test_the_families_render_as_in_transformers(name):
    tokenizer = byte_tokenizer(name)
    template = ChatTemplate(tokenizer.chat_template, variables={"bos_token": tokenizer.bos_token or "", "eos_token": tokenizer.eos_token})
    for prompt in (False, True):
        messages = MESSAGES[:1] if prompt else MESSAGES
        ours = template.render(messages, add_generation_prompt=prompt)
        assert ours == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)


FEATURES = (
    "{% for m in messages %}\n    {% if loop.first %}{% continue %}{% endif %}\n{{ m['content'] | trim }}\n{% break %}{% endfor %}",
    "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ messages[1:] | map(attribute='role') | join(', ') }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ messages[0].items() | list }}{{ missing }}{{ none }}",
    "{% set a, b = 1, [2, 3] %}{{ b[0] + a * 3 }}{{ 'a' ~ 1 ~ b }}{{ {'k': 'v'} }}{{ 'x,y'.split(',')[-1].strip() }}",
    "{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f('z') }}{{ 'a\nb' | indent(2) }}{{ 'ab' * 2 }}{{ [1, 2] + [3] }}{{ not 'a' in 'abc' }}",
    "{% set n = namespace(x=0) %}{% for i in range(3) %}{% set n.x = n.x + i %}{% endfor %}{{ n.x }}{{ messages is iterable }}",
    "{{ 'aXb'.replace('X', 'Y') }}{% generation %}{{ ['b', 'a'] | sort | first }}{% endgeneration %}{{ 'a-b'.split('-') | last | upper }}",
)


@pytest.mark.parametrize("source", FEATURES)
def test_what_templates_use_works_as_in_transformers(source):
    ours = ChatTemplate(source).render(MESSAGES)
    assert ours == byte_tokenizer("roles").apply_chat_template(MESSAGES, chat_template=source, tokenize=False)


def test_the_day_never_changes_unless_it_is_asked_to():
    assert ChatTemplate("{{ strftime_now('%d %b %Y') }}").render([]) == "26 Jul 2024"


def test_a_refusal_and_a_mistake_say_so():
    with pytest.raises(TemplateError, match="refused this conversation: no system role"):
        ChatTemplate("{{ raise_exception('no system role') }}").render(MESSAGES)
    with pytest.raises(TemplateError, match="chat template: .*end of statement"):
        ChatTemplate("{% if %}")
    with pytest.raises(TemplateError, match="chat template: list object has no element 9"):
        ChatTemplate("{{ messages[9].role.x }}").render(MESSAGES)
    with pytest.raises(TemplateError, match="more than the limit"):
        ChatTemplate(CHATML * 2000)


def test_tools_reach_the_template():
    text = ChatTemplate("{% if tools %}{{ tools | tojson }}{% else %}none{% endif %}")
    assert text.render(MESSAGES, tools=[{"name": "é"}]) == '[{"name": "é"}]' and text.render(MESSAGES) == "none"


@pytest.mark.parametrize("source", ["{{ a }}{{ b }}", "\n{{ a }}{{ b }}", "  {% if true %}{{ a }}{% endif %}{{ b }}"])
def test_a_template_carries_its_variables_and_hears_a_caller(source):
    values = {"a": "it's %} {{ é\n", "b": [1, -2.5e-05, None, True, {"k": "v"}]}
    carried = with_variables(source, values)
    assert ChatTemplate(carried).render([]) == ChatTemplate(source, variables=values).render([])
    assert ChatTemplate(carried, variables={"b": 7}).render([]) == ChatTemplate(source, variables={**values, "b": 7}).render([])
    assert with_variables(carried, values) == carried
