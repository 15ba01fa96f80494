"""The tables of Adafactor steps name each tile of each matrix once, whichever steps they hold."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch

from lora_core.kernels.gpu.adafactor_table import CHUNK, TILES, AdafactorStep, MatrixLayout, tables_of

SHAPES = [(4, 300), (300, 4), (5,), (130, 17), (1, 1)]


def step_of(shapes: list[tuple[int, ...]], *, plus: slice = slice(0, 0)) -> AdafactorStep:
    sizes, states = [int(np.prod(shape)) for shape in shapes], [sum(shape) for shape in shapes]
    starts, memory = np.cumsum([0, *sizes]).tolist(), np.cumsum([0, *states]).tolist()
    return AdafactorStep(
        layout=MatrixLayout.of(shapes, starts[:-1], memory[:-1]),
        p=torch.zeros(starts[-1]),
        g=torch.zeros(starts[-1]),
        v=torch.zeros(memory[-1]),
        compute=None,
        clip=0.5,
        beta2_decay=-0.8,
        clip_threshold=1.0,
        scale_floor=1e-3,
        weight_decay=0.1,
        step=4,
        rate=0.25,
        plus=plus,
        plus_rate=1.0,
    )


def test_each_tile_of_each_matrix_is_computed_once() -> None:
    steps = [step_of(SHAPES), step_of(SHAPES[:2])]

    tables = tables_of(steps)

    computed = Counter[tuple[int, int]]()
    for kind in tables.kinds:
        for position, matrix in enumerate(tables.tiles[kind.span].tolist()):
            entry = tables.entries[matrix]
            assert kind.is_tall == (entry["rows"] > entry["columns"])
            computed[matrix, position - int(entry["first_tile"])] += 1
    expected = Counter[tuple[int, int]]()
    for matrix, shape in enumerate([*SHAPES, *SHAPES[:2]]):
        rows, columns = (1, *shape)[-2:]
        height, width = TILES[rows > columns]
        expected.update((matrix, tile) for tile in range(-(-rows // height) * -(-columns // width)))
    assert computed == expected
    assert len(tables.chunks) == sum(-(-sum(shape) // CHUNK) for shape in [*SHAPES, *SHAPES[:2]])


def test_sums_of_different_matrices_do_not_overlap() -> None:
    tables = tables_of([step_of(SHAPES), step_of(SHAPES[:2])])

    taken = Counter[int]()
    for entry in tables.entries:
        of_rows, of_columns = entry["tile_columns"] * entry["rows"], entry["tile_rows"] * entry["columns"]
        length = 0 if entry["is_vector"] else int(of_rows + of_columns)
        taken.update(range(entry["partials"], entry["partials"] + length))
    assert set(taken.values()) == {1}
    assert len(taken) == tables.num_partials


def test_matrices_of_b_have_the_learning_rate_of_lora_plus() -> None:
    entries = step_of(SHAPES, plus=slice(1200, 2400)).entries()

    assert entries["decay"].tolist() == [0.975, 0.9, 0.975, 0.975, 0.975]
    assert entries["move"].tolist() == [0.25, 0.5, 0.25, 0.25, 0.25], "at most 1 / √step"
