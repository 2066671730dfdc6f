"""The quality report: its arithmetic, and that it tells broken kernels from sound ones, on a small trained model."""

from __future__ import annotations

import functools
import json
import math
import multiprocessing
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastmamba.ops  # noqa: F401
from evals.quality import rules
from evals.quality.__main__ import _parser, _variants, main
from evals.quality.compare import TaskResult, compare, jackknife, mean
from evals.quality.drift import cuts, positions
from evals.quality.evaluate import label_of
from tests.versions import LOWEST

ROOT = Path(__file__).parents[2]
# To 5.20 transformers' own scan takes ten times as long, and at 4,096 tokens over 10 GiB.
slow = pytest.mark.skipif(LOWEST, reason="too slow for a test with transformers' scan before 5.21")
# What the mixer runs; fastmamba.ops.mixer_prefill is the function of that name.
PREFILL: Any = sys.modules["fastmamba.ops.mixer_prefill"]
SOUND_SSD, SOUND_NORM = PREFILL.run_ssd, PREFILL.run_norm


def run(tmp_path, *arguments, model="mamba2"):
    """Exit status of a short run on a small model, and what it wrote."""
    status = main(["--model", model, "--device", "cpu", "--output", str(tmp_path), *arguments])
    return status, json.loads((tmp_path / "quality.json").read_text())


