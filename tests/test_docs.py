"""The annotated pages: how sources are taken apart, what fails the build, and the built site in a browser."""

import ast
import re
import runpy
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from textwrap import dedent

import pytest
from conftest import FIRST

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))
docs = pytest.importorskip("build", reason="needs the extra docs: pip install -c constraints.txt -e '.[docs]'")
Library, Module, Prose, DocsError = docs.Library, docs.Module, docs.Prose, docs.DocsError

needs_katex = pytest.mark.skipif(
    shutil.which("node") is None or not (DOCS / "node_modules" / "katex").exists(),
    reason="needs Node.js and KaTeX: make docs",
)
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js")
needs_chromium = pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium: apt-get install chromium")
OWN_TEXT, COMPARE = ROOT / "examples" / "own_text.py", ROOT / "examples" / "compare_with_reference.py"


def module(source: str, name: str = "retro.a") -> Module:
    dotted = name.removeprefix("retro.")
    shown_path = f"retro/{dotted.replace('.', '/')}.py"
    return Module(Path(), name, f"{dotted}.html", shown_path, dedent(source).strip("\n") + "\n")


def parts(source: str) -> list[tuple[str, list[str]]]:
    """(prose, lines of code) of each section."""
    m = module(source)
    return [(s.prose, [m.lines[n - 1] for n in s.code]) for s in m.sections()]


def library(folder: Path, **sources: str) -> tuple[Path, dict[str, tuple[str, ...]]]:
    """A package of these modules below `folder`, and their reading order; `text__a` is `retro.text.a`."""
    package = folder / "retro"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('"""A library."""\n')
    names = {name: name.replace("__", "/") for name in sources}
    for name, source in sources.items():
        path = package / f"{names[name]}.py"
        if path.parent != package and not path.parent.exists():
            path.parent.mkdir()
            (path.parent / "__init__.py").write_text(f'"""What is in {path.parent.name}."""\n')
        path.write_text(dedent(source).strip("\n") + "\n")
    return folder, {"Part": tuple(names.values())}


def pages(folder: Path, **sources: str) -> dict[str, str]:
    root, order = library(folder, **sources)
    docs.build(root, folder / "site", order)
    return {path.name: path.read_text() for path in (folder / "site").glob("*.html")}


class Elements(HTMLParser):
    """Checks that tags nest, and finds attributes."""

    VOID = ("meta", "link", "br", "hr", "img", "wbr")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.all: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.all.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.all.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def values(self, tag: str, attribute: str) -> list[str]:
        return [values[attribute] for name, values in self.all if name == tag and attribute in values]


# Taking sources apart.


def test_prose_stands_beside_the_lines_that_follow_it():
    source = '''
        """What it is."""

        import os

        # Why two.
        TWO = 2  # a trailing comment stays


        def f(x):
            """What it does.

            More of it.
            """
            y = x
            # The reason,
            # in two lines.
            return y
    '''
    assert parts(source) == [
        ("What it is.", ["import os"]),
        ("Why two.", ["TWO = 2  # a trailing comment stays"]),
        ("What it does.\n\nMore of it.", ["def f(x):", "    y = x"]),
        ("The reason,\nin two lines.", ["    return y"]),
    ]


def test_only_a_comment_on_a_line_of_its_own_and_outside_brackets_is_prose():
    source = '''
        """M."""
        text = "# no comment"
        longer = """
        # no comment either
        """
        both = f"{text} # nor this"
        call(
            # of an argument
            text,
        )
        # type: ignore[all]
        last = 1
    '''
    (only,) = parts(source)
    assert only[0] == "M." and len(only[1]) == 11


def test_decorators_nested_functions_and_what_follows_a_definition_keep_their_places():
    source = '''
        """M."""


        class A:
            """About A."""

            x: int = 1

            @property
            @cached
            def f(self):
                """About f."""

                def inner():
                    """About inner."""
                    return 1

                def silent():
                    return 2

                return inner

            y = 2


        after = 3
    '''
    found = {prose or lines[0]: lines for prose, lines in parts(source)}
    assert found["About A."] == ["class A:", "    x: int = 1"]
    assert found["About f."] == ["    @property", "    @cached", "    def f(self):"]
    assert found["About inner."] == ["        def inner():", "            return 1"]
    assert found["    y = 2"] == ["    y = 2"] and found["after = 3"] == ["after = 3"]
    assert [s.name for s in module(source).sections() if s.name] == ["A", "A.f"]


