"""compress: every kind of tensor travels in its form or is refused by name, whatever the shards."""

import json

import numpy as np
import pytest
from folders import changed, read_all, same_bits, weights, write_checkpoint

from bitdelta import reference
from bitdelta.array import to_float32
from bitdelta.compress import compress
from bitdelta.errors import BaseMismatchError, Error, FormatError
from bitdelta.info import info
from bitdelta.merge import merge
from bitdelta.packfile import load
from bitdelta.verify import verify

MATRIX = "model.layers.0.mlp.up_proj.weight"


def pair(tmp_path, before, after, **kwargs):
    return (
        write_checkpoint(tmp_path / "base", before, kwargs.pop("base_config", None)),
        write_checkpoint(tmp_path / "finetuned", after, **kwargs),
    )


def run(tmp_path, before, after, config=None, base_config=None, **options):
    base, finetuned = pair(tmp_path, before, after, config=config, base_config=base_config)
    report = compress(base, finetuned, tmp_path / "delta", **options)
    return report, load(tmp_path / "delta")


@pytest.fixture
def matrices(rng):
    before = {MATRIX: weights(rng, (40, 300))}
    return before, {MATRIX: changed(rng, before[MATRIX])}


def refused(tmp_path, before, after, kind, words, **options):
    with pytest.raises(kind, match=words):
        run(tmp_path, before, after, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "finetuned"]


@pytest.mark.parametrize("scale", ["tensor", "row", "rank1"])
@pytest.mark.parametrize("planes", [1, 3])
def test_a_matrix_has_the_bits_of_the_reference(tmp_path, matrices, scale, planes):
    before, after = matrices
    _, packfile = run(tmp_path, before, after, scale=scale, planes=planes)
    expected = reference.extract(before[MATRIX], after[MATRIX], planes, scale)
    delta = packfile[MATRIX]
    assert (delta.form, delta.planes, delta.shape) == (scale, planes, (40, 300))
    assert same_bits(delta.sign, expected.sign) and same_bits(delta.scale, expected.scale)
    assert delta.column is None if scale != "rank1" else same_bits(delta.column, expected.column)


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "float16"), ("float16", "float32")])
def test_base_and_fine_tune_may_differ_in_dtype_and_merge_has_the_fine_tunes(tmp_path, rng, dtypes):
    before = {MATRIX: weights(rng, (32, 300), dtypes[0])}
    after = {MATRIX: changed(rng, before[MATRIX], dtypes[1])}
    _, packfile = run(tmp_path, before, after)
    merge(tmp_path / "base", tmp_path / "delta", tmp_path / "merged")
    merged = read_all(tmp_path / "merged")[MATRIX]
    expected = to_float32(before[MATRIX]) + reference.expand(None, packfile[MATRIX])
    from bitdelta.array import from_float32

    assert same_bits(merged, from_float32(expected, dtypes[1]))


def test_what_is_no_matrix_of_floats_or_too_small_travels_whole(tmp_path, rng, matrices):
    before = {
        **matrices[0],
        "norm.weight": weights(rng, (300,)),
        "up_proj.bias": weights(rng, (40,), "float32"),
        "small.weight": weights(rng, (4, 3)),
        "conv.weight": weights(rng, (8, 4, 3, 3)),
        "conv1d.weight": weights(rng, (300, 1, 4)),
        "position_ids": np.arange(9, dtype=np.int64),
        "mask": np.array([True, False, True]),
        "precise.weight": rng.standard_normal((32, 300)),
        "scalar": np.array(3.5, np.float32),
        "empty": np.zeros((0, 5), np.float32),
    }
    after = {
        **matrices[1],
        **{n: w + 1 if n == "position_ids" else ~w for n, w in before.items() if w.dtype.kind in "ib"},
        "precise.weight": before["precise.weight"] + 1e-9,
        **{
            n: changed(rng, w, "float32" if w.dtype == np.float32 else "bfloat16")
            for n, w in before.items()
            if w.dtype.kind in "fu" and w.dtype != np.float64 and n != MATRIX
        },
    }
    report, packfile = run(tmp_path, before, after)
    assert {name for name, entry in packfile.entries.items() if entry["form"] != "whole"} == {MATRIX, "empty"}
    for name in set(before) - {MATRIX, "empty"}:
        assert same_bits(packfile[name], after[name]), name
    assert report["tensors"] == len(after) and report["extra"] == report["absent"] == []


