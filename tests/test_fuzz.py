"""Random networks, files and command lines keep the promises (`benchmarks/fuzz.py`)."""

import pytest

from benchmarks.fuzz import run_case, run_cases
from kernels import neurons_cpu

COUNT = 100  # 40 s on a core


@pytest.mark.slow
def test_random_cases_keep_their_promises():
    verdicts = run_cases(0, COUNT)
    broken = [f"{kind}:{seed} {v}" for kind, cases in verdicts.items() for seed, v in cases.items() if "BROKEN" in v]
    assert not broken, "\n".join(broken)
    kept = {kind: sum(verdict == "kept" for verdict in cases.values()) for kind, cases in verdicts.items()}
    assert kept["networks"] >= 0.45 * COUNT and kept["files"]  # they are not all refused


@pytest.mark.skipif(neurons_cpu.njit is None, reason="without numba both simulators would be broken")
def test_a_broken_promise_is_found(monkeypatch):
    """A reference whose neurons never fire."""
    monkeypatch.setattr("spike_neurons.if_step", lambda membrane, current, Vthr, mode: (membrane, 0 * membrane))
    verdicts = [run_case("networks", seed) for seed in range(8)]
    assert any("BROKEN: Broken: the simulators differ" in verdict for verdict in verdicts)
