"""The page's HTML, as a Jinja template; it is a module because a Flower app's bundle takes no file that ends in .html.

Jinja escapes all inserted texts. The filter `line` is `look.clean`: it cuts a text and replaces unprintable characters.
"""

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --paper: #ffffff; --card: #f6f8fa; --line: #d5dae0;
  --link: #0058a3; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --soft: #a3acb6; --paper: #14171b; --card: #1d2126;
  --line: #3a4048; --link: #7cbcf5; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main, header, footer { max-width: 76rem; margin: 0 auto; padding: 0 1rem; }
header { padding-top: 1.5rem; }
h1 { font-size: 1.5rem; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .4rem; padding-top: .8rem; border-top: 1px solid var(--line); }
p { margin: .4rem 0; max-width: 52rem; overflow-wrap: anywhere; }
.summary { font-size: 1.12rem; padding: .8rem 1rem; background: var(--card); border-left: 4px solid var(--link);
  max-width: none; }
a { color: var(--link); }
nav ul { list-style: none; margin: .8rem 0 0; padding: 0; display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; }
.soft, caption { color: var(--soft); font-size: .92rem; }
figcaption { font-weight: 600; font-size: .95rem; margin-bottom: .4rem; overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 32rem), 1fr)); gap: 1rem;
  margin: 1rem 0; align-items: start; }
figure { margin: 0; padding: .6rem; background: var(--card); border: 1px solid var(--line); border-radius: 6px;
  min-width: 0; }
figure img { display: block; width: 100%; height: auto; }
.scroll { overflow-x: auto; margin: .6rem 0; }
details .scroll { max-height: 32rem; overflow-y: auto; }
.scroll:focus-visible { outline: 2px solid var(--link); }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .3rem; }
th, td { padding: .25rem .7rem .25rem 0; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: top; }
td { white-space: nowrap; }
thead th { vertical-align: bottom; }
th:first-child, .words td, .words th { text-align: left; }
tbody th { font-weight: 600; min-width: 9rem; max-width: 24rem; overflow-wrap: anywhere; }
.words td { max-width: 26rem; overflow-wrap: anywhere; white-space: normal; }
summary { cursor: pointer; color: var(--link); margin: .3rem 0; }
footer { padding: 1.5rem 1rem 2.5rem; }
@media print { details { display: none; } figure { break-inside: avoid; } }
"""

TEMPLATE = """
{%- macro table(of, opener="") %}
{% set caption = of.caption | line %}
{% if of.folded %}
<details><summary>{{ opener or caption }}</summary>
{%- endif %}
<div class="scroll" role="region" aria-label="{{ caption }}" tabindex="0">{# so that a keyboard can scroll it #}
<table{% if not of.numeric %} class="words"{% endif %}><caption>{{ caption }}</caption>
<thead><tr>{% for name in of.header %}<th scope="col">{{ name | line }}</th>{% endfor %}</tr></thead>
<tbody>
{%- for row in of.rows %}
<tr><th scope="row">{{ row[0] | line }}</th>{% for cell in row[1:] %}<td>{{ cell | line }}</td>{% endfor %}</tr>
{%- endfor %}
</tbody></table></div>
{%- if of.folded %}</details>{% endif %}
{%- endmacro -%}
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
{# A second barrier: the browser neither runs nor fetches anything that the escaping might miss. #}
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{{ title | line }}</title>
<link rel="icon" href="data:,">
<style>{{ style | safe }}</style>
</head>
<body>
<header>
<h1>{{ title | line }}</h1>
<p class="summary" id="summary">{{ summary | line(2000) }}</p>
<nav aria-label="Contents"><ul>
{%- for section in sections %}<li><a href="#{{ section.name }}">{{ section.title | line }}</a></li>{% endfor -%}
</ul></nav>
</header>
<main>
{% for section in sections %}
<section id="{{ section.name }}" aria-labelledby="{{ section.name }}-title">
<h2 id="{{ section.name }}-title">{{ section.title | line }}</h2>
{% for note in section.notes %}
<p>{{ note | line(1000) }}</p>
{% endfor %}
{% if section.charts %}
<div class="charts">
{% for chart in section.charts %}
{% set light, dark = pictures[chart.name] %}
<figure id="chart-{{ chart.name }}"><figcaption>{{ chart.title | line }}</figcaption><picture>
<source media="(prefers-color-scheme: dark)" srcset="{{ dark | uri }}">
<img src="{{ light | uri }}" alt="{{ chart | alternative | line(1500) }}"></picture>
{{ table(chart | chart_table, "The numbers as a table") }}</figure>
{% endfor %}
</div>
{% endif %}
{% for each in section.tables %}
{{ table(each) }}
{% endfor %}
</section>
{% endfor %}
</main>
<footer class="soft"><p>{{ made_by | line }} The page's data block has every number drawn, as JSON.</p></footer>
<script type="application/json" id="data">{{ data | tojson }}</script>
</body>
</html>
"""
