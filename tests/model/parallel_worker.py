"""One rank of a model that several processes share: `torchrun parallel_worker.py HOW FOLDER`."""

from __future__ import annotations

import sys
from typing import Any

import torch
from model.backbones import pad_left, text_rows
from model.caches import cache_of
from torch import distributed
from transformers.distributed.configuration_utils import DistributedConfig

from pmod_model import load_pretrained, record_routing

SIZES = {"tensor": "tp_size", "pipeline": "pp_size"}


def generated(model: Any) -> tuple[torch.Tensor, list[Any]]:
    out = model.generate(
        **pad_left(text_rows()),
        max_new_tokens=6,
        do_sample=False,
        suppress_tokens=[0],
        return_dict_in_generate=True,
    )
    keys = [getattr(layer, "keys", None) for layer in cache_of(out).layers]
    return out.sequences, [None if k is None else list(k.shape) for k in keys]


def router_gradients(model: Any) -> dict[str, torch.Tensor]:
    batch = pad_left(text_rows())
    labels = batch["input_ids"].masked_fill(batch["target_mask"], -100)
    with record_routing(model) as records:
        model(**batch, labels=labels).loss.backward()
    assert records[0].kept.keys() == {1, 2, 3}
    return {name: p.grad for name, p in model.named_parameters() if "mod_router" in name}


def main(how: str, folder: str) -> None:
    distributed.init_process_group("gloo")
    try:
        rank = distributed.get_rank()
        alone = load_pretrained(folder)
        shared = load_pretrained(folder, distributed_config=DistributedConfig(**{SIZES[how]: 2}))
        tokens, expected = generated(alone)
        got, keys = generated(shared)
        assert torch.equal(got, tokens)
        if how == "pipeline":
            half = slice(2, 4) if rank else slice(0, 2)
            assert keys[half] == expected[half]
            assert keys.count(None) == 2
        else:
            # each rank has one of two key heads
            assert keys == [[batch, heads // 2, *rest] for batch, heads, *rest in expected]
            grads, plain = router_gradients(shared), router_gradients(alone)
            for name, grad in plain.items():
                # float32 sums in another order, amplified by a few layers
                scale = max(float(grad.abs().max()), 1e-3)
                assert (grads[name] - grad).abs().max() <= 1e-4 * scale, name
        print("rank", rank, "agrees")
    finally:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