def test_globs_name_what_is_stored_whole(tmp_path, matrices):
    _, packfile = run(tmp_path, *matrices, whole=["*.mlp.*"])
    assert packfile.entries[MATRIX]["form"] == "whole" and same_bits(packfile[MATRIX], matrices[1][MATRIX])


def test_a_glob_that_matches_nothing_is_an_error(tmp_path, matrices):
    refused(tmp_path, *matrices, ValueError, "whole: '\\*.nothing' matches no tensor", whole=["*.nothing"])


@pytest.mark.parametrize("whole", [5, [None]], ids=str)
def test_what_is_no_glob_is_an_error(tmp_path, matrices, whole):
    refused(tmp_path, *matrices, TypeError, "whole: expected globs of names of tensors, got ", whole=whole)


def test_identical_tensors_are_not_stored(tmp_path, rng, matrices):
    before = {**matrices[0], "frozen.weight": weights(rng, (64, 300)), "norm.weight": weights(rng, (300,))}
    report, packfile = run(tmp_path, before, {**before, **matrices[1]})
    assert packfile["frozen.weight"] is None and packfile["norm.weight"] is None
    assert report["forms"]["same"]["parameters"] == 64 * 300 + 300
    assert {key for key in packfile.tensors if not key.startswith(MATRIX)} == set()


def test_a_tensor_that_differs_in_one_last_element_is_not_the_same(tmp_path, rng):
    before = {MATRIX: weights(rng, (400, 300)), "norm.weight": weights(rng, (300,))}
    after = {name: value.copy() for name, value in before.items()}
    after[MATRIX].view(np.uint16)[-1, -1] ^= 1
    after["norm.weight"].view(np.uint16)[-1] ^= 1
    _, packfile = run(tmp_path, before, after)
    assert packfile.entries[MATRIX]["form"] == "row" and packfile.entries["norm.weight"]["form"] == "whole"


def test_a_base_that_is_its_own_fine_tune_gives_an_empty_delta(tmp_path, matrices):
    report, packfile = run(tmp_path, matrices[0], matrices[0])
    assert packfile[MATRIX] is None and packfile.tensors == {} and report["forms"]["same"]["share"] == 1


@pytest.mark.parametrize("scale", ["tensor", "row", "rank1"])
def test_embeddings_and_heads_have_row_scales_in_any_form(tmp_path, rng, scale):
    before = {"model.embed_tokens.weight": weights(rng, (50, 300)), "lm_head.weight": weights(rng, (50, 300))}
    after = {name: changed(rng, weight) for name, weight in before.items()}
    _, packfile = run(tmp_path, before, after, scale=scale)
    assert {entry["form"] for entry in packfile.entries.values()} == {"row"}


def test_added_vocabulary_rows_travel_whole(tmp_path, rng):
    name = "model.embed_tokens.weight"
    before = {name: weights(rng, (50, 300)), "lm_head.bias": weights(rng, (50,))}
    after = {
        name: np.concatenate([changed(rng, before[name]), weights(rng, (3, 300))]),
        "lm_head.bias": weights(rng, (53,)),
    }
    _, packfile = run(
        tmp_path, before, after, config={"vocab_size": 53}, base_config={"vocab_size": 50}, planes=2
    )
    assert packfile[name].shape == (50, 300) and same_bits(packfile.rows(name), after[name][50:])
    assert (
        packfile.entries[name]["shape"] == [53, 300] and packfile.entries["lm_head.bias"]["form"] == "whole"
    )
    merge(tmp_path / "base", tmp_path / "delta", tmp_path / "merged")
    merged = read_all(tmp_path / "merged")
    assert same_bits(merged[name][:50], reference.expand(before[name], packfile[name]))
    assert same_bits(merged[name][50:], after[name][50:])
    assert json.loads((tmp_path / "merged" / "config.json").read_text()) == {"vocab_size": 53}


