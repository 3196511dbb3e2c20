"""Elements of XML files with their line numbers, one after the other, in little memory."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from xml.parsers import expat

from detr_dist.errors import DataError

_BYTES_AT_A_TIME = 2**16


@dataclass(slots=True)
class Element:
    """One element of an XML file, complete with the elements in it."""

    tag: str
    attributes: dict[str, str]
    line: int
    text: str = ""
    children: list["Element"] = field(default_factory=list)

    def all(self, tag: str) -> list["Element"]:
        """Return the elements of a tag directly in this one."""
        return [child for child in self.children if child.tag == tag]

    def first(self, *tags: str) -> "Element | None":
        """Return the first element along a path of tags; None if there is none."""
        found: Element | None = self
        for tag in tags:
            found = next(iter(found.all(tag)), None) if found is not None else None
        return found

    def text_of(self, *tags: str) -> str:
        """Return the text of the first element along a path of tags, without white space around it."""
        found = self.first(*tags)
        return found.text.strip() if found is not None else ""


class _EntityError(Exception):
    pass


def root_tag(path: Path) -> str:
    """Return the tag of the outermost element of an XML file.

    Raises:
        DataError: it is not an XML file.
    """
    return next(read_elements(path, depth=0, at_start=True)).tag


def read_elements(path: Path, depth: int, *, at_start: bool = False) -> Iterator[Element]:
    """Yield the elements inside `depth` others: complete, or without their content `at_start`.

    Declarations of entities are refused, since a few of them can expand to any size.

    Raises:
        DataError: the file cannot be read, or is not XML.
    """
    ready: list[Element] = []
    opened: list[Element] = []
    parser = expat.ParserCreate()
    parser.buffer_text = True

    def start(tag: str, attributes: dict[str, str]) -> None:
        element = Element(tag, attributes, parser.CurrentLineNumber)
        if len(opened) > depth:
            opened[-1].children.append(element)
        elif len(opened) == depth and at_start:
            ready.append(element)
        opened.append(element)

    def end(_: str) -> None:
        element = opened.pop()
        if len(opened) == depth and not at_start:
            ready.append(element)

    def characters(text: str) -> None:
        if len(opened) > depth:
            opened[-1].text += text

    def entity(*_: object) -> None:
        raise _EntityError

    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler, parser.EntityDeclHandler = characters, entity
    try:
        with path.open("rb") as file:
            while part := file.read(_BYTES_AT_A_TIME):
                parser.Parse(part)
                yield from ready
                ready.clear()
            parser.Parse(b"", True)
            yield from ready
    except expat.ExpatError as error:
        reason = expat.ErrorString(error.code)
        raise DataError(f"{path}:{error.lineno}: broken XML: {reason}; export it again") from None
    except _EntityError:
        line = parser.CurrentLineNumber
        raise DataError(
            f"{path}:{line}: declares an XML entity, which is refused; remove its DOCTYPE"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; check it and its permissions") from None
    except (LookupError, ValueError) as error:
        raise DataError(f"{path}: cannot be decoded: {error}; save it in UTF-8") from None
