"""Pictures: what is on the axes is what was given; commands write whole files, and name what they cannot draw."""

import json
import sys

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="matplotlib is part of the plot extra")

from folders import changed, weights, write_checkpoint
from matplotlib.figure import Figure

import bitdelta
from bitdelta import plot
from bitdelta.bench import cuda_cases
from bitdelta.cli import main
from bitdelta.plot.deltas import equal_rank, explained, place
from bitdelta.plot.picture import PICTURES
from bitdelta.plot.style import plain_log


@pytest.fixture
def ax():
    return Figure(layout="constrained").subplots()


def score(value):
    return {"logit_mse": {"mean": value, "spread": value / 10, "values": [value] * 2}}


def planes_report():
    labels = {
        "base": 8.0,
        "fine-tune": 0.0,
        "0, linears of the base": 4.0,
        "1, a": 1.0,
        "2, a": 0.1,
        "1, b": 0.5,
        "2, b": 0.05,
    }
    rows = [{"label": label, "code": score(value)} for label, value in labels.items()]
    return {"study": "planes", "title": "planes", "seeds": [0, 1], "rows": rows}


def model_report():
    rows = [
        {"kind": kind, "rank": 0, "tenants": n, "microseconds": us * n, "bytes": n * size}
        for kind, us, size in (("merged", 2e3, 3e9), ("deltas", 1e3, 1e9))
        for n in (1, 2, 4)
    ]
    rows = [{**row, "spread": 0.1, "tokens_per_second": 1.0} for row in rows]
    rows.append({"kind": "load", "microseconds": 1.0, "times": 2.0})
    return {"suite": "model", "quick": False, "shape": "s", "layers": 2, "rows": rows}


def latency_report():
    rows = [
        {
            "kind": kind,
            "rank": rank,
            "size": n,
            "tenants": t,
            "threads": 2,
            "microseconds": us * n * t,
            "spread": 0.1,
        }
        for kind, rank, us in (
            ("naive", None, 4.0),
            ("deltas", None, 1.0),
            ("lora", 16, 2.0),
            ("lora", 128, 3.0),
        )
        for n in (1000, 2000)
        for t in (4, 1)
    ]
    return {"suite": "latency", "quick": False, "rows": rows}


def io_report():
    rows = [
        {"kind": "maps", "case": "reading maps", "bytes_per_second": 3e9},
        {"kind": "swap", "case": "hot-swap", "bytes_per_second": 2e9},
        {"kind": "memory", "case": "memory", "times": 2.0},
    ]
    limits = [{"threads": 2, "bandwidth": 9e9, "flops": 1e9}, {"write": 1e9, "read": None}]
    return {"suite": "io", "quick": False, "limits": limits, "rows": rows}


def calibrate_report():
    layer = {"case": "[4, 4]", "inputs": 1.0, "factor": 2.0, "fit": 3.0, "held_out": 4.0, "seconds": 10.0}
    model = {"case": "a Llama", "seconds": 5.0}
    rows = [{**layer, "distillation_seconds": 20.0}, {**model, "distillation_seconds": 30.0}]
    return {"suite": "calibrate", "threads": 1, "quick": False, "rows": rows}