def test_fewer_vocabulary_rows_use_the_first_of_the_base(tmp_path, rng):
    name = "lm_head.weight"
    before = {name: weights(rng, (64, 300))}
    after = {name: changed(rng, before[name][:50])}
    _, packfile = run(tmp_path, before, after)
    expected = reference.extract(before[name][:50], after[name])
    assert packfile[name].shape == (50, 300) and same_bits(packfile[name].sign, expected.sign)
    merge(tmp_path / "base", tmp_path / "delta", tmp_path / "merged")
    assert same_bits(read_all(tmp_path / "merged")[name], reference.expand(before[name][:50], packfile[name]))


@pytest.mark.parametrize("scale", ["tensor", "row", "rank1"])
def test_a_stack_of_experts_is_a_stack_of_matrices(tmp_path, rng, scale):
    name = "model.layers.0.mlp.experts.gate_up_proj"
    before = {name: weights(rng, (3, 40, 300))}
    after = {name: changed(rng, before[name])}
    _, packfile = run(tmp_path, before, after, scale=scale, planes=2)
    assert packfile.tensors[f"{name}.sign"].shape == (3, 2, 3, 16, 16)
    for i, delta in enumerate(packfile[name]):
        expected = reference.extract(before[name][i], after[name][i], 2, scale)
        assert same_bits(delta.sign, expected.sign) and same_bits(delta.scale, expected.scale)
        assert delta.column is None or same_bits(delta.column, expected.column)
    merge(tmp_path / "base", tmp_path / "delta", tmp_path / "merged")
    merged = read_all(tmp_path / "merged")[name]
    for i, delta in enumerate(packfile[name]):
        assert same_bits(merged[i], reference.expand(before[name][i], delta))


def test_shards_may_differ_and_change_nothing(tmp_path, rng):
    before = {f"model.layers.{i}.q_proj.weight": weights(rng, (32, 300)) for i in range(7)}
    after = {name: changed(rng, weight) for name, weight in before.items()}
    one = pair(tmp_path / "one", before, after)
    compress(*one, tmp_path / "a")
    many = (
        write_checkpoint(tmp_path / "many" / "base", before, n_shards=3),
        write_checkpoint(tmp_path / "many" / "finetuned", after, n_shards=2),
    )
    compress(*many, tmp_path / "b")
    a, b = load(tmp_path / "a"), load(tmp_path / "b")
    assert set(a) == set(b)
    for name in a:
        assert {**a.entries[name]} == {**b.entries[name]} and same_bits(a[name].sign, b[name].sign)


def test_missing_and_extra_tensors_are_reported_and_merge_gives_the_fine_tunes_names(tmp_path, rng, matrices):
    before = {**matrices[0], "lm_head.weight": weights(rng, (50, 300)), "inv_freq": weights(rng, (8,))}
    after = {**matrices[1], "score.weight": weights(rng, (2, 300))}
    report, packfile = run(tmp_path, before, after)
    assert report["extra"] == ["score.weight"] and report["absent"] == ["lm_head.weight", "inv_freq"]
    assert same_bits(packfile["score.weight"], after["score.weight"])
    merge(tmp_path / "base", tmp_path / "delta", tmp_path / "merged")
    assert set(read_all(tmp_path / "merged")) == set(after)


def test_a_renamed_tensor_is_refused_with_its_likely_name(tmp_path, rng, matrices):
    before = {**matrices[0], "model.a.o_proj.weight": weights(rng, (40, 300))}
    after = {"base_model.model.a.o_proj.weight": before["model.a.o_proj.weight"], **matrices[1]}
    refused(
        tmp_path,
        before,
        after,
        BaseMismatchError,
        "base_model.model.a.o_proj.weight: .* has model.a.o_proj.weight of the same shape.*--whole",
    )


