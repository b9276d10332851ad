"""The front door: `import frankenlens as fl`, and every method by its name (`fl.component_map`, `fl.logit_lens`, ...).

Importing it imports nothing else, no torch either; a name's module is imported when the name is first used.

A name that is a method's is the method's function, also where its room is called the same: `fl.lockstep(...)` and
`fl.transfer(...)` are what `interp.lockstep` and `interp.transfer` are named after. A room is here by its own name
where it holds words that only mean something in it, such as `fl.knockout.windows` and `fl.localization.windows`, or
much besides its methods, as `fl.tasks`, `fl.grading` and `fl.statistics` do.

`hooks`, `interp` and `experiments` are common names of folders. Where Python would find somebody else's under one of
them, there is one ImportError that says whose, and what to do.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what editors and pyright complete from; a test holds it to the table below
    # fmt: off
    # isort: off
    # ruff: noqa: F401
    from experiments import embedded
    from hooks import ActivationCache, Address, FrankenlensError, HookContext, HookedVLM, HookPoint
    from hooks.memory import memory_limit
    from hooks.nnsight.remote import RemoteVLM
    from hooks.processors import load_processor
    from interp import comparison, knockout, localization, planting, statistics, steering
    from interp.attention import (
        AttentionView, attention_mass, attention_shift, attention_view, plot_head_shift, plot_shift, shift,
        shifts,
    )
    from interp.comparison import Checkpoint, by_address, compare, energy_outside, principal_angles, spectra
    from interp.comparison.plots import plot_directions, plot_energy, plot_spectra
    from interp.decision import (
        Decision, DecisionSet, changed_weights, find_decisions, followed, null_changes, null_pair_denominator,
        recovery_refused, two_by_two,
    )
    from interp.fine_grained import (
        ask, change_table, described_by_model, fine_grained, fine_grained_table, in_words, metrics_of, plot_metrics,
        questions, with_descriptions,
    )
    from interp.freezing import Frozen, freeze, frozen_rows, train_only
    from interp.freezing.losses import losses, plot_losses
    from interp.hypotheses import (
        Claim, ClaimError, Family, Verdict, examples_of, plot_claims, put_to_test, read_claims, verdict_table,
    )
    from interp.knockout import (
        PAPER_ROUTES, ROUTES, Knockout, greedy_knockout, knocked_out, knockout_effects, knockout_hooks,
        null_route_table, plot_flow, plot_routes, route_table, routes, up_to_the_answer,
    )
    from interp.lens import (
        ImageGrid, OutputHead, TunedLens, answer_layers, compare_lenses, direct_logit_attribution, grouped,
        image_grids, logit_lens, train_tuned_lens,
    )
    from interp.lens.plots import plot_answers, plot_apart, plot_attribution, plot_image, plot_own, plot_tokens
    from interp.lens.tables import answer_table, apart_table, attribution_table, own_table
    from interp.localization import (
        Ablation, Swap, ablate, layer_contributions, outcome_shares, swap_hooks, swap_table, vision_swap,
    )
    from interp.localization.plots import plot_ablations, plot_head_ablations, plot_swaps
    from interp.lockstep import Moved, Sampling, Written, confirm, confirmation, follow, lockstep, random_components
    from interp.lockstep.plots import plot_confirmation, plot_followed
    from interp.map import (
        MAP_POINTS, Component, attribute, attribute_within, cached_names, component_map, components, noise_cells,
        now_and_before, patch, plot_map, plot_strongest, strongest, summarise, verify,
    )
    from interp.metrics import (
        AnswerLogProbability, KLToReference, LogitDifference, Metric, SoftDifference, TraceLogLikelihood, evaluate,
    )
    from interp.pair import Pair, greedy
    from interp.pair.elsewhere import Traces, read_traces
    from interp.pair.trajectory import Trajectory, steps_of
    from interp.paths import Path, Receiver, path_effects, path_map, paths_in_order, strongest_senders
    from interp.paths.pair import pair_paths, path_table, sender_table
    from interp.paths.plots import plot_path_graph, plot_path_map
    from interp.planting import Plant, planted, trial
    from interp.planting.plots import plot_found
    from interp.planting.table import by_pair, found_table, null_table
    from interp.prompts import Prompt, PromptBatch, PromptBuilder, collate
    from interp.prompts.roles import TraceFormat, count_faults
    from interp.questions import Example, fingerprint, grading, readers, tasks
    from interp.questions.readers import (
        Fields, read_gsm8k, read_jsonl, read_math500, read_mathvista, read_vision_function, read_vision_functions,
    )
    from interp.regions import Partition, of_sizes, parse_partition, thirds
    from interp.results import load_dataset, provenance, publishing, save_dataset
    from interp.results.forest import plot_transfer
    from interp.statistics import (
        Interval, adjust, bootstrap_difference, bootstrap_mean, bootstrap_ratio, difference_interval,
        examples_for_mean, examples_for_shares, interval_text, mcnemar, mean_interval, mean_test, ratio_interval,
        sign_flip, wilson_interval,
    )
    from interp.steering import (
        Direction, Steering, dose_response, dose_table, mean_difference, pair_directions, principal_directions,
        random_directions, steer, steer_both, steer_hooks,
    )
    from interp.steering.plots import plot_dose
    from interp.sweep import Intervention, head_map, residual_map, sweep
    from interp.trajectory import head_survival, over_steps, step_table, update_energy
    from interp.trajectory.plots import plot_trajectory
    from interp.transfer import (
        Graft, MergeReport, Recipe, Variant, addressed, answers, as_table_2, controls, doses, factors, grafted,
        measured_graft, merge, orders, parts, save_grafted, transfer, transfer_table,
    )
    from interp.updates import Realized, as_large, random_update
    # isort: on
    # fmt: on

    __version__: str

_NAMES = {  # module -> its names here; one that is no attribute is a module
    "experiments": "embedded",
    "hooks.memory": "memory_limit",
    "hooks": "ActivationCache Address FrankenlensError HookContext HookPoint HookedVLM",
    "hooks.nnsight.remote": "RemoteVLM",
    "hooks.processors": "load_processor",
    "interp": "comparison knockout localization planting statistics steering",
    "interp.attention": "AttentionView attention_mass attention_shift attention_view plot_head_shift plot_shift shift "
    "shifts",
    "interp.comparison": "Checkpoint by_address compare energy_outside principal_angles spectra",
    "interp.comparison.plots": "plot_directions plot_energy plot_spectra",
    "interp.decision": "Decision DecisionSet changed_weights find_decisions followed null_changes "
    "null_pair_denominator recovery_refused two_by_two",
    "interp.fine_grained": "ask change_table described_by_model fine_grained fine_grained_table in_words metrics_of "
    "plot_metrics questions with_descriptions",
    "interp.freezing": "Frozen freeze frozen_rows train_only",
    "interp.freezing.losses": "losses plot_losses",
    "interp.hypotheses": "Claim ClaimError Family Verdict examples_of plot_claims put_to_test read_claims "
    "verdict_table",
    "interp.knockout": "PAPER_ROUTES ROUTES Knockout greedy_knockout knocked_out knockout_effects knockout_hooks "
    "null_route_table plot_flow plot_routes route_table routes up_to_the_answer",
    "interp.lens": "ImageGrid OutputHead TunedLens answer_layers compare_lenses direct_logit_attribution grouped "
    "image_grids logit_lens train_tuned_lens",
    "interp.lens.plots": "plot_answers plot_apart plot_attribution plot_image plot_own plot_tokens",
    "interp.lens.tables": "answer_table apart_table attribution_table own_table",
    "interp.localization": "Ablation Swap ablate layer_contributions outcome_shares swap_hooks swap_table "
    "vision_swap",
    "interp.localization.plots": "plot_ablations plot_head_ablations plot_swaps",
    "interp.lockstep": "Moved Sampling Written confirm confirmation follow lockstep random_components",
    "interp.lockstep.plots": "plot_confirmation plot_followed",
    "interp.map": "MAP_POINTS Component attribute attribute_within cached_names component_map components "
    "noise_cells now_and_before patch plot_map plot_strongest strongest summarise verify",
    "interp.metrics": "AnswerLogProbability KLToReference LogitDifference Metric SoftDifference TraceLogLikelihood "
    "evaluate",
    "interp.pair": "Pair greedy",
    "interp.pair.elsewhere": "Traces read_traces",
    "interp.pair.trajectory": "Trajectory steps_of",
    "interp.paths": "Path Receiver path_effects path_map paths_in_order strongest_senders",
    "interp.paths.pair": "pair_paths path_table sender_table",
    "interp.paths.plots": "plot_path_graph plot_path_map",
    "interp.planting": "Plant planted trial",
    "interp.planting.plots": "plot_found",
    "interp.planting.table": "by_pair found_table null_table",
    "interp.prompts": "Prompt PromptBatch PromptBuilder collate",
    "interp.prompts.roles": "TraceFormat count_faults",
    "interp.questions": "Example fingerprint grading readers tasks",
    "interp.questions.readers": "Fields read_gsm8k read_jsonl read_math500 read_mathvista read_vision_function "
    "read_vision_functions",
    "interp.regions": "Partition of_sizes parse_partition thirds",
    "interp.results": "load_dataset provenance publishing save_dataset",
    "interp.results.forest": "plot_transfer",
    "interp.statistics": "Interval adjust bootstrap_difference bootstrap_mean bootstrap_ratio "
    "difference_interval examples_for_mean examples_for_shares interval_text mcnemar mean_interval mean_test "
    "ratio_interval sign_flip wilson_interval",
    "interp.steering": "Direction Steering dose_response dose_table mean_difference pair_directions "
    "principal_directions random_directions steer steer_both steer_hooks",
    "interp.steering.plots": "plot_dose",
    "interp.sweep": "Intervention head_map residual_map sweep",
    "interp.trajectory": "head_survival over_steps step_table update_energy",
    "interp.trajectory.plots": "plot_trajectory",
    "interp.transfer": "Graft MergeReport Recipe Variant addressed answers as_table_2 controls doses factors grafted "
    "measured_graft merge orders parts save_grafted transfer transfer_table",
    "interp.updates": "Realized as_large random_update",
}
_WHERE = {name: module for module, names in _NAMES.items() for name in names.split()}
_OWN = ("hooks", "interp", "experiments")

__all__ = ["__version__", "main", *_WHERE]  # pyright: ignore[reportUnsupportedDunderAll]


def main(argv: Sequence[str] | None = None) -> int:
    """The command `frankenlens`, as `experiments.cli.main`; Ctrl-C, while it is imported too, is one line and 130."""
    came: list[int] = []
    with _interruptions(came):
        try:
            _require_own()
            code = import_module("experiments.cli").main(argv)
        except BaseException:  # where Ctrl-C cuts an import off, other errors may come of it
            if not came:
                raise
            code = 2
        if came and code not in (0, 130):
            print("frankenlens: interrupted", file=sys.stderr)
            code = 130
    return code


@contextmanager
def _interruptions(came: list[int]) -> Iterator[None]:
    """Note every Ctrl-C before it is raised; where Python cannot raise it, it comes again a little later."""
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not ours or threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number: int, frame: Any) -> None:
        came.append(number)
        raise KeyboardInterrupt

    def lost(unraisable: Any) -> None:
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            later = threading.Timer(0.05, signal.raise_signal, [signal.SIGINT])
            later.daemon = True
            later.start()
        else:
            own_hook(unraisable)

    own_hook, sys.unraisablehook = sys.unraisablehook, lost
    signal.signal(signal.SIGINT, note)
    atexit.register(
        signal.signal, signal.SIGINT, signal.SIG_IGN
    )  # Python's own way out has nothing to interrupt
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.unraisablehook = own_hook


if not TYPE_CHECKING:  # pyright would take any name for one of these

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            return import_module("importlib.metadata").version("frankenlens")
        if name not in _WHERE:
            raise AttributeError(f"frankenlens has no {name!r}{_nearest(name)}", name=name)
        _require_own()
        module = import_module(_WHERE[name])
        try:
            value = getattr(module, name)
        except AttributeError:
            value = import_module(f"{_WHERE[name]}.{name}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(__all__)


def _nearest(name: str) -> str:
    found = [] if name.startswith("_") else import_module("difflib").get_close_matches(name, __all__)
    return f". Did you mean {' or '.join(map(repr, found))}?" if found else ""


def _require_own() -> None:
    """Refuse to go on where Python finds another `hooks`, `interp` or `experiments` than those beside this file."""
    here = os.path.dirname(os.path.abspath(__file__))
    found = {name: place for name in _OWN if (place := _found(name))}
    foreign = {name: place for name, place in found.items() if not _same(place, os.path.join(here, name))}
    if not foreign:
        return
    others = " and ".join(f"another {name!r} ({place})" for name, place in foreign.items())
    loaded = any(name in sys.modules for name in foreign)
    after = " Then restart Python, which has imported it already." if loaded else ""
    raise ImportError(
        f"Python finds {others} before frankenlens's own in {here}. Rename it, or take its parent folder off "
        "sys.path (the folder that Python or the notebook was started in is on it, and so is all of PYTHONPATH), or, "
        f"where you do not import it yourself, put frankenlens's folder first: sys.path.insert(0, {here!r}).{after}",
        name=next(iter(foreign)),
        path=next(iter(foreign.values())),
    )


def _found(name: str) -> str:
    """The folder or file that `import name` would take or has taken; "" where there is none."""
    try:
        spec = find_spec(name)
    except ValueError:  # imported, without a spec
        return getattr(sys.modules[name], "__file__", None) or ""
    if spec is None:
        return ""
    return next(iter(spec.submodule_search_locations or ()), spec.origin or "")


def _same(one: str, other: str) -> bool:
    return os.path.normcase(os.path.realpath(one)) == os.path.normcase(os.path.realpath(other))


_require_own()

# As `experiments` does, and read when torch is first imported: OpenMP threads that wait by spinning stall a small model
# on cores that other work shares.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if __name__ == "__main__":
    sys.exit(main())
