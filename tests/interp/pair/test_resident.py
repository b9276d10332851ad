"""A pair with one model in memory: the same numbers as two models, in about half of the memory."""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint
from torch import Tensor, nn

from hooks import FrankenlensError, HookedVLM
from hooks.resident import Away, as_bits
from hooks.resident import changes as changes_module
from hooks.spilled import Spill
from hooks.swapped import swapped
from interp.pair import Pair
from interp.pair.pair import weights_sha256
from interp.transfer import Graft, grafted
from interp.transfer.grafts import everything
from tests.families import EACH_KIND, tiny

SHARE = 0.2


def changed_(model: nn.Module, share: float, seed: int = 0) -> None:
    """A share of the entries of every weight, changed in their last bits, as a small update rounds."""
    generator = torch.Generator().manual_seed(seed)
    for one in model.parameters():
        bits = as_bits(one)
        at = torch.rand(len(bits), generator=generator) < share
        bits[at] ^= torch.randint(1, 8, (int(at.sum()),), generator=generator).to(bits.dtype)


def written(family: str, folder: Path) -> tuple[Path, Path]:
    """The folders of IN and RL."""
    made = tiny(family, 1)
    made.model.to(torch.bfloat16)
    for name in ("in", "rl"):
        made.model.save_pretrained(folder / name)
        made.processor.save_pretrained(folder / name)
        changed_(made.model, SHARE)
    return folder / "in", folder / "rl"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return written("llava", tmp_path_factory.mktemp("resident"))


@pytest.fixture(scope="module")
def two(folders: tuple[Path, Path]) -> Iterator[Pair]:
    pair = Pair.from_pretrained(*folders)
    yield pair
    pair.close()


@pytest.fixture(scope="module")
def one(folders: tuple[Path, Path]) -> Iterator[Pair]:
    pair = Pair.from_pretrained(*folders, one_resident=True)
    yield pair
    pair.close()


@pytest.fixture
def fresh(folders: tuple[Path, Path]) -> Iterator[Pair]:
    """One that a test may spoil."""
    pair = Pair.from_pretrained(*folders, one_resident=True, check=False)
    yield pair
    pair.turns.end()  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def inputs(two: Pair) -> Any:
    return two.in_.opening


def logits(vlm: HookedVLM, inputs: Any) -> Tensor:
    with torch.no_grad():
        return vlm(inputs).logits


def unembedding(vlm: HookedVLM) -> Tensor:
    return vlm.model.get_parameter(f"{vlm.anatomy.unembed}.weight")


def same(a: Pair, b: Pair, inputs: Any) -> bool:
    return all(
        torch.equal(as_bits(logits(getattr(a, name), inputs)), as_bits(logits(getattr(b, name), inputs)))
        for name in ("in_", "rl", "in_", "rl", "rl", "in_")
    )


def storages(*models: nn.Module) -> int:
    """Bytes of memory that tensors of some models have, each counted once."""
    found: dict[int, int] = {}
    for model in models:
        for tensor in (*model.parameters(), *model.buffers()):
            if not isinstance(tensor, Away):
                memory = tensor.untyped_storage()
                found[memory.data_ptr()] = memory.nbytes()
    return sum(found.values())


def test_both_models_compute_what_two_models_do(one: Pair, two: Pair, inputs: Any) -> None:
    assert not torch.equal(logits(two.in_, inputs), logits(two.rl, inputs))
    assert same(one, two, inputs)
    assert one.provenance() == two.provenance()


@pytest.mark.parametrize("family", [one for one in EACH_KIND if one != "llava"])
def test_so_do_those_of_other_families(family: str, tmp_path: Path) -> None:
    """Weights that are tied, buffers that are saved, vision towers of other kinds."""
    folders = written(family, tmp_path)
    pairs = [Pair.from_pretrained(*folders, one_resident=resident, check=False) for resident in (False, True)]
    assert same(pairs[0], pairs[1], pairs[0].in_.opening)
    assert pairs[0].provenance() == pairs[1].provenance()


def test_a_model_that_is_not_in_memory_is_read_and_run_as_it_is(one: Pair, two: Pair, inputs: Any) -> None:
    """By its own module, past everything of ours; and so is IN while RL is in use."""

    def bare(vlm: HookedVLM) -> Tensor:
        with torch.no_grad():
            return vlm.model(**inputs).logits

    assert torch.equal(bare(one.rl), bare(two.rl)) and torch.equal(bare(one.in_), bare(two.in_))
    with one.rl.exclusive("a test"):
        assert torch.equal(bare(one.in_), bare(two.in_)) and torch.equal(bare(one.rl), bare(two.rl))
    pairs = zip(one.in_.model.parameters(), one.rl.model.parameters(), strict=True)
    real = zip(two.in_.model.parameters(), two.rl.model.parameters(), strict=True)
    for (a, b), (c, d) in zip(pairs, real, strict=True):
        assert torch.equal(b - a, d - c) and a.shape == b.shape and isinstance(b, nn.Parameter)


