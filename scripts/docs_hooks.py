"""For mkdocs.yml: docstrings announce code with two colons, as reStructuredText does; a page shows one."""


def on_page_content(html, **_):
    return html.replace("::</p>", ":</p>")
