"""Expansion of `~`, `${NAME}` and `${NAME:-default}` in user input, once, where the input enters the program.

Recipes, `--set` and every option that takes a path go through `expand`, so the same text has the same meaning
everywhere. Credentials are removed from URLs at the same place, see `remote`.
"""

import os
import re

from zipar_train.io import safe_yaml
from zipar_train.io.remote import conceal

SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^{}]*))?\}")
_HOME = re.compile(r"~[A-Za-z0-9._-]*(?=/)")


def expand(text: str) -> str:
    """Replace environment variables, then a leading `~/` or `~name/` by the home folder; conceal credentials.

    As in a shell, `${NAME:-default}` is the default if NAME is unset or empty.

    Raises:
        ValueError: If a variable is unset or empty and has no default, if its name suggests a secret, if the home
            folder does not exist, or if the text or a variable contains control characters.
    """
    if safe_yaml.unprintable(text):
        raise ValueError("it holds a character that cannot be printed. Remove it.")

    def replace(match: re.Match[str]) -> str:
        name, default = match.groups()
        if SECRET.search(name):
            raise ValueError(f"a recipe is written into run folders; keep ${name} out of it.")
        found = os.environ.get(name) or default
        if found is None:
            state = "is empty" if name in os.environ else "is not set"
            raise ValueError(f"the environment variable {name} {state}. Set it, or write ${{{name}:-default}}.")
        if safe_yaml.unprintable(found):
            raise ValueError(
                f"the environment variable {name} is {found!r}, and holds a character that cannot be printed. Set it "
                "without; a carriage return comes from a file with the line ends of Windows."
            )
        return found

    expanded = _VARIABLE.sub(replace, text)
    if "${" in expanded:
        raise ValueError("write variables as ${NAME}, or ${NAME:-default} without braces.")
    if (home := _HOME.match(expanded)) is None:
        return conceal(expanded)
    found = os.path.expanduser(home[0])
    if found == home[0]:
        raise ValueError(f"{home[0]} is the home folder of nobody here. Write the whole path, or ./{home[0]}.")
    return found + expanded[home.end() :]
