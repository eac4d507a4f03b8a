"""The sampling panel: what it samples is what its controls say, and a bad molecule is told in it."""

import re

import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

from biokit.config import ModelConfig
from biokit.errors import ConfigError, DataError
from biokit.generate import encode_smiles, sample_around
from biokit.models.molbart import MOLBART
from biokit.tokenizers import SmilesTokenizer
from biokit.view.panel import SamplingPanel

TOKENIZER = SmilesTokenizer.packaged()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = ModelConfig(num_layers=1, hidden_size=32, num_attention_heads=4)
    return MOLBART.build(config, TOKENIZER.vocab_size, 64, 3).eval()


def press(panel: SamplingPanel) -> None:
    buttons = [one for row in panel._widget.children for one in getattr(row, "children", ()) if hasattr(one, "click")]
    assert len(buttons) == 1
    buttons[0].click()


def test_the_button_samples_with_the_values_of_the_controls_and_another_seed(model):
    panel = SamplingPanel(model, TOKENIZER, "OCC", num_samples=3, radius=0.5, seed=7)
    first = panel.samples
    arguments = {"radius": 0.5, "temperature": 1.0, "grammar": True}
    source = encode_smiles(TOKENIZER, ["CCO"])  # canonical, as the model was trained
    assert first == sample_around(model, TOKENIZER, source, 3, "topkp-perturbate", seed=7, **arguments)[0]
    panel._controls["num_samples"].value = 5
    panel._controls["radius"].value = 2.0
    panel._controls["sampling_method"].value = "beam-search-single-sample"
    before = panel.picture
    press(panel)
    assert panel.samples == sample_around(model, TOKENIZER, source, 5, "beam-search-single-sample", grammar=True)[0]
    assert panel.picture.png != before.png and panel._image.value == panel.picture.png
    assert "5 samples around OCC: radius 2, temperature 1" in panel.picture.alt
    assert "of 5 are molecules" in panel._status.value


def test_a_bad_molecule_is_told_in_the_panel_and_the_last_samples_stay(model):
    panel = SamplingPanel(model, TOKENIZER, "CCO", num_samples=2)
    samples, picture = panel.samples, panel._image.value
    for text, message in (("C1CC(", "cannot be parsed"), ("C" * 200, "tokens"), ("", "empty")):
        panel._controls["smiles"].value = text
        press(panel)
        assert message in panel._status.value and panel.samples == samples and panel._image.value == picture
    panel._controls["smiles"].value = "CCN"
    press(panel)
    assert "are molecules" in panel._status.value


def test_values_that_cannot_be(model):
    with pytest.raises(ConfigError, match="num_samples=41"):
        SamplingPanel(model, TOKENIZER, "CCO", num_samples=41)
    with pytest.raises(ConfigError, match="radius"):
        SamplingPanel(model, TOKENIZER, "CCO", radius=-1)
    with pytest.raises(DataError, match=re.escape('"C("')):
        SamplingPanel(model, TOKENIZER, "C(")


def test_the_live_panel_and_below_it_a_picture_for_where_no_kernel_runs(model):
    InteractiveShell.instance()
    panel = SamplingPanel(model, TOKENIZER, "CCO", num_samples=2)
    with capture_output() as captured:
        panel._ipython_display_()
    live, still = (output.data for output in captured.outputs)
    assert "application/vnd.jupyter.widget-view+json" in live and "image/png" not in live
    assert list(still) == ["text/html", "image/png", "text/plain"] and panel._name in still["text/html"]