def test_at_rest_the_first_model_is_its_own(fresh: Pair, folders: tuple[Path, Path], inputs: Any) -> None:
    alone = HookedVLM.from_pretrained(folders[0])
    own = dict(fresh.in_.model.named_parameters())
    logits(fresh.rl, inputs)
    assert {name: id(p) for name, p in fresh.in_.model.named_parameters()} == {
        n: id(p) for n, p in own.items()
    }
    assert all(type(p) is nn.Parameter for p in own.values())
    fresh.close()
    assert weights_sha256(fresh.in_.model) == weights_sha256(alone.model)
    with torch.no_grad():
        assert torch.equal(fresh.in_.model(**inputs).logits, alone(inputs).logits)
    assert torch.equal(next(fresh.rl.model.parameters()) * 1, next(fresh.rl.model.parameters()) * 1)


def test_memory_is_that_of_one_model_and_the_changes(one: Pair, two: Pair, inputs: Any) -> None:
    assert one.turns is not None
    whole = storages(two.in_.model, two.rl.model)
    for _ in range(2):
        taken = storages(one.in_.model, one.rl.model) + one.turns.nbytes
        assert taken <= 0.65 * whole
        logits(one.rl, inputs)
    with one.rl.exclusive("a test"):
        assert storages(one.in_.model, one.rl.model) + one.turns.nbytes <= 0.65 * whole


def test_each_has_hooks_of_its_own_whichever_is_run_inside(one: Pair, two: Pair, inputs: Any) -> None:
    def zeroed(pair: Pair) -> list[Tensor]:
        found = []
        with pair.in_.hooks([("blocks.0.hook_resid_post", lambda value, hook: value * 0)]):
            found += [logits(pair.rl, inputs), logits(pair.in_, inputs)]
            with pair.rl.hooks([("blocks.1.hook_mlp_out", lambda value, hook: value * 2)]):
                found += [logits(pair.in_, inputs), logits(pair.rl, inputs), logits(pair.in_, inputs)]
            found.append(logits(pair.rl, inputs))
        return found

    assert all(map(torch.equal, zeroed(one), zeroed(two)))


def test_one_is_run_inside_a_hook_of_the_other(one: Pair, two: Pair, inputs: Any) -> None:
    def run(pair: Pair) -> Tensor:
        def donated(value: Tensor, hook: Any) -> Tensor:
            return pair.rl.run_with_cache(inputs, hook.name)[1][hook.name]

        with torch.no_grad():
            return pair.in_.run_with_hooks(inputs, [("blocks.1.hook_resid_pre", donated)]).logits

    assert torch.equal(run(one), run(two))


@pytest.mark.parametrize("ways", [("in_", "rl"), ("rl", "in_")])
@pytest.mark.parametrize(
    "graft",
    [None, Graft(("blocks.1.attn",)), Graft(("blocks.0.mlp",), 0.5), Graft(("blocks.1.attn.head.1",))],
)
def test_grafts_are_what_they_are_of_two_models(
    one: Pair, two: Pair, inputs: Any, graft: Graft | None, ways: tuple[str, str]
) -> None:
    def run(pair: Pair) -> list[Tensor]:
        to, of = (getattr(pair, name) for name in ways)
        wanted = Graft(everything(pair.in_)) if graft is None else graft
        with grafted(to, of, wanted, rounded=True):
            found = [logits(to, inputs), logits(of, inputs), logits(to, inputs)]
        return [*found, logits(to, inputs), logits(of, inputs)]

    assert all(map(torch.equal, run(one), run(two)))


def test_gradients_are_those_of_two_models_and_never_of_the_other_one(
    one: Pair, two: Pair, inputs: Any
) -> None:
    def gradient(pair: Pair, vlm: HookedVLM) -> Tensor:
        with vlm.exclusive("a test"):
            [found] = torch.autograd.grad(vlm(inputs).logits.float().sum(), unembedding(vlm))
        return found

    assert torch.equal(gradient(one, one.rl), gradient(two, two.rl))

    def behind(pair: Pair) -> Tensor:
        """IN's, where RL was run between its forward and its backward pass."""
        total = pair.in_(inputs).logits.float().sum()
        logits(pair.rl, inputs)
        [found] = torch.autograd.grad(total, unembedding(pair.in_), retain_graph=True)
        with pair.rl.exclusive("a test"):
            if pair.turns is not None:
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    total.backward()
        return found

    assert torch.equal(behind(one), behind(two))


# what goes wrong


class _Broken:
    """A change that raises at the n-th turn."""

    def __init__(self, own: Any, error: BaseException) -> None:
        self._own, self._error, self.nbytes = own, error, own.nbytes

    def turn(self, piece: Tensor) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        self._own.turn(piece)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), torch.OutOfMemoryError("no memory"), MemoryError()])
