"""`pmod convert`: whole checkpoint folders of the authors' code, both ways."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from model.official_folder import NEXT_CASE, official_batch, words, write_official
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from pmod_model import cli
from pmod_model.checkpoint import from_official, to_official
from pmod_model.convert import config_from_official
from pmod_model.folders import read_weights
from pmod_model.official import RELEASED_TOWER, official_config
from pmod_model.training.answering import answer, make_question

FOLDER = Path(__file__).parents[1] / "data" / "parity"
LLAVA = "f_llava15_b3"
RECOMPUTED = ("architectures", "torch_dtype", "mm_vision_tower")


def logits(folder: Path, case: Path) -> Tensor:
    texts, images, _ = official_batch(case)
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor(
        text=texts, images=images, padding=True, padding_side="right", return_tensors="pt"
    )
    with torch.no_grad():
        return AutoModelForImageTextToText.from_pretrained(folder)(**inputs).logits


@pytest.fixture(params=[LLAVA, NEXT_CASE])
def case(request: pytest.FixtureRequest) -> Path:
    return FOLDER / request.param


def test_there_and_back(case: Path, tmp_path: Path) -> None:
    source = write_official(case, tmp_path / "official", shard_size="100KB")
    assert len(list(source.glob("*.safetensors"))) > 3
    made = from_official(source, tmp_path / "ours", source / "tower")
    assert made.notes == ()
    back = to_official(tmp_path / "ours", tmp_path / "back", vision_tower="tower")
    official, again = read_weights(source), read_weights(tmp_path / "back")
    assert official.keys() == again.keys()
    assert all(torch.equal(again[name], value) for name, value in official.items())
    assert back.parameters == sum(value.numel() for value in official.values())
    assert made.parameters == back.parameters + 2 * official["lm_head.weight"].shape[1]
    old, new = (
        json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "back")
    )
    assert {key: value for key, value in new.items() if key not in RECOMPUTED} == {
        key: old[key] for key in new if key not in RECOMPUTED
    }
    assert (new["torch_dtype"], new["mm_vision_tower"]) == ("float32", "tower")
    assert config_from_official(new) == config_from_official(old)
    from_official(tmp_path / "back", tmp_path / "twice", source / "tower")
    assert torch.equal(logits(tmp_path / "twice", case), logits(tmp_path / "ours", case))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "official", "ours", "twice"]


@pytest.mark.parametrize("shard_size", ["5GB", "100KB"])
def test_old_pickled_weights_and_a_vision_tower_apart(
    case: Path, shard_size: str, tmp_path: Path
) -> None:
    plain = write_official(case, tmp_path / "plain")
    old = write_official(
        case, tmp_path / "old", shard_size=shard_size, pickled=True, tower_apart=True
    )
    assert not list(old.glob("*.safetensors"))
    from_official(plain, tmp_path / "a", plain / "tower")
    made = from_official(old, tmp_path / "b", old / "tower")
    assert made.notes == (f"vision tower from {old / 'tower'}",)
    first, second = read_weights(tmp_path / "a"), read_weights(tmp_path / "b")
    assert first.keys() == second.keys()
    assert all(torch.equal(second[name], value) for name, value in first.items())


class Dangerous:
    def __reduce__(self) -> Any:
        return print, ("unpickled",)


def test_nothing_but_tensors_is_unpickled(tmp_path: Path) -> None:
    source = write_official(FOLDER / LLAVA, tmp_path / "official", pickled=True)
    torch.save({"lm_head.weight": Dangerous()}, source / "pytorch_model.bin")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"pytorch_model\.bin: expected tensors alone"):
            from_official(source, tmp_path / "ours", source / "tower")
        (source / "pytorch_model.bin").write_bytes(b"cut off")
    assert not (tmp_path / "ours").exists()


def test_pickles_of_the_first_torch_releases(tmp_path: Path) -> None:
    source = write_official(FOLDER / LLAVA, tmp_path / "official", pickled=True)
    state = read_weights(source)
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    again = read_weights(tmp_path)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], value) for name, value in state.items())


@pytest.mark.parametrize("name", [NEXT_CASE])
def test_settings_reach_config_processor_and_generation(name: str, tmp_path: Path) -> None:
    source = write_official(FOLDER / name, tmp_path / "official")
    edit_config(source, max_num_patches=2)
    vicuna = {"pad_token_id": 0, "max_length": 99, "temperature": 0.9, "top_p": 0.6}
    (source / "generation_config.json").write_text(json.dumps(vicuna))
    (source / "tokenizer.model").write_bytes(b"sentences")
    from_official(source, tmp_path / "ours", source / "tower")
    model: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "ours")
    official = json.loads((source / "config.json").read_text())
    config = model.config
    assert config.image_grid_pinpoints == [[b, a] for a, b in official["image_grid_pinpoints"]]
    assert config.max_num_patches == 2
    assert config.image_token_id == official["vocab_size"] == config.text_config.vocab_size - 1
    assert model.pmod_config == config_from_official(official)
    processor = AutoProcessor.from_pretrained(tmp_path / "ours")
    assert processor.image_token_id == config.image_token_id
    assert processor.max_num_patches == 2
    assert processor.tokenizer.model_max_length == official["tokenizer_model_max_length"]
    assert processor.image_processor.size["shortest_edge"] == config.vision_config.image_size
    generation = GenerationConfig.from_pretrained(tmp_path / "ours")
    assert (generation.suppress_tokens, generation.pad_token_id) == ([config.image_token_id], 0)
    assert generation.max_length == 99
    assert (tmp_path / "ours" / "tokenizer.model").read_bytes() == b"sentences"
    to_official(tmp_path / "ours", tmp_path / "back", "tower")
    written = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    assert written["max_length"] == 99
    assert "suppress_tokens" not in written
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == b"sentences"


@pytest.mark.parametrize("name", [NEXT_CASE])
def test_a_converted_model_answers(name: str, tmp_path: Path) -> None:
    source = write_official(FOLDER / name, tmp_path / "official")
    from_official(source, tmp_path / "ours", source / "tower")
    processor = AutoProcessor.from_pretrained(tmp_path / "ours")
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "t5"}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "t6"}]},
        {"role": "user", "content": [{"type": "text", "text": "t7"}]},
    ]
    processor.tokenizer.eos_token = "t9"
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text.endswith("questions. USER: <image>\nt5 ASSISTANT: t6t9USER: t7 ASSISTANT:")
    _, images, _ = official_batch(FOLDER / name)
    questions = [make_question("t5 t6", images[0], "test"), make_question("t7", None, "test")]
    model: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "ours")
    given = answer(model, processor, questions, max_new_tokens=3, place="test")
    assert len(given) == 2
    assert all("<image>" not in words for words in given)


def test_without_a_tokenizer_images_follow_the_vocabulary(tmp_path: Path) -> None:
    source = write_official(FOLDER / LLAVA, tmp_path / "official", tokenizer=False)
    made = from_official(source, tmp_path / "ours", source / "tower")
    assert made.notes == (f"no tokenizer in {source}: the image token is 128",)
    assert (tmp_path / "ours" / "preprocessor_config.json").exists()
    back = to_official(tmp_path / "ours", tmp_path / "back", "tower")
    assert back.notes == ("no tokenizer",)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["vocab_size"] == 128


def test_a_vocabulary_with_room_is_not_grown(tmp_path: Path) -> None:
    source = write_official(FOLDER / LLAVA, tmp_path / "official", tokenizer=False)
    words(100).save_pretrained(source)
    from_official(source, tmp_path / "ours", source / "tower")
    model: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "ours")
    assert (model.config.image_token_id, model.config.text_config.vocab_size) == (100, 128)


def edit(source: Path, change: Any) -> None:
    state = load_file(source / "model.safetensors")
    change(state)
    save_file(state, source / "model.safetensors")


def edit_config(source: Path, **values: Any) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda s: edit(s, lambda w: w.update({"model.moe.gate": torch.ones(1)})),
            r"got 1 unknown: model\.moe\.gate",
        ),
        (
            lambda s: edit(s, lambda w: w.pop("model.layers.6.router.router.bias")),
            r"missing: model\.language_model\.layers\.6\.mod_router\.bias; surplus: none",
        ),
        (
            lambda s: edit(s, lambda w: w.update({"model.image_newline": torch.ones(32)})),
            r"missing: none; surplus: model\.image_newline",
        ),
        (
            lambda s: edit(s, lambda w: w.update({"model.norm.weight": torch.ones(5)})),
            r"the shapes of config\.json, got .*norm\.weight",
        ),
        (
            lambda s: edit_config(s, model_type="llava_llama"),
            "model_type: expected pmod_llava_llama",
        ),
        (
            lambda s: edit_config(s, mm_projector_type="linear"),
            "mm_projector_type: expected mlp2x_gelu",
        ),
        (
            lambda s: edit_config(s, mm_vision_select_feature="cls"),
            "mm_vision_select_feature: expected",
        ),
        (lambda s: edit_config(s, image_aspect_ratio="anyres"), "got anyres with flat"),
        (
            lambda s: edit_config(
                s, image_aspect_ratio="anyres", mm_patch_merge_type="spatial_unpad"
            ),
            "image_grid_pinpoints: expected a list of",
        ),
        (lambda s: (s / "config.json").write_text("{"), "expected JSON, got"),
        (lambda s: shutil.rmtree(s / "tower"), r"tower/config\.json: expected a file, got none"),
        (
            lambda s: (s / "model.safetensors").unlink(),
            r"expected model\.safetensors or pytorch_model",
        ),
    ],
)
def test_bad_sources_are_named_and_leave_nothing(spoil: Any, message: str, tmp_path: Path) -> None:
    source = write_official(FOLDER / LLAVA, tmp_path / "official")
    spoil(source)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        from_official(source, tmp_path / "ours", source / "tower")
    assert [path.name for path in tmp_path.iterdir()] == ["official"]


def test_a_missing_shard_or_key_is_named(tmp_path: Path) -> None:
    source = write_official(FOLDER / LLAVA, tmp_path / "official", shard_size="100KB")
    index = source / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    listed["weight_map"]["model.lost"] = sorted(set(listed["weight_map"].values()))[0]
    index.write_text(json.dumps(listed))
    with pytest.raises(ValueError, match=r"shards with every key, got none for model\.lost"):
        read_weights(source)
    shard = sorted(source.glob("model-*"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        read_weights(source)


def test_the_tower_must_be_known(tmp_path: Path) -> None:
    source = write_official(FOLDER / LLAVA, tmp_path / "official", tower_apart=True)
    with pytest.raises(ValueError, match="vision_tower: expected the folder of dev_f_llava15_b3"):
        from_official(source, tmp_path / "ours")
    edit_config(source, mm_vision_tower=RELEASED_TOWER)
    with pytest.raises(ValueError, match="vision_tower: expected a folder, since the checkpoint"):
        from_official(source, tmp_path / "ours")


def test_what_the_official_code_cannot_express(tmp_path: Path) -> None:
    source = write_official(FOLDER / LLAVA, tmp_path / "official")
    from_official(source, tmp_path / "ours", source / "tower")
    with pytest.raises(ValueError, match="vision_tower: expected a name, since the tower is not"):
        to_official(tmp_path / "ours", tmp_path / "back")
    with pytest.raises(ValueError, match=r"destination: expected a folder to make, got .*ours"):
        to_official(tmp_path / "ours", tmp_path / "ours", "tower")
    model: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "ours")
    model.config.text_config.rope_parameters = {"rope_type": "linear", "factor": 2.0}
    with pytest.raises(ValueError, match="rope_parameters: expected rope_type default, got linear"):
        official_config(model, 128, "tower", True, 400)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_official(FOLDER / LLAVA, tmp_path / "official")
    ours, back = tmp_path / "ours", tmp_path / "back"
    command = ["convert", str(source), str(ours), "--vision-tower", str(source / "tower")]
    assert cli.main(command) == 0
    assert capsys.readouterr().out.startswith("PModLlavaForConditionalGeneration: ")
    assert (
        cli.main(["convert", str(ours), str(back), "--to", "official", "--vision-tower", "t"]) == 0
    )
    assert capsys.readouterr().out.endswith(f"saved in {back}\n")
    assert cli.main(command) == 1
    assert "destination: expected a folder to make" in capsys.readouterr().err
    assert cli.main(["convert", str(ours), str(back), "--to", "gguf"]) == 2
