"""How every page of results looks, and its pictures: one self-contained file, light and dark, as narrow as a phone."""

import base64
import io
import re
from collections.abc import Callable, Iterable, Iterator
from html import escape

from matplotlib import rc_context
from matplotlib.figure import Figure

from longact_kernels.sparse.figures import LIGHT

INK, PAPER = "#d7dce2", "#16191d"
DARK = {
    **LIGHT,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "savefig.facecolor": PAPER,
}
STYLE = """
:root { color-scheme: light dark; --ink: #1c2126; --dim: #5b6570; --paper: #fff; --line: #dde1e6; --good: #11734b }
@media (prefers-color-scheme: dark) {
  :root { --ink: #d7dce2; --dim: #98a2ad; --paper: #16191d; --line: #343a41; --good: #58c492 } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 60rem; padding: 1rem }
h1 { font-size: 1.5rem; margin: .5rem 0; overflow-wrap: anywhere } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem }
.dim { color: var(--dim) }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .75rem; margin: 1rem 0 }
.card { border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem }
.card b { display: block; font-size: 1.15rem } .card > span { color: var(--dim); font-size: .85rem }
/* Pictures are wider than a phone: their letters would be too small else. */
img { max-width: 100%; height: auto; min-width: 36rem } .saliency img { min-width: 48rem }
.wide { overflow-x: auto; margin-bottom: 1rem }
table { border-collapse: collapse; font-size: .9rem }
td, th { text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top }
td:last-child { overflow-wrap: anywhere }
.texts td { min-width: 8rem; overflow-wrap: break-word }
.number, .numbers :is(td, th) { white-space: nowrap; font-variant-numeric: tabular-nums }
.numbers :is(td, th):first-child { position: sticky; left: 0; background: var(--paper) }
.right { color: var(--good) }
"""


def document(title: str, about: str, *parts: str) -> str:
    """A page that needs nothing else; `about` is a line below its title, the parts are HTML."""
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{STYLE}</style>"
        f"<h1>{escape(title)}</h1><p class=dim>{escape(about)}</p>{''.join(parts)}</html>\n"
    )


def cards(figures: Iterable[tuple[str, str]]) -> str:
    """The few figures that matter, with their names; a number and its error stay on one line."""
    made = (f"<div class=card><span>{escape(name)}</span><b>{kept(value)}</b></div>" for name, value in figures)
    return f"<div class=cards>{''.join(made)}</div>"


def kept(text: str) -> str:
    """Text that breaks into lines before an arrow, "of" or a number, or after a comma, never in one with its error."""
    return "".join(
        f"<span class=number>{escape(part)}</span> " for part in re.split(r"(?<=,) | (?=→|of )|(?<=\w) (?=\d)", text)
    )


def table(header: list[str], rows: list[list[str]], kind: str = "") -> str:
    """An HTML table; the cells are HTML already. In those of kind `numbers` no cell is broken into lines."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class='wide {kind}'><table><tr>{head}</tr>{body}</table></div>"


def pairs(values: dict) -> list[list[str]]:
    """The rows of a table of keys and values."""
    return [[escape(key), value_of(value)] for key, value in values.items()]


def value_of(value: object) -> str:
    """A value of an option as a table's cell."""
    whole = isinstance(value, int | float) or len(str(value)) < 16
    return f"<span class=number>{escape(str(value))}</span>" if whole else escape(str(value))


Pictures = Callable[[], Iterable[tuple[str, Figure]]]


def both_styles(draw: Pictures) -> dict[str, tuple[bytes, bytes]]:
    """By name, the PNG bytes of pictures in light and in dark colours."""
    light, dark = ({name: png(figure) for name, figure in styled(style, draw)} for style in (LIGHT, DARK))
    return {name: (image, dark[name]) for name, image in light.items()}


def styled(style: dict, draw: Pictures) -> Iterator[tuple[str, Figure]]:
    with rc_context(style):
        yield from draw()


def png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def picture(name: str, title: str, light: bytes, dark: bytes) -> str:
    """A picture under its title, in the colours of the reader's screen."""
    return (
        f"<h2>{escape(title)}</h2><div class='wide {name}'><picture>"
        f"<source media='(prefers-color-scheme: dark)' srcset='{data_uri(dark)}'>"
        f"<img alt='{escape(title)}' src='{data_uri(light)}'></picture></div>"
    )


def data_uri(image: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"