def test_the_prose_of_a_class_stands_beside_its_init():
    source = '''
        """M."""


        class A:
            """About A and its x."""

            def __init__(self, x):
                self.x = x

            def __len__(self):
                return self.x
    '''
    (_, first, second) = parts(source)
    assert first == ("About A and its x.", ["class A:", "    def __init__(self, x):", "        self.x = x"])
    assert second == ("", ["    def __len__(self):", "        return self.x"])
    documented = source.replace("self.x = x", '"""X."""')
    assert ("X.", ["    def __init__(self, x):"]) in parts(documented)


def test_a_docstring_that_shares_its_line_with_code_stays_code_too():
    assert parts('"""M."""\ndef f(): "What."\n') == [("M.", []), ("What.", ['def f(): "What."'])]


@pytest.mark.parametrize(
    "path",
    [*sorted((ROOT / "retro").rglob("*.py")), OWN_TEXT, COMPARE],
    ids=lambda path: path.relative_to(ROOT).with_suffix("").as_posix(),
)
def test_every_line_is_there_once_as_prose_or_as_code(path):
    m = Module(path, path.stem, "x.html", path.name)
    sections = m.sections()
    code = [n for section in sections for n in section.code]
    assert code == sorted(set(code))
    docstrings = set()
    for node in ast.walk(m.tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    assert not docstrings & set(code)
    prose = Counter(line.strip() for s in sections if not s.inherited for line in s.prose.split("\n"))
    for number, line in enumerate(m.lines, start=1):
        if number in code or not line.strip():
            continue
        assert number in docstrings or line.strip().startswith("#"), (number, line)
        text = re.sub('^# |^r?"""|"""$', "", line.strip()).strip()
        if text and "\\" not in text:
            assert prose[text], (number, line)
            prose[text] -= 1


# Prose.


def rendered(prose: str, source: str = '"""M."""\n') -> tuple[str, Prose]:
    m = module(source)
    section = m.sections()[0]
    section.prose = dedent(prose).strip("\n")
    p = Prose(Library([m]))
    return p.html(section, m), p


def test_tex_is_not_touched_by_markdown():
    tex = r"\frac{a_1 * b_2}{c} \beta \text{x} \underline{y} < z * 2"
    html, prose = rendered(rf"""
        Let ${tex}$ be *this* and `$no$`, and

        $${tex}
        \big(x\big)$$

        and so $$y$$ as well.
    """)
    assert [f.tex for f in prose.formulas] == [tex, tex + "\n\\big(x\\big)", "y"]
    assert [f.display for f in prose.formulas] == [False, True, True]
    assert "<em>this</em>" in html and "<code>$no$</code>" in html and not prose.problems


def test_products_are_no_emphasis_and_signs_are_escaped():
    html, _ = rendered("(B*C, K*R, D) -> (3*H*d_k) with a < b and `x < y`, *so*")
    assert html == "<p>(B*C, K*R, D) → (3*H*d_k) with a &lt; b and <code>x &lt; y</code>, <em>so</em></p>\n"


def test_a_name_inside_a_link_has_no_link_of_its_own():
    html, _ = rendered("See [the `f` there](https://a.org) and `f`", '"""M."""\ndef f():\n    """F."""\n')
    assert '<a href="https://a.org">the <code>f</code> there</a> and <a href="a.html#f"><code>f</code></a>' in html


def test_a_link_to_a_file_of_prose_leads_to_its_page():
    html, _ = rendered("See [it](glossary.md#x) and [that](https://a.org/b.md)")
    assert '<a href="glossary.html#x">it</a> and <a href="https://a.org/b.md">that</a>' in html


def test_the_tutorials_five_come_first_and_each_has_a_link_to_its_own(tmp_path):
    assert next(iter(docs.READING_ORDER.values())) == tuple(FIRST)
    found = pages(tmp_path, **dict.fromkeys((*FIRST, "sample"), '"""M."""'))
    for name in (*FIRST, "sample"):
        link = f'<a href="https://nn.labml.ai/transformers/retro/{name}.html">'
        assert (link in found[f"{name}.html"]) == (name in FIRST), name


def test_literal_blocks_are_preformatted():
    prose = "So::\n\n    a  *b*\n\n      c\n\nand $x$\n* i::\n\n      d\n"
    html, _ = rendered(prose)
    assert '<pre><code class="language-text">a  *b*\n\n  c\n</code></pre>' in html and "<p>So:</p>" in html
    assert '<pre><code class="language-text">d\n</code></pre>' in html
    assert sys.modules["source"].literal_blocks("a::\nb") == "a::\nb"


@pytest.mark.parametrize(
    ("prose", "text", "href"),
    [
        ("see arXiv:2104.09864", "arXiv:2104.09864", "https://arxiv.org/abs/2104.09864"),
        ("(section 2.2\nof arXiv:1706.03762)", "section 2.2\nof arXiv:1706.03762", "https://arxiv.org/abs/1706.03762"),
        ("of (section B.1.2).", "section B.1.2", "https://arxiv.org/abs/2112.04426"),
        ("by equation (3), and", "equation (3)", "https://arxiv.org/abs/2112.04426"),
        ("at https://a.org/b.", "https://a.org/b", "https://a.org/b"),
        (
            "nn.labml.ai/transformers/retro/model.html",
            "nn.labml.ai/transformers/retro/model.html",
            "https://nn.labml.ai/transformers/retro/model.html",
        ),
    ],
)
def test_papers_and_the_tutorial_are_linked(prose, text, href):
    assert f'<a href="{href}">{text}</a>' in rendered(prose)[0]


# Links, anchors and pages.

A = '''
    """A. See `retro.b`, `retro.b.B.f`, `B`, `g`, `CONSTANT`, `other` and `retro.text`."""
    from retro.b import B

    CONSTANT = "retro.text"


    class Derived(B):
        """A kind of `B`; `here`, `f` and `x`."""

        def __init__(self, x):
            self.y = x

        def here(self, g):
            """Calls `f`, not `g`."""
            return self.f(g=g, y=self.y) + g(CONSTANT) + B.f(self)


    def g(x: B) -> bool:
        """Compares."""
        return x.value < 2 & len("<&>")


    both = "é×é", CONSTANT
'''
B = '''
    """B."""


    class B:
        """A class."""

        def f(self):
            """A method."""
'''


def test_names_lead_to_where_they_are_defined(tmp_path):
    html = pages(tmp_path, a=A, b=B)["a.html"]
    prose, code = "".join(re.findall('<div class="prose.*', html)), "".join(re.findall('<span class="line".*', html))
    for name, href in {
        "retro.b": "b.html",
        "retro.b.B.f": "b.html#B.f",
        "B": "b.html#B",
        "g": "a.html#g",
        "CONSTANT": "a.html#L4",
        "here": "a.html#Derived.here",
        "f": "b.html#B.f",
    }.items():
        assert f'<a href="{href}"><code>{name}</code></a>' in prose
    for name in ("other", "x", "retro.text"):
        assert f"<code>{name}</code>" in prose and f"<code>{name}</code></a>" not in prose
    assert prose.count("<code>g</code></a>") == 1, "in `here`, g is a parameter"
    (call,) = re.findall('<span class="line" id="L15">.*', html)
    assert '<a href="b.html#B.f">f</a>(g' in call and '<a href="a.html#L11">y</a>' in call
    assert '<a href="a.html#L4">CONSTANT</a>' in call and '<a href="b.html#B">B</a>.<a href="b.html#B.f">f</a>' in call
    assert '#g">' not in call
    assert '(<a href="b.html#B">B</a>):' in code
    assert (
        'é×é</span><span class="s">"</span>, <a href="a.html#L4">CONSTANT</a>' in code
    )  # columns are characters, not bytes


def test_names_lead_across_sub_packages_through_modules_and_what_they_import(tmp_path):
    corpus = '''
        """Corpus."""


        class Corpus:
            """Documents."""

            def split(self):
                """Its parts."""


        def load():
            """A `Corpus`."""
    '''
    model = '"""Has `Corpus` from elsewhere."""\nfrom retro.text.corpus import Corpus, load as open_it'
    user = '''
        """See `retro.text`, `retro.text.corpus`, `retro.model.Corpus.split`, `retro.Corpus`, `parallel`,

        and `parallel.rank`.
        """
        from retro import Corpus as Other, parallel
        from retro.model import Corpus, open_it


        def f(x):
            """Of `Corpus.split`."""
            return parallel.rank() + Corpus.split(open_it()) + Other.split(x)


        def g(parallel):
            """One."""
            return parallel.rank()
    '''
    parallel = '"""Processes."""\ndef rank():\n    """Its number."""'
    html = pages(tmp_path, model=model, parallel=parallel, text__corpus=corpus, text__use=user)
    page, where = html["text.use.html"], "text.corpus.html#Corpus"
    for name, href in {
        "retro.text": "index.html#retro.text",
        "retro.text.corpus": "text.corpus.html",
        "retro.model.Corpus.split": f"{where}.split",
        "retro.Corpus": where,
        "parallel.rank": "parallel.html#rank",
        "parallel": "parallel.html",
        "Corpus.split": f"{where}.split",
    }.items():
        assert f'<a href="{href}"><code>{name}</code></a>' in page, name
    code = {int(n): line for n, line in re.findall('<span class="line" id="L(\\d+)">(.*)', page)}
    assert '<a href="parallel.html">parallel</a>' in code[5] and f'<a href="{where}">Corpus</a>' in code[5]
    assert '<a href="text.corpus.html#load">open_it</a>' in code[6]
    assert '<a href="parallel.html">parallel</a>.<a href="parallel.html#rank">rank</a>()' in code[11]
    assert f'<a href="{where}">Corpus</a>.<a href="{where}.split">split</a>' in code[11]
    assert f'<a href="{where}">Other</a>.<a href="{where}.split">split</a>' in code[11]
    assert "<a href" not in code[16].partition("</a>")[2], "in `g`, parallel is a parameter"
    with pytest.raises(DocsError, match=r"retro/a.py:1: `parallel.x` leads nowhere: parallel has no x"):
        pages(tmp_path / "other", parallel=parallel, a='"""By `parallel.x`."""\nfrom retro import parallel')


def test_imports_are_folded_and_what_follows_them_is_not(tmp_path):
    source = '''
        """M."""

        from __future__ import annotations

        import os
        from typing import TYPE_CHECKING

        if TYPE_CHECKING:
            from json import dumps

        ONE = 1


        def f():
            """F."""
            import json
    '''
    html = pages(tmp_path, a=source)["a.html"]
    folded = re.search('<details class="imports"><summary>imports</summary>(.*?)</details>', html, re.DOTALL)[1]
    assert re.findall('id="L(\\d+)"', folded) == [str(n) for n in range(3, 11)]
    assert html.index("</details>") < html.index('id="L11"') < html.index('id="f"') and "open>" not in html
    assert "<details class" not in pages(tmp_path / "none", a='"""M."""\nx = 1\nimport os')["a.html"]


def test_a_long_idea_is_set_in_two_columns_and_a_short_one_is_not(tmp_path):
    found = pages(tmp_path, a='"""A line."""', b='"""B.\n\n' + "Much more of it. " * 50 + '"""')
    assert '<div class="prose idea"><p>A line.</p>' in found["a.html"]
    assert '<div class="prose idea long"><p>B.</p>' in found["b.html"]


def test_code_is_escaped_and_each_line_has_its_number(tmp_path):
    html = pages(tmp_path, a=A, b=B)["a.html"]
    assert '&lt; <span class="m">2</span> &amp; ' in html and "&lt;&amp;&gt;" in html
    numbers = re.findall(r'<span class="line" id="L(\d+)"><a class="n" href="#L\1" tabindex="-1">\1</a>', html)
    code = [n for section in module(A).sections() for n in section.code]
    assert list(map(int, numbers)) == code


def test_definitions_of_one_name_have_anchors_of_their_own_and_one_entry(tmp_path):
    source = '''
        """M."""
        from typing import overload


        @overload
        def f(x: int) -> int: ...
        @overload
        def f(x: str) -> str: ...
        def f(x):
            """Either."""


        class C:
            """C."""

            @property
            def p(self):
                """A property."""

            @p.setter
            def p(self, x): ...
    '''
    html = pages(tmp_path, a=source)["a.html"]
    ids = [values["id"] for _, values in Elements(html).all if "id" in values]
    assert len(ids) == len(set(ids)) and {"f", "f-2", "f-3", "C.p", "C.p-2"} <= set(ids)
    contents = re.search('<nav class="contents".*?</nav>', html)[0]
    assert contents.count('href="#C.p"') == 1 and "f-2" not in contents


def test_pages_follow_each_other_and_the_index_lists_them(tmp_path):
    found = pages(tmp_path, a=A, b=B)
    assert '<a rel="prev" href="index.html">' in found["a.html"] and '<a rel="next" href="b.html">' in found["a.html"]
    assert 'rel="next"' not in found["b.html"] and 'rel="prev"' not in found["index.html"]
    assert re.findall('<li><a href="(.*?)">(.*?)</a>', found["index.html"]) == [
        ("a.html", "retro.a"),
        ("b.html", "retro.b"),
    ]


def test_the_index_shows_groups_and_what_a_sub_package_says_of_itself(tmp_path):
    root, _ = library(tmp_path, a='"""A."""', text__b='"""B."""', text__c='"""C."""', text__d='"""D."""', e='"""E."""')
    (root / "retro" / "text" / "__init__.py").write_text('"""Text: all about `retro.a`."""')
    order = {"First": ("a",), "Behind: Text": ("text/c", "text/*"), "Behind: Else": ("e",), "Empty": ("nothing/*",)}
    docs.build(root, tmp_path / "site", order)
    html = (tmp_path / "site" / "index.html").read_text()
    assert re.findall("<h[23].*?</h[23]>", html) == [
        "<h2>First</h2>",
        "<h2>Behind</h2>",
        "<h3>Text</h3>",
        "<h3>Else</h3>",
    ]
    assert re.findall('<li><a href="(.*?)">', html) == [
        "a.html",
        "text.c.html",
        "text.b.html",
        "text.d.html",
        "e.html",
    ], "those that are named, then the others by name"
    said = re.search('<p class="aside" id="retro.text" data-source="retro/text/__init__.py:1">(.*)</p>', html)[1]
    assert said == 'All about <a href="a.html"><code>retro.a</code></a>'
    assert not (tmp_path / "site" / "text.__init__.html").exists()


def test_the_index_is_the_packages_docstring_with_its_drawing_and_its_list_replaced(tmp_path):
    root, order = library(tmp_path, a=A, b=B)
    (root / "docs").mkdir()
    (root / "docs" / "pipeline.svg").write_text('<svg><a href="a.html#g"><title>Drawn</title></a></svg>')
    (root / "retro" / "__init__.py").write_text(
        '"""First::\n\n    a --> b\n\nBetween:\n\n* `retro.b` is listed\n\nAfter.\n\n* one\n* two\n"""\n'
    )
    docs.build(root, tmp_path / "site", order)
    html = (tmp_path / "site" / "index.html").read_text()
    order_of = [
        html.index(text) for text in ("<p>First:</p>", "<svg>", "<p>Between:</p>", "<ol>", "<p>After.</p>", "two")
    ]
    assert order_of == sorted(order_of) and html.count("<svg>") == html.count("<ol>") == 1
    assert "--&gt;" not in html and "is listed" not in html and html.count('<a href="b.html">') == 1
    (root / "docs" / "pipeline.svg").write_text('<svg><a href="a.html#h"></a></svg>')
    with pytest.raises(DocsError, match=r"docs/pipeline.svg:1: the link a.html#h leads to no anchor"):
        docs.build(root, tmp_path / "site", order)


def test_a_method_that_implements_a_documented_one_has_its_prose(tmp_path):
    source = '''
        """M."""
        from typing import Protocol


        class Speaks(Protocol):
            """What speaks."""

            def speak(self) -> str:
                """What it says."""

            @property
            def legs(self) -> int:
                """How many it has."""


        class Dog:
            """A dog."""

            legs = 4

            def speak(self) -> str:
                return "woof"
    '''
    html = pages(tmp_path, a=source)["a.html"]
    assert html.count("<p>What it says.</p>") == 2
    assert '<a href="a.html#Speaks.speak"><code>Speaks.speak</code></a>' in html
    with pytest.raises(DocsError, match=r"retro/a.py:21: Dog.speak is public and has no docstring"):
        pages(tmp_path / "other", a=source.replace('"""What it says."""', "..."))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1", "retro/a.py:1: retro.a is public and has no docstring"),
        ('"""M."""\n\n\nclass A:\n    x = 1', "retro/a.py:4: A is public"),
        ('"""M."""\nasync def f(): ...', "retro/a.py:2: f is public"),
        ('"""M."""\nclass A:\n    """A."""\n    def f(self): ...', "retro/a.py:4: A.f is public"),
        ('"""M."""\nclass A:\n    """A."""\n    @property\n    def f(self): ...', "retro/a.py:5: A.f is public"),
        ('"""M.\n\nSee `retro.nothing`."""', "retro/a.py:3: `retro.nothing` leads nowhere: there is no retro.nothing"),
        ('"""M."""\n# See\n# `A.x`.\nclass A:\n    """A."""', "retro/a.py:3: `A.x` leads nowhere: A has no x"),
        ('"""M.\n\nSee [this](b.html)."""', "retro/a.py:1: the link b.html leads to no page"),
        ('"""M."""\n\n# See [this](#x).\ny = 1', "retro/a.py:3: the link #x leads to no anchor"),
        ('"""M.\n\nOnly $x."""', "retro/a.py:3: a dollar sign that neither begins nor ends a formula"),
        ('"""M.\n\nBy $\\beta$."""', r"retro/a.py:3: \b in a docstring is a control character"),
        ('"""M."""\ndef f():\n    """F $\\\\\\text{x}$."""', r"retro/a.py:3: \t in a docstring is a control character"),
        pytest.param('r"""M.\n\nBy $\\frax$."""', "retro/a.py:3: KaTeX parse error: Undefined", marks=needs_katex),
        pytest.param('r"""M.\n\n$$\n\\frac{a\n$$"""', "retro/a.py:4: KaTeX parse error", marks=needs_katex),
        pytest.param('"""M.\n\nBy $é$."""', "retro/a.py:3: KaTeX parse error: LaTeX-incompat", marks=needs_katex),
    ],
)
def test_what_is_wrong_fails_the_build_with_file_and_line_and_writes_nothing(tmp_path, source, message):
    with pytest.raises(DocsError, match=re.escape(message)):
        pages(tmp_path, a=source)
    assert not (tmp_path / "site").exists()