@slow
def test_sound(tmp_path, capsys):
    tasks = "fastmamba_text,fastmamba_cloze,fastmamba_recall_1k"
    status, report = run(tmp_path, "--tokens", "1024", "--tasks", tasks, "--limit", "2")
    assert status == 0, report["broken"]
    assert (tmp_path / "quality.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "Parity holds" in printed
    (model,) = report["models"]
    assert {entry["way"] for entry in model["text"] if entry["run"] == "patched float32"} == {
        "one call",
        "pieces",
        "steps",
    }
    scores = {(entry["task"], entry["metric"]): entry for entry in model["tasks"]}
    assert scores["fastmamba_recall_1k", "exact_match,value"]["original"] == 1.0  # the model can do it
    assert scores["fastmamba_text", "byte_perplexity,none"]["patched"] < 3
    assert scores["fastmamba_cloze", "acc,none"]["identical"] == 1.0


def forgetful(x, dt, A_log, *rest):
    """Decays off by 1%."""
    return SOUND_SSD(x, dt, A_log + math.log(1.01), *rest)


class Losing:
    """The state is lost after 1,024 tokens, whatever parts the sequence comes in."""

    done = 0

    def __call__(self, x, dt, A_log, B, C, D, z, dt_bias, state, *rest):
        self.done = 0 if state is None else self.done
        cut, self.done = 1024 - self.done, self.done + x.shape[1]
        if not 0 < cut < x.shape[1]:
            return SOUND_SSD(x, dt, A_log, B, C, D, z, dt_bias, state, *rest)
        first, second = (
            SOUND_SSD(
                *(t[:, part] for t in (x, dt)), A_log, *(t[:, part] for t in (B, C)), D, z, dt_bias, before, *rest
            )
            for part, before in ((slice(cut), state), (slice(cut, None), None))
        )
        return torch.cat([first[0], second[0]], dim=1), second[1]


def spilling(x, dt, A_log, B, C, D, z, dt_bias, state, *rest):
    """The last chunk takes what lies behind the sequence for tokens."""
    missing = -x.shape[1] % 64
    beyond = (torch.cat([t, t[:, -1:].expand(-1, missing, *t.shape[2:])], dim=1) for t in (x, dt, B, C))
    x_, dt_, B_, C_ = beyond
    y, final = SOUND_SSD(x_, dt_, A_log, B_, C_, D, z, dt_bias, state, *rest)
    return y[:, : x.shape[1]], final


def swapped(x, weight, gate, eps, group_size, norm_before_gate, *rest):
    """The norm before the gate instead of after it."""
    return SOUND_NORM(x, weight, gate, eps, group_size, not norm_before_gate, *rest)


@pytest.mark.parametrize(
    ("model", "name", "broken", "tokens"),
    [
        pytest.param("granite", "run_ssd", forgetful, 512, marks=slow, id="decay"),  # fainter than in mamba2
        pytest.param("mamba2", "run_ssd", Losing(), 1280, marks=slow, id="lost"),
        pytest.param("mamba2", "run_ssd", spilling, 512, marks=slow, id="padding"),
        pytest.param("mamba2", "run_norm", swapped, 512, id="norm"),
    ],
)
def test_broken(monkeypatch, tmp_path, capsys, model, name, broken, tokens):
    for module in ("drift", "__main__"):  # fewer tokens taken one at a time, and so fewer in all
        monkeypatch.setattr(f"evals.quality.{module}.STEPS", 16)
    monkeypatch.setattr(PREFILL, name, broken)
    status, report = run(tmp_path, "--tokens", str(tokens), "--tasks", "none", model=model)
    assert status == 1
    assert report["broken"]
    assert "Parity is broken" in capsys.readouterr().out


@slow
def test_broken_tasks_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(PREFILL, "run_norm", swapped)
    status, report = run(tmp_path, "--tokens", "0", "--tasks", "fastmamba_text", "--limit", "2")
    assert status == 1
    assert any("bits_per_byte" in line for line in report["broken"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "int8"], "--dtype: must be of float32, bfloat16, float16, got 'int8'"),
        (["--precision", "exact,loose"], "--precision: must be of exact, relaxed, got 'loose'"),
        (["--scope", "layer"], "--scope: must be of block, mixer, ssd, got 'layer'"),
        (["--state-dtype", "half"], "--state-dtype: must be of float32, model, got 'half'"),
        (["--tokens", "10"], "--tokens must be 0 or at least 1024, got 10"),
        (["--tokens", "0", "--tasks", "none"], "nothing to measure"),
        (["--tasks", "fastmamba_nothing"], "lm-eval knows no task fastmamba_nothing"),
    ],
)
def test_bad_arguments(capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in " ".join(capsys.readouterr().err.split())


def test_variants():
    options = _parser().parse_args("--dtype bf16,fp32 --precision exact,relaxed --state-dtype float32,model".split())
    assert [label_of(*variant) for variant in _variants(options)] == [
        "patched bfloat16",
        "patched bfloat16, bfloat16 states",
        "patched bfloat16, relaxed",
        "patched bfloat16, relaxed, bfloat16 states",
        "patched float32",  # whose own states are float32 anyway
        "patched float32, relaxed",
    ]


def test_jackknife_of_a_mean_is_the_usual_standard_error():
    values = [0.0, 1.0, 1.0, 3.0]
    expected = np.std(values, ddof=1) / 2
    for aggregate in (mean, lambda part: sum(part) / len(part)):  # the short way and the long one
        score, error = jackknife([values], aggregate)
        assert score == 1.25
        assert error == pytest.approx(expected)
    assert math.isnan(jackknife([[1.0]], mean)[1])


def test_paired_error_leaves_out_what_both_share():
    before = TaskResult({"acc,none": [0.0, 1.0] * 50}, {"acc,none": mean}, [-1.0] * 100, [0] * 100)
    after = TaskResult(
        {"acc,none": [1.0, 1.0] + [0.0, 1.0] * 49}, {"acc,none": mean}, [-1.0] * 99 + [-3.0], [1] + [0] * 99
    )
    (found,) = compare("task", before, after)
    assert found.difference == pytest.approx(0.01)
    assert found.difference_stderr == pytest.approx(0.01)  # one document of a hundred
    assert found.original_stderr > 0.05
    assert found.identical == 0.99
    assert found.loglikelihood == {"median": 0.0, "p99": pytest.approx(0.02, abs=0.05), "max": 2.0}


def test_rules():
    block = {"from": 0, "to": 64, "kl": 1e-4, "top-1 agreement": 1.0}
    half = {"kl": 1e-4, "by position": [block]}

    def drift(kl, last):
        return {"kl": kl, "by position": [block | {"kl": last}]}

    assert not rules.broken_drift("x", drift(1.9e-4, 1.9e-4), half, "bfloat16")
    assert rules.broken_drift("x", drift(2.1e-4, 1e-4), half, "bfloat16")
    assert rules.broken_drift("x", drift(1e-4, 4.1e-4), half, "bfloat16")
    assert rules.broken_drift("x", drift(float("nan"), 1e-4), half, "bfloat16")
    flipped = {"kl": 1e-4, "by position": [block, block | {"kl": 5e-4}]}  # a token sent to other experts, anywhere
    assert not rules.broken_drift("x", drift(1e-4, 1.9e-3), flipped, "bfloat16")
    assert rules.broken_drift("x", drift(1e-4, 2.1e-3), flipped, "bfloat16")
    lost = {"kl": float("nan"), "by position": [block | {"kl": float("nan")}]}
    assert rules.kl_bound(lost["kl"], "float16") is None
    assert not rules.broken_drift("x", drift(1e-4, 1e-4), lost, "float16")
    assert not rules.broken_drift("x", drift(0.9e-8, 0.9e-8), half, "float32")
    assert rules.broken_drift("x", drift(1.1e-8, 1e-9), half, "float32")


def test_positions_and_cuts():
    assert positions(1024).tolist() == list(range(1023))
    many = positions(100_000)
    assert len(many) == len(set(many.tolist())) == 16384
    assert (many[0], many[-1]) == (0, 99_998)
    assert all(cut % 16 for cut in cuts(4096)[:-1])
    assert cuts(4096)[-1] == 4096 - 64


def launch(folder):
    """What accelerate's launcher would have two processes find in their environment, in a file each."""
    from accelerate.commands.launch import main as launcher

    os.environ["ACCELERATE_USE_CPU"] = "true"
    # On CPUs accelerate starts several processes by MPI only, unless it is told of several GPUs.
    options = ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0", "--no_python"]
    sys.argv = ["accelerate", *options, "sh", "-c", f"env > '{folder}'/$RANK.env"]
    launcher()


def rank(number, port, folder, arguments):
    """One of the processes, with lm-eval's command line."""
    from accelerate.state import AcceleratorState, PartialState

    from fastmamba import lm_eval

    answer = lm_eval.FastMambaLM.loglikelihood

    def loglikelihood(self, requests, **options):
        (folder / f"{number}.json").write_text(json.dumps(sorted({request.doc_id for request in requests})))
        return answer(self, requests, **options)

    lm_eval.FastMambaLM.loglikelihood = loglikelihood
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    given = (line.partition("=") for line in (folder / f"{number}.env").read_text().splitlines())
    names = ("ACCELERATE_", "TORCHELASTIC_USE", "RANK", "LOCAL_", "WORLD_SIZE", "MASTER_ADDR")
    os.environ.update({name: value for name, _, value in given if name.startswith(names)}, MASTER_PORT=str(port))
    sys.argv = ["fastmamba.lm_eval", *arguments]
    with (folder / f"{number}.txt").open("w") as sys.stdout:
        sys.stderr = sys.stdout
        os.dup2(sys.stdout.fileno(), 1)
        os.dup2(sys.stdout.fileno(), 2)
        lm_eval.main()
        sys.stdout.flush()
        os._exit(0)  # what the tests' own process wants to be done at its exit is not this one's


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_the_module_is_the_command(monkeypatch):
    """`python -m fastmamba.lm_eval` is lm-eval's command line, and takes this model type unless another is named."""
    found = []
    monkeypatch.setattr("lm_eval.api.registry.register_model", lambda *names: lambda model: model)  # it is already
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: found.append(sys.argv[1:]))
    for given, expected in (
        (["run", "--tasks", "t"], ["run", "--tasks", "t", "--model", "fastmamba"]),
        (["run", "--model=hf"], ["run", "--model=hf"]),
        (["ls"], ["ls"]),
    ):
        monkeypatch.setattr(sys, "argv", ["lm_eval.py", *given])
        runpy.run_module("fastmamba.lm_eval", run_name="__main__")
        assert found.pop() == expected


