"""The benchmark's own arithmetic, that its arms do the same thing, and (slow) the bars."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from interp.prompts import collate
from tests.benchmarks import floor
from tests.benchmarks.arms import ARMS, IN_THE_DECODER, SCANS, Site, donated
from tests.benchmarks.models import BATCH, FAMILIES, LAYERS, WITH_PEERS, build
from tests.benchmarks.run import sample


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_arms_agree_and_the_closed_form_is_what_a_forward_costs(family: str) -> None:
    setting = build(family)
    inputs = collate(setting.prompts).inputs
    with (
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False, depth=4, custom_mapping=floor.ALSO_COUNTED) as counter,
    ):
        logits = setting.vlm(inputs, use_cache=False).logits
    counts = counter.get_flop_counts()
    parts = [
        sum(n.values())
        for name, n in counts.items()
        if name.endswith(("language_model", "ConditionalGeneration.lm_head"))
    ]
    assert sum(parts) == BATCH * floor.decoder(family, logits.shape[-1])
    given = donated(setting)
    sites = [Site(3, None, 250), Site(5, 2, None), Site(11, 1, 263), Site(0, None, 0)]  # LFM2 attends in both
    found, missing = {}, {}
    with torch.no_grad():
        for name, make in ARMS.items():
            if name in IN_THE_DECODER and family not in WITH_PEERS:
                continue
            try:
                found[name] = make(setting, given)(sites)
            except ImportError as error:
                missing[name] = str(error)
        clean = setting.metric(logits, collate(setting.prompts))
    if missing:  # TransformerLens's adapter for Qwen2.5-VL wants torchvision
        assert set(missing) == {"TransformerLens"}
        assert "torchvision" in missing["TransformerLens"]
    allowed = 1e-5 * max(1.0, float(logits.abs().max()))
    for name, values in found.items():
        assert (values - found["plain hooks"]).abs().max() <= allowed, name
    assert (found["plain hooks"] - clean).abs().max() > 100 * allowed


def test_the_sample_is_spread_over_layers_and_tokens() -> None:
    for scan, sites in SCANS.items():
        if scan == "nothing to reuse":
            continue
        picked = [sites[i] for i in sample(sites)]
        assert {site.layer for site in picked} == set(range(LAYERS))
        columns = [site.token for site in picked if site.token is not None]
        if len({site.token for site in sites}) > 1:
            middle = sum(columns) / len(columns)
            whole = [site.token for site in sites if site.token is not None]
            assert abs(middle - sum(whole) / len(whole)) < 0.1 * (max(whole) - min(whole))


@pytest.mark.slow
def test_bars(tmp_path: Path) -> None:
    """In a process of its own, without the runtime type checks of the tests."""
    command = [sys.executable, "-m", "tests.benchmarks.run", "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    bars = dict(zip(SCANS, (16, 4.5, 2.5, 50), strict=False))
    for family, found in json.loads((tmp_path / "results.json").read_text()).items():
        for scan, row in found["scans"].items():
            assert row["rate_over_plain"] >= 0.8, (family, scan)
        for scan, bar in bars.items() if family in WITH_PEERS else ():
            row = found["scans"][scan]
            assert row["flops_run_over_unavoidable"] <= 1.25, scan
            for peer, times in row["faster"].items():
                assert peer == "ours" or times >= bar, (scan, peer, times)
        row = found["scans"]["nothing to reuse"]
        assert row["faster"]["plain hooks"] >= 1 / 1.05
