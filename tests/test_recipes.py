"""The recipes of the documentation: their code runs as it stands there, and its loss and gradients are the formula's.

``formulas/<page>.py`` writes every formula of a page out in plain PyTorch, under the anchor of its section. Inputs are
fp64, and made here by the names that the pages use.
"""

import importlib
import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from formulas.inputs import inputs

import kdkernels as kd
from kdkernels import divergences

PAGES = Path(__file__).resolve().parent.parent / "docs" / "reference" / "recipes"
NAMES = sorted(path.stem for path in PAGES.glob("*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```", flags=re.M | re.S)


def anchor(title):
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def sections(page):
    """The code of a page: that of its head, and of every section by anchor."""
    head, *parts = re.split(r"^## ", (PAGES / f"{page}.md").read_text(), flags=re.M)
    found = {anchor(part.splitlines()[0]): BLOCK.findall(part) for part in parts}
    assert len(found) == len(parts), "two sections of one name"
    return BLOCK.findall(head), found


def formulas(page):
    return importlib.import_module(f"formulas.{page}").FORMULAS


CASES = [
    (page, name, number)
    for page in NAMES
    for name, blocks in sections(page)[1].items()
    for number in range(len(blocks))
]


@pytest.fixture
def own_divergences():
    """Takes out what a recipe registers."""
    before = set(divergences.names())
    yield
    for name in set(divergences.names()) - before:
        kd.unregister_divergence(name)


def is_float(x):
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def gradients(loss, leaves):
    assert loss.dim() == 0 and torch.isfinite(loss)
    return torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)


@pytest.mark.parametrize("page", NAMES)
def test_every_section_has_code_and_a_formula(page):
    _, found = sections(page)
    assert {name: len(blocks) for name, blocks in found.items()} == {
        name: len(parts) if isinstance(parts, tuple) else 1 for name, parts in formulas(page).items()
    }
    assert all(found.values())


@pytest.mark.parametrize("page, name, number", CASES, ids=[f"{page}-{name}-{number}" for page, name, number in CASES])
def test_the_code_has_the_formula_s_value_and_gradient(page, name, number, own_divergences):
    given = inputs()
    leaves = {key: x for key, x in given.items() if isinstance(x, torch.Tensor) and x.requires_grad}
    names = dict(given)
    setup, found = sections(page)
    for code in [*setup, *found[name][: number + 1]]:
        exec(code, names)

    formula = formulas(page)[name]
    formula = formula[number] if isinstance(formula, tuple) else formula
    wanted = formula(SimpleNamespace(**given))
    gradient_only = isinstance(wanted, tuple)
    wanted = wanted[0] if gradient_only else wanted
    if not gradient_only:
        torch.testing.assert_close(names["loss"].double(), wanted, rtol=1e-9, atol=1e-11)
    found_gradients, wanted_gradients = gradients(names["loss"], leaves), gradients(wanted, leaves)
    moved = 0
    for key, a, b in zip(leaves, found_gradients, wanted_gradients, strict=True):
        zero = torch.zeros_like(leaves[key])
        a, b = zero if a is None else a, zero if b is None else b
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}")
        moved += int(b.abs().max() > 1e-6)
    assert moved, "the formula has no gradient: nothing was tested"


@pytest.mark.parametrize("page, name, number", CASES, ids=[f"{page}-{name}-{number}" for page, name, number in CASES])
def test_the_code_runs_in_float32(page, name, number, own_divergences):
    """Nothing in a recipe may rest on the dtype of the tests above."""
    given = {
        key: x.detach().float().requires_grad_(x.requires_grad) if is_float(x) else x for key, x in inputs().items()
    }
    leaves = {key: x for key, x in given.items() if isinstance(x, torch.Tensor) and x.requires_grad}
    wide = {key: x.detach().double() if is_float(x) else x for key, x in given.items()}
    names = dict(given)
    setup, found = sections(page)
    for code in [*setup, *found[name][: number + 1]]:
        exec(code, names)
    formula = formulas(page)[name]
    wanted = (formula[number] if isinstance(formula, tuple) else formula)(SimpleNamespace(**wide))
    if not isinstance(wanted, tuple):
        torch.testing.assert_close(names["loss"].double(), wanted, rtol=1e-4, atol=1e-6)
    for x, gradient in zip(leaves.values(), gradients(names["loss"], leaves), strict=True):
        assert gradient is None or gradient.dtype == x.dtype and torch.isfinite(gradient).all()


REFERENCE = PAGES.parent
LINK = re.compile(r"\[([^]]*)\]\(([^)]*)\)")