def test_command_line(monkeypatch, tmp_path):
    """lm-eval's own command line on a patched model, under accelerate in two processes that share the documents."""
    import lm_eval.tasks

    # Its own 13,000 files of tasks, which it would index in each process, and pip's list of packages.
    own = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", own)
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(ROOT)
    arguments = [
        *("run", "--model", "fastmamba", "--tasks", "fastmamba_cloze", "--limit", "4"),
        *("--include_path", "evals/lm_tasks", "--device", "cpu", "--batch_size", "4", "--output_path", str(tmp_path)),
        *("--model_args", "pretrained=evals/models/mamba2,dtype=float32,patch_backend=torch"),
        "--log_samples",
    ]
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as the launcher has it

    def started(function, *given):
        # A copy of this process: another one takes ten seconds to start.
        process = multiprocessing.get_context("fork").Process(target=function, args=given)
        process.start()
        return process

    def status(process):
        process.join(300)
        process.kill()
        return process.exitcode

    assert status(started(launch, tmp_path)) == 0
    ranks = [started(rank, i, store.port, tmp_path, arguments) for i in range(2)]
    found = [status(process) for process in ranks]
    printed = [(tmp_path / f"{i}.txt").read_text() for i in range(2)]
    assert found == [0, 0], printed
    assert [json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2)] == [[0, 2], [1, 3]]
    assert sum(text.count("|fastmamba_cloze|") for text in printed) == 1
    (samples,) = tmp_path.rglob("samples_fastmamba_cloze*.jsonl")
    assert sorted(json.loads(line)["doc_id"] for line in samples.read_text().splitlines()) == [0, 1, 2, 3]
    (results,) = tmp_path.rglob("results_*.json")
    assert json.loads(results.read_text())["n-samples"]["fastmamba_cloze"]["effective"] == 4
