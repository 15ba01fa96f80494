"""JSON schemas in words, for the reference pages and the help of options."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

Json = Mapping[str, Any]
REFERENCE = "#/components/schemas/"
NULL = {"type": "null"}


def type_of(schema: Json, link: Callable[[str], str] | None = None) -> str:
    """Return the type and the limits. link: writes the name of another schema; None: the type omits null."""
    alternatives = [*schema.get("anyOf", ()), *schema.get("oneOf", ()), *schema.get("allOf", ())]
    if alternatives:
        return _alternatives(schema, alternatives, link)
    if link is not None and "$ref" in schema:
        return link(schema["$ref"].removeprefix(REFERENCE))
    if "const" in schema or "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    match schema.get("type", "any"):
        case "integer" | "number" as kind:
            limits = number_limits(schema)
            text = f"{kind}, {limits}" if limits else kind
        case "array":
            text = f"list{_count(schema, 'Items', 'items')}; each: {type_of(schema.get('items', {}), link)}"
        case "object":
            text = _object(schema, link)
        case "string":
            text = {"path": "path", "binary": "bytes"}.get(schema.get("format", "")) or _characters(schema)
        case kind:
            text = kind
    return text


def _alternatives(schema: Json, alternatives: list[Json], link: Callable[[str], str] | None) -> str:
    shown = [part for part in alternatives if part != NULL]
    common = {key: schema[key] for key in ("maxProperties", "propertyNames") if key in schema}
    texts = [type_of({**part, **common} if part.get("type") == "object" else part, link) for part in shown]
    texts += ["null"] if len(shown) < len(alternatives) and link is not None else []
    return ("; or " if any(sign in text for text in texts for sign in (",", ";")) else " or ").join(texts)


def _object(schema: Json, link: Callable[[str], str] | None) -> str:
    values: Json | bool = schema.get("additionalProperties") or next(
        iter(schema.get("patternProperties", {}).values()), {}
    )
    text = f"object{_count(schema, 'Properties', 'pairs')}"
    if not isinstance(values, Mapping) or not values:
        return text
    return f"{text}; keys: {_characters(schema.get('propertyNames', {}))}; values: {type_of(values, link)}"


def _characters(schema: Json) -> str:
    lowest, highest = schema.get("minLength"), schema.get("maxLength")
    if highest is not None:
        return f"string, {lowest:,} to {highest:,} characters" if lowest else f"string, at most {highest:,} characters"
    return "string"


def _count(schema: Json, of: str, noun: str) -> str:
    least, most = schema.get(f"min{of}"), schema.get(f"max{of}")
    if most is None:
        return ""
    return f" of {least:,} to {most:,} {noun}" if least else f" of at most {most:,} {noun}"


def number_limits(schema: Json) -> str | None:
    """Return the limits of a number in words; None if it has none."""
    match schema:
        case {"minimum": lowest, "maximum": highest}:
            return f"{number(lowest)} to {number(highest)}"
        case {"minimum": lowest, "exclusiveMaximum": bound}:
            return f"{number(lowest)} to below {number(bound)}"
        case {"exclusiveMinimum": bound, "maximum": highest}:
            return f"above {number(bound)}, at most {number(highest)}"
        case {"minimum": lowest}:
            return f"at least {number(lowest)}"
        case {"exclusiveMinimum": bound}:
            return f"above {number(bound)}"
        case _:
            return None


def number(value: float) -> str:
    """Return 1,000,000 or 1e-37."""
    if value == int(value) and value < 1e15:
        return f"{int(value):,}"
    return f"{value:g}".replace("e+", "e").replace("e-0", "e-")


def cell(text: str) -> str:
    """Return a text for one cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def references(part: object) -> Iterator[str]:
    """Yield the names of the schemas that a part of an OpenAPI document refers to."""
    if isinstance(part, Mapping):
        if isinstance(reference := part.get("$ref"), str):
            yield reference.removeprefix(REFERENCE)
        for value in part.values():
            yield from references(value)
    elif isinstance(part, list):
        for value in part:
            yield from references(value)