def cpu_report():
    rows = [
        {"kind": kind, "threads": 1, "shape": [n, 8], "rows": m, "microseconds": us * m, "spread": 0.0}
        for kind, us in (("dense", 900.0), ("dense", 800.0), ("delta", 100.0))
        for n in (16, 32)
        for m in (1, 4)
    ]
    return {"suite": "cpu", "rows": rows}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base, its fine-tune and a delta of two planes."""
    root, rng = tmp_path_factory.mktemp("plot"), np.random.default_rng(0)
    names = [
        f"model.layers.{i}.{part}.weight" for i in (0, 1) for part in ("mlp.up_proj", "self_attn.q_proj")
    ]
    base = {name: weights(rng, (32, 64)) for name in names}
    tuned = {name: changed(rng, weight) for name, weight in base.items()}
    write_checkpoint(root / "base", base)
    write_checkpoint(root / "tuned", tuned)
    bitdelta.compress(root / "base", root / "tuned", root / "delta", planes=2)
    return root


def line(ax, label):
    """x and y of the line or the bars of error with this label."""
    handles, labels = ax.get_legend_handles_labels()
    handle = handles[labels.index(label)]
    handle = handle[0] if isinstance(handle, tuple) else handle
    return np.array(handle.get_xdata()).tolist(), np.array(handle.get_ydata()).tolist()


def test_quality_has_a_line_for_each_way_and_begins_at_no_bits(ax):
    assert plot.quality(planes_report(), ax=ax) is ax
    assert line(ax, "a") == ([0, 1, 2], [4.0, 1.0, 0.1]) and line(ax, "b") == ([0, 1, 2], [4.0, 0.5, 0.05])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("bits per weight", "logit MSE against the fine-tune")
    assert ax.get_yscale() == "log" and "2 seeds" in ax.get_title()


def test_quality_of_rows_of_the_same_bits_is_a_figure_a_row(ax):
    rows = [
        {"label": label, "code": score(value)}
        for label, value in (("base", 2.0), ("x", 0.5), ("fine-tune", 0.0))
    ]
    plot.quality({"study": "s", "seeds": [0], "rows": rows}, ax=ax)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["base", "x"]
    assert [text.get_text() for text in ax.texts] == ["2", "0.5"]
    assert [bar.get_width() for bar in ax.patches] == [2.0, 0.5] and ax.patches[0].get_hatch()


def test_memory_is_in_the_unit_that_fits(ax):
    plot.memory(model_report(), ax=ax)
    assert line(ax, "a merged model each") == ([1, 2, 4], [3, 6, 12])
    assert line(ax, "base + deltas, one batch") == ([1, 2, 4], [1, 2, 4])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("number of models", "memory (GB)")


def test_memory_from_the_sizes_of_one_delta(ax):
    plot.memory({"bytes": 100, "finetuned_bytes": 1600}, ax=ax)
    x, y = line(ax, "base + a delta each")
    assert x[-1] == 64 and y[-1] == (1600 + 64 * 100) / 1e3 and ax.get_ylabel() == "memory (kB)"


def test_latency_against_tenants_rows_and_size(ax):
    plot.latency(model_report(), ax=ax)
    assert line(ax, "a merged model each") == ([1, 2, 4], [2, 4, 8])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("tenants, a row each", "time (ms)")
    for against, x in (("rows", [1, 4]), ("size", [16, 32])):  # of the dense products the fastest
        other = plot.latency(cpu_report(), against, ax=Figure().subplots())
        found = line(other, "dense product, the fastest here")
        assert (
            found == (x, [0.8, 3.2] if against == "rows" else [0.8, 0.8])
            and other.get_ylabel() == "time (ms)"
        )


def test_latency_of_one_linear_against_tenants_and_size(ax):
    plot.latency(latency_report(), ax=ax)  # of the largest size
    assert line(ax, "a dense product each") == ([1, 4], [8, 32])
    assert line(ax, "base + LoRA r=128, gathered") == ([1, 4], [6, 24])
    assert ax.get_title() == "One linear, 2000 x 2000, 2 threads"
    other = plot.latency(latency_report(), "size", at=1, ax=Figure().subplots())
    assert line(other, "base + deltas, one call") == ([1000, 2000], [1, 2])
    assert other.get_title() == "One linear, 1 tenant, a row each, 2 threads"
    with pytest.raises(ValueError, match="at: expected one of 1, 4, got 2"):
        plot.latency(latency_report(), "size", at=2, ax=ax)
    for option in ({"at": 4}, {"threads": 1}):
        with pytest.raises(ValueError, match="is an option of a report of"):
            plot.latency(model_report(), **option, ax=ax)


def test_latency_on_a_gpu_is_ours_first_and_of_one_linear(ax):
    problem = {
        "kind": cuda_cases.WHOLE,
        "model": "7B",
        "linear": "gate_up",
        "rows": 1,
        "mix": cuda_cases.EVEN,
    }
    problem |= {"planes": 1, "columns": False, "spread": 0.1}
    rows = [
        {**problem, "by": by, "tenants": tenants, "microseconds": us * tenants}
        for by, us in ((cuda_cases.BMM, 4e3), (cuda_cases.OURS, 1e3))
        for tenants in (16, 1)
    ]
    rows.append({**rows[0], "linear": "down"})
    report = {"suite": "cuda", "machine": {"gpu": "A GPU"}, "rows": rows}
    plot.latency(report, ax=ax)
    assert ax.get_legend_handles_labels()[1] == [cuda_cases.OURS, cuda_cases.BMM]
    assert line(ax, cuda_cases.BMM) == ([1, 16], [4, 64]) and "A GPU" in ax.get_title()
    with pytest.raises(ValueError, match="no products of 7B gate_up"):
        plot.latency({**report, "rows": rows[-1:]}, ax=ax)


def test_rates_are_beside_what_memory_and_disk_allow(ax):
    plot.rates(io_report(), ax=ax)
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names == ["memory: reading", "disk: writing", "reading maps", "hot-swap"]
    assert [bar.get_width() for bar in ax.patches] == [9, 1, 3, 2] and ax.get_xlabel() == "GB/s"
    assert [bool(bar.get_hatch()) for bar in ax.patches] == [True, True, False, False]
    with pytest.raises(ValueError, match="no rates"):
        plot.rates(model_report(), ax=ax)


def test_fitting_is_stacked_by_part_beside_distillation(ax):
    plot.fitting(calibrate_report(), ax=ax)
    assert [bar.get_width() for bar in ax.patches] == [1, 2, 3, 4, 20, 5, 30]
    assert [bar.get_x() for bar in ax.patches][:4] == [0, 1, 3, 6]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["[4, 4]", "a Llama"]
    labels = ax.get_legend_handles_labels()[1]
    assert len(labels) == len(set(labels)) == 6
    with pytest.raises(ValueError, match="no fits"):
        plot.fitting(io_report(), ax=ax)


def demo_report():
    rows = [
        {"model": "base", "logit_mse": 2.0},
        {"model": "fine-tune"},
        {"model": "fitted", "logit_mse": 0.1},
    ]
    return {"finetunes": {"a": {"text": "letters", "rows": rows}, "b": {"text": "names", "rows": rows}}}


def test_the_demonstration_has_a_marker_for_each_fine_tune(ax):
    plot.demo(demo_report(), ax=ax)
    assert line(ax, "a: letters") == ([2.0, 0.1], [0, 1]) and line(ax, "b: names") == line(ax, "a: letters")
    assert [label.get_text() for label in ax.get_yticklabels()] == ["base", "fitted"]
    with pytest.raises(ValueError, match="no fine-tunes"):
        plot.demo(io_report(), ax=ax)


def test_a_logarithmic_axis_of_a_narrow_range_has_more_than_one_number(ax):
    ax.plot([0.0009, 0.0018], [0, 1])
    plain_log(ax, "x")
    low, high = ax.get_xlim()
    assert len([tick for tick in ax.get_xticks() if low <= tick <= high]) > 2


def test_loss_has_the_curve_and_the_held_out_ends(ax):
    report = {"curve": [3.0, 2.0, 1.0], "loss": "kl", "held_out_before": 3.5, "held_out_after": 1.5}
    plot.loss(report, ax=ax)
    assert line(ax, "training rows, each step") == ([1, 2, 3], [3, 2, 1])
    assert line(ax, "held-out rows, after")[1] == [1.5, 1.5]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("step", "KL divergence (nats per token)")


def test_layer_errors_are_those_of_the_delta(folders, ax):
    packfile = bitdelta.load(folders / "delta")
    plot.layer_errors(packfile, ax=ax)
    grid = ax.images[0].get_array()
    rows = [label.get_text() for label in ax.get_yticklabels()]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "1"] and grid.shape == (2, 2)
    for name, entry in packfile.entries.items():
        layer, projection = place(name)
        assert grid[rows.index(projection), layer] == entry["relative_error"]
    with pytest.raises(ValueError, match="has a output_error"):
        plot.layer_errors(packfile, "output_error", Figure().subplots())


def test_scales_of_a_projection_are_shares_of_its_rows(folders, ax):
    plot.scales(bitdelta.load(folders / "delta"), 1, ax)
    handles, labels = ax.get_legend_handles_labels()
    assert sorted(labels) == ["mlp.up_proj", "self_attn.q_proj"] and "plane 2" in ax.get_title()
    assert all(np.isclose(handle.get_data().values.sum(), 100) for handle in handles)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("scale (change of a weight)", "share of rows (%)")
    with pytest.raises(ValueError, match="plane: expected one"):
        plot.scales(bitdelta.load(folders / "delta"), 2, Figure().subplots())


def test_variance_of_a_low_rank_ends_at_its_rank(ax, rng):
    d = rng.normal(size=(16, 3)) @ rng.normal(size=(3, 40))
    share = explained(d)
    assert share.shape == (16,) and share[1] < 0.999 and np.allclose(share[2:], 1)
    size = np.linalg.svd(d, compute_uv=False) ** 2
    assert np.allclose(share, np.cumsum(size) / size.sum())
    plot.variance({"lora": d}, ax=ax)
    r = equal_rank(16, 40)
    assert line(ax, f"lora (r = {r})")[1] == (100 * share).tolist()
    assert ax.lines[1].get_xdata() == [r] and ax.get_ylabel() == "explained variance of the change (%)"
    assert 4 * (16 + 40) * r // 2 <= 16 * 40 // 8 + 4 * 16
    with pytest.raises(ValueError, match="other than 0"):
        plot.variance({"none": np.zeros((2, 2))}, ax=Figure().subplots())


def test_every_picture_is_written_by_the_command(folders, tmp_path, capsys):
    reports = {
        "planes": planes_report(),
        "model": model_report(),
        "loss": {"curve": [2.0, 1.0], "loss": "mse"},
        "demo": demo_report(),
        "io": io_report(),
        "calibrate": calibrate_report(),
    }
    for name, report in reports.items():
        (tmp_path / name).write_text(json.dumps(report))
    delta = str(folders / "delta")
    cases = {
        "quality": [tmp_path / "planes"], "memory": [delta], "latency": [tmp_path / "model"],
        "loss": [tmp_path / "loss"], "rates": [tmp_path / "io"], "fitting": [tmp_path / "calibrate"],
        "demo": [tmp_path / "demo"],
        "layer-errors": [delta], "scales": [delta], "variance": [folders / "base", folders / "tuned"],
    }  # fmt: skip
    assert set(cases) == set(PICTURES)
    for name, inputs in cases.items():
        out = tmp_path / "new" / f"{name}.svg"
        assert (
            main(["plot", name, *map(str, inputs), "--out", str(out), "--title", f"T {name}", "--json"]) == 0
        ), name
        report = json.loads(capsys.readouterr().out)
        assert report["title"] == f"T {name}" and report["x"] and report["series"]
        assert report["bytes"] == out.stat().st_size and "<svg" in out.read_text()
    assert {path.suffix for path in (tmp_path / "new").iterdir()} == {".svg"}
    before = out.read_bytes()
    assert main(["plot", name, *map(str, inputs), "--out", str(out), "--title", f"T {name}"]) == 0
    assert out.read_bytes() == before  # the same input, the same bytes


def test_a_failed_write_leaves_what_was_there(folders, tmp_path, monkeypatch, capsys):
    out = tmp_path / "x.png"
    out.write_bytes(b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("bitdelta.plot.picture.os.replace", fail)
    assert main(["plot", "scales", str(folders / "delta"), "--out", str(out)]) == 2
    assert "disk full" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"] and out.read_bytes() == b"old"


@pytest.mark.parametrize(
    "arguments, said",
    {
        "picture": (["nothing", "a", "--out", "x.png"], "plot: expected one of quality, memory"),
        "no out": (["loss", "a"], "out: expected --out FILE"),
        "suffix": (["loss", "a", "--out", "x.gif"], "out: expected a file that ends in .png, .svg, .pdf, got 'x.gif'"),
        "inputs": (["loss", "a", "b", "--out", "x.png"], "input: expected one report or delta for loss, got 2"),
        "missing": (["loss", "a", "--out", "x.png"], "a: no such file"),
        "text": (["loss", "text", "--out", "x.png"], "text: not JSON"),
        "list": (["loss", "list", "--out", "x.png"], "list: expected a JSON object, got list"),
        "other": (["loss", "other", "--out", "x.png"], "other: report: it has no curve"),
        "rows": (["quality", "other", "--out", "x.png"], "other: report: expected one with 'study' and 'rows'"),
        "shape": (["memory", "half", "--out", "x.png"], "half: not a report that memory can draw"),
        "option": (["loss", "a", "--plane", "1", "--out", "x.png"], "plane: it is an option of scales, not of loss"),
        "metric": (["quality", "other", "--metric", "f1", "--out", "x.png"], "metric: expected one of logit_mse"),
    }.values(),
)  # fmt: skip
def test_what_cannot_be_drawn_is_named(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, text in (
        ("text", "{"),
        ("list", "[]"),
        ("other", "{}"),
        ("half", '{"suite":"model","rows":[{"tokens_per_second":1}]}'),
    ):
        (tmp_path / name).write_text(text)
    assert main(["plot", *arguments]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "x.png").exists()


def test_without_matplotlib_the_error_says_what_to_install(folders, tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(bitdelta.Error, match=r"pip install 'bitdelta\[plot\]'"):
        plot.loss({"curve": [1.0]})
    assert main(["plot", "scales", str(folders / "delta"), "--out", str(tmp_path / "x.png")]) == 2
    assert "pip install 'bitdelta[plot]'" in capsys.readouterr().err
