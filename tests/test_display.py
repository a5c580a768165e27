"""What deltas, packfiles and models say of themselves in Jupyter and in a model card."""

import logging
from html.parser import HTMLParser

import numpy as np
import pytest
from folders import changed, weights, write_checkpoint

import bitdelta
from bitdelta.display import MOST, panel, size

HOSTILE = "<script>alert('&')</script>"


class Cells(HTMLParser):
    """The texts of an HTML fragment; fails on a tag that nothing here writes, or that is not closed."""

    def __init__(self, fragment):
        super().__init__()
        self.texts, self.open = [], []
        self.feed(fragment)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert tag in ("div", "strong", "table", "tr", "td", "th", "p") and not attrs
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_every_text_of_a_panel_is_escaped():
    fragment = panel(HOSTILE, {HOSTILE: HOSTILE}, [HOSTILE], [[HOSTILE]])
    assert Cells(fragment).texts == [HOSTILE] * 5


def test_a_long_table_says_how_many_rows_it_leaves_out():
    texts = Cells(panel("T", {}, ["n"], [[str(i)] for i in range(MOST + 7)])).texts
    assert texts[-2:] == [str(MOST - 1), "and 7 more"]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.00 kB"), (2.5e6, "2.50 MB"), (7e9, "7.00 GB")],
)
def test_sizes_have_units(count, text):
    assert size(count) == text


def test_a_delta_shows_its_shape_form_and_scales():
    rng = np.random.default_rng(0)
    base = rng.normal(size=(48, 256)).astype(np.float32)
    delta = bitdelta.extract(base, base + np.float32(0.5), planes=2)
    texts = Cells(delta._repr_html_()).texts
    assert {"48 x 256", "2", "row"} <= set(texts)
    assert f"{size(delta.nbytes)}, {8 * delta.nbytes / (48 * 256):.2f} bits per weight" in texts
    assert f"{delta.scale.min():.3g} to {delta.scale.max():.3g}, mean {delta.scale.mean():.3g}" in texts


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    root = tmp_path_factory.mktemp("packed")
    rng = np.random.default_rng(1)
    before = {f"{HOSTILE.replace('/', '')}.weight": weights(rng, (64, 256)), "norm": weights(rng, (8,))}
    write_checkpoint(root / "base", before)
    write_checkpoint(root / "tuned", {name: changed(rng, weight) for name, weight in before.items()})
    bitdelta.compress(root / "base", root / "tuned", root / "<b>delta")
    return root / "<b>delta"


def test_a_packfile_shows_sizes_and_errors_and_no_markup_of_its_names(packed):
    packfile = bitdelta.load(packed)
    stored = sum(entry["bytes"] for entry in packfile.entries.values())
    assert repr(packfile) == f"Packfile({str(packed)!r}, 2 tensors, {stored:,} bytes)"
    texts = Cells(packfile._repr_html_()).texts
    assert f"Packfile {packed}" in texts
    [error] = [entry["relative_error"] for entry in packfile.entries.values() if "planes" in entry]
    assert f"median {error:.3f}, most {error:.3f}" in texts


def test_a_card_states_the_error_and_how_to_load_beside_others(packed):
    card = (packed / "README.md").read_text(encoding="utf-8")
    [error] = [
        entry["relative_error"] for entry in bitdelta.load(packed).entries.values() if "planes" in entry
    ]
    assert f"median {error:.3f}, most {error:.3f}." in " ".join(card.split())
    assert 'model.load_delta("NAME", "DELTA")' in card


def test_what_is_written_is_logged(packed, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "bitdelta"):
        bitdelta.merge(packed.parent / "base", packed, tmp_path / "merged")
    assert f"wrote {tmp_path / 'merged'}" in caplog.messages


def test_a_model_shows_its_deltas_and_logs_them_coming_and_going(tmp_path, caplog):
    from models import llama_config, make

    root = make(tmp_path, llama_config())
    model = bitdelta.DeltaModel.from_pretrained(root / "base", max_resident=1)
    with caplog.at_level(logging.INFO, "bitdelta"):
        model.load_delta(HOSTILE, root / "delta-0")
        model.load_delta("b", root / "delta-1")
    assert f"b: loaded from {root / 'delta-1'}" in caplog.messages
    assert repr(model) == f"DeltaModel(LlamaForCausalLM, base={str(root / 'base')!r}, deltas={model.deltas})"
    texts = Cells(model._repr_html_()).texts
    assert HOSTILE in texts and "not resident" in texts and "DeltaModel of LlamaForCausalLM" in texts
    with caplog.at_level(logging.INFO, "bitdelta"):
        model.unload_delta("b")
    assert "b: unloaded" in caplog.messages