def test_a_function_may_be_called_main_and_a_name_of_the_package_leads_to_the_index(tmp_path):
    root, order = library(
        tmp_path, a='"""M, of `retro.VERSION`."""\nfrom retro import VERSION\ndef main():\n    """F."""'
    )
    (root / "retro" / "__init__.py").write_text('"""A library."""\nVERSION = 1\n')
    docs.build(root, tmp_path / "site", order)
    html = (tmp_path / "site" / "a.html").read_text()
    assert '<a href="index.html">VERSION</a>' in html and '<a href="index.html"><code>retro.VERSION</code>' in html
    assert html.count('id="main"') == 1


def test_private_nested_and_generated_functions_need_no_prose(tmp_path):
    source = '''
        """M."""


        class _A:
            def f(self):
                def g(): ...


        def _h(): ...
    '''
    assert "a.html" in pages(tmp_path, a=source)


def test_a_module_outside_the_reading_order_fails_the_build(tmp_path):
    root, order = library(tmp_path, a='"""A."""', b='"""B."""')
    with pytest.raises(DocsError, match=r"retro/b.py:1: not in the reading order"):
        docs.build(root, tmp_path / "site", {"Part": order["Part"][:1]})
    with pytest.raises(DocsError, match=r"retro/c.py is in the reading order, but not there"):
        docs.build(root, tmp_path / "site", {"Part": (*order["Part"], "c")})


