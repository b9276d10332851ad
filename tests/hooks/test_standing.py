"""Hooks act whatever was compiled, in one thread at a time, at the tokens that are meant, and do not go with a copy."""

import copy
import io
import pickle
import threading
from typing import Any

import pytest
import torch

from hooks import FrankenlensError, HookedVLM
from interp.pair.pair import Pair
from tests.families import tiny
from tests.hooks.interventions import flip

GREEDY = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False)
POINT = "blocks.1.hook_resid_post"


def _steps(vlm: HookedVLM, inputs, hooks=(), **kwargs) -> torch.Tensor:
    """Logits of a greedy generation, [step batch vocab]."""
    asked = GREEDY | dict(return_dict_in_generate=True, output_logits=True)
    return torch.stack(vlm.generate(inputs, hooks, **asked, **kwargs).logits)


@torch.no_grad()
def _moved(run, vlm: HookedVLM) -> float:
    """By how much a flipped stream moves the logits of a run."""
    clean = run()
    with vlm.hooks([(POINT, flip)]):
        edited = run()
    assert torch.equal(run(), clean)
    return (edited - clean).abs().max().item()


def test_hooks_act_on_what_was_compiled(given, vlm) -> None:
    inputs = given.inputs()
    expected = _moved(lambda: given.model(**inputs).logits, vlm)
    assert expected > 0.1
    whole = torch.compile(given.model, backend="eager")
    assert _moved(lambda: whole(**inputs).logits, vlm) == pytest.approx(expected)
    forward = given.model.forward
    given.model.forward = torch.compile(forward, backend="eager")
    try:
        assert _moved(lambda: given.model(**inputs).logits, vlm) == pytest.approx(expected)
    finally:
        del given.model.forward
    torch._dynamo.reset()


def test_what_is_compiled_under_hooks_does_not_keep_them(given, vlm) -> None:
    inputs = given.inputs()
    with torch.no_grad():
        clean = given.model(**inputs).logits
        with vlm.hooks([(POINT, flip)]):
            whole = torch.compile(given.model, backend="eager")
            assert not torch.equal(whole(**inputs).logits, clean)
        assert torch.equal(whole(**inputs).logits, clean)
    torch._dynamo.reset()


def test_a_compiled_model_is_opened_by_what_it_wraps(given) -> None:
    compiled: Any = torch.compile(given.model, backend="eager")
    vlm = HookedVLM(compiled, given.processor)
    assert vlm.model is given.model


def test_generation_with_a_static_cache_is_edited_at_every_step() -> None:
    """Hugging Face compiles the steps of a static cache, on its own account on CUDA; here it is asked to."""
    from transformers.generation import CompileConfig

    given = tiny("qwen2_5_vl")  # Hugging Face leaves what it compiled on the model
    vlm, inputs = HookedVLM(given.model, given.processor), given.inputs()
    config: Any = CompileConfig(backend="eager", fullgraph=False)
    config._compile_all_devices = True
    static = dict(cache_implementation="static", compile_config=config)
    clean = _steps(vlm, inputs, **static)
    torch.testing.assert_close(clean, _steps(vlm, inputs), rtol=0, atol=1e-4)
    edited = _steps(vlm, inputs, [(POINT, flip)], **static)
    expected = _steps(vlm, inputs, [(POINT, flip)])
    torch.testing.assert_close(edited, expected, rtol=0, atol=1e-4)
    assert ((edited - clean).abs().amax((1, 2)) > 0.1).all()
    torch._dynamo.reset()


