"""The texts as data: their sections and fenced blocks, each with the place where it stands."""

import dataclasses
import re

from harness import PROJECT, REPOSITORY

GOES_ON = "goes on"
OWN_SWARM = "in a swarm of its own"
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
        """Return where a line of the block stands; 0 is the fence, 1 the first line within."""
        return f"{self.text}:{self.line + line}"

    @property
    def is_run(self):
        return self.kind == "sh" and self.mark in {"", "fails"}


@dataclasses.dataclass
class Section:
    """What stands below a heading of the second level; `marks` are those below the heading."""

    text: str
    heading: str
    marks: set = dataclasses.field(default_factory=set)
    blocks: list = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Unit:
    """A section with those that go on from it; a reader's one sitting, which needs no other."""

    sections: list

    @property
    def blocks(self):
        return [block for section in self.sections for block in section.blocks]

    @property
    def in_own_swarm(self):
        return OWN_SWARM in self.sections[0].marks

    @property
    def name(self):
        """Return the link that leads to its heading, from the folder that holds the rooms."""
        first = self.sections[0]
        room = first.text.removeprefix(f"{PROJECT.relative_to(REPOSITORY)}/")
        return f"{room}#{anchor(first.heading)}"


def anchor(heading):
    """Return what GitHub makes of a heading for links to it."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def texts():
    """Return the paths, from the top folder, of all texts there and of each room's own."""
    files = {*REPOSITORY.glob("*.md"), *REPOSITORY.glob(".github/**/*.md")}
    files |= {*PROJECT.glob("*/README.md")}
    return sorted(str(file.relative_to(REPOSITORY)) for file in files)


def read(text):
    return (REPOSITORY / text).read_text(encoding="utf-8")


def sections(text):
    """Return each Section of a text; what stands before the first heading belongs to the title."""
    found = [Section(text, "top")]
    lines = read(text).splitlines()
    number, mark = 0, ""
    while number < len(lines):
        line = lines[number]
        number += 1
        if fence := FENCE.fullmatch(line):
            indent, kind = fence.groups()
            end = lines.index(f"{indent}```", number)
            body = "".join(f"{one.removeprefix(indent)}\n" for one in lines[number:end])
            found[-1].blocks.append(Block(text, number, mark, kind, body))
            number = end + 1
        elif line.startswith("## "):
            found.append(Section(text, line.removeprefix("## ")))
        comment = COMMENT.fullmatch(line)
        mark = comment[1] if comment else ""
        if mark in {GOES_ON, OWN_SWARM}:
            found[-1].marks.add(mark)
    return found


def blocks(text):
    return [block for section in sections(text) for block in section.blocks]


def units(*texts):
    """Return each Unit of these texts that has a command to run."""
    found = []
    for text in texts:
        for section in sections(text):
            if GOES_ON in section.marks:
                found[-1].sections.append(section)
            else:
                found.append(Unit([section]))
    return [unit for unit in found if any(block.is_run for block in unit.blocks)]


def written_in(text, name):
    """Return a file's lines: of the one at a path, or of the Dockerfile that `step N` writes."""
    if not name.startswith("step "):
        return read(name).splitlines()
    (step,) = re.findall(rf"(?ms)^### {name}\b.*?(?=^##|\Z)", read(text), re.I)
    (dockerfile,) = re.findall(r"(?ms)^cat >\S*Dockerfile <<'EOF'\n(.*?)^EOF$", step)
    return dockerfile.splitlines()


def changed(lines, diff):
    """Return `lines` as a diff changes them; lines that stay need not be shown.

    Raises ValueError, with the line, where one that the diff shows is not there in this order.
    """
    rest, made = list(lines), []
    for line in diff:
        sign, content = line[:1], line[1:]
        if sign == "+":
            made.append(content)
            continue
        if content not in rest:
            raise ValueError(line)
        place = rest.index(content)
        made += rest[:place]
        del rest[: place + 1]
        if sign != "-":
            made.append(content)
    return made + rest


def prose(text):
    """Return a text without its fenced blocks."""
    return re.sub(r"(?ms)^ *```.*?^ *```$", "", read(text))


def broken_links(text):
    """Return the links of a text that lead to no file of the repository, or to no heading."""
    broken = []
    for target in re.findall(r"\]\((?!\w+:)([^)]+)\)", prose(text)):
        path, _, heading = target.partition("#")
        file = ((REPOSITORY / text).parent / path).resolve() if path else REPOSITORY / text
        if not file.exists():
            broken.append(target)
        elif heading:
            headings = re.findall(r"(?m)^#+ (.*)$", prose(str(file)))
            if heading not in map(anchor, headings):
                broken.append(target)
    return broken
