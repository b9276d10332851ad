"""The attention view holds Hugging Face's own weights, every patch where it lies in the image, and needs no network."""

import base64
import html
import json
import re
import shutil
import subprocess
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hooks import FrankenlensError, HookedVLM
from interp.attention.view import AttentionView, attention_view
from interp.prompts import Prompt, PromptBuilder
from interp.questions.examples import Example
from tests.families import TinyVLM, tiny


@pytest.fixture(scope="module", params=("qwen2_5_vl", "smolvlm"))
def case(request) -> tuple[TinyVLM, HookedVLM, Prompt]:
    bare = tiny(request.param)
    vlm = HookedVLM(bare.model, bare.processor)
    example = Example("noise", tuple(bare.images(1)), "what color is the star </script> ?", "red")
    return bare, vlm, PromptBuilder(bare.processor).build(example)


def data_of(view: AttentionView) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', view.page, re.DOTALL)
    assert found is not None
    return json.loads(found.group(1))


def unpacked(data: dict[str, Any], layer: int, head: int) -> np.ndarray:
    raw = base64.b64decode(data["patterns"][str(layer)][head])
    return np.frombuffer(raw, "<u2").reshape(-1, len(data["tokens"])) / 65535


@torch.no_grad()
def eager(vlm: HookedVLM, prompt: Prompt) -> np.ndarray:
    before = str(vlm.model.config._attn_implementation)
    vlm.model.set_attn_implementation("eager")
    try:
        run: Any = vlm.model
        return np.stack([a[0].numpy() for a in run(**prompt.inputs, output_attentions=True).attentions])
    finally:
        vlm.model.set_attn_implementation(before)


def test_weights_are_those_of_hugging_face(case):
    _, vlm, prompt = case
    data, expected = data_of(attention_view(vlm, prompt, layers=[0, -1], heads=[3, 1])), eager(vlm, prompt)
    assert data["layers"] == [0, 2] and data["heads"] == [1, 3]
    for layer in (0, 2):
        for place, head in enumerate((1, 3)):
            np.testing.assert_allclose(unpacked(data, layer, place), expected[layer, head], atol=1e-5)
    assert data["roles"] == list(prompt.roles)
    assert np.abs(expected[0, 1] - expected[0, 3]).max() > 1e-2


def test_queries_of_one_role(case):
    _, vlm, prompt = case
    data = data_of(attention_view(vlm, prompt, layers=[1], queries="question"))
    rows = prompt.positions("question").tolist()
    assert data["rows"] == rows
    np.testing.assert_allclose(unpacked(data, 1, 0), eager(vlm, prompt)[1, 0][rows], atol=1e-5)


def test_every_image_token_has_one_patch_and_the_patches_tile_the_image(case):
    bare, vlm, prompt = case
    panels = data_of(attention_view(vlm, prompt))["panels"]
    tokens = [cell["token"] for panel in panels for cell in panel["cells"]]
    assert sorted(tokens) == prompt.positions("image").tolist()
    assert len(panels) == (1 if bare.family == "qwen2_5_vl" else 2)
    for panel in panels:
        boxes = np.array([cell["box"] for cell in panel["cells"]])
        assert (boxes[:, 2] * boxes[:, 3]).sum() == pytest.approx(100 * 100, rel=1e-4)
        assert boxes[:, :2].min() == 0 and (boxes[:, :2] + boxes[:, 2:]).max() == pytest.approx(100, abs=0.01)
        kind, encoded = panel["source"].split(",")
        assert kind.startswith("data:image/")
        assert base64.b64decode(encoded)[:4] in (b"\x89PNG", b"\xff\xd8\xff\xe0")
    if bare.family == "qwen2_5_vl":  # 32 x 40 pixels, patches of 4, merged 2 x 2
        assert boxes[:, :2].tolist() == [[20.0 * x, 25.0 * y] for y in range(4) for x in range(5)]


def test_the_page_stands_alone_and_a_large_picture_is_made_small(case, tmp_path):
    bare, vlm, prompt = case
    view = attention_view(vlm, prompt)
    assert not re.search(r"https?://|<link|<script src|@import", view.page)
    assert view.page.count("</script>") == 2  # the question's own is no tag
    saved = view.save(tmp_path / "view.html").read_text()
    assert saved == view.page
    shown = view._repr_html_()
    assert html.unescape(shown.split('srcdoc="')[1].split('" style')[0]) == view.page
    noise = np.random.default_rng(0).integers(0, 255, (900, 1200, 3), dtype=np.uint8)
    if bare.family == "smolvlm":
        large = Example("large", (Image.fromarray(noise),), "what is red ?", "red")
        page = attention_view(vlm, PromptBuilder(bare.processor).build(large), layers=[0], heads=[0]).page
        assert len(page) < 450_000


def test_refusals(case):
    _, vlm, prompt = case
    with pytest.raises(FrankenlensError, match="no layer 9: this model has layers 0 to 2"):
        attention_view(vlm, prompt, layers=[9])
    with pytest.raises(FrankenlensError, match="no head -5"):
        attention_view(vlm, prompt, heads=[-5])
    with pytest.raises(FrankenlensError, match="no role 'pictures'"):
        attention_view(vlm, prompt, queries="pictures")
    with pytest.raises(FrankenlensError, match="no reasoning token"):
        attention_view(vlm, prompt, queries="reasoning")
    with pytest.raises(FrankenlensError, match="more than max_mb=0.001"):
        attention_view(vlm, prompt, max_mb=0.001)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs a browser")
def test_a_browser_shows_the_weights(case, tmp_path):
    _, vlm, prompt = case
    saved = attention_view(vlm, prompt, layers=[1], heads=[2]).save(tmp_path / "view.html")
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=3000",
        "--dump-dom",
    ]
    dom = subprocess.run(
        [*command, saved.as_uri()], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    last = eager(vlm, prompt)[1, 2, -1]
    shown = re.search(r"attends to .*? (\d+\.\d+) %.*to all image tokens (\d+\.\d+) %", dom)
    assert shown is not None
    share = last[prompt.positions("image").numpy()].sum()
    assert [float(n) for n in shown.groups()] == pytest.approx([100 * last.max(), 100 * share], abs=0.02)
    assert dom.count('class="cell') == prompt.roles.count("image")
