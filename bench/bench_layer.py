"""What routing adds to a Llama layer 2048 wide, as a share of the layer that it saves work in.

The layer runs on the rows that were kept. It has an input norm and a final addition of its own,
which the glue replaces: `own_parts` copies the bytes of those two in fused form, 2K + 3K rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cells import BF16, THREADS, Cell, over
from inputs import Problem, Rows
from ours import chained
from peers import forward_peer, memcpy, official_of
from slot import once_per_shape
from timing import Contest, Measure
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

CELLS = [
    Cell("layer", "llava_next", 1, ratio, 2048, BF16, threads)
    for ratio in (0.5, 0.15)
    for threads in THREADS
]


def llama_layer(num_rows: int) -> Callable[[Tensor], Tensor]:
    """A dense layer with random weights, for one sequence of so many rows."""
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_attention_heads=32,
        num_hidden_layers=1,
        vocab_size=32,
    )
    config._attn_implementation = "sdpa"
    layer: Any = LlamaDecoderLayer(config, 0).to(BF16).eval()
    positions = torch.arange(num_rows)[None]
    embeddings = LlamaRotaryEmbedding(config)(torch.empty(1, dtype=BF16), positions)
    return lambda rows: layer(rows[None], position_ids=positions, position_embeddings=embeddings)


@once_per_shape
def overhead(cell: Cell) -> Contest:
    problem, moved = Problem(cell), cell.moved(n=2, k=3)
    layer = llama_layer(cell.kept)
    half = torch.ones(cell.moved(k=2.5) // cell.dtype.itemsize, dtype=cell.dtype)
    peers: dict[str, Callable[[Rows], Any]] = {
        "layer": lambda rows: layer(rows.update),
        "own_parts": lambda rows: half.clone(),
        "official": forward_peer(official_of(problem), problem),
        "memcpy": memcpy,
    }
    return Contest(
        problem.copies("x", "residual", "update", moved=moved),
        chained(problem),
        peers,
        moved,
        unlike=frozenset({"layer", "own_parts", "memcpy"}),
    )


@over(CELLS)
def bench_layer(measure: Measure, cell: Cell) -> None:
    measure(cell, overhead(cell), 4.0)