def test_modules_of_sub_packages_and_what_they_say_are_asked_for_too(tmp_path):
    root, order = library(tmp_path, a='"""A."""', text__b='"""B."""', text__c="x = 1")
    with pytest.raises(DocsError, match=r"^retro/text/b.py:1: not in the reading order, in docs/build.py\n"):
        docs.build(root, tmp_path / "site", {"Part": ("a", "text/c")})
    with pytest.raises(DocsError, match=r"^retro/text/c.py:1: retro.text.c is public and has no docstring$"):
        docs.build(root, tmp_path / "site", order)
    (root / "retro" / "text" / "c.py").write_text('"""C."""')
    (root / "retro" / "text" / "__init__.py").write_text("")
    with pytest.raises(DocsError, match=r"^retro/text/__init__.py:1: retro.text is public and has no docstring$"):
        docs.build(root, tmp_path / "site", order)
    (root / "retro" / "text" / "__init__.py").write_text('"""Text."""\nx = 1')
    with pytest.raises(DocsError, match=r"^retro/text/__init__.py:1: not in the reading order, in docs/build.py$"):
        docs.build(root, tmp_path / "site", order)
    docs.build(root, tmp_path / "site", {"Part": (*order["Part"], "text/__init__")})
    assert "<h1>retro.text</h1>" in (tmp_path / "site" / "text.html").read_text()


