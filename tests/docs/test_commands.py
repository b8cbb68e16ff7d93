"""Every command, option, recipe key and path that the documentation names is one; nothing is run."""

import ast
import inspect
import re
import shlex

import pytest
from command_lines import NAME, check, check_fragment, check_overrides, commands, invocations, lines_of
from pages import ROOT, blocks, blocks_of, prose_of, read, spans, spans_of

import zipar_train
from zipar_train.recipe.schema import Recipe, RecipeError

FOREIGN = {  # what belongs to other programs
    "--gpt-ckpt": "LlamaGen's own scripts",
    "--from-fsdp": "LlamaGen's own scripts",
    "evaluations/evaluator.py": "ADM's evaluator",
    "log.txt": "a file of a sweep's trial, not a key",
}
VERBS = {words[0] for words in commands(False)}
SECTIONS = "|".join(name for name, field in Recipe.model_fields.items() if hasattr(field.annotation, "model_fields"))
KEY = re.compile(rf"((?:{SECTIONS}|trainer)\.[a-z_.]+)(?:(?:=|: )(.+))?")
PATH = re.compile(r"(?:tests|scripts|recipes|docs|zipar_train)/[\w./-]+|[\w./-]+/[\w-]+\.py")


def of_shell():
    return [(block, line) for block in blocks("sh", "bash", "console") for line in lines_of(block.text)]


def inline(kind):
    """The inline code of a kind: calls of the program, commands without its name, options alone."""
    found = []
    for span in spans():
        words = span.text.split()
        called = NAME in words[:-1]
        verb = not called and words[0] in VERBS and len(words) > 1
        option = span.text.startswith("--") and words[0] not in FOREIGN
        if {"call": called, "verb": verb, "option": option}[kind]:
            found.append(span)
    assert found
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("block", "line"), of_shell(), ids=lambda value: str(value)[:80])
def test_lines_of_shell_blocks_are_command_lines(block, line):
    for words in invocations(line):
        check(words)


@pytest.mark.parametrize("span", inline("call"), ids=str)
def test_inline_calls_are_command_lines(span):
    assert [check(words, whole=False) for words in invocations(span.text)]


@pytest.mark.parametrize("span", inline("verb"), ids=str)
def test_inline_commands_are_some(span):
    check(shlex.split(span.text), whole=False)


@pytest.mark.parametrize("span", inline("option"), ids=str)
def test_inline_options_belong_to_a_command(span):
    check_fragment(shlex.split(span.text))


@pytest.mark.slow
def test_recipe_keys_are_some():
    found = [
        (span, key[1], key[2]) for span in spans() if (key := KEY.fullmatch(span.text)) and span.text not in FOREIGN
    ]
    assert len(found) > 40
    for span, key, value in found:
        try:
            check_overrides([f"{key}={value or '...'}"], None)
        except RecipeError as error:
            if f"  {key} = " in str(error) or "not a section" in str(error):  # else another key must change with it
                pytest.fail(f"{span}: {error}")


def test_paths_of_the_checkout_exist():
    texts = [(span, span.text) for span in spans()] + [(block, line) for block, line in of_shell()]
    found = [(place, path) for place, text in texts for path in text.split() if PATH.fullmatch(path)]
    assert len(found) > 20
    for place, path in found:
        folders = (ROOT, ROOT / "zipar_train", ROOT / "tests")
        assert path in FOREIGN or any((folder / path).exists() for folder in folders), f"{place}: {path}"


