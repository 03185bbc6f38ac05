"""Tokens kept by each layer: of a real image, in the right places, as a page and as a picture."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image
from transformers import LlavaNextImageProcessorPil, set_seed

from pmod_model import PModLlavaNextConfig, PModLlavaNextForConditionalGeneration, record_routing
from pmod_model.cli import main
from pmod_model.configuration import PModConfig
from pmod_model.data.easyvqa import easy_vqa_records
from pmod_model.data.encoding import encode_prompt
from pmod_model.data.processor import CHAT_TEMPLATE
from pmod_model.llava_next import PModLlavaNextProcessor
from pmod_model.report.kept import image_regions, map_tokens, record_kept
from pmod_model.report.view import _skipped
from pmod_model.training.answering import make_question
from pmod_model.training.models import build_model, load_model
from pmod_model.training.preset import Preset

LAYERS, SIDE = 4, 8
PROMPT = "what color is the <b>shape</b>?"


def with_routers(model: Any) -> Any:
    """Routers that have an opinion."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("mod_router.weight"):
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def folder(processor: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A p-MoD LLaVA of four layers: dense, then 48, 16 and 9 of 64 tokens."""
    path = tmp_path_factory.mktemp("view") / "model"
    set_seed(0)
    model = build_model(Preset(hidden_size=32, layers=LAYERS), processor, PModConfig())
    with_routers(model).save_pretrained(path)
    processor.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def next_folder(processor: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A p-MoD LLaVA-NeXT whose crops are of 8 x 8 tokens."""
    path = tmp_path_factory.mktemp("view") / "next"
    set_seed(0)
    fields = Preset(hidden_size=32, layers=LAYERS).config(
        processor.tokenizer, processor.image_token_id
    )
    grids = [[64, 128], [128, 64], [128, 128]]
    config = PModLlavaNextConfig(
        pmod=PModConfig(target_tokens="vision_high_res"), image_grid_pinpoints=grids, **fields
    )
    with_routers(PModLlavaNextForConditionalGeneration(config)).save_pretrained(path)
    PModLlavaNextProcessor(
        LlavaNextImageProcessorPil(
            size={"shortest_edge": 64},
            crop_size={"height": 64, "width": 64},
            image_grid_pinpoints=grids,
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        ),
        processor.tokenizer,
        patch_size=8,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(path)
    return path


def ask(folder: Path, output: Path, image: str = "easy-vqa:3") -> list[str]:
    named = ["--model", str(folder), "--image", image, "--prompt", PROMPT]
    return ["view", *named, "--output", str(output)]


def wide(folder: Path) -> Path:
    """A real image, 192 x 128."""
    with Image.open(easy_vqa_records("test")[1] / "3.png") as image:
        image.convert("RGB").resize((192, 128)).save(folder / "wide.png")
    return folder / "wide.png"


def shaded(path: str, rows: int, columns: int) -> torch.Tensor:
    """The cells that an SVG path covers."""
    cells = torch.zeros(rows, columns, dtype=torch.bool)
    assert re.fullmatch(r"(M\d+ \d+h\d+v1h-\d+z)*", path)
    for x, y, width, back in re.findall(r"M(\d+) (\d+)h(\d+)v1h-(\d+)z", path):
        assert width == back
        cells[int(y), int(x) : int(x) + int(width)] = True
    return cells


def test_page_has_the_tokens_that_the_model_keeps(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "view.html"
    for _ in range(2):  # what pmod wrote may be replaced
        assert main(ask(folder, page)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:LAYERS] == [
        "layer 0: dense, all 64 tokens",
        "layer 1: 48 of 64 tokens, 75.0 %",
        "layer 2: 16 of 64 tokens, 25.0 %",
        "layer 3: 9 of 64 tokens, 14.1 %",
    ]
    text = page.read_text()
    paths = re.findall(r'<path id="skipped-(\d+)-0" d="([^"]*)"', text)
    model, processor = load_model(folder, "view")
    with Image.open(easy_vqa_records("test")[1] / "3.png") as image:
        question = make_question(PROMPT, image.convert("RGB"), "view")
    inputs = encode_prompt(processor, question.turn, question.image)
    ids = inputs["input_ids"][None]
    with torch.inference_mode(), record_routing(model) as records:
        model(input_ids=ids, pixel_values=inputs["pixel_values"])
    vision = ids[0] == model.config.image_token_id
    for layer, path in paths:
        mask = records[0].kept.get(int(layer))
        kept = torch.ones(64, dtype=torch.bool) if mask is None else mask[0, vision]
        assert torch.equal(~shaded(path, SIDE, SIDE), kept.view(SIDE, SIDE))
    assert len(paths) == LAYERS


def test_page_is_self_contained_and_well_formed(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "view.html"
    assert main(ask(folder, page)) == 0
    text = page.read_text()
    assert "<b>shape" not in text
    assert text.count("<script") == 1
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy
    assert re.fullmatch(
        r"default-src 'none'; img-src data:; style-src 'unsafe-inline';"
        r" script-src 'sha256-[A-Za-z0-9+/]{43}='",
        policy[1],
    )
    sources = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", text)
    assert all(source.startswith(("data:image/png", "#")) for source in sources), sources
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg)
    ids = set(re.findall(r'\bid="([^"]*)"', text))
    used = set(re.findall(r'href="#([^"]*)"', text)) | {"controls", "layer", "said"}
    assert used <= ids
    assert '<label for="layer">' in text
    assert f'type="range" min="0" max="{LAYERS - 1}"' in text
    assert text.count("data-said=") == LAYERS


def test_the_script_is_the_one_that_the_policy_allows(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "view.html"
    assert main(ask(folder, page)) == 0
    text = page.read_text()
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)
    assert script
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert f"'sha256-{digest}'" in text


def test_picture_has_every_layer(folder: Path, tmp_path: Path) -> None:
    picture = tmp_path / "view.png"
    for _ in range(2):
        assert main(ask(folder, picture)) == 0
    with Image.open(picture) as image:
        assert image.width > 2 * image.height  # four layers in a row


def test_views_of_a_next_image(next_folder: Path, tmp_path: Path) -> None:
    model, processor = load_model(next_folder, "view")
    path = wide(tmp_path)
    with Image.open(path) as image:
        question = make_question(PROMPT, image.convert("RGB"), "view")
    picture: Any = question.image
    inputs = encode_prompt(processor, question.turn, picture)
    regions = image_regions(model, processor, inputs, picture)
    assert regions is not None
    base, high = regions
    # fills the width of the 128 x 128 grid: 16 columns; 128 * 16 / 192 = 10 rows, rounded down
    assert torch.equal(base.tokens, torch.arange(64).view(8, 8))
    rows, columns = high.tokens.shape
    assert (rows, columns) == (10, 16)
    assert torch.equal(high.tokens, 64 + torch.arange(rows * 17).view(rows, 17)[:, :16])
    count = int((inputs["input_ids"] == model.config.image_token_id).sum())
    assert count == 64 + rows * 17
    kept = record_kept(model, inputs)
    competing = rows * 17
    for layer, ratio in ((1, 0.75), (2, 0.25), (3, 0.15)):
        assert kept[layer][:64].all()  # base views do not compete
        assert int(kept[layer][64:].sum()) == int(torch.tensor(float(competing)) * ratio)
    page, drawn = tmp_path / "view.html", tmp_path / "view.png"
    assert main(ask(next_folder, page, str(path))) == 0
    assert main(ask(next_folder, drawn, str(path))) == 0
    text = page.read_text()
    assert text.count("high-resolution map, 16 &times;") == 1
    path_of_last = re.search(r'id="skipped-3-1" d="([^"]*)"', text)
    assert path_of_last
    expected = kept[3][high.tokens]
    assert torch.equal(~shaded(path_of_last[1], rows, columns), expected)


def test_measuring_another_pool_is_refused(
    next_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = PModLlavaNextConfig.from_pretrained(next_folder)
    config.pmod = PModConfig(pool="frame").to_dict()
    config.save_pretrained(tmp_path / "frames")
    new = tmp_path / "new.html"
    assert main(["report", str(tmp_path / "frames"), "--measure", "--output", str(new)]) == 1
    assert 'pool: expected "sequence"' in capsys.readouterr().err
    assert not new.exists()


def test_an_image_without_a_map(next_folder: Path) -> None:
    model: Any = load_model(next_folder, "view")[0]
    model.config.image_grid_pinpoints = [[64, 64]]
    model.model.config.image_grid_pinpoints = [[64, 64]]
    tokens = map_tokens(model.model, (64, 64), 64)
    assert tokens is not None  # one crop of high resolution
    assert torch.equal(tokens, 64 + torch.arange(8 * 9).view(8, 9)[:, :8])


def test_runs_of_skipped_cells_are_joined() -> None:
    kept = torch.tensor([True, False, False, False, True, True])
    assert _skipped(kept, torch.arange(6).view(2, 3)) == "M1 0h2v1h-2zM0 1h1v1h-1z"
    assert _skipped(None, torch.arange(6).view(2, 3)) == ""


def test_bad_input_is_named(
    folder: Path, processor: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = tmp_path / "dense"
    build_model(Preset(hidden_size=32, layers=LAYERS), processor, None).save_pretrained(dense)
    processor.save_pretrained(dense)
    mine = tmp_path / "mine.html"
    mine.write_text("mine")
    new = tmp_path / "new.html"
    for arguments, message in (
        (ask(dense, new), "expected a p-MoD model, got one whose layers skip no token"),
        (ask(tmp_path / "absent", new), "expected a folder with a saved model"),
        (ask(folder, new, "absent.png"), "absent.png"),
        (ask(folder, new, "easy-vqa:x"), "pmod view: --image: expected easy-vqa:NUMBER"),
        (ask(folder, mine), "one that pmod wrote, got another file"),
        ([*ask(folder, new), "--prompt", " "], "--prompt: expected a question"),
    ):
        assert main(arguments) == 1
        assert message in capsys.readouterr().err
    assert mine.read_text() == "mine"
    assert not new.exists()
