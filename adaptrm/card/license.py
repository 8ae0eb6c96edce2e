"""The license of a base model, as its own card states it, and what it asks of models that are made from it."""

import re
from dataclasses import dataclass
from pathlib import Path

from adaptrm.errors import InputError
from adaptrm.yaml_text import read_yaml

LARGEST = 1 << 20  # bytes of a card that are read
ID = re.compile(r"[\w.+-]{1,64}", re.ASCII)
LINK = re.compile(r"https://[\w./%~#?=&+-]{1,200}", re.ASCII)
FIELDS = {"license": ID, "license_name": ID, "license_link": LINK}


@dataclass(frozen=True)
class Duty:
    """What a license asks of whoever hands on a model that was made from one under it.

    Attributes:
        model: whose license this is.
        prefix: with what the name of the new model has to begin.
        shown: what has to be displayed.
        text: address of the license.
    """

    model: str
    prefix: str
    shown: str
    text: str

    @property
    def title(self) -> str:
        return f"{self.model} Community License"

    @property
    def notice(self) -> str:
        """The attribution notice, word for word."""
        return f"{self.model} is licensed under the {self.title}, Copyright © Meta Platforms, Inc. All Rights Reserved."


_META = "https://github.com/meta-llama/llama-models/blob/main/models"
# By sections 1.b.i and 1.b.iii of each, under the names that the hub has for them.
DUTIES = {
    "llama3": Duty(
        *("Meta Llama 3", "Llama 3", "Built with Meta Llama 3"),
        "https://github.com/meta-llama/llama3/blob/main/LICENSE",
    ),
    "llama3.1": Duty("Llama 3.1", "Llama", "Built with Llama", f"{_META}/llama3_1/LICENSE"),
    "llama3.2": Duty("Llama 3.2", "Llama", "Built with Llama", f"{_META}/llama3_2/LICENSE"),
    "llama3.3": Duty("Llama 3.3", "Llama", "Built with Llama", f"{_META}/llama3_3/LICENSE"),
}


@dataclass(frozen=True)
class License:
    """The fields of a card.

    Attributes:
        license: as the hub names it, ``other`` for one that it has no name for.
        license_name, license_link: of such a one.
    """

    license: str
    license_name: str | None = None
    license_link: str | None = None

    @property
    def name(self) -> str:
        return self.license_name if self.license == "other" and self.license_name else self.license

    @property
    def duty(self) -> Duty | None:
        return DUTIES.get(self.name.lower())


def license_of(folder: Path | None) -> License | None:
    """What the card in a model's folder states; None where it states nothing, for nothing is made up."""
    card = folder and folder / "README.md"
    if not card or not card.is_file():
        return None
    with card.open("rb") as stream:
        first, *lines = stream.read(LARGEST).decode("utf-8", "replace").splitlines() or [""]
    ends = [number for number, line in enumerate(lines) if line.rstrip() == "---"]
    if first.rstrip() != "---" or not ends:
        return None
    try:
        matter = read_yaml("\n".join(lines[: ends[0]]), str(card))
    except InputError:  # the card of somebody else, which need not be what we read
        return None
    found = {name: matter.get(name) for name in FIELDS} if isinstance(matter, dict) else {}
    stated = {name: x for name, x in found.items() if isinstance(x, str) and FIELDS[name].fullmatch(x)}
    return License(**stated) if "license" in stated else None
