"""Writes the tables of hparams and published numbers into the pages of docs/methods.

`python tools/method_pages.py` updates all pages and their order on the site, which is that of
docs/methods.md, and prints the tables of a method that has no page.
The last column of hparams keeps its text. A default or a draw that depends on the dataset is stated
for most datasets, then for the others.
"""

import ast
import inspect
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

from domainbed_kd import algorithms, datasets
from domainbed_kd.results import published

PAGES = Path(__file__).parents[1] / "docs" / "methods"
SITE = PAGES.parents[1] / "mkdocs.yml"
NAVIGATION = re.compile(r"(?:      - methods/.*\n)+")
HEAD = "| hparam | default | drawn from | |\n|---|---|---|---|\n"
TABLE = re.compile(r"(?m)^\| hparam \|.*\n\|---.*\n(?:\|.*\n)*")
NUMBERS = re.compile(r"(?m)^\| published as \|.*\n\|---.*\n(?:\|.*\n)*")
# Names in published.csv that differ from the method's, or that continue it.
PUBLISHED_AS = {"SMA": ("MA",), "CLIP": ("CLIP ViT",), "ERM": ("ERM", "ERM ("),
                "SDViT": ("SDViT", "SDViT ("), "WAKD": ("WAKD", "WAKD ("),
                "VL2VADiP": ("VL2V-ADiP",), "VL2VSD": ("VL2V-SD",)}
DATASETS = ("PACS", "VLCS", "OfficeHome", "TerraIncognita", "DomainNet", "DigitsDG")


def page_of(method: str) -> Path:
    """A method's page."""
    return PAGES / f"{method.lower()}.md"


def name_of(method: str) -> str:
    """The method as tables print it."""
    return algorithms.get_algorithm_class(method).display_name or method


def rows(method: str) -> list[tuple[str, str, str]]:
    """(name, default, draw) of each of the method's own hparams, as the page prints them."""
    cls = algorithms.get_algorithm_class(method)
    spaces = {name: cls.search_space(name) for name in DATASETS if name in datasets.DATASETS}

    def stated(hparam, describe):
        return by_dataset({dataset: describe(space[hparam]) if hparam in space else "DomainBed's"
                           for dataset, space in spaces.items()})

    return [(f"`{hparam}`", stated(hparam, lambda entry: f"`{shown(entry[0])}`"),
             stated(hparam, draw_of)) for hparam in spaces["PACS"]]


def shown(value) -> str:
    """A value as in --hparams; of a long list, the number of sentences."""
    text = json.dumps(value, ensure_ascii=False)
    if isinstance(value, list) and len(text) > 40:
        return f"{len(value)} sentences"
    return f"{value:.3g}" if isinstance(value, float) and value != int(value) else text


def by_dataset(texts: dict[str, str]) -> str:
    """The most frequent text, then the others with their datasets."""
    of = defaultdict(list)
    for name, text in texts.items():
        of[text].append(name)
    usual, *others = sorted(of, key=lambda text: -len(of[text]))
    return "; ".join([usual, *(f"{text} on {', '.join(of[text])}" for text in others)])


def draw_of(entry: tuple) -> str:
    """The distribution as a formula; "fixed" where every draw is the default."""
    default, draw = entry
    if all(draw(np.random.RandomState(seed)) == default for seed in range(20)):
        return "fixed"
    names = dict(zip(draw.__code__.co_freevars, (c.cell_contents for c in draw.__closure__ or ())))
    return formula(ast.unparse(_body(draw)), names)


def formula(source: str, names: dict) -> str:
    """A draw's code as mathematics: `10 ** r.uniform(-1, 1)` becomes 10^U(−1, 1)."""
    for name, value in names.items():
        source = re.sub(rf"\b{name}\b", str(value), source)
    source = re.sub(r"\bstr\((.*)\)$", r"\1", source)
    source = re.sub(r"\bint\((.*)\)$", r"⌊\1⌋", source)
    source = re.sub(r"r\.choice\(\[(.*)\]\)", r"{\1}", source)
    source = re.sub(r"⌊({.*})⌋", r"\1", source)
    source = source.replace("r.uniform(", "U(").replace(" ** ", "^").replace("'", "")
    return re.sub(r"(?<![\w)])-(?=\d)", "−", source)


def _body(function) -> ast.expr:
    """The expression that a lambda, or a one-line function, returns."""
    path = inspect.getsourcefile(function)
    for node in ast.walk(ast.parse(Path(path).read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Lambda, ast.FunctionDef)) and _is(node, function):
            return node.body if isinstance(node, ast.Lambda) else node.body[-1].value
    raise ValueError(f"{path}: the source of {function} was not found.")


def _is(node, function) -> bool:
    if node.lineno != function.__code__.co_firstlineno:
        return False
    if isinstance(node, ast.FunctionDef):
        return node.name == function.__name__
    code = compile(ast.Expression(node), "", "eval").co_consts[0]
    constants = [value for value in function.__code__.co_consts if value is not None]
    return constants == [value for value in code.co_consts if value is not None]


def table(method: str, words: dict[str, str]) -> str:
    """The whole table of hparams; `words` has the last column by hparam."""
    return HEAD + "".join(
        f"| {' | '.join(row)} | {words.get(row[0], '')} |\n" for row in rows(method))


def numbers(method: str) -> str:
    """Published averages over domains, in percent; empty if there are none."""
    names = PUBLISHED_AS.get(method, (method,))
    found = defaultdict(dict)
    for row in published.load(unverified=True):
        if not row.domain and (row.method in names or row.method.startswith(
                tuple(name for name in names if name not in algorithms.SHIPPED))):
            source = row.source if row.verified else f"not verified: {row.source}"
            found[row.method, row.backbone, source][row.dataset] = (
                f"{row.mean:.1f}" + (f" ± {row.stderr:.1f}" if row.stderr is not None else ""))
    columns = DATASETS[:5]
    head = f"| published as | network | {' | '.join(columns)} | source |\n|---{'|---' * 7}|\n"
    return head + "".join(
        f"| {name} | {backbone} | {' | '.join(of.get(d, '') for d in columns)} | {source} |\n"
        for (name, backbone, source), of in found.items()) if found else ""


def words_of(page: str) -> dict[str, str]:
    """{hparam: the page's text about it}."""
    found = TABLE.search(page)
    lines = [line.split(" | ") for line in found[0].splitlines()[2:]] if found else []
    return {cells[0][2:]: cells[-1].removesuffix("|").strip() for cells in lines}


def navigation(index: str) -> str:
    """The lines of mkdocs.yml that list the pages in the order of docs/methods.md."""
    return "".join(f"      - {page}\n" for page in re.findall(r"\((methods/\w+\.md)\)", index))


def main(argv: list[str] | None = None) -> int:
    """Updates pages, and prints the tables of methods that have no page yet."""
    for method in argv or algorithms.SHIPPED:
        page = page_of(method)
        if page.exists():
            text = page.read_text(encoding="utf-8")
            new = table(method, words_of(text))
            text = TABLE.sub(lambda match, new=new: new, text)
            new = numbers(method)
            page.write_text(NUMBERS.sub(lambda match, new=new: new, text), encoding="utf-8")
        else:
            print(f"{page} is absent. Its tables:\n\n{table(method, {})}\n{numbers(method)}")
    listed = navigation((PAGES.parent / "methods.md").read_text(encoding="utf-8"))
    site = SITE.read_text(encoding="utf-8")
    SITE.write_text(NAVIGATION.sub(lambda match: listed, site), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
