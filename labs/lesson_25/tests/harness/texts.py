"""The texts as data: their fenced blocks, grouped into the units that are run, and their links."""

import dataclasses
import re

from harness import PROJECT, REPOSITORY

COMMENT = re.compile(r" *<!-- (.*) -->")
FENCE = re.compile(r"( *)```(\w*)")


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: its text, the line of its fence, the mark above it, its kind, its lines."""

    text: str
    line: int
    mark: str
    kind: str
    body: str

    def place(self, line=0):
        """Return the place of a line: 0 is the fence, 1 the first line in the block."""
        return f"{self.text}:{self.line + line}"

    @property
    def is_run(self):
        return self.kind == "sh" and self.mark in {"", "fails"}


@dataclasses.dataclass
class Unit:
    """What one shell runs: a section of a text, and the sections that go on from it."""

    text: str
    heading: str
    in_own_swarm: bool = False
    blocks: list = dataclasses.field(default_factory=list)

    @property
    def name(self):
        """Return the link to the heading, from the directory with app, compose and tests."""
        project = f"{PROJECT.relative_to(REPOSITORY)}/"
        return f"{self.text.removeprefix(project)}#{anchor(self.heading)}"

    def commands(self):
        """Return each block that is run, with the blocks that show what it prints."""
        found = []
        for block in self.blocks:
            if block.kind == "sh":
                found.append((block, []))
            elif found and block.kind in {"text", "diff"} and not block.mark:
                found[-1][1].append(block)
        return [(block, shown) for block, shown in found if block.is_run]


def texts():
    """Return the paths of all texts, from the repository root."""
    files = {*REPOSITORY.glob("*.md"), *REPOSITORY.glob(".github/**/*.md")}
    files |= {*PROJECT.glob("*/README.md")}
    return sorted(str(file.relative_to(REPOSITORY)) for file in files)


def read(text):
    return (REPOSITORY / text).read_text(encoding="utf-8")


def units(text):
    """Return the units of a text. The first one is what comes before the first section."""
    found = [Unit(text, "top")]
    lines = read(text).splitlines()
    number, mark, heading = 0, "", ""
    while number < len(lines):
        line = lines[number]
        number += 1
        if fence := FENCE.fullmatch(line):
            indent, kind = fence.groups()
            end = lines.index(f"{indent}```", number)
            body = "".join(f"{one.removeprefix(indent)}\n" for one in lines[number:end])
            found[-1].blocks.append(Block(text, number, mark, kind, body))
            number = end + 1
        elif line.startswith("##"):
            level, heading = line.split(" ", maxsplit=1)
            if level == "##":
                found.append(Unit(text, heading))
        comment = COMMENT.fullmatch(line)
        mark = comment[1] if comment else ""
        if mark == "continues":
            found.pop()
        elif mark == "starts here":
            found.append(Unit(text, heading))
        elif mark == "in a swarm of its own":
            found[-1].in_own_swarm = True
    return found


def anchor(heading):
    """Return the name that GitHub gives a heading in links."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def prose(text):
    """Return a text without its fenced blocks."""
    return re.sub(r"(?ms)^ *```.*?^ *```$", "", read(text))


def broken_links(text):
    """Return the links of a text to files and headings that do not exist in the repository."""
    broken = []
    for link in re.findall(r"\]\((?!\w+:)([^)]+)\)", prose(text)):
        path, _, heading = link.partition("#")
        file = ((REPOSITORY / text).parent / path).resolve() if path else REPOSITORY / text
        if not file.exists():
            broken.append(link)
        elif heading:
            headings = re.findall(r"(?m)^#+ (.*)$", prose(file))
            if heading not in map(anchor, headings):
                broken.append(link)
    return broken