def test_an_anchor_that_is_there_twice_is_a_mistake():
    assert list(docs.broken_links({"a.html": '<p id="x"></p><p id="x"></p>'})) == [
        "a.html: the anchor #x is there twice"
    ]


def test_without_node_the_message_names_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DocsError, match=r"install Node\.js 20 or newer .*: make docs"):
        pages(tmp_path, a='"""M $x$."""')
    assert not (tmp_path / "site").exists()


@needs_node
def test_with_node_but_without_katex_the_message_names_make_docs_beside_what_else_is_wrong(tmp_path, monkeypatch):
    shutil.copy(DOCS / "formulas.mjs", tmp_path)
    monkeypatch.setattr(sys.modules["prose"], "HERE", tmp_path)
    with pytest.raises(DocsError, match=r"retro/a\.py:2: f is public(.|\n)*KaTeX, which is not there yet.*: make docs"):
        pages(tmp_path, a='"""M $x$."""\ndef f(): ...')
    assert not (tmp_path / "site").exists()


def test_pages_without_formulas_need_neither_node_nor_katex(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "a.html" in pages(tmp_path, a='"""M."""')


# The real site.


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> tuple[Path, dict[str, int]]:
    """The site, built, and the number of formulas of each page."""
    out = tmp_path_factory.mktemp("pages") / "site"
    return out, docs.build(ROOT, out)


@needs_katex
def test_pages_are_whole_documents_without_scripts_or_network(site):
    out, n_formulas = site
    modules = [path for path in (ROOT / "retro").rglob("*.py") if not docs.is_wing(path)]
    others = list((DOCS).glob("*.md")) + list((ROOT / "examples").glob("*.py"))
    assert len(n_formulas) == len(list(out.glob("*.html"))) == len(modules) + len(others)
    for page in n_formulas:
        html = (out / page).read_text(encoding="utf-8")
        elements = Elements(html)
        assert html.startswith("<!DOCTYPE html>") and elements.values("html", "lang") == ["en"]
        assert "viewport" in elements.values("meta", "name") and "<title>" in html and html.count("<h1>") == 1
        first_link = next(values for tag, values in elements.all if tag == "a")
        assert first_link == {"class": "skip", "href": "#whole-page"} and '<main id="whole-page"' in html
        assert "script" not in {tag for tag, _ in elements.all} and "<!--formula" not in html
        for address in elements.values("link", "href"):
            assert address == "data:," or (out / address).is_file()
    # The index' docstring, drawn and listed.
    index = (out / "index.html").read_text(encoding="utf-8")
    assert index.count("<svg") == 1 and "--&gt;" not in index


@needs_katex
def test_each_formula_of_the_sources_is_set(site):
    out, n_formulas = site
    expected = 0
    for path in (ROOT / "retro").rglob("*.py"):
        for section in Module(path, path.stem, "x.html", path.name).sections():
            text = re.sub(r"`[^`]*`", "", section.prose)
            expected += len(re.findall(r"\$\$.+?\$\$|\$.+?\$", text, re.DOTALL))
    assert sum(n_formulas.values()) >= expected > 50
    katex = {page: (out / page).read_text().count('<span class="katex">') for page in n_formulas}
    assert katex == n_formulas


def test_the_glossary_has_each_word_once_and_the_page_on_scale_uses_no_other():
    words = re.findall(r"^\* \*\*([\w ]+)\*\*: ", (DOCS / "glossary.md").read_text(), re.MULTILINE)
    assert len(words) == len(set(words))
    asked = (
        "chunk, value, continuation, key, neighbor, split, held out, window, shard, sample, offset, corpus, database, "
    )
    asked += "index, recall, manifest, run, checkpoint"
    assert set(asked.split(", ")) <= set(words)
    for name in ("glossary.md", "at_scale.md"):
        text = (DOCS / name).read_text()
        assert not re.search(r"\b(pieces?|blocks?|labels?|seals?|made_with|living)\b", text), name


# In a browser.

# A function of JavaScript, of a frame with a page, to text that has no comma: what a reader sees of the page.
SHOWN = """frame => {
    const page = frame.contentDocument, links = [...page.querySelectorAll(".contents a")];
    const formulas = [...page.querySelectorAll(".katex")];
    const set = formulas.filter(f => f.querySelector(".katex-html").getBoundingClientRect().width > 0 &&
        frame.contentWindow.getComputedStyle(f).fontFamily.includes("KaTeX_Main"));
    const lost = links.filter(a => !page.getElementById(decodeURIComponent(a.hash.slice(1))));
    const fonts = [...page.fonts].filter(f => f.status == "error");
    return [page.documentElement.scrollWidth, frame.clientWidth, set.length, links.length, lost.length, fonts.length]
        .join(" ") }"""
# How far down the idea ends, the first definition begins (its anchor) and the fifth line of its code ends, and each
# formula of the idea, or, if that has none, the first of the page.
FIRST_SCREEN = """frame => {
    const page = frame.contentDocument, end = element => Math.ceil(element.getBoundingClientRect().bottom);
    const first = page.querySelector(".row[id]"), lines = [...first.querySelectorAll(".line")].slice(0, 5);
    const within = [...page.querySelectorAll(".opening .katex")];
    const formulas = within.length ? within : [...page.querySelectorAll(".katex")].slice(0, 1);
    return [first.id, end(page.querySelector(".idea")), Math.ceil(first.getBoundingClientRect().top),
        end(lines[lines.length - 1]), ...formulas.map(end)].join(" ") }"""


def seen(folder: Path, addresses: list[str], sizes: list[tuple[int, int]], measure: str) -> tuple[list[list[str]], str]:
    """Words that `measure` finds on each page, in windows of each of the sizes; and what the browser complained of."""
    # A window cannot be as narrow as a phone, a frame can.
    frames = "".join(
        f'<iframe src="{address}" width="{width}" height="{height}" style="border: 0"></iframe>'
        for address in addresses
        for width, height in sizes
    )
    script = f'onload = () => document.body.dataset.found = [...document.querySelectorAll("iframe")].map({measure})'
    (folder / "frames.html").write_text(f"<!DOCTYPE html><title>frames</title><body>{frames}<script>{script}</script>")
    options = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    options += "--disable-component-update --disable-sync --allow-file-access-from-files --enable-logging=stderr "
    command = ["chromium", *options.split(), f"--user-data-dir={folder / 'profile'}", "--dump-dom"]
    done = subprocess.run(
        [*command, (folder / "frames.html").as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    found = [row.split() for row in re.search('data-found="(.*?)"', done.stdout)[1].split(",")]
    assert len(found) == len(addresses) * len(sizes)
    return found, done.stderr


@needs_katex
@needs_chromium
def test_a_browser_shows_formulas_and_anchors_and_never_scrolls_sideways(site, tmp_path):
    out, n_formulas = site
    found, errors = seen(tmp_path, [(out / page).as_uri() for page in n_formulas], [(390, 800), (1440, 800)], SHOWN)
    numbers = [list(map(int, row)) for row in found]
    without_definitions = {"index.html", "__main__.html", "own_text.html"} | {
        p.stem + ".html" for p in DOCS.glob("*.md")
    }
    for i, page in enumerate(n_formulas):
        for scroll_width, width, n_set, n_links, n_lost, n_failed in numbers[2 * i : 2 * i + 2]:
            assert scroll_width <= width, f"{page} is {scroll_width} wide in {width}"
            assert (n_set, n_lost, n_failed) == (n_formulas[page], 0, 0), page
            assert n_links or page in without_definitions, page
    assert sum(n for *_, n, _, _ in numbers) > 200
    assert "CONSOLE" not in errors, errors


@needs_katex
@needs_chromium
def test_the_idea_its_formula_and_the_first_definition_of_the_five_modules_need_no_scrolling(site, tmp_path):
    found, _ = seen(tmp_path, [(site[0] / f"{name}.html").as_uri() for name in FIRST], [(1440, 900)], FIRST_SCREEN)
    for name, (first, *ends) in zip(FIRST, found, strict=True):
        assert first == FIRST[name], name
        assert all(0 < int(end) < 900 for end in ends), (name, ends)


@needs_katex
@needs_chromium
def test_35_lines_of_docstring_and_a_dozen_imports_leave_room_for_the_first_definition(tmp_path):
    line = "Words of about seven letters each, as long as a line of a docstring may be, so that it fills the page.\n"
    paragraphs = "\n".join(line * 6 + ("\n$$x = \\frac{a}{b}$$\n" if i == 3 else "") for i in range(5))
    source = f'r"""The idea in a line.\n\n{paragraphs}"""\n\n' + "import os\n" * 12 + "\nONE = 1\nTWO = 2\n\n\n"
    assert source.count("\n", 0, source.rindex('"""')) >= 35
    pages(tmp_path, a=source + 'def first(x):\n    """What it does."""\n' + "    x += 1\n" * 10)
    ((first, *ends),), _ = seen(tmp_path, [(tmp_path / "site" / "a.html").as_uri()], [(1440, 900)], FIRST_SCREEN)
    assert first == "first" and all(0 < int(end) < 900 for end in ends), ends
    assert len(ends) == 4, "the idea, the anchor, the code, the formula"


# The examples.


def test_your_own_text_from_a_folder_to_samples_with_their_sources(plays, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STEPS", "2")
    (tmp_path / "texts").mkdir()
    for play in ("hamlet.md", "macbeth.md", "othello.md"):
        (tmp_path / "texts" / play).write_text((plays / play).read_text()[:4000])
    monkeypatch.setattr(sys, "argv", ["own_text.py", "texts"])
    result = runpy.run_path(str(OWN_TEXT))
    out = capsys.readouterr().out
    assert result["summary"]["steps"] == 2 and "'leaking_neighbors': 0" in out
    neighbor = result["sampler"].neighbors[-1][0]
    assert neighbor.document in {path.name for path in plays.iterdir()}
    assert f"found {neighbor.document}, token {neighbor.offset:,}" in out
    assert (tmp_path / "mydata" / "retro.index").exists()


def test_the_reference_and_this_library_agree_and_the_example_can_tell(tmp_path, capsys):
    runpy.run_path(str(COMPARE))
    assert len(re.findall(r"differ by \d\.\de-0[78] of the largest", capsys.readouterr().out)) == 2
    doctored = tmp_path / "compare.py"
    source = COMPARE.read_text()
    assert "    logits[name] = model(tokens, neighbors)\n" in source
    wrong = "    logits[name] = model(tokens, neighbors if name == 'theirs' else neighbors.flip(1))\n"
    doctored.write_text(source.replace("    logits[name] = model(tokens, neighbors)\n", wrong))
    with pytest.raises(SystemExit, match="more than rounding"):
        runpy.run_path(str(doctored))