def test_checkpoints_without_a_common_name_are_refused(tmp_path, rng):
    before, after = {"a.weight": weights(rng, (40, 300))}, {"b.weight": weights(rng, (41, 300))}
    refused(tmp_path, before, after, BaseMismatchError, "no tensor in common")


def test_a_reshaped_tensor_is_refused_and_the_message_helps(tmp_path, rng):
    before, after = {MATRIX: weights(rng, (40, 300))}, {MATRIX: weights(rng, (48, 300))}
    refused(tmp_path, before, after, BaseMismatchError, rf"{MATRIX}: \[48, 300\] .*\[40, 300\].*--whole")
    compress(tmp_path / "base", tmp_path / "finetuned", tmp_path / "delta", whole=[MATRIX])
    assert same_bits(load(tmp_path / "delta")[MATRIX], after[MATRIX])


@pytest.mark.parametrize("side", ["base", "finetuned"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_inf_are_refused_with_name_and_index(tmp_path, rng, side, value):
    before = {MATRIX: weights(rng, (40, 300), "float32")}
    after = {MATRIX: changed(rng, before[MATRIX], "float32")}
    (before if side == "base" else after)[MATRIX][7, 211] = value
    refused(tmp_path, before, after, ValueError, rf"{MATRIX}: {side}: .*NaN or Inf at \[7, 211\]")


def test_nan_in_an_expert_names_the_expert(tmp_path, rng):
    before = {"experts": weights(rng, (3, 40, 300), "float32")}
    after = {"experts": changed(rng, before["experts"], "float32")}
    after["experts"][1, 2, 3] = np.nan
    refused(tmp_path, before, after, ValueError, r"experts\[1\]: finetuned: .*NaN or Inf at \[2, 3\]")


def test_float8_weights_are_refused_or_stored_whole(tmp_path, rng, matrices):
    fp8 = ("F8_E4M3", (40, 300), bytes(range(250)) * 48)
    before, after = {**matrices[0], "q.weight": weights(rng, (40, 300))}, {**matrices[1], "q.weight": fp8}
    refused(tmp_path, before, after, FormatError, "q.weight: F8_E4M3 in the fine-tune.*--whole 'q.weight'")
    compress(tmp_path / "base", tmp_path / "finetuned", tmp_path / "delta", whole=["q.weight"])
    merge(tmp_path / "base", tmp_path / "delta", tmp_path / "merged")
    assert read_all(tmp_path / "merged")["q.weight"].tobytes() == fp8[2]


@pytest.mark.parametrize("side", ["config", "base_config"])
def test_quantised_checkpoints_are_refused_by_their_config(tmp_path, matrices, side):
    config = {"quantization_config": {"quant_method": "gptq"}}
    refused(tmp_path, *matrices, FormatError, "quantised \\(gptq", **{side: config})


def test_files_that_the_fine_tune_changed_travel(tmp_path, matrices):
    common = {"tokenizer.json": "t", "generation_config.json": "{}"}
    base = write_checkpoint(tmp_path / "base", matrices[0], files={**common, "merges.txt": "x"})
    after = {**common, "tokenizer.json": "t2", "chat_template.jinja": "c", "notes.txt": "private"}
    finetuned = write_checkpoint(tmp_path / "finetuned", matrices[1], files=after)
    (finetuned / "README.md").write_text("a card of the fine-tune")
    compress(base, finetuned, tmp_path / "delta")
    own = {path.name for path in (tmp_path / "delta").iterdir()}
    assert own == {
        "delta_config.json",
        "delta_model.safetensors",
        "README.md",
        "tokenizer.json",
        "chat_template.jinja",
    }
    merge(base, tmp_path / "delta", tmp_path / "merged")
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "merged" / name).read_text() == (finetuned / name).read_text()
    assert not (tmp_path / "merged" / "merges.txt").exists()  # the fine-tune has none


@pytest.mark.parametrize("option", [{"budget": 2.0}, {"fit": "scales"}])
def test_fitting_needs_a_text(tmp_path, matrices, option):
    refused(tmp_path, *matrices, ValueError, next(iter(option)), **option)


@pytest.mark.parametrize(
    "option", [{"planes": 0}, {"planes": 9}, {"planes": True}, {"scale": "column"}, {"fit": "x"}]
)
def test_options_out_of_range_are_refused(tmp_path, matrices, option):
    refused(tmp_path, *matrices, ValueError, f"{next(iter(option))}: expected", **option)


def test_the_target_may_neither_exist_nor_lie_in_an_input(tmp_path, matrices):
    base, finetuned = pair(tmp_path, *matrices)
    for out in (base / "delta", finetuned / "a" / "delta"):
        with pytest.raises(ValueError, match="lies inside"):
            compress(base, finetuned, out)
    for out in (base, finetuned):
        with pytest.raises(FileExistsError, match="exists"):
            compress(base, finetuned, out)
    (tmp_path / "link").symlink_to(base)
    with pytest.raises(ValueError, match="lies inside"):
        compress(base, finetuned, tmp_path / "link" / "delta")
    assert sorted(path.name for path in base.iterdir()) == ["config.json", "model.safetensors"]


def test_missing_parents_of_the_target_are_made(tmp_path, matrices):
    base, finetuned = pair(tmp_path, *matrices)
    compress(base, finetuned, tmp_path / "a" / "b" / "delta")
    assert load(tmp_path / "a" / "b" / "delta")[MATRIX].shape == (40, 300)


def test_a_dry_run_estimates_what_the_run_then_takes(tmp_path, rng):
    before = {f"model.layers.{i}.q_proj.weight": weights(rng, (256, 512)) for i in range(4)}
    base, finetuned = pair(tmp_path, before, {name: changed(rng, w) for name, w in before.items()})
    guess = compress(base, finetuned, tmp_path / "delta", dry_run=True)
    assert not (tmp_path / "delta").exists() and guess["dry_run"] is True
    report = compress(base, finetuned, tmp_path / "delta")
    assert guess["bytes"] == pytest.approx(report["bytes"], rel=0.01)
    assert guess["finetuned_bytes"] == report["finetuned_bytes"] == 4 * 256 * 512 * 2
    assert guess["memory_bytes"] > 0 and guess["seconds"] > 0
    assert guess["parameters"] == report["parameters"]


def test_the_reported_error_is_that_of_the_planes_on_sixteen_rows(tmp_path, matrices):
    report, packfile = run(tmp_path, *matrices, planes=2)
    before, after = to_float32(matrices[0][MATRIX]), to_float32(matrices[1][MATRIX])
    rows = [i * 40 // 16 for i in range(16)]
    d = (after - before)[rows].astype(np.float64)
    left = d - reference.expand(None, packfile[MATRIX])[rows]
    expected = np.linalg.norm(left) / np.linalg.norm(d)
    assert packfile.entries[MATRIX]["relative_error"] == pytest.approx(expected, abs=1e-6)
    assert report["relative_error"] == pytest.approx(expected, abs=1e-6)


def test_the_reported_error_is_that_which_verify_measures(tmp_path, rng):
    """Over all tensors, and large changes count for more; where the sample is all rows the two are the same."""
    shapes = {"a": (16, 300), "b": (12, 900), "experts": (2, 16, 300)}
    before = {name: weights(rng, shape, "float32") for name, shape in shapes.items()}
    after = {name: changed(rng, weight, "float32") for name, weight in before.items()}
    after["b"] = before["b"] + rng.choice([-0.5, 0.5], shapes["b"]).astype(np.float32)  # planes without error
    base, finetuned = pair(tmp_path, before, after)
    report = compress(base, finetuned, tmp_path / "delta")
    found = verify(tmp_path / "delta", base, finetuned)
    assert set(found["errors"]) == set(shapes)
    assert report["relative_error"] == pytest.approx(found["relative_error"], rel=1e-6)
    assert found["errors"]["b"] < 1e-3 and found["relative_error"] < 0.2 < found["errors"]["a"]


def test_card_info_and_report_state_one_size(tmp_path, matrices):
    report, packfile = run(tmp_path, *matrices)
    size = sum(path.stat().st_size for path in packfile.root.glob("delta_*"))
    assert report["bytes"] == info(packfile.root)["bytes"] == size
    assert f"{size:,} bytes" in (packfile.root / "README.md").read_text()


def test_a_sample_in_which_nothing_changed_has_no_error_to_report(tmp_path, rng):
    before = {MATRIX: weights(rng, (40, 300))}
    after = {MATRIX: before[MATRIX].copy()}
    after[MATRIX].view(np.uint16)[1] ^= 1  # a row that is not in the sample
    report, packfile = run(tmp_path, before, after, scale="tensor")
    assert "relative_error" not in packfile.entries[MATRIX] and report["relative_error"] is None


def test_progress_goes_to_stderr_and_only_when_asked_for(tmp_path, matrices, capfd):
    base, finetuned = pair(tmp_path, *matrices)
    compress(base, finetuned, tmp_path / "quiet")
    assert capfd.readouterr() == ("", "")
    compress(base, finetuned, tmp_path / "loud", progress=True)
    merge(base, tmp_path / "loud", tmp_path / "merged", progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "compress: 100%" in err and "merge: 100%" in err


def test_the_card_names_base_size_and_use(tmp_path, matrices):
    run(tmp_path, *matrices)
    card = (tmp_path / "delta" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: bitdelta\n") and "times smaller" in card
    assert "bitdelta merge base DELTA --out" in card


def test_info_agrees_with_the_checkpoint(tmp_path, rng, matrices):
    before = {**matrices[0], "norm.weight": weights(rng, (300,))}
    after = {**matrices[1], "norm.weight": weights(rng, (300,))}
    run(tmp_path, before, after)
    found = info(tmp_path / "delta")
    assert found["parameters"] == 40 * 300 + 300 and found["forms"]["row"]["parameters"] == 40 * 300


def test_no_checkpoint_is_an_error_of_ours(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(Error):
        compress(tmp_path / "empty", tmp_path / "empty", tmp_path / "delta")


def test_two_names_of_the_same_bytes_are_stored_once(tmp_path, rng):
    torch = pytest.importorskip("torch")
    embedding = torch.randn(50, 300).bfloat16()
    after = (embedding.float() + 0.05 * torch.randn(50, 300)).bfloat16()
    for name, tensor in (("base", embedding), ("finetuned", after)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        both = {"model.embed_tokens.weight": tensor, "lm_head.weight": tensor}
        torch.save(both, tmp_path / name / "pytorch_model.bin")
    report = compress(tmp_path / "base", tmp_path / "finetuned", tmp_path / "delta")
    packfile = load(tmp_path / "delta")
    assert packfile.entries["lm_head.weight"]["form"] == "tied" and report["parameters"] == 50 * 300
    assert info(tmp_path / "delta")["finetuned_bytes"] == 50 * 300 * 2  # as the fine-tune's file holds it
    assert same_bits(packfile["lm_head.weight"].sign, packfile["model.embed_tokens.weight"].sign)
    merge(tmp_path / "base", tmp_path / "delta", tmp_path / "merged")
    merged = read_all(tmp_path / "merged")
    assert same_bits(merged["lm_head.weight"], merged["model.embed_tokens.weight"])


def test_a_tie_that_the_base_lacks_is_kept(tmp_path, rng):
    torch = pytest.importorskip("torch")
    before = {"model.embed_tokens.weight": weights(rng, (50, 300), "float32")}
    base = write_checkpoint(tmp_path / "base", before)
    tensor = torch.from_numpy(changed(rng, before["model.embed_tokens.weight"], "float32"))
    (tmp_path / "finetuned").mkdir()
    torch.save(
        {"lm_head.weight": tensor, "model.embed_tokens.weight": tensor},
        tmp_path / "finetuned" / "pytorch_model.bin",
    )
    report = compress(base, tmp_path / "finetuned", tmp_path / "delta")
    merge(base, tmp_path / "delta", tmp_path / "merged")
    merged = read_all(tmp_path / "merged")
    assert same_bits(merged["lm_head.weight"], merged["model.embed_tokens.weight"])
    assert report["bytes"] < tensor.nbytes / 4
