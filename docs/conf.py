"""The documentation as pages: `make docs`. The API is read from the sources, not imported."""

project = html_title = 'mmvim'
html_theme = 'furo'
html_static_path = ['_static']
html_css_files = ['extra.css']
html_show_copyright = False
html_copy_source = False
extensions = ['myst_parser', 'autoapi.extension', 'sphinx.ext.napoleon', 'sphinx_copybutton']
highlight_language = 'text'
myst_heading_anchors = 3
autoapi_dirs = ['../mmvim', '../ops/mmvim_ops']
autoapi_generate_api_docs = False  # docs/api says what is on which page
autoapi_options = ['members', 'imported-members']
suppress_warnings = ['autoapi.python_import_resolution']


def setup(app):
    def skip_without_docstring(app, what, name, member, skip, options):
        return skip or not getattr(member, 'docstring', '')

    def link_to_page(app, page, source):  # the file in a checkout, the page on the site
        source[0] = source[0].replace('(../CONTRIBUTING.md', '(contributing.md')

    app.connect('autodoc-skip-member', skip_without_docstring)
    app.connect('source-read', link_to_page)