def table(text):
    """The rows of a page's last table: cells of each, without head and rule."""
    rows = [line.strip().strip("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.split(" | ")] for row in rows if not set(row) <= set("-| ")]


def public(name):
    """The thing that `kd.name` stands for."""
    value = kd
    for part in name.split("."):
        value = getattr(value, part)
    return value


PAPERS = [row for row in table((REFERENCE / "papers.md").read_text()) if row[0] != "paper"]


@pytest.mark.parametrize("paper, archive, call, recipe", PAPERS, ids=[row[0] for row in PAPERS])
def test_a_paper_s_call_is_in_its_recipe(paper, archive, call, recipe):
    ((number, address),) = LINK.findall(archive)
    assert re.fullmatch(r"\d{4}\.\d{4,5}", number) and address == f"https://arxiv.org/abs/{number}"
    # The year of the archive's number, which is the first version's.
    assert re.search(r"\d{4}$", paper)[0] == f"20{number[:2]}"

    ((title, target),) = LINK.findall(recipe)
    page, _, name = target.partition("#")
    _, found = sections(Path(page).stem)
    assert (REFERENCE / page).exists() and anchor(title) == name
    setup = sections(Path(page).stem)[0]
    code = "\n".join([*setup, *found[name]])
    names = re.findall(r"`kd\.([\w.]+)`", call)
    assert names or call == "PyTorch"
    for each in names:
        public(each)
        assert re.search(rf"\b{each.rpartition('.')[2]}\b", code), f"{each} is not in the code of {name}"
    if call == "PyTorch":
        assert "kd." not in "\n".join(found[name]), "the recipe has a call: name it"


def test_no_paper_stands_twice():
    numbers = [row[1] for row in PAPERS]
    assert numbers == sorted(numbers, key=lambda link: LINK.findall(link)[0][0]) and len(set(numbers)) == len(numbers)


def test_every_recipe_has_a_source():
    for page in NAMES:
        for part in re.split(r"^## ", (PAGES / f"{page}.md").read_text(), flags=re.M)[1:]:
            title = part.splitlines()[0]
            assert re.search(r"^- (Paper|Papers|Source): ", part, flags=re.M) or "no trainer" in part, title


def logits(**options):
    return torch.randn(3, 5, requires_grad=True), {"teacher": torch.randn(3, 5), **options}


# Calls that the table says do not work yet, beside missing names and arguments: each must be refused.
REFUSED: dict = {}


def test_the_table_of_what_is_not_there_yet_is_true():
    text = (REFERENCE / "recipes.md").read_text().split("## Not there yet")[1]
    arguments = inspect.signature(kd.kd_loss).parameters
    refused = set(REFUSED)
    for wanted, *_ in table(text):
        names = re.findall(r"`kd\.(\w+)`", wanted)
        words = re.findall(r"`(\w+)=`", wanted)
        if wanted == "wanted" or wanted.startswith("NeMo-RL"):
            continue
        assert names or words or wanted in refused, wanted
        assert not any(hasattr(kd, name) for name in names) and not set(words) & set(arguments), wanted
    for make in REFUSED.values():
        student, options = make()
        with pytest.raises((TypeError, ValueError)):
            kd.kd_loss(student, **options)


def test_a_page_that_sends_to_what_is_not_there_yet_is_named_there():
    text = (REFERENCE / "recipes.md").read_text().split("## Not there yet")[1]
    pages = [page for page in (REFERENCE / "recipes").glob("*.md") if "#not-there-yet" in page.read_text()]
    assert not [page.name for page in pages if f"recipes/{page.name}" not in text]


def test_log_probabilities_may_be_passed_as_logits():
    given = inputs()
    student, teacher = given["student"], given["teacher"]
    for T in (1.0, 3.0):
        direct, through = (kd.kd_loss(s, teacher, temperature=T) for s in (student, student.log_softmax(-1)))
        torch.testing.assert_close(direct, through)
        one, two = (torch.autograd.grad(loss, student)[0] for loss in (direct, through))
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("change", ["temperature=2.5", 'reduction="sum"', "scale_by_t_squared=False"])
def test_a_changed_recipe_is_noticed(change):
    code = sections("divergences")[1]["forward-kl"][0]
    key = change.partition("=")[0]
    changed = re.sub(rf"{key}=[^,)]+", change, code) if key in code else code.replace(")", f", {change})")
    assert changed != code
    given = inputs()
    names = {**given, "kd": kd}
    exec(changed, names)
    wanted = formulas("divergences")["forward-kl"](SimpleNamespace(**given))
    assert not torch.isclose(names["loss"], wanted)


def test_every_name_that_the_pages_use_is_public():
    pages = [*PAGES.glob("*.md"), REFERENCE / "papers.md", REFERENCE.parent / "guide" / "choosing.md"]
    for page in pages:
        for name in re.findall(r"\bkd\.((?:onpolicy\.|alignment\.)?\w+)", page.read_text()):
            assert public(name) is not None, f"{page.name}: {name}"
        for name in re.findall(r"`onpolicy\.(\w+)", page.read_text()):
            assert name in kd.onpolicy.__all__, f"{page.name}: {name}"