def test_two_threads_on_one_model_give_what_one_gives(given, vlm) -> None:
    inputs = given.inputs()
    edits = [(POINT, flip)]
    with torch.no_grad():
        once = {hooks != (): vlm.run_with_hooks(inputs, hooks).logits for hooks in ((), edits)}
    steps = {hooks != (): _steps(vlm, inputs, hooks) for hooks in ((), edits)}
    found: list[bool] = []

    def many(hooks) -> None:
        other = HookedVLM(given.model, given.processor, check=False)  # the model is what is shared
        for own in (vlm, other):
            found.append(torch.equal(_steps(own, inputs, hooks), steps[hooks != ()]))
            with torch.no_grad():
                found.append(torch.equal(own.run_with_hooks(inputs, hooks).logits, once[hooks != ()]))

    threads = [threading.Thread(target=many, args=(hooks,)) for hooks in ((), edits) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 16 and all(found)


def test_a_copy_made_under_hooks_does_not_keep_the_edit(given, vlm) -> None:
    inputs = given.inputs()
    places = [POINT, "blocks.0.attn.hook_pattern", "blocks.0.attn.hook_result", "blocks.1.hook_resid_mid"]
    with torch.no_grad():
        clean = given.model(**inputs).logits
        with vlm.hooks([(name, flip) for name in places]):
            assert not torch.equal(given.model(**inputs).logits, clean)
            saved = io.BytesIO()
            torch.save(given.model, saved)
            saved.seek(0)
            copies = [
                copy.deepcopy(given.model),
                copy.deepcopy(vlm).model,
                torch.load(saved, weights_only=False),
                pickle.loads(pickle.dumps(given.model)),
            ]
        for one in copies:
            assert torch.equal(one(**inputs).logits, clean)
            again = HookedVLM(one, given.processor)
            assert _moved(lambda one=one: one(**inputs).logits, again) > 0.1


def test_copies_of_what_is_opened(given, vlm) -> None:
    pair = copy.deepcopy(Pair(vlm, vlm))
    inputs = given.inputs()
    assert pair.in_.model is not vlm.model and torch.equal(pair.in_(inputs).logits, vlm(inputs).logits)
    assert _moved(lambda: pair.in_.model(**inputs).logits, pair.in_) > 0.1
    for one in (vlm, pair):
        with pytest.raises(FrankenlensError, match=r"not pickled: save the model"):
            pickle.dumps(one)
    cache = vlm.run_with_cache(inputs, POINT)[1]
    saved = io.BytesIO()
    torch.save(cache, saved)
    saved.seek(0)
    for one in (
        copy.deepcopy(cache),
        pickle.loads(pickle.dumps(cache)),
        torch.load(saved, weights_only=False),
    ):
        assert torch.equal(one[POINT], cache[POINT]) and one[POINT] is not cache[POINT]


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_are_those_of_the_whole_sequence(given, vlm, use_cache, side) -> None:
    inputs = given.inputs(batch=2, padding_side="left") if side == "left" else given.inputs()
    length = inputs["input_ids"].shape[1]
    seen: dict[str, list[list[int]]] = {}

    def look(activation, hook):
        assert hook.prompt_length == length
        assert len(hook.positions) == activation.shape[hook.point.token_axis]
        seen.setdefault(hook.name, []).append(hook.positions.tolist())

    names = ["blocks.0.attn.hook_z", "blocks.1.attn.hook_rot_k", "blocks.1.attn.hook_pattern", "hook_embed"]
    vlm.generate(inputs, [(name, look) for name in names], use_cache=use_cache, **GREEDY)
    stops = range(length, length + 4)
    whole = [list(range(stop)) for stop in stops]
    each = [whole[0], *([stop - 1] for stop in stops[1:])] if use_cache else whole
    assert seen == {name: whole if name.endswith("rot_k") else each for name in names}


def test_hooks_act_at_chosen_positions_alone(given, vlm) -> None:
    inputs = given.inputs()
    length = inputs["input_ids"].shape[1]
    name = "blocks.0.attn.hook_z"
    asked = {
        "prompt": range(length),
        "generated": range(length, length + 4),
        (5, length + 1): (5, length + 1),
    }

    def by_hand(positions):
        def edit(activation, hook):
            return torch.where(
                torch.isin(hook.positions, torch.tensor(positions))[:, None, None], 0, activation
            )

        return _steps(vlm, inputs, [(name, edit)])

    def zero(activation, hook):
        activation[:] = 0

    clean = _steps(vlm, inputs)
    for at, positions in asked.items():
        for use_cache in (True, False):
            found = _steps(vlm, inputs, [(name, zero)], at=at, use_cache=use_cache)
            expected = by_hand(list(positions))
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
            assert (found - clean).abs().max() > 1e-2
    asked_wrongly: Any = ((), (-1,))
    for at in asked_wrongly:
        with pytest.raises(FrankenlensError, match="expected 'all', 'prompt', 'generated', or positions"):
            vlm.generate(inputs, [(name, zero)], at=at, **GREEDY)


def _with_a_video(given, image: bool) -> dict:
    """One prompt with a video of one frame; with an image of another size before it, or without."""
    both = given.inputs(n_images=2)
    config, grids = given.model.config, both["image_grid_thw"]
    cut = int(grids[0].prod())
    ids, first = both["input_ids"], int(grids[0].prod()) // 4
    pads = (ids[0] == config.image_token_id).nonzero()[:, 0]
    moved = pads[first:] if image else pads
    ids[0, moved] = config.video_token_id
    both["mm_token_type_ids"][0, moved] = 2
    pixels = both.pop("pixel_values")
    both.pop("image_grid_thw")
    if image:
        both |= dict(pixel_values=pixels[:cut], image_grid_thw=grids[:1])
    both |= dict(pixel_values_videos=pixels[cut:] if image else pixels)
    both |= dict(video_grid_thw=grids[1:] if image else grids)
    return both


def test_a_part_that_runs_twice_keeps_every_call(given, vlm) -> None:
    inputs, name = _with_a_video(given, image=True), "vision.blocks.0.hook_resid_post"
    calls = []
    handle = vlm.module(vlm.anatomy.vision.blocks[0].path).register_forward_hook(
        lambda module, args, output: calls.append(output.detach().clone())
    )
    with torch.no_grad():
        output, cache = vlm.run_with_cache(inputs, name)
    handle.remove()
    assert len(calls) == 2 and len(cache.calls(name)) == 2
    assert all(map(torch.equal, cache.calls(name), calls))
    with pytest.raises(FrankenlensError, match=r"ran 2 times .* cache\.calls\(name\) has them in order"):
        cache[name]

    def back(activation, hook):
        return cache.calls(hook.name)[hook.calls - 1]

    with torch.no_grad():
        assert torch.equal(vlm.run_with_hooks(inputs, [(name, back)]).logits, output.logits)


def test_a_video_alone_shows_the_vision_side(given, vlm) -> None:
    inputs = _with_a_video(given, image=False)
    _, cache = vlm.run_with_cache(inputs)
    assert set(cache) == set(vlm.hook_points)
    opened = HookedVLM(given.model, given.processor, inputs=inputs)
    assert list(opened.hook_points) == list(vlm.hook_points)
