"""Settings of Sphinx for the book: everything that a page needs lies beside it, no host is asked."""

import re

from latex2mathml.converter import convert
from myst_nb.core.render import NbElementRenderer
from sphinx.util.docutils import nodes

import dinv

project = "dinv"
version = release = dinv.__version__
html_title = f"dinv {version}"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]

nb_execution_mode = "off"  # the outputs are those that are committed
nb_ipywidgets_js = {}  # would come from a content network
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "deflist", "attrs_inline"]
myst_heading_anchors = 3

autosummary_generate = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 80
napoleon_use_ivar = True
default_role = "code"  # in docstrings `x` is code

html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["book.css"]
html_copy_source = html_use_index = html_domain_indices = False
html_show_copyright = html_show_sphinx = False
html_math_renderer = "mathml"


def mathml(display):
    """Equations as MathML, which browsers draw by themselves: no script, no font to fetch."""

    def visit(self, node):
        # spellings that `convert` does not know
        latex = re.sub(r"\\[bB]igg?[lr]?(?=\\)", "", node.astext())
        latex = re.sub(r"\\(mathcal|mathbb) *([A-Za-z])", r"\\\1{\2}", latex)
        equation = convert(latex, display=display)
        self.body.append(f'<div class="equation">{equation}</div>' if display == "block" else equation)
        raise nodes.SkipNode

    return visit, None


def render_image(self, data, plain=NbElementRenderer.render_image):
    """The text in place of a picture, which a notebook keeps with its output and myst-nb leaves behind."""
    images = plain(self, data)
    alt = data.output_metadata.get(data.mime_type, {}).get("alt")
    for image in images:
        image.setdefault("alt", alt or "figure, described in the text beside it")
    return images


def as_prose(app, what, name, obj, options, lines):
    """Docstrings are written for `help()`: *, | and _ stand for themselves, an indented paragraph is code."""
    text = re.sub(r"(?<![`\\])(\*(?=\w)|\|(?=\S)|(?<=\w)_(?!\w))", r"\\\1", "\n".join(lines))
    # Without the spaces: Sphinx would take the first of two names for the type of the second.
    text = re.sub(r"(?m)^:(param|ivar) \w+(, \w+)+:", lambda found: found[0].replace(", ", ","), text)
    if what in ("module", "class"):
        text = re.sub(r"\n\n(?= {4})", "\n\n::\n\n", text, count=1)
    lines[:] = text.split("\n")


def setup(app):
    app.add_html_math_renderer("mathml", mathml("inline"), mathml("block"))
    NbElementRenderer.render_image = render_image
    app.connect("autodoc-process-docstring", as_prose)
