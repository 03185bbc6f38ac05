"""What a model costs: the paper's figures, the counts against what runs, and the page."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from pmod_model.cli import main
from pmod_model.configuration import PModConfig
from pmod_model.data.errors import InputError
from pmod_model.flops import DecoderSize, kept_per_layer, linear_flops
from pmod_model.inject import find_decoder, inject_pmod
from pmod_model.presets import build_from_config, preset_config
from pmod_model.report import measure as measuring
from pmod_model.report.efficiency import Efficiency, count_efficiency, read_config
from pmod_model.report.efficiency_page import build_efficiency
from pmod_model.report.measure import cache_bytes, make_prompt, measure, peak_bytes, prefill
from pmod_model.schedule import layer_ratios

TEXT, VISION = 12, 52
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 50}


@pytest.fixture(autouse=True)
def briefly(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take no longer than it takes to measure once, on one thread."""
    monkeypatch.setattr(measuring, "ROUNDS", (1, 1))
    monkeypatch.setattr(measuring, "DECODE_STEPS", 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def of_preset(name: str) -> Efficiency:
    return count_efficiency(name, read_config(name, None))


def small_config() -> LlamaConfig:
    return LlamaConfig(**SMALL, num_hidden_layers=6, num_key_value_heads=2)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return build_from_config(small_config(), None, "cpu")


@pytest.mark.parametrize(
    ("name", "vision", "dense", "pmod", "share"),
    [
        ("llava-1.5-7b", 576, "8.38", "4.92", "53.7"),
        ("llava-next-7b", 2928, "39.46", "21.91", "53.7"),
    ],
)
def test_the_papers_tables(name: str, vision: int, dense: str, pmod: str, share: str) -> None:
    counts = of_preset(name)
    assert counts.vision_tokens == vision
    costs = (counts.dense, counts.pmod)
    assert [f"{cost.linear_flops / 1e12:.2f}" for cost in costs] == [dense, pmod]
    kv = counts.pmod.kv_bytes_vision / counts.dense.kv_bytes_vision
    assert f"{100 * kv:.1f}" == share  # version 2 of the paper
    assert f"{100 * counts.mean_ratio:.1f}" == "53.8"  # version 1
    assert counts.routed_layers == 24


def test_the_papers_next_figure_takes_the_rounded_share() -> None:
    size = DecoderSize.of(preset_config("llava-next-7b").get_text_config())
    printed = {
        tokens: f"{linear_flops(size, 58, tokens, [0.538 * tokens] * 32) / 1e12:.2f}"
        for tokens in (2928, 576)
    }
    assert printed == {2928: "21.94", 576: "4.93"}  # the paper: 21.94, 4.92


def test_dense_counts_are_those_of_the_operations_that_run() -> None:
    model = build_from_config(preset_config("llava-1.5-7b"), None, "meta")
    counts = count_efficiency("7b", model.config)
    rows = torch.empty(1, 634, 4096, device="meta", dtype=model.dtype)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        hidden = find_decoder(model)(inputs_embeds=rows, use_cache=True).last_hidden_state
        model.lm_head(hidden)
    ran = counter.get_flop_counts()["Global"]
    assert ran[torch.ops.aten.mm] == counts.dense.linear_flops


def test_routed_counts_are_those_of_the_operations_that_run(model: Any) -> None:
    prompt = make_prompt(model, TEXT, VISION)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(inputs_embeds=prompt.embeddings, target_mask=prompt.target_mask)
    counts = count_efficiency("", small_config(), text_tokens=TEXT, vision_tokens=VISION)
    assert counter.get_flop_counts()["Global"][torch.ops.aten.mm] == counts.pmod.linear_flops
    assert counts.pmod.linear_flops < counts.dense.linear_flops


def test_a_head_that_sees_one_token() -> None:
    size = DecoderSize.of(small_config())
    kept = kept_per_layer({}, 6, VISION)
    whole = linear_flops(size, TEXT, VISION, kept)
    last = linear_flops(size, TEXT, VISION, kept, head_tokens=1)
    assert whole - last == 2 * 32 * 50 * (TEXT + VISION - 1)


def test_the_measured_cache_is_the_counted_one(model: Any) -> None:
    counts = count_efficiency("", small_config(), text_tokens=TEXT, vision_tokens=VISION)
    prompt = make_prompt(model, TEXT, VISION)
    for each, cost in ((prompt, counts.pmod), (prompt.dense(), counts.dense)):
        assert cache_bytes(prefill(model, each)[1]) == cost.kv_bytes


@pytest.mark.parametrize(
    ("fields", "pools"),
    [
        ({"target_tokens": "vision_high_res"}, [2352]),
        ({"pool": "frame"}, [576, 2352]),
        ({"pool": "image"}, [2928]),
    ],
)
def test_views_of_next_have_their_own_budgets(fields: dict[str, Any], pools: list[int]) -> None:
    config = preset_config("llava-next-7b", PModConfig(**fields))
    kept = count_efficiency("", config).pmod.kept
    ratios = layer_ratios(PModConfig(**fields), 32)
    for layer in range(32):
        of_pools = [kept_per_layer({0: ratios.get(layer, 1.0)}, 1, pool)[0] for pool in pools]
        assert kept[layer] == 2928 - sum(pools) + sum(of_pools)


def test_tokens_that_stay_are_in_the_measured_prompt(model: Any) -> None:
    mask = make_prompt(model, TEXT, VISION, fixed=20).target_mask[0]
    assert mask.nonzero()[:, 0].tolist() == list(range(TEXT // 2 + 20, TEXT // 2 + VISION))


def test_dense_is_the_backbone() -> None:
    torch.manual_seed(0)
    backbone = LlamaForCausalLM(small_config()).eval()
    torch.manual_seed(0)
    injected = inject_pmod(LlamaForCausalLM(small_config()).eval(), PModConfig())
    prompt = make_prompt(injected, TEXT, VISION).dense()
    with torch.inference_mode():
        expected = backbone(inputs_embeds=prompt.embeddings, logits_to_keep=1).logits
    assert torch.equal(prefill(injected, prompt)[0], expected)


def test_peak_memory_is_what_was_held_at_once() -> None:
    def work() -> torch.Tensor:
        first = torch.empty(1000)
        second = torch.empty(500)
        del first
        return torch.cat((second, second[:100]))

    assert peak_bytes(work) == 4 * 1500
    assert peak_bytes(lambda: None) == 0


def test_measuring(model: Any) -> None:
    prompt = make_prompt(model, TEXT, VISION)
    (pmod, dense), (again, _) = measure(model, prompt), measure(model, prompt)
    assert pmod.cache_bytes < dense.cache_bytes < dense.peak_bytes
    assert pmod.peak_bytes == again.peak_bytes < dense.peak_bytes
    assert min(pmod.prefill, pmod.decode, dense.prefill, dense.decode) > 0


def test_page_picture_and_measurement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "<b>small</b>"
    small_config().save_pretrained(folder)
    page, picture = tmp_path / "page.html", tmp_path / "figure.png"
    ask = ["report", str(folder), "--vision-tokens", "52", "--text-tokens", "12"]
    for _ in range(2):  # what pmod wrote may be replaced
        assert main([*ask, "--output", str(page), "--measure", "--pmod", "mean_ratio=0.3"]) == 0
        assert main([*ask, "--output", str(picture)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "random weights" in shown
    text = page.read_text()
    assert "<b>small" not in text
    assert "Peak memory" in text
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!#|data:)""", text)
    with Image.open(picture) as image:
        assert image.format == "PNG"
        assert image.width > 1000


def test_weights_of_a_folder_are_used(tmp_path: Path) -> None:
    LlamaForCausalLM(small_config()).save_pretrained(tmp_path / "dense")
    inject_pmod(LlamaForCausalLM(small_config()), PModConfig()).save_pretrained(tmp_path / "pmod")
    for name in ("dense", "pmod"):
        found = build_efficiency(
            str(tmp_path / name), tmp_path / "x.html", vision_tokens=9, text_tokens=2, measured=True
        )
        assert "the weights of the folder" in found["notes"][-1]
        assert found["efficiency"].routed_layers == 4


def test_bad_input_is_named(tmp_path: Path) -> None:
    small_config().save_pretrained(tmp_path / "model")
    inject_pmod(LlamaForCausalLM(small_config()), PModConfig()).config.save_pretrained(
        tmp_path / "pmod"
    )
    (tmp_path / "mine.png").write_bytes(b"\x89PNG mine")
    Image.new("RGB", (2, 2)).save(tmp_path / "photo.png")
    for model, options, message in (
        ("absent", {}, "llava-1.5-7b or llava-next-7b, got no folder"),
        (str(tmp_path), {}, "got one without"),
        (str(tmp_path / "model"), {}, "--vision-tokens: expected how many tokens an image has"),
        ("llava-next-7b", {"vision_tokens": 0}, "--vision-tokens: expected an integer >= 1, got 0"),
        ("llava-next-7b", {"text_tokens": -1}, "--text-tokens: expected an integer >= 0, got -1"),
        (str(tmp_path / "pmod"), {"pmod": PModConfig()}, "--pmod: expected no settings"),
        ("llava-next-7b", {"pmod": PModConfig(target_tokens="all")}, "target_tokens: expected"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            build_efficiency(model, tmp_path / "new.html", **options)
    for name in ("mine.png", "photo.png"):
        with pytest.raises(InputError, match="one that pmod wrote, got another file"):
            build_efficiency("llava-1.5-7b", tmp_path / name)
    huge = {**SMALL, "hidden_size": 2**15, "intermediate_size": 2**17, "num_hidden_layers": 64}
    LlamaConfig(**huge).save_pretrained(tmp_path / "huge")
    with pytest.raises(InputError, match=r"--measure: expected \d+\.\d GiB of free memory"):
        build_efficiency(
            str(tmp_path / "huge"), tmp_path / "new.html", vision_tokens=9, measured=True
        )
    assert not (tmp_path / "new.html").exists()