def test_inline_python_calls_what_exists():
    """Calls of the public API bind to its signatures; a bare `*` is how documentation marks keywords."""
    checked = 0
    for span in spans():
        try:
            tree = ast.parse(span.text.replace("*, ", ""), mode="eval").body
        except SyntaxError:
            continue
        if not isinstance(tree, ast.Call):
            continue
        first, *rest = ast.unparse(tree.func).split(".")
        if first not in zipar_train.__all__:
            continue
        called = getattr(zipar_train, first)
        for name in rest:
            called = getattr(called, name)
        given = [argument for argument in tree.args if ast.unparse(argument) != "..."]
        signature = inspect.signature(called)
        try:
            signature.bind_partial(*given, **{keyword.arg: None for keyword in tree.keywords if keyword.arg})
        except TypeError as error:
            pytest.fail(f"{span}: {error}; it is {signature}")
        checked += 1
    assert checked > 5


def test_commands_stand_in_fenced_blocks():
    """Of indented blocks, a fence says the language; without it, nothing checks them."""
    for page in {block.page for block in blocks()}:
        for line in prose_of(read(page), page).split("\n"):
            assert not re.match(rf" {{4}}(\S+=\S+ )*({NAME}|wandb|torchrun|scripts/)", line), f"{page}: {line}"


def test_pages_are_taken_apart_with_their_lines():
    page = "a `b` and ``c ` d``\n```sh\nx `y`\n```\n\n````python more words\n```\n````\n`two\nlines`\n"
    first, second = blocks_of(page, "p")
    assert (first.line, first.language, first.text, first.name) == (2, "sh", "x `y`\n", ("p", "x `y`"))
    assert (second.line, second.language, second.words, second.text) == (6, "python", "more words", "```\n")
    assert [(span.line, span.text) for span in spans_of(page, "p")] == [(1, "b"), (1, "c ` d"), (9, "two lines")]
    with pytest.raises(ValueError, match="p:1: the block is not closed"):
        blocks_of("```sh\nx", "p")


def test_calls_are_found_behind_launchers():
    (line,) = lines_of("A=1 torchrun --nproc-per-node=8 --no-python zipar-train fit \\\n  --recipe x | tee log  # c\n")
    assert invocations(line) == [["fit", "--recipe", "x"]]
    assert invocations("cd x; zipar-train recipes > zipar-train && zipar-train plan") == [
        ["recipes"],
        ["plan"],
    ]
    with pytest.raises(ValueError, match="'sudo' stands before"):
        invocations("sudo zipar-train recipes")


@pytest.mark.parametrize(
    "line",
    [
        "fits --recipe digits",
        "shards --recipe digits",
        "fit",
        "fit --recipe digitz",
        "fit --recipe digits --resumed",
        "fit --recipe digits --set optim.rate=1",
        "fit --recipe digits --set optim.rate=...",
        "fit --recipe digits --set trainer.epochs=N",
        "fit --recipe digits --set optim.lr=fast",
        "fit --recipe digits --allow-change optim.rate",
        "plan --recipe digits --window wide",
        "plan --recipe digits --window 9",
        "plan --recipe digits --windows 8,9",
        "plan --recipe digits --windows 8;4",
        "evaluate --recipe digits",
        "generate --recipe digits --labels 10 --out x.png",
        "generate --recipe digits --caption dog --out x.png",
        "generate --checkpoint runs/digits --recipe digits --labels 1 --out x.png",
        "generate --checkpoint runs/digits --set sampling.guidance=1 --labels 1 --out x.png",
        "export --recipe digits --out x --to pytorch",
        "tokenize --recipe digits --images x --out y --views two",
        "sweep --recipe digits --file recipes/sweeps/none.yaml",
        "doctor --checks disks",
    ],
)
def test_wrong_lines_are_noticed(line):
    with pytest.raises(Exception, match="."):
        check(line.split())


@pytest.mark.parametrize(
    "line",
    [
        "fit --recipe NAME --set KEY=VALUE",
        "fit --recipe digits --set seed=$s --set run_dir=runs/$s",
        "fit --recipe digits --set trainer.max_time=... --allow-change data.train",
        "evaluate ...",
        "COMMAND --help",
        "generate --checkpoint PATH --labels 3 --out x.png --set model.weights=PATH",
    ],
)
def test_placeholders_are_let_through(line):
    check(line.split())