@pytest.mark.parametrize("place", [0, -1])
def test_a_switch_that_breaks_off_leaves_both_as_they_are(
    one: Pair, two: Pair, inputs: Any, error: BaseException, place: int
) -> None:
    assert one.turns is not None
    before = weights_sha256(one.in_.model)
    piece = one.turns.tensors[place].pieces[-1]
    own = piece.change
    piece.change = _Broken(own, error)  # type: ignore[assignment]
    with pytest.raises(type(error)):
        logits(one.rl, inputs)
    piece.change = own
    assert all(type(p) is nn.Parameter for p in one.in_.model.parameters())
    assert weights_sha256(one.in_.model) == before
    assert same(one, two, inputs)


def test_ctrl_c_at_any_moment_leaves_both_as_they_are(one: Pair, two: Pair, inputs: Any) -> None:
    """Sent from a second thread while models change over, again and again."""
    stop, armed, came = threading.Event(), False, 0

    def interrupt(*_: Any) -> None:
        if armed:
            raise KeyboardInterrupt

    def disturb() -> None:
        while not stop.wait(0.002):
            os.kill(os.getpid(), signal.SIGINT)

    before, own = weights_sha256(one.in_.model), signal.signal(signal.SIGINT, interrupt)
    thread = threading.Thread(target=disturb)
    thread.start()
    for _ in range(60):
        try:
            armed = True
            with one.rl.exclusive("a test"):
                pass
            armed = False
        except KeyboardInterrupt:
            armed, came = False, came + 1
    stop.set()
    thread.join()
    signal.signal(signal.SIGINT, own)
    assert came
    assert weights_sha256(one.in_.model) == before and same(one, two, inputs)


def test_a_weight_that_is_away_is_not_written_to(one: Pair) -> None:
    with pytest.raises(FrankenlensError, match="open two models to write"), torch.no_grad():
        next(one.rl.model.parameters()).add_(1)


def test_training_one_of_them_is_refused_before_the_other_is_run(fresh: Pair, inputs: Any) -> None:
    with torch.no_grad():
        next(fresh.in_.model.parameters()).add_(1)
    with pytest.raises(FrankenlensError, match="was written to .*open two models to train"):
        fresh.rl(inputs)


def test_whoever_kept_a_weight_does_not_read_the_others(one: Pair) -> None:
    with one.rl.exclusive("a test"):
        kept = next(one.rl.model.parameters())
        assert kept.numel()
    assert kept.numel() == 0


def test_other_settings_types_and_places_are_refused(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FrankenlensError, match="is no folder: .*read from its files"):
        Pair.from_pretrained(folders[0], "someone/a-model", one_resident=True)
    wide: Any = HookedVLM.from_pretrained(folders[1], dtype=torch.float32)
    for name, text in (("type", torch.float32), ("setting", torch.bfloat16)):
        wide.model.to(text)
        if name == "setting":
            wide.model.config.get_text_config().rms_norm_eps = 0.5
        wide.model.save_pretrained(tmp_path / name)
        wide.processor.save_pretrained(tmp_path / name)
    with pytest.raises(FrankenlensError, match="share no memory .*one dtype"):
        Pair.from_pretrained(folders[0], tmp_path / "type", one_resident=True)
    with pytest.raises(FrankenlensError, match="rms_norm_eps.*\n.*open two models"):
        Pair.from_pretrained(folders[0], tmp_path / "setting", one_resident=True, accept=["rms_norm_eps"])


def test_pieces_are_no_matter(
    folders: tuple[Path, Path], two: Pair, inputs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changes_module, "PIECE", 100)
    pair = Pair.from_pretrained(*folders, one_resident=True)
    assert pair.turns is not None and any(len(one.pieces) > 3 for one in pair.turns.tensors)
    assert same(pair, two, inputs)


def test_shards_of_a_trainer_are_read_part_by_part(
    folders: tuple[Path, Path], two: Pair, inputs: Any, tmp_path: Path
) -> None:
    """Of `torch.distributed.checkpoint`, with IN's settings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one process is what is meant
        torch.distributed.checkpoint.save(two.rl.model.state_dict(), checkpoint_id=tmp_path / "dcp")
    pair = Pair.from_pretrained(folders[0], tmp_path / "dcp", one_resident=True, check=False)
    assert same(pair, two, inputs)
    with pytest.raises(FrankenlensError, match="another model is open in IN's memory"):
        Pair.beside(pair.in_, folders[0], folders[1], one_resident=True)
    pair.turns.end()  # type: ignore[union-attr]
    again = Pair.beside(pair.in_, folders[0], folders[1], one_resident=True, check=False)
    assert same(again, two, inputs)


def test_weights_elsewhere_are_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    offload = {"device_map": {"": "disk"}, "offload_folder": str(tmp_path)}
    with pytest.raises(FrankenlensError, match="offloaded.*open two models"):
        Pair.from_pretrained(*folders, one_resident=True, check=False, **offload)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(FrankenlensError, match="is an adapter.*Merge it"):
        Pair.from_pretrained(folders[0], adapter, one_resident=True)


def test_memory_that_holds_both_is_not_written_over(one: Pair) -> None:
    """Where there is no room for a model's weights set aside, they would go into its own memory."""
    refused = pytest.raises(FrankenlensError, match="holds the other one of its pair too")
    with refused, swapped(one.in_.model, list, "a test", Spill(0, "a test")):
        pass
