"""A panel that samples around a molecule with a live model: radius, temperature, number, method.

It needs a kernel and widgets. Below it, a notebook keeps a picture of the first samples, which steps back where the
live panel is on the page; a papermill output, a converted page and a code host show the picture.
"""

from __future__ import annotations

import itertools
import os
from typing import TYPE_CHECKING, Any

from biokit.errors import ConfigError, DataError
from biokit.generate.inputs import encode_smiles
from biokit.generate.latent import SAMPLING_METHODS, sample_around
from biokit.view.interactive import InteractiveView
from biokit.view.molecules import show_molecules
from biokit.view.picture import Picture

if TYPE_CHECKING:
    from biokit.models.molbart import MolBART
    from biokit.tokenizers import SmilesTokenizer

MAX_SAMPLES = 40
_numbers = itertools.count(1)


class SamplingPanel:
    """Samples around a molecule as its controls say; `samples` and `picture` hold the last ones.

    With `grammar`, brackets and ring bonds are closed (`biokit.generate.grammar`).

    Raises:
        ConfigError, DataError: the first values are out of range, or the molecule cannot be encoded.
    """

    def __init__(
        self,
        model: MolBART,
        tokenizer: SmilesTokenizer,
        smiles: str,
        *,
        num_samples: int = 8,
        radius: float = 1.0,
        temperature: float = 1.0,
        sampling_method: str = "topkp-perturbate",
        grammar: bool = True,
        seed: int = 1234,
    ) -> None:
        self._model, self._tokenizer, self._grammar = model, tokenizer, grammar
        self._name = f"biokit-panel-{os.getpid()}-{next(_numbers)}"
        self.seed = seed
        self.samples: list[str] = []
        self.picture: Picture
        self.sample(smiles, num_samples, radius, temperature, sampling_method)
        self._controls = _build_controls(smiles, num_samples, radius, temperature, sampling_method)
        self._widget = self._build() if self._controls else None

    def sample(
        self, smiles: str, num_samples: int, radius: float, temperature: float, sampling_method: str
    ) -> list[str]:
        """What the button does: sample with the next seed, and draw.

        Raises:
            ConfigError: a value outside its range. DataError: the molecule cannot be read or encoded.
        """
        from biokit.chem.molecules import canonicalize

        if not 1 <= num_samples <= MAX_SAMPLES:
            raise ConfigError(f"num_samples={num_samples}", "a panel cannot show them", f"Give 1 to {MAX_SAMPLES}")
        source = encode_smiles(self._tokenizer, [canonicalize(smiles.strip())])
        self.samples = sample_around(
            self._model, self._tokenizer, source, num_samples, sampling_method,
            radius=radius, temperature=temperature, grammar=self._grammar, seed=self.seed,
        )[0]  # fmt: skip
        self.seed += 1
        title = f"{num_samples} samples around {smiles.strip()}: radius {radius:g}, temperature {temperature:g}"
        self.picture = show_molecules(self.samples, title=title, max_molecules=MAX_SAMPLES)
        return self.samples

    def _build(self) -> Any:
        import ipywidgets

        controls = self._controls
        self._image = ipywidgets.Image(value=self.picture.png, format="png", layout={"max_width": "100%"})
        self._image.alt = self.picture.alt
        self._status = ipywidgets.Label(self._summary(), style={"text_color": "#212121"})
        button = ipywidgets.Button(description="Sample", button_style="primary", icon="play")
        button.add_class("biokit-sample")
        button.on_click(lambda _: self._press())
        rows = [
            controls["smiles"],
            ipywidgets.HBox([controls["radius"], controls["temperature"]], layout={"flex_flow": "row wrap"}),
            ipywidgets.HBox([controls["num_samples"], controls["sampling_method"]], layout={"flex_flow": "row wrap"}),
            ipywidgets.HBox([button, self._status]),
            self._image,
        ]
        box = ipywidgets.VBox(rows)
        box.add_class(self._name)
        return box

    def _press(self) -> None:
        try:
            self.sample(**{name: control.value for name, control in self._controls.items()})
        except (ConfigError, DataError) as error:
            self._status.value = str(error)
            return
        self._image.value, self._image.alt = self.picture.png, self.picture.alt
        self._status.value = self._summary()

    def _summary(self) -> str:
        from biokit.chem.scores import canonicalize_all

        found = [text for text in canonicalize_all(self.samples) if text]
        return f"{len(found)} of {len(self.samples)} are molecules, {len(set(found))} of them different"

    def _ipython_display_(self) -> None:
        from IPython.display import display

        picture = self.picture
        if self._widget is not None:
            live = {**self._widget._repr_mimebundle_(), "text/plain": "the live panel, where a kernel runs"}
            display(live, raw=True)
            picture = InteractiveView(picture.png, picture.alt, "panel.js", {"panel": self._name})
        display(picture)

    def __repr__(self) -> str:
        return f"SamplingPanel: {self._summary()}"


def _build_controls(
    smiles: str, num_samples: int, radius: float, temperature: float, sampling_method: str
) -> dict[str, Any]:
    """The widgets by the name of what they set; none where ipywidgets is not installed."""
    try:
        import ipywidgets
    except ImportError:
        return {}
    style: dict[str, Any] = {"style": {"description_width": "90px"}}
    slider = {**style, "continuous_update": False}
    wide = {**style, "layout": {"width": "min(640px, 98%)"}}
    return {
        "smiles": ipywidgets.Text(smiles, description="SMILES", **wide),
        "num_samples": ipywidgets.IntSlider(num_samples, 1, MAX_SAMPLES, description="number", **slider),
        "radius": ipywidgets.FloatSlider(radius, min=0, max=max(4.0, radius), step=0.1, description="radius", **slider),
        "temperature": ipywidgets.FloatSlider(
            temperature, min=0.1, max=max(2.0, temperature), step=0.1, description="temperature", **slider
        ),
        "sampling_method": ipywidgets.Dropdown(
            options=SAMPLING_METHODS, value=sampling_method, description="method", **style
        ),
    }
