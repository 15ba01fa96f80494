"""Dotted paths of the fields of a pydantic model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from catalog.spec.model_fields import fields_of, models_in, plain_types


class Inner(BaseModel):
    depth: int


class Group(BaseModel):
    inner: Inner | None
    size: float


class Other(BaseModel):
    size: Literal["auto"]


class Request(BaseModel):
    group: Annotated[Group | Other, Field(description="One of two models.")]
    items: list[Inner]
    name: str


def test_groups_come_before_their_fields() -> None:
    assert [path for path, _ in fields_of(Request)] == [
        "group",
        "group.inner",
        "group.inner.depth",
        "group.size",
        "group.size",  # of the other model
        "items",
        "name",
    ]


def test_outer_fields_come_first() -> None:
    assert [path for path, _ in fields_of(Request, outer_first=True)] == [
        "group",
        "items",
        "name",
        "group.inner",
        "group.size",
        "group.inner.depth",
        "group.size",  # of the other model
    ]


def test_annotations_and_unions_are_resolved() -> None:
    annotation = Annotated[int | Annotated[Group, Field()] | list[Inner] | None, Field()]

    assert list(plain_types(annotation)) == [int, Group, list[Inner], type(None)]
    assert list(models_in(annotation)) == [Group]
