from __future__ import annotations

import numpy as np

from lorank.report.grid import grid_of


def test_llama_modules_stand_in_blocks_and_projections() -> None:
    names = [f"model.layers.{i}.{part}" for i in range(11) for part in ("self_attn.q_proj", "mlp.up_proj")]
    grid = grid_of(names)
    assert grid.rows == tuple(map(str, range(11)))
    assert grid.columns == ("q_proj", "up_proj")
    assert grid.cells["model.layers.10.mlp.up_proj"] == (10, 1)


def test_names_that_share_an_ending_stay_apart_and_modules_without_a_block_have_a_row() -> None:
    names = [
        "bert.encoder.layer.0.attention.self.query",
        "bert.encoder.layer.0.attention.output.dense",
        "bert.encoder.layer.0.output.dense",
        "bert.pooler.dense",
    ]
    grid = grid_of(names)
    assert grid.rows == ("0", "–")
    assert len(set(grid.cells.values())) == 4
    assert grid.columns[:2] == ("query", "attention.output.dense")


def test_encoder_and_decoder_have_rows_of_their_own() -> None:
    grid = grid_of(["encoder.block.0.q", "decoder.block.0.q"])
    assert grid.rows == ("encoder.block.0", "decoder.block.0")


def test_values_leave_gaps_where_no_module_stands() -> None:
    grid = grid_of(["a.0.q", "a.1.q", "a.1.k"])
    values = grid.values({"a.0.q": 3, "a.1.q": 0, "a.1.k": 2})
    assert np.isnan(values[0, 1])
    assert values[1].tolist() == [0, 2]
